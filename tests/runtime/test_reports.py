"""What explain and reports show, and that explaining leaves a model as it was."""

import gc
import weakref

import pytest
import torch
from toy_models import tiny_llama
from transformers import DynamicCache

import loki_compile
from loki_compile import GraphReport, SiteReport, explain, reports
from loki_compile.report import Reports, fold


def site(path, outcome="sparse", reason="", **more):
    return SiteReport(path, f"cache of {path}", outcome, reason, 9, 3, 64, basis="auto", **more)


def layers(numbers, **more):
    return [site(f"model.layers.{n}.self_attn", **more) for n in numbers]


PREFILL = {"outcome": "dense by plan", "reason": "a prefill"}


def test_equal_layers_are_one_row():
    (row,) = fold([GraphReport(tuple(layers(range(30), rank=16)))])
    assert row.where == "layers 0-29: model.layers.*.self_attn"
    assert (row.heads, row.dims, len(row.sites)) == ("9/3", "16 of 64", 30)


def test_layers_of_other_outcomes_are_rows_of_their_own():
    local = {"outcome": "dense by plan", "reason": "its window is short"}
    report = GraphReport(tuple([*layers([0, 1, 3, 4], **local), *layers([2, 5], rank=16)]))
    assert [row.where for row in fold([report])] == [
        "layers 0-1, 3-4: model.layers.*.self_attn",
        "layers 2, 5: model.layers.*.self_attn",
    ]


def test_ranks_that_differ_are_a_span():
    sites = [site(f"h.{n}.attn", rank=7 + n) for n in range(4)]
    assert [row.dims for row in fold([GraphReport(tuple(sites))])] == ["7-10 of 64"]


def test_paths_with_two_numbers_fold_on_the_last():
    sites = [site(f"stages.{s}.blocks.{b}.attn") for s in (0, 1) for b in range(3)]
    found = [row.where for row in fold([GraphReport(tuple(sites))])]
    assert found == ["blocks 0-2: stages.0.blocks.*.attn", "blocks 0-2: stages.1.blocks.*.attn"]


def test_sites_without_a_path_are_counted():
    (row,) = fold([GraphReport((site(""), site("")))])
    assert row.where == "cache of  (2 sites)"


def test_graphs_that_decode_come_first_and_prefills_are_one_line():
    prefill, decode = (
        GraphReport(tuple(layers(range(3), **PREFILL))),
        GraphReport(tuple(layers(range(3), rank=16))),
    )
    lines = str(Reports([prefill, decode, prefill, decode])).splitlines()
    assert lines[0] == "2 graphs of 3 attention sites, 3 sparse"
    assert lines[1].startswith("  layers 0-2: model.layers.*.self_attn  sparse  9/3 heads")
    assert lines[2:] == ["2 graphs of 6 attention sites, dense by plan: a prefill"]


def test_what_runs_now_is_shown():
    sites = tuple(layers(range(3), rank=16))
    lines = str(Reports([GraphReport(sites), GraphReport(sites, now="gave up: no memory")]))
    assert lines.count("now: gave up: no memory") == 1
    assert lines.count("1 graph of 3 attention sites") == 2
    assert fold([GraphReport(sites, now="held back")])[0].now == "held back"


def test_reports_stay_a_list(interpreted):
    assert reports() == [] and isinstance(reports(), list)
    assert "call model.compile" in str(loki_compile.reports())


def decode_step(model):
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=1500)
    with torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.long), past_key_values=cache)
    return {"input_ids": torch.ones(1, 1, dtype=torch.long), "past_key_values": cache}


def test_explaining_often_harms_no_later_compile(interpreted):
    pytest.importorskip("transformers")
    model = tiny_llama()
    for _ in range(12):
        found = explain(model, **decode_step(model))
        assert [s.outcome for graph in found for s in graph.sites] == ["sparse"] * 2
    assert str(found).splitlines()[0] == "1 graph of 2 attention sites, 2 sparse"
    assert not reports()
    step = decode_step(model)
    model.compile(backend="loki")
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        model(**step)
    assert [s.outcome for graph in reports() for s in graph.sites] == ["sparse"] * 2


class Broken(torch.nn.Module):
    """Its attention is compiled as a fragment of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        torch._dynamo.graph_break()
        return self.inner(**inputs)


@pytest.mark.parametrize("wrap", [lambda model: model, Broken])
def test_nothing_stays_alive_of_explaining(wrap, monkeypatch):
    pytest.importorskip("transformers")
    from loki_compile import explanation

    alive = []
    analyse = explanation.analyse

    def noting(gm, example_inputs, config):
        alive.append(weakref.ref(config))
        return analyse(gm, example_inputs, config)

    monkeypatch.setattr(explanation, "analyse", noting)
    model = wrap(tiny_llama())
    found = explain(model, **decode_step(getattr(model, "inner", model)))
    assert found and alive
    del found
    gc.collect()
    assert not [reference for reference in alive if reference() is not None]
    assert model is not None


def test_torch_compile_alone_compiles_no_generate(interpreted):
    """What README says: the wrapper hands `generate` to the model inside."""
    pytest.importorskip("transformers")
    model = torch.compile(tiny_llama(), backend="loki")
    model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=3, do_sample=False)
    assert not reports()
    assert "call model.compile" in str(reports())


def test_each_pass_says_which_calls_it_made_more_or_fewer(caplog, interpreted):
    """`TORCH_LOGS="+loki_compile"`: what becomes of a graph can be followed from pass to pass."""
    model = tiny_llama()
    step = torch.compile(model, backend="loki", options={"min_context": 0, "top_k": 1.0})
    cache = DynamicCache(config=model.config)
    caplog.set_level("DEBUG", "loki_compile")
    with torch.no_grad():
        model(torch.randint(64, (1, 9)), past_key_values=cache)
        step(torch.randint(64, (1, 1)), past_key_values=cache)
    said = {m.split(":")[0]: m for m in caplog.messages if " calls; " in m}
    assert {"normalize", "shared_caches", "sparse"} <= set(said)
    layers = len(model.model.layers)
    assert f"loki::attend 0 -> {layers}" in said["sparse"]
    assert f"scaled_dot_product_attention {layers} -> 0" in said["sparse"]
