"""What prefill="spans" saves of a prompt's time, and what it costs in quality.

    python benchmarks/bench_span_prefill.py layer --tokens 4096 --tokens 8192
    python benchmarks/bench_span_prefill.py model MODEL --text FILE --tokens 4096

`layer`: CPU seconds of one layer's attention (9 query and 3 KV heads x 64, fp32), dense by SDPA and
by spans, sides in turn, the best of some rounds. `model`: CPU seconds to the logits of a prompt,
through the backend, and the loss of its tokens behind the first quarter. One thread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from loki_compile.kernels.ops import prefill
from loki_compile.kernels.span_prefill import flat_lines
from loki_compile.kernels.spans import Spans, heads_from

DENSITIES = (0.5, 0.25, 0.125)
SINK = 64


def cpu_seconds(run: Any) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def layer(tokens: int, rounds: int) -> None:
    q, k, v = (torch.randn(1, heads, tokens, 64) for heads in (9, 3, 3))

    def dense() -> None:
        keys, values = (x.repeat_interleave(3, 1) for x in (k, v))
        torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True)

    def by(density: float) -> Any:
        spans = Spans(heads_from(",".join([f"{density}N"] * 3)), SINK)
        lines = flat_lines(spans, 3)
        return lambda: prefill(
            q, k, v, None, None, scale=0.125, lines=lines, sink=SINK, recent=32, min_keys=1024
        )

    ways = {"dense": dense, **{f"{density:.1%}": by(density) for density in DENSITIES}}
    for run in ways.values():  # compile
        run()
    best = {
        name: min(seconds)
        for name, seconds in zip(
            ways,
            zip(*[[cpu_seconds(run) for run in ways.values()] for _ in range(rounds)], strict=True),
            strict=True,
        )
    }
    for name, seconds in best.items():
        print(f"{tokens} tokens, {name}: {seconds:.3f} s, {seconds / best['dense']:.2f} of dense")


@torch.no_grad()
def model(path: str, text: str, tokens: int, rounds: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    tokenizer = AutoTokenizer.from_pretrained(path)
    with open(text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise SystemExit(f"{text} has {ids.shape[1]} tokens; needed {tokens}.")
    ways: dict[str, Any] = {}
    for name in ("dense", *(f"{density:.1%}" for density in DENSITIES)):
        ways[name] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        options: dict[str, Any] = {}
        if name != "dense":
            density = float(name.rstrip("%")) / 100
            options = {"policy": f"moa:{SINK}:{density}N", "prefill": "spans"}
        ways[name].compile(backend="loki", options=options)
    first = tokens // 4
    losses, seconds = {}, {name: [] for name in ways}
    for number in range(rounds):
        for name, one in ways.items():
            began = time.process_time()
            keep = 0 if number == 0 else 1
            logits = one(ids, past_key_values=DynamicCache(), logits_to_keep=keep).logits
            if number:  # the first call traces and compiles
                seconds[name].append(time.process_time() - began)
                print(f"round {number}, {name}: {seconds[name][-1]:.2f} s", flush=True)
                continue
            targets = ids[0, first + 1 :]
            losses[name] = torch.nn.functional.cross_entropy(logits[0, first:-1], targets).item()
            print(f"{name}: loss {losses[name]:.4f}", flush=True)
    best = {name: min(taken) for name, taken in seconds.items()}
    for name in ways:
        print(
            f"{tokens} tokens, {name}: {best[name]:.2f} s, {best[name] / best['dense']:.2f} of "
            f"dense; loss {losses[name]:.4f} ({losses[name] - losses['dense']:+.4f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("layer", "model"))
    parser.add_argument("path", nargs="?", default="")
    parser.add_argument("--text", default="/usr/share/common-licenses/GPL-3")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in given.tokens or [4096]:
        if given.what == "layer":
            layer(tokens, given.rounds)
        else:
            model(given.path, given.text, tokens, given.rounds)


if __name__ == "__main__":
    main()
