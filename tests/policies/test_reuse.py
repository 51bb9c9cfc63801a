"""Layers that read what another chose: the definition layer by layer, classes of slots, graphs.

Inductor's place is taken by an interpreter; `test_compiled_policies.py` runs Inductor.
"""

import gc

import pytest
import torch
from loki_compile.passes.attention import Reason
from toy_attends import gqa_repeat_kv, plain
from toy_capture import clear_runtime, count_calls
from toy_conversation import tokens
from toy_layers import (
    EVERYTHING,
    FEW,
    GROWING,
    STATIC,
    STEPS,
    Conversations,
    Layers,
    compiled,
    farthest,
)
from toy_masks import alibi, causal, causal_float, left_padded, no_mask
from toy_models import LONG, make_model, prompt, started, tiny_deepseek
from toy_options import FILLED, KV_HEADS, SLOTS
from toy_policies import DirectLayers
from toy_writes import ring
from transformers import DynamicCache

from loki_compile import LokiConfig, explain, reports, stats

PLAN = {0: "dense", 1: "oracle+dense", 3: "loki", "*": "reuse"}
AS_DEFINED = ["dense", "oracle+dense", "reuse:1", "oracle", "reuse:3"]
pytestmark = pytest.mark.usefixtures("interpreted")


SPELLINGS = [
    GROWING,
    GROWING.but(new_tokens=3, mask=causal),
    STATIC.but(mask=left_padded),
    STATIC.but(mask=left_padded, new_tokens=2, kv_heads=1),
    STATIC.but(mask=causal_float, attend=plain, kv_heads=6),
    STATIC.but(mask=alibi, attend=gqa_repeat_kv),
]
spelled = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)


@pytest.mark.parametrize(
    "options", [{}, {"share": "head"}, {"group_choice": "probability", "top_k": 9}]
)
@spelled
@torch.no_grad()
def test_layers_that_reuse_read_what_their_source_chose(spelling, options, interpreted):
    module = Layers(*[spelling] * 5).eval()
    options = {**FEW, **options}
    truth = DirectLayers(AS_DEFINED, module.kv_heads, options)
    assert farthest(module, compiled(module, PLAN, **options), truth) < 5e-5
    found = [(site.outcome, site.policy) for site in reports()[-1].sites]
    assert found == [
        ("dense by plan", ""),
        ("dense by plan", "oracle"),
        ("sparse", "reuse of layer 1"),
        ("sparse", "loki"),
        ("sparse", "reuse of layer 3"),
    ]
    for gm in interpreted.graphs:
        assert (
            count_calls(gm.graph, "loki.select") == 2 and count_calls(gm.graph, "loki.attend") == 3
        )
    assert stats()["sparse_steps"] == STEPS and stats()["rebuilds"] == 1


@spelled
@torch.no_grad()
def test_the_whole_budget_is_dense_attention(spelling):
    module = Layers(*[spelling] * 5).eval()
    assert farthest(module, compiled(module, PLAN, **EVERYTHING)) < 5e-5
    assert stats()["sparse_steps"] == STEPS


@torch.no_grad()
def test_what_reuses_is_neither_dense_nor_choosing_for_itself():
    """Otherwise the comparison with the definition would prove nothing."""
    module = Layers(*[GROWING] * 2).eval()
    fast = compiled(module, {0: "oracle", 1: "reuse"}, **FEW)
    assert farthest(module, fast, DirectLayers(["oracle", "reuse:0"], module.kv_heads, FEW)) < 5e-5
    for other in (["oracle", "dense"], ["oracle", "oracle"], ["oracle", "reuse:0:1,2,0"]):
        torch._dynamo.reset()
        fast = compiled(module, {0: "oracle", 1: "reuse"}, **FEW)
        assert farthest(module, fast, DirectLayers(other, module.kv_heads, FEW)) > 1e-2


