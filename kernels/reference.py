"""The definition of the ops: one row at a time, plain PyTorch, computed in fp64.

Slow on purpose; for tests. Arguments as in `loki_compile.kernels.ops`, any floating dtype. `select`
returns int32 positions, `attend` the dtype of q, the page ops that of the keys: pass fp64 tensors
to have the truth unrounded.
"""

from __future__ import annotations

from typing import Any

import torch
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.checks import hidden_below, keys_ranked
from torch import Tensor


def select(*tensors: Any, **options: Any) -> Tensor:
    """Positions (B, Hkv or Hq, S, K) int32: chosen keys ascending, then -1.

    Operands as of `select_weighed`. `bounds` says nothing that `mask` does not, and is not read.
    """
    return select_weighed(*tensors, **options)[0]


def select_weighed(
    q: Tensor,
    basis: Tensor | None,
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
    page: int = 1,
    keys: int | None = None,
    by_probability: bool = False,
    mass: float = 0.0,
    budgets: Tensor | None = None,
    slots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`select`, and of each row (B, Hkv or Hq, S, 2) fp64: how many keys it chose, and the share of
    `weights` that it left out."""
    b, hq, s, _ = q.shape
    hkv, t = index.shape[1], keys_ranked(index, page, keys)
    score = scores(
        q, basis, index, index_scale, mask,
        scale=scale, per_head=per_head, page=page, keys=keys, by_probability=by_probability,
    )  # fmt: skip
    heads = hq if per_head else hkv
    visible = _visible(mask, t).expand(b, hq, s, t)[:, :: hq // heads]
    budget = Budget(top_k, keep_q16, sink, recent, min_keys, mass)
    weight = weights(score, visible)
    slots = int(budget.slots(t)) if slots is None else slots
    positions = torch.full((b, heads, s, slots), -1, dtype=torch.int32, device=q.device)
    own = None if budgets is None else budgets.expand(b, heads, s, 2)
    weighed = torch.zeros((b, heads, s, 2), dtype=torch.float64, device=q.device)
    for row in _rows(b, heads, s):
        candidates = visible[row].nonzero().flatten()
        keep, last = budget.keys(len(candidates)), recent
        if own is not None:
            keep, last = min(int(own[row][0]), len(candidates), slots), int(own[row][1])
            if keep == 0:
                continue
        chosen = _choose(score[row], weight[row], candidates, budget, keep, last)
        positions[row][: len(chosen)] = chosen
        left_out = weight[row].sum() - weight[row][chosen.long()].sum()
        weighed[row] = torch.tensor((len(chosen), left_out.clamp(min=0.0)))
    return positions, weighed


def weights(score: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible T of what rows rank by, both (B, heads, S, T); fp64, of that shape.

    Infinite scores take no part in it. Zeros where a row sees no finite score.
    """
    counted = score.masked_fill(~visible | (score == torch.inf), -torch.inf)
    return counted.softmax(-1).masked_fill((counted == -torch.inf).all(-1, keepdim=True), 0.0)


def scores(
    q: Tensor,
    basis: Tensor | None,
    index: Tensor,
    index_scale: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    per_head: bool,
    page: int = 1,
    keys: int | None = None,
    by_probability: bool = False,
) -> Tensor:
    """What `select` ranks by: (B, Hkv or Hq, S, T) fp64; NaN as -inf, additive mask added.

    `by_probability`: the logarithm of what the group's softmaxes over the visible keys sum to.
    """
    b, hq, s, _ = q.shape
    hkv, t = index.shape[1], keys_ranked(index, page, keys)
    grouped = q.double().unflatten(1, (hkv, -1))
    if page > 1:
        each = scale * _page_bound(grouped, index.double())
        each = each.repeat_interleave(page, -1)[..., :t]
    else:
        each = scale * _dots(grouped, basis, index, index_scale)
    each = each.masked_fill(each.isnan(), -torch.inf)  # (B, Hkv, G, S, T)
    heads = hq if per_head else hkv
    bias = torch.zeros(1, 1, 1, t, dtype=torch.float64)
    if mask is not None and mask.dtype != torch.bool:
        bias = mask.double()
    bias = bias.expand(b, hq, s, t)[:, :: hq // heads]
    if by_probability:
        visible = _visible(mask, t).expand(b, hq, s, t)[:, :: hq // heads]
        return _log_probability(each + bias[:, :, None], visible[:, :, None])
    score = bias + (each.flatten(1, 2) if per_head else each.amax(2))
    return score.masked_fill(score.isnan(), -torch.inf)


def _log_probability(logits: Tensor, visible: Tensor) -> Tensor:
    """log of the sum over G of softmaxes over the visible T: logits (B, Hkv, G, S, T) to
    (B, Hkv, S, T).

    Infinite logits take no part in a softmax and rank as they are, as those of one head would.
    """
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    counted = logits.masked_fill(~visible | (logits == torch.inf), -torch.inf)
    total = counted.logsumexp(-1, keepdim=True)
    return (logits - total.masked_fill(total == -torch.inf, 0.0)).logsumexp(2)


def _dots(
    grouped: Tensor, basis: Tensor | None, index: Tensor, index_scale: Tensor | None
) -> Tensor:
    """(B, Hkv, G, S, T): queries (B, Hkv, G, S, D) against the index, projected if it is."""
    rows = index.double() if index_scale is None else index.double() * index_scale.double()
    if basis is not None:
        each = basis.double().expand(len(index), *basis.shape[-3:])
        grouped = torch.einsum("bhgsd,bhdr->bhgsr", grouped, each)
    return torch.einsum("bhgsr,bhtr->bhgst", grouped, rows)


def _page_bound(grouped: Tensor, pages: Tensor) -> Tensor:
    """(B, Hkv, G, S, P): the most that the product of a query and a key of the page can be."""
    low, high = pages[:, :, None, None].chunk(2, -1)
    q = grouped[:, :, :, :, None]
    return torch.maximum(q * low, q * high).sum(-1)


def update_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> None:
    """Bounds of the pages with a written token, in place; see `loki_compile.kernels.ops`.

    A NaN bounds nothing; a dim that is NaN in all keys of a page has NaN for its bounds.
    """
    b, hkv, t, _ = keys.shape
    stored = written.expand(b, hkv, t, 1)[..., 0] != 0
    for i, h, p in _rows(b, hkv, -(-t // page)):
        at = stored[i, h, p * page : (p + 1) * page].nonzero().flatten()
        if len(at):
            filled = keys[i, h, p * page : p * page + int(at[-1]) + 1]
            nothing = filled.isnan()
            low = filled.masked_fill(nothing, torch.inf).amin(0)
            high = filled.masked_fill(nothing, -torch.inf).amax(0)
            pages[i, h, p] = torch.cat((low, high)).masked_fill(nothing.all(0).repeat(2), torch.nan)


def extend_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> Tensor:
    """The pages of a cache that has grown, (B, Hkv, ceil(T / page), 2 D)."""
    b, hkv, t, d = keys.shape
    more = keys.new_zeros((b, hkv, -(-t // page) - pages.shape[2], 2 * d))
    grown = torch.cat((pages, more), 2)
    update_pages(grown, keys, written, page=page)
    return grown


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    k_pe: Tensor | None = None,
    ranges: Tensor | None = None,
) -> Tensor:
    """Exact attention over the keys at `positions`, in two `ranges`, or over all: (B, Hq, S, Dv)
    in q.dtype.

    k_pe (B, Hkv, T, dims): the keys' last dims, where they lie in a tensor of their own.
    """
    k = k if k_pe is None else torch.cat((k, k_pe), -1)
    b, hq, s, _ = q.shape
    hkv, t, dv = k.shape[1], k.shape[2], v.shape[3]
    every_key = torch.arange(t, device=q.device)
    if positions is None:
        positions = torch.full((b, hkv, s, 1), -1, dtype=torch.int32, device=q.device)
    bias = None if mask is None else mask.expand(b, hq, s, t)
    out = torch.empty((b, hq, s, dv), dtype=q.dtype, device=q.device)
    for i, h, j in _rows(b, hq, s):
        kv = h // (hq // hkv)
        row = positions[i, h if positions.shape[1] == hq else kv, j]
        at = row[(row >= 0) & (row < t)].long()
        if ranges is not None:
            first, stop, last, end = ranges.expand(b, hkv, s, 4)[i, kv, j].tolist()
            at = torch.cat((every_key[first:stop], every_key[last:end]))
        if len(at) == 0:
            at = every_key
        logits = scale * (k[i, kv, at].double() @ q[i, h, j].double())
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            added = _additive(bias[i, h, j, at])
            seen = added != -torch.inf
            at, logits = at[seen], logits[seen] + added[seen]
        if sink_logits is not None:
            logits = torch.cat((logits, sink_logits[h : h + 1].double()))
        weights = _softmax_or_zero(logits)[: len(at)]
        out[i, h, j] = (weights @ v[i, kv, at].double()).to(q.dtype)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """`attend` over all keys, or over two ranges of them."""
    return attend(q, k, v, None, mask, **options)


def _choose(
    score: Tensor, weight: Tensor, candidates: Tensor, budget: Budget, keep: int, last: int
) -> Tensor:
    """Of the ascending `candidates` the `last` ones, the first `sink`, and the best others: `keep`
    in all."""
    recent = min(last, keep)
    sink = min(budget.sink, keep - recent)
    middle = candidates[sink : len(candidates) - recent]
    best_first = torch.sort(score[middle], descending=True, stable=True).indices
    best = middle[best_first[: keep - sink - recent]]
    always = (candidates[:sink], candidates[len(candidates) - recent :])
    if budget.mass and len(candidates) >= budget.min_keys and bool(weight.any()):
        kept = weight[torch.cat(always)].sum()
        # Of 0, 1, 2 ... of the best: whether one more is needed.
        short = torch.cat((kept[None], kept + weight[best].cumsum(0))) < budget.mass
        best = best[: int(short.sum())]
    return torch.cat((*always, best)).sort().values


def _visible(mask: Tensor | None, t: int) -> Tensor:
    if mask is None:
        return torch.ones((1, 1, 1, t), dtype=torch.bool)
    return mask if mask.dtype == torch.bool else mask > hidden_below(mask.dtype)


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.double()
    return torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(
        ~mask, -torch.inf
    )


def _softmax_or_zero(logits: Tensor) -> Tensor:
    """Softmax; zeros where every logit is -inf, as scaled_dot_product_attention has it."""
    if len(logits) == 0 or bool((logits == -torch.inf).all()):
        return torch.zeros_like(logits)
    return logits.softmax(-1)


def _rows(b: int, heads: int, s: int):
    return ((i, h, j) for i in range(b) for h in range(heads) for j in range(s))
