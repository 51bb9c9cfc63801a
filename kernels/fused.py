"""Plain torch around the two ops, which Inductor fuses with the graph: rows, layouts, maps.

`masks`, `positions` and `moments` are more of it. Nothing here knows a graph.
`loki_compile.kernels` has the legend of the letters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from loki_compile.kernels.ops import without_autocast
from torch import Tensor

# What each dimension of a tensor of attention holds, outermost first: "b" batch, "h" heads, "s" new
# tokens, "t" cached tokens, "d" head_dim. Where each KV head's group of query heads has a dimension
# of its own, that is "g", and "h" are the KV heads. "bh" is batch and heads in one dimension, "" a
# dimension of size one; a letter that is missing everywhere has size one, too.
Layout = tuple[str, ...]
SCORES: Layout = ("b", "h", "s", "t")
QUERIES: Layout = ("b", "h", "s", "d")
_INT8_MAX = 127


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
    return _projected(_computed(source), basis, head_axis, dtype, batch_axis)


def _computed(x: torch.Tensor) -> torch.Tensor:
    """`x` in memory of its own, which as_strided makes Inductor lay out: where a CPU's product is a
    loop, it would compute what makes the keys, sines and cosines, again inside of that."""
    laid_out = x.clone(memory_format=torch.contiguous_format)
    return torch.as_strided(laid_out, laid_out.shape, laid_out.stride())


def _projected(
    source: torch.Tensor, basis: torch.Tensor, head_axis: int, dtype: torch.dtype, batch_axis: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if head_axis == source.ndim - 1:
        apart = source.unflatten(-1, (basis.shape[-3], -1))
        rows, scale = _projected(apart, basis, head_axis, dtype, batch_axis)
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
