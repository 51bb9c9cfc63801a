"""Which builds of indexes pay: a sequence whose indexes serve one step each is held back."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

log = logging.getLogger("loki_compile")

# A cache that is a new tensor at every step (beam search) would be read whole at every step to
# build its index. Behind so many builds that served one step of a sequence each, its next steps are
# dense, so many of them; others stay sparse. So many sequences are held back at a time.
WASTED_BUILDS = 8
HELD_BACK_CALLS = 64
HELD_BACK_MOST = 16


class Watch:
    """What became of the indexes that calls of one graph have built.

    `wasted` counts those that served a single step although their sequence went on, in other
    tensors; `ended` has how many tokens there were when one was dropped behind its first step, be
    it that, or a conversation that was over. One that serves a second step makes up for one wasted.
    """

    def __init__(self) -> None:
        self.wasted = 0
        self.ended: deque[int] = deque(maxlen=64)
        # Sequences that are held back: by how many tokens they have come to, the calls left.
        self.held_back: dict[int, int] = {}

    def goes_on(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens had an index that was dropped; asked once for it."""
        if tokens not in self.ended:
            return False
        self.ended.remove(tokens)
        self.wasted += 1
        return True

    def holds_back(self, before: int, after: int, dropped: Iterable[Build] | None) -> bool:
        """Whether a call that needs a build is one that experience says will serve no other.

        A sequence whose cache is a new tensor at each step is told by its tokens: there are as many
        before this call as there were when the last index was dropped, and `after` behind it.
        `dropped`: what indexes that are replaced now were built by; None: hold nothing back anew.
        """
        left = self.held_back.pop(before, 0)
        if not left and dropped is not None:
            for build in dropped:
                build.drop()
            if self.goes_on(before) and self.wasted >= WASTED_BUILDS:
                self.wasted, left = 0, HELD_BACK_CALLS
                log.info(
                    "%d indexes of a sequence served one step each: its next %d steps run dense",
                    WASTED_BUILDS,
                    HELD_BACK_CALLS,
                )
        if left > 1:
            self.held_back[after] = left - 1
            if len(self.held_back) > HELD_BACK_MOST:  # the oldest has ended, most likely
                del self.held_back[next(iter(self.held_back))]
        return left > 0

    def state(self) -> str:
        """Whether sequences are held back, in words: "" if none is."""
        if not self.held_back:
            return ""
        return (
            f"held back: up to {max(self.held_back.values())} more steps of a sequence run "
            f"dense, since its last {WASTED_BUILDS} indexes served one step each"
        )


class Build:
    """The indexes that one call built; `tokens` are in the first cache behind it."""

    def __init__(self, watch: Watch, tokens: int) -> None:
        self.watch = watch
        self.tokens = tokens
        self.used = False

    def use(self) -> None:
        """A later call was served."""
        if not self.used:
            self.used = True
            self.watch.wasted = max(0, self.watch.wasted - 1)

    def drop(self) -> None:
        """Nothing will use them any more."""
        if not self.used:
            self.used = True
            self.watch.ended.append(self.tokens)

    def __del__(self) -> None:
        self.drop()
