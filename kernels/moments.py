"""Plain torch that Inductor fuses with a prompt: the second moment of its queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loki_compile.kernels.masks import as_4d
from loki_compile.kernels.ops import hidden_below, without_autocast
from torch import Tensor

# Rows of a prompt that the moments of its queries are taken from: the work of that many rows at
# most, in a prompt of thousands. A basis for 64 dims is no worse from 32 rows of three heads.
MOMENT_ROWS = 256


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
    for mask, (factor, inverted) in zip(map(as_4d, masks), rules, strict=True):
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
