"""Plans of layers that are stored: found by the weights, refused where they are another model's."""

import dataclasses
import json

import pytest
import torch
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.layer_plan import (
    SPANS_SUFFIX,
    LayerPlan,
    PlanFileError,
    PlannedLayer,
    find_plan,
    read_plan,
    save_plan,
)
from toy_models import LONG, make_model, prompt, started

from loki_compile import explain, reports, stats

WORDS = ("dense", "loki", "reuse:1:1,0", "oracle+dense", "reuse:3")
pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    return tmp_path


def plan_for(model, words=WORDS) -> LayerPlan:
    layers = []
    for number, (layer, word) in enumerate(zip(model.model.layers, words, strict=True)):
        weight = layer.self_attn.k_proj.weight
        marks = weights_fingerprint(weight), block_fingerprints(weight, 16)
        layers.append(PlannedLayer(f"model.layers.{number}.self_attn", *marks, 2, word))
    return LayerPlan(tuple(layers), "toy", 0.125, "text", "2026-11-27T00:00:00+00:00")


def explained(model, policy, layers=5):
    cache = started(model, "static", prompt(1, 9))
    options = {"policy": policy, "min_context": 64}
    (found,) = explain(model, prompt(1, 1), past_key_values=cache, options=options)
    return [site.policy for site in found.sites]


@torch.no_grad()
def test_a_stored_plan_is_used_at_default_options_and_said(home, caplog):
    model = make_model(layers=5)
    save_plan(plan_for(model))
    fast = torch.compile(model, backend="loki", options={"policy": "tidal"})
    ids = prompt(1, LONG + 2)
    cache = started(model, "growing", ids[:, :LONG])
    for at in (LONG, LONG + 1):
        fast(ids[:, at : at + 1], past_key_values=cache)
    found = [site.policy for site in reports()[-1].sites]
    assert found == ["", "loki", "reuse of layer 1, heads mapped", "oracle", "reuse of layer 3"]
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 2
    said = [message for message in caplog.messages if "policy='tidal'" in message]
    assert len(said) == 1 and "as `loki tune` found 2026-11-27" in said[0]


@torch.no_grad()
def test_another_models_plan_is_not_used_and_a_guess_says_so(home, caplog):
    save_plan(plan_for(make_model(layers=5)))
    other = make_model(layers=5)
    other.model.layers[3].self_attn.k_proj.weight.mul_(2)
    fast = torch.compile(other, backend="loki", options={"policy": "tidal", "min_context": 64})
    ids = prompt(1, 80)
    fast(ids[:, 79:], past_key_values=started(other, "growing", ids[:, :79]))
    assert "loki" in {site.policy for site in reports()[-1].sites}
    said = [message for message in caplog.messages if "policy='tidal'" in message]
    assert len(said) == 1 and "is a guess" in said[0]


@torch.no_grad()
def test_a_plan_that_is_named_is_refused_for_another_model_with_what_differs(home):
    path = str(save_plan(plan_for(make_model(layers=5))))
    assert explained(make_model(layers=5), path)[1] == "loki"
    other = make_model(layers=5)
    other.model.layers[3].self_attn.k_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"toy with 5 layers.*layers\.3\.self_attn") as caught:
        explained(other, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["reuse:3", "reuse:2", "rouse"])
@torch.no_grad()
def test_a_plan_that_leads_nowhere_is_refused(home, word):
    words = ("dense", "loki", word, "reuse:1", "reuse:1")
    model = make_model(layers=5)
    with pytest.raises(ValueError, match="policy"):
        explained(model, str(save_plan(plan_for(model, words))))


def test_what_is_written_is_read(home):
    plan = plan_for(make_model(layers=5))
    mass = tuple(tuple(0.5 if n <= m else None for m in range(5)) for n in range(5))
    plan = dataclasses.replace(plan, mass=mass, scores={"kl": 0.25})
    path = save_plan(plan)
    assert read_plan(path) == plan
    marks = {layer.weights: layer.blocks for layer in plan.layers}
    assert find_plan(list(marks), marks) == plan
    assert find_plan([], {}) is None and find_plan([*marks, "0" * 32], marks) is None
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 7'),
        lambda text: text.replace('"top_k"', '"top"'),
        lambda text: text.replace('"kv_heads": 2', '"kv_heads": -2'),
        lambda text: text.replace('"word": "dense"', '"word": "\\u0007"'),
        lambda text: json.dumps({**json.loads(text), "mass": [[1.0]]}),
        lambda text: json.dumps({**json.loads(text), "layers": []}),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_passed_over_in_the_store(home, damage, caplog):
    plan = plan_for(make_model(layers=5))
    path = save_plan(plan)
    path.write_text(damage(path.read_text()))
    with pytest.raises(PlanFileError, match="is no plan of layers"):
        read_plan(path)
    marks = {layer.weights: layer.blocks for layer in plan.layers}
    assert find_plan(list(marks), marks) is None
    assert "passed over" in caplog.text


def test_a_damaged_plan_of_spans_says_what_finds_one(tmp_path):
    path = tmp_path / f"bad{SPANS_SUFFIX}"
    path.write_text("{}")
    with pytest.raises(PlanFileError, match=r"no plan of spans .*run `loki tune --policy moa`"):
        read_plan(path)


def test_rows_of_weights_find_the_plan_of_the_whole(home):
    """As under tensor parallelism, where a process has some of the heads."""
    plan = plan_for(make_model(layers=5))
    save_plan(plan)
    mine = {f"{number:032x}": layer.blocks[1:] for number, layer in enumerate(plan.layers)}
    found = find_plan(list(mine), mine)
    assert found == plan
    assert [plan.layer_of(each, rows) for each, rows in mine.items()] == [0, 1, 2, 3, 4]
