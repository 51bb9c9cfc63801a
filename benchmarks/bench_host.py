"""What the runtime costs the host at each step: per layer, for the sparse and the dense variant.

    python benchmarks/bench_host.py [--layers 32] [--compare REV]

The time of each call of a decode graph without that of the compiled function in it: looking at the
arguments, finding indexes and telling whether they are true, tying them to what the step has left
behind. Graphs run node by node, and the time within them is taken off, so that what is left is
the host's alone. Microseconds of CPU time of the thread that decodes.
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
from harness import checkout, importable, run_python, stamp, table, write_rows
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from loki_compile.backend import loki

CONTEXT, WARM_UP, STEPS = 1500, 5, 60


class Clock:
    """Seconds within decode graphs, and of those the seconds within compiled functions."""

    def __init__(self) -> None:
        self.inside = self.compiled = 0.0

    def engine(self, gm, inputs, **_):
        def run(*args):
            start = time.thread_time()
            try:
                return gm(*args)
            finally:
                self.compiled += time.thread_time() - start

        return run

    def backend(self, gm, inputs, **options):
        call = loki(gm, inputs, engine=self.engine, options=options.get("options"))

        def run(*args):
            start = time.thread_time()
            try:
                return call(*args)
            finally:
                self.inside += time.thread_time() - start

        return run


def make_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def microseconds(layers: int, kind: str, variant: str, mode: str) -> tuple[float, float]:
    """Of the host per layer and step: median, and 80th percentile."""
    torch._dynamo.reset()
    model, clock = make_model(layers), Clock()
    options = {} if variant == "sparse" else {"min_context": 4096}
    step = torch.compile(model.forward, backend=functools.partial(clock.backend, options=options))
    ids = torch.randint(64, (1, CONTEXT))
    cache = (
        StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS + WARM_UP + 4096)
        if kind == "static"
        else DynamicCache(config=model.config)
    )
    around = torch.no_grad if mode == "no_grad" else torch.inference_mode
    times = []
    with around():
        model.forward(ids, past_key_values=cache, logits_to_keep=1)
        for number in range(WARM_UP + STEPS):
            before = clock.inside - clock.compiled
            step(ids[:, :1], past_key_values=cache)
            if number >= WARM_UP:
                times.append(clock.inside - clock.compiled - before)
    each = sorted(1e6 * seconds / layers for seconds in times)
    return statistics.median(each), each[len(each) * 4 // 5]


def measured(layers: int) -> list[dict[str, Any]]:
    """A row for each cache, variant and mode."""
    rows = []
    for kind in ("static", "growing"):
        for variant in ("sparse", "dense"):
            for mode in ("no_grad", "inference_mode"):
                median, p80 = microseconds(layers, kind, variant, mode)
                what = {"cache": kind, "variant": variant, "mode": mode}
                rows.append({**what, "us_per_layer": median, "p80": p80})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compare", metavar="REV", help="time against this git revision")
    parser.add_argument("--rows-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compare:  # both at once, so that neither has the machine to itself
        command = [__file__, "--rows-only", f"--layers={args.layers}"]
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
            row["before"] = then["us_per_layer"]
            row["ratio"] = row["us_per_layer"] / row["before"]
    else:
        rows = measured(args.layers)
    if args.rows_only:
        for row in rows:
            print(json.dumps(row))
        return
    columns = list(rows[0])
    print(table(rows, columns))
    about = {"layers": args.layers, "against": args.compare, **stamp("cpu")}
    write_rows("host", [{**row, **about} for row in rows])


if __name__ == "__main__":
    main()
