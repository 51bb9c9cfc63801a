"""Milliseconds per decoded token where keys are expanded from a cached latent (MLA).

    python benchmarks/bench_latent.py                          # 16384 and 32768 tokens
    python benchmarks/bench_latent.py --context 16384 --dtype bfloat16 --heads 128

The model is unmodified transformers code (DeepSeek-V3's attention) with random weights and a cache
of random rows: 2 layers without experts, hidden 512, 16 heads, 512 latent and 64 rotated dims per
token, 128 + 64 dims per head and key, 128 per value. Dense decoding expands all cached latents at
each step; loki attends to the rows that it chooses, as they lie. "absorbed, all keys" is what this
alone gives: loki's attention over latents, told to read every key. As in `bench_decode`, that is
first checked against eager, samples are taken in turn, "vs_fastest_dense" is the ratio to the
fastest path that reads all keys and "vs_stock" to the faster of eager and Inductor.
"""

from __future__ import annotations

import argparse
import gc
import itertools

import torch
from bench_decode import DTYPES, LOGITS_BOUND, Variant, decode_step, timed_rows
from harness import require, table, write_rows
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, StaticCache

LAYERS = 2


def build(dtype: torch.dtype, device: str, heads: int) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=256,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        vocab_size=1024,
        max_position_embeddings=1 << 20,
    )
    return DeepseekV3ForCausalLM(config).to(device, dtype).eval()


class Decoder:
    """One variant decoding from its own cache; a call is one token."""

    def __init__(self, model: DeepseekV3ForCausalLM, step, context: int, seed: int) -> None:
        config = model.config
        self.step = step
        self.token = torch.full((1, 1), 7, device=model.device)
        self.cache = StaticCache(config=config, max_cache_len=context + 2048)
        generator = torch.Generator(model.device).manual_seed(seed)

        def noise(dims: int) -> torch.Tensor:
            rows = torch.randn((1, 1, context, dims), generator=generator, device=model.device)
            return rows.to(model.dtype)

        for layer in range(LAYERS):
            latents, rotated = noise(config.kv_lora_rank), noise(config.qk_rope_head_dim)
            self.cache.update(latents, rotated, layer)

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.step(self.token, past_key_values=self.cache, use_cache=True).logits


ABSORBED = Variant(loki={"top_k": 1.0, "min_context": 0})


def run(args: argparse.Namespace, dtype_name: str, context: int) -> list[dict]:
    torch._dynamo.reset()
    dtype = DTYPES[dtype_name]
    model = build(dtype, args.device, args.heads)
    steps = (decode_step(model, ABSORBED, None), model)
    checked = [Decoder(model, step, min(context, 2000), seed=1) for step in steps]
    for _ in range(2):
        require("loki at full budget", checked[0](), checked[1](), LOGITS_BOUND[dtype])
    ways = {
        "eager": Variant(compiled=False),
        "inductor": Variant(),
        "absorbed, all keys": ABSORBED,
    }
    for top_k in args.top_k:
        few = {"top_k": top_k, "rank": args.rank}
        ways[f"loki top_k={top_k}"] = Variant(loki=few, dense=False)
    decoders: dict[str, Decoder] = {}
    for seed, (name, variant) in enumerate(ways.items()):
        decoders[name] = Decoder(model, decode_step(model, variant, None), context, seed)
        for _ in range(3):  # compiles, fits the basis, builds the index
            decoders[name]()
        gc.collect()
    shared = {
        "bench": "latent",
        "dtype": dtype_name,
        "context": context,
        "heads": args.heads,
        "rank": args.rank,
    }
    return timed_rows(decoders, ways, args.device, args.rounds, shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--top-k", type=_number, nargs="+", default=[1024, 0.125])
    parser.add_argument("--rank", type=_number, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="latent", help="file under benchmarks/results/")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # one code object, many variants
    rows: list[dict] = []
    for dtype, context in itertools.product(args.dtype, args.context):
        new = run(args, dtype, context)
        rows += new
        columns = ["dtype", "context", "variant", "median_ms", "vs_fastest_dense", "vs_stock"]
        print(table(new, columns), flush=True)
    print("written to", write_rows(args.name, rows))


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


if __name__ == "__main__":
    main()
