"""Dense steps on demand: they correct a cache, verify drafts, or go on where drafts do not pay."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Asked(enum.Enum):
    """What steps are asked to be: dense, and how indexes come to be true again."""

    NOTHING = "nothing"  # sparse, where that pays
    EXACT = "exact"  # indexes stay true
    RESTING = "resting"  # they fall behind, and are caught up with before keys are ranked again


_asked: ContextVar[Asked] = ContextVar("loki_asked", default=Asked.NOTHING)


@contextmanager
def exact() -> Iterator[None]:
    """Decode steps within it, in this thread, read all keys; indexes stay true through them.

    For decode loops of one's own, around the calls of a compiled model: tokens that were decoded
    sparsely, given once more at their positions (at most 8 in a call), overwrite their keys, values
    and index rows with those of dense decoding. `correct` does all of it for caches of
    transformers.
    """
    token = _asked.set(Asked.EXACT)
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def resting() -> Iterator[None]:
    """Decode steps within it, in this thread, read all keys and write no index: that costs a dense
    step nothing, and the next sparse one the projection of what has come since."""
    token = _asked.set(Asked.RESTING)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_now() -> Asked:
    """What a step that runs now is asked to be."""
    return _asked.get()
