"""The CPU kernels, compiled for other instruction sets than this processor's: select and attend.

    OMP_NUM_THREADS=1 python benchmarks/bench_instruction_sets.py            about 2 minutes
    OMP_NUM_THREADS=1 python benchmarks/bench_instruction_sets.py --march x86-64-v3 x86-64

One layer, 4 KV heads x 128, one token; `select` over 16384 tokens by an index of 32 dims, `exact`
by the keys of 8192, top_k 1024; `attend` over 1024 keys of 16384; `attention` over all of 4096.
Each row has the median CPU microseconds of a call by each build, their calls taking turns, over
four sets of inputs, and the ratio to this processor's own build.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from harness import table
from loki_compile.kernels import cpu, cpu_build
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.ops import KEEP_ALL_Q16

HEADS, DIMS, RANKS, TOP_K, SETS = 4, 128, 32, 1024, 4
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
OPTIONS = dict(
    scale=0.125, top_k=TOP_K, keep_q16=KEEP_ALL_Q16, sink=4, recent=32, min_keys=0, per_head=False
)
Call = Callable[[], object]


def select_call(dtype: torch.dtype, group: int, exact: bool) -> Call:
    float_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
    q = torch.randn(1, HEADS * group, 1, DIMS).to(float_dtype)
    keys = torch.randn(1, HEADS, 8192 if exact else 16384, DIMS).to(float_dtype)
    if exact:
        return lambda: cpu.select(q, None, keys, None, None, None, **OPTIONS)
    basis = torch.randn(HEADS, DIMS, RANKS) / DIMS**0.5
    index, scale = index_rows(keys, basis, dtype)
    return lambda: cpu.select(q, basis, index, scale, None, None, **OPTIONS)


def attend_call(dtype: torch.dtype, group: int, chosen: bool) -> Call:
    tokens = 16384 if chosen else 4096
    q = torch.randn(1, HEADS * group, 1, DIMS).to(dtype)
    k, v = (torch.randn(1, HEADS, tokens, DIMS).to(dtype) for _ in "kv")
    positions = None
    if chosen:
        lists = [torch.randperm(tokens)[:TOP_K].sort().values for _ in range(HEADS)]
        positions = torch.stack(lists).view(1, HEADS, 1, TOP_K).int()
    return lambda: cpu.attend(q, k, v, positions, None, scale=0.1)


def cases() -> Iterator[tuple[str, torch.dtype, int, Callable[[], Call]]]:
    for group in (1, 4, 8):
        for dtype in (torch.int8, *FLOATS):
            yield "select", dtype, group, lambda d=dtype, g=group: select_call(d, g, False)
        for dtype in FLOATS:
            yield "exact", dtype, group, lambda d=dtype, g=group: select_call(d, g, True)
            yield "attend", dtype, group, lambda d=dtype, g=group: attend_call(d, g, True)
            yield "attention", dtype, group, lambda d=dtype, g=group: attend_call(d, g, False)


def library(march: str) -> object:
    flags = [f"-march={march}" if f.startswith("-march") else f for f in cpu_build._FLAGS]
    with mock.patch.object(cpu_build, "_FLAGS", tuple(flags)):
        return cpu.declare(cpu_build.load())


def timed(calls: list[Call], libraries: dict[str, object], rounds: int) -> dict[str, float]:
    """Median CPU microseconds of a call by each library."""
    taken: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(rounds):
        for name, kernels in libraries.items():
            with mock.patch.object(cpu, "_kernels", lambda _, kernels=kernels: kernels):
                begin = time.process_time()
                for call in calls:
                    call()
                taken[name].append((time.process_time() - begin) / len(calls) * 1e6)
    return {name: statistics.median(each) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--march", nargs="+", default=["x86-64-v3"])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    libraries = {march: library(march) for march in ("native", *args.march)}
    rows = []
    for op, dtype, group, make in cases():
        us = timed([make() for _ in range(SETS)], libraries, args.rounds)
        row = {"op": op, "dtype": str(dtype)[6:], "group": group}
        row |= {f"{name} us": round(each) for name, each in us.items()}
        row |= {f"{name} ratio": round(us[name] / us["native"], 2) for name in args.march}
        rows.append(row)
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
