"""Milliseconds per decoded token of a whole model: eager, Inductor and loki, in one run.

    python benchmarks/bench_decode.py                          the README's table (about 10 minutes)
    python benchmarks/bench_decode.py --context 512 --dtype float32
    python benchmarks/bench_decode.py --cache dynamic --context 16384

The model is unmodified transformers code with random weights and a cache of random keys: 4 layers,
hidden 256, 8 query and 2 KV heads x 128 dims, vocabulary 1024, so that attention over the cache is
nearly all of the work. Quality is not measured here. Every variant is first checked: dense against
eager, and loki at full budget (`top_k=1.0`, sparse forced) against eager. "vs fastest dense" is the
ratio to the faster of eager and Inductor in the same, interleaved run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time

import torch
from harness import RESULTS, draw_lines, require, stamp, table, write_rows
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import loki_compile

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# How much slower than eager's rounding the logits of another variant may be.
LOGITS_BOUND = {torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float16: 5e-3}


def build(dtype: torch.dtype, device: str, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=1024,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


class Decoder:
    """One variant decoding from its own cache; a call is one token."""

    def __init__(self, model: LlamaForCausalLM, step, cache_kind: str, context: int, seed: int):
        self.step = step
        self.token = torch.full((1, 1), 7, device=model.device)
        self.cache = filled_cache(model, cache_kind, context, seed)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.step(self.token, past_key_values=self.cache, use_cache=True).logits


def filled_cache(model: LlamaForCausalLM, kind: str, context: int, seed: int):
    """A cache that holds `context` random tokens and room for more."""
    config, device, dtype = model.config, model.device, model.dtype
    generator = torch.Generator(device).manual_seed(seed)
    shape = (1, config.num_key_value_heads, context, config.head_dim)

    def noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if kind == "dynamic":
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(noise(), noise(), layer)
        return cache
    cache = StaticCache(config=config, max_cache_len=context + 2048)
    for layer in range(config.num_hidden_layers):
        cache.update(noise(), noise(), layer)
    return cache


def variants(top_ks: list[int | float], extra: dict) -> dict[str, dict | None]:
    """Name -> options of loki, or None for a dense path."""
    named: dict[str, dict | None] = {"eager": None, "inductor": None}
    for top_k in top_ks:
        named[f"loki top_k={top_k}"] = {"top_k": top_k, **extra}
    return named


def compiled(model: LlamaForCausalLM, name: str, options: dict | None, mode: str | None):
    if name == "eager":
        return model
    if options is None:
        return torch.compile(model, mode=mode)
    return torch.compile(model, backend="loki", mode=None, options={**options, **_mode(mode)})


def _mode(mode: str | None) -> dict:
    return {"inductor": torch._inductor.list_mode_options(mode)} if mode else {}


def check(model: LlamaForCausalLM, cache_kind: str, context: int, mode: str | None) -> None:
    """Loki with every key in its budget, sparse forced, gives eager's logits."""
    eager = Decoder(model, model, cache_kind, context, seed=1)
    options = {"top_k": 1.0, "min_context": 0}
    step = compiled(model, "loki", options, mode)
    sparse = Decoder(model, step, cache_kind, context, seed=1)
    for _ in range(3):
        require("loki at full budget", sparse(), eager(), LOGITS_BOUND[model.dtype])


def time_rounds(
    decoders: dict[str, Decoder], device: str, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds per token: each round times every variant once, over `steps` tokens in a row."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                decoder()
            _synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e3 / steps)
    return times


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run(args: argparse.Namespace, dtype_name: str, context: int) -> list[dict]:
    torch._dynamo.reset()
    dtype, device = DTYPES[dtype_name], args.device
    model = build(dtype, device, args.layers)
    check(model, args.cache, min(context, 3000), args.mode)
    extra = {"rank": args.rank, "index_dtype": args.index_dtype}
    decoders: dict[str, Decoder] = {}
    for seed, (name, options) in enumerate(variants(args.top_k, extra).items()):
        step = compiled(model, name, options, args.mode)
        decoders[name] = Decoder(model, step, args.cache, context, seed)
        for _ in range(4):  # compiles, fits the basis, builds the index
            decoders[name]()
        gc.collect()
    before = loki_compile.stats()
    times = time_rounds(decoders, device, args.rounds, args.steps)
    after = loki_compile.stats()
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    dense = min(medians["eager"], medians["inductor"])
    shared = {
        **stamp(device),
        "bench": "decode",
        "cache": args.cache,
        "dtype": dtype_name,
        "context": context,
        "layers": args.layers,
        "rank": args.rank,
        "index_dtype": args.index_dtype,
        "mode": args.mode,
        "rounds": args.rounds,
        "sparse_steps": after["sparse_steps"] - before["sparse_steps"],
        "rebuilds": after["rebuilds"] - before["rebuilds"],
    }
    return [
        {
            **shared,
            "variant": name,
            "median_ms": medians[name],
            "min_ms": min(samples),
            "max_ms": max(samples),
            "vs_fastest_dense": dense / medians[name],
        }
        for name, samples in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096, 16384, 131072])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--cache", default="static", choices=["static", "dynamic"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--top-k", type=_number, nargs="+", default=[1024, 0.125])
    parser.add_argument("--rank", type=_number, default=0.25)
    parser.add_argument("--index-dtype", default="auto", choices=["auto", "int8"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=4, help="tokens per timed sample")
    parser.add_argument("--mode", default=None, help="torch.compile mode of Inductor and loki")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="decode", help="file under benchmarks/results/")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # one code object, many variants
    rows: list[dict] = []
    for dtype, context in itertools.product(args.dtype, args.context):
        new = run(args, dtype, context)
        rows += new
        columns = ["dtype", "context", "variant", "median_ms", "vs_fastest_dense", "rebuilds"]
        print(table(new, columns), flush=True)
    print("written to", write_rows(args.name, rows))
    if len(args.context) > 1:
        draw(rows, args)


def draw(rows: list[dict], args: argparse.Namespace) -> None:
    """One picture per dtype: milliseconds per token against cached tokens."""
    for dtype in args.dtype:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["dtype"] == dtype:
                series.setdefault(row["variant"], []).append((row["context"], row["median_ms"]))
        draw_lines(
            RESULTS / f"{args.name}_{dtype}.png",
            series,
            title=f"Decoding, {args.layers} layers, {dtype}, {rows[0]['device']}",
            x_label="cached tokens",
            y_label="milliseconds per token",
        )


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


if __name__ == "__main__":
    main()
