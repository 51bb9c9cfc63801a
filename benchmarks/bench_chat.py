"""What three chats of ten turns compile: graphs, breaks, recompilations, Inductor's artefacts.

    python benchmarks/bench_chat.py [--engine interpreted] [--layers 1] [--dynamic]
    python benchmarks/bench_chat.py --model path/or/hub-id --caches growing --backends loki

`generate` with a growing and a static cache, turns of different lengths, default options; plain
Inductor and loki in one process, each after a reset. Of the first prompt of another length Dynamo
makes one dynamic graph, whatever the backend, unless `--dynamic` asks for it at once. With
`--engine interpreted` graphs run as they are, which counts the same graphs in seconds. A decode
graph has two variants, each compiled when it is first needed: artefacts count what Inductor was
given, from its cache or not.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import stamp, table, write_rows
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

import loki_compile
import loki_compile.engines as engines

CHATS = (
    (1101, 13, 40, 7, 9, 61, 12, 5, 33, 17),
    (1057, 19, 8, 44, 23, 6, 71, 10, 31, 5),
    (1083, 9, 26, 4, 38, 15, 52, 11, 7, 20),
)
KINDS = ("growing", "static")
BACKENDS = ("inductor", "loki")
COUNTS = ["graphs", "breaks", "artefacts"]
COLUMNS = [
    "cache",
    "backend",
    "engine",
    "dynamic",
    "chat",
    *COUNTS,
    "sparse_steps",
    "dense_steps",
    "seconds",
]


def chat(model: Any, kind: str, lengths: tuple[int, ...]) -> None:
    """Turns of so many new tokens, each answered by four; the cache stays."""
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=1600)
    ids = torch.zeros(1, 0, dtype=torch.long)
    for length in lengths:
        ids = torch.cat([ids, torch.randint(1, 64, (1, length))], 1)
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4,
            min_new_tokens=4, do_sample=False, pad_token_id=0,
        )  # fmt: skip


def counted() -> dict[str, int]:
    inductor = counters["inductor"]
    kinds = ("fxgraph_cache_miss", "fxgraph_cache_hit", "fxgraph_cache_bypass")
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "artefacts": sum(inductor[kind] for kind in kinds),
    }


def tiny(layers: int) -> Any:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows_of(
    kind: str, chosen: str, engine: str, load: Callable[[], Any], dynamic: bool | None
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = load()
    plain = "eager" if engine == "interpreted" else "inductor"
    model.compile(backend=plain if chosen == "inductor" else chosen, dynamic=dynamic)
    rows, before = [], dict.fromkeys(COUNTS, 0)
    for number, lengths in enumerate(CHATS, 1):
        loki_compile.reset_stats()
        start = time.perf_counter()
        chat(model, kind, lengths)
        now = counted()
        steps = loki_compile.stats()
        rows.append(
            {
                "cache": kind,
                "backend": chosen,
                "engine": engine,
                "dynamic": dynamic,
                "chat": number,
                **{name: now[name] - before[name] for name in COUNTS},
                "sparse_steps": steps["sparse_steps"],
                "dense_steps": steps["dense_steps"],
                "seconds": time.perf_counter() - start,
            }
        )
        before = now
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=("inductor", "interpreted"), default="inductor")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--model", help="a folder or hub id in the place of random weights")
    parser.add_argument("--dynamic", action="store_true", default=None)
    parser.add_argument("--caches", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    args = parser.parse_args()
    load: Callable[[], Any] = functools.partial(tiny, args.layers)
    layers = args.layers
    if args.model is not None:
        from_folder = functools.partial(AutoModelForCausalLM.from_pretrained, args.model)
        load = functools.partial(from_folder, dtype=torch.float32)
        layers = load().config.num_hidden_layers
    engine = engines.interpreter if args.engine == "interpreted" else engines.inductor
    rows = []
    with engines.default_engine(engine):
        for kind in args.caches:
            for chosen in args.backends:
                for row in rows_of(kind, chosen, args.engine, load, args.dynamic):
                    rows.append({**stamp("cpu"), "bench": "chat", "layers": layers, **row})
    print(table(rows, COLUMNS))
    print("written to", write_rows("chat", rows))


if __name__ == "__main__":
    main()