@pytest.mark.parametrize(
    "counts, reuse",
    [
        ((KV_HEADS, KV_HEADS), "reuse:0:2,0,0"),
        ((KV_HEADS, 1), "reuse:0"),
        ((1, KV_HEADS), "reuse:0"),
        ((KV_HEADS, 6), "reuse:0"),
        ((KV_HEADS, 6), "reuse:0:2,2,1,0,0,1"),
        ((6, 2), "reuse:0:5,1"),
    ],
)
@pytest.mark.parametrize("share", ["group", "head"])
@torch.no_grad()
def test_heads_read_those_that_the_map_names(counts, reuse, share):
    module = Layers(*(GROWING.but(kv_heads=count) for count in counts)).eval()
    options = {**FEW, "share": share}
    fast = compiled(module, {0: "oracle", 1: reuse}, **options)
    assert farthest(module, fast, DirectLayers(["oracle", reuse], module.kv_heads, options)) < 5e-5


@torch.no_grad()
def test_keys_are_shared_within_a_class_of_slots_alone():
    """Another mask, another length, a ring: each class chooses, and later layers find their own."""
    padded = STATIC.but(mask=left_padded)
    longer = STATIC.but(mask=causal, slots=SLOTS + 4)
    rings = STATIC.but(write=ring, mask=no_mask, slots=FILLED + 2)
    module = Layers(STATIC, padded, STATIC, padded, longer, rings, longer, rings).eval()
    kinds = ["oracle", "oracle", "reuse:0", "reuse:1", "oracle", "oracle", "reuse:4", "oracle"]
    fast = compiled(module, {0: "oracle", "*": "reuse"}, **FEW)
    assert farthest(module, fast, DirectLayers(kinds, module.kv_heads, FEW)) < 5e-5
    sites = reports()[-1].sites
    assert [site.policy for site in sites] == [
        "oracle", "oracle", "reuse of layer 0", "reuse of layer 1", "oracle", "oracle",
        "reuse of layer 4", "oracle",
    ]  # fmt: skip
    assert "no layer before it has its slots" in sites[1].note and not sites[0].note
    assert "move from slot to slot" in sites[7].note


@torch.no_grad()
def test_masks_that_each_layer_computes_alike_are_one_class():
    class Own(Layers):
        def forward(self, x, caches, pos, masks):
            masks = [mask[:, :, :, :SLOTS] & (pos >= 0) for mask in masks]
            return super().forward(x, caches, pos, masks)

    module = Own(*[STATIC.but(mask=left_padded)] * 3).eval()
    fast = compiled(module, {0: "oracle", "*": "reuse"}, **FEW)
    truth = DirectLayers(["oracle", "reuse:0", "reuse:0"], module.kv_heads, FEW)
    assert farthest(module, fast, truth) < 5e-5
    assert [site.policy for site in reports()[-1].sites][1:] == ["reuse of layer 0"] * 2


@torch.no_grad()
def test_with_a_graph_per_layer_each_chooses_and_says_so(interpreted):
    module = Layers(*[STATIC] * 3, breaks=True).eval()
    fast = compiled(module, "kascade", **FEW)
    options = {**FEW, "group_choice": "probability"}  # as plans have it
    assert farthest(module, fast, DirectLayers(["oracle"] * 3, module.kv_heads, options)) < 5e-5
    graphs = [report.sites for report in reports() if report.sites]
    assert graphs and all(len(sites) == 1 and sites[0].policy == "oracle" for sites in graphs)
    assert all("in its graph no layer before it" in sites[0].note for sites in graphs)
    assert "in its graph no layer before it" in str(reports())


