"""How many tokens to draft: the number that makes most tokens in a second, as far as cycles tell.

A cycle of n drafts takes n sparse steps and a dense one of n + 1 tokens, and yields as many tokens
as are accepted, and one. What cycles of each n take is measured; what those of another n would take
lies on the line between its neighbours. That each draft is accepted has one chance, counted over
the last cycles. Where no drafts are best, decoding is dense, and one draft is tried at times.

What drafts may lose is bounded: there is a credit of a few dense steps, to which each token adds a
hundredth of one; cycles add what they gain over dense decoding, and take what they lose. Below
nothing there are no drafts, and where they do not pay none is tried that could lose more.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

# Dense steps that drafts may lose, at most, and how many of them each token gives back.
_CREDIT, _BACK = 4.0, 0.01
# What the chance of acceptance begins as, and of how many drafts that is the experience; drafts
# that it is remembered from.
_CHANCE, _WEIGHT, _MEMORY = 0.8, 2.0, 64.0
# Cycles of one length that are remembered, and how many of the first are not: they compile.
_KEPT, _WARM = 9, 1
# Dense steps to begin with, which cost nothing, behind the first one.
_RESTS = 3
# Drafts are worth it from so much more speed on.
_WORTH = 1.02
# Each so many cycles of drafts another length is tried; and a dense step.
_TRY, _ASK = 12, 48


class Pace:
    """Of one conversation, or several alike."""

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
          most: drafts of a cycle, at least 1.
          clock: seconds.
        """
        self.most = most
        self.clock = clock
        self.taken: dict[int, deque[float]] = {}  # seconds of cycles, by drafts
        self.ran: dict[int, int] = {}
        self.tried, self.accepted = _WEIGHT, _WEIGHT * _CHANCE
        self.credit, self.needed = _CREDIT, 0.0  # dense steps: that drafts may lose, and could
        self.cycles = 0

    @property
    def chance(self) -> float:
        """That a draft is accepted, where those before it were."""
        return self.accepted / self.tried

    def next(self, limit: int) -> int:
        """Drafts of the next cycle, at most `limit`; 0: a dense step."""
        limit = min(limit, self.most)
        if limit < 1:
            return 0
        if self.credit < self.needed or len(self.taken.get(0, ())) < _RESTS:
            return 0
        self.needed, best = 0.0, 0
        if len(self.taken.get(1, ())) > 1:  # what drafts take is known
            best = max(range(1, limit + 1), key=self.speed)
        if best == 0 or self.speed(best) < _WORTH * self.speed(0):
            if 1 in self.taken:
                self.needed = self.seconds(1) / max(self.seconds(0), 1e-9) - 1
            return 1 if self.credit >= self.needed else 0
        self.cycles += 1
        if self.cycles % _ASK == _TRY // 2:  # lest an old dense step is what drafts are held to
            return 0
        if self.cycles % _TRY == 0:  # the neighbour that fewer cycles tell of
            near = [n for n in (best - 1, best + 1) if 1 <= n <= limit]
            return min(near, key=lambda n: self.ran.get(n, 0), default=best)
        return best

    def speed(self, drafts: int) -> float:
        """Tokens in a second, as far as it is known."""
        tokens = sum(self.chance**n for n in range(drafts + 1))
        return tokens / max(self.seconds(drafts), 1e-9)

    def seconds(self, drafts: int) -> float:
        """What a cycle takes: measured, or on the line through its neighbours. Of dense steps the
        least: what holds one up (a compilation, others on the machine) is no reason to draft."""
        known = {n: statistics.median(s) if n else min(s) for n, s in self.taken.items() if s}
        if drafts in known:
            return known[drafts]
        if drafts == 0:
            return min(known.values())
        points = sorted(n for n in known if n)
        below = [n for n in points if n < drafts]
        above = [n for n in points if n > drafts]
        if below and above:
            left, right = below[-1], above[0]
        elif len(points) > 1:
            left, right = points[:2] if above else points[-2:]
        else:
            left, right = 0, points[0]
        slope = (known[right] - known[left]) / (right - left) if left in known else 0.0
        return max(known[right] + (drafts - right) * slope, 0.0)

    def took(self, drafts: int, accepted: int, seconds: float) -> None:
        """Takes note of a cycle."""
        self.ran[drafts] = self.ran.get(drafts, 0) + 1
        if self.ran[drafts] > _WARM:
            self.taken.setdefault(drafts, deque(maxlen=_KEPT)).append(seconds)
        gained = 0.0
        if drafts:
            gained = accepted + 1 - self._dense_steps(drafts)
            self.accepted += accepted
            self.tried += min(accepted + 1, drafts)
            if self.tried > _MEMORY:
                self.accepted *= _MEMORY / self.tried
                self.tried = _MEMORY
        self.credit = min(self.credit + gained + _BACK * (accepted + 1), _CREDIT)

    def _dense_steps(self, drafts: int) -> float:
        """How many dense steps take as long as a cycle, which may have compiled, or been held up:
        as such cycles do."""
        if not any(self.taken):
            return drafts + 1.0
        return min(self.seconds(drafts) / max(self.seconds(0), 1e-9), 2.0 * (drafts + 1))
