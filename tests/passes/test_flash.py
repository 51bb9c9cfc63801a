"""FlashAttention-2's op, which runs on GPUs alone: here under its name, by PyTorch's attention."""

import pytest
import torch
from loki_compile.passes.attention import Reason
from loki_compile.passes.flash import OP
from loki_compile.passes.sites import find_sites
from torch.nn.functional import scaled_dot_product_attention as sdpa
from toy_capture import normal_graph
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import no_mask
from toy_writes import cat_bhtd, cat_bthd

from loki_compile import reports, stats

pytestmark = pytest.mark.covers
LIBRARY = torch.library.Library("flash_attn", "FRAGMENT")
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, "
    "bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
)


def forward(q, k, v, dropout, scale, causal, left, right, softcap, alibi, return_softmax):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    new, seen = q.shape[2], k.shape[2]
    mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new) if causal else None
    if softcap:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out = (softcap * torch.tanh(q @ k.mT * scale / softcap)).softmax(-1) @ v
    else:
        out = sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    empty = q.new_empty(0)
    return out.transpose(1, 2).contiguous(), q.new_zeros(q.shape[:3]), empty, empty.clone()


def fake(q, k, v, *others):
    empty = q.new_empty(0)
    return torch.empty_like(q), q.new_empty(q.transpose(1, 2).shape[:3]), empty, empty.clone()


if not hasattr(torch.ops.flash_attn, "_flash_attn_forward"):
    LIBRARY.define("_flash_attn_forward" + SCHEMA)
    LIBRARY.impl("_flash_attn_forward", forward, "CPU")
    torch.library.register_fake(OP, fake, lib=LIBRARY)


class FlashAttnFunc(torch.autograd.Function):
    """As the library calls its op."""

    @staticmethod
    def forward(ctx, q, k, v, causal, softcap):
        out, _, _, _ = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, q.shape[-1] ** -0.5, causal=causal, window_size_left=-1,
            window_size_right=-1, softcap=softcap, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out[..., : q.shape[-1]]


def flash(q, keys, values, mask, causal=True, softcap=0.0):
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return FlashAttnFunc.apply(q, keys, values, causal, softcap).transpose(1, 2)


def capped(q, keys, values, mask):
    return flash(q * 9, keys, values, mask, softcap=5.0)


@pytest.mark.parametrize("write, layout", [(cat_bhtd, "bhtd"), (cat_bthd, "bthd")])
@pytest.mark.parametrize("attend", [flash, capped], ids=lambda x: x.__name__)
@torch.no_grad()
def test_a_step_by_flash_attention_is_sparse(write, layout, attend, interpreted, fresh):
    spelling = Spelling(write, attend=attend, mask=no_mask, growing=True, layout=layout)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki", options={"min_context": 0, "top_k": 1.0})
    here = Conversation.start(spelling)
    there = here.fork()
    for x in tokens(spelling, 3):
        torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=3e-5)
    assert stats()["sparse_steps"] == 3
    assert {site.outcome for report in reports() for site in report.sites} == {"sparse"}


def call(q, k, v, *, take=0, **other):
    operands = {
        "dropout_p": 0.0, "softmax_scale": 0.25, "causal": True, "window_size_left": -1,
        "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
    } | other  # fmt: skip
    result = torch.ops.flash_attn._flash_attn_forward(q, k, v, *operands.values())
    return result[take] if isinstance(take, int) else tuple(result[i] for i in take)


@pytest.mark.parametrize(
    "operands, new, reason",
    [
        ({"dropout_p": 0.5}, 1, Reason.DROPOUT),
        ({"alibi_slopes": torch.ones(4)}, 1, Reason.MASK),
        ({"window_size_left": 7}, 1, Reason.MASK),
        ({"take": (0, 1)}, 1, Reason.WEIGHTS_USED),
        ({}, 2, Reason.PREFILL),  # which of them each new token sees, no mask says
        ({"causal": False}, 2, None),
        ({}, 1, None),
    ],
)
def test_what_the_op_computes_beside_attention_has_a_reason(operands, new, reason):
    q, k, v = torch.randn(2, new, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    sites, skipped = find_sites(normal_graph(lambda *x: call(*x, **operands), q, k, v).graph)
    assert [s.reason for s in skipped] == ([] if reason is None else [reason])
    assert [(s.kv_heads, s.group, s.head_dim, s.scale) for s in sites] == (
        [(2, 2, 8, 0.25)] if reason is None else []
    )


def test_a_result_that_nobody_reads_is_no_attention():
    x = torch.randn(1, 1, 2, 8)
    assert find_sites(normal_graph(lambda x: call(x, x, x, take=1), x).graph) == ([], [])
