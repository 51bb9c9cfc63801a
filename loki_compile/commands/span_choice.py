"""Which span each KV head gets: the least loss at the worst of several lengths, within a density.

An integer program over what each span of each head was measured to lose, taken for independent of
the others'; then steps of the same program over what changing one head alone does, the others being
as they are. scipy's HiGHS solves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Steps of the refinement, and the part of the heads that the first may change.
_STEPS, _FIRST = 12, 0.5
# Weight of the mean over lengths beside the worst one, which alone leaves ties.
_MEAN = 1e-2


@dataclass(frozen=True)
class Chosen:
    """options (G,): of each group. losses: by length, as given. least: what each length alone could
    come to. gap: how far the program may be from its optimum, as HiGHS states it, relative."""

    options: np.ndarray
    losses: tuple[float, ...]
    least: tuple[float, ...]
    gap: float


def balanced_choice(
    losses: np.ndarray, costs: np.ndarray, limit: float, seconds: float = 60.0
) -> Chosen:
    """One option for each group.

    Args:
      losses: (M, G, R), of M lengths, G groups and R options; not negative.
      costs: (M, G, R); those of the options chosen sum up to at most `limit` at every length.
      seconds: for the program; what it has found by then is taken, with its gap.

    Raises:
      ValueError: no choice costs so little; the message has the least that some choice costs.
    """
    groups = losses.shape[1]
    cheapest = costs.min(2).sum(1).max()
    program = _Program(costs, limit)
    least = [program.relaxed(each) for each in losses]
    if None in least:
        raise ValueError(
            f"no choice of spans reads {limit:.3f} of the keys: sinks and the newest keys alone "
            f"are {cheapest:.3f} of the shortest prompts; needs a larger density, or longer prompts"
        )
    known = [max(float(x or 0.0), 1e-9 * float(each.max()), 1e-30) for x, each in
             zip(least, losses, strict=True)]  # fmt: skip
    scaled = losses / np.array(known)[:, None, None]
    picked, gap = program.worst_least(scaled, seconds)
    own = losses[:, np.arange(groups), picked].sum(1)
    return Chosen(picked, tuple(map(float, own)), tuple(float(x or 0.0) for x in least), gap)


def refined(
    chosen: np.ndarray, rows: Sequence[np.ndarray], costs: np.ndarray, limit: float
) -> np.ndarray:
    """A choice with less predicted loss, where heads' effects on a row add up before they count.

    Args:
      chosen: (G,), where to begin.
      rows: of each length, (rows, G, R), effects of options on rows; see `together`.
      costs, limit: as `balanced_choice` has them.
    """
    groups = np.arange(len(chosen))
    begin = [max(together(each, chosen), 1e-30) for each in rows]

    def worth(options: np.ndarray) -> float:
        return sum(together(x, options) / b for x, b in zip(rows, begin, strict=True))

    program = _Program(costs, limit)
    best, now = chosen, worth(chosen)
    most = max(1, int(_FIRST * len(chosen)))
    for _ in range(_STEPS):
        changed = np.zeros(costs.shape[1:])
        for each, first in zip(rows, begin, strict=True):
            total = each[:, groups, best].sum(1)
            for group in groups:
                own = total - each[:, group, best[group]]
                moved = np.maximum(own[:, None] + each[:, group], 0.0)
                changed[group] += (moved * moved).mean(0) / first
        changed -= now
        trial = program.near(changed, best, most)
        found = np.inf if trial is None else worth(trial)
        if trial is not None and found < now * (1 - 1e-6):
            best, now = trial, found
        elif most == 1:
            break
        else:
            most = max(1, most // 3)
    return best


def together(rows: np.ndarray, options: np.ndarray) -> float:
    """What a choice is predicted to lose: of each row the effects of all groups add up, and the
    mean of the squares of those that do harm counts. rows (rows, G, R)."""
    total = rows[:, np.arange(len(options)), options].sum(1)
    return float(np.square(np.maximum(total, 0.0)).mean())


def apart(rows: np.ndarray) -> np.ndarray:
    """As `together`, of each group and option alone: (G, R)."""
    return np.square(np.maximum(rows, 0.0)).mean(0)


class _Program:
    """Choices of one option for each group whose costs keep within a limit."""

    def __init__(self, costs: np.ndarray, limit: float) -> None:
        from scipy import sparse

        self.shape = costs.shape
        _, groups, options = costs.shape
        self.flat = costs.reshape(len(costs), -1)
        self.limit = limit
        self.one = sparse.kron(sparse.eye(groups), np.ones((1, options)), format="csr")

    def relaxed(self, losses: np.ndarray) -> float | None:
        """The least that losses (G, R) come to, where heads may be cut; None: no choice."""
        done = self._solve(losses.ravel(), [], integral=False)
        return None if done.x is None else float(done.fun)

    def worst_least(self, scaled: np.ndarray, seconds: float) -> tuple[np.ndarray, float]:
        """The choice whose largest loss of a length is least, and the gap."""
        from scipy import optimize, sparse

        worst = sparse.csr_matrix(
            np.concatenate((scaled.reshape(len(scaled), -1), -np.ones((len(scaled), 1))), 1)
        )
        below = optimize.LinearConstraint(worst, -np.inf, 0.0)
        goal = np.append(_MEAN * scaled.mean(0).ravel(), 1.0)
        done = self._solve(goal, [below], seconds=seconds)
        if done.x is None:
            raise ValueError(
                f"the integer program found nothing within {seconds:.0f} s ({done.message}): needs "
                "a larger density"
            )
        return self._picked(done.x), float(done.mip_gap or 0.0)

    def near(self, changed: np.ndarray, at: np.ndarray, most: int) -> np.ndarray | None:
        """The best choice by `changed` (G, R) in which at most so many groups differ from `at`."""
        from scipy import optimize

        same = np.zeros(self.shape[1:])
        same[np.arange(len(at)), at] = 1.0
        stay = optimize.LinearConstraint(same.reshape(1, -1), len(at) - most, np.inf)
        done = self._solve(changed.ravel(), [stay], seconds=10.0)
        return None if done.x is None else self._picked(done.x)

    def _picked(self, found: np.ndarray) -> np.ndarray:
        return found[: self.flat.shape[1]].reshape(self.shape[1:]).argmax(1)

    def _solve(
        self, goal: np.ndarray, more: list[Any], *, integral: bool = True, seconds: float = 60.0
    ) -> Any:
        """`goal` has a number for each option, and maybe one for a bound that is free above 0."""
        from scipy import optimize, sparse

        count = self.flat.shape[1]
        bound = len(goal) - count
        wider = sparse.csr_matrix((self.one.shape[0], bound))
        one = sparse.hstack((self.one, wider), format="csr")
        costs = np.pad(self.flat, ((0, 0), (0, bound)))
        # The limit holds to the last digit: HiGHS is content with 1e-6 of it.
        limits = [
            optimize.LinearConstraint(one, 1.0, 1.0),
            optimize.LinearConstraint(costs, -np.inf, self.limit * (1 - 1e-6)),
        ]
        upper = np.append(np.ones(count), np.full(bound, np.inf))
        kinds = np.append(np.full(count, float(integral)), np.zeros(bound))
        return optimize.milp(
            goal,
            integrality=kinds,
            bounds=optimize.Bounds(0.0, upper),
            constraints=[*limits, *more],
            options={"time_limit": seconds, "mip_rel_gap": 1e-3},
        )
