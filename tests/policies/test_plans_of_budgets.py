"""Plans of budgets for each KV head that are stored: when they serve, what is said of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.layer_plan import (
    BUDGETS_SUFFIX,
    USED,
    LayerPlan,
    PlannedLayer,
    save_plan,
)
from toy_models import LONG, make_model, prompt, started

from loki_compile import LokiConfig, explain, reports, stats
from loki_compile.plan_words import judged_under
from loki_compile.planned import of_site

WORDS = ("loki:300,last=0.125N", "oracle:from=0.0,0.25N", "reuse:1:1,0")
THEIRS = ["300,last=0.125N", "300,0.25N", "0.25N,300"]
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    return tmp_path


def budgets_for(model, words=WORDS, used: bool = True) -> LayerPlan:
    layers = []
    for number, (layer, word) in enumerate(zip(model.model.layers, words, strict=True)):
        weight = layer.self_attn.k_proj.weight
        marks = weights_fingerprint(weight), block_fingerprints(weight, 16)
        layers.append(PlannedLayer(f"model.layers.{number}.self_attn", *marks, 2, word))
    return LayerPlan(
        tuple(layers), "toy", 0.125, "text", "2026-11-27T00:00:00+00:00", (), {USED: used},
        judged_under(LokiConfig(), "loki"),
    )  # fmt: skip


def explained(model, **options):
    cache = started(model, "static", prompt(1, 9))
    options = {"min_context": 64, **options}
    (found,) = explain(model, prompt(1, 1), past_key_values=cache, options=options)
    return found.sites


def own_budgets(model, **options) -> list[str]:
    return [site.budgets for site in explained(model, **options)]


@torch.no_grad()
def test_a_plan_that_won_serves_at_default_options_and_is_said(home, caplog):
    model = make_model(layers=3)
    save_plan(budgets_for(model), suffix=BUDGETS_SUFFIX)
    fast = torch.compile(model, backend="loki")
    ids = prompt(1, LONG + 2)
    cache = started(model, "growing", ids[:, :LONG])
    for at in (LONG, LONG + 1):
        fast(ids[:, at : at + 1], past_key_values=cache)
    sites = reports()[-1].sites
    assert [site.policy for site in sites] == ["loki", "oracle", "reuse of layer 1, heads mapped"]
    assert [site.budgets for site in sites] == THEIRS
    assert sites[1].shares == pytest.approx((300 / 8192, 0.25), abs=1e-4)
    assert [site.ranking_heads for site in sites] == [1, 1, 0]
    told = "KV heads read 3.7% (as head 0 of layer 0 chose), 25.0% of 8192 keys; as `loki tune`"
    assert told in sites[1].note and sites[1].note.endswith("found 2026-11-27")
    assert "KV heads read 25.0%, 3.7% (as head 0 of layer 0 chose) of 8192" in sites[2].note
    assert "KV heads read 3.7%, 12.5% (the last) of 8192 keys" in str(reports())
    assert stats()["sparse_steps"] == 2
    said = [message for message in caplog.messages if "KV heads of 3 layers" in message]
    assert len(said) == 1 and "each as many as `loki tune` found 2026-11-27" in said[0]


@torch.no_grad()
def test_a_plan_serves_where_the_budget_is_open_alone(home):
    model = make_model(layers=3)
    save_plan(budgets_for(model), suffix=BUDGETS_SUFFIX)
    assert own_budgets(model, policy="loki") == THEIRS
    assert own_budgets(model, top_k=0.125) == [""] * 3
    assert LokiConfig().open_budget and LokiConfig(policy="loki", rank=8).open_budget
    said = LokiConfig(top_k=0.125).to_options()
    assert said == {"top_k": 0.125} and own_budgets(model, **said) == [""] * 3
    assert LokiConfig().to_options() == {} and LokiConfig(rank=8).to_options() == {"rank": 8}
    for options in ({"top_k": 0.125}, {"top_k": 512}, {"top_k": "mass:0.9"}, {"policy": "oracle"},
                    {"policy": {0: "loki"}}, {"policy": "tidal"}):  # fmt: skip
        assert not LokiConfig(**options).open_budget, options


@torch.no_grad()
def test_a_plan_that_did_not_win_serves_where_it_is_named(home):
    model = make_model(layers=3)
    path = save_plan(budgets_for(model, used=False), suffix=BUDGETS_SUFFIX)
    assert own_budgets(model) == [""] * 3
    assert own_budgets(model, policy=str(path)) == THEIRS


@pytest.mark.parametrize(
    "options, differs",
    [
        ({"rank": 8}, "rank='auto', and here is rank=8"),
        ({"share": "head"}, "share='group', and here is share='head'"),
        ({"index_dtype": "cache", "recent": 8}, "recent=32, and here is index_dtype='cache', rec"),
        ({"group_choice": "probability"}, "group_choice='max'"),
        ({"sink": 9}, "sink=4, and here is sink=9"),
    ],
)
@torch.no_grad()
def test_a_plan_serves_under_the_options_that_it_was_judged_under_alone(
    home, options, differs, caplog
):
    model = make_model(layers=3)
    path = save_plan(budgets_for(model), suffix=BUDGETS_SUFFIX)
    assert own_budgets(model, **options) == [""] * 3
    fast = torch.compile(model, backend="loki", options=options)
    ids = prompt(1, LONG + 1)
    for _ in range(2):
        torch._dynamo.reset()
        fast(ids[:, LONG:], past_key_values=started(model, "growing", ids[:, :LONG]))
    said = [message for message in caplog.messages if "is not used" in message]
    assert len(said) == 1 and differs in said[0]
    assert own_budgets(model, policy=str(path), **options) == THEIRS
    assert own_budgets(model, pack_gqa=False, min_context=32) == THEIRS


@torch.no_grad()
def test_a_plan_that_does_not_say_what_it_was_judged_under_does_not_serve(home):
    model = make_model(layers=3)
    save_plan(dataclasses.replace(budgets_for(model), under={}), suffix=BUDGETS_SUFFIX)
    assert own_budgets(model) == [""] * 3


@torch.no_grad()
def test_another_models_plan_is_not_used(home):
    save_plan(budgets_for(make_model(layers=3)), suffix=BUDGETS_SUFFIX)
    other = make_model(layers=3)
    other.model.layers[2].self_attn.k_proj.weight.mul_(2)
    assert own_budgets(other) == [""] * 3


@torch.no_grad()
def test_heads_whose_layer_is_in_another_graph_choose_themselves_and_say_so(home):
    model = make_model(layers=3)
    save_plan(budgets_for(model), suffix=BUDGETS_SUFFIX)
    part = model.model.layers[1].self_attn

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return type(part).forward(part, *args, **kwargs)

    part.forward = broken
    cache = started(model, "static", prompt(1, 9))
    found = explain(model, prompt(1, 1), past_key_values=cache, options={"min_context": 64})
    notes = [site.note for report in found for site in report.sites]
    assert any("chooses itself for from=0.0, whose layer is not in its graph" in n for n in notes)


def test_a_process_with_some_of_the_heads_has_their_budgets():
    blocks = tuple(f"{n:032x}" for n in range(4))
    layer = PlannedLayer(
        "x", "0" * 32, blocks, 4, "loki:1,last=2,from=0.3,from=0.0",
    )  # fmt: skip
    assert str(of_site(layer, 2, blocks[2:])) == "loki:from=0.1,from=0.1"
    assert str(of_site(layer, 2, blocks[:2])) == "loki:1,last=2"
    assert str(of_site(layer, 4, blocks)) == layer.word
    one = dataclasses.replace(layer, word="loki:0.25N")
    assert str(of_site(one, 2, blocks[2:])) == "loki:0.25N,0.25N"
