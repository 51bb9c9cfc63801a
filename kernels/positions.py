"""Plain torch that makes positions and ranges of keys from masks, which Inductor fuses.

Nothing here knows a graph. `loki_compile.kernels` has the legend of the letters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from loki_compile.kernels.budget import Budget, budgets_from, budgets_of_rows
from loki_compile.kernels.ops import hidden_below, without_autocast
from torch import Tensor


def window_positions(
    query: Tensor, key: Tensor, mask: Tensor | None, heads: int, *budget: Any
) -> Tensor:
    """The first and the last visible keys of each row: int32 (B, heads, S, K), ascending, then -1.

    query (B, Hq, S, D); key (B, Hkv, T, ...); mask as `select` takes it, broadcastable to
    (B, Hq, S, T); `budget` is `Budget.numbers`. A row has the budget that `select` would give it:
    its `sink` first keys, and the rest of it the last ones.
    """
    rule = Budget(*budget)
    batch, tokens, cached = query.shape[0], query.shape[2], key.shape[2]
    at = torch.arange(cached, device=key.device, dtype=torch.int32)
    visible = _visible(key, mask)
    if visible.shape[1] not in (1, heads):
        visible = visible[:, :: visible.shape[1] // heads]
    number = visible.cumsum(-1, dtype=torch.int32)  # of each visible key in its row, from 1
    count = number[..., -1:]
    keep = rule.keys_of(count).to(torch.int32)
    first = torch.minimum(torch.full_like(keep, rule.sink), keep)
    skipped = count - keep  # between the first and the last ones
    chosen = visible & ((number <= first) | (number > first + skipped))
    slot = torch.where(number <= first, number - 1, number - 1 - skipped)
    slots = rule.slots(cached)
    behind = slot * 0 + slots  # one more, for what is not chosen
    slot = torch.where(chosen, slot, cast("Tensor", behind))
    out = torch.full((*visible.shape[:-1], slots + 1), -1, dtype=torch.int32, device=key.device)
    out = out.scatter(-1, slot.long(), at.expand(visible.shape))[..., :slots]
    return out.expand(batch, heads, tokens, slots).contiguous()


def visible_slots(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Where the keys lie that each row sees: int32 (B, H, S, T + 2), each of the first three maybe
    1 and H else the KV heads.

    query (B, Hq, S, D); key (B, Hkv, T, ...); mask as `select` takes it, broadcastable to
    (B, Hq, S, T). The first number is how many keys a row sees, number n the slot of the n-th of
    them. Of a KV head those count that any of its query heads sees.
    """
    cached, heads = key.shape[2], key.shape[1]
    at = torch.arange(cached, device=key.device, dtype=torch.int32)
    if mask is None:
        whole = torch.cat((at[:1] * 0 + cached, at, at[:1] * 0))
        return whole.view(1, 1, 1, -1)
    visible = _visible(key, mask)
    if visible.shape[1] not in (1, heads):
        visible = visible.unflatten(1, (heads, -1)).any(2)
    number = visible.cumsum(-1, dtype=torch.int32)
    behind = torch.where(visible, number, cast("Tensor", number[..., -1:] * 0 + (cached + 1)))
    slots = torch.zeros((*visible.shape[:-1], cached + 2), dtype=torch.int32, device=key.device)
    slots = slots.scatter(-1, behind.long(), at.expand(visible.shape))
    return torch.cat((number[..., -1:], slots[..., 1:]), -1)


def span_ranges(
    slots: Tensor,
    kv_heads: int,
    heads: Sequence[tuple[tuple[int, int], ...]],
    sink: int,
    recent: int,
    min_keys: int,
) -> Tensor:
    """The keys that each KV head reads by `Spans`, as `loki::attention` takes ranges: int32
    (B, kv_heads, S, 4), B and S maybe 1.

    slots: `visible_slots` of all rows; the rest are `Spans.numbers`.
    """
    count = slots[..., :1].long()  # (B, H, S, 1)
    head = torch.arange(kv_heads, device=slots.device).view(1, -1, 1, 1)
    width = torch.zeros_like(count) + head * 0
    for lines in dict.fromkeys(heads):
        longest = functools.reduce(
            torch.maximum, [(count * beta >> 16) + alpha for alpha, beta in lines]
        )
        longest = longest.clamp(min=max(recent, 1))
        own = [number for number, other in enumerate(heads) if other == lines]
        if len(own) in (kv_heads, len(heads)):
            width = longest + head * 0
            continue
        mine = functools.reduce(torch.logical_or, [head == number for number in own])
        width = torch.where(mine, longest, width)
    whole = (width + sink >= count) | (count < min_keys)
    # Of the keys that a row sees, from 1: the first ones, and those behind what is left out.
    first_stop = torch.where(whole, count, sink)
    last = torch.where(whole, count, count - width)
    ends = torch.cat((first_stop * 0 + 1, first_stop, last + 1, count + last * 0), -1)
    here = slots.expand(-1, kv_heads, -1, -1).gather(-1, ends.clamp(min=1))
    first, stop, start, end = here.unbind(-1)
    stop = torch.where(first_stop[..., 0] > 0, stop + 1, first)
    end = torch.where(count[..., 0] > 0, end + 1, 0)
    start = torch.where(whole[..., 0], end, start)
    stop = torch.where(whole[..., 0], end, stop)
    return torch.stack((first, stop, start, end), -1).to(torch.int32)


