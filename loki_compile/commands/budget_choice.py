"""What each KV head does, and with how many keys: the least attention missed within so many bytes,
or the fewest bytes within so much that is missed.

A multiple-choice program: one option for each head, some of which need that another head has chosen
a certain one of its own. scipy's HiGHS solves it, and says how far it may be from the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# HiGHS is content with a part in 1e6 of a limit, and stops this near to the optimum.
_SLACK, _GAP = 1e-6, 1e-3


@dataclass(frozen=True)
class Option:
    """One thing that a head may do: what it loses by it, and what it costs.

    needs: the place, among all options, of the one whose choice this presupposes, of another head.
    """

    head: int
    loss: float
    cost: float
    needs: int | None = None


@dataclass(frozen=True)
class Chosen:
    """options: the place of each head's, by its number. gap: how far the program may be from its
    optimum, relative, as HiGHS states it."""

    options: tuple[int, ...]
    loss: float
    cost: float
    gap: float


def least_loss(options: Sequence[Option], cost: float, seconds: float = 60.0) -> Chosen | None:
    """The choice that loses the least of those that cost at most so much; None where none does.

    seconds: for the program; what it has found by then is taken, with its gap.
    """
    losses, costs = _columns(options)
    return _solved(options, losses, costs, cost, seconds)


def least_cost(options: Sequence[Option], loss: float, seconds: float = 60.0) -> Chosen | None:
    """The cheapest choice of those that lose at most so much; None where none does."""
    losses, costs = _columns(options)
    return _solved(options, costs, losses, loss, seconds)


def _columns(options: Sequence[Option]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([option.loss for option in options]),
        np.array([option.cost for option in options]),
    )


def _solved(
    options: Sequence[Option], goal: np.ndarray, bounded: np.ndarray, limit: float, seconds: float
) -> Chosen | None:
    from scipy import optimize, sparse

    count = len(options)
    places, heads = np.arange(count), np.array([option.head for option in options])
    groups = int(heads.max()) + 1
    one = sparse.csr_matrix((np.ones(count), (heads, places)), (groups, count))
    constraints = [
        optimize.LinearConstraint(one, 1.0, 1.0),
        optimize.LinearConstraint(bounded[None], -np.inf, limit * (1 - _SLACK)),
    ]
    bound = [(place, option.needs) for place, option in enumerate(options)
             if option.needs is not None]  # fmt: skip
    if bound:
        places = np.array(bound)
        rows = np.repeat(np.arange(len(bound)), 2)
        signs = np.tile([1.0, -1.0], len(bound))
        needs = sparse.csr_matrix((signs, (rows, places.ravel())), (len(bound), count))
        constraints.append(optimize.LinearConstraint(needs, -np.inf, 0.0))
    scale = max(float(np.abs(goal).max()), 1e-30)
    done = optimize.milp(
        goal / scale,
        integrality=np.ones(count),
        bounds=optimize.Bounds(0.0, 1.0),
        constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": _GAP},
    )
    if done.x is None:
        return None
    picked = [-1] * groups
    for place in np.flatnonzero(done.x > 0.5):
        picked[heads[place]] = int(place)
    taken = [options[place] for place in picked]
    return Chosen(
        tuple(picked),
        sum(option.loss for option in taken),
        sum(option.cost for option in taken),
        float(done.mip_gap or 0.0),
    )
