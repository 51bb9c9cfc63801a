"""What one layer's attention costs on this machine, by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
    heads, kv_heads, dims = of_model
    rank = columns_of(rank, dims)

    layer = _Layer(heads, kv_heads, dims, tokens, dtype, device, rank, budget)
    ways: list[Callable[[], Tensor]] = [
        layer.dense,
        lambda: layer.choose(layer.basis, layer.index, by_probability),
        lambda: layer.choose(None, layer.keys, by_probability),
        layer.read,
        lambda: layer.choose(layer.basis, layer.index, False),
    ]
    *each, alone = _seconds(ways, device)
    return Costs(*each), alone + each[3]


class _Layer:
    """Noise in the place of one layer's queries, cache and index (int8), and what is done with
    them at a step."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dims: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
        budget: Budget,
    ) -> None:
        def noise(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=device).to(kind)

        self.budget, self.scale = budget, dims**-0.5
        self.query, self.keys = noise(1, heads, 1, dims), noise(1, kv_heads, tokens, dims)
        self.values = noise(1, kv_heads, tokens, dims)
        self.basis = noise(kv_heads, dims, rank, kind=torch.float32)
        self.index, self.scales = index_rows(self.keys, self.basis, torch.int8)
        self.positions = self.choose(self.basis, self.index, False)

    def choose(self, basis: Tensor | None, rows: Tensor, by_probability: bool) -> Tensor:
        budget = self.budget
        return select(
            self.query,
            basis,
            rows,
            None if basis is None else self.scales,
            None,
            None,
            scale=self.scale,
            top_k=budget.top_k,
            keep_q16=budget.keep_q16,
            sink=budget.sink,
            recent=budget.recent,
            min_keys=0,
            per_head=False,
            by_probability=by_probability,
        )

    def dense(self) -> Tensor:
        packed = rows_of_group(self.query, self.keys.shape[1])
        attention = torch.nn.functional.scaled_dot_product_attention
        return rows_of_heads(attention(packed, self.keys, self.values))

    def read(self) -> Tensor:
        return attend(self.query, self.keys, self.values, self.positions, None, scale=self.scale)


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
