"""What the program counts of a choice is what the plan's words read and miss."""

import math

import pytest
import torch
from loki_compile.kernels.budget import Budget

from loki_compile.commands.budget_choice import least_cost, least_loss
from loki_compile.commands.budget_options import (
    fixed_share,
    missed_share,
    of_heads,
    of_plan,
    plain,
)
from loki_compile.commands.step_bytes import StepBytes
from loki_compile.mass_curves import SHARES, CurvedLayer, Missed
from loki_compile.policies.kinds import kind_of

LAYERS, HEADS, TOKENS = 4, 2, 3000
EVERY = ("ranked", "last", "from")


def costs(itemsize=2):
    layers = tuple(CurvedLayer(f"{n}", 0, f"layer {n}", HEADS, 32) for n in range(LAYERS))
    return StepBytes(layers, itemsize, 16, TOKENS, Budget(None, 1 << 13, 4, 32, 0))


def curves(seed):
    """Ranked heads miss the least, those that read the last keys the most."""
    torch.manual_seed(seed)
    count = LAYERS * HEADS
    layer = torch.arange(LAYERS).repeat_interleave(HEADS)
    left = 1 - torch.tensor(SHARES, dtype=torch.float64)
    ranked = left ** (6 + 20 * torch.rand(count, 1, dtype=torch.float64))
    last = left ** (1 + 6 * torch.rand(count, 1, dtype=torch.float64))
    read = left ** (2 + 15 * torch.rand(count, count, 1, dtype=torch.float64))
    read[layer[:, None] <= layer] = torch.inf
    return Missed(layer, torch.arange(HEADS).repeat(LAYERS), ranked, last, read)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ways", [("ranked",), ("ranked", "last"), ("ranked", "from"), EVERY])
def test_a_plan_reads_and_misses_what_its_options_say(seed, ways):
    missed, each, slots = curves(seed), costs(), [0, 1, 0, 1]
    menu = of_heads(missed, each, slots, ways, plain)
    for chosen in (least_loss(menu.options, 0.35), least_cost(menu.options, 0.1)):
        kinds = menu.kinds(chosen)
        assert math.isclose(each.share(kinds), chosen.cost, rel_tol=1e-9)
        assert math.isclose(missed_share(missed, each, kinds), chosen.loss, abs_tol=1e-9)
        assert [kind_of(str(kind)) for kind in kinds] == kinds
        for layer, kind in enumerate(kinds):
            for budget in kind.budgets:
                assert "last" in ways or not budget.last
                if budget.span is None:
                    assert "from" in ways and slots[budget.source] == slots[layer]
                    assert budget.source < layer
                    assert kinds[budget.source].budgets[budget.head].ranks


def test_more_ways_lose_less_and_are_all_taken():
    missed, each = curves(5), costs()
    lost, words = [], ""
    for ways in (("ranked",), ("ranked", "last"), EVERY):
        menu = of_heads(missed, each, [0] * LAYERS, ways, plain)
        chosen = least_loss(menu.options, 0.3)
        lost.append(chosen.loss)
        words = " ".join(map(str, menu.kinds(chosen)))
    assert lost[0] > lost[1] > lost[2]
    assert "from=" in words and missed_share(missed, each, each.uniform(0.3)) > lost[0] * 0.99


def test_budgets_of_a_plan_count_its_readers_and_its_dense_layers():
    missed, each = curves(1), costs()
    plan = [kind_of(word) for word in ("dense", "loki", "reuse:1:1,1", "oracle+dense")]
    menu = of_plan(missed, each, plan, plain)
    assert menu.places == ((1, 0), (1, 1), (3, 0), (3, 1))
    fixed = fixed_share(each, plan)
    assert fixed == 0.5
    chosen = least_loss(menu.options, 0.2)
    kinds = menu.kinds(chosen)
    assert [str(kind).partition(":")[0] for kind in kinds] == ["dense", "loki", "reuse", "oracle"]
    assert kinds[3].dense and len(kinds[3].budgets) == HEADS
    assert math.isclose(each.share(kinds), fixed + chosen.cost, rel_tol=1e-9)
    assert math.isclose(missed_share(missed, each, kinds), chosen.loss, abs_tol=1e-9)
    heads = [each.keys(kinds)[2][head] for head in range(HEADS)]
    assert heads == [each.keys(kinds)[1][1]] * 2  # both read what head 1 chose


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("words", [("loki",) * 4, ("dense", "loki", "reuse:1", "loki+dense")])
def test_one_budget_for_all_reads_as_much_as_it_may(share, words):
    each, plan = costs(), [kind_of(word) for word in words]
    kinds = each.uniform(share, plan)
    least = each.share(each.uniform(0.0, plan))
    assert each.share(kinds) <= max(share, least)
    more = 1 / TOKENS + 2**-15
    assert each.share(kinds) >= min(share, each.share(each.uniform(1.0, plan))) - more
