"""Plain torch on masks, which Inductor fuses with the graph: several as one, and where keys lie.

Nothing here knows a graph. `loki_compile.kernels` has the legend of the letters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from loki_compile.kernels.fused import SCORES, Layout, rows_of_group, tiles_to_blocks
from loki_compile.kernels.ops import hidden_below
from torch import Tensor


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


def joint_mask(
    rules: Sequence[tuple[float, bool, float, float]], dtype: torch.dtype, *masks: torch.Tensor
) -> torch.Tensor:
    """One 4-D mask that does what several do one after the other.

    `rules` has factor, inverted, fill and floor of each, as in `MaskTerm`. uint8 (1 = visible)
    where all are bool and fill with -inf, else floating, `dtype` where no mask has one, or float32
    where that would make -inf of a fill. A score is added to the fill instead of replaced by it,
    which rounds to the same: fills are huge.
    """
    masks = tuple(as_4d(mask) for mask in masks)
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


def as_4d(mask: torch.Tensor) -> torch.Tensor:
    """A mask with leading dimensions of size one added, so that it has four."""
    return mask[(None,) * (4 - mask.ndim)]


def mask_of_group(mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """A mask whose rows are the query heads of the group instead of the one query token."""
    mask = as_4d(mask)
    return mask if mask.shape[1] == 1 else rows_of_group(mask, kv_heads)
