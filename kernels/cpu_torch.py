"""The ops on the CPU, made of PyTorch ops: what runs where no C++ compiler does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.checks import check_attend, check_pages, check_select, hidden_below
from loki_compile.kernels.kept import least_and_greatest
from torch import Tensor

_FORCED = torch.iinfo(torch.int32).max
_HIDDEN = torch.iinfo(torch.int32).min
# Numbers of keys and values gathered at a time, 4 bytes each.
_GATHERED = 1 << 22


def select(*tensors: Any, **options: Any) -> Tensor:
    """`loki::select`; see `loki_compile.kernels.ops`."""
    return _select(False, *tensors, **options)[0]


def select_weighed(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`loki::select_weighed`; see `loki_compile.kernels.ops`."""
    return _select(True, *tensors, **options)


def _select(
    weigh: bool,
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
) -> tuple[Tensor, Any]:
    """Positions, and what they weigh, or None."""
    b, heads, s, t = check_select(
        q, basis, index, index_scale, mask, bounds,
        top_k=top_k, keep_q16=keep_q16, sink=sink, recent=recent, min_keys=min_keys,
        per_head=per_head, page=page, keys=keys, by_probability=by_probability, mass=mass,
        budgets=budgets, slots=slots, weighed=weigh,
    )  # fmt: skip
    hq, hkv = q.shape[1], index.shape[1]
    budget = Budget(top_k, keep_q16, sink, recent, min_keys, mass)
    slots = int(budget.slots(t)) if slots is None else slots
    each = _scores(q, basis, index, index_scale, scale=scale, page=page)
    if page > 1:
        each = each.repeat_interleave(page, -1)[..., :t]
    visible = torch.ones((1, 1, 1, t), dtype=torch.bool)
    bias = None
    if mask is not None:
        mask = mask.expand(b, hq, s, t)[:, :: hq // heads]
        bias = None if mask.dtype == torch.bool else mask
        visible = mask if bias is None else mask > hidden_below(mask.dtype)
    if by_probability and hq > hkv:
        each = each if bias is None else each + bias[:, :, None]
        score = _log_probability(each, visible[:, :, None])
    else:
        score = each.flatten(1, 2) if per_head else each.amax(2)
        score = score if bias is None else score + bias
    visible = visible.expand(score.shape)
    weight = _weights(score, visible) if weigh or mass else None
    chosen = _chosen(score, visible, weight, budget, budgets, slots)
    return _positions(chosen, slots), _told(chosen, weight) if weigh else None


def _told(chosen: Tensor, weight: Any) -> Tensor:
    """How many keys each row chose, and what weight it left out: (B, heads, S, 2) fp32."""
    number = chosen.sum(-1).float()
    left_out = weight.masked_fill(chosen, 0.0).sum(-1)
    return torch.stack((number, torch.where(number > 0, left_out, 0.0)), -1)


def _positions(chosen: Tensor, slots: int) -> Tensor:
    """Where bools (..., T) are True, ascending, then -1: int32 (..., slots)."""
    *rows, t = chosen.shape
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, slots)
    positions = torch.full((*rows, slots + 1), -1, dtype=torch.int32)
    positions.scatter_(-1, slot, torch.arange(t, dtype=torch.int32).expand(slot.shape))
    return positions[..., :slots].contiguous()


def _weights(score: Tensor, visible: Tensor) -> Tensor:
    """As in `reference`, fp32."""
    score = torch.nan_to_num(score, -torch.inf, torch.inf, -torch.inf)
    counted = score.masked_fill(~visible | (score == torch.inf), -torch.inf)
    none = (counted == -torch.inf).all(-1, keepdim=True)
    return counted.softmax(-1).masked_fill(none, 0.0)


