"""Tensors that grow in place: memory with room behind their rows, found again at the next step.

Where a graph makes a tensor longer (`passes.appends`), it writes the new rows behind the past, in
memory that has room there, and the caller gets a longer view of it. `cat` would have made another
tensor, so that is done only where nobody can tell: the past lies in memory that an earlier step
laid out, and nobody else holds the past or any other view of that memory. Anything else (a fork,
beams, a tensor from elsewhere) is copied once into new memory, as `cat` does. A cut that nobody
else holds goes on where it is.

Who holds what: a storage counts the tensors that lie in it, exactly. How many hold one tensor is
its reference count, of which a call itself takes some, and not of each argument as many; the fewest
that were found at one are taken for those, of each argument by itself. A caller who is not counted
would still find his rows as they were, since rows are only written behind them: he would see what
is written into the longer tensor later. Threads that begin with one tensor ask in turn, and the
first one's longer view is there when the next one asks.

The memory lives as long as a view of it; so does what is kept beside it. It is no larger than the
rows at first use by more than the room that `capacity_for` says.
"""

from __future__ import annotations

import ctypes
import math
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from loki_compile.caches import GivenSize
from loki_compile.recovery import is_shortage

if TYPE_CHECKING:
    from loki_compile.index_record import IndexRecord

# Room is a share of the rows, and at least so many. What is not used of it takes addresses on a
# CPU, and memory elsewhere.
ROOM = {"cpu": (2, 256)}
ROOM_ELSEWHERE = (8, 128)
ROUND = 64
# The capacity of what does not grow in place.
UNLIMITED = 1 << 40
# So many calls in a row that find a past held more often than others did: that is how these calls
# come, not another cache.
_LEARN = 4

LARGE_PAGE = 1 << 21  # bytes, of x86-64 and of ARM with pages of 4 KiB
_MADV_HUGEPAGE = 14

_lock = threading.RLock()
_buffers: dict[int, Buffer] = {}  # by the address of the storage, which lives as long as its entry


@dataclass(frozen=True)
class Growth:
    """How a graph makes one tensor longer: the numbers of its argument and its output, the axis,
    and how many rows are new."""

    argument: int
    output: int
    axis: int
    new: int | GivenSize


class Buffer:
    """Memory with room for rows along an axis; `kept` is what mirrors them (see `indexes`)."""

    __slots__ = ("__weakref__", "address", "axis", "capacity", "kept", "others", "strides", "watch")

    def __init__(self, whole: Tensor, axis: int) -> None:
        self.address = whole.data_ptr()
        self.axis = axis
        self.capacity = whole.shape[axis]
        self.others = _without(whole.shape, axis)
        self.strides = whole.stride()
        self.kept: dict[Any, IndexRecord] = {}
        storage = whole.untyped_storage()
        key = storage._cdata
        forget = _buffers.pop

        def died(_: Any) -> None:
            forget(key, None)

        self.watch = weakref.ref(storage, died)
        with _lock:
            _buffers[key] = self

    def begins_with(self, tensor: Tensor, axis: int) -> bool:
        """Whether a tensor in this memory is its first rows."""
        return (
            axis == self.axis
            and tensor.stride() == self.strides
            and tensor.data_ptr() == self.address
            and _without(tensor.shape, axis) == self.others
        )

    def view(self, tensor: Tensor, rows: int) -> Tensor:
        """The first rows, given any view of the memory."""
        sizes = (*self.others[: self.axis], rows, *self.others[self.axis :])
        return tensor.as_strided(sizes, self.strides)


def buffer_of(tensor: Tensor) -> Buffer | None:
    """The memory that a tensor begins."""
    buffer = _buffers.get(tensor.untyped_storage()._cdata)
    return buffer if buffer is not None and buffer.begins_with(tensor, buffer.axis) else None


def all_buffers() -> list[Buffer]:
    """Those alive now."""
    with _lock:
        return list(_buffers.values())


