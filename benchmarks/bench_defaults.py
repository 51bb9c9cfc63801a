"""What users run, with default options: mixed batches, many conversations, serving, memory.

    python benchmarks/bench_defaults.py                            everything (about half an hour)
    python benchmarks/bench_defaults.py rows conversations --engine interpreter
    python benchmarks/bench_defaults.py rows --model path/or/hub-id
    python benchmarks/bench_defaults.py memory --calls 500

rows: batches padded on the left, and a decoder of 20 tokens over 3000 encoder states; for each row
the largest error of a logit, in standard deviations of the logits, against the row alone through
us and through eager, and the share of greedy tokens that agree with eager's. All are fed what eager
picks for the row alone. conversations: so many in turn; the share of sparse steps, and builds of an
index for each layer of each conversation (1 is the least). inference: the same for one
conversation under `torch.inference_mode`, beside the time of a step under `torch.no_grad`.
warm_up: the error of logits with and without a server's warm-up before, each in a process of its
own. memory: resident memory over calls of `generate` with prompts of varying lengths.

The models are unmodified transformers code with random weights (`--model` takes another for rows
and memory). Rewritten graphs go to the engine that is named: Inductor, or an interpreter, which is
quick to start, runs the same ops, and fuses nothing; inference always takes Inductor. The tables
are printed and kept in benchmarks/results/defaults.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, run_python, stamp, table, write_rows
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import loki_compile
from loki_compile.engines import default_engine, inductor, interpreter

ENGINES = {"inductor": inductor, "interpreter": interpreter}
KINDS = ("growing", "static")
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
STEPS = 12  # of each row
Rows = list[dict[str, Any]]


def build(layers: int = 2, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Random weights, large enough for attention that prefers some keys to others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def load(args: argparse.Namespace) -> Any:
    if args.model is None:
        return build()
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()


def new_cache(config: Any, kind: str, slots: int) -> Any:
    if kind == "static":
        return StaticCache(config=config, max_cache_len=slots)
    return DynamicCache(config=config)


def text(seed: int, length: int, vocabulary: int = 256) -> Tensor:
    """Token ids (1,length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (1, length), generator=generator)


def counted(run: Callable[[], Any]) -> dict[str, int]:
    """Sparse and dense steps and rebuilds of what runs."""
    before = loki_compile.stats()
    run()
    after = loki_compile.stats()
    names = ("sparse_steps", "dense_steps", "rebuilds")
    return {name: after[name] - before[name] for name in names}


def sparse_share(ran: dict[str, int]) -> float:
    return ran["sparse_steps"] / max(1, ran["sparse_steps"] + ran["dense_steps"])


# ----------------------------------------------------------------------------------------- rows


