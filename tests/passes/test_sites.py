"""Attention cores: what is found, in which form, and what is refused for which reason."""

import math

import pytest
import torch
import torch.nn.functional as F
from loki_compile.passes.attention import Reason
from loki_compile.passes.normalize import normalize
from loki_compile.passes.sites import find_sites
from torch import nn
from toy_attends import (
    gqa_flag,
    gqa_flag_by_keyword,
    gqa_repeat_interleave,
    gqa_repeat_kv,
    gqa_repeat_kv_bthd,
    interleaved,
    interleaved_by_expand,
    mqa_broadcast,
    mqa_expand,
    plain,
    repeat_kv,
    values_tiled,
    with_dropout,
)
from toy_capture import capture, count_calls, interpret, normal_graph
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import (
    alibi,
    causal,
    causal_2d,
    causal_inf,
    left_padded,
    no_mask,
    nothing_seen_by_first,
)
from toy_options import BATCH, EVERYTHING, FILLED, HEAD_DIM, HEADS, KV_HEADS, SLOTS
from toy_writes import index_copy_method

from loki_compile import reports, stats

pytestmark = pytest.mark.covers

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def sites_of(attend, *, mask=causal, kv_heads=KV_HEADS, **more):
    spelling = Spelling(index_copy_method, attend=attend, mask=mask, kv_heads=kv_heads, **more)
    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    return find_sites(normal_graph(ToyDecoder(spelling).eval(), *inputs).graph)


@pytest.mark.parametrize(
    "attend, kv_heads",
    [
        (plain, HEADS),
        (gqa_flag, KV_HEADS),
        (gqa_flag_by_keyword, KV_HEADS),
        (gqa_repeat_kv, KV_HEADS),
        (gqa_repeat_kv, 1),
        (gqa_repeat_kv_bthd, KV_HEADS),
        (gqa_repeat_interleave, KV_HEADS),
        (gqa_repeat_interleave, 1),
        (mqa_broadcast, 1),
        (mqa_expand, 1),
        (gqa_flag, 2),
        (gqa_flag, HEADS),
    ],
)
def test_heads_are_grouped_whatever_the_spelling(attend, kv_heads):
    (site,), skipped = sites_of(attend, kv_heads=kv_heads)
    assert not skipped
    assert (site.query_heads, site.kv_heads, site.group) == (HEADS, kv_heads, HEADS // kv_heads)
    assert (site.head_dim, site.value_dim, site.query_tokens) == (HEAD_DIM, HEAD_DIM, 1)
    assert site.key.base.op == site.value.base.op == "placeholder"
    shape = site.key.base.meta["example_value"].shape
    assert [shape[d] for d in site.key.order] == [BATCH, kv_heads, SLOTS, HEAD_DIM]


@pytest.mark.parametrize(
    "attend, scale",
    [(gqa_flag, HEAD_DIM**-0.5), (gqa_flag_by_keyword, 0.4), (gqa_repeat_kv, 0.3)],
)
def test_the_scale_is_read_or_is_the_default(attend, scale):
    (site,), _ = sites_of(attend)
    assert math.isclose(site.scale, scale)


@pytest.mark.parametrize("mask", [no_mask, causal, causal_2d, alibi])
def test_masks_are_kept_as_they_are(mask):
    (site,), _ = sites_of(gqa_repeat_kv, mask=mask)
    assert len(site.masks) == (0 if mask is no_mask else 1)


@pytest.mark.parametrize("new_tokens", range(1, 9))
def test_up_to_eight_tokens_are_decoding(new_tokens):
    (site,), _ = sites_of(gqa_flag, new_tokens=new_tokens)
    assert site.query_tokens == new_tokens


@pytest.mark.parametrize(
    "attend, reason, more",
    [
        (with_dropout, Reason.DROPOUT, {"kv_heads": HEADS}),
        (gqa_flag, Reason.PREFILL, {"new_tokens": 9}),
        (values_tiled, Reason.GROUPS, {}),
    ],
)
def test_other_cores_are_skipped_with_a_reason(attend, reason, more):
    sites, (skip,) = sites_of(attend, **more)
    assert not sites and skip.reason is reason
    assert "{" not in skip.sentence()


@pytest.mark.parametrize("attend", [interleaved, interleaved_by_expand])
def test_tiles_of_heads_are_told_from_blocks(attend):
    """Query head h reads KV head h % Hkv there."""
    (site,), _ = sites_of(attend)
    assert site.interleaved and site.group == HEADS // KV_HEADS
    assert site.key.base.op == "placeholder" and site.kv_heads == KV_HEADS
    (one,), _ = sites_of(attend, kv_heads=1)
    assert not one.interleaved and one.group == HEADS


def test_tiles_of_blocks_are_not_seen_through():
    def attend(q, keys, values, mask):
        keys, values = (x.repeat_interleave(2, 1).repeat(1, 2, 1, 1) for x in (keys, values))
        return F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), keys, values, mask)[:, :HEADS]

    (site,), _ = sites_of(attend)
    assert site.group == 2 and site.interleaved and site.key.base.op != "placeholder"


def test_whoever_observes_heads_is_not_shown_tiles():
    spelling = Spelling(index_copy_method, attend=interleaved)
    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    graph = normal_graph(ToyDecoder(spelling).eval(), *inputs).graph
    sites, (skip,) = find_sites(graph, max_query_tokens=None)
    assert not sites and skip.reason is Reason.GROUPS


@pytest.mark.parametrize(
    "shapes",
    [
        ((6, 10), (6, 41, 10), (6, 41, 10)),  # no tokens of their own
        ((6, 1, 10), (6, 41, 10), (6, 41, 10)),  # no batch
    ],
)
def test_other_ranks_are_skipped(shapes):
    q, k, v = (torch.randn(shape) for shape in shapes)
    if q.ndim == 2:
        q = q[:, None]
    graph = normalize(capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v))[0]
    sites, (skip,) = find_sites(graph.graph)
    assert not sites and skip.reason is Reason.LAYOUT


def test_double_precision_is_left_to_eager():
    q, k = torch.randn(2, 6, 1, 10).double(), torch.randn(2, 6, 41, 10).double()
    graph = normalize(capture(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, k))[0]
    sites, (skip,) = find_sites(graph.graph)
    assert not sites and skip.reason is Reason.DTYPE and "float64" in skip.sentence()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (BATCH, 1, 1, 1), (1,)])
def test_a_mask_that_says_nothing_per_key_is_refused(shape):
    q, k, mask = torch.randn(BATCH, 6, 1, 10), torch.randn(BATCH, 6, 41, 10), torch.zeros(shape)
    if len(shape) == 1:
        mask = mask[None]

    def function(q, k, mask):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    sites, (skip,) = find_sites(normalize(capture(function, q, k, mask))[0].graph)
    assert not sites and skip.reason is Reason.MASK


def test_a_site_is_named_by_its_module():
    spelling = Spelling(index_copy_method)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([ToyDecoder(spelling)])

        def forward(self, *args):
            return self.layers[0](*args)

    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    (site,), _ = find_sites(normal_graph(Model().eval(), *inputs).graph)
    assert site.path == "layers.0"


