"""What an index is worth by its bytes: what it misses, and the time of `select`.

    python benchmarks/bench_index.py                          time of select, by dtype and dims
    python benchmarks/bench_index.py MODEL --context 2048     attention missed, choosing simulated

MODEL is a transformers folder. Prompts: three pass keys or needles as `loki eval` hides them, whose
question's queries choose; the basis is fitted as the automatic one, from the keys and queries
before these. int4 is simulated like int8, with a scale for each key; no kernel reads it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from bench_kernels import Inputs, Shape, choose, make_inputs
from loki_compile.kernels.fused import query_moment
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.covariance import KeyCovariance
from torch import Tensor

from loki_compile.commands.tasks import Case, generated_case

LICENCE = "/usr/share/common-licenses/GPL-3"
SINK, RECENT = 4, 32
# Stored in, and dims of 64.
INDEXES = [
    ("bf16", 16), ("int8", 16), ("int8", 24), ("int8", 28), ("int8", 32), ("bf16", 32),
    ("int4", 32), ("int4", 64),
]  # fmt: skip
LARGEST = {"int8": 127, "int4": 7}


def times() -> None:
    """CPU time of one call, one thread; the ways take turns in one process."""
    forms = {
        "fp32, D/4": (torch.float32, 4), "bf16, D/4": (torch.bfloat16, 4),
        "int8, D/4": (torch.int8, 4), "int8, D/2": (torch.int8, 2),
    }  # fmt: skip
    for kv_heads, group, dims in ((3, 3, 64), (2, 4, 128), (2, 2, 128)):
        for tokens in (8192, 32768):
            cases: dict[str, tuple[Shape, Inputs]] = {}
            for name, (stored, part) in forms.items():
                dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
                shape = Shape(
                    1, kv_heads, group, tokens, dims, tokens // 8, dims // part, dtype, stored
                )
                cases[name] = shape, make_inputs(shape, "cpu", 0)
            found: dict[str, list[float]] = {name: [] for name in forms}
            calls = 400_000 // tokens
            for _ in range(12):
                for name, (shape, inputs) in cases.items():
                    begin = time.process_time()
                    for _ in range(calls):
                        choose(inputs, shape)
                    found[name].append((time.process_time() - begin) / calls * 1e6)
            shown = {name: f"{statistics.median(of[2:]):.0f}" for name, of in found.items()}
            print(f"{kv_heads} KV heads x {group} x {dims}, {tokens} keys, microseconds: {shown}")


def captured(model: Any, case: Case) -> list[tuple[Tensor, Tensor]]:
    """Queries (Hq, T, D) and keys (Hkv, T, D) of each layer, rotated."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[Tensor, Tensor]] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any):
        seen.append((q[0], k[0]))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("captured", attend)
    model.set_attn_implementation("captured")
    model(torch.tensor([[*case.context, *case.rest]]), logits_to_keep=1, use_cache=False)
    return seen


def stored(rows: Tensor, kind: str) -> Tensor:
    if kind == "bf16":
        return rows.bfloat16().float()
    largest = LARGEST[kind]
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-20) / largest
    return (rows / scale).round() * scale


def automatic(queries: Tensor, keys: Tensor, before: int) -> Basis:
    heads, dims = keys.shape[0], keys.shape[-1]
    moments = KeyCovariance(heads, dims)
    moments.update(keys[None, :, :before])
    total, count = query_moment(queries[None, :, :before], heads, None)
    moments.add_query_moment(total[0], count)
    half = dims // 2  # RoPE as transformers lays it out
    return moments.over_rotations([(at, at + half) for at in range(half)]).score_optimal()


def missed(queries: Tensor, keys: Tensor, before: int, scores: Tensor, top_k: int) -> float:
    """Of the attention of the queries behind `before`: what the best `top_k` by scores, the
    greatest of each group, leave out. scores: (Hkv, G, S, T)."""
    asked = queries[:, before:].unflatten(0, (keys.shape[0], -1))
    at, newest = torch.arange(keys.shape[1]), torch.arange(before, keys.shape[1])[:, None]
    attention = (asked @ keys[:, None].mT) * keys.shape[-1] ** -0.5
    attention = attention.masked_fill(at > newest, -torch.inf).softmax(-1)
    always = (at < SINK) | (at > newest - RECENT)
    ranked = scores.amax(1).masked_fill(always, torch.inf).masked_fill(at > newest, -torch.inf)
    best = ranked.topk(top_k, -1).indices
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True)
    return float(attention.masked_fill(chosen[:, None], 0).sum(-1).mean())


@torch.no_grad()
def shares(name: str, context: int, top_k: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).float().eval()
    with open(LICENCE) as file:
        filler = file.read()
    found: dict[Any, list[float]] = {}
    for task, depth in (("passkey", 0.0), ("passkey", 0.5), ("single", None)):
        case = generated_case(tokenizer, task, filler, context, 0, depth)
        before = len(case.context)
        for queries, keys in captured(model, case):
            basis = automatic(queries, keys, before)
            asked = queries[:, before:].unflatten(0, (keys.shape[0], -1))
            exact = asked @ keys[:, None].mT
            found.setdefault("exact", []).append(missed(queries, keys, before, exact, top_k))
            for kind, rank in INDEXES:
                low, high = basis.truncate(rank * keys.shape[-1] // 64)
                scores = (asked @ low[:, None]) @ stored(keys @ high, kind)[:, None].mT
                share = missed(queries, keys, before, scores, top_k)
                found.setdefault(f"{kind}, {rank} of 64 dims", []).append(share)
    for label, of in found.items():
        print(f"{label:20} misses {statistics.fmean(of):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        times()
    else:
        shares(args.model, args.context, args.top_k)


if __name__ == "__main__":
    main()
