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

from loki_compile import LokiConfig, explain, reports, stats
from loki_compile.counts import forget_notices
from loki_compile.plan_words import judged_under, kinds_of

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


@pytest.mark.parametrize(
    "word, says",
    [
        ("reuse:3", "layer 3 does not lie before it"),
        ("reuse:2", "layer 2 does not lie before it"),
        ("reuse:0", 'layer 0 is "dense" and does not choose'),
        ("reuse:1:0", "2 KV heads, and 1 heads"),
        ("reuse:1:0,2", "layer 1 has 2 KV heads"),
        ("loki:9,9,9", "2 KV heads, and 3 budgets"),
        ("loki:9,from=1.2", "layer 1 has 2 KV heads"),
        ("moa:4:1,2,3", "2 KV heads, and 3 spans"),
        ("rouse", 'did you mean "reuse"'),
        ("loki:many", "found a span 'many'"),
    ],
)
def test_a_word_that_is_none_is_one_line_with_the_file_and_what_to_do(home, word, says):
    words = ("dense", "loki", word, "reuse:1", "reuse:1")
    path = save_plan(plan_for(make_model(layers=5), words))
    with pytest.raises(PlanFileError) as caught:
        kinds_of(read_plan(path))
    told = str(caught.value)
    where = f"layer 2 (model.layers.2.self_attn) has the word {word!r}"
    assert told.startswith(str(path)) and where in told and says in told
    assert told.endswith("run `loki tune`") and "\n" not in told


@pytest.mark.parametrize("named", [False, True])
@torch.no_grad()
def test_a_plan_with_such_a_word_is_refused_whether_stored_or_named(home, named):
    model = make_model(layers=5)
    path = str(save_plan(plan_for(model, ("dense", "loki", "rouse", "reuse:1", "reuse:1"))))
    with pytest.raises(PlanFileError, match="has the word 'rouse'") as caught:
        explained(model, path if named else "tidal")
    assert str(caught.value).startswith(path)


def test_a_head_that_is_lent_twice_is_refused(home):
    words = ("loki:9", "loki:9,from=0.1", "loki:9,from=1.1", "dense", "dense")
    with pytest.raises(PlanFileError, match="KV head 1 of layer 1 reads what another chose"):
        kinds_of(plan_for(make_model(layers=5), words))
    words = ("loki:9", "loki:9,from=0.1", "reuse:1:1,0", "loki:from=1.0", "dense")
    assert len(kinds_of(plan_for(make_model(layers=5), words))) == 5  # whole layers may


@torch.no_grad()
def test_a_tuned_plan_says_under_which_other_options_it_was_judged(home, caplog):
    """It is used: what would stand in its place is a guess."""
    model = make_model(layers=5)
    under = judged_under(LokiConfig(), "tidal")
    save_plan(dataclasses.replace(plan_for(model), under=under))
    ids = prompt(1, 80)
    options = {"policy": "tidal", "min_context": 64}
    for more in ({}, {"top_k": 0.25}):
        torch._dynamo.reset()
        forget_notices()
        caplog.clear()
        fast = torch.compile(model, backend="loki", options={**options, **more})
        fast(ids[:, 79:], past_key_values=started(model, "growing", ids[:, :79]))
        (said,) = [message for message in caplog.messages if "policy='tidal'" in message]
        assert "as `loki tune` found 2026-11-27" in said
        differs = "judged under top_k=0.125, and here is top_k=0.25"
        assert (differs in said) == bool(more) == ("judged" in said)


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
        lambda text: json.dumps({**json.loads(text), "layers": None}),
        lambda text: json.dumps({**json.loads(text), "layers": [7]}),
        lambda text: json.dumps({**json.loads(text), "mass": [7]}),
        lambda text: json.dumps({**json.loads(text), "scores": []}),
        lambda text: json.dumps({**json.loads(text), "under": 7}),
        lambda text: json.dumps({**json.loads(text), "under": {"rank": "\u0007"}}),
        lambda text: json.dumps({**json.loads(text), "top_k": "all"}),
        lambda text: text.replace('"kv_heads": 2, ', ""),
        lambda text: text.replace('"kv_heads": 2', '"kv_heads": "2"'),
        lambda text: "",
        lambda text: "[" * 100000,
    ],
)
def test_a_damaged_file_is_refused_by_name_and_passed_over_in_the_store(home, damage, caplog):
    plan = plan_for(make_model(layers=5))
    path = save_plan(plan)
    path.write_text(damage(path.read_text()))
    with pytest.raises(PlanFileError, match="is no plan of layers") as caught:
        read_plan(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    marks = {layer.weights: layer.blocks for layer in plan.layers}
    assert find_plan(list(marks), marks) is None
    assert find_plan(list(marks), marks) is None
    (told,) = [message for message in caplog.messages if "passed over" in message]
    assert str(path) in told and "run `loki tune`" in told


def test_a_plan_with_other_layers_than_it_was_stored_with_is_passed_over(home, caplog):
    plan = plan_for(make_model(layers=5))
    path = save_plan(plan)
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, "layers": given["layers"][:3]}))
    marks = {layer.weights: layer.blocks for layer in plan.layers[:3]}
    assert find_plan(list(marks), marks) is None
    assert f"{path} is no plan of layers (its 3 layers are not those that" in caplog.text


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