# --- attention written out


def nothing_seen_by_first_inf(*sizes):
    seen = nothing_seen_by_first(*sizes)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def chain(scores, values):
    return torch.softmax(scores, dim=-1) @ values


def written_out(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ repeat_kv(values)


def divided_by_a_tensor(q, keys, values, mask):
    """A scale that is a tensor, as modules keep it in a buffer."""
    scale = torch.sqrt(torch.tensor(float(HEAD_DIM)))
    return chain(q @ repeat_kv(keys).transpose(2, 3) / scale + mask, repeat_kv(values))


def learnt_temperature(q, keys, values, mask):
    """Negative here, of shape (1,), under a soft cap, together with a number."""
    temperature = -torch.ones(1) * q.shape[-1] / 8
    scores = temperature * (q @ repeat_kv(keys).transpose(2, 3) * 0.3)
    return chain(torch.tanh(scores / 5.0) * 5.0 + mask, repeat_kv(values))


def scaled_query(q, keys, values, mask):
    return chain((q * 0.3) @ repeat_kv(keys).transpose(2, 3) + mask, repeat_kv(values))


def divided_then_masked(q, keys, values, mask):
    scores = (q @ repeat_kv(keys).transpose(2, 3)) / math.sqrt(HEAD_DIM)
    return chain(scores.masked_fill(~mask, -torch.inf), repeat_kv(values))


def where_masked(q, keys, values, mask):
    scores = (q @ repeat_kv(keys).mT) * 0.4
    low = torch.full([], torch.finfo(scores.dtype).min)
    return chain(torch.where(mask, scores, low), repeat_kv(values))


def soft_capped(q, keys, values, mask):
    scores = torch.tanh(q @ repeat_kv(keys).transpose(2, 3) * 0.3 / 5.0) * 5.0
    weights = F.softmax(scores + mask, dim=-1)
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, repeat_kv(values))


def stabilised(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return chain(scores, repeat_kv(values))


def mask_before_scale(q, keys, values, mask):
    return chain((q @ repeat_kv(keys).transpose(2, 3) + mask) / 2.0, repeat_kv(values))


def two_masks(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3
    bias = torch.linspace(-2, 2, scores.shape[-1])
    return chain((scores + bias).masked_fill(~mask, -torch.inf), repeat_kv(values))


def by_keyword(q, keys, values, mask):
    scores = torch.matmul(input=q, other=repeat_kv(keys).transpose(2, 3))
    scores = torch.add(input=torch.mul(scores, other=0.3), other=mask)
    return torch.matmul(F.softmax(input=scores, dim=-1), other=repeat_kv(values))


def in_place(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3)
    scores *= 0.3
    scores += mask
    return chain(scores, repeat_kv(values))


def folded(x):
    """Batch and heads in one dimension, as batched products want it."""
    return x.reshape(-1, *x.shape[2:])


def unfolded(x):
    return x.view(-1, HEADS, *x.shape[1:])


def batched_products(q, keys, values, mask):
    keys, values = folded(repeat_kv(keys)), folded(repeat_kv(values))
    scores = torch.bmm(folded(q * 0.3), keys.transpose(1, 2))
    scores = folded(unfolded(scores) + mask)
    weights = F.dropout(F.softmax(scores, dim=-1), p=0.1, training=False)
    return unfolded(torch.bmm(weights, values))


def bias_in_the_product(q, keys, values, mask):
    """The biases are the product's own summand, folded as it is; the last product is not folded."""
    keys = folded(repeat_kv(keys))
    bias = folded(mask.expand(q.shape[0], -1, -1, -1))
    scores = bias.baddbmm(folded(q), keys.mT, beta=0.5, alpha=0.3) / 0.5
    return chain(unfolded(scores), repeat_kv(values))


def nothing_in_the_product(q, keys, values, mask):
    keys, values = folded(repeat_kv(keys)), folded(repeat_kv(values))
    nothing = torch.zeros(q.shape[0] * HEADS, q.shape[2], keys.shape[1])
    scores = torch.baddbmm(nothing, batch1=folded(q) * 0.6, batch2=keys.transpose(1, 2), alpha=0.5)
    scores = F.softmax(unfolded(scores).masked_fill(~mask, -torch.inf), dim=-1)
    return unfolded(folded(scores).bmm(values))


def folded_masks(q, keys, values, mask):
    """Each (B * Hq, S, T), or (1, S, T), which says the same of all heads."""
    keys, values = folded(repeat_kv(keys)), folded(repeat_kv(values))
    scores = torch.bmm(folded(q), keys.transpose(1, 2)) * 0.3
    scores = scores + folded(mask.expand(q.shape[0], -1, -1, -1))
    scores = scores + torch.linspace(-2, 2, scores.shape[-1]).view(1, 1, -1)
    return unfolded(torch.bmm(F.softmax(scores, dim=-1), values))


def clamped(q, keys, values, mask):
    """Rows that see nothing get the mean of all values."""
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    low = torch.full([], torch.finfo(scores.dtype).min)
    return chain(torch.max(scores, low), repeat_kv(values))


def filled_and_clamped(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3
    scores = scores.masked_fill(~mask, -torch.inf) * 0.5
    return chain(scores.clamp(min=-3e38), repeat_kv(values))


def sinks_of_rows(q, keys, values, mask):
    """The sink logits are computed from the queries."""
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    sinks = q.sum(-1, keepdim=True)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return weights @ repeat_kv(values)


def zeroed_behind(q, keys, values, mask):
    """Rows that see nothing are zero."""
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3
    scores = torch.masked_fill(scores, mask == torch.tensor(False), torch.scalar_tensor(-torch.inf))
    weights = torch.softmax(scores, dim=-1)
    weights = torch.masked_fill(weights, mask == torch.tensor(False), torch.scalar_tensor(0))
    return weights @ repeat_kv(values)


def low_and_zeroed_behind(q, keys, values, mask):
    scores = (q @ repeat_kv(keys).transpose(2, 3)).masked_fill(~mask, -3e38)
    return torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0) @ repeat_kv(values)


def tokens_in_front(q, keys, values, mask):
    """(S, B * H, D), as Megatron has it, and scores (B * H, S, T)."""
    batch, heads, new, dims = q.shape
    q, keys, values = (
        x.permute(2, 0, 1, 3).reshape(-1, batch * heads, dims)
        for x in (q, repeat_kv(keys), repeat_kv(values))
    )
    empty = torch.empty(batch * heads, new, keys.shape[0])
    keys = keys.transpose(0, 1).transpose(1, 2)
    scores = torch.baddbmm(empty, q.transpose(0, 1), keys, beta=0.0, alpha=0.3)
    scores = scores.view(batch, heads, new, -1).masked_fill(~mask, -10000.0 * 1e30)
    weights = torch.softmax(scores, dim=-1).view(batch * heads, new, -1)
    return torch.bmm(weights, values.transpose(0, 1)).view(batch, heads, new, dims)


def filled(q, keys, values, mask):
    """Scores so large that -1e9 would not swallow them; one row sees nothing."""
    scores = (q * 200) @ repeat_kv(keys).transpose(2, 3)
    return chain(scores.masked_fill(mask == 0, -1e9) / math.sqrt(HEAD_DIM), repeat_kv(values))


def filled_twice(q, keys, values, mask):
    scores = (q * 200) @ repeat_kv(keys).transpose(2, 3)
    early = torch.arange(keys.shape[2]) < 2
    scores = torch.where(early & mask[1:], -2e9, scores) * 0.5
    return chain(torch.where(mask, scores, torch.tensor(-1e9)), repeat_kv(values))


def filled_and_hidden(q, keys, values, mask):
    """A row that sees nothing has equal weights for what the second fill hides."""
    scores = (q * 200) @ repeat_kv(keys).transpose(2, 3)
    scores = scores.masked_fill(torch.arange(keys.shape[2]) < 1, -torch.inf)
    return chain(scores.masked_fill(~mask & (mask.sum(-1, True) > 1), -1e8), repeat_kv(values))


def filled_and_zeroed_behind(q, keys, values, mask):
    scores = (q @ repeat_kv(keys).transpose(2, 3)).masked_fill(~mask, -1e9)
    return torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0) @ repeat_kv(values)


def einsum_products(q, keys, values, mask):
    scores = torch.einsum("bhqd,bhkd->bhqk", q * 0.3, repeat_kv(keys)) + mask
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, dim=-1), repeat_kv(values))


