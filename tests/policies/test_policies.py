"""Each policy in many spellings: the whole budget is dense, a small one is the policy's definition.

Inductor's place is taken by an interpreter; `test_compiled_policies.py` runs Inductor.
"""

import math

import pytest
import torch
from loki_compile.passes.attention import Reason
from torch import nn
from toy_attends import INTERLEAVED, gqa_repeat_kv, mqa_broadcast, plain
from toy_capture import count_calls
from toy_conversation import Conversation, basis_for, farthest_apart, tokens
from toy_decoders import REWRITTEN, Spelling, ToyDecoder
from toy_masks import alibi, causal, causal_float, left_padded, no_mask
from toy_models import tiny_deepseek
from toy_options import BATCH, FILLED, HEAD_DIM, HIDDEN, KV_HEADS, SLOTS
from toy_policies import KEEP_NOTHING, POLICIES, DirectPolicy
from toy_writes import (
    cat_bhtd,
    cat_cropped,
    cat_folded,
    cat_window_read,
    index_copy_folded,
    index_copy_method,
    read_only,
    ring,
    roll_window,
    slice_assignment,
)
from transformers import DynamicCache

from loki_compile import reports, stats

STEPS = 3
EVERYTHING = {"min_context": 0, "top_k": 1.0, "index_dtype": "cache"}
FEW = {
    "min_context": 0, "top_k": 0.4, "sink": 1, "recent": 2, "rank": 4, "index_dtype": "cache"
}  # fmt: skip
# Loki in every spelling, with the greatest score: `test_rewrite.py`.
NEW = [name for name in POLICIES if name != "loki"]
# Keys that move from page to page, or that are written over where rows still see their neighbours.
NO_PAGES = (cat_cropped, cat_window_read, roll_window, ring)
pytestmark = pytest.mark.usefixtures("interpreted")


def scatter(k, v, ck, cv, pos):
    at = pos[None, None, :, None].expand(k.shape[0], k.shape[2], -1, k.shape[3])
    ck.scatter_(2, at, k.transpose(1, 2))
    cv.scatter_(2, at, v.transpose(1, 2))
    return ck, cv, ()


def scatter_folded(k, v, ck, cv, pos):
    at = pos[None, :, None].expand(k.shape[0], -1, k.shape[2] * k.shape[3])
    ck.scatter_(1, at, k.flatten(2))
    cv.scatter_(1, at, v.flatten(2))
    heads = [y.view(*y.shape[:2], -1, HEAD_DIM).transpose(1, 2) for y in (ck, cv)]
    return *heads, ()


_static = Spelling(index_copy_method)
_cat = Spelling(cat_bhtd, mask=no_mask, growing=True)
MORE = [_static.but(write=scatter), _static.but(write=scatter_folded, layout="btf", new_tokens=2)]
# No two tests of the default run tell the same: a cache, a write, heads, a mask, new tokens.
QUICK = [
    _cat,
    _cat.but(write=cat_folded, layout="btf", mask=causal, new_tokens=3),
    _static.but(new_tokens=2, mask=left_padded),
    _static.but(mask=causal_float, attend=plain, kv_heads=6),
    _static.but(write=slice_assignment, position="int", attend=mqa_broadcast, kv_heads=1),
    *MORE,
]
SLOW = [s for s in REWRITTEN if s not in QUICK]
SLOW.append(_static.but(write=index_copy_folded, layout="btf", attend=gqa_repeat_kv))
SPELLINGS = [*QUICK, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)]
spelled = pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)


def cannot_serve(policy, spelling) -> bool:
    if policy == "quest":
        return spelling.write in NO_PAGES
    return policy == "unified" and spelling.mask is alibi


def compiled(module, policy, **options):
    if policy == "loki" and module.spelling.write is not read_only:
        options.setdefault("basis", basis_for(module))
    return torch.compile(module, backend="loki", options={**options, "policy": policy})


def compare(module, fast, spelling, slow=None) -> float:
    """Largest difference of outputs over some steps from equal caches."""
    here = Conversation.start(spelling)
    there = here.fork()
    return farthest_apart(here, there, fast, module, tokens(spelling, STEPS), slow)


