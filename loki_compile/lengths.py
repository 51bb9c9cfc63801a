"""How many tokens a cache tensor holds, as steps have left it: positions that lie on a device are
read once, and counted from then on."""

from __future__ import annotations

import threading

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loki_compile.caches import Cached, Stamp, version_of

_lock = threading.RLock()
_filled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
