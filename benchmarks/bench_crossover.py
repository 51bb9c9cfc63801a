"""From how many keys on choosing an eighth of them pays: `select` and `attend` against our own
attention over all keys, one layer, CPU time of one thread.

    OMP_NUM_THREADS=1 python benchmarks/bench_crossover.py [--dtypes bfloat16 float32]

`fixed` is what both ops take over 64 keys, of which they read all; `attention`'s is beside it. An
int8 index of half the dims, as by default, of a cache with room behind its keys; ops in turn, the
least of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import stamp, table, write_rows
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.ops import attend, attention, select

LENGTHS = (64, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
SHAPES = ((3, 3, 64), (2, 4, 128))  # KV heads, query heads of each, head_dim
COLUMNS = ["kv_heads", "group", "head_dim", "dtype", "tokens", "sparse_us", "all_keys_us", "ratio"]


def ways(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    kv_heads, group, dims = shape
    made = torch.Generator().manual_seed(tokens)
    room = (1, kv_heads, 2 * tokens, dims)
    q = torch.randn((1, kv_heads * group, 1, dims), generator=made).to(dtype)
    keys, values = (torch.randn(room, generator=made).to(dtype) for _ in range(2))
    basis = torch.linalg.qr(torch.randn((kv_heads, dims, dims), generator=made)).Q
    basis = basis[..., : dims // 2].contiguous()
    index, scale = index_rows(keys, basis, torch.int8)
    assert scale is not None
    k, v, index, scale = (x[:, :, :tokens] for x in (keys, values, index, scale))
    factor = dims**-0.5

    def sparse() -> torch.Tensor:
        positions = select(
            q, basis, index, scale, None, None, scale=factor, top_k=None, keep_q16=8192, sink=4,
            recent=32, min_keys=min(tokens, 512), per_head=False,
        )  # fmt: skip
        return attend(q, k, v, positions, None, scale=factor)

    return {"sparse": sparse, "all keys": lambda: attention(q, k, v, None, scale=factor)}


def least_us(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, run in ways.items():
            begin = time.process_time()
            for _ in range(50):
                run()
            found[name] = min(found[name], 2e4 * (time.process_time() - begin))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        for dtype in args.dtypes:
            for tokens in LENGTHS:
                taken = least_us(ways(tokens, shape, getattr(torch, dtype)), args.rounds)
                rows.append({
                    **stamp("cpu"), "bench": "crossover",
                    **dict(zip(("kv_heads", "group", "head_dim"), shape, strict=True)),
                    "dtype": dtype, "tokens": tokens if tokens > 64 else "64 (fixed)",
                    "sparse_us": taken["sparse"], "all_keys_us": taken["all keys"],
                    "ratio": taken["sparse"] / taken["all keys"],
                })  # fmt: skip
    print(table(rows, COLUMNS))
    print("written to", write_rows("crossover", rows))


if __name__ == "__main__":
    main()