def einsum_tokens_first(q, keys, values, mask):
    """Tokens before heads, keys as the first factor, the factors in a list."""
    q, keys, values = (x.transpose(1, 2) for x in (q, repeat_kv(keys), repeat_kv(values)))
    weights = torch.softmax(torch.einsum("b k h d, b q h d -> b h q k", keys, q) + mask, dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", [weights, values]).transpose(1, 2)


def softmax_by_hand(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return (weights / weights.sum(dim=-1, keepdim=True)) @ repeat_kv(values)


def softmax_by_functions(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    weights = torch.exp(torch.sub(scores, scores.max(-1, True)[0].detach()))
    return torch.div(weights, torch.sum(weights, axis=-1, keepdim=True)) @ repeat_kv(values)


CHAINS = [
    (softmax_by_hand, causal_inf),
    (softmax_by_functions, alibi),
    (einsum_products, causal_inf),
    (einsum_tokens_first, causal_inf),
    (written_out, causal_inf),
    (written_out, alibi),
    (divided_by_a_tensor, causal_inf),
    (learnt_temperature, alibi),
    (scaled_query, causal_inf),
    (divided_then_masked, causal),
    (where_masked, causal),
    (soft_capped, causal_inf),
    (stabilised, causal_inf),
    (mask_before_scale, alibi),
    (two_masks, causal),
    (by_keyword, causal_inf),
    (in_place, causal_inf),
    (batched_products, causal_inf),
    (bias_in_the_product, alibi),
    (nothing_in_the_product, causal),
    (folded_masks, alibi),
    (clamped, nothing_seen_by_first_inf),
    (filled_and_clamped, nothing_seen_by_first),
    (sinks_of_rows, causal_inf),
    (sinks_of_rows, alibi),
    (sinks_of_rows, nothing_seen_by_first_inf),
    (zeroed_behind, nothing_seen_by_first),
    (low_and_zeroed_behind, nothing_seen_by_first),
    (tokens_in_front, causal),
    (filled, causal),
    (filled, nothing_seen_by_first),
    (filled_twice, nothing_seen_by_first),
    (filled_and_hidden, nothing_seen_by_first),
    (filled_and_zeroed_behind, nothing_seen_by_first),
]


@pytest.mark.parametrize("attend, mask", CHAINS, ids=lambda f: f.__name__)
def test_attention_written_out_is_the_same_core(attend, mask, use_engine):
    interpret(use_engine)
    spelling = Spelling(index_copy_method, attend=attend, mask=mask)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        for x in tokens(spelling, 3):
            out, expected = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=3e-5, equal_nan=True)
    assert stats()["sparse_steps"] == 3


# --- scores in other layouts than (B, Hq, S, T)


def hidden(scores, mask):
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def groups_of(x):
    """(B, Hq, S, _) as (B, Hkv, G, S, _); one for all heads stays so."""
    return x.unsqueeze(2) if x.shape[1] == 1 else x.unflatten(1, (KV_HEADS, -1))


def groups_apart(q, keys, values, mask):
    scores = groups_of(q) @ keys.unsqueeze(2).transpose(-1, -2) * 0.3
    return chain(hidden(scores, groups_of(mask)), values.unsqueeze(2)).flatten(1, 2)


def groups_expanded(q, keys, values, mask):
    keys, values = (x[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1) for x in (keys, values))
    scores = groups_of(q * 0.3) @ keys.permute(0, 1, 2, 4, 3)
    return chain(hidden(scores, groups_of(mask)), values).flatten(1, 2)


def groups_in_front(q, keys, values, mask):
    """(B, G, Hkv, S, T), and views that give keys and values one dimension more."""
    keys, values = (x.view(x.shape[0], 1, *x.shape[1:]) for x in (keys, values))
    scores = groups_of(q).transpose(1, 2) @ keys.mT * 0.3
    return (
        chain(hidden(scores, groups_of(mask).transpose(1, 2)), values).transpose(1, 2).flatten(1, 2)
    )


def groups_together_for_the_mask(q, keys, values, mask):
    scores = (groups_of(q) @ keys.unsqueeze(2).mT * 0.3).flatten(1, 2)
    weights = torch.softmax(hidden(scores, mask), dim=-1)
    return (groups_of(weights) @ values.unsqueeze(2)).flatten(1, 2)


def groups_by_einsum(q, keys, values, mask):
    scores = torch.einsum("bkgtd,bknd->bkgtn", groups_of(q), keys) * 0.3
    weights = torch.softmax(hidden(scores, groups_of(mask)), dim=-1)
    return torch.einsum("bkgtn,bknd->bkgtd", weights, values).flatten(1, 2)


def groups_by_einsum_tokens_first(q, keys, values, mask):
    q, keys, values = q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    q = q.unflatten(2, (KV_HEADS, -1))
    scores = torch.einsum("btkgd,bskd->bkgts", q, keys) * 0.3
    weights = torch.softmax(hidden(scores, groups_of(mask)), dim=-1)
    return torch.einsum("bkgts,bskd->btkgd", weights, values).flatten(2, 3).transpose(1, 2)


def groups_by_einsum_tokens_kept(q, keys, values, mask):
    """(B, S, Hkv, G, T), with the keys as the first factor and the values in a matmul."""
    q = q.transpose(1, 2).unflatten(2, (KV_HEADS, -1))
    scores = torch.einsum("bksd,btkgd->btkgs", keys, q) * 0.3
    weights = torch.softmax(hidden(scores, groups_of(mask).permute(0, 3, 1, 2, 4)), dim=-1)
    return (weights.permute(0, 2, 3, 1, 4) @ values[:, :, None]).flatten(1, 2)


def heads_behind_tokens(q, keys, values, mask):
    q, keys, values = (x.transpose(1, 2) for x in (q, repeat_kv(keys), repeat_kv(values)))
    scores = hidden(torch.einsum("bshd,bthd->bsht", q, keys) * 0.3, mask.transpose(1, 2))
    weights = torch.softmax(scores, dim=-1)
    return torch.einsum("bsht,bthd->bshd", weights, values).transpose(1, 2)


def heads_in_front_of_the_batch(q, keys, values, mask):
    """Turned behind the product, masked and shifted there, and folded in that order."""
    scores = (q @ repeat_kv(keys).mT * 0.3).transpose(0, 1)
    scores = hidden(scores, mask.transpose(0, 1))
    scores = (scores - scores.amax(-1, keepdim=True)).flatten(0, 1)
    weights = torch.softmax(scores, dim=-1).unflatten(0, (HEADS, -1))
    return weights.transpose(0, 1) @ repeat_kv(values)


def tokens_and_keys_in_front(q, keys, values, mask):
    """(S, T, B, Hq), the softmax over its second dimension."""
    q, keys, values = (x.permute(2, 0, 1, 3) for x in (q, repeat_kv(keys), repeat_kv(values)))
    scores = torch.einsum("ibnd,jbnd->ijbn", q, keys) * 0.3
    weights = torch.softmax(hidden(scores, mask.permute(2, 3, 0, 1)), dim=1)
    return torch.einsum("ijbn,jbnd->bnid", weights, values)


def factors_with_an_ellipsis(q, keys, values, mask):
    q, keys, values = (x.transpose(1, 2) for x in (q, repeat_kv(keys), repeat_kv(values)))
    scores = hidden(torch.einsum("...qhd, ...khd -> ...hqk", q, keys) * 0.3, mask)
    scores = scores - scores.max(-1, keepdim=True).values.detach()
    return torch.einsum("...hqk,...khd->...hqd", torch.softmax(scores, dim=-1), values)


def one_mask_for_all_in_another_rank(q, keys, values, mask):
    """Scores (B, 1, Hq, S, T) between the products."""
    scores = (q @ repeat_kv(keys).mT * 0.3).unsqueeze(1)
    weights = torch.softmax(hidden(scores, mask.unsqueeze(1)), dim=-1)
    return weights.squeeze(1) @ repeat_kv(values)


LAYOUTS = [
    groups_apart, groups_expanded, groups_in_front, groups_together_for_the_mask, groups_by_einsum,
    groups_by_einsum_tokens_first, groups_by_einsum_tokens_kept, heads_behind_tokens,
    heads_in_front_of_the_batch, one_mask_for_all_in_another_rank, tokens_and_keys_in_front,
    factors_with_an_ellipsis,
]  # fmt: skip


def equals_eager(spelling, steps=3, **options):
    """Compiled decoding with the whole budget against eager; the steps that ran sparse."""
    module = ToyDecoder(spelling).eval()
    options = {"min_context": 0, "top_k": 1.0, **options}
    fast = torch.compile(module, backend="loki", options=options)
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        for x in tokens(spelling, steps):
            out, expected = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=3e-5, equal_nan=True)
    return stats()["sparse_steps"]


@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("mask", [causal, causal_inf, alibi, left_padded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("attend", LAYOUTS, ids=lambda f: f.__name__)
def test_scores_may_be_laid_out_in_any_way(attend, mask, new_tokens, interpreted):
    spelling = Spelling(index_copy_method, attend=attend, mask=mask, new_tokens=new_tokens)
    assert equals_eager(spelling, 2) == 2
    (site,) = reports()[-1].sites
    assert (site.query_heads, site.kv_heads) == (HEADS, KV_HEADS)


@pytest.mark.parametrize("attend", LAYOUTS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_layouts_are_told_by_symbols_too(attend, interpreted):
    """dynamic=True: batch and slots are symbols, and one graph serves all."""
    spelling = Spelling(index_copy_method, attend=attend, mask=left_padded)
    module = ToyDecoder(spelling).eval()
    options = {"min_context": 0, "top_k": 1.0}
    fast = torch.compile(module, backend="loki", dynamic=True, options=options)
    for batch in (2, 3):
        here = Conversation.start(spelling, batch=batch)
        there = here.fork()
        for x in tokens(spelling, 2, batch=batch):
            out, expected = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=3e-5)
    # Before torch 2.13 the number of KV heads is a symbol as well.
    if TORCH >= (2, 13):
        assert stats()["sparse_steps"] == 4


def sinks_of_tokens(q, keys, values, mask):
    """As many tokens as heads, each with a sink logit of its own."""
    scores = hidden(q @ repeat_kv(keys).mT * 0.3, mask)
    sinks = torch.linspace(-2, 2, HEADS).reshape(1, 1, -1, 1).expand(q.shape[0], HEADS, -1, 1)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return weights @ repeat_kv(values)


def test_sinks_of_tokens_are_not_taken_for_those_of_heads(interpreted):
    spelling = Spelling(index_copy_method, attend=sinks_of_tokens, new_tokens=HEADS, mask=causal)
    assert equals_eager(spelling, 2) == 2


def one_head_by_einsum(q, keys, values, mask):
    weights = torch.einsum("bhid,bjd->bhij", q, keys[:, 0]) * 0.3
    weights = torch.softmax(hidden(weights, mask), dim=-1)
    return torch.einsum("bhij,bjd->bhid", weights, values[:, 0])


def one_head_by_einsum_and_matmul(q, keys, values, mask):
    weights = torch.softmax(hidden(torch.einsum("bhid,bjd->bhij", q, keys[:, 0]), mask), dim=-1)
    return weights @ values[:, 0][:, None]


def one_head_behind_tokens(q, keys, values, mask):
    weights = torch.einsum("bihd,bjd->bihj", q.transpose(1, 2), keys[:, 0]) * 0.3
    weights = torch.softmax(hidden(weights, mask.transpose(1, 2)), dim=-1)
    return torch.einsum("bihj,bjd->bhid", weights, values[:, 0])


@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize(
    "attend", [one_head_by_einsum, one_head_by_einsum_and_matmul, one_head_behind_tokens]
)
def test_one_kv_head_needs_no_dimension_in_an_einsum(attend, new_tokens, interpreted):
    spelling = Spelling(index_copy_method, attend=attend, kv_heads=1, new_tokens=new_tokens)
    assert equals_eager(spelling.but(mask=causal), 2) == 2
    (site,) = reports()[-1].sites
    assert (site.query_heads, site.kv_heads) == (HEADS, 1)


@pytest.mark.parametrize("mask", [causal, alibi])
@pytest.mark.parametrize("kv_heads", [1, KV_HEADS])
def test_one_new_token_needs_no_dimension_in_an_einsum(mask, kv_heads, interpreted):
    def attend(q, keys, values, mask):
        q = q.squeeze(2).unflatten(1, (kv_heads, -1))
        mask = mask if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1)).squeeze(3)
        scores = hidden(torch.einsum("bkgd,bktd->bkgt", q, keys) * 0.3, mask)
        weights = torch.softmax(scores, dim=-1)
        return torch.einsum("bkgt,bktd->bkgd", weights, values).flatten(1, 2).unsqueeze(2)

    spelling = Spelling(index_copy_method, attend=attend, mask=mask, kv_heads=kv_heads)
    assert equals_eager(spelling) == 3


def tiles_by_einsum(q, keys, values, mask):
    """What follows the KV heads is new tokens here: the mask says so where there are several."""
    scores = torch.einsum("bgktd,bksd->bgkts", q.unflatten(1, (-1, KV_HEADS)), keys) * 0.3
    weights = torch.softmax(hidden(scores, mask.unsqueeze(1)), dim=-1)
    return torch.einsum("bgkts,bksd->bgktd", weights, values).flatten(1, 2)


@pytest.mark.parametrize("new_tokens, sparse", [(1, 2), (3, 0)])
def test_tokens_are_not_taken_for_a_group_of_heads(new_tokens, sparse, interpreted):
    spelling = Spelling(index_copy_method, attend=tiles_by_einsum, new_tokens=new_tokens)
    assert equals_eager(spelling.but(mask=causal), 2) == sparse


def test_a_small_budget_chooses_alike_in_every_layout(interpreted, monkeypatch):
    """With as little as this, a mask or a head in the wrong place would choose other keys."""
    outs = []
    for attend in (written_out_causal, groups_apart, groups_by_einsum_tokens_kept, groups_in_front):
        torch._dynamo.reset()
        torch.manual_seed(3)
        spelling = Spelling(index_copy_method, attend=attend, mask=causal)
        options = {"min_context": 0, "top_k": 6, "sink": 1, "recent": 1, "rank": HEAD_DIM}
        fast = torch.compile(ToyDecoder(spelling).eval(), backend="loki", options=options)
        talk = Conversation.start(spelling)
        with torch.no_grad():
            outs.append([talk.step(fast, x) for x in tokens(spelling, 3)])
    assert stats()["sparse_steps"] == 12
    for other in outs[1:]:
        for a, b in zip(outs[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-5)


def written_out_causal(q, keys, values, mask):
    return chain(hidden(q @ repeat_kv(keys).mT * 0.3, mask), repeat_kv(values))


def other_keys_for_each_of_a_group(q, keys, values, mask):
    keys = torch.stack([keys * (n + 1) for n in range(HEADS // KV_HEADS)], 2)
    return chain(groups_of(q) @ keys.mT + groups_of(mask), values.unsqueeze(2)).flatten(1, 2)


def values_with_a_real_group(q, keys, values, mask):
    values = torch.stack([values.roll(n, 2) for n in range(HEADS // KV_HEADS)], 2)
    scores = groups_of(q) @ keys.unsqueeze(2).mT
    return chain(scores + groups_of(mask), values).flatten(1, 2)


def shifted_along_queries(q, keys, values, mask):
    """What is subtracted differs between keys."""
    scores = (q @ repeat_kv(keys).mT).transpose(2, 3)
    scores = (scores - scores.amax(-1, keepdim=True)).transpose(2, 3)
    return chain(scores + mask, repeat_kv(values))


def over_groups(q, keys, values, mask):
    weights = torch.einsum("bkgtd,bknd->bkgtn", groups_of(q), keys).softmax(2)
    return torch.einsum("bkgtn,bknd->bkgtd", weights, values).flatten(1, 2)


def over_queries(q, keys, values, mask):
    weights = (q @ repeat_kv(keys).mT).transpose(2, 3).softmax(-1).transpose(2, 3)
    return weights @ repeat_kv(values) + mask[..., :1].clamp(-1, 1)


def zeroed_in_another_layout(q, keys, values, mask):
    """As many tokens as heads: what hid keys of a token hides those of a head."""
    hide = (mask < 0)[0, 0]
    weights = (q @ repeat_kv(keys).mT).masked_fill(hide, -torch.inf).softmax(-1).transpose(1, 2)
    return weights.masked_fill(hide, 0.0).transpose(1, 2) @ repeat_kv(values)


def scores_mixed_by_a_view(q, keys, values, mask):
    """The view trades batch and heads without turning them."""
    scores = q @ repeat_kv(keys).mT + mask
    mixed = scores.view(HEADS, -1, *scores.shape[2:])
    return chain(mixed.transpose(0, 1), repeat_kv(values))


def rows_of_weights_summed(q, keys, values, mask):
    weights = torch.softmax(q @ repeat_kv(keys).mT + mask, dim=-1)
    return torch.einsum("bhst,bhtd->bsd", weights, repeat_kv(values)).unsqueeze(1).expand(q.shape)


def by_hand_along_heads(q, keys, values, mask):
    scores = q @ repeat_kv(keys).mT + mask.clamp(min=-9)
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    return (weights / weights.sum(1, keepdim=True)) @ repeat_kv(values)


def by_hand_unshifted(q, keys, values, mask):
    weights = (q @ repeat_kv(keys).mT * 0.3 + mask).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ repeat_kv(values)


def by_hand_and_one(q, keys, values, mask):
    """One more in the denominator: a sink."""
    scores = q @ repeat_kv(keys).mT * 0.3 + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / (weights.sum(-1, keepdim=True) + 1)) @ repeat_kv(values)


def by_hand_of_others(q, keys, values, mask):
    scores = q @ repeat_kv(keys).mT * 0.3 + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / (weights * weights).sum(-1, keepdim=True)) @ repeat_kv(values)


def by_hand_edited(q, keys, values, mask):
    scores = q @ repeat_kv(keys).mT * 0.3 + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights[..., 2] = 0.5
    return (weights / weights.sum(-1, keepdim=True)) @ repeat_kv(values)


def keys_times_a_negative_number(q, keys, values, mask):
    return chain(q @ (repeat_kv(keys) * -0.3).mT + mask, repeat_kv(values))


def keys_times_numbers(q, keys, values, mask):
    keys = repeat_kv(keys) * torch.linspace(0.1, 0.4, HEAD_DIM)
    return chain(q @ keys.mT + mask, repeat_kv(values))


@torch.no_grad()
def test_queries_are_scaled_by_a_tensor_of_another_dtype_in_the_wider_of_both(use_engine):
    def widened(q, keys, values, mask):
        scores = q.float() @ repeat_kv(keys).float().mT / torch.sqrt(torch.tensor(7.0)) + mask
        return torch.softmax(scores, dim=-1).to(q.dtype) @ repeat_kv(values)

    compiled = interpret(use_engine)
    spelling = Spelling(index_copy_method, attend=widened, mask=causal_inf)
    dtype, x = torch.bfloat16, tokens(spelling, 1)[0]
    for half in (False, True):
        module = ToyDecoder(spelling).eval().to(dtype if half else torch.float32)
        here = Conversation.start(spelling, dtype=dtype if half else None)
        there = here.fork()
        torch._dynamo.reset()
        compiled.graphs.clear()
        fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
        out = here.step(fast, x.to(dtype) if half else x)
        assert compiled.calls("loki.") == 2, "select and attend"
        (attend,) = [n for gm in compiled.graphs for n in gm.graph.nodes if "attend" in n.name]
        assert attend.args[0].meta["example_value"].dtype == torch.float32, "a rounded query"
        expected = there.step(module, x.to(dtype) if half else x)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.05 if half else 1e-5)


def test_attention_that_a_graph_break_cuts_is_reported(use_engine):
    def broken(q, keys, values, mask):
        scores = q @ repeat_kv(keys).transpose(2, 3)
        torch._dynamo.graph_break()
        return torch.softmax(scores + mask, dim=-1) @ repeat_kv(values)

    interpret(use_engine)
    spelling = Spelling(index_copy_method, attend=broken, mask=causal_inf)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        (x,) = tokens(spelling, 1)
        torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=0)
    halves = [site for report in reports() for site in report.sites]
    assert [site.outcome for site in halves] == ["dense"] * 2
    lies = "a graph break lies within attention: its scores"
    assert [
        site.reason.startswith(f"{lies} {what}")
        for site, what in zip(halves, ("leave this graph", "come from another graph"), strict=True)
    ] == [True, True]


def test_scores_that_leave_a_graph_are_reported_where_the_rest_is_never_compiled():
    def half(q, keys, values):
        return (q @ keys.transpose(2, 3)) * 0.3, values

    q, keys = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    _, (left,) = find_sites(normal_graph(half, q, keys, keys).graph)
    assert left.sentence().startswith("a graph break lies within attention: its scores leave")
    turned = normal_graph(lambda q, k: q @ k.permute(0, 2, 3, 1), q, torch.randn(1, 5, 2, 8))
    assert len(find_sites(turned.graph)[1]) == 1
    weights = normal_graph(lambda q, k: (q @ k.mT).softmax(-1).to(torch.float16), q, keys)
    assert len(find_sites(weights.graph)[1]) == 1


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,  # a weight of each head
        lambda x, w: torch.sigmoid(x @ w.transpose(2, 3)),  # a gate
        lambda x, w: (x @ w.transpose(2, 3)).sum(-1),
        lambda x, w: x @ w.transpose(1, 2),
    ],
)
def test_other_products_that_leave_a_graph_are_no_attention(product):
    assert find_sites(normal_graph(product, *torch.randn(2, 1, 4, 4, 4)).graph) == ([], [])


def test_a_router_behind_a_graph_break_is_no_attention():
    graph = normal_graph(
        lambda x, w: torch.softmax(x, -1) @ w, torch.randn(4, 8), torch.randn(8, 8)
    )
    assert find_sites(graph.graph) == ([], [])


def max_over_heads(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3
    return chain(scores - scores.max(dim=1, keepdim=True).values + mask, repeat_kv(values))


def floored(q, keys, values, mask):
    scores = torch.div(q @ repeat_kv(keys).transpose(2, 3), 0.5, rounding_mode="floor")
    return chain(scores + mask, repeat_kv(values))


def scaled_mask(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3)
    return chain(torch.add(scores, mask, alpha=3), repeat_kv(values))


def scale_of_each_key(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3)
    return chain(scores / torch.linspace(1, 2, scores.shape[-1]) + mask, repeat_kv(values))


def masked_then_divided_by_a_tensor(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    return chain(scores / torch.sqrt(torch.tensor(float(HEAD_DIM))), repeat_kv(values))


def multiplied_by_scores(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3)
    return chain(scores * scores + mask, repeat_kv(values))


def scale_edited_between_the_products(q, keys, values, mask):
    scale = torch.full((1,), 3.0)
    scores = q @ repeat_kv(keys).transpose(2, 3) / scale + mask
    scale.fill_(0.5)
    return chain(scores, repeat_kv(values)) * scale


def negative_scale(q, keys, values, mask):
    return chain(-0.3 * (q @ repeat_kv(keys).transpose(2, 3)) + mask, repeat_kv(values))


def masked_then_capped(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    return chain(torch.tanh(scores / 5.0) * 5.0, repeat_kv(values))


def weights_read_twice(q, keys, values, mask):
    weights = F.softmax(q @ repeat_kv(keys).transpose(2, 3) + mask, dim=-1)
    return weights @ repeat_kv(values) + weights.mean()


def over_heads(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    return torch.softmax(scores, dim=1) @ repeat_kv(values)


def weights_scaled(q, keys, values, mask):
    weights = F.softmax(q @ repeat_kv(keys).transpose(2, 3) + mask, dim=-1)
    return (weights * 2) @ repeat_kv(values)


def not_very_low(q, keys, values, mask):
    """Hidden scores of -5 still have weight."""
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3
    return chain(scores.masked_fill(~mask.isfinite(), -5.0), repeat_kv(values))


def not_low_enough(q, keys, values, mask):
    """A logit of -10000 has been seen; of a row that sees nothing it is all there is."""
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3
    return chain(scores.masked_fill(~mask.isfinite(), -10000.0), repeat_kv(values))


def low_before_a_small_scale(q, keys, values, mask):
    scores = (q @ repeat_kv(keys).transpose(2, 3)).masked_fill(~mask.isfinite(), -1e9)
    return chain(scores * 1e-8, repeat_kv(values))


def two_fills(q, keys, values, mask):
    """A row that sees nothing attends to what the first fill hides alone."""
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3
    scores = scores.masked_fill(torch.arange(keys.shape[2]) < 2, -1e9)
    hidden = ~mask.isfinite() & (torch.arange(keys.shape[2]) >= 2)
    return chain(scores.masked_fill(hidden, -1e12), repeat_kv(values))


def filled_and_added(q, keys, values, mask):
    """What is added to a fill orders the keys of a row that sees nothing."""
    scores = (q @ repeat_kv(keys).transpose(2, 3)).masked_fill(~mask.isfinite(), -1e9)
    return chain(scores - torch.arange(keys.shape[2]) * 100.0, repeat_kv(values))


def keys_as_router(q, keys, values, mask):
    """A softmax over a product, but nothing is mixed by it."""
    weights = F.softmax(q @ repeat_kv(keys).transpose(2, 3) + mask, dim=-1)
    return q * weights.sum(-1, keepdim=True)


def other_keys_zeroed_behind(q, keys, values, mask):
    """The weights of keys that the softmax saw: the others are not scaled up."""
    hidden = mask < 0
    scores = (q @ repeat_kv(keys).transpose(2, 3)).masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden.roll(1, -1), 0.0)
    return weights @ repeat_kv(values)


def numbers_added(q, keys, values, mask):
    """A boolean tensor that is added counts as 0 and 1."""
    return chain(q @ repeat_kv(keys).transpose(2, 3) + (mask < 0), repeat_kv(values))


def sinks_scaled_with_the_scores(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    sinks = q.sum(-1, keepdim=True)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1) * 0.3, dim=-1)[..., :-1]
    return weights @ repeat_kv(values)


def sinks_kept(q, keys, values, mask):
    """The column in front is cut off instead of the sink."""
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    weights = torch.softmax(torch.cat([scores, q.sum(-1, keepdim=True)], dim=-1), dim=-1)
    return weights[..., 1:] @ repeat_kv(values)


def einsum_of_three(q, keys, values, mask):
    """Three factors: no product of two matrices."""
    scores = torch.einsum("bhqd,bhkd,h->bhqk", q, repeat_kv(keys), torch.arange(1.0, HEADS + 1))
    return chain(scores + mask, repeat_kv(values))


def clamped_high(q, keys, values, mask):
    """A bound that scores reach."""
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    return chain(scores.clamp(min=-2.0), repeat_kv(values))


def clamped_above(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    return chain(scores.clamp(-3e38, 0.5), repeat_kv(values))


def heads_mixed_by_views(q, keys, values, mask):
    """The scores are unfolded into other batches and heads than they were folded from."""
    keys, values = folded(repeat_kv(keys)), folded(repeat_kv(values))
    scores = torch.bmm(folded(q), keys.transpose(1, 2))
    apart = scores.view(HEADS, -1, *scores.shape[1:]) + mask
    return unfolded(torch.bmm(torch.softmax(folded(apart), dim=-1), values))


def products_of_features(q, keys, values, mask):
    """Folded, but over head_dim's first dimension: keys and tokens trade places."""
    keys = repeat_kv(keys).reshape(-1, HEAD_DIM, keys.shape[2])
    scores = unfolded(torch.bmm(folded(q), keys)) + mask
    return chain(scores, repeat_kv(values))


def keys_edited_between_the_products(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    keys[:, :, 3] = 0.5
    return chain(scores, repeat_kv(values))


def mask_edited_between_the_products(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) + mask
    mask[..., 3] = -torch.inf
    return chain(scores, repeat_kv(values))


@pytest.mark.parametrize(
    "attend",
    [
        other_keys_for_each_of_a_group, values_with_a_real_group, shifted_along_queries,
        over_groups, over_queries, zeroed_in_another_layout, scores_mixed_by_a_view,
        rows_of_weights_summed, by_hand_along_heads, by_hand_unshifted, by_hand_and_one,
        by_hand_of_others, by_hand_edited, keys_times_a_negative_number, keys_times_numbers,
        numbers_added, other_keys_zeroed_behind, sinks_scaled_with_the_scores, sinks_kept,
        clamped_high, clamped_above, einsum_of_three, heads_mixed_by_views,
        products_of_features,
        keys_edited_between_the_products, mask_edited_between_the_products,
        scale_edited_between_the_products, scale_of_each_key, masked_then_divided_by_a_tensor,
        multiplied_by_scores,
        max_over_heads, floored, scaled_mask, negative_scale, masked_then_capped,
        weights_read_twice, over_heads, weights_scaled, not_very_low, not_low_enough,
        low_before_a_small_scale, two_fills, filled_and_added, keys_as_router,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_only_looks_like_attention_written_out_is_left_alone(attend, use_engine):
    compiled = interpret(use_engine)
    new_tokens = HEADS if attend is zeroed_in_another_layout else 1
    spelling = Spelling(index_copy_method, attend=attend, mask=causal_inf, new_tokens=new_tokens)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        for x in tokens(spelling, 2):
            out, expected = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert compiled.calls("loki.") == 0


# --- rows that see nothing


def one_sink_per_head(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask
    sinks = torch.linspace(-1, 1, HEADS).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return weights @ repeat_kv(values)


def cleaned_behind(q, keys, values, mask):
    return torch.nan_to_num(divided_then_masked(q, keys, values, mask))


def replaced_behind(q, keys, values, mask):
    out = written_out(q, keys, values, mask)
    return torch.where((mask > -torch.inf).any(-1, keepdim=True), out, 0.0)


def hidden_twice_then_clamped(q, keys, values, mask):
    scores = q @ repeat_kv(keys).transpose(2, 3) * 0.3 + mask + mask
    return chain(scores.clamp(min=torch.finfo(scores.dtype).min), repeat_kv(values))


def clamped_then_hidden(q, keys, values, mask):
    scores = (q @ repeat_kv(keys).transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return chain(scores.clamp(min=-3e38) + hidden, repeat_kv(values))


def tiles(q, keys, values, mask):
    """Query head h reads KV head h % Hkv, and has a mask of its own."""
    keys, values = (x.repeat(1, HEADS // KV_HEADS, 1, 1) for x in (keys, values))
    return chain(q @ keys.transpose(2, 3) * 0.3 + mask, values)


def nothing_seen_by_some_heads(*sizes):
    """Additive (B,Hq,S,T): one head of the first row and another of the second see no key."""
    mask = causal_inf(*sizes).expand(sizes[0], HEADS, -1, -1).clone()
    mask[0, 1] = mask[1, HEADS - 1] = -torch.inf
    return mask


def nothing_seen_by_first_low(*sizes):
    seen = nothing_seen_by_first(*sizes)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


BLIND = [
    (written_out, nothing_seen_by_first_inf, "nan"),
    (written_out, nothing_seen_by_some_heads, "nan"),
    (tiles, nothing_seen_by_some_heads, "nan"),
    (divided_then_masked, nothing_seen_by_first, "nan"),
    (stabilised, nothing_seen_by_first_inf, "nan"),
    (two_masks, nothing_seen_by_first, "nan"),
    (nothing_in_the_product, nothing_seen_by_first, "nan"),
    (clamped_then_hidden, nothing_seen_by_first, "nan"),
    (written_out, nothing_seen_by_first_low, "mean"),
    (where_masked, nothing_seen_by_first, "mean"),
    (clamped, nothing_seen_by_first_inf, "mean"),
    (hidden_twice_then_clamped, nothing_seen_by_first_inf, "mean"),
    (gqa_repeat_kv, nothing_seen_by_first, "zero"),
    (gqa_repeat_kv, nothing_seen_by_first_inf, "zero"),
    (one_sink_per_head, nothing_seen_by_first_inf, "zero"),
    (sinks_of_rows, nothing_seen_by_first_inf, "zero"),
    (zeroed_behind, nothing_seen_by_first, "zero"),
    (low_and_zeroed_behind, nothing_seen_by_first, "zero"),
    (cleaned_behind, nothing_seen_by_first, "zero"),
    (replaced_behind, nothing_seen_by_first_inf, "zero"),
]


WAYS = pytest.mark.parametrize("attend, mask, kind", BLIND, ids=lambda f: getattr(f, "__name__", f))


@WAYS
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_a_row_that_sees_nothing_is_what_eager_makes_of_it(
    attend, mask, kind, new_tokens, use_engine
):
    """NaN of a softmax over nothing but -inf, else the mean of all values or zero."""
    interpret(use_engine)
    spelling = Spelling(index_copy_method, attend=attend, mask=mask, new_tokens=new_tokens)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        for x in tokens(spelling, 3):
            out, expected = here.step(fast, x), there.step(module, x)
            assert expected[0].isnan().all() == (kind == "nan")
            assert torch.allclose(expected[0], x[0] + module.out.bias) == (kind == "zero")
            torch.testing.assert_close(out, expected, rtol=0, atol=3e-5, equal_nan=True)
    assert stats()["sparse_steps"] == 3


@WAYS
def test_a_row_that_sees_nothing_stays_so_when_dense_steps_become_sparse(
    attend, mask, kind, use_engine
):
    interpret(use_engine)
    spelling = Spelling(index_copy_method, attend=attend, mask=mask)
    module = ToyDecoder(spelling).eval()
    options = {"min_context": 20, "top_k": 6, "sink": 1, "recent": 1}
    fast = torch.compile(module, backend="loki", options=options)
    here = Conversation.start(spelling)
    there = here.fork()
    with torch.no_grad():
        for x in tokens(spelling, 4):
            out, expected = here.step(fast, x), there.step(module, x)
            assert torch.equal(out.isnan(), expected.isnan())
            if kind == "zero":
                torch.testing.assert_close(out[0], expected[0])
    assert (stats()["dense_steps"], stats()["sparse_steps"]) == (2, 2)


def test_a_fill_that_half_precision_cannot_hold_hides_no_row_for_good(use_engine):
    """Scores in fp32 are filled with its lowest number, which is -inf in bf16."""

    def widened(q, keys, values, mask):
        scores = (q @ repeat_kv(keys).mT).float().masked_fill(~mask, torch.finfo(torch.float32).min)
        return torch.softmax(scores, dim=-1).to(q.dtype) @ repeat_kv(values)

    interpret(use_engine)
    spelling = Spelling(index_copy_method, attend=widened, mask=nothing_seen_by_first)
    module = ToyDecoder(spelling).eval().bfloat16()
    fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
    here = Conversation.start(spelling, dtype=torch.bfloat16)
    there = here.fork()
    with torch.no_grad():
        x = tokens(spelling, 1)[0].bfloat16()
        out, expected = here.step(fast, x), there.step(module, x)
        assert not torch.allclose(expected[0], x[0] + module.out.bias, rtol=0.1, atol=0.1)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.1)
    assert stats()["sparse_steps"] == 1


@pytest.mark.parametrize(
    "attend, mask, marked",
    [
        (written_out, causal_inf, True),
        (written_out, no_mask, False),
        (gqa_repeat_kv, causal_inf, False),
        (one_sink_per_head, causal_inf, False),
        (zeroed_behind, causal, False),
    ],
    ids=lambda f: getattr(f, "__name__", f),
)
def test_rows_are_looked_over_only_where_a_mask_could_make_nan(attend, mask, marked, use_engine):
    def or_none(q, keys, values, given):
        return attend(q, keys, values, 0.0 if given is None else given)

    made = interpret(use_engine)
    way = or_none if attend is written_out else attend
    spelling = Spelling(index_copy_method, attend=way, mask=mask, slots=FILLED + 1)
    fast = torch.compile(ToyDecoder(spelling).eval(), backend="loki", options=EVERYTHING)
    with torch.no_grad():
        Conversation.start(spelling).step(fast, tokens(spelling, 1)[0])
    sparse = [gm.graph for gm in made.graphs if count_calls(gm.graph, "loki.attend")]
    (graph,) = sparse
    fills = [node for node in graph.nodes if node.target is torch.masked_fill]
    assert len(fills) == marked


@pytest.mark.parametrize("dim, tiles", [(2, False), (-3, False), (1, True), (-4, True)])
def test_heads_are_repeated_by_unsqueeze_as_well(dim, tiles):
    def wide(x):
        b, h, t, d = x.shape
        sizes = (b, 2, h, t, d) if tiles else (b, h, 2, t, d)
        return x.unsqueeze(dim).expand(sizes).reshape(b, 2 * h, t, d)

    (site,), skipped = sites_of(
        lambda q, keys, values, mask: F.scaled_dot_product_attention(
            q, wide(keys), wide(values), attn_mask=mask
        )
    )
    assert not skipped and (site.group, site.interleaved) == (2, tiles)
    assert site.key.base.op == site.value.base.op == "placeholder"


def test_values_are_looked_behind_as_far_as_keys_are_repeated():
    """One value head for all, made in two steps: the first makes as many as there are keys."""

    def attend(q, keys, values, mask):
        values = values[:, :1].repeat_interleave(3, 1).repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(q, keys.repeat_interleave(2, 1), values, mask)

    (site,), skipped = sites_of(attend)
    assert not skipped and site.group == site.value.group == 2
    assert site.key.base.op == "placeholder"
    assert site.value.base.meta["example_value"].shape[1] == KV_HEADS


# --- products that only look like those of attention


def odd_products():
    """Functions of q (2,6,3,8), keys and values (2,6,9,8) that no core is made of."""

    def two_token_letters(q, k, v):
        scores = torch.einsum("bhsd,bhtud->bhstu", q, k.unflatten(2, (3, 3)))
        return torch.einsum("bhstu,bhtud->bhsd", scores.softmax(-1), v.unflatten(2, (3, 3)))

    def three_rows(q, k, v):
        scores = torch.einsum("bgxsd,btd->bgxst", q.unflatten(1, (3, 2)), k[:, 0])
        return torch.einsum("bgxst,btd->bgxsd", scores.softmax(-1), v[:, 0])

    def values_by_rows(q, k, v):
        weights = torch.einsum("bhsd,bhtd->bhst", q, k).softmax(-1)
        return torch.einsum("bhst,bhsd->bhtd", weights, v[:, :, :3])

    def values_of_two_dims(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        return torch.einsum("bhst,bhtde->bhsde", weights, v.unflatten(3, (4, 2)))

    def values_of_other_heads(q, k, v):
        return torch.einsum("bhst,bgtd->bhgsd", (q @ k.mT).softmax(-1), v)

    def keys_of_each_group(q, k, v):
        q, k, v = (x.unflatten(1, (3, 2)) for x in (q, k, v))
        return (q @ k.mT).softmax(-1) @ v

    def never_folded(q, k, v):
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)

    def heads_and_tokens_joined(q, k, v):
        weights = (q @ k.mT).flatten(1, 2).softmax(-1)
        return weights @ v[:, 0]

    def tokens_and_keys_mixed(q, k, v):
        scores = (q @ k.mT).flatten(2, 3).unflatten(2, (9, 3))
        return scores.softmax(-1) @ v[:, :, :3]

    def over_rows_and_keys(q, k, v):
        return (q @ k.mT).flatten(2).softmax(-1).unflatten(2, (3, 9)) @ v

    def which_letter_is_the_group(q, k, v):
        scores = torch.einsum("bxyd,btd->bxyt", q, k[:, 0])
        return torch.einsum("bxyt,btd->bxyd", scores.softmax(-1), v[:, 0])

    def queries_of_two_dims(q, k, v):
        scores = torch.einsum("bhsde,bhtde->bhst", *(x.unflatten(3, (4, 2)) for x in (q, k)))
        return scores.softmax(-1) @ v

    return [function for function in locals().values() if callable(function)]


@pytest.mark.parametrize("function", odd_products(), ids=lambda f: f.__name__)
def test_products_that_are_not_those_of_attention_make_no_core(function):
    graph = normal_graph(function, *(torch.randn(2, 6, n, 8) for n in (3, 9, 9))).graph
    sites, skipped = find_sites(graph)
    assert not sites
    assert {skip.reason for skip in skipped} <= {Reason.LAYOUT, Reason.SOFTMAX, Reason.GROUPS}
