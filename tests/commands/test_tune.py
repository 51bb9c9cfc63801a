"""`loki tune`: it measures the definition, finds the best plan, and stores what is then used."""

import itertools
import math

import pytest
import torch
from loki_compile.kernels.budget import Budget
from loki_compile.pca_store.layer_plan import stored_plans
from toy_models import make_model, prompt
from toy_policies import DirectLayers
from toy_tuned import prepare, run, save_model

from loki_compile.captured import RANKINGS, ROWS, Mass, captured_mass, summed_up
from loki_compile.commands import plan_search
from loki_compile.commands.evidence import Evidence, Outcome
from loki_compile.planning import (
    Costs,
    Losses,
    best_plan,
    dropped,
    front,
    loss_of,
    losses_of,
    moved,
    restored,
)
from loki_compile.policies.kinds import Kind
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

transformers = pytest.importorskip("transformers")

BUDGET = Budget(None, 1 << 13, 1, 2, 0)
DENSE, LOKI, ORACLE = Kind(dense=True), Kind("loki"), Kind("oracle")
COSTS = Costs(dense=10.0, index=2.0, keys=5.0, read=1.0)


def random_mass(layers: int, heads: int = 2) -> Mass:
    shares = {ranking: torch.rand(layers, layers) for ranking in RANKINGS}
    maps = {
        (ranking, source, reader): tuple(torch.randint(heads, (heads,)).tolist())
        for ranking in RANKINGS
        for source in range(layers)
        for reader in range(source + 1, layers)
    }
    return Mass(tuple(map(str, range(layers))), shares, maps)


def every_plan(losses: Losses, slots: list[int]):
    """All plans in which readers read what the last of their class chose."""
    ways = (DENSE, LOKI, ORACLE, Kind("oracle", dense=True), Kind(reuse=True))
    for kinds in itertools.product(ways, repeat=len(slots)):
        latest, plan = {}, []
        for layer, kind in enumerate(kinds):
            if kind.reuse and slots[layer] not in latest:
                break
            if kind.reuse:
                source, ranking = latest[slots[layer]]
                heads = losses.heads[ranking, source, layer]
                kind = Kind(reuse=True, source=source, heads=heads)
            elif kind.ranking:
                latest[slots[layer]] = (layer, kind.ranking)
            plan.append(kind)
        else:
            yield plan


@pytest.mark.parametrize("slots", [[0] * 5, [0, 1, 0, 1, 1], [0, 0, 1, 2, 0]])
@pytest.mark.parametrize("price", [0.0, 0.01, 0.1, 1.0])
def test_the_program_finds_the_best_of_all_plans(slots, price):
    losses = losses_of(random_mass(5))

    def worth(plan):
        return loss_of(losses, plan) + price * sum(map(COSTS.of, plan))

    best = min(map(worth, every_plan(losses, slots)))
    assert math.isclose(worth(best_plan(losses, slots, COSTS, price)), best, abs_tol=1e-6)


def test_dearer_plans_lose_less_and_plans_know_their_neighbours():
    losses, slots = losses_of(random_mass(9)), [0] * 9
    found = front(losses, slots, COSTS, 40.0, 5)
    assert len(found) == 5
    times = [sum(map(COSTS.of, plan)) for plan in found]
    lost = [loss_of(losses, plan) for plan in found]
    assert times == sorted(set(times)) and max(times) <= 40.0
    assert lost == sorted(set(lost), reverse=True)
    everything = front(losses, slots, COSTS, 40.0, 999)
    assert everything[0] == found[0] and everything[-1] == found[-1]
    for plan in found:
        for other in moved(losses, slots, plan):
            assert sorted(map(COSTS.of, other)) == sorted(map(COSTS.of, plan)) and other != plan
        fewer = dropped(losses, slots, plan)
        assert fewer or (plan[0].ranking and all(kind.reuse for kind in plan[1:]))
        for other in fewer:
            assert sum(k.reuse for k in other) == sum(k.reuse for k in plan) + 1
        reuses = sum(k.reuse for k in plan)
        more = [restored(losses, slots, plan, count) for count in range(reuses + 1)]
        assert more[0] == plan and not any(k.reuse for k in more[-1])
        assert [sum(k.reuse for k in each) for each in more] == [*range(reuses, -1, -1)]
        near = (*moved(losses, slots, plan), *fewer, *more)
        assert all(each[k.source].ranking for each in near for k in each if k.reuse)


