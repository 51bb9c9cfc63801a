"""What spans cost the loss, to first order: against brute force and against the loss itself."""

import pytest
import torch
from loki_compile.kernels.spans import Spans, span_of

from loki_compile import span_effects as module
from loki_compile.span_effects import span_effects

F64 = torch.float64
RULES = Spans(tuple(map(span_of, ("0", "7", "0.25N", "-9+1N", "3+0.5N", "1N"))), sink=3, recent=2)


def case(seed=0, q_heads=6, kv_heads=2, rows=23, tokens=41, dims=5, value_dims=7):
    torch.manual_seed(seed)
    query = torch.randn(q_heads, rows, dims, dtype=F64)
    key = torch.randn(kv_heads, tokens, dims, dtype=F64)
    value = torch.randn(kv_heads, tokens, value_dims, dtype=F64)
    grad = torch.randn(q_heads, rows, value_dims, dtype=F64)
    return query, key, value, grad


def attended(query, key, value, keep, scale, mask=None, softcap=0.0, sink_logits=None):
    """(Hq, S, Dv) and the attention, over the keys of `keep` (Hq, S, T) alone."""
    group = len(query) // len(key)
    key, value = (x.repeat_interleave(group, 0) for x in (key, value))
    scores = scale * query @ key.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~keep, -torch.inf)
    if sink_logits is not None:
        extra = sink_logits[:, None, None].expand(*scores.shape[:2], 1)
        attention = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    else:
        attention = scores.softmax(-1)
    return attention @ value, attention


def sees(rows, tokens, window=None):
    at = torch.arange(tokens - rows, tokens)[:, None]
    key = torch.arange(tokens)
    seen = key <= at
    return seen if window is None else seen & (key > at - window)


def held(spans, seen):
    """bool (R, S, T): key by key, as the plan of spans defines it."""
    out = torch.zeros(len(spans.heads), *seen.shape, dtype=torch.bool)
    for rule, span in enumerate(spans.heads):
        for row in range(len(seen)):
            keys = seen[row].nonzero()[:, 0].tolist()
            width = max(span.keys(len(keys)), spans.recent, 1)
            out[rule, row, keys[: spans.sink] + keys[-width:]] = True
    return out


WAYS = {
    "plain": {},
    "window": {"window": 17},
    "softcap": {"softcap": 1.5},
    "sinks": {"sink_logits": True},
    "bias": {"bias": True},
}


def arguments(way, query, key):
    q_heads, rows = query.shape[:2]
    tokens = key.shape[1]
    seen = sees(rows, tokens, way.get("window"))
    more, mask = {}, None
    if "window" in way:
        mask = torch.where(seen, 0.0, -torch.inf).to(F64)[None]
    if way.get("bias"):
        mask = torch.randn(q_heads, 1, tokens, dtype=F64)
    if "softcap" in way:
        more["softcap"] = way["softcap"]
    if way.get("sink_logits"):
        more["sink_logits"] = torch.randn(q_heads, dtype=F64)
    return seen, mask, more


@pytest.mark.parametrize("tile", [1, 300, 1 << 20])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_joint_effects_are_those_of_attention_taken_anew(way, tile, monkeypatch):
    monkeypatch.setattr(module, "TILE", tile)
    query, key, value, grad = case()
    seen, mask, more = arguments(WAYS[way], query, key)
    out, attention = attended(query, key, value, seen, 0.4, mask, **more)
    found = span_effects(
        query, key, value, out, grad, RULES, scale=0.4, mask=mask, entrywise=True, **more
    )
    keep = held(RULES, seen)
    moves = grad @ value.repeat_interleave(3, 0).mT
    whole = (grad * out).sum(-1, keepdim=True)
    single = (attention * (whole - moves) / (1 - attention + 2.0**-7)).abs()
    for rule in range(len(RULES.heads)):
        other, _ = attended(query, key, value, keep[rule] & seen, 0.4, mask, **more)
        row = ((other - out) * grad).sum(-1).unflatten(0, (2, 3)).sum(1)
        torch.testing.assert_close(found.rows[:, :, rule], row)
        left = (single * (~keep[rule] & seen)).sum((1, 2)).unflatten(0, (2, 3)).sum(1)
        torch.testing.assert_close(found.entrywise[:, rule], left)
        of_heads = module.attend_spans(
            query, key, value, Spans((RULES.heads[rule], RULES.heads[2]), 3, 2),
            scale=0.4, mask=mask, **more,
        )  # fmt: skip
        mixed = torch.cat((keep[rule].expand(3, -1, -1), keep[2].expand(3, -1, -1)))
        wanted, _ = attended(query, key, value, mixed & seen, 0.4, mask, **more)
        torch.testing.assert_close(of_heads, wanted)
    assert found.visible == seen[-1].sum()
    assert (found.rows[..., -1] == 0).all() and (found.rows[:, -1, 0] != 0).all()


def test_effects_are_the_derivative_of_the_loss_towards_the_span():
    """d/dt of the loss at O + t (O' - O), by central differences, in a loss that is not linear."""
    query, key, value, _ = case(3)
    seen = sees(23, 41)
    out, _ = attended(query, key, value, seen, 0.4)
    target = torch.randn_like(out)

    def loss(at):
        return (torch.tanh(at) - target).square().sum()

    leaf = out.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    found = span_effects(query, key, value, out, grad, RULES, scale=0.4).rows.sum(1)
    keep = held(RULES, seen)
    for rule in range(len(RULES.heads)):
        other, _ = attended(query, key, value, keep[rule], 0.4)
        for head in range(2):
            step = torch.zeros_like(out)
            step[3 * head : 3 * head + 3] = (other - out)[3 * head : 3 * head + 3]
            change = (loss(out + 1e-5 * step) - loss(out - 1e-5 * step)) / 2e-5
            torch.testing.assert_close(found[head, rule], change, rtol=1e-6, atol=1e-7)


def test_small_kept_masses_lose_nothing_in_fp32():
    """A key far back takes nearly everything: what is kept is 1e-6 of the row."""
    query, key, value, grad = case(4, rows=5)
    key[:, 20] = 0
    scores_of_far = 14.0
    query = query / query.norm(dim=-1, keepdim=True)
    seen = sees(5, 41)
    bias = torch.zeros(1, 1, 41, dtype=F64)
    bias[..., 20] = scores_of_far
    out, _ = attended(query, key, value, seen, 0.4, bias)
    args = (query, key, value, out, grad)
    wide = span_effects(*args, RULES, scale=0.4, mask=bias)
    narrow = span_effects(*(x.float() for x in args), RULES, scale=0.4, mask=bias.float())
    torch.testing.assert_close(narrow.rows.double(), wide.rows, rtol=1e-4, atol=1e-5)


def test_rows_with_holes_are_refused_in_one_line():
    query, key, value, grad = case(5)
    mask = torch.ones(1, 1, 41, dtype=torch.uint8)
    mask[..., 7] = 0
    with pytest.raises(ValueError, match="hides keys between"):
        span_effects(query, key, value, grad, grad, RULES, scale=0.4, mask=mask)
