"""What the passes cost at compile time, against Inductor on the same graph.

    python benchmarks/bench_passes.py [--layers 32]

Compiles the decode step of a decoder with many layers once, with both variants, and splits the
time of the backend into Inductor's and everything else (normalise, sites, caches, plan, rewrite,
report, basis fitting and the first index).
"""

from __future__ import annotations

import argparse
import functools
import time

import torch
from harness import stamp, table, write_rows
from loki_compile.pca_store.covariance import KeyCovariance
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from loki_compile import backend, engines, indexes, runtime


class Clock:
    """Seconds spent in named functions, each without the time of named functions inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running: list[str] = []
        self.since = 0.0

    def _switch(self) -> None:
        now = time.perf_counter()
        if self.running:
            name = self.running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def wrap(self, name: str, function):
        def timed(*args, **kwargs):
            self._switch()
            self.running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self.running.pop()

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
    )
    model = LlamaForCausalLM(config).eval()
    clock = Clock()
    engine = clock.wrap("inductor", engines.inductor)
    for where, name in ((indexes, "bind"), (KeyCovariance, "update"), (KeyCovariance, "pca")):
        setattr(where, name, clock.wrap("bases", getattr(where, name)))
    for where, name in ((runtime, "rewrite_sparse"), (runtime, "rewrite_dense")):
        setattr(where, name, clock.wrap("passes", getattr(where, name)))
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        torch._functorch.config.enable_autograd_cache = False
        ids = torch.randint(0, 512, (1, 300))
        cache = StaticCache(config=config, max_cache_len=512)
        model(ids[:, :200], past_key_values=cache)
        options = {"min_context": 210, "top_k": 64}
        timed = clock.wrap("passes", backend.loki)
        compiler = functools.partial(timed, options=options, engine=engine)
        step = torch.compile(model, backend=compiler)
        start = time.perf_counter()
        for position in range(200, 214):  # dense first, then sparse: both variants are compiled
            step(ids[:, position : position + 1], past_key_values=cache)
        elapsed = time.perf_counter() - start
    inductor, passes = clock.seconds["inductor"], clock.seconds["passes"]
    row = {
        **stamp("cpu"),
        "bench": "passes",
        "layers": args.layers,
        "inductor_s": inductor,
        "passes_s": passes,
        "bases_s": clock.seconds["bases"],
        "all_s": elapsed,
        "passes_share_of_inductor": passes / inductor,
    }
    columns = ["layers", "inductor_s", "passes_s", "bases_s", "all_s", "passes_share_of_inductor"]
    print(table([row], columns))
    print("written to", write_rows("passes", [row]))


if __name__ == "__main__":
    main()
