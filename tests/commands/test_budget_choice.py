"""The program finds the best of all choices, keeps what options need, and says its gap."""

import itertools
import math

import numpy as np
import pytest

from loki_compile.commands.budget_choice import Option, least_cost, least_loss


def case(seed, heads=4, shares=3):
    """Options of heads: by an index at a fixed cost, the last keys, and what head 0 or 1 chose."""
    rng = np.random.default_rng(seed)
    options, ranked = [], {}
    for head in range(heads):
        for k in range(shares):
            ranked[head, k] = len(options)
            options.append(Option(head, rng.random() / (1 + k), 0.3 + 0.3 * k + 0.1 * rng.random()))
            options.append(Option(head, 0.5 + rng.random() / (1 + k), 0.2 + 0.3 * k))
            for source in range(min(head, 2)):
                loss = rng.random() / (1 + k)
                options.append(Option(head, loss, 0.2 + 0.3 * k, ranked[source, k]))
    return options


def every_choice(options):
    heads = max(option.head for option in options) + 1
    of = [[n for n, each in enumerate(options) if each.head == head] for head in range(heads)]
    for places in itertools.product(*of):
        if all(options[n].needs in (None, *places) for n in places):
            yield sum(options[n].loss for n in places), sum(options[n].cost for n in places)


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_loses_less_within_the_cost_and_none_is_cheaper_within_the_loss(seed):
    options = case(seed)
    every = list(every_choice(options))
    for cost in np.linspace(1.2, 3.0, 4):
        best = min((loss for loss, paid in every if paid <= cost), default=None)
        found = least_loss(options, cost)
        assert (found is None) == (best is None)
        if found is not None:
            assert found.cost <= cost and best <= found.loss <= best * (1 + 2e-3)
            assert found.gap <= 1e-3
    for loss in np.linspace(0.4, 2.0, 4):
        best = min((paid for lost, paid in every if lost <= loss), default=None)
        found = least_cost(options, loss)
        assert (found is None) == (best is None)
        if found is not None:
            assert found.loss <= loss and best <= found.cost <= best * (1 + 2e-3)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_chosen_has_what_it_needs(seed):
    options = case(seed, heads=8)
    found = least_loss(options, 4.0)
    assert [options[n].head for n in found.options] == list(range(8))
    taken = [options[n] for n in found.options]
    assert all(each.needs in (None, *found.options) for each in taken)
    assert any(each.needs is not None for each in taken)
    assert math.isclose(found.cost, sum(each.cost for each in taken))


def test_too_little_is_none():
    assert least_loss(case(0), 0.1) is None
    assert least_cost(case(0), 0.0) is None