def test_a_layer_that_matters_more_loses_more():
    mass = random_mass(4)
    plain, weighed = losses_of(mass), losses_of(mass, [1, 2, 3, 4], [4, 3, 2, 1])
    for layer in range(4):
        assert math.isclose(weighed.own["loki"][layer], layer + 1, rel_tol=1e-3)
        ratio = weighed.own["oracle"][layer] / plain.own["oracle"][layer]
        assert math.isclose(ratio, (layer + 1) / plain.own["loki"][layer], rel_tol=1e-3)
        if layer:
            assert math.isclose(weighed.read["loki"][layer - 1][layer], 4 - layer, rel_tol=1e-3)


@torch.no_grad()
def test_captured_attention_is_the_share_on_the_keys_that_the_source_chooses():
    """An index of all dims chooses as the keys do; of its own choice a layer captures the most."""
    model, ids = make_model(layers=3), prompt(1, 120)
    seen = captured_mass(model, [ids, prompt(2, 120)], BUDGET, 1.0, by_probability=True)
    mass = summed_up(seen)
    assert mass.paths == tuple(f"model.layers.{n}.self_attn" for n in range(3))
    assert seen.rows == 2 * ROWS
    torch.testing.assert_close(mass.shares["loki"], mass.shares["oracle"], equal_nan=True)
    everything = captured_mass(model, [ids], Budget(None, 1 << 16, 1, 2, 0), 1.0)
    shares = summed_up(everything).shares["oracle"]
    torch.testing.assert_close(shares[~shares.isnan()], torch.ones(6), rtol=0, atol=1e-5)
    for source in range(3):
        for reader in range(source):
            assert mass.shares["oracle"][source, reader].isnan()
        own = mass.shares["oracle"][source, source]
        assert (mass.shares["oracle"][:source, source] <= own + 1e-6).all() and own < 1


@pytest.mark.parametrize("group_choice", ["max", "probability"])
@torch.no_grad()
def test_a_simulated_plan_is_the_definition(group_choice):
    model, ids = make_model(layers=5), prompt(1, 90)
    words = ["oracle+dense", "reuse:0:1,0", "oracle", "dense", "reuse:2"]
    kinds = [
        Kind("oracle", dense=True), Kind(reuse=True, source=0, heads=(1, 0)), ORACLE, DENSE,
        Kind(reuse=True, source=2),
    ]  # fmt: skip
    paths = [f"model.layers.{n}.self_attn" for n in range(5)]
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :80], past_key_values=cache)
    here, there, dense = (copied(model, cache) for _ in range(3))
    summed = group_choice == "probability"
    simulation = Simulation(BUDGET, 0.25, {}, by_probability=summed)
    with watched(model, simulation.look) as run:
        simulation.under(kinds, paths)
        out = run(input_ids=ids[:, 80:], past_key_values=here).logits
    assert not simulation.refused and list(simulation.served) == paths
    options = {"min_context": 0, "top_k": 0.125, "sink": 1, "recent": 2}
    options["group_choice"] = group_choice
    with DirectLayers(words, [2] * 5, options):
        expected = model(ids[:, 80:], past_key_values=there).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert (out - model(ids[:, 80:], past_key_values=dense).logits).abs().max() > 1e-2


