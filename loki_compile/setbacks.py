"""What is dense after a failure: for a while where memory was short, else from then on."""

from __future__ import annotations

import logging
from typing import Any

from loki_compile import indexes
from loki_compile.builds import Watch
from loki_compile.recovery import is_shortage

log = logging.getLogger("loki_compile")

# Dense steps after a first shortage of memory, before an index is tried again; twice as many after
# each further one, up to the second number.
SHORTAGE_CALLS = 64
SHORTAGE_CALLS_MOST = 1 << 14


class Setbacks:
    """Of one graph: why it has given up, None while it has not; how many of its next calls will be
    dense for want of memory, and how often in a row that was short."""

    def __init__(self, watch: Watch, variants: dict[Any, Any]) -> None:
        """
        Args:
          watch: of the graph's builds, whose indexes are given back.
          variants: the compiled ones that take indexes, given back with them when it gives up.
        """
        self.watch = watch
        self.variants = variants
        self.gave_up: str | None = None
        self.short_of_memory = 0
        self.shortages = 0

    def set_back(self, what: str, error: Exception) -> None:
        """Dense: for a while where memory was short, which may pass, else from now on."""
        if not is_shortage(error):
            return self.give_up(what, error)
        self.short_of_memory = min(SHORTAGE_CALLS << self.shortages, SHORTAGE_CALLS_MOST)
        self.shortages += 1
        indexes.forget_all(self.watch)
        log.warning(
            "%s for want of memory: decoding is dense for %d steps, then it is tried again (%s).",
            what,
            self.short_of_memory,
            f"{type(error).__name__}: {error}",
        )
        return None

    def give_up(self, what: str, error: Exception) -> None:
        """Dense from now on, which is said once; what was held is given back."""
        if self.gave_up is not None:
            return
        failure = f"{type(error).__name__}: {error}"
        self.gave_up = f"{what}: {failure}"
        self.variants.clear()
        indexes.forget_all(self.watch)
        log.warning(
            "%s and decoding stays dense: %s. Set strict=True to raise instead.",
            what,
            failure,
            exc_info=log.isEnabledFor(logging.DEBUG),
        )
