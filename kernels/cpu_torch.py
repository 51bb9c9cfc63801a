"""Both ops on the CPU, made of PyTorch ops: what runs where no C++ compiler does."""

from __future__ import annotations

import torch
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.checks import check_attend, check_select, hidden_below
from torch import Tensor

_FORCED = torch.iinfo(torch.int32).max
_HIDDEN = torch.iinfo(torch.int32).min


def select(
    q: Tensor,
    basis: Tensor,
    index: Tensor,
    index_scale: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    *,
    scale: float,
    top_k: int | None,
    keep_q16: int,
    sink: int,
    recent: int,
    min_keys: int,
    per_head: bool,
) -> Tensor:
    """`loki::select`; see `loki_compile.kernels.ops`."""
    check_select(
        q, basis, index, index_scale, mask, bounds,
        top_k=top_k, keep_q16=keep_q16, sink=sink, recent=recent, min_keys=min_keys,
        per_head=per_head,
    )  # fmt: skip
    b, hq, s, _ = q.shape
    hkv, t = index.shape[1:3]
    heads = hq if per_head else hkv
    score = _scores(q, basis, index, index_scale, scale=scale)
    score = score.flatten(1, 2) if per_head else score.amax(2)
    visible = torch.ones((1, 1, 1, t), dtype=torch.bool)
    if mask is not None:
        mask = mask.expand(b, hq, s, t)[:, :: hq // heads]
        if mask.dtype == torch.bool:
            visible = mask
        else:
            visible = mask > hidden_below(mask.dtype)
            score = score + mask
    visible = visible.expand(b, heads, s, t)
    rank = visible.cumsum(-1, dtype=torch.int32)  # 1 for the first visible key
    count = rank[..., -1:]
    recent_kept = count.clamp(max=recent)
    sink_kept = (count - recent_kept).clamp(max=sink)
    share = ((count.long() * keep_q16 + 65535) >> 16).clamp(max=t if top_k is None else top_k)
    budget = torch.where(count < min_keys, count, share.maximum(sink_kept + recent_kept))
    forced = visible & ((rank > count - recent_kept) | (rank <= sink_kept))
    key = _ordered(score).masked_fill(~visible, _HIDDEN).masked_fill(forced, _FORCED)
    chosen = visible & _first_best(key, budget)
    slots = Budget(top_k, keep_q16, sink, recent, min_keys).slots(t)
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, slots)
    positions = torch.full((b, heads, s, slots + 1), -1, dtype=torch.int32)
    positions.scatter_(-1, slot, torch.arange(t, dtype=torch.int32).expand(slot.shape))
    return positions[..., :slots].contiguous()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_rest: Tensor | None = None,
) -> Tensor:
    """`loki::attend`; see `loki_compile.kernels.ops`."""
    check_attend(q, k, v, positions, mask, softcap=softcap, sinks=sinks, k_rest=k_rest)
    b, hq, s, _ = q.shape
    hkv, t, dv = k.shape[1], k.shape[2], v.shape[3]
    if mask is not None:
        mask = mask.expand(b, hq, s, t)
    valid = (positions >= 0) & (positions < t)
    out = torch.empty((b, hq, s, dv), dtype=q.dtype)
    for i in range(b):
        for h in range(hq):
            kv = h // (hq // hkv)
            chosen_by = h if positions.shape[1] == hq else kv
            for j in range(s):
                chosen = positions[i, chosen_by, j][valid[i, chosen_by, j]]
                at = chosen if len(chosen) else slice(None)
                added = None if mask is None else mask[i, h, j, at]
                sink = None if sinks is None else sinks[h : h + 1]
                keys = k[i, kv, at]
                if k_rest is not None:
                    keys = torch.cat((keys, k_rest[i, kv, at]), -1)
                out[i, h, j] = _attend_row(
                    q[i, h, j], keys, v[i, kv, at], added, scale, softcap, sink
                )
    return out


def _attend_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sink: Tensor | None,
) -> Tensor:
    """q (D), k (N,D), v (N,Dv), mask (N), sink (1) -> (Dv), fp32."""
    logits = scale * (k.float() @ q.float())
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask != -torch.inf
        logits, v = logits[seen], v[seen]
        if mask.dtype != torch.bool:
            logits = logits + mask[seen]
    if sink is not None:
        logits = torch.cat((logits, sink.float()))
    blind = not logits.numel() or logits.max() == -torch.inf
    weights = torch.zeros_like(logits) if blind else logits.softmax(-1)
    return weights[: len(v)] @ v.float()  # 0 * inf is NaN, as in PyTorch's attention


def _scores(
    q: Tensor, basis: Tensor, index: Tensor, index_scale: Tensor | None, *, scale: float
) -> Tensor:
    """(B, Hkv, G, S, T) fp32, NaN as -inf."""
    b, _, s, d = q.shape
    hkv, t = index.shape[1:3]
    packed = q.reshape(b, hkv, -1, d).float()
    q_low = torch.matmul(packed, basis) * scale
    score = torch.matmul(q_low, index.float().transpose(-1, -2))
    if index_scale is not None:
        score = score * index_scale.transpose(-1, -2)
    return torch.nan_to_num(score, -torch.inf, torch.inf, -torch.inf).view(b, hkv, -1, s, t)


def _ordered(score: Tensor) -> Tensor:
    """int32 keys that order as the scores do; NaN as -inf, and -0 as 0."""
    score = torch.nan_to_num(score, -torch.inf, torch.inf, -torch.inf) + 0.0
    bits = score.view(torch.int32)
    return bits ^ ((bits >> 31) & _FORCED)


def _first_best(key: Tensor, budget: Tensor) -> Tensor:
    """Bool like `key` (..., T): its `budget` (..., 1) largest; equal ones from the left."""
    most = min(int(budget.max()), key.shape[-1])
    best = key.topk(max(most, 1), dim=-1).values
    threshold = best.gather(-1, (budget - 1).clamp(min=0))
    above = key > threshold
    equal = key == threshold
    left = budget - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= left))) & (budget > 0)