@pytest.mark.parametrize("layers", [(1, 2, 3), (2, 3)])
@torch.no_grad()
def test_a_source_that_is_left_out_is_stood_in_for_and_says_so(layers):
    module = Layers(*[GROWING] * 4).eval()
    policy = {0: "oracle", 1: "reuse:0", 2: "reuse:0", 3: "reuse:0"}
    first = layers[0]
    kinds = [
        "dense" if n < first else "oracle" if n == first else f"reuse:{first}" for n in range(4)
    ]
    fast = compiled(module, policy, layers=layers, **FEW)
    assert farthest(module, fast, DirectLayers(kinds, module.kv_heads, FEW)) < 5e-5
    notes = [site.note for site in reports()[-1].sites]
    assert notes[first] == "layers.0 is dense: chooses itself"
    assert notes[3] == "layers.0 is dense: reads what the first of its readers chose"


@pytest.mark.parametrize(
    "policy, says",
    [
        ({0: "oracle", 1: "reuse:0", 2: "reuse:1"}, 'which is "reuse:0" and does not choose'),
        ({0: "dense", "1-2": "reuse:0"}, 'which is "dense" and does not choose'),
        ({"layers.1": "reuse:2"}, "does not lie before it"),
        ({0: "oracle", 1: "reuse:0:0,1"}, "map of heads"),
        ({0: "oracle", 1: "reuse:0:0,1,3"}, "map of heads"),
        ({0: "oracle", 2: "reuse:0"}, "do not lie in the same slots"),
    ],
)
@torch.no_grad()
def test_a_plan_that_does_not_fit_its_layers_is_refused_with_what_differs(policy, says):
    module = Layers(STATIC, STATIC, STATIC.but(mask=left_padded)).eval()
    here = Conversations(module)
    (x,) = tokens(STATIC, 1)
    with pytest.raises(ValueError, match=says) as caught:
        here.step(compiled(module, policy, **FEW), x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "policy, says",
    [
        ({3: "reuse:3"}, "does not lie before it"),
        ({"2-4": "reuse:2"}, "layer 2 cannot read what layer 2 chose"),
        ("reuse", "needs a dict"),
        ("dense", "needs a dict"),
        ("oracle+dense", "needs a dict"),
        ({0: "tidal"}, "a plan of all layers"),
        ({0: "reuse:"}, "none of that name"),
        ({0: "reuse:1:"}, "none of that name"),
        ({0: "reuse:-1"}, "none of that name"),
        ({0: "dense+dense"}, "none of that name"),
        ({0: "resue"}, 'did you mean "reuse"'),
        ("tidel", 'did you mean "tidal"'),
    ],
)
def test_words_that_make_no_plan_are_refused_in_one_line(policy, says):
    with pytest.raises(ValueError, match=says) as caught:
        LokiConfig(policy=policy)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("policy=")


@torch.no_grad()
def test_the_newest_key_is_read_where_nothing_recent_is_kept(interpreted):
    """A layer that reuses writes its own newest key: the choice of another must hold that slot."""
    module = Layers(*[GROWING] * 2).eval()
    options = {**FEW, "recent": 0, "sink": 0, "top_k": 2}
    fast = compiled(module, {0: "oracle", 1: "reuse"}, **options)
    truth = DirectLayers(["oracle", "reuse:0"], module.kv_heads, {**options, "recent": 1})
    assert farthest(module, fast, truth) < 5e-5


@torch.no_grad()
def test_nobody_ranks_for_layers_that_read_all_keys(interpreted):
    module = Layers(*[GROWING] * 3).eval()
    fast = compiled(module, {0: "loki+dense", 1: "oracle", 2: "loki+dense"}, **FEW)
    assert (
        farthest(module, fast, DirectLayers(["dense", "oracle", "dense"], module.kv_heads, FEW))
        < 5e-5
    )
    assert stats()["rebuilds"] == 0
    for gm in interpreted.graphs:
        assert count_calls(gm.graph, "loki.select") == 1
    reasons = [site.reason for site in reports()[-1].sites]
    assert reasons[0] == reasons[2] == Reason.READS_ALL.value


