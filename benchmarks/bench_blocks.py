"""Equal blocks compiled once against the whole graph: CPU time of compiling, and of a step.

    OMP_NUM_THREADS=1 python benchmarks/bench_blocks.py MODEL [--dtype bfloat16] [--tokens 1300]

Each decode graph of `generate` is compiled in both forms, and its steps take turns between them, so
that both see the same caches in one process. Compilers that are started count; tokens of a random
prompt. The first steps of a form are not timed.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import stamp, table, write_rows
from loki_compile.passes.graphs import copy_of
from transformers import AutoModelForCausalLM

from loki_compile import engines
from loki_compile.backend import loki

FORMS = ("by blocks", "whole")
WARM_UP = 3
COLUMNS = ["conversation", "form", "compile_cpu_s", "step_cpu_ms", "p20_ms", "more", "steps"]


def cpu_seconds() -> float:
    return sum(os.times()[:4])


class Both:
    """An engine that compiles each graph in both forms, and lets their calls take turns."""

    def __init__(self) -> None:
        self.compiled: list[list[float]] = []
        self.steps: list[tuple[list[float], list[float]]] = []

    def __call__(
        self, gm: torch.fx.GraphModule, inputs: Sequence[Any], **how: Any
    ) -> Callable[..., Any]:
        runs, seconds = [], []
        for compile_graph in (engines.inductor_by_blocks, engines.inductor):
            begin = cpu_seconds()
            fake_mode = engines.fake_mode_of(gm.graph)
            with torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
                compiled = engines.with_row_products(compile_graph)
                runs.append(compiled(copy_of(gm)[0], inputs, **how))
            seconds.append(cpu_seconds() - begin)
        steps: tuple[list[float], list[float]] = ([], [])
        self.compiled.append(seconds)
        self.steps.append(steps)

        def run(*args: Any) -> Any:
            # by blocks, whole, whole, by blocks: neither always follows the other
            form = len(steps[0]) + len(steps[1]) + 1
            form = (form // 2) % 2
            begin = time.process_time()
            outputs = runs[form](*args)
            steps[form].append(1e3 * (time.process_time() - begin))
            return outputs

        return run


def more(steps: list[float], others: list[float]) -> float:
    """The median difference to the step of the other form beside it, as a share of such a step."""
    pairs = list(zip(steps, others, strict=False))[WARM_UP:]
    return statistics.median(a - b for a, b in pairs) / statistics.median(b for _, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1300)
    parser.add_argument("--new", type=int, default=200)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    both = Both()
    model.compile(backend=functools.partial(loki, engine=both))
    high = model.config.get_text_config().vocab_size
    ids = torch.randint(high, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    rows = []
    for conversation in (1, 2):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new,
            min_new_tokens=args.new, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        for compiled, steps in zip(both.compiled, both.steps, strict=True):
            if min(map(len, steps)) > 2 * WARM_UP:
                rows += [{
                    **stamp("cpu"), "bench": "blocks", "model": args.model.split("/")[-1],
                    "dtype": args.dtype, "tokens": args.tokens, "conversation": conversation,
                    "form": form, "compile_cpu_s": seconds, "steps": len(taken),
                    "step_cpu_ms": statistics.median(taken[WARM_UP:]),
                    "p20_ms": statistics.quantiles(taken[WARM_UP:], n=5)[0],
                    "more": more(taken, steps[-1]),
                } for form, seconds, taken in zip(FORMS, compiled, steps, strict=True)]  # fmt: skip
            for taken in steps:
                taken.clear()
    print(table(rows, COLUMNS))
    print("written to", write_rows("blocks", rows))


if __name__ == "__main__":
    main()
