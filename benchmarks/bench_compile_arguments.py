"""Every documented argument of torch.compile and model.compile, with both caches.

    python benchmarks/bench_compile_arguments.py [--only static] [--modes default reduce-overhead]

A tiny decoder at default options, 1103 cached tokens, two conversations. For each combination:
graphs and recompilations of backend="loki" beside those of backend="inductor" in the same loop,
sparse steps, and the largest difference of the logits from the uncompiled model's where every key
is in the budget (`min_context=0, top_k=1.0`; torch.compile takes options or a mode, so that a mode
is compared at its default budget, which is no equality: not given). A combination that
torch.compile itself refuses is a row too.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import stamp, table, write_rows
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import loki_compile

CACHED, STEPS = 1103, 4
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COLUMNS = ["cache", "how", "dynamic", "fullgraph", "mode", "strict", "graphs", "inductor_graphs",
           "recompiles", "inductor_recompiles", "sparse_steps", "steps", "max_error",
           "error", "inductor_error"]  # fmt: skip


def new_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decode(model: Any, step: Callable[..., Any], kind: str) -> torch.Tensor:
    """Logits (STEPS,V) behind a prompt that runs uncompiled, as `generate` has it."""
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=CACHED + STEPS + 8)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 64, (1, CACHED + STEPS), generator=generator)
    LlamaForCausalLM.forward(model, ids[:, :CACHED], past_key_values=cache, logits_to_keep=1)
    rows = []
    for token in ids[:, CACHED:].split(1, 1):
        token = token.clone(memory_format=torch.contiguous_format)  # a slice's strides are guarded
        rows.append(step(token, past_key_values=cache).logits[0])
    return torch.cat(rows)


def run(how: str, kind: str, **arguments: Any) -> dict[str, Any]:
    """Two conversations in a process that has compiled nothing."""
    torch._dynamo.reset()
    counters.clear()
    loki_compile.reset_stats()
    model = new_model()
    out: dict[str, Any] = {"error": ""}
    start = time.perf_counter()
    try:
        if how == "model.compile":
            model.compile(**arguments)
            step = model
        elif how == "torch.compile(model)":
            step = torch.compile(model, **arguments)
        else:
            step = torch.compile(model.forward, **arguments)
        decode(model, step, kind)
        out["logits"] = decode(model, step, kind)
    except Exception as error:
        out["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]
    graphs = counters["stats"]["unique_graphs"]
    return {
        **out,
        "graphs": graphs,
        "recompiles": max(0, graphs - 1),
        "sparse_steps": loki_compile.stats()["sparse_steps"],
        "seconds": time.perf_counter() - start,
    }


def cases() -> Iterator[dict[str, Any]]:
    hows = ("model.compile", "torch.compile(model)", "torch.compile(model.forward)")
    for kind, dynamic, fullgraph in itertools.product(
        ("static", "growing"), (None, True, False), (False, True)
    ):
        common = {"cache": kind, "dynamic": dynamic, "fullgraph": fullgraph, "how": hows[0]}
        for mode in MODES:
            yield {**common, "mode": mode, "strict": False}
        yield {**common, "mode": "default", "strict": True}
        if dynamic is None and not fullgraph:
            for how in hows[1:]:
                yield {**common, "how": how, "mode": "default", "strict": False}
            yield {**common, "mode": "reduce-overhead", "strict": True}


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    kind, how = case["cache"], case["how"]
    arguments = {"dynamic": case["dynamic"], "fullgraph": case["fullgraph"]}
    if case["mode"] != "default":
        arguments["mode"] = case["mode"]
    theirs = run(how, kind, backend="inductor", **arguments)
    options = {"strict": True} if case["strict"] else None
    ours = run(how, kind, backend="loki", options=options, **arguments)
    error = None
    if case["mode"] == "default" and not ours["error"]:
        options = {**(options or {}), "min_context": 0, "top_k": 1.0}
        got = run(how, kind, backend="loki", options=options, **arguments)
        model = new_model()
        error = float((got["logits"] - decode(model, model, kind)).abs().max())
    return {
        **case,
        "graphs": ours["graphs"],
        "inductor_graphs": theirs["graphs"],
        "recompiles": ours["recompiles"],
        "inductor_recompiles": theirs["recompiles"],
        "sparse_steps": ours["sparse_steps"],
        "steps": 2 * STEPS,
        "max_error": error,
        "error": ours["error"],
        "inductor_error": theirs["error"],
        "seconds": ours["seconds"],
        "inductor_seconds": theirs["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("static", "growing"))
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    args = parser.parse_args()
    rows = []
    for case in cases():
        if args.only in (None, case["cache"]) and case["mode"] in args.modes:
            row = {**stamp("cpu"), "bench": "compile_arguments", **measured(case)}
            rows.append(row)
            print("written to", write_rows("compile_arguments", [row]), flush=True)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    main()
