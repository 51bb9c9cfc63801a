"""Plain torch around the two ops, which Inductor fuses with the graph: rows, layouts, masks, maps.

Nothing here knows a graph. `loki_compile.kernels` has the legend of the letters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.ops import hidden_below, without_autocast
from torch import Tensor

# What each dimension of a tensor of attention holds, outermost first: "b" batch, "h" heads, "s" new
# tokens, "t" cached tokens, "d" head_dim. Where each KV head's group of query heads has a dimension
# of its own, that is "g", and "h" are the KV heads. "bh" is batch and heads in one dimension, "" a
# dimension of size one; a letter that is missing everywhere has size one, too.
Layout = tuple[str, ...]
SCORES: Layout = ("b", "h", "s", "t")
QUERIES: Layout = ("b", "h", "s", "d")
_INT8_MAX = 127
# Rows of a prompt that the moments of its queries are taken from: the work of that many rows at
# most, in a prompt of thousands. A basis for 64 dims is no worse from 32 rows of three heads.
MOMENT_ROWS = 256


def mask_bounds(mask: Tensor) -> Tensor:
    """Where the visible keys of each mask row lie.

    mask (Bm, Hm, Sm, T), bool or uint8 (True or 1 = visible), or floating (visible above
    `hidden_below(dtype)`).
    Returns int32 (Bm, Hm, Sm, 3): first visible position, last visible position + 1, number of
    visible keys; (0, 0, 0) for a row that sees nothing.
    """
    if mask.is_floating_point():
        visible = mask > hidden_below(mask.dtype)
    else:
        visible = mask if mask.dtype == torch.bool else mask.to(torch.int32) != 0
    t = mask.shape[-1]
    position = torch.arange(t, device=mask.device, dtype=torch.int32)
    end = torch.where(visible, position + 1, 0).amax(-1)
    start = torch.minimum(torch.where(visible, position, t).amin(-1), end)
    count = visible.sum(-1, dtype=torch.int32)
    return torch.stack((start, end, count), -1).to(torch.int32)


def index_rows(keys: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Index rows of new keys: their projection, stored as `dtype`.

    keys (B, Hkv, S, D) floating; basis (Hkv, D, R) or (B, Hkv, D, R) fp32, the key-side projection;
    math in fp32, under autocast too.
    Returns rows (B, Hkv, S, R) and, for int8, their scale (B, Hkv, S, 1) fp32, else None.
    int8 is symmetric per token and head: scale = max |row| / 127, row = round(value / scale).
    Entries that are not finite count as 0; a zero row has scale 0.
    """
    with without_autocast(keys.device.type):
        rows = torch.matmul(keys.float(), basis)
    if dtype != torch.int8:
        return rows.to(dtype), None
    rows = torch.where(rows.isfinite(), rows, 0.0)
    row_scale = rows.abs().amax(-1, keepdim=True) / _INT8_MAX
    quotient = torch.where(row_scale > 0, rows / row_scale, 0.0)
    return quotient.round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), row_scale


