"""A growing against a static cache: milliseconds per token of one model, sparse and dense.

    python benchmarks/bench_growing.py [--context 8192 32768] [--dtype bfloat16] [--compare REV]

The model of `bench_decode`, with a cache of random keys. Both caches in one process, in turn, so
many tokens of each at a time; "ratio" is the growing one's time per token over the
static one's. `--compare` runs another git revision as well, at the same time. CPU time of the
process, since other processes may have the rest of the machine; wall time beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from bench_decode import DTYPES, Decoder, build
from harness import checkout, importable, run_python, stamp, table, write_rows

WARM_UP, TOKENS, ROUNDS = 6, 8, 7
WAYS = {
    "sparse, top_k=1024": {"top_k": 1024},
    "sparse, top_k=0.125": {"top_k": 0.125},
    "dense": {"min_context": 1 << 30},
}


def sample(decoder: Decoder) -> tuple[float, float]:
    """Milliseconds per token: of CPU time, and on the clock."""
    before, start = time.process_time(), time.perf_counter()
    for _ in range(TOKENS):
        decoder()
    done, stop = time.process_time(), time.perf_counter()
    return 1e3 * (done - before) / TOKENS, 1e3 * (stop - start) / TOKENS


def measured(context: int, dtype: str, layers: int) -> list[dict[str, Any]]:
    """A row for each way of decoding, and for eager."""
    rows = []
    for way, options in {**WAYS, "eager": None}.items():
        torch._dynamo.reset()
        decoders = {}
        # Behind the static one, and no compiled prompt, Dynamo's first graph is for tensors of any
        # length that lie tight: the harder order.
        for kind in ("static", "dynamic"):
            model = build(DTYPES[dtype], "cpu", layers)
            step = model
            if options is not None:
                step = torch.compile(model, backend="loki", options=options)
            decoders[kind] = Decoder(model, step, kind, context, seed=0)
            for _ in range(WARM_UP):
                decoders[kind]()
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in decoders}
        for _ in range(ROUNDS):
            for kind, decoder in decoders.items():
                times[kind].append(sample(decoder))
        cpu, wall = (
            {kind: statistics.median(pair[at] for pair in pairs) for kind, pairs in times.items()}
            for at in (0, 1)
        )
        rows.append(
            {
                "context": context,
                "dtype": dtype,
                "way": way,
                "static_ms": cpu["static"],
                "growing_ms": cpu["dynamic"],
                "ratio": cpu["dynamic"] / cpu["static"],
                "wall_static_ms": wall["static"],
                "wall_growing_ms": wall["dynamic"],
                "wall_ratio": wall["dynamic"] / wall["static"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--compare", metavar="REV", help="beside this git revision")
    parser.add_argument("--rows-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rows_only or not args.compare:
        rows = [r for n in args.context for r in measured(n, args.dtype, args.layers)]
        if args.rows_only:
            return
    else:
        command = [__file__, "--rows-only", f"--dtype={args.dtype}", f"--layers={args.layers}"]
        command += ["--context", *map(str, args.context)]
        with (
            checkout(args.compare) as tree,
            importable(tree) as theirs,
            ThreadPoolExecutor() as pool,
        ):
            printed = list(pool.map(functools.partial(run_python, command), (None, theirs)))
        rows, before = (
            [json.loads(line) for line in text.splitlines() if line[:1] == "{"] for text in printed
        )
        for row, then in zip(rows, before, strict=True):
            row["growing_before_ms"] = then["growing_ms"]
            row["static_before_ms"] = then["static_ms"]
    print(table(rows, list(rows[0])))
    about = {"bench": "growing", "layers": args.layers, "against": args.compare, **stamp("cpu")}
    write_rows("growing", [{**row, **about} for row in rows])


if __name__ == "__main__":
    main()
