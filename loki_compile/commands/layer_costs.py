"""What one layer's attention costs on this machine, by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loki_compile.kernels.budget import Budget
from loki_compile.kernels.fused import index_rows, rows_of_group, rows_of_heads
from loki_compile.kernels.ops import attend, select
from loki_compile.observation import columns_of
from loki_compile.planning import Costs


@torch.no_grad()
def measured_costs(
    of_model: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int,
    rank: int | float | str,
    budget: Budget,
    by_probability: bool,
) -> tuple[Costs, float]:
    """Seconds of one layer's attention, by part; and of a layer that chooses for itself, by the
    greatest score.

    Args:
      of_model: query heads, KV heads and head_dim.
      tokens: cached ones; noise stands for them.
      rank: dims of the index (int8), a fraction of head_dim, or "auto".
      by_probability: how layers choose that choose for others.
    """
    rank = columns_of(rank, of_model[2])
    ways = _ways(of_model, dtype, device, tokens, rank, budget, by_probability=by_probability)
    *each, alone = _seconds(ways, device)
    return Costs(*each), alone + each[3]


def _ways(
    of_model: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    rank: int,
    budget: Budget,
    *,
    by_probability: bool,
) -> list[Callable[[], Tensor]]:
    """Dense attention, choosing by the index and by the keys, reading, and choosing by the index
    for itself alone: over noise."""
    heads, kv_heads, dims = of_model

    def noise(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(kind)

    query, keys = noise(1, heads, 1, dims), noise(1, kv_heads, tokens, dims)
    values = noise(1, kv_heads, tokens, dims)
    basis = noise(kv_heads, dims, rank, kind=torch.float32)
    index, scales = index_rows(keys, basis, torch.int8)
    words: dict[str, Any] = {
        "scale": dims**-0.5,
        "top_k": budget.top_k,
        "keep_q16": budget.keep_q16,
        "sink": budget.sink,
        "recent": budget.recent,
        "min_keys": 0,
        "per_head": False,
    }

    def choose(low: Tensor | None, rows: Tensor, summed: bool) -> Tensor:
        of_rows = None if low is None else scales
        return select(query, low, rows, of_rows, None, None, by_probability=summed, **words)

    positions = choose(basis, index, False)

    def dense() -> Tensor:
        packed = rows_of_group(query, kv_heads)
        attention = torch.nn.functional.scaled_dot_product_attention
        return rows_of_heads(attention(packed, keys, values))

    return [
        dense,
        lambda: choose(basis, index, by_probability),
        lambda: choose(None, keys, by_probability),
        lambda: attend(query, keys, values, positions, None, scale=dims**-0.5),
        lambda: choose(basis, index, False),
    ]


def _seconds(ways: Sequence[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """The least time that each took, in turns: CPU time on a CPU, which others may be using."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best = [float("inf")] * len(ways)
    for turn in range(7):
        for number, way in enumerate(ways):
            begin = clock()
            way()
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()
            if turn:
                best[number] = min(best[number], clock() - begin)
    return best
