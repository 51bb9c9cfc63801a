"""Budgets that are a share of attention: the definition in many spellings, and what is told of it.

Inductor's place is taken by an interpreter, but for the test at default options.
"""

import logging
import math

import pytest
import torch
from loki_compile.kernels import reference
from toy_attends import plain
from toy_conversation import Conversation, basis_for, farthest_apart, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import causal, causal_float, left_padded, no_mask
from toy_models import LONG, make_model, prompt, started
from toy_options import BATCH, FILLED, HEAD_DIM, KV_HEADS
from toy_policies import DirectLayers, DirectPolicy, visible_keys
from toy_writes import cat_bhtd, index_copy_method

from loki_compile import explain, readings, reports, stats
from loki_compile.counts import reset_stats
from loki_compile.policies.kinds import why_unweighed
from loki_compile.policies.table import RANKINGS

STEPS = 3
FEW = {
    "min_context": 0, "top_k": "mass:0.7,0.6", "sink": 1, "recent": 2, "rank": 4,
    "index_dtype": "cache",
}  # fmt: skip
GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)
STATIC = Spelling(index_copy_method)
SPELLINGS = [
    GROWING,
    GROWING.but(new_tokens=3, mask=causal),
    STATIC.but(mask=left_padded),
    STATIC.but(mask=left_padded, new_tokens=2, kv_heads=1),
    STATIC.but(mask=causal_float, attend=plain, kv_heads=6),
]
spelled = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)


def compiled(module, **options):
    if options.get("policy", "loki") == "loki":
        options.setdefault("basis", basis_for(module))
    return torch.compile(module, backend="loki", options=options)


def farthest(module, fast, truth) -> float:
    """Largest difference of outputs from the definition's over some steps from equal caches."""
    here = Conversation.start(module.spelling)
    there = here.fork()
    return farthest_apart(here, there, fast, module, tokens(module.spelling, STEPS), truth)


def layers_told() -> dict:
    (model,) = stats()["models"].values()
    return model.get("layers", {})


class Weighing(DirectPolicy):
    """As `DirectPolicy` of "oracle", with the means of what rows read and leave out."""

    def __init__(self, options):
        super().__init__("oracle", KV_HEADS, options)
        self.told = []

    def positions(self, query, keys, mask, scale, per_head):
        positions, weighed = reference.select_weighed(
            query, None, keys, None, mask, None,
            scale=scale, per_head=per_head, **self.choice(per_head),
        )  # fmt: skip
        self.told.append(weighed.mean((0, 1, 2)))
        return positions


@pytest.mark.parametrize("group_choice", ["max", "probability"])
@pytest.mark.parametrize(
    "policy", ["loki", "oracle", pytest.param("sparq", marks=pytest.mark.slow)]
)
@spelled
@torch.no_grad()
def test_a_mass_is_the_definition_in_every_spelling(spelling, policy, group_choice, interpreted):
    module = ToyDecoder(spelling).eval()
    options = {**FEW, "group_choice": group_choice, "policy": policy}
    truth = DirectPolicy(policy, module.kv_heads, options, basis=basis_for(module))
    assert farthest(module, compiled(module, **options), truth) < 2e-5
    assert stats()["sparse_steps"] == STEPS and stats()["dense_steps"] == 0
    ((keys, left_out),) = (each.values() for each in layers_told().values())
    assert 3 <= keys < 0.6 * (FILLED + STEPS) + 1 and 0 < left_out < 1


@pytest.mark.parametrize("policy", ["loki", "oracle", "sparq"])
@torch.no_grad()
def test_heads_that_choose_for_themselves_hold_the_mass_each(policy, interpreted):
    module = ToyDecoder(STATIC.but(mask=left_padded)).eval()
    options = {**FEW, "share": "head", "policy": policy}
    truth = DirectPolicy(policy, KV_HEADS, options, basis=basis_for(module))
    assert farthest(module, compiled(module, **options), truth) < 2e-5


