"""What products of few rows cost: a library's, and sums that Inductor vectorises.

    OMP_NUM_THREADS=1 python benchmarks/bench_row_products.py [--dtype bfloat16] [--rows 1 2 4]
    OMP_NUM_THREADS=1 python benchmarks/bench_row_products.py --changing --rows 2 3 4 5 8

A decoder without attention (norms, seven products a layer, a gated MLP), compiled in each way with
weights that no cache holds; CPU milliseconds of a step (with one thread), the least of rounds in
turn, and GB/s of weights. Both are compared with fp64 first. What has too many rows or dims for a
sum stays a library's; `--changing`: in a graph for any number of rows, where all of 1024 dims and
fewer are sums, of whatever dtype.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import require, stamp, table, write_rows
from loki_compile.kernels.row_products import (
    MAX_CHANGING_DIMS,
    is_few,
    row_products,
    row_products_of_any,
)
from torch import Tensor

SHAPES = {"small": (576, 192, 1536, 12), "large": (2304, 768, 9216, 2)}  # hidden, KV, MLP, layers
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
Product = Callable[[Tensor, Tensor], Tensor]


def as_compiled(x: Tensor, weight: Tensor) -> Tensor:
    """The product as `backend="loki"` has it compiled."""
    few = is_few(x.shape[0], x.shape[-1], x.dtype)
    return row_products(x, weight) if few else F.linear(x, weight)


def of_any_number(x: Tensor, weight: Tensor) -> Tensor:
    """The product in a graph for any number of rows."""
    few = x.shape[-1] <= MAX_CHANGING_DIMS
    return row_products_of_any(x, weight) if few else F.linear(x, weight)


class Decoder(torch.nn.Module):
    def __init__(self, shape: str, product: Product) -> None:
        super().__init__()
        hidden, kv, mlp, layers = SHAPES[shape]
        self.product = product
        sizes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        sizes += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(n, k, generator=generator) / k**0.5, requires_grad=False)
            for _ in range(layers)
            for n, k in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        for weights in self.of_layers():
            q, k, v, o, gate, up, down = weights
            h = F.rms_norm(x, x.shape[-1:])
            attended = self.product(h, q).sin() + self.product(h, k).repeat(1, 1, 3)
            x = x + self.product(attended + self.product(h, v).repeat(1, 1, 3), o)
            h = F.rms_norm(x, x.shape[-1:])
            x = x + self.product(F.silu(self.product(h, gate)) * self.product(h, up), down)
        return x

    def of_layers(self) -> Iterator[list[Tensor]]:
        weights = list(self.weights)
        yield from (weights[at : at + 7] for at in range(0, len(weights), 7))


def measured(
    shape: str, dtype: torch.dtype, rows: int, rounds: int, changing: bool
) -> dict[str, Any]:
    x = torch.randn(rows, 1, SHAPES[shape][0]).to(dtype)
    if changing:
        torch._dynamo.mark_dynamic(x, 0)
    sums = of_any_number if changing else as_compiled
    models = {
        name: Decoder(shape, product).to(dtype).eval()
        for name, product in (("library", F.linear), ("sums", sums))
    }
    truth = models["library"].double()(x.double())
    models["library"].to(dtype)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, float] = {}
    calls = {}
    for name, model in models.items():
        torch._dynamo.reset()
        calls[name] = torch.compile(model)
        require(name, calls[name](x), truth, BOUNDS[dtype])
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            for _ in range(5):
                call(x)
            best[name] = min(best.get(name, 1e9), (clock() - began) / 5)
    size = sum(w.numel() * w.itemsize for w in models["sums"].weights)
    row: dict[str, Any] = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "rows": rows}
    row["changing"] = changing
    for name, seconds in best.items():
        row |= {f"{name}_ms": 1e3 * seconds, f"{name}_gb_s": size / seconds / 1e9}
    return {**row, "ratio": best["library"] / best["sums"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32", "float16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--changing", action="store_true", help="graphs for any number of rows")
    args = parser.parse_args()
    found = []
    with torch.no_grad():
        for shape in args.shape:
            for dtype in args.dtype:
                for rows in args.rows:
                    found.append(
                        measured(shape, getattr(torch, dtype), rows, args.rounds, args.changing)
                    )
                    print(found[-1], flush=True)
    print(table(found, list(found[0])))
    about = {"threads": torch.get_num_threads(), **stamp("cpu")}
    write_rows("row_products", [{**row, **about} for row in found])


if __name__ == "__main__":
    main()
