"""How many tokens a cache tensor holds, as steps have left it: positions that lie on a device are
read once, and counted from then on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loki_compile.caches import CacheBinding, Cached, Stamp, reading_waits, version_of

if TYPE_CHECKING:
    from loki_compile.variants import FillGraph

_lock = threading.RLock()
_filled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def filled_after(
    graph: FillGraph | None,
    args: Sequence[Any],
    bindings: Sequence[CacheBinding],
    caches: Sequence[Cached],
) -> list[int]:
    """Tokens in each cache behind a step; no device sync in steady state. `graph`: what reads how
    far the step fills them, if anything does."""
    written: list[int] = []  # what the graph says, asked once

    def after(binding: CacheBinding, cached: Cached) -> int:
        slots = cached.slots
        if binding.form.grows:
            return slots + cached.stored
        if not binding.form.written:
            return slots
        # Counting costs nothing; reading a position costs a sync where it lies on a device.
        if reading_waits(cached.base):
            before = filled_before(cached)
            if before is not None:
                return min(slots, before + cached.stored)
        if graph is None:
            return slots
        if not written:
            written.append(int(graph.read(args)))
        # Positions that are counted from the end are no number of tokens.
        return min(slots, written[0]) if written[0] > 0 else slots

    return [after(*pair) for pair in zip(bindings, caches, strict=True)]


def remember_filled(left: Cached, filled: int) -> None:
    """How many of a cache's slots are filled, as long as nothing else writes it."""
    with _lock:
        known = _filled.get(left.base)
        if known is not None and known[0].is_of(left.base):
            known[0].version, known[1] = version_of(left.base), filled
        else:
            _filled[left.base] = [Stamp(left.base), filled]


def filled_before(cached: Cached) -> int | None:
    """What `remember_filled` said, if nothing has written the cache since."""
    with _lock:
        known = _filled.get(cached.base)
    return known[1] if known is not None and known[0].holds(cached.base) else None


def forget_filled(tensor: Tensor) -> None:
    """A cache holds fewer tokens than the last step left, and nothing was written: its length is
    asked of its positions again."""
    with _lock:
        _filled.pop(tensor, None)
