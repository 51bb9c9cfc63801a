"""Exact steps on demand: a dense decode step corrects a cache, or verifies drafts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_asked: ContextVar[bool] = ContextVar("loki_exact", default=False)


@contextmanager
def exact() -> Iterator[None]:
    """Decode steps within it, in this thread, read all keys; indexes stay true through them.

    For decode loops of one's own, around the calls of a compiled model: tokens that were decoded
    sparsely, given once more at their positions (at most 8 in a call), overwrite their keys, values
    and index rows with those of dense decoding. `correct` does all of it for caches of
    transformers.
    """
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def exact_now() -> bool:
    """Whether a step that runs now is to be exact."""
    return _asked.get()
