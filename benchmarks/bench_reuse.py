"""Attention time per token of a whole model, where every layer chooses and where few do.

    OMP_NUM_THREADS=1 python benchmarks/bench_reuse.py [--tokens 32768 131072] [--top-k 0.125 512]

One layer's dense attention, choosing and reading are timed in turn in one process (CPU time, the
least of several turns: other work on the machine does not count); a plan's time is the sum over
its layers. Noise for keys, as times do not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_policies import number
from harness import stamp, table, write_rows
from loki_compile.kernels.fused import rows_of_group
from loki_compile.kernels.ops import attend, select
from loki_compile.pca_store.layer_plan import read_plan
from torch import Tensor

from loki_compile import LokiConfig
from loki_compile.policies.kinds import Kind, kind_of
from loki_compile.policies.presets import preset


def parts(args: argparse.Namespace, tokens: int, top_k: int | float) -> dict[str, float]:
    """Milliseconds of CPU time of one layer: dense, choosing by each ranking, reading."""
    dtype = getattr(torch, args.dtype)
    heads, kv_heads, dims = args.heads
    q = torch.randn(1, heads, 1, dims).to(dtype)
    k, v = (torch.randn(1, kv_heads, tokens, dims).to(dtype) for _ in range(2))
    rank = dims // 4
    index, basis = (
        torch.randn(1, kv_heads, tokens, rank).to(dtype),
        torch.randn(kv_heads, dims, rank),
    )
    budget = LokiConfig(top_k=top_k).budget
    words: dict[str, Any] = {
        "scale": dims**-0.5, "top_k": budget.top_k, "keep_q16": budget.keep_q16, "sink": 4,
        "recent": 32, "min_keys": 0, "per_head": False,
    }  # fmt: skip

    def chosen(low: Tensor | None, rows: Tensor, **more: Any) -> Tensor:
        return select(q, low, rows, None, None, None, **{**words, **more})

    positions = chosen(basis, index)
    packed = rows_of_group(q, kv_heads)
    ways: dict[str, Callable[[], Any]] = {
        "dense": lambda: torch.softmax(packed @ k.mT * dims**-0.5, -1) @ v,
        "loki": lambda: chosen(basis, index),
        "oracle": lambda: chosen(None, k, by_probability=True),
        "read": lambda: attend(q, k, v, positions, None, scale=dims**-0.5),
    }
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(args.turns + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            if turn:
                best[name] = min(best[name], 1e3 * (time.process_time() - begin))
    return best


def time_of(ms: dict[str, float], kinds: list[Kind]) -> float:
    chooses = sum(ms[kind.ranking] for kind in kinds if kind.ranking)
    return chooses + sum(ms["dense" if kind.dense else "read"] for kind in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--top-k", type=number, nargs="+", default=[0.125, 512])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], help="query, KV, dims")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--plan", help="a plan file of `loki tune`, for a row of its own")
    args = parser.parse_args()
    plans = {name: preset(name, args.layers) for name in ("tidal", "tidal-published", "kascade")}
    if args.plan:
        plans["tuned"] = [kind_of(layer.word) for layer in read_plan(args.plan).layers]
    rows = []
    for tokens in args.tokens:
        for top_k in args.top_k:
            ms = parts(args, tokens, top_k)
            every = args.layers * (ms["loki"] + ms["read"])
            row = {"tokens": tokens, "top_k": top_k, "dense": args.layers * ms["dense"]}
            row |= {"loki": every} | {name: time_of(ms, kinds) for name, kinds in plans.items()}
            row |= {f"{name} faster": every / row[name] for name in plans}
            rows.append(row | {f"layer: {name}": value for name, value in ms.items()})
            print(table([row], list(row)), flush=True)
    write_rows("reuse_time", [{**row, "layers": args.layers, **stamp("cpu")} for row in rows])


if __name__ == "__main__":
    main()