def _chosen(
    score: Tensor,
    visible: Tensor,
    weight: Tensor | None,
    budget: Budget,
    budgets: Tensor | None,
    slots: int,
) -> Tensor:
    """Which keys rows choose by their scores, of those that they see; all (B, heads, S, T)."""
    rank = visible.cumsum(-1, dtype=torch.int32)  # 1 for the first visible key
    count = rank[..., -1:]
    recent = count.clamp(max=budget.recent)
    sink = (count - recent).clamp(max=budget.sink)
    most = score.shape[-1] if budget.top_k is None else budget.top_k
    share = ((count.long() * budget.keep_q16 + 65535) >> 16).clamp(max=most)
    keep = torch.where(count < budget.min_keys, count, share.maximum(sink + recent))
    if budgets is not None:
        own, last = budgets.long().unsqueeze(-1).unbind(3)  # (B, heads, S, 1) each
        keep = own.clamp(0, slots).minimum(count)
        recent = last.clamp(min=0).minimum(keep)
        sink = (keep - recent).clamp(max=budget.sink)
    forced = visible & ((rank > count - recent) | (rank <= sink))
    key = _ordered(score).masked_fill(~visible, _HIDDEN).masked_fill(forced, _FORCED)
    if budget.mass and weight is not None:
        heavy = sink + recent + _fewest(key, weight, forced, budget.mass)
        by_mass = (count >= budget.min_keys) & (weight.sum(-1, keepdim=True) > 0)
        keep = torch.where(by_mass, keep.minimum(heavy), keep)
    return visible & _first_best(key, keep)


def _fewest(key: Tensor, weight: Tensor, forced: Tensor, mass: float) -> Tensor:
    """How many of the best keys it takes, beside those `forced`, to weigh so much: (..., 1)."""
    held = weight.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    order = key.masked_fill(forced, _HIDDEN).sort(dim=-1, descending=True, stable=True).indices
    rest = weight.masked_fill(forced, 0.0).gather(-1, order).cumsum(-1)
    before = torch.cat((torch.zeros_like(held), rest), -1)
    return (held + before < mass).sum(-1, keepdim=True)


