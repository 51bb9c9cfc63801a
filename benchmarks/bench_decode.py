"""Milliseconds per decoded token of a whole model: dense paths and loki, in one run.

    python benchmarks/bench_decode.py                         the table of docs/measured.md, 10 min
    python benchmarks/bench_decode.py --context 512 --dtype float32
    python benchmarks/bench_decode.py --cache dynamic --context 16384

The model is unmodified transformers code with random weights and a cache of random keys: 4 layers,
hidden 256, 8 query and 2 KV heads x 128 dims, vocabulary 1024, so that attention over the cache is
nearly all of the work. Quality is not measured here. The dense paths are eager, Inductor, loki's
dense variant, and attention written as two matmuls over packed query groups, which no library takes
by itself, eager and through Inductor. Every path is first checked against eager, and so is loki at
full budget (`top_k=1.0`, sparse forced). Rounds are interleaved; a sample is 0.15 s of tokens after
0.1 s that are not timed, so that each path is as it is while it decodes. "vs_fastest_dense" is the
ratio to the fastest of the dense paths, "vs_stock" to the faster of eager and Inductor.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from dataclasses import dataclass

import torch
from harness import RESULTS, draw_lines, require, stamp, table, write_rows
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask

import loki_compile

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# How much slower than eager's rounding the logits of another variant may be.
LOGITS_BOUND = {torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float16: 5e-3}
WARM_S, SAMPLE_S = 0.1, 0.15


def build(
    dtype: torch.dtype, device: str, layers: int, attention: str = "sdpa", kv_heads: int = 2
) -> LlamaForCausalLM:
    """The model; its weights are the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=1024,
        max_position_embeddings=1 << 20,
        attn_implementation=attention,
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


def packed_matmul(module, query, key, value, attention_mask, scaling, **_):
    """Decode attention that reads each key and value once: the query heads of a group are rows."""
    batch, heads, new, head_dim = query.shape
    rows = query.reshape(batch, key.shape[1], -1, head_dim)  # new is 1, or each head sees one mask
    scores = rows @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    out = scores.float().softmax(-1).to(value.dtype) @ value
    return out.reshape(batch, heads, new, -1).transpose(1, 2), None


AttentionInterface.register("packed_matmul", packed_matmul)
AttentionMaskInterface.register("packed_matmul", sdpa_mask)


@dataclass(frozen=True)
class Variant:
    """One way of decoding; `loki` are its options, None where loki has no part."""

    attention: str = "sdpa"
    compiled: bool = True
    loki: dict | None = None
    dense: bool = True


def variants(top_ks: list[int | float], extra: dict) -> dict[str, Variant]:
    named = {
        "eager": Variant(compiled=False),
        "inductor": Variant(),
        "packed matmul": Variant("packed_matmul", compiled=False),
        "packed matmul, inductor": Variant("packed_matmul"),
        "loki, dense": Variant(loki={"min_context": 1 << 30}),
    }
    for top_k in top_ks:
        named[f"loki top_k={top_k}"] = Variant(loki={"top_k": top_k, **extra}, dense=False)
    return named


def decode_step(model: LlamaForCausalLM, variant: Variant, mode: str | None):
    """What decodes one token."""
    if not variant.compiled:
        return model
    if variant.loki is None:
        return torch.compile(model, mode=mode)
    return torch.compile(model, backend="loki", options={**variant.loki, **_mode(mode)})


def _mode(mode: str | None) -> dict:
    return {"inductor": torch._inductor.list_mode_options(mode)} if mode else {}


def check(args: argparse.Namespace, dtype: torch.dtype, context: int) -> None:
    """Every dense path gives eager's logits, and so does loki that must read all keys sparsely."""
    full = Variant(loki={"top_k": 1.0, "min_context": 0}, dense=False)
    ways = {**variants([], {}), "loki at full budget": full}
    truth: list[torch.Tensor] = []
    for name, variant in ways.items():
        model = build(dtype, args.device, args.layers, variant.attention)
        step = decode_step(model, variant, args.mode)
        decoder = Decoder(model, step, args.cache, context, seed=1)
        logits = [decoder() for _ in range(3)]
        truth = truth or logits  # eager comes first
        for got, expected in zip(logits, truth, strict=True):
            require(name, got, expected, LOGITS_BOUND[dtype])


def time_rounds(decoders: dict[str, Decoder], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per token: each round takes one sample of every path."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decoder in decoders.items():
            decode_for(WARM_S, decoder, device)
            times[name].append(decode_for(SAMPLE_S, decoder, device))
    return times


def decode_for(seconds: float, decoder: Decoder, device: str) -> float:
    """Decodes for so long, at least one token; milliseconds per token."""
    _synchronize(device)
    tokens, start = 0, time.perf_counter()
    while True:
        decoder()
        tokens += 1
        if device.startswith("cuda") and tokens % 16:
            continue  # the host must not wait for each token
        _synchronize(device)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return elapsed * 1e3 / tokens


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run(args: argparse.Namespace, dtype_name: str, context: int) -> list[dict]:
    torch._dynamo.reset()
    dtype, device = DTYPES[dtype_name], args.device
    check(args, dtype, min(context, 3000))
    ways = variants(args.top_k, {"rank": args.rank, "index_dtype": args.index_dtype})
    decoders: dict[str, Decoder] = {}
    for seed, (name, variant) in enumerate(ways.items()):
        model = build(dtype, device, args.layers, variant.attention)
        step = decode_step(model, variant, args.mode)
        decoders[name] = Decoder(model, step, args.cache, context, seed)
        for _ in range(4):  # compiles, fits the basis, builds the index
            decoders[name]()
        gc.collect()
    shared = {
        "bench": "decode",
        "cache": args.cache,
        "dtype": dtype_name,
        "context": context,
        "layers": args.layers,
        "rank": args.rank,
        "index_dtype": args.index_dtype,
        "mode": args.mode,
    }
    return timed_rows(decoders, ways, device, args.rounds, shared)


def timed_rows(
    decoders: dict[str, Decoder], ways: dict[str, Variant], device: str, rounds: int, shared: dict
) -> list[dict]:
    """Times every path; a row for each, with `shared` and its ratio to the dense ones."""
    before = loki_compile.stats()
    times = time_rounds(decoders, device, rounds)
    after = loki_compile.stats()
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    dense = min(medians[name] for name, variant in ways.items() if variant.dense)
    stock = min(medians["eager"], medians["inductor"])
    counts = {name: after[name] - before[name] for name in ("sparse_steps", "rebuilds")}
    return [
        {
            **stamp(device),
            **shared,
            "rounds": rounds,
            **counts,
            "variant": name,
            "median_ms": medians[name],
            "min_ms": min(samples),
            "max_ms": max(samples),
            "vs_fastest_dense": dense / medians[name],
            "vs_stock": stock / medians[name],
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
    parser.add_argument("--rank", type=_number, default=0.5)
    parser.add_argument("--index-dtype", default="int8", choices=["int8", "cache"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--mode", default=None, help="torch.compile mode of Inductor and loki")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="decode", help="file under benchmarks/results/")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # one code object, many variants
    rows: list[dict] = []
    for dtype, context in itertools.product(args.dtype, args.context):
        new = run(args, dtype, context)
        rows += new
        columns = ["dtype", "context", "variant", "median_ms", "vs_fastest_dense", "vs_stock"]
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