@torch.no_grad()
def test_a_mass_is_neither_its_ceiling_nor_dense_attention(interpreted):
    """Otherwise the comparison with the definition would prove nothing."""
    module = ToyDecoder(GROWING).eval()
    here = Conversation.start(GROWING)
    (x,) = tokens(GROWING, 1)
    out = here.fork().step(compiled(module, **FEW), x)
    ceiling = {**FEW, "top_k": 0.6}
    with DirectPolicy("loki", KV_HEADS, ceiling, basis=basis_for(module)):
        fixed = here.fork().step(module, x)
    assert (out - fixed).abs().max() > 1e-3
    assert (out - here.step(module, x)).abs().max() > 1e-2


@pytest.mark.parametrize("top_k", ["mass:0.7,0.6", 0.4])
@torch.no_grad()
def test_what_is_told_is_what_the_definition_reads_and_leaves_out(top_k, interpreted):
    """Of "oracle" the estimate is the truth; of a fixed budget it is told where it is asked for."""
    module = ToyDecoder(STATIC.but(mask=left_padded, new_tokens=2)).eval()
    options = {**FEW, "top_k": top_k, "policy": "oracle", "watch_mass": 0.99}
    truth = Weighing(options)
    assert farthest(module, compiled(module, **options), truth) < 2e-5
    keys, left_out = torch.stack(truth.told).mean(0).tolist()
    (told,) = layers_told().values()
    assert told == {"keys": pytest.approx(keys), "left_out": pytest.approx(left_out, abs=1e-5)}
    (site,) = reports()[-1].sites
    assert (site.keys, site.left_out) == (told["keys"], told["left_out"])
    assert f"reads {keys:.0f} keys, leaves out {left_out:.1%}" in str(reports())


def test_what_is_refused_a_mass_is_what_weighs_no_keys():
    assert {name for name, each in RANKINGS.items() if not each.weighs} == {
        name for name in RANKINGS if why_unweighed(name)
    }


@torch.no_grad()
def test_a_fixed_budget_is_not_weighed_unless_it_is_watched(interpreted):
    module = ToyDecoder(GROWING).eval()
    here = Conversation.start(GROWING)
    fast = compiled(module, **{**FEW, "top_k": 0.4})
    for x in tokens(GROWING, STEPS):
        here.step(fast, x)
    assert interpreted.calls("loki.select") and not interpreted.calls("loki.select_weighed")
    assert layers_told() == {} and reports()[-1].sites[0].keys is None


@torch.no_grad()
def test_readers_of_a_choice_read_the_keys_of_its_mass(interpreted):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(ToyDecoder(GROWING) for _ in range(2))

        def forward(self, x, caches, pos, mask):
            state = []
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                x, *new = layer(torch.nn.functional.rms_norm(x, x.shape[-1:]), keys, values, pos,
                                mask)  # fmt: skip
                state.append(new)
            return x, state

    module = Two().eval()
    options = {**FEW, "rank": HEAD_DIM, "policy": {0: "loki", 1: "reuse"}}
    fast = torch.compile(module, backend="loki", options=options)
    truth = DirectLayers(["oracle", "reuse:0"], [KV_HEADS, KV_HEADS], {**FEW, "policy": "oracle"})
    here = [tuple(torch.randn(2, BATCH, KV_HEADS, FILLED, HEAD_DIM)) for _ in range(2)]
    there = [tuple(x.clone() for x in pair) for pair in here]
    for at in range(STEPS):
        x = torch.randn(BATCH, 1, 12)
        out, here = fast(x, here, FILLED + at, None)
        with truth:
            expected, there = module(x, there, FILLED + at, None)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    (path,) = layers_told()
    assert "0" in path, "the reader chooses nothing, and has nothing told of it"


@torch.no_grad()
def test_rows_below_min_context_read_all_they_see(interpreted):
    """Of a batch of which one row is padded, as dense attention has it; the other holds a mass."""
    spelling = STATIC.but(mask=left_padded)
    module = ToyDecoder(spelling).eval()
    (x,) = tokens(spelling, 1)
    here = Conversation.start(spelling)
    seen = visible_keys(here.inputs(x)[4], BATCH, 6, 1, here.keys.shape[2]).sum(-1)[:, 0, 0]
    assert seen[0] > seen[1]
    options = {**FEW, "min_context": int(seen[0])}
    out = here.fork().step(compiled(module, **options), x)
    dense = here.step(module, x)
    torch.testing.assert_close(out[1], dense[1], rtol=0, atol=2e-6)
    assert (out[0] - dense[0]).abs().max() > 1e-2