def capacity_for(rows: int, device: torch.device) -> int:
    """Rows that memory is made for, to hold so many and what comes."""
    share, least = ROOM.get(device.type, ROOM_ELSEWHERE)
    return -(-(rows + max(rows // share, least)) // ROUND) * ROUND


class Grown:
    """What one call grows: its longer tensors in order, the memory that each past lies in, None
    where that is not ours, and the memory that the longer one lies in."""

    __slots__ = ("after", "before", "capacity", "rooms")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rooms: list[Tensor] = []
        self.before: list[Buffer | None] = []
        self.after: list[Buffer] = []


class Growing:
    """What grows in a graph."""

    fewest = 1 << 30  # references to a tensor that a call was found with, of all graphs

    def __init__(self, growths: Sequence[Growth]) -> None:
        self.growths = tuple(growths)
        self.places = tuple(growth.argument for growth in growths)
        self.alone: list[int] = []
        self.goes_on = False  # the last call went on where the one before it had ended
        self.lengths: list[int] = []  # of what it left
        self.held_more: dict[int, tuple[int, int]] = {}  # calls in a row, and the fewest in these

    def holders(self, args: Sequence[Any]) -> list[int]:
        """References to each past; to be asked before anything else takes some."""
        return [sys.getrefcount(args[place]) for place in self.places]

    def take(self, args: Sequence[Any], holders: Sequence[int]) -> Grown | None:
        """The longer tensors, new rows not written yet; None where there is no memory for them."""
        with _lock:  # a view that is made is seen by whoever asks next whether there are others
            return self._take(args, holders)

    def _take(self, args: Sequence[Any], holders: Sequence[int]) -> Grown | None:
        alone = self._alone(holders)
        pasts = [args[place] for place in self.places]
        lengths = []
        fit, capacity = [], 0
        inference = torch.is_inference_mode_enabled()
        before = []
        for past, growth, count, own in zip(pasts, self.growths, holders, alone, strict=True):
            new = growth.new if isinstance(growth.new, int) else growth.new.of(args)
            rows = past.shape[growth.axis] + new
            lengths.append(rows)
            storage = past.untyped_storage()._cdata
            buffer = _buffers.get(storage)
            if buffer is not None and not buffer.begins_with(past, growth.axis):
                buffer = None
            before.append(buffer)
            goes_on = (
                buffer is not None
                and count <= own
                and rows < buffer.capacity
                and torch._C._storage_Use_Count(storage) == _alone_in_storage(past)
                and (inference or not past.is_inference())
            )
            fit.append(goes_on)
            if goes_on:
                assert buffer is not None
                capacity = max(capacity, buffer.capacity)
        grown = Grown(capacity)
        grown.before = before
        begun = [past.shape[growth.axis] for past, growth in zip(pasts, self.growths, strict=True)]
        self.goes_on, self.lengths = begun == self.lengths, lengths
        most = max(lengths)
        if capacity <= most:
            try:
                return self._fill(grown, pasts, lengths, fit, capacity_for(most, pasts[0].device))
            except Exception as error:
                if not is_shortage(error):
                    raise
                capacity = most + 1
        try:
            return self._fill(grown, pasts, lengths, fit, capacity)
        except Exception as error:
            if not is_shortage(error):
                raise
            return None

    def take_again(
        self, pasts: Sequence[Tensor], holders: Sequence[int], args: Sequence[Any], capacity: int
    ) -> Grown | None:
        """The same for pasts that are known to begin memory with so much room; None where they are
        held by others, or there is too little room."""
        with _lock:
            return self._take_again(pasts, holders, args, capacity)

    def _take_again(
        self, pasts: Sequence[Tensor], holders: Sequence[int], args: Sequence[Any], capacity: int
    ) -> Grown | None:
        alone = self._alone(holders)
        if holders != alone and any(map(operator.gt, holders, alone)):
            return None
        for past in pasts:
            if torch._C._storage_Use_Count(past.untyped_storage()._cdata) != _alone_in_storage(
                past
            ):
                return None
        if pasts[0].is_inference() and not torch.is_inference_mode_enabled():
            return None
        grown = Grown(capacity)
        for past, growth in zip(pasts, self.growths, strict=True):
            sizes = list(past.shape)
            sizes[growth.axis] += growth.new if isinstance(growth.new, int) else growth.new.of(args)
            if sizes[growth.axis] >= capacity:
                return None
            grown.rooms.append(past.as_strided(sizes, past.stride()))
        return grown

    def find_memory(self, grown: Grown, args: Sequence[Any]) -> None:
        """Which memory it is that tensors go on in."""
        grown.before = [_buffers[args[p].untyped_storage()._cdata] for p in self.places]
        grown.after = [buffer for buffer in grown.before if buffer is not None]
        for buffer, place in zip(grown.after, self.places, strict=True):
            for record in buffer.kept.values():
                record.cut(args[place].shape[buffer.axis])

    def _fill(
        self,
        grown: Grown,
        pasts: Sequence[Tensor],
        lengths: Sequence[int],
        fit: Sequence[bool],
        capacity: int,
    ) -> Grown:
        grown.capacity = capacity
        grown.rooms, grown.after = [], []
        for number, past in enumerate(pasts):
            buffer, rows = grown.before[number], lengths[number]
            if fit[number] and buffer is not None and buffer.capacity == capacity:
                for record in buffer.kept.values():
                    record.cut(past.shape[buffer.axis])
                room = buffer.view(past, rows)
            else:
                buffer, room = new_buffer(past, self.growths[number].axis, rows, capacity)
            grown.rooms.append(room)
            grown.after.append(buffer)
        return grown

    def _alone(self, holders: Sequence[int]) -> Sequence[int]:
        """Of each past the references where nothing but its one cache holds it, as far as calls
        have shown. One argument may come with fewer than the next, at every call."""
        Growing.fewest = min(Growing.fewest, *holders)
        if not self.alone:
            self.alone = [Growing.fewest] * len(holders)
        if holders == self.alone:
            self.held_more.clear()
            return self.alone
        for number, count in enumerate(holders):
            if count <= self.alone[number]:
                self.alone[number] = count
                self.held_more.pop(number, None)
                continue
            calls, least = self.held_more.pop(number, (0, count))
            calls, least = calls + 1, min(least, count)
            if calls >= _LEARN:
                self.alone[number] = least
            else:
                self.held_more[number] = calls, least
        return self.alone

    def put(self, outputs: Any, grown: Grown) -> list[Any]:
        """A call's outputs, with the longer tensors where the graph has none."""
        outputs = list(outputs)
        for growth, room in zip(self.growths, grown.rooms, strict=True):
            outputs[growth.output] = room
        return outputs


def with_room(
    run: Callable[..., Any], caches: Sequence[tuple[int, int]], any_length: bool
) -> Callable[..., list[Any]]:
    """A function some of whose outputs, (number, axis), are caches behind a prompt: in memory with
    room from the start, so that no later step finds them laid out otherwise than its own.

    any_length: Dynamo is told that they will be longer, and traces the first step behind the prompt
    for every length. It would for the one that it sees, and again at the second step.
    """

    def call(*args: Any) -> list[Any]:
        outputs = list(run(*args))
        for place, axis in caches:
            keys = outputs[place]
            rows = keys.shape[axis]
            try:
                _, outputs[place] = new_buffer(keys, axis, rows, capacity_for(rows, keys.device))
            except Exception as error:
                if not is_shortage(error):
                    raise
            if any_length:
                torch._dynamo.maybe_mark_dynamic(outputs[place], axis)
        return outputs

    return call


def new_buffer(past: Tensor, axis: int, rows: int, capacity: int) -> tuple[Buffer, Tensor]:
    """Memory of so many rows, and a view of its first `rows`, which begin with those of `past`."""
    sizes = list(past.shape)
    sizes[axis] = capacity
    whole = torch.empty(sizes, dtype=past.dtype, device=past.device)
    _ask_for_large_pages(whole, axis, past.shape[axis])
    buffer = Buffer(whole, axis)
    room = buffer.view(whole, rows)
    room.narrow(axis, 0, past.shape[axis]).copy_(past)
    return buffer, room


def _ask_for_large_pages(whole: Tensor, axis: int, rows: int) -> None:
    """Asks Linux to put the first rows into pages of 2 MiB before they are written: chosen keys lie
    apart, and to find the small page of each takes as long as to read it (docs/measured.md). Only
    pages that these rows fill, so that no room becomes memory. A refusal changes nothing."""
    if whole.device.type != "cpu" or MADVISE is None:
        return
    inner = math.prod(whole.shape[axis + 1 :]) * whole.element_size()
    runs, step = math.prod(whole.shape[:axis]), whole.shape[axis] * inner
    if rows * inner < LARGE_PAGE:
        return
    for begin in range(whole.data_ptr(), whole.data_ptr() + runs * step, step):
        first = -(-begin // LARGE_PAGE) * LARGE_PAGE
        size = (begin + rows * inner - first) // LARGE_PAGE * LARGE_PAGE
        if size > 0:
            MADVISE(first, size, _MADV_HUGEPAGE)


def _without(sizes: Iterable[int], axis: int) -> tuple[int, ...]:
    sizes = tuple(sizes)
    return (*sizes[:axis], *sizes[axis + 1 :])


def _alone_in_storage(tensor: Tensor) -> int:
    """Users of a storage in which nothing but this tensor, and what it is a view of, lies."""
    return _OWN_USES + (1 if tensor._base is None else 2)


def _own_uses() -> int:
    """Users that a storage has of itself, once Python knows it. Private API, checked on torch 2.11
    and 2.13: `_storage_Use_Count`."""
    tensor = torch.empty(1)
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1


_OWN_USES = _own_uses()


def _madvise() -> Callable[[int, int, int], int] | None:
    """Linux' `madvise`, None elsewhere."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast("Callable[[int, int, int], int]", found)


MADVISE = _madvise()
