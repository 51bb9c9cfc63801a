"""Rows of bench_kernels and of bench_decode beside those of another revision: CPU time, in turn.

    OMP_NUM_THREADS=1 python benchmarks/bench_before.py kernels REV [--rounds 5]
    OMP_NUM_THREADS=1 python benchmarks/bench_before.py decode REV --dtype float32 --cache dynamic

Each side is a process that takes the shapes and ways of its own revision's benchmarks, and is asked
for one round at a time: what else runs on the machine meets both. Milliseconds of CPU time of one
thread, the median of rounds, and the ratio of this tree to the revision. Decoding is by two layers
of bench_decode's model with the index of before (`rank=0.25`, of the cache's dtype).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
READY = "ready"
SAMPLE_S = {"kernels": 0.01, "decode": 0.15}


def kernel_calls(tokens: list[int]) -> dict[str, Callable[[], Any]]:
    import torch
    from bench_kernels import Shape, choose, make_inputs, read

    calls: dict[str, Callable[[], Any]] = {}
    kinds = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8)]
    kinds.append((torch.float32, torch.float32))
    for cached in tokens:
        for top_k in (512, 4096):
            for dtype, index in kinds:
                shape = Shape(1, 2, 4, cached, 128, top_k, 32, dtype, index)
                x = make_inputs(shape, "cpu", 0)
                at = choose(x, shape)
                what = f"{cached} {top_k} {str(dtype)[6:]}/{str(index)[6:]}"
                calls[f"select {what}"] = lambda x=x, shape=shape: choose(x, shape)
                calls[f"attend {what}"] = lambda x=x, shape=shape, at=at: read(x, shape, at)
                calls[f"both {what}"] = lambda x=x, shape=shape: read(x, shape, choose(x, shape))
    return calls


def decode_calls(tokens: list[int], dtype: str, cache: str) -> dict[str, Callable[[], Any]]:
    import bench_decode
    import torch

    from loki_compile.config import LokiConfig

    torch._dynamo.config.recompile_limit = 64  # one code object, many variants
    of_cache = "auto"  # as the index's dtype was called before "auto" was int8
    try:
        LokiConfig(index_dtype="cache")
        of_cache = "cache"
    except ValueError:
        pass
    ways = bench_decode.variants([1024, 0.125], {"rank": 0.25, "index_dtype": of_cache})
    calls: dict[str, Callable[[], Any]] = {}
    for cached in tokens:
        for seed, (name, way) in enumerate(ways.items()):
            if way.loki is None and name != "packed matmul":
                continue  # neither side's code
            model = bench_decode.build(bench_decode.DTYPES[dtype], "cpu", 2, way.attention)
            step = bench_decode.decode_step(model, way, None)
            decoder = bench_decode.Decoder(model, step, cache, cached, seed)
            for _ in range(4):  # compiles, fits the basis, builds the index
                decoder()
            calls[f"{name} {cached} {dtype} {cache}"] = decoder
    return calls


def serve(args: argparse.Namespace) -> None:
    """A side: a line of milliseconds for each line that is read."""
    import torch

    torch.set_num_threads(1)
    if args.rows == "kernels":
        calls = kernel_calls(args.context)
    else:
        calls = decode_calls(args.context, args.dtype, args.cache)
    print(READY, flush=True)
    for _ in sys.stdin:
        found = {}
        for name, call in calls.items():
            call()
            number, start, spent = 0, time.thread_time(), 0.0
            while spent < SAMPLE_S[args.rows]:
                call()
                number += 1
                spent = time.thread_time() - start
            found[name] = 1e3 * spent / number
        print(json.dumps(found), flush=True)


class Side:
    """The process of one revision."""

    def __init__(self, tree: Path, env: dict[str, str], words: list[str]) -> None:
        command = [sys.executable, __file__, *words, "--tree", str(tree)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tree
        )
        self.until(READY)

    def until(self, begins: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(begins):
                return line
        raise RuntimeError(f"a side ended with {self.process.wait()}; its own words are above.")

    def round(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.until("{"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", choices=SAMPLE_S)
    parser.add_argument("revision")
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--cache", default="static", choices=["static", "dynamic"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tree is not None:
        sys.path.insert(0, str(args.tree / "benchmarks"))
        serve(args)
        return
    from harness import checkout, importable, table

    here = HERE.parent
    with checkout(args.revision) as tree, importable(tree) as theirs, importable(here) as ours:
        sides = [Side(tree, theirs, sys.argv[1:]), Side(here, ours, sys.argv[1:])]
        rounds: list[list[dict[str, float]]] = [[], []]
        for number in range(args.rounds):
            for side in (0, 1) if number % 2 else (1, 0):
                rounds[side].append(sides[side].round())
    rows = []
    for name in rounds[1][0]:
        before, now = (statistics.median(found[name] for found in side) for side in rounds)
        rows.append({"what": name, args.revision: before, "now": now, "ratio": now / before})
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