def row_budgets(
    query: Tensor, key: Tensor, bounds: Tensor | None, heads: int, *budgets: Any
) -> Tensor:
    """What rows choose by `HeadBudgets`, as `select` takes it: int32 (B, heads, S, 2), B and S
    maybe 1.

    query (B, Hq, S, D); key (B, Hkv, T, ...); bounds as `select` takes them; heads that choose, Hkv
    or Hq; `budgets` is `HeadBudgets.numbers`.
    """
    if bounds is None:
        count = torch.zeros((1, 1, 1), dtype=torch.int64, device=key.device) + key.shape[2]
    else:
        count = bounds[..., 2]
        if count.shape[1] not in (1, heads):  # a group that chooses together sees the same
            count = count[:, :1]
    return budgets_of_rows(count, heads, key.shape[1], budgets_from(*budgets))


def widest_slots(key: Tensor, *budgets: Any) -> int | torch.SymInt:
    """Slots that hold what any row chooses of the keys (B, Hkv, T, ...) by `HeadBudgets`, whose
    `numbers` they are."""
    return budgets_from(*budgets).slots(key.shape[2])


def joined_positions(rows: Sequence[tuple[int, int]], *lists: Tensor) -> Tensor:
    """Positions (B, len(rows), S, K) of which row (n, head) is `lists[n][:, head]`.

    lists: positions (B, heads, S, K), each with heads and K of its own; -1 behind those of a
    narrower one.
    """
    widths = [each.shape[3] for each in lists]
    most = functools.reduce(torch.sym_max, widths)
    if not all(isinstance(width, int) and width == most for width in widths):
        # Read in place and not padded: whether there is anything to pad is not asked of symbols.
        slot = torch.arange(most, device=lists[0].device)
        within = [slot.clamp(max=width - 1) for width in widths]
        lists = tuple(
            torch.where(slot < width, each.index_select(3, at), -1)
            for each, width, at in zip(lists, widths, within, strict=True)
        )
    return torch.cat([lists[number].narrow(1, head, 1) for number, head in rows], 1)


def positions_of_heads(positions: Tensor, heads: Sequence[int]) -> Tensor:
    """Positions (B, H, S, K) of other heads: (B, len(heads), S, K), row i those of `heads[i]`."""
    return torch.cat([positions.narrow(1, head, 1) for head in heads], 1)


def unified_positions(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    recent_part: int,
    *budget: Any,
) -> Tensor:
    """One set of positions for all heads of each row: int32 (B, heads, S, K), ascending, then -1.

    query (B, Hq, S, D); key (B, Hkv, T, D); mask as `select` takes it, the same for all heads;
    `budget` is `Budget.numbers`. Of the row's budget the `sink` first and the last keys are always
    kept, these being the 1 / `recent_part` of it that the first leave over, or `recent` where that
    is more. The query heads take turns for the rest: each adds the best of the keys between that no
    head has named yet.
    """
    rule = Budget(*budget)
    (batch, query_heads, tokens, _), cached = query.shape, key.shape[2]
    visible = _visible(key, mask)
    visible = visible[:, :1]
    number = visible.cumsum(-1, dtype=torch.int32)  # of each visible key in its row, from 1
    count = number[..., -1:]
    keep = rule.keys_of(count).to(torch.int32)
    first = keep.clamp(max=rule.sink)
    last = (keep // recent_part - rule.sink).clamp(min=rule.recent)
    last = torch.minimum(last, keep - first)
    always = visible & ((number <= first) | (number > count - last))
    between = visible & ~always
    scores = _scores(query, key, mask, scale)
    scores = scores.masked_fill(~between | scores.isnan(), -torch.inf)
    slots = rule.slots(cached)
    most = torch.sym_min(slots, cached)
    best = scores.topk(most, -1).indices  # (B, Hq, S, most), best first
    turns = _turns(best, cached)
    never = query_heads * most
    turns = torch.where(always[:, 0], -1, torch.where(between[:, 0], turns, never + 1))
    chosen = turns.topk(most, -1, largest=False).indices  # (B, S, most)
    chosen = torch.where(torch.arange(most, device=key.device) < keep[:, 0], chosen, cached)
    chosen = chosen.sort(-1).values
    chosen = torch.where(chosen < cached, chosen, -1).to(torch.int32)
    out = chosen.new_full((batch, tokens, slots), -1)
    out[..., :most] = chosen
    return out[:, None].expand(batch, heads, tokens, slots).contiguous()


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, Hq, S, T) fp32, with what a floating mask adds."""
    with without_autocast(query.device.type):
        scores = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3).float() @ key.float().mT
    scores = scale * scores.unflatten(2, (-1, query.shape[2])).flatten(1, 2)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    return scores


def _turns(best: Tensor, cached: int) -> Tensor:
    """When each of the cached keys is first named: int64 (B, S, T), heads in turn, each naming its
    `best` (B, Hq, S, n), best first; Hq * n where it is never."""
    batch, query_heads, tokens, most = best.shape
    turn = torch.arange(most, device=best.device)[:, None] * query_heads
    turn = (turn + torch.arange(query_heads, device=best.device)).T[None, :, None]
    never = query_heads * most
    turns = torch.full((batch, tokens, cached), never, device=best.device, dtype=torch.int64)
    for head in range(query_heads):
        named = best[:, head]
        turns = turns.scatter_reduce(-1, named, turn[:, head].expand_as(named), "amin")
    return turns


def _visible(key: Tensor, mask: Tensor | None) -> Tensor:
    """Which keys (B, Hkv, T, ...) rows see by a mask that broadcasts to (B, Hq, S, T): bool, of its
    shape; (1, 1, 1, T) without one."""
    if mask is None:
        return torch.ones((1, 1, 1, key.shape[2]), dtype=torch.bool, device=key.device)
    return mask > hidden_below(mask.dtype) if mask.is_floating_point() else mask != 0
