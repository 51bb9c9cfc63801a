"""What a step has left of a conversation, all of its caches at once: the next step compares lists.

Telling of each cache by itself whether it is as it was costs the host more than all else that a
step does. A step that finds every tensor where and as the last one of its graph left it goes on at
once; any other takes each cache by itself (`runtime`, `indexes`), after what steps on a trail have
not written down of each index was: `settle_all`.

A trail keeps nothing alive.
"""

from __future__ import annotations

import math
import operator
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from loki_compile.kernels.kept import Layout

if TYPE_CHECKING:
    from loki_compile.index_record import IndexRecord
    from loki_compile.prompts import Asked
    from loki_compile.steps import Served, Step

# Conversations that a graph knows at a time.
MOST = 32

_lock = threading.Lock()
_unsettled: weakref.WeakSet[Trail] = weakref.WeakSet()

_shape = operator.attrgetter("shape")
_version = operator.attrgetter("_version")
_storage = torch.Tensor.untyped_storage


class Trail:
    """Of one conversation and one graph.

    `tensors` are told by their storage, address, shape, strides and, where that is counted,
    version. `records` are the indexes that mirror them, None where the last step was dense. An
    index that steps have fallen `behind` of does not mirror the rows [first, end).
    """

    def __init__(
        self,
        step: Step,
        tensors: Sequence[Tensor],
        records: Sequence[IndexRecord] | None,
        layouts: tuple[Layout | None, ...] | None,
        spots: Sequence[tuple[int, ...]],
    ) -> None:
        """spots: of each index, which of the tensors it mirrors."""
        self.served: Served = step.served
        self.spots = spots
        self.counts = not any(x.is_inference() for x in tensors)
        self.watched = [StorageWeakRef(_storage(x)) for x in tensors]  # no other takes its place
        self.storages = [watched.cdata for watched in self.watched]
        self.addresses = list(map(Tensor.data_ptr, tensors))
        self.strides = list(map(Tensor.stride, tensors))
        self.capacity = 0 if step.grown is None else step.grown.capacity
        self.layouts = layouts
        self.used = False
        self.behind: list[tuple[int, int]] | None = None  # of each index
        # What prompts have asked of caches without a basis: of which tensor, where in its memory.
        self.asked: list[tuple[int, tuple[int, ...], Asked]] = []
        self.records = None
        self.again_at = math.inf  # tokens in a cache from which on some basis is fitted again
        if records is not None:
            self.records = [weakref.ref(record) for record in records]
            self.again_at = min((record.again_at for record in records), default=math.inf)
            for record in records:
                record.trail = self
        self.go_on(step, tensors)

    def go_on(self, step: Step, tensors: Sequence[Tensor]) -> None:
        """A step has left the same tensors, written or longer."""
        self.filled = step.filled
        self.shapes = list(map(_shape, tensors))
        self.versions = list(map(_version, tensors)) if self.counts else None

    def leads_to(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that the last step has left, as it left them."""
        return (
            self.shapes == list(map(_shape, tensors))
            and self.addresses == list(map(Tensor.data_ptr, tensors))
            and self.strides == list(map(Tensor.stride, tensors))
            and self.storages == [_storage(x)._cdata for x in tensors]
            and (self.versions is None or self.versions == list(map(_version, tensors)))
        )

    def held(self) -> list[IndexRecord] | None:
        """The indexes, none of which another graph has written since."""
        if self.records is None:
            return None
        held = [ref() for ref in self.records]
        if any(record is None or record.trail is not self for record in held):
            return None
        return held  # type: ignore[return-value]

    def fall_behind(self, written: Sequence[tuple[int, int]]) -> None:
        """A step is about to write these rows, [first, end), and none of its indexes."""
        before = self.behind or written
        self.behind = [
            (min(first, a), max(end, b))
            for (first, end), (a, b) in zip(before, written, strict=True)
        ]

    def unsettle(self) -> None:
        """Its indexes do not say yet how the last step left them."""
        with _lock:
            _unsettled.add(self)

    def settle(self) -> None:
        """Writes down of each index what the last step on the trail left."""
        held = self.held()
        if held is None or self.versions is None:
            return
        for number, (record, spots) in enumerate(zip(held, self.spots, strict=True)):
            versions = tuple(self.versions[spot] for spot in spots)
            if self.behind is None:
                record.settle(versions, self.filled[self.served.kept[number]])
            else:
                record.settle_behind(versions, self.behind[number][0])


def settle_all() -> None:
    """What is known of each index is what is true of it."""
    if not _unsettled:
        return
    with _lock:
        trails = list(_unsettled)
        _unsettled.clear()
    for trail in trails:
        trail.settle()


class Trails:
    """Of one graph, by the storage of the first tensor."""

    def __init__(self, places: Sequence[int], spots: Sequence[tuple[int, ...]]) -> None:
        """places: the arguments that it watches; spots: of each index, which of them it mirrors."""
        self.places = tuple(places)
        self.spots = tuple(spots)
        self.of: dict[Any, Trail] = {}

    def tensors(self, args: Sequence[Any]) -> list[Tensor]:
        return [args[place] for place in self.places]

    def find(self, tensors: Sequence[Tensor], served: Served) -> Trail | None:
        trail = self.of.get(_storage(tensors[0])._cdata)
        if trail is None or trail.served is not served:
            return None
        if trail.records is not None and not trail.counts:
            return None  # rows have to be compared
        return trail if trail.leads_to(tensors) else None

    def add(self, trail: Trail) -> None:
        key = trail.storages[0]
        self.of.pop(key, None)
        self.of[key] = trail
        if len(self.of) > MOST:
            with _lock:
                self.of.pop(next(iter(self.of)), None)
