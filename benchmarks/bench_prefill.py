"""What it costs a prefill to say what its queries are like, beside Inductor's own prefill.

    python benchmarks/bench_prefill.py [--model MODEL] [--layers 4] [--tokens 4096] [--rounds 7]

Both are compiled by Inductor, once, and called in turn in one process; CPU seconds of the whole
process for each call, the median of the rounds. `--padded` pads a quarter on the left, so that rows
of padding are told from the mask.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from harness import stamp, table, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SMALL |= {"num_key_value_heads": 3, "vocab_size": 4096, "max_position_embeddings": 65536}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="its configuration, with random weights")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.model) if args.model else LlamaConfig(**SMALL)
    config.num_hidden_layers = args.layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    ids = torch.randint(0, config.vocab_size, (1, args.tokens))
    mask = torch.ones_like(ids)
    mask[:, : args.tokens // 4 * args.padded] = 0
    more = {"attention_mask": mask} if args.padded else {}
    seconds: dict[str, list[float]] = {"inductor": [], "loki": []}
    with torch.no_grad():
        steps: dict[str, Any] = {}
        logits: list[torch.Tensor] = []
        for name, options in (("inductor", None), ("loki", {"pack_gqa": False})):
            torch._dynamo.reset()
            steps[name] = torch.compile(model.forward, backend=name, options=options)
            logits.append(_prefill(steps[name], ids, config, more))
            print(f"{name} is compiled", flush=True)
        for _ in range(args.rounds):
            for name, step in steps.items():
                begin = time.process_time()
                _prefill(step, ids, config, more)
                seconds[name].append(time.process_time() - begin)
    row: dict[str, Any] = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    row["same_bits"] = torch.equal(*logits)
    row["ratio"] = statistics.median(ratios)
    print(table([row], list(row)))
    about = {"layers": args.layers, "tokens": args.tokens, "padded": args.padded}
    write_rows("prefill", [{**row, **about, "dtype": args.dtype, **stamp("cpu")}])


def _prefill(step: Any, ids: torch.Tensor, config: Any, more: dict[str, Any]) -> torch.Tensor:
    cache = DynamicCache(config=config)
    return step(ids, past_key_values=cache, logits_to_keep=1, **more).logits


if __name__ == "__main__":
    main()
