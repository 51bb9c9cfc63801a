"""What select and attend cost where KV heads have budgets of their own, beside one for all.

    python benchmarks/bench_heads.py --rounds 20

One layer of 8 KV heads, 32 query heads x 128, an int8 index of 64 dims, 32768 tokens: "uniform" is
an eighth of the keys for every head; each other row reads as many keys in all. Milliseconds of
processor time (all threads) on a CPU, of wall time on a GPU, the least of rounds in which every
variant runs in turn; shares of "uniform".
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from bench_kernels import Shape, make_inputs
from harness import stamp, table, write_rows
from loki_compile.kernels.budget import HeadBudgets, budgets_of_rows
from loki_compile.kernels.ops import KEEP_ALL_Q16, attend, select

from loki_compile.policies.head_budgets import budgets_from

HEADS = {
    "uniform": "",
    "the same, said of each head": "0.125N",
    "half the heads wide": "0.1875N," * 4 + "0.0625N," * 4,
    "one head wide": "0.65N," + "0.05N," * 7,
    "half the heads the last ones": "0.125N," * 4 + "last=0.125N," * 4,
    "all the last ones": "last=0.125N",
}


def bench(device: str, rounds: int) -> list[dict]:
    shape = Shape(1, 8, 4, 32768, 128, 4096, 64, torch.bfloat16, torch.int8)
    x = make_inputs(shape, device, seed=0)
    options = dict(scale=128**-0.5, top_k=None, sink=4, recent=32, min_keys=1024, per_head=False)
    calls = {}
    for name, word in HEADS.items():
        more: dict = {"keep_q16": KEEP_ALL_Q16 // 8}
        if word:
            heads = budgets_from(word.rstrip(","))
            spans, last = tuple(each.span for each in heads), tuple(each.last for each in heads)
            own = HeadBudgets(spans, last, 4, 32, 1024).of_each(shape.kv_heads)
            count = torch.full((1, 1, 1), shape.tokens, device=device)
            rows = budgets_of_rows(count, shape.kv_heads, shape.kv_heads, own)
            slots = int(own.slots(shape.tokens))
            more = {"keep_q16": KEEP_ALL_Q16, "budgets": rows, "slots": slots}
        calls[name] = {**options, **more}
    least = {(name, stage): float("inf") for name in HEADS for stage in ("select", "attend")}
    keys = {}
    for _ in range(rounds):
        for name, given in calls.items():
            for stage in ("select", "attend"):
                began = clock(device)
                if stage == "select":
                    at = select(x.q, x.basis, x.index, x.index_scale, None, None, **given)
                    keys[name] = at
                else:
                    attend(x.q, x.k, x.v, keys[name], None, scale=128**-0.5)
                spent = (clock(device) - began) * 1e3
                least[name, stage] = min(least[name, stage], spent)
    rows = []
    for name in HEADS:
        read = float((keys[name] >= 0).sum()) / (shape.kv_heads * shape.tokens)
        row = {**stamp(device), "bench": "heads", "heads": name, "read": read}
        for stage in ("select", "attend"):
            row[f"{stage}_ms"] = least[name, stage]
            row[f"{stage}_share"] = least[name, stage] / least["uniform", stage]
        rows.append(row)
    return rows


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    rows = bench(args.device, args.rounds)
    print(table(rows, ["heads", "read", "select_ms", "select_share", "attend_ms", "attend_share"]))
    print("written to", write_rows(f"heads_{args.device.partition(':')[0]}", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
