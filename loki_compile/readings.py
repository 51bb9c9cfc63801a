"""What the rows of sites read and leave out, added up where it is computed: `stats()["models"]`.

A step hands over two numbers of each site, and nothing waits for them: they are added on their
device, and read when somebody asks. To warn of layers that leave out much, the sums are copied to
the host every so many steps, and looked at once the copy has arrived by itself.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loki_compile.recovery import ordinary_tensors

if TYPE_CHECKING:
    from loki_compile.counts import Tally

# Steps from one look at the sums to the next; the first look is behind as many.
LOOK_EVERY = 32


@dataclass(frozen=True)
class Reading:
    """Of one site, the means over its rows and over `steps` steps: how many `keys` a row reads, and
    the share of attention that it leaves out, as its scores estimate it."""

    steps: int
    keys: float
    left_out: float


def joined(parts: Sequence[dict[str, Reading]]) -> dict[str, Reading]:
    """What several graphs have read, each counting by its steps."""
    found: dict[str, Reading] = {}
    for path, new in ((path, new) for part in parts for path, new in part.items()):
        old = found.get(path, Reading(0, 0.0, 0.0))
        steps = old.steps + new.steps
        keys = (old.keys * old.steps + new.keys * new.steps) / steps
        left_out = (old.left_out * old.steps + new.left_out * new.steps) / steps
        found[path] = Reading(steps, keys, left_out)
    return found


class Readings:
    """The sums of the sites of a graph, by their paths."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self._lock = threading.Lock()
        self._sums: dict[torch.device, Tensor] = {}  # (sites, 2) fp64
        self._steps = 0
        self._arriving: _Arriving | None = None

    def add(self, means: Sequence[Tensor]) -> None:
        """Takes what a step tells of each site, (2,) fp32: keys, and what is left out."""
        device = means[0].device
        with self._lock, ordinary_tensors():
            if device not in self._sums:
                self._sums[device] = torch.zeros((len(means), 2), dtype=torch.float64).to(device)
            self._sums[device] += torch.stack(tuple(means))
            self._steps += 1

    def clear(self) -> None:
        """Sets all back to zero."""
        with self._lock:
            self._sums, self._steps, self._arriving = {}, 0, None

    def read(self) -> dict[str, Reading]:
        """Of each path what was read so far, none before the first step. Waits for the device."""
        with self._lock:
            if not self._steps:
                return {}
            total = sum(sums.cpu() for sums in self._sums.values())
            return _readings(self.paths, total, self._steps)

    def look(self, tell: Callable[[dict[str, Reading]], None]) -> None:
        """Tells what was read so far, every so many steps, and waits for no device."""
        with self._lock:
            if self._arriving is None and self._steps % LOOK_EVERY == 0 and self._sums:
                self._arriving = _Arriving(list(self._sums.values()), self._steps)
            arriving = self._arriving
            if arriving is None or not arriving.is_there():
                return
            self._arriving = None
        tell(_readings(self.paths, sum(arriving.copies), arriving.steps))


class Told:
    """What sparse steps of one graph tell of its weighed sites, as the last of their outputs."""

    def __init__(
        self, paths: Sequence[str], tell: Callable[[Tally, dict[str, Reading]], None] | None
    ):
        """
        Args:
          paths: of the weighed sites, in the order of their outputs; two may have one.
          tell: is told every so many steps what a model's layers read; None: nobody.
        """
        self.paths = tuple(paths)
        self.names = _names(paths)
        self.tell = tell

    def take(self, tally: Tally, outputs: list[Any]) -> None:
        """Takes what rows read off the outputs of a step; waits for no device."""
        if not self.names:
            return
        readings = tally.readings_of(self.names)
        readings.add(outputs[-len(self.names) :])
        del outputs[-len(self.names) :]
        if self.tell is not None:
            readings.look(functools.partial(self.tell, tally))

    def of(self, tally: Tally) -> dict[str, Reading]:
        """Of each site of the graph, by its path: what it read so far. Waits for the device."""
        known = tally.readings.get(self.names)
        read = {} if known is None else known.read()
        pairs = zip(self.paths, self.names, strict=True)
        return {path: read[name] for path, name in pairs if name in read}


def _names(paths: Sequence[str]) -> tuple[str, ...]:
    """Of each of the sites one that no other has."""
    seen: Counter[str] = Counter()
    names = []
    for path in paths:
        seen[path] += 1
        more = "" if path and seen[path] == 1 else f" {seen[path]}"
        names.append(f"{path or 'site'}{more}")
    return tuple(names)


class _Arriving:
    """Sums on their way to the host."""

    def __init__(self, sums: Sequence[Tensor], steps: int) -> None:
        self.steps = steps
        self.copies: list[Tensor] = []
        self.events: list[torch.cuda.Event] = []
        with ordinary_tensors():
            for tensor in sums:
                if tensor.device.type == "cpu":
                    self.copies.append(tensor.clone())
                    continue
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self.copies.append(room.copy_(tensor, non_blocking=True))
                with torch.cuda.device_of(tensor):
                    event = torch.cuda.Event()
                    event.record()
                self.events.append(event)

    def is_there(self) -> bool:
        return all(event.query() for event in self.events)


def _readings(paths: Sequence[str], total: Any, steps: int) -> dict[str, Reading]:
    means = (total / steps).tolist()
    return {
        path: Reading(steps, keys, left_out)
        for path, (keys, left_out) in zip(paths, means, strict=True)
    }