@pytest.mark.parametrize("policy", NEW)
@spelled
@torch.no_grad()
def test_the_whole_budget_is_dense_attention(spelling, policy, interpreted):
    module = ToyDecoder(spelling).eval()
    difference = compare(module, compiled(module, policy, **EVERYTHING), spelling)
    sparse = not cannot_serve(policy, spelling)
    (site,) = reports()[-1].sites
    assert (site.outcome, site.policy) == (("sparse", policy) if sparse else ("dense", ""))
    assert stats()["sparse_steps"] == (STEPS if sparse else 0) and stats()["dense_steps"] == 0
    assert difference < 2e-5
    if sparse:
        assert interpreted.calls("loki.attend") == len(interpreted.graphs)
    if policy in KEEP_NOTHING:
        assert stats()["rebuilds"] == stats()["index_bytes"] == 0


@pytest.mark.parametrize("group_choice", ["max", "probability"])
@pytest.mark.parametrize("policy", POLICIES)
@spelled
@torch.no_grad()
def test_a_small_budget_is_the_definition(spelling, policy, group_choice):
    if cannot_serve(policy, spelling):
        pytest.skip("dense: the test of the whole budget")
    if policy == "loki" and (group_choice == "max" or spelling.write is read_only):
        pytest.skip("test_rewrite.py")
    if policy in ("window", "unified") and group_choice == "probability":
        pytest.skip("nothing is chosen by scores")
    module = ToyDecoder(spelling).eval()
    options = {**FEW, "group_choice": group_choice}
    interleaved = spelling.attend in INTERLEAVED
    truth = DirectPolicy(
        policy, module.kv_heads, options, basis=basis_for(module), interleaved=interleaved
    )
    assert compare(module, compiled(module, policy, **options), spelling, truth) < 2e-5
    assert stats()["sparse_steps"] == STEPS
    assert stats()["rebuilds"] == (policy not in KEEP_NOTHING)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_heads_that_choose_for_themselves_follow_the_definition(policy):
    module = ToyDecoder(_static.but(mask=left_padded)).eval()
    options = {**FEW, "share": "head", "group_choice": "probability"}
    truth = DirectPolicy(policy, KV_HEADS, options, basis=basis_for(module))
    fast = compiled(module, policy, **options)
    assert compare(module, fast, module.spelling, truth) < 2e-5


@pytest.mark.parametrize("policy", POLICIES)
def test_a_small_budget_is_not_dense_attention_nor_another_policys(policy):
    """Otherwise the comparison with the definition would prove nothing."""
    module = ToyDecoder(_cat).eval()
    with torch.no_grad():
        here = Conversation.start(_cat)
        (x,) = tokens(_cat, 1)
        twins = {other: here.fork() for other in POLICIES}
        out = here.fork().step(compiled(module, policy, **FEW), x)
        assert (out - here.step(module, x)).abs().max() > 1e-2
        for other, twin in twins.items():
            with DirectPolicy(other, KV_HEADS, FEW, basis=basis_for(module)):
                far = (out - twin.step(module, x)).abs().max()
            assert far < 2e-5 if other == policy else far > 1e-2