@torch.no_grad()
def test_layers_over_latents_reuse_as_well():
    model = tiny_deepseek()
    options = {"min_context": 0, "policy": {0: "loki", 1: "reuse"}, "rank": 1.0}
    fast = torch.compile(model, backend="loki", options={**options, "top_k": 1.0})
    ids = torch.randint(64, (2, 24))
    here, there = (DynamicCache(config=model.config) for _ in range(2))
    for cache in (here, there):
        model(ids[:, :20], past_key_values=cache)
    for at in range(20, 24):
        out = fast(ids[:, at : at + 1], past_key_values=here).logits
        expected = model(ids[:, at : at + 1], past_key_values=there).logits
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-4)
    assert [site.policy for site in reports()[-1].sites] == ["loki", "reuse of layer 0"]
    assert stats()["rebuilds"] == 1


@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_memory_falls_with_the_layers_that_reuse_at_default_options(kind):
    model, ids = make_model(layers=7), prompt(1, LONG + 6)
    held = {}
    for policy in ("loki", "tidal"):
        torch._dynamo.reset()
        clear_runtime()
        fast = torch.compile(model, backend="loki", options={"policy": policy})
        cache = started(model, kind, ids[:, :LONG])
        for at in range(LONG, LONG + 6):
            fast(ids[:, at : at + 1], past_key_values=cache)
        gc.collect()  # caches of transformers lie in cycles
        held[policy] = stats()["index_bytes"]
        assert stats()["dense_steps"] == 0
        del cache
        gc.collect()
    chosen = [site.policy for site in reports()[-1].sites]
    assert chosen == [*["loki"] * 3, *["reuse of layer 2"] * 2, "loki", "reuse of layer 5"]
    assert held["tidal"] == held["loki"] // 7 * 4


@pytest.mark.parametrize(
    "policy, chosen",
    [
        ("tidal", "loki loki loki 2 2 loki 5 5"),
        ("tidal-published", "- - - oracle+dense 3 3 3 3"),
        ("lessismore", "- - - unified+dense 3 3 3 3"),
        ("kascade", "oracle+dense 0 oracle oracle oracle 4 4 4"),
    ],
)
@torch.no_grad()
def test_plans_by_name(policy, chosen):
    """ "-" stands for a dense layer: as published, or because nobody reads what it would choose."""
    model = make_model(layers=8)
    cache = started(model, "static", prompt(1, 9))
    options = {"policy": policy, "min_context": 64}
    (found,) = explain(model, prompt(1, 1), past_key_values=cache, options=options)
    words = []
    for site in found.sites:
        dense = "+dense" if site.outcome == "dense by plan" else ""
        word = site.policy.removeprefix("reuse of layer ")
        words.append(word + dense if word else "-")
    assert " ".join(words) == chosen


@torch.no_grad()
def test_rows_that_see_few_keys_read_all_of_them_at_default_options():
    """A row below `min_context` is dense in layers that choose and in those that reuse."""
    model = make_model(layers=3)
    ids = torch.cat((prompt(1, LONG + 1), prompt(2, LONG + 1)))
    mask = torch.ones_like(ids)
    mask[1, : LONG - 300] = 0
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    where = {"attention_mask": mask, "position_ids": at[:, -1:]}
    logits = []
    for compile_it in (True, False):
        cache = DynamicCache(config=model.config)
        before = {"attention_mask": mask[:, :-1], "position_ids": at[:, :-1]}
        model.forward(ids[:, :-1], past_key_values=cache, **before)
        run = (
            torch.compile(model, backend="loki", options={"policy": "tidal"})
            if compile_it
            else model
        )
        logits.append(run(ids[:, -1:], past_key_values=cache, **where).logits)
    assert stats()["sparse_steps"] == 1
    torch.testing.assert_close(logits[0][1], logits[1][1], rtol=0, atol=1e-4)
    assert (logits[0][0] - logits[1][0]).abs().max() > 1e-3