def decode(step: Callable[..., Any], model: Any, kind: str, rows: list[Tensor], fed: Tensor | None):
    """Logits (B,STEPS,vocabulary) of a batch padded on the left, prefilled by the model itself.

    `fed` (B,STEPS) are the tokens that go in; None: the greedy ones, which come back too.
    """
    longest = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), longest), 2)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - row.shape[1] :] = row
        mask[i, longest - row.shape[1] :] = 1
    cache = new_cache(model.config, kind, longest + STEPS + 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, tokens = [], []
    with torch.no_grad():
        last = model.forward(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        for at in range(STEPS):
            token = last.argmax(-1, keepdim=True) if fed is None else fed[:, at : at + 1]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            position = mask.sum(-1, keepdim=True) - 1
            last = step(
                token, attention_mask=mask, position_ids=position, past_key_values=cache
            ).logits[:, -1]
            tokens.append(token)
            logits.append(last)
    return torch.stack(logits, 1), torch.cat(tokens, 1)


def row_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.std())


def agreement(found: Tensor, truth: Tensor) -> float:
    return float((found.argmax(-1) == truth.argmax(-1)).float().mean())


def bench_rows(args: argparse.Namespace) -> Iterator[Rows]:
    model = load(args)
    for lengths, kind in itertools.product(((2000, 50), (4000, 700, 20)), KINDS):
        torch._dynamo.reset()
        texts = [text(i, n, model.config.vocab_size) for i, n in enumerate(lengths)]
        eager = [decode(model.forward, model, kind, [row], None) for row in texts]
        fast = torch.compile(model.forward, backend="loki")
        fed = torch.cat([tokens for _, tokens in eager])
        before = loki_compile.stats()["sparse_steps"]
        both, _ = decode(fast, model, kind, texts, fed)
        sparse = loki_compile.stats()["sparse_steps"] - before
        rows = []
        for i, length in enumerate(lengths):
            truth = eager[i][0][0]
            alone = decode(fast, model, kind, [texts[i]], fed[i : i + 1])[0][0]
            rows.append(
                {
                    "batch": str(lengths),
                    "cache": kind,
                    "row": length,
                    "sparse_steps": sparse,
                    "error_vs_alone": row_error(both[i], alone),
                    "error_vs_eager": row_error(both[i], truth),
                    "alone_vs_eager": row_error(alone, truth),
                    "greedy_agreement": agreement(both[i], truth),
                }
            )
        yield rows
    yield [encoder_decoder(kind) for kind in KINDS]


def encoder_decoder(kind: str, own: int = 20, encoded: int = 3000) -> dict[str, Any]:
    """Few decoder tokens over many encoder states, which say nothing: only self-attention counts.

    What cross-attention adds is made zero, so the rest must equal eager.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = BartConfig(
        vocab_size=256,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=4096,
        init_std=0.2,
    )
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.out_proj.weight.zero_()
            layer.encoder_attn.out_proj.bias.zero_()
        states = model.get_encoder()(text(1, encoded))
    logits, before = [], loki_compile.stats()["sparse_steps"]
    for step in (model.forward, torch.compile(model.forward, backend="loki")):
        cache = EncoderDecoderCache(
            new_cache(model.config, kind, own + STEPS + 4), new_cache(model.config, kind, encoded)
        )
        with torch.no_grad():
            model.forward(
                decoder_input_ids=text(2, own), encoder_outputs=states, past_key_values=cache
            )
            fed = text(3, STEPS)
            logits.append(
                torch.stack(
                    [
                        step(
                            decoder_input_ids=fed[:, at : at + 1],
                            encoder_outputs=states,
                            past_key_values=cache,
                        ).logits[0, -1]
                        for at in range(STEPS)
                    ]
                )
            )
    truth, found = logits
    return {
        "batch": f"encoder-decoder {own}/{encoded}",
        "cache": kind,
        "row": own,
        "sparse_steps": loki_compile.stats()["sparse_steps"] - before,
        "error_vs_alone": None,
        "error_vs_eager": row_error(found, truth),
        "alone_vs_eager": row_error(found, truth),
        "greedy_agreement": agreement(found, truth),
    }


# -------------------------------------------------------------------------------- conversations


def bench_conversations(args: argparse.Namespace) -> Iterator[Rows]:
    layers, steps = 1, 40
    for kind, (mode, many) in itertools.product(KINDS, itertools.product(MODES, args.many)):
        torch._dynamo.reset()
        model = build(layers)
        fast = torch.compile(model.forward, backend="loki")
        with MODES[mode]():
            caches = []
            for seed in range(many):
                prompt = text(seed, 1100 + 7 * seed)
                caches.append(new_cache(model.config, kind, 1100 + 7 * many + steps))
                model.forward(prompt, past_key_values=caches[-1], logits_to_keep=1)

            def in_turn(fast=fast, caches=caches) -> None:
                for step in range(steps):
                    for cache in caches:
                        fast(torch.full((1, 1), step + 2), past_key_values=cache)

            ran = counted(in_turn)
        yield [
            {
                "conversations": many,
                "cache": kind,
                "mode": mode,
                "sparse_share": sparse_share(ran),
                "rebuilds_each": ran["rebuilds"] / many / layers,
            }
        ]


# ------------------------------------------------------------------------------------ inference


def bench_inference(_args: argparse.Namespace) -> Iterator[Rows]:
    layers, steps = 2, 50
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    for dtype, index_dtype, kind in itertools.product(dtypes, ("cache", "int8"), KINDS):
        row: dict[str, Any] = {"cache": kind, "dtype": dtype, "index_dtype": index_dtype}
        for name, mode in MODES.items():
            torch._dynamo.reset()
            model = build(layers, dtypes[dtype])
            options = {"index_dtype": index_dtype}
            fast = torch.compile(model.forward, backend="loki", options=options)
            times: list[float] = []
            with mode(), default_engine(inductor):
                cache = new_cache(model.config, kind, 1300)
                model.forward(text(0, 1150), past_key_values=cache, logits_to_keep=1)

                def decode_all(fast=fast, cache=cache, times=times) -> None:
                    for step in range(steps):
                        start = time.perf_counter()
                        fast(torch.full((1, 1), step + 2), past_key_values=cache)
                        times.append(time.perf_counter() - start)

                ran = counted(decode_all)
            row[f"{name}_rebuilds_each"] = ran["rebuilds"] / layers
            row[f"{name}_sparse"] = sparse_share(ran)
            row[f"{name}_ms"] = statistics.median(times[10:]) * 1e3
        yield [row]


# -------------------------------------------------------------------------------------- warm-up


def narrow_model() -> LlamaForCausalLM:
    """Keys live in 6 of 64 dims of each head, as trained keys do; an index holds 16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        initializer_range=0.25,
    )
    model = LlamaForCausalLM(config).eval()
    plane = torch.randn(128, 6)
    weights = [torch.randn(64, 6) @ plane.T for _ in range(2)]
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.copy_(torch.cat(weights) * 0.03)
    return model