def update_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> None:
    """`loki::update_pages`; see `loki_compile.kernels.ops`."""
    check_pages(pages, keys, written, page=page, grows=False)
    b, hkv, t, d = keys.shape
    stored = written.expand(b, hkv, t, 1)[..., 0] != 0
    spread = torch.zeros((b, hkv, -(-t // page) * page), dtype=torch.bool)
    spread[..., :t] = stored
    paged = spread.view(b, hkv, -1, page)
    last = (paged * torch.arange(1, page + 1)).amax(-1)  # keys up to the last written one; or 0
    i, h, p = last.nonzero().unbind(1)
    at = p[:, None] * page + torch.arange(page)
    filled = (torch.arange(page) < last[i, h, p][:, None])[..., None]
    found = keys[i[:, None], h[:, None], at.clamp(max=t - 1)]
    low, high = least_and_greatest(found, ~filled | found.isnan(), 1)
    pages[i, h, p, :d], pages[i, h, p, d:] = low, high


def extend_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> Tensor:
    """`loki::extend_pages`; see `loki_compile.kernels.ops`."""
    check_pages(pages, keys, written, page=page, grows=True)
    grown = longer_pages(pages, keys, page)
    update_pages(grown, keys, written, page=page)
    return grown


def longer_pages(pages: Tensor, keys: Tensor, page: int) -> Tensor:
    """The pages and zeros behind, as many as the keys (B, Hkv, T, D) fill; on any device."""
    b, hkv, t, d = keys.shape
    longer = keys.new_empty((b, hkv, -(-t // page), 2 * d))
    longer[:, :, : pages.shape[2]] = pages
    longer[:, :, pages.shape[2] :] = 0
    return longer


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
    """`loki::attend`, and `loki::attention` without positions; see `loki_compile.kernels.ops`."""
    b, hq, s, dv = check_attend(
        q, k, v, positions, mask, softcap=softcap, sink_logits=sink_logits, k_pe=k_pe,
        ranges=ranges,
    )  # fmt: skip
    d, t = q.shape[3], v.shape[2]
    if ranges is not None:
        positions = _in_ranges(ranges.expand(b, k.shape[1], s, 4), t)
    elif positions is None:
        positions = torch.full((b, k.shape[1], s, 1), -1, dtype=torch.int32)
    heads = positions.shape[1]
    if mask is not None and mask.shape[1] != 1 and heads != hq:
        # Heads of a group see different keys: each reads for itself, or what one must not see
        # would reach it as 0 * NaN.
        positions, heads = positions.repeat_interleave(hq // heads, 1), hq
    group = hq // heads
    rows = Rows(
        q=q.unflatten(1, (heads, group)).transpose(2, 3).reshape(-1, group, d).float(),
        place=torch.cartesian_prod(torch.arange(b), torch.arange(heads), torch.arange(s)),
        keys=(k,) if k_pe is None else (k, k_pe),
        values=v,
        per_kv=heads // k.shape[1],
        mask=None if mask is None else mask.expand(b, hq, s, t)[:, ::group],
        sink_logits=None if sink_logits is None else sink_logits.float().view(heads, group),
        scale=scale,
        softcap=softcap,
    )
    out = rows.attend_all(positions.reshape(-1, positions.shape[3]), q.dtype)
    return out.view(b, heads, s, group, dv).transpose(2, 3).flatten(1, 2).contiguous()


def _in_ranges(ranges: Tensor, t: int) -> Tensor:
    """The positions in two ranges (..., 4) of each row: int32 (..., K), ascending, then -1."""
    first, stop, last, end = ranges.clamp(0, t).cummax(-1).values.unsqueeze(-1).unbind(-2)
    slot = torch.arange(max(int((stop - first + end - last).max()), 1), dtype=torch.int32)
    at = torch.where(slot < stop - first, first + slot, last + slot - (stop - first))
    return torch.where(slot < stop - first + end - last, at, -1).to(torch.int32)


@dataclass(frozen=True)
class Rows:
    """Rows of attention (N of them): the `group` query heads that read the same keys.

    q (N, group, D) fp32; place (N, 3): batch entry, list of positions, token of each; `per_kv`
    lists per KV head; mask (B, lists, S, T); sink_logits (lists, group).
    """

    q: Tensor
    place: Tensor
    keys: tuple[Tensor, ...]
    values: Tensor
    per_kv: int
    mask: Tensor | None
    sink_logits: Tensor | None
    scale: float
    softcap: float

    def attend_all(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Each row over its positions (N, K), or over all keys if it has none: (N, group, Dv)."""
        t, dv = self.values.shape[2:]
        dims = self.q.shape[2] + dv
        used = (positions >= 0) & (positions < t)
        out = torch.empty((len(positions), self.q.shape[1], dv), dtype=dtype)
        reads = used.any(-1)
        if not reads.all():
            every = torch.arange(t).expand(1, t)
            for part in _chunks((~reads).nonzero()[:, 0], t * dims):
                out[part] = self.attend(part, every, every >= 0).to(dtype)
        slots = int((used.any(0) * torch.arange(1, used.shape[1] + 1)).max())
        for part in _chunks(reads.nonzero()[:, 0], slots * dims):
            out[part] = self.attend(part, positions[part, :slots], used[part, :slots]).to(dtype)
        return out

    def attend(self, part: Tensor, at: Tensor, used: Tensor) -> Tensor:
        """Rows `part` over the positions `at`, where `used` (both (n or 1, K)): (n, group, Dv)."""
        i, h, j = (x[:, None] for x in self.place[part].unbind(1))
        at = at.long().masked_fill(~used, 0)
        kv = h // self.per_kv
        q, logits = self.q[part], None
        for keys in self.keys:
            here, q = q.split((keys.shape[3], q.shape[2] - keys.shape[3]), -1)
            # One fp32 sum over many dims errs more than those of PyTorch's attention.
            wide = torch.float64 if keys.dtype == torch.float32 else torch.float32
            read = _gather(keys, i, kv, at).to(wide)
            product = torch.bmm(here.to(wide), read.transpose(1, 2)).float()
            logits = product if logits is None else logits + product
        assert logits is not None
        logits = logits * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        seen = used.expand(len(part), -1)
        if self.mask is not None:
            mask = self.mask[i, h, j, at]
            if mask.dtype == torch.bool:
                seen = seen & mask
            else:
                seen = seen & (mask != -torch.inf)
                logits = logits + mask[:, None]
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        if self.sink_logits is not None:
            logits = torch.cat((logits, self.sink_logits[h[:, 0], :, None]), -1)
        blind = logits.amax(-1, keepdim=True) == -torch.inf
        weights = logits.softmax(-1).masked_fill(blind, 0.0)[..., : at.shape[1]]
        # What is seen and has no weight counts, since 0 * inf is NaN as in PyTorch's attention.
        values = _gather(self.values, i, kv, at)
        if not seen.all():
            values.masked_fill_(~seen[..., None], 0.0)
        return torch.bmm(weights, values)


def _gather(x: Tensor, batch: Tensor, heads: Tensor, at: Tensor) -> Tensor:
    """Rows x[batch, heads, at] of (B, Hkv, T, D) for numbers that broadcast to (n, K): (n, K, D)
    fp32, a copy."""
    # index_select of whole rows takes a fifth of the time of indexing by three tensors.
    steps = [0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride(), strict=False)]
    unit = max(math.gcd(*steps), 1)
    last = sum(step * (size - 1) for step, size in zip(steps, x.shape, strict=False))
    rows = x.as_strided((last // unit + 1, x.shape[3]), (unit, 1))
    place = (batch * steps[0] + heads * steps[1] + at * steps[2]) // unit
    return rows.index_select(0, place.reshape(-1)).view(*place.shape, -1).float()


def _chunks(rows: Tensor, numbers_each: int) -> Iterator[Tensor]:
    """The rows, so many at a time that `numbers_each` for each of them stay few."""
    return iter(rows.split(max(1, _GATHERED // max(numbers_each, 1)))) if len(rows) else iter(())


def _scores(
    q: Tensor,
    basis: Tensor | None,
    index: Tensor,
    index_scale: Tensor | None,
    *,
    scale: float,
    page: int,
) -> Tensor:
    """(B, Hkv, G, S, rows of the index) fp32, NaN as -inf."""
    b, _, s, d = q.shape
    hkv, rows = index.shape[1:3]
    packed = q.reshape(b, hkv, -1, d).float()
    if page > 1:
        low, high = index.float().chunk(2, -1)
        score = torch.empty((*packed.shape[:3], rows))
        for n, one in enumerate(packed.unbind(2)):  # all of them at once would take G S times D
            score[:, :, n] = torch.maximum(one[:, :, None] * low, one[:, :, None] * high).sum(-1)
        score *= scale
    else:
        projected = packed if basis is None else torch.matmul(packed, basis)
        score = torch.matmul(projected * scale, index.float().transpose(-1, -2))
    if index_scale is not None:
        score = score * index_scale.transpose(-1, -2)
    return torch.nan_to_num(score, -torch.inf, torch.inf, -torch.inf).view(b, hkv, -1, s, rows)


def _log_probability(logits: Tensor, visible: Tensor) -> Tensor:
    """As in `reference`, fp32."""
    logits = torch.nan_to_num(logits, -torch.inf, torch.inf, -torch.inf)
    counted = logits.masked_fill(~visible | (logits == torch.inf), -torch.inf)
    total = counted.logsumexp(-1, keepdim=True)
    return (logits - total.masked_fill(total == -torch.inf, 0.0)).logsumexp(2)


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