def copied(model, cache):
    copy = transformers.DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys.clone(), layer.values.clone(), number)
    return copy


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A folder with a random model of six layers and the bundled tokenizer."""
    return save_model(tmp_path_factory.mktemp("models") / "deep", layers=6, positions=900)


@pytest.fixture
def tuning(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_search, "MOVES", 2)
    text = prepare(tmp_path, monkeypatch, 400)
    given = ["tune", deep, "--text", text, "--length", 300, "--prompts", 1, "--plans", 2]
    return [*map(str, given), "--steps", "48", "--cost-context", "4096"]


def test_a_tuned_plan_is_stored_shown_and_used(deep, tuning, tmp_path):
    done = run(*tuning, "--picture", tmp_path / "plan.png", "--tolerance", "9")
    assert done.exit_code == 0, done.output
    assert 'policy="tidal" uses it' in done.output and (tmp_path / "plan.png").stat().st_size > 5000
    (plan,) = stored_plans()
    assert len(plan.layers) == len(plan.mass) == 6 and plan.top_k == 0.125
    assert {"kl", "needles", "choosing"} <= plan.scores.keys() and plan.scores["choosing"] <= 1.0
    assert not (tmp_path / "home" / "partial").exists()
    shown = run("explain", deep, "--policy", "tidal", "--min-context", "0")
    assert shown.exit_code == 0, shown.output
    for number, layer in enumerate(plan.layers):
        if layer.word.startswith("reuse"):
            assert f"reuse of layer {layer.word.split(':')[1]}" in shown.output
        elif layer.word == "loki":
            assert f"  layer {number} chooses (loki)" in shown.output
    reads = sum(layer.word.startswith("reuse") for layer in plan.layers)
    assert shown.output.split("as planned:")[1].count("[") >= reads > 0


def as_if(kl_of, finds):
    """Evidence by the number of layers that reuse: divergence, and whether needles are found."""

    def of(evidence, kinds, number):
        passage = evidence.passages[number]
        reuses = sum(kind.reuse for kind in kinds)
        # What is hard about a passage is none of the difference.
        kl = torch.rand(len(passage.rows), generator=torch.Generator().manual_seed(number))
        found = torch.full((len(passage.answers),), finds(reuses))
        more = 0.0 if passage.answers else kl_of(reuses)
        return Outcome(kl + more, torch.ones(len(kl), dtype=torch.bool), found)

    return of


@pytest.mark.parametrize(
    "kl_of, finds, most",
    [
        pytest.param(lambda reuses: 0.002 * reuses, lambda reuses: True, 5, marks=pytest.mark.slow),
        (lambda reuses: 0.002 * reuses, lambda reuses: reuses < 3, 2),
        pytest.param(lambda reuses: 0.02 * reuses, lambda reuses: True, 0, marks=pytest.mark.slow),
    ],
)
def test_the_cheapest_plan_within_the_tolerance_that_finds_as_much_is_taken(
    tuning, monkeypatch, kl_of, finds, most
):
    monkeypatch.setattr(plan_search, "MOVES", 40)
    monkeypatch.setattr(plan_search, "measured_costs", lambda *_, **__: (COSTS, 3.0))
    monkeypatch.setattr(Evidence, "of", as_if(kl_of, finds))
    done = run(*tuning, "--plans", "32", "--tolerance", "0.0105")
    assert done.exit_code == 0, done.output
    (plan,) = stored_plans()
    reads = sum(layer.word.startswith("reuse") for layer in plan.layers)
    assert reads == most
    assert plan.scores["more than where every layer chooses"][1] <= 0.0105
    assert ("every layer chooses" in done.output) or most
    assert plan.scores["choosing"] == 1.0 or most


def test_a_stopped_search_goes_on_where_it_was(tuning, monkeypatch):
    runs = []
    of = as_if(lambda reuses: 0.002 * reuses, lambda reuses: True)

    def until_stopped(evidence, kinds, number):
        runs.append((number, tuple(kinds)))
        if len(runs) == 8:
            raise KeyboardInterrupt
        return of(evidence, kinds, number)

    monkeypatch.setattr(Evidence, "of", until_stopped)
    assert run(*tuning).exit_code == 130 and not list(stored_plans())
    first = runs[:7]
    runs.clear()
    runs.extend([None] * 8)
    done = run(*tuning)
    assert done.exit_code == 0, done.output
    assert len(set(first)) == 7 and not set(first) & set(runs[8:])
    assert len(set(runs[8:])) == len(runs[8:])
    assert len(list(stored_plans())) == 1


@pytest.mark.parametrize(
    "more, says",
    [
        (["--length", "5000"], "positions"),
        (["--tolerance", "-1"], "--tolerance"),
        (["--top-k", "0"], "top_k=0"),
        (["--dtype", "float7"], "found dtype"),
        (["--prompts", "2", "--length", "600", "--steps", "60"], "pass more text"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(tuning, more, says, tmp_path):
    if "pass more text" in says:
        (tmp_path / "words.txt").write_text("heron")
    done = run(*tuning, *more)
    assert done.exit_code == 2 and says in done.output.splitlines()[-1]
