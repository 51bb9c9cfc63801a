"""Plans of spans: stored and found by the weights, published by others, refused in one line."""

import json

import pytest
import torch
from loki_compile.kernels.spans import Span, Spans
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.policy import Candidate
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.layer_plan import (
    SPANS_SUFFIX,
    LayerPlan,
    PlanFileError,
    PlannedLayer,
    find_plan,
    save_plan,
)
from toy_models import LONG, make_model, prompt, started

from loki_compile import LokiConfig, explain, stats
from loki_compile.planned import PlanOfModel
from loki_compile.policies.kinds import Kind, kind_of
from loki_compile.published import published_spans

WORDS = ("moa:64:128,0.5N", "moa:64:0.25N", "dense")
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
    return LayerPlan(tuple(layers), "toy", 0.5, "text", "2026-11-27T00:00:00+00:00")


def explained(model, policy):
    cache = started(model, "static", prompt(1, 9))
    options = {"policy": policy, "min_context": 64}
    (found,) = explain(model, prompt(1, 1), past_key_values=cache, options=options)
    return found.sites


def decode(model, policy, ids, kind="growing", steps=2):
    fast = torch.compile(model, backend="loki", options={"policy": policy})
    cache = started(model, kind, ids[:, :LONG])
    found = []
    for at in range(LONG, LONG + steps):
        found.append(fast(ids[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(found)


@torch.no_grad()
def test_a_stored_plan_is_used_at_default_options_and_said(home, caplog):
    model, ids = make_model(layers=3), prompt(1, LONG + 2)
    save_plan(plan_for(model), suffix=SPANS_SUFFIX)
    sites = explained(model, "moa")
    assert [site.policy for site in sites] == ["moa", "moa", ""]
    kept = Spans((Span.of((128, 0)), Span.of((0, 0.5))), 64).share(8192)
    assert [site.spans for site in sites] == [*WORDS[:2], ""]
    assert sites[0].note == f"{kept:.0%} of 8192 keys" and sites[2].outcome == "dense by plan"
    out = decode(model, "moa", ids)
    assert stats()["sparse_steps"] == 2 and stats()["rebuilds"] == 0
    said = [message for message in caplog.messages if "policy='moa'" in message]
    assert len(said) == 1 and "as `loki tune` found 2026-11-27" in said[0]
    torch._dynamo.reset()
    by_hand = decode(model, dict(enumerate(WORDS)), ids)
    torch.testing.assert_close(out, by_hand, rtol=0, atol=0)


@torch.no_grad()
def test_a_plan_of_spans_is_not_one_of_which_layers_choose_nor_the_other_way(home, caplog):
    model = make_model(layers=3)
    save_plan(plan_for(model), suffix=SPANS_SUFFIX)
    assert {site.policy for site in explained(model, "tidal")} <= {"loki", "reuse of layer 0"}
    save_plan(plan_for(model, ("oracle", "reuse:0", "oracle")))
    assert [site.policy for site in explained(model, "moa")] == ["moa", "moa", ""]
    assert explained(model, "tidal")[0].policy == "oracle"


@torch.no_grad()
def test_without_a_plan_it_says_that_spans_are_a_guess(home, caplog):
    decode(make_model(layers=3), "moa", prompt(1, LONG + 2))
    assert stats()["sparse_steps"] == 2
    said = [message for message in caplog.messages if "policy='moa'" in message]
    assert len(said) == 1 and "is a guess" in said[0] and "12.5% of 8192" in said[0]


@torch.no_grad()
def test_layers_named_moa_among_others_have_the_spans_of_the_plan(home):
    model = make_model(layers=3)
    save_plan(plan_for(model), suffix=SPANS_SUFFIX)
    notes = [site.note for site in explained(model, {0: "moa", "*": "oracle"})]
    assert notes[0] == explained(model, "moa")[0].note and not notes[1]


@torch.no_grad()
def test_a_plan_that_is_named_is_refused_for_another_model(home):
    model = make_model(layers=3)
    path = str(save_plan(plan_for(model), suffix=SPANS_SUFFIX))
    assert explained(model, path)[0].policy == "moa"
    model.model.layers[1].self_attn.k_proj.weight.mul_(2)
    with pytest.raises(ValueError, match=r"toy with 3 layers.*layers\.1\.self_attn") as caught:
        explained(model, path)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_spans_of_other_heads_are_refused(home):
    model = make_model(layers=3)
    save_plan(plan_for(model, ("moa:4:1,2,3", *WORDS[1:])), suffix=SPANS_SUFFIX)
    with pytest.raises(ValueError, match=r"\.spans\.json .*2 KV heads, and 3 spans") as caught:
        explained(model, "moa")
    assert "\n" not in str(caught.value)


def test_rows_of_weights_have_the_spans_of_their_heads(home):
    """As under tensor parallelism, where a process has some of the heads."""
    from loki_compile.planned import of_site

    plan = plan_for(make_model(layers=3))
    save_plan(plan, suffix=SPANS_SUFFIX)
    mine = {f"{number:032x}": layer.blocks[1:] for number, layer in enumerate(plan.layers)}
    found = find_plan(list(mine), mine, suffix=SPANS_SUFFIX)
    assert found == plan
    layer = plan.layers[0]
    assert str(of_site(layer, 1, layer.blocks[1:])) == "moa:64:0.5N"
    assert str(of_site(layer, 1, layer.blocks[:1])) == "moa:64:128"
    assert str(of_site(layer, 2, layer.blocks)) == layer.word


def published(tmp_path, alphas, betas, name="moa_alpha_beta.json", **more) -> str:
    path = tmp_path / name
    path.write_text(json.dumps({"alphas": alphas, "betas": betas, **more}))
    return str(path)


@torch.no_grad()
def test_a_published_plan_is_folded_to_kv_heads_and_says_what_that_costs(home, caplog):
    """Of 4 query heads the first two and the last two share a KV head."""
    alphas, betas = [[128.0, 0.0, 1024.0, 2048.0]] * 3, [[0.0, 0.25, 0.0, 0.0]] * 3
    alphas[1], betas[1] = [0.0] * 4, [0.0, 0.125, 1.0, 0.0]
    path = published(home, alphas, betas)
    found = published_spans(path)
    assert str(found.kind(0, 4, 2)) == "moa:64:128|0.25N,2048"
    assert str(found.kind(1, 4, 2)) == "moa:64:64|0.125N,1N|64"
    assert str(found.kind(0, 4, 4)) == "moa:64:128,0.25N|64,1024,2048"
    model = make_model(layers=3)
    decode(model, path, prompt(1, LONG + 2))
    assert stats()["sparse_steps"] == 2
    said = [message for message in caplog.messages if "as published" in message]
    own = [Spans(found.layers[n], 64).share(8192) for n in range(3)]
    folded = [Spans(found.kind(n, 4, 2).spans, 64).share(8192) for n in range(3)]
    assert len(said) == 1
    assert f"would read {sum(own) / 3:.1%}: KV heads read {sum(folded) / 3:.1%}" in said[0]
    assert sum(folded) > sum(own)


@torch.no_grad()
def test_a_table_of_gates_makes_heads_that_read_all_and_heads_that_stream(home):
    table = home / "full_attention_heads.tsv"
    table.write_text("0.9\t0.1\n0.4\t0.3\n1.0\t1.0\n")
    found = published_spans(str(table))
    words = [str(found.kind(layer, 4, 2)) for layer in range(3)]
    assert words == ["moa:64:1N,256", "moa:64:256,256", "moa:64:1N,1N"]
    quarter = published_spans(f"{table}@0.17")
    assert [str(quarter.kind(layer, 4, 2)) for layer in (0, 2)] == [
        "moa:64:256,256",
        "moa:64:1N,256",
    ]
    (home / "config.json").write_text('{"deploy_sink_size": 32, "deploy_recent_size": 128}')
    assert str(published_spans(str(table)).kind(1, 4, 2)) == "moa:32:128,128"
    (home / "config.json").write_text('{"deploy_sink_size": 0, "deploy_recent_size": 0}')
    assert str(published_spans(str(table)).kind(1, 4, 2)) == "moa:0:0,0"
    (home / "config.json").write_text('{"sink_size": 128, "deploy_sink_size": null}')
    assert str(published_spans(str(table)).kind(1, 4, 2)) == "moa:64:256,256"
    model = make_model(layers=3)
    assert [site.policy for site in explained(model, str(table))] == ["moa", "moa", ""]
    assert [site.policy for site in explained(model, f"{table}@0.17")] == ["moa"] * 3


@pytest.mark.parametrize(
    "alphas, betas, more, says",
    [
        ([[0.0] * 4] * 2, [[0.0] * 4] * 2, {}, "2 layers, and the model a layer 2"),
        ([[0.0] * 3] * 3, [[0.0] * 3] * 3, {}, "3 query heads in layer 0, the model 4"),
        ([[0.0] * 8] * 3, [[0.0] * 8] * 3, {}, "8 query heads in layer 0, the model 4"),
        ([[0.0] * 2] * 3, [[0.0] * 2] * 3, {}, "2 query heads in layer 0, the model 4"),
        ([[0.0] * 4] * 3, [[0.0] * 4] * 2, {}, "not of the same layers and heads"),
        ([[0.0] * 4] * 3, [[0.0] * 4, [0.0] * 3, [0.0] * 4], {}, "not of the same layers"),
        ([[0.0] * 4] * 3, [[1.5] * 4] * 3, {}, "beta 1.5"),
        ([[float("nan")] * 4] * 3, [[0.5] * 4] * 3, {}, "is no plan of spans"),
        ([["x"] * 4] * 3, [[0.5] * 4] * 3, {}, "is no plan of spans"),
        ([[0.0] * 4] * 3, [[0.5] * 4] * 3, {"gamma": []}, "needed ['alphas', 'betas']"),
        ([], [], {}, "no layers"),
        (7, [], {}, "is no plan of spans"),
    ],
)
def test_published_plans_that_do_not_fit_are_refused_in_one_line(home, alphas, betas, more, says):
    path = published(home, alphas, betas, **more)
    with pytest.raises(ValueError) as caught:
        planned(path, *(f"model.layers.{layer}.self_attn" for layer in range(3)))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_a_published_plan_that_does_not_fit_is_one_line_for_whoever_calls_the_model(home):
    path = published(home, [[0.0] * 4] * 2, [[0.0] * 4] * 2)
    with pytest.raises(ValueError, match="2 layers, and the model a layer 2") as caught:
        explained(make_model(layers=3), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "1.0\t0.5\n0.5\n", "a\tb\n"])
def test_tables_that_are_none_are_refused(home, text):
    table = home / "heads.tsv"
    table.write_text(text)
    with pytest.raises(PlanFileError, match="is no plan of spans"):
        published_spans(str(table))
    for name in (f"{home}/none.tsv", f"{table}@2", f"{table}@x"):
        with pytest.raises(PlanFileError, match="is no plan of spans"):
            published_spans(name)


@pytest.mark.parametrize("config", ["[64, 256]", "7", '{"deploy_sink_size": "64"}', "{",
                                    '{"deploy_recent_size": -1}', '{"deploy_sink_size": 1e3}',
                                    '{"deploy_sink_size": true}'])  # fmt: skip
def test_sizes_beside_a_table_that_are_none_are_refused_in_one_line(home, config):
    table = home / "full_attention_heads.tsv"
    table.write_text("0.9\t0.1\n")
    (home / "config.json").write_text(config)
    with pytest.raises(PlanFileError, match="is no plan of spans") as caught:
        published_spans(str(table))
    assert "\n" not in str(caught.value)


def test_a_process_with_some_of_the_heads_is_refused_spans_of_all(home):
    """Under tensor parallelism: by number alone none can tell which heads it has. A table of 4 KV
    heads is no plan of the 4 query heads that one of two processes has either."""
    table = home / "full_attention_heads.tsv"
    table.write_text("0.9\t0.1\t0.2\t0.8\n")
    duo = published_spans(str(table))
    assert str(duo.kind(0, 8, 4)) == "moa:64:1N,256,256,1N"
    moa = published_spans(published(home, [[64.0] * 4 + [128.0] * 4], [[0.0] * 8]))
    assert str(moa.kind(0, 8, 4)) == "moa:64:64,64,128,128"
    for found, says in ((duo, "4 KV heads in layer 0"), (moa, "8 query heads in layer 0")):
        for processes in (2, 4):
            with pytest.raises(ValueError, match=says) as caught:
                found.kind(0, 8 // processes, 4 // processes)
            assert "\n" not in str(caught.value)


def test_spans_of_query_heads_are_folded_as_tiles_of_heads_lie(home):
    """Query head h reads KV head h % 2 there."""
    moa = published_spans(published(home, [[64.0, 128.0, 256.0, 64.0]], [[0.0] * 4]))
    assert str(moa.kind(0, 4, 2)) == "moa:64:128,256"
    assert str(moa.kind(0, 4, 2, interleaved=True)) == "moa:64:256,128"


def planned(path, *names):
    """What a plan says for a graph with sites of these names."""
    candidates = [
        Candidate(AttentionSite(None, None, None, None, 1.0, 4, 2, 1, 8, 8, name), None, None)
        for name in names
    ]
    return PlanOfModel(None, (), (), LokiConfig(policy=path))(candidates, "moa")


def test_a_graph_that_holds_some_of_the_layers_has_their_spans(home):
    """As behind a graph break between layers."""
    path = published(home, [[64.0] * 4, [128.0] * 4, [256.0] * 4], [[0.0] * 4] * 3)
    for layers in ([0, 1], [1], [2], [0, 1, 2]):
        found = planned(path, *(f"model.layers.{layer}.self_attn" for layer in layers))
        assert list(found.layers) == layers
        widths = [64 << layer for layer in layers]
        assert [str(kind) for kind in found.kinds] == [f"moa:64:{w},{w}" for w in widths]
    assert planned(path, "", "", "").layers == (0, 1, 2)  # all of them, in order
    with pytest.raises(ValueError, match="3 layers, and the model a layer 3"):
        planned(path, "model.layers.2.self_attn", "model.layers.3.self_attn")


@torch.no_grad()
def test_layers_whose_numbers_cannot_be_told_are_refused_in_one_line(home):
    """A graph break in a layer: Dynamo then compiles layers one by one, and names them alike."""
    model = make_model(layers=3)
    own = model.model.layers[1].mlp.forward

    def broken(x):
        torch._dynamo.graph_break()
        return own(x)

    model.model.layers[1].mlp.forward = broken
    path = published(home, [[64.0] * 4, [128.0] * 4, [256.0] * 4], [[0.0] * 4] * 3)
    with pytest.raises(ValueError, match="3 layers, and which of them self_attn is") as caught:
        decode(model, path, prompt(1, LONG + 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"format": 7}'])
@torch.no_grad()
def test_a_plan_of_layers_that_is_none_is_said_to_be_that(home, text):
    path = home / "mine.plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"is no plan of layers \(.*run `loki tune`") as caught:
        explained(make_model(), str(path))
    assert "\n" not in str(caught.value)


def test_a_plan_of_ours_is_not_taken_for_a_published_one(home):
    path = save_plan(plan_for(make_model(layers=3)), suffix=SPANS_SUFFIX)
    assert published_spans(str(path)) is None


def test_words_of_plans_say_the_spans_that_were_given():
    spans = (Span.of((64, 0), (-1024, 1.0)), Span.of((0, 0.125), (0, 0.125), (-5, 0.0)))
    kind = Kind("moa", spans=spans, sink=64)
    assert str(kind) == "moa:64:64|-1024+1N,0.125N" and kind_of(str(kind)) == kind