def project_new_keys(
    source: torch.Tensor,
    basis: torch.Tensor,
    head_axis: int,
    dtype: torch.dtype,
    batch_axis: int = -1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`index_rows` for keys in any layout whose last dimension is head_dim.

    source (..., D) with the KV heads at `head_axis` (-1: one head, no such dimension); basis
    (Hkv, D, R) fp32, or (B, Hkv, D, R) for the sequences along `batch_axis`. Returns rows (..., R)
    and, for int8, their scales (..., 1). Where `head_axis` is the last dimension it holds heads and
    head_dim in one, and so do the results.
    """
    if head_axis == source.ndim - 1:
        apart = source.unflatten(-1, (basis.shape[-3], -1))
        rows, scale = project_new_keys(apart, basis, head_axis, dtype, batch_axis)
        return rows.flatten(-2), None if scale is None else scale.flatten(-2)
    if basis.ndim == 4:
        apart = rows_and_heads_first(source, head_axis, batch_axis)
        together = (apart.shape[0], apart.shape[1], -1, apart.shape[-1])
        rows, scale = index_rows(apart.reshape(together), basis, dtype)

        def as_it_was(x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(*apart.shape[:-1], x.shape[-1])
            if head_axis < 0:
                return x.squeeze(1).movedim(0, batch_axis)
            return x.movedim((0, 1), (batch_axis, head_axis))

        return as_it_was(rows), None if scale is None else as_it_was(scale)
    heads_first = source.unsqueeze(0) if head_axis < 0 else source.movedim(head_axis, 0)
    flat = heads_first.reshape(1, heads_first.shape[0], -1, heads_first.shape[-1])
    rows, scale = index_rows(flat, basis, dtype)

    def back(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(*heads_first.shape[:-1], x.shape[-1])
        return x.squeeze(0) if head_axis < 0 else x.movedim(0, head_axis)

    return back(rows), None if scale is None else back(scale)


def append_rows(room: Tensor, rows: Tensor, dim: int) -> None:
    """Writes `rows` over the last ones of `room`, along `dim`."""
    count = rows.shape[dim]
    room.narrow(dim, room.shape[dim] - count, count).copy_(rows)


def unwritten(cache: Tensor, width: int) -> Tensor:
    """Zeros, bytes, like a cache whose last dimension is `width`: what a step writes is told by
    repeating its writes on them."""
    return cache.new_zeros((*cache.shape[:-1], width), dtype=torch.uint8)


def as_written(source: Tensor, width: int) -> tuple[Tensor]:
    """Ones, bytes, like new keys whose last dimension is `width`."""
    return (source.new_ones((*source.shape[:-1], width), dtype=torch.uint8),)


def rows_and_heads_first(x: torch.Tensor, head_axis: int, batch_axis: int) -> torch.Tensor:
    """Keys in any layout as a view (B, Hkv, ..., D); -1 as `head_axis`: one head."""
    if head_axis < 0:
        return x.movedim(batch_axis, 0).unsqueeze(1)
    return x.movedim((batch_axis, head_axis), (0, 1))


def keys_by_head(x: torch.Tensor, head_axis: int, batch_axis: int, kv_heads: int) -> torch.Tensor:
    """Rows of a cache in any layout as (B, Hkv, T, D): `rows_and_heads_first` where heads have a
    dimension, or heads and head_dim the last one, which is `head_axis` then."""
    if head_axis == x.ndim - 1:
        x = x.unflatten(-1, (kv_heads, -1))
    return rows_and_heads_first(x, head_axis, batch_axis).flatten(2, -2)


def queries_by_head(query: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Queries whose dimensions are the letters of `layout`, as (B, Hq, S, D)."""
    letters = "".join(layout)
    for letter in "bhgs":
        if letter not in letters:
            query, letters = query.unsqueeze(-1), letters + letter
    return query.permute([letters.index(letter) for letter in "bhgsd"]).flatten(1, 2)


def laid_out(out: torch.Tensor, layout: Layout, group_dim: int) -> torch.Tensor:
    """(B, Hq, S, Dv), its heads in blocks of `group_dim`, in another layout."""
    out = out.unflatten(1, (-1, group_dim))
    sizes = dict(zip("bhgsd", out.shape, strict=True))
    held = "".join(layout)
    letters = held + "".join(letter for letter in "bhgsd" if letter not in held)
    out = out.permute(["bhgsd".index(letter) for letter in letters])
    return out.reshape([math.prod(sizes[letter] for letter in dim) for dim in layout])


def tiles_to_blocks(x: torch.Tensor, dim: int, tile: int) -> torch.Tensor:
    """Heads 0 1 2 0 1 2 (numbers of their KV heads; tile=3) become 0 0 1 1 2 2.

    With the size of a block as `tile` it is the way back.
    """
    return x.unflatten(dim, (-1, tile)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def rows_of_group(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, Hkv*G, 1, D) -> (B, Hkv, G, D), a view."""
    return query.squeeze(2).unflatten(1, (kv_heads, -1))


def rows_of_heads(out: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, G, Dv) -> (B, Hkv*G, 1, Dv)."""
    return out.flatten(1, 2).unsqueeze(2)


def mask_of_group(mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """A mask whose rows are the query heads of the group instead of the one query token."""
    mask = _as_4d(mask)
    return mask if mask.shape[1] == 1 else rows_of_group(mask, kv_heads)


def _of_heads(weight: torch.Tensor, heads: int, maps: tuple[bool, int, int, int, int]) -> Any:
    """The heads' maps (Hq, dims, latent dims) in a weight, as a view; `maps` as in `HeadMaps`."""
    columns, start, block, inside, dims = maps
    rows = weight.t() if columns else weight
    rows = rows.narrow(0, start, heads * block).unflatten(0, (heads, block))
    return rows.narrow(1, inside, dims)


def _by_heads(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """x (B, Hq, S, m) times maps (Hq, m, n): (B, Hq, S, n), reading each map once."""
    batch, tokens = x.shape[0], x.shape[2]
    product = torch.bmm(x.transpose(0, 1).flatten(1, 2), maps)
    return product.unflatten(1, (batch, tokens)).transpose(0, 1)


def absorbed_queries(
    query: torch.Tensor,
    weight: torch.Tensor,
    maps: tuple[bool, int, int, int, int],
    absorbed_at: int,
    kept: tuple[int, int],
    latent_first: bool,
) -> torch.Tensor:
    """Queries of expanded keys (B, Hq, S, D) as queries of the cached rows: (B, Hq, S, row dims).

    Those dims that met keys expanded by `maps` of `weight` take the map in and meet the latent; the
    `kept` ones (first, how many) stay, behind the latent's or in front of them, as in a row.
    """
    part = query.narrow(3, absorbed_at, maps[-1])
    absorbed = _by_heads(part, _of_heads(weight, query.shape[1], maps))
    if not kept[1]:
        return absorbed.contiguous()
    both = (absorbed, query.narrow(3, *kept))
    return torch.cat(both if latent_first else both[::-1], -1).contiguous()


def unit_queries(
    weight: torch.Tensor,
    maps: tuple[bool, int, int, int, int],
    absorbed_at: int,
    kept: tuple[int, int],
    latent_first: bool,
    heads: int,
) -> torch.Tensor:
    """(1, heads, D, row dims): what cached rows meet when each head asks for each of the D dims of
    expanded keys in turn. The operands are those of `absorbed_queries`.
    """
    dims = maps[-1] + kept[1]
    unit = torch.eye(dims, dtype=weight.dtype, device=weight.device).expand(1, heads, dims, dims)
    with without_autocast(weight.device.type):
        return absorbed_queries(unit, weight, maps, absorbed_at, kept, latent_first)


def expanded_values(
    out: torch.Tensor, weight: torch.Tensor, maps: tuple[bool, int, int, int, int]
) -> torch.Tensor:
    """Weighted latents (B, Hq, S, latent dims) as weighted values: (B, Hq, S, Dv), contiguous."""
    return _by_heads(out, _of_heads(weight, out.shape[1], maps).transpose(1, 2)).contiguous()


def visible_by(
    rule: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, token_axis: int, *operands: Any
) -> torch.Tensor:
    """What `rule(batch, head, query, key, *operands)` says of every key: bool (B, Hq, S, T), each
    but the last may be 1.

    query (B, Hq, S, D); key has its T keys along `token_axis`. Numbers are int64, as in PyTorch's
    `create_mask`.
    """
    sizes = (*query.shape[:3], key.shape[token_axis])
    numbers = [
        torch.arange(size, device=query.device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, size in enumerate(sizes)
    ]
    visible = rule(*numbers, *operands)
    return visible.broadcast_to(torch.broadcast_shapes(visible.shape, (1, 1, 1, sizes[3])))


def plain_mask(
    mask: torch.Tensor, layout: Layout, sizes: tuple[int, int, int], tiles: int
) -> torch.Tensor:
    """A mask for scores in another layout as one that broadcasts to (B, Hq, S, T).

    mask: its dimensions are the last ones of `layout`, or of size one. `sizes`: heads, groups and
    tokens of `layout`. `tiles`, if not 0, is the number of KV heads whose tiles its query heads are
    in: they are brought into blocks.
    """
    if layout != SCORES:
        mask = _by_letters(mask, layout, dict(zip("hgs", sizes, strict=True)))
        if (mask.shape[1] == 1) != (mask.shape[2] == 1):
            mask = mask.expand(-1, *sizes[:2], -1, -1)
        mask = mask.flatten(1, 2)
    if tiles and mask.ndim > 2 and mask.shape[-3] != 1:
        mask = tiles_to_blocks(mask, mask.ndim - 3, tiles)
    return mask


def _by_letters(mask: torch.Tensor, layout: Layout, sizes: dict[str, int]) -> torch.Tensor:
    """The mask as (B, heads, groups, S, T), each of which may be 1."""
    mask = mask[(None,) * (len(layout) - mask.ndim)]
    apart: list[Any] = []
    for size, letters in zip(mask.shape, layout, strict=True):
        known = math.prod(sizes.get(letter, 1) for letter in letters)
        wide = [sizes.get(letter, size // known) for letter in letters]
        apart += [1] * len(letters) if size == 1 else wide
    held = "".join(layout)
    missing = [letter for letter in "bhgst" if letter not in held]
    mask = mask.reshape(apart)[(..., *[None] * len(missing))]
    return mask.permute([(held + "".join(missing)).index(letter) for letter in "bhgst"])


def query_moment(query: Tensor, kv_heads: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The second moment of a prompt's queries, from some rows spread evenly over it.

    query (B, Hq, S, D); `real` as `real_rows` gives it, None: all of them.
    Returns the sum of q qᵀ over the rows and the G query heads of each KV head, (B, Hkv, D, D)
    fp32, and how many queries that are, (B or 1,) fp32. Math in fp32, under autocast too.
    """
    rows = query.index_select(2, _spread(query))
    rows = rows.float().unflatten(1, (kv_heads, -1))
    if real is None:
        count = rows.new_full((1,), rows.shape[3])
    else:
        count = real.sum(1, dtype=torch.float32)
        rows = torch.where(real[:, None, None, :, None], rows, 0.0)
    rows = rows.flatten(2, 3)
    with without_autocast(query.device.type):
        return torch.matmul(rows.mT, rows), count * (query.shape[1] // kv_heads)


def real_rows(query: Tensor, rules: Sequence[tuple[float, bool]], *masks: Tensor) -> Tensor:
    """Which of the rows that `query_moment` takes are of real tokens: bool (B or 1, N).

    query (B, Hq, S, D); masks broadcast to (B, Hq, S, T), with (factor, inverted) of each as in
    `MaskTerm`. A row of padding sees nothing, or the last key that it sees, its own, is one that
    the last row does not see.
    """
    at = _spread(query)
    seen = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device)
    newest = seen
    for mask, (factor, inverted) in zip(map(_as_4d, masks), rules, strict=True):
        rows, last = (
            (mask, mask) if mask.shape[2] == 1 else (mask.index_select(2, at), mask[:, :, -1:])
        )
        seen, newest = (
            all_before & _sees(part, factor, inverted)
            for all_before, part in ((seen, rows), (newest, last))
        )
    seen, newest = seen.any(1), newest.any(1)  # of any head: (Bm, N or 1, T), (Bm, 1, T)
    number = torch.arange(1, seen.shape[-1] + 1, device=query.device)
    own = torch.where(seen, number, 0).amax(-1)
    own_is_seen = newest[:, 0].expand(own.shape[0], -1).gather(1, (own - 1).clamp(min=0))
    return ((own > 0) & own_is_seen).expand(-1, MOMENT_ROWS)


def _sees(mask: Tensor, factor: float, inverted: bool) -> Tensor:
    if not mask.is_floating_point():
        return ~mask if inverted else mask
    return mask * factor > hidden_below(mask.dtype)


def _spread(query: Tensor) -> Tensor:
    """`MOMENT_ROWS` of a prompt's rows, evenly, the last one among them: int64 (N,); some of them
    more than once where there are fewer."""
    at = torch.arange(1, MOMENT_ROWS + 1, device=query.device)
    return (at * query.shape[2] + MOMENT_ROWS - 1) // MOMENT_ROWS - 1


def joint_mask(
    rules: Sequence[tuple[float, bool, float, float]], dtype: torch.dtype, *masks: torch.Tensor
) -> torch.Tensor:
    """One 4-D mask that does what several do one after the other.

    `rules` has factor, inverted, fill and floor of each, as in `MaskTerm`. uint8 (1 = visible)
    where all are bool and fill with -inf, else floating, `dtype` where no mask has one, or float32
    where that would make -inf of a fill. A score is added to the fill instead of replaced by it,
    which rounds to the same: fills are huge.
    """
    masks = tuple(_as_4d(mask) for mask in masks)
    keeps = {
        i: ~mask if inverted else mask
        for i, (mask, (_, inverted, _, _)) in enumerate(zip(masks, rules, strict=True))
        if mask.dtype == torch.bool
    }
    if len(keeps) == len(masks) and all(fill == float("-inf") for _, _, fill, _ in rules):
        visible = functools.reduce(torch.logical_and, keeps.values())
        # Inductor's C++ stores a comparison of int64 as bool ten times slower than by way of int32
        # (torch 2.13), and this one is as long as the cache.
        return _stored(visible.to(torch.int32).to(torch.uint8))
    lowest = torch.finfo(dtype).min
    wide = any(float("-inf") < fill * factor < lowest for factor, _, fill, _ in rules)
    dtype = torch.float32 if wide else dtype
    joint = torch.zeros((1, 1, 1, 1), dtype=dtype, device=masks[0].device)
    for i, (mask, (factor, _, fill, floor)) in enumerate(zip(masks, rules, strict=True)):
        if i in keeps:
            joint = torch.where(keeps[i], joint, fill * factor)
        else:
            term = mask.float() if wide else mask
            term = term if factor == 1.0 else term * factor
            joint = term if i == 0 else joint + term
        if floor > float("-inf"):  # of the sum: two masks at their lowest would be -inf
            joint = joint.clamp(min=floor * factor)
    return _stored(joint)


def blind_rows(mask: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Which rows of a `joint_mask` hide every key by -inf: bool (Bm, Hm, Sm, 1).

    `bounds` are the mask's `mask_bounds`; they take very low numbers for hidden as well.
    """
    if mask.is_floating_point():
        return mask.amax(-1, keepdim=True) == float("-inf")
    return bounds[..., 2:] == 0


def seen_by_newest(mask: torch.Tensor) -> torch.Tensor:
    """A `joint_mask` (Bm, Hm, Sm, T) as what any head of its last row sees: bool (Bm, T)."""
    least = hidden_below(mask.dtype) if mask.is_floating_point() else 0
    return (mask[:, :, -1] > least).any(1)


def _stored(mask: torch.Tensor) -> torch.Tensor:
    """The same mask, which Inductor computes into memory once.

    Each of our ops asks for exact strides, and Inductor answers with a buffer of its own for every
    use of a value that it has not stored: two whole masks per layer (torch 2.13). It stores what
    as_strided reads.
    """
    for dim in range(3):
        if isinstance(mask.stride(dim), int) and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)  # expanded: the ops broadcast it again
    mask = mask.contiguous()
    return mask.as_strided(mask.shape, mask.stride())


def _as_4d(mask: torch.Tensor) -> torch.Tensor:
    """A mask with leading dimensions of size one added, so that it has four."""
    return mask[(None,) * (4 - mask.ndim)]


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
    if mask is None:
        visible = torch.ones((1, 1, 1, cached), dtype=torch.bool, device=key.device)
    elif mask.is_floating_point():
        visible = mask > hidden_below(mask.dtype)
    else:
        visible = mask != 0
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
    visible = mask > hidden_below(mask.dtype) if mask.is_floating_point() else mask != 0
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
    if mask is None:
        visible = torch.ones((1, 1, 1, cached), dtype=torch.bool, device=key.device)
    elif mask.is_floating_point():
        visible = mask > hidden_below(mask.dtype)
    else:
        visible = mask != 0
    visible = visible[:, :1]
    number = visible.cumsum(-1, dtype=torch.int32)  # of each visible key in its row, from 1
    count = number[..., -1:]
    keep = rule.keys_of(count).to(torch.int32)
    first = keep.clamp(max=rule.sink)
    last = (keep // recent_part - rule.sink).clamp(min=rule.recent)
    last = torch.minimum(last, keep - first)
    always = visible & ((number <= first) | (number > count - last))
    between = visible & ~always
    with without_autocast(query.device.type):
        scores = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3).float() @ key.float().mT
    scores = scale * scores.unflatten(2, (-1, tokens)).flatten(1, 2)  # (B, Hq, S, T)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    scores = scores.masked_fill(~between | scores.isnan(), -torch.inf)
    slots = rule.slots(cached)
    most = torch.sym_min(slots, cached)
    best = scores.topk(most, -1).indices  # (B, Hq, S, most), best first
    turn = torch.arange(most, device=key.device)[:, None] * query_heads
    turn = (turn + torch.arange(query_heads, device=key.device)).T[None, :, None]
    never = query_heads * most
    turns = torch.full((batch, tokens, cached), never, device=key.device, dtype=torch.int64)
    for head in range(query_heads):
        named = best[:, head]
        turns = turns.scatter_reduce(-1, named, turn[:, head].expand_as(named), "amin")
    turns = torch.where(always[:, 0], -1, torch.where(between[:, 0], turns, never + 1))
    chosen = turns.topk(most, -1, largest=False).indices  # (B, S, most)
    chosen = torch.where(torch.arange(most, device=key.device) < keep[:, 0], chosen, cached)
    chosen = chosen.sort(-1).values
    chosen = torch.where(chosen < cached, chosen, -1).to(torch.int32)
    out = chosen.new_full((batch, tokens, slots), -1)
    out[..., :most] = chosen
    return out[:, None].expand(batch, heads, tokens, slots).contiguous()