WARM_UPS = {"none": None, "one token 1100 times": [42], "two tokens 1100 times": [42, 7]}


def serve(warm_up: str, engine: str) -> None:
    """One process: the warm-up, then three conversations; prints the mean error of their logits."""
    model = narrow_model()
    fast = torch.compile(model.forward, backend="loki")
    errors = []
    with default_engine(ENGINES[engine]):
        tokens = WARM_UPS[warm_up]
        if tokens is not None:
            converse(fast, model, torch.tensor(tokens).repeat(1100 // len(tokens))[None])
        for seed in range(3):
            ids = text(seed, 1400)
            truth = converse(model.forward, model, ids)
            errors.append(float((converse(fast, model, ids) - truth).abs().mean() / truth.std()))
    print(statistics.mean(errors))


def converse(step: Callable[..., Any], model: Any, ids: Tensor, steps: int = 8) -> Tensor:
    """Logits (steps,vocabulary) of the last tokens of a text (1,N)."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.forward(ids[:, :-steps], past_key_values=cache, logits_to_keep=1)
        return torch.stack(
            [
                step(ids[:, at : at + 1], past_key_values=cache).logits[0, -1]
                for at in range(ids.shape[1] - steps, ids.shape[1])
            ]
        )


def bench_warm_up(args: argparse.Namespace) -> Iterator[Rows]:
    for warm_up in WARM_UPS:
        shown = run_python([__file__, "--serve", warm_up, "--engine", args.engine])
        yield [{"warm_up": warm_up, "mean_logit_error": float(shown.split()[-1])}]


# --------------------------------------------------------------------------------------- memory


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def bench_memory(args: argparse.Namespace) -> Iterator[Rows]:
    model = load(args)
    model.compile(backend="loki")
    torch._dynamo.reset()
    for number in range(1, args.calls + 1):
        length = 1030 + 97 * number % 391
        prompt = text(number, length, model.config.vocab_size)
        cache = new_cache(model.config, KINDS[number % 2], 1500)
        with torch.no_grad():
            model.generate(
                prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        held = loki_compile.stats()["index_bytes"]
        del cache
        if number % 50 == 0 or number == args.calls:
            gc.collect()
            yield [
                {
                    "calls": number,
                    "resident_mib": resident_mib(),
                    "index_bytes_with_cache": held,
                    "index_bytes_after": loki_compile.stats()["index_bytes"],
                    **{k: loki_compile.stats()[k] for k in ("sparse_steps", "rebuilds")},
                }
            ]


# ----------------------------------------------------------------------------------------- main

SECTIONS = {
    "rows": bench_rows,
    "conversations": bench_conversations,
    "inference": bench_inference,
    "warm_up": bench_warm_up,
    "memory": bench_memory,
}


def markdown(rows: Rows, columns: list[str]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row[name]) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--engine", choices=ENGINES, default="inductor")
    parser.add_argument("--many", type=int, nargs="+", default=[1, 7, 8, 12, 40])
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--model", help="a folder or hub id in the place of random weights")
    parser.add_argument("--name", default="defaults", help="files under benchmarks/results/")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # one code object, many variants
    if args.serve:
        serve(args.serve, args.engine)
        return
    shared = stamp("cpu")
    shown = []
    for name in args.sections or SECTIONS:
        rows: Rows = []
        with default_engine(ENGINES[args.engine]):
            for new in SECTIONS[name](args):
                print(table(new, list(new[0])), flush=True)
                rows += new
        engine = "inductor" if name == "inference" else args.engine
        more = {**shared, "bench": f"defaults_{name}", "engine": engine}
        write_rows(args.name, [{**more, **row} for row in rows])
        shown.append(f"### {name} ({engine})\n\n{markdown(rows, list(rows[0]))}\n")
    head = ", ".join(str(shared[what]) for what in ("device", "torch", "commit", "time"))
    path = RESULTS / f"{args.name}.md"
    path.write_text(f"## Default options\n\n{head}.\n\n" + "\n".join(shown))
    print("written to", path)


if __name__ == "__main__":
    main()
