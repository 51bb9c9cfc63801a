"""The program finds the best of all choices, keeps the limit at every length, and says its gap."""

import itertools

import numpy as np
import pytest

from loki_compile.commands.span_choice import apart, balanced_choice, refined, together


def case(seed, lengths=2, groups=4, options=4):
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.random((lengths, groups, options)), -1) / groups
    losses = np.sort(rng.random((lengths, groups, options)) ** 3, -1)[..., ::-1].copy()
    losses[..., -1] = 0
    return losses, costs


def every_choice(costs, limit):
    groups, options = costs.shape[1:]
    for choice in itertools.product(range(options), repeat=groups):
        if (costs[:, range(groups), choice].sum(1) <= limit).all():
            yield np.array(choice)


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_at_the_worst_length(seed):
    losses, costs = case(seed)
    found = balanced_choice(losses, costs, 0.6)
    assert (costs[:, range(4), found.options].sum(1) <= 0.6).all()
    assert found.gap <= 2e-3
    scale = np.array(found.least)

    def worst(choice):
        own = losses[:, range(4), choice].sum(1) / scale
        return own.max() + 1e-2 * own.mean()

    best = min(map(worst, every_choice(costs, 0.6)))
    assert worst(found.options) <= best * (1 + 3e-3)
    for length, least in enumerate(found.least):  # a bound for each length alone
        alone = min(losses[length, range(4), c].sum() for c in every_choice(costs, 0.6))
        assert 0 < least <= alone + 1e-9
    np.testing.assert_allclose(found.losses, losses[:, range(4), found.options].sum(1))


def test_what_nothing_is_cheap_enough_for_is_one_line_with_the_least_there_is():
    losses, costs = case(1)
    cheapest = costs.min(2).sum(1).max()
    with pytest.raises(ValueError, match=f"alone are {cheapest:.3f}.*larger density"):
        balanced_choice(losses, costs, cheapest * 0.9)
    balanced_choice(losses, costs, cheapest * 1.01)


def test_a_limit_that_all_fit_in_loses_nothing():
    losses, costs = case(2)
    found = balanced_choice(losses, costs, 2.0)
    assert found.losses == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_refining_comes_near_the_best_where_effects_of_heads_add_up(seed):
    rng = np.random.default_rng(seed)
    _, costs = case(seed)
    rows = [rng.normal(size=(30, 4, 4)) * np.linspace(1, 0, 4) for _ in range(2)]
    begin = balanced_choice(np.stack([apart(x) for x in rows]), costs, 0.6).options
    first = [together(x, begin) for x in rows]

    def worth(choice):
        return sum(together(x, choice) / b for x, b in zip(rows, first, strict=True))

    end = refined(begin, rows, costs, 0.6)
    best = min(map(worth, every_choice(costs, 0.6)))
    assert (costs[:, range(4), end].sum(1) <= 0.6).all()
    assert worth(end) <= 2.0 and worth(end) - best <= 0.4 * max(2.0 - best, 1e-9) + 1e-9


def test_harm_adds_up_within_a_row_and_help_does_not_count():
    rows = np.array([[[1.0, 0.0], [2.0, 0.0]], [[-3.0, 0.0], [1.0, 0.0]]])
    assert together(rows, np.array([0, 0])) == pytest.approx((9 + 0) / 2)
    np.testing.assert_allclose(apart(rows), [[0.5, 0], [2.5, 0]])