@torch.no_grad()
def test_reset_stats_forgets_what_was_read(interpreted):
    module = ToyDecoder(GROWING).eval()
    fast = compiled(module, **FEW)
    here = Conversation.start(GROWING)
    here.step(fast, *tokens(GROWING, 1))
    assert layers_told()
    reset_stats()
    assert not stats()["models"]
    here.step(fast, *tokens(GROWING, 1))
    (told,) = layers_told().values()
    assert told["keys"] > 0


@torch.no_grad()
def test_layers_that_leave_out_more_than_is_watched_are_named_once(
    interpreted, monkeypatch, caplog
):
    monkeypatch.setattr(readings, "LOOK_EVERY", 2)
    module = ToyDecoder(GROWING).eval()
    fast = compiled(module, **{**FEW, "top_k": 0.2, "watch_mass": 0.05})
    here = Conversation.start(GROWING)
    with caplog.at_level(logging.WARNING, "loki_compile.notices"):
        for x in tokens(GROWING, 8):
            here.step(fast, x)
    said = [r.getMessage() for r in caplog.records if "watch_mass" in r.getMessage()]
    assert len(said) == 1 and "more than watch_mass=0.05" in said[0]
    assert "raise top_k" in said[0] and "\n" not in said[0]


@torch.no_grad()
def test_nothing_is_said_of_layers_that_leave_out_less(interpreted, monkeypatch, caplog):
    monkeypatch.setattr(readings, "LOOK_EVERY", 2)
    module = ToyDecoder(GROWING).eval()
    fast = compiled(module, **{**FEW, "watch_mass": 0.9})
    here = Conversation.start(GROWING)
    with caplog.at_level(logging.WARNING, "loki_compile.notices"):
        for x in tokens(GROWING, 4):
            here.step(fast, x)
    assert not [r for r in caplog.records if "watch_mass" in r.getMessage()]


@pytest.mark.slow
@torch.no_grad()
def test_explain_says_what_is_asked_for():
    model = make_model()
    cache = started(model, "static", prompt(1))
    found = explain(
        model, torch.full((1, 1), 3), past_key_values=cache, options={"top_k": "mass:0.9,512"}
    )
    sites = [site for report in found for site in report.sites if site.outcome == "sparse"]
    assert [site.note.split(";")[0] for site in sites] == [
        "0.9 of what keys weigh, at most 512 of them"
    ]


@pytest.mark.parametrize("kind", ["static", pytest.param("growing", marks=pytest.mark.slow)])
@torch.no_grad()
def test_at_default_options_the_mass_decides_how_many_keys_are_read(kind):
    """Real Inductor. Little mass reads what is always kept; what no ceiling holds, nearly all."""
    model = make_model()
    ids = prompt(3)
    plain_cache = started(model, kind, ids)
    steps = [torch.full((1, 1), 2 + step) for step in range(4)]
    expected = [model(x, past_key_values=plain_cache).logits for x in steps]
    told, outs = {}, {}
    for top_k in ("mass:0.01", "mass:0.9999,1.0"):
        torch._dynamo.reset()
        reset_stats()
        model.compile(backend="loki", options={"top_k": top_k})
        cache = started(model, kind, ids)
        outs[top_k] = [model(x, past_key_values=cache).logits for x in steps]
        assert stats()["sparse_steps"] >= 3, stats()
        (told[top_k],) = layers_told().values()
    assert told["mass:0.01"]["keys"] == pytest.approx(36, abs=8)
    assert told["mass:0.9999,1.0"]["keys"] > 0.5 * LONG
    assert told["mass:0.9999,1.0"]["left_out"] < 1.1e-4
    worst = max(
        (a - b).abs().max().item() for a, b in zip(outs["mass:0.9999,1.0"], expected, strict=True)
    )
    far = max((a - b).abs().max().item() for a, b in zip(outs["mass:0.01"], expected, strict=True))
    assert worst < 0.02 < far and math.isfinite(far)