@pytest.mark.parametrize("hidden", [math.nan, 1e30])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_what_no_row_sees_yet_may_hold_anything(policy, hidden):
    """Slots behind the last token; and of padding, values."""
    module = ToyDecoder(_static.but(mask=left_padded)).eval()
    for options in (EVERYTHING, FEW):
        torch._dynamo.reset()
        fast = compiled(module, policy, **options)
        clean = Conversation.start(module.spelling)
        dirty = clean.fork()
        dirty.keys[:, :, FILLED:], dirty.values[:, :, FILLED:] = hidden, hidden
        padding = torch.arange(SLOTS) < 3 * torch.arange(BATCH)[:, None]
        dirty.values.masked_fill_(padding[:, None, :, None], hidden)
        for x in tokens(module.spelling, STEPS):
            out, expected = dirty.step(fast, x), clean.step(fast, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_keys_of_padding_may_be_nan(policy):
    """As rows that see nothing leave them in the next layer; a page holds visible ones too."""
    module = ToyDecoder(_static.but(mask=left_padded)).eval()
    for options in (EVERYTHING, FEW):
        torch._dynamo.reset()
        fast = compiled(module, policy, **options)
        clean = Conversation.start(module.spelling)
        clean.keys[1, :, :3] = clean.keys[1, :, 3:4]  # which bound a page no further
        dirty = clean.fork()
        dirty.keys[1, :, :3] = torch.nan
        for x in tokens(module.spelling, STEPS):
            out, expected = dirty.step(fast, x), clean.step(fast, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_caches_that_are_parts_of_one_tensor(policy):
    """The caches of two layers, keys and values in one tensor."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(ToyDecoder(_static) for _ in range(2))

        def forward(self, x, cache, pos, mask):
            for number, layer in enumerate(self.layers):
                (x,) = layer(x, cache[number, 0], cache[number, 1], pos, mask)
            return x

    module = Parts().eval()
    fast = torch.compile(module, backend="loki", options={**FEW, "policy": policy, "rank": 10})
    here = torch.randn(2, 2, BATCH, KV_HEADS, SLOTS, HEAD_DIM)
    there = here.clone()
    truth = DirectPolicy(
        "oracle" if policy == "loki" else policy, KV_HEADS, {**FEW, "rank": 10}
    )  # an index of all dims ranks as the keys do
    for step in range(3):
        x, at = torch.randn(BATCH, 1, HIDDEN), FILLED + step
        mask = causal(BATCH, 1, SLOTS, at)
        out = fast(x, here, torch.tensor([at]), mask)
        with truth:
            expected = module(x, there, torch.tensor([at]), mask)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert stats()["sparse_steps"] == 3
    assert stats()["rebuilds"] == (0 if policy in KEEP_NOTHING else 2)


@torch.no_grad()
def test_layers_that_see_the_same_keys_share_the_positions_of_a_window(interpreted):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(ToyDecoder(_static) for _ in range(2))

        def forward(self, x, caches, pos, masks):
            for layer, (ck, cv), mask in zip(self.layers, caches, masks, strict=True):
                (x,) = layer(x, ck, cv, pos, mask)
            return x

    module = Two().eval()
    fast = torch.compile(module, backend="loki", options={**FEW, "policy": "window"})
    pos, mask = torch.tensor([FILLED]), causal(BATCH, 1, SLOTS, FILLED)
    for masks, times in (((mask, mask), 1), ((mask, left_padded(BATCH, 1, SLOTS, FILLED)), 2)):
        torch._dynamo.reset()
        interpreted.graphs.clear()
        here = torch.randn(2, 2, BATCH, KV_HEADS, SLOTS, HEAD_DIM).unbind(0)
        here = [tuple(pair.unbind(0)) for pair in here]
        there = [tuple(x.clone() for x in pair) for pair in here]
        x = torch.randn(BATCH, 1, HIDDEN)
        out = fast(x, here, pos, masks)
        with DirectPolicy("window", KV_HEADS, FEW):
            expected = module(x, there, pos, masks)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        (gm,) = interpreted.graphs
        windows = [n for n in gm.graph.nodes if getattr(n.target, "__name__", "").startswith("win")]
        assert len(windows) == times and count_calls(gm.graph, "loki.attend") == 2


def decoded(model, fast, steps: int = 3) -> float:
    """Greatest difference of logits from those of the uncompiled model, behind a prompt of 20."""
    ids = torch.randint(64, (1, 20 + steps))
    here, there = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for cache in (here, there):
        model(ids[:, :20], past_key_values=cache)
    apart = []
    for at in range(20, 20 + steps):
        out = fast(ids[:, at : at + 1], past_key_values=here).logits
        apart.append(out - model(ids[:, at : at + 1], past_key_values=there).logits)
    return torch.cat(apart).abs().max().item()


@pytest.mark.parametrize(
    "policy",
    ["oracle", *(pytest.param(p, marks=pytest.mark.slow) for p in POLICIES if p != "oracle")],
)
@torch.no_grad()
def test_latents_in_two_tensors_are_served_by_those_that_can(policy):
    model = tiny_deepseek()
    options = {**EVERYTHING, "policy": policy}
    assert decoded(model, torch.compile(model, backend="loki", options=options)) < 2e-4
    sparse = policy in ("loki", "window")
    assert stats()["sparse_steps"] == (3 if sparse else 0)
    for site in reports()[-1].sites:
        why = Reason.POLICY.value.split("{")[0] + repr(policy)
        assert site.policy == policy if sparse else site.reason.startswith(why)
    if not sparse:
        torch._dynamo.reset()
        strict = torch.compile(model, backend="loki", options={**options, "strict": True})
        with pytest.raises(RuntimeError, match=f"the policy '{policy}' cannot serve it: "):
            decoded(model, strict)
