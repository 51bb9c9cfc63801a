"""Budgets per KV head, and heads of several kinds in one plan, at equal bytes on unseen text.

    OMP_NUM_THREADS=1 python benchmarks/bench_compositions.py MODEL --read GPL-3 --read ast.py \\
        --text MPL-1.1 --text argparse.py --layers TUNED.plan.json --bytes 0.2 --bytes 0.1

What heads miss is measured on --read as `loki tune --target` does it; every plan then reads the
same part of the caches' bytes at a step, indexes counted in. One budget for all heads; budgets
per head; the last keys in some heads; what a head of an earlier layer chose in others; spans of
the last keys alone (MoA's); the plan of layers with one budget and with budgets per head; random
budgets (each head's keys log-uniform). Simulated, all over the same tokens. KL is in nats, with
bounds (one-sided 95 % each) of how much it is more than one budget for all.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from harness import asked_for, stamp, write_rows
from loki_compile.kernels.spans import Span
from loki_compile.pca_store.layer_plan import read_plan

from loki_compile.commands.budget_options import FROM, LAST, RANKED, missed_share, plain
from loki_compile.commands.budget_search import BudgetSearch, BudgetSettings, Target
from loki_compile.commands.evidence import Evidence, bounds, needle_passage, text_passages
from loki_compile.commands.models import encode, load_model, load_tokenizer, read_text
from loki_compile.commands.plan_search import NEEDLES_COUNT
from loki_compile.commands.scores import interval
from loki_compile.policies.head_budgets import HeadBudget
from loki_compile.policies.kinds import Kind, kind_of
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

EVEN = "one budget for all"
COMPOSITIONS = {
    "budgets per head": (RANKED,),
    "and last keys": (RANKED, LAST),
    "and reuse by head": (RANKED, FROM),
    "all three": (RANKED, LAST, FROM),
    "spans alone": (LAST,),
}
# Those that --weigh has otherwise weighed too.
WEIGHED = ("budgets per head", "and reuse by head")


def random_plan(search: BudgetSearch, share: float, seed: int) -> list[Kind]:
    """Each head's keys log-uniform over a factor of 16, all times what makes the bytes right."""
    drawn = random.Random(seed)
    factors = [[4 ** drawn.uniform(-1, 1) for _ in range(x.kv_heads)] for x in search.layers]

    def made(scale: float) -> list[Kind]:
        spans = [[Span.of((0, min(1.0, scale * each))) for each in own] for own in factors]
        return [Kind("loki", budgets=tuple(map(HeadBudget, own))) for own in spans]

    low, high = 0.0, 4.0
    for _ in range(24):
        middle = (low + high) / 2
        within = search.costs.share(made(middle)) <= share
        low, high = (middle, high) if within else (low, middle)
    return made(low)


def weights_of(search: BudgetSearch, share: float) -> list[float]:
    """What a missed share of attention counts in each layer, 1 on average: how much more KL there
    is where its heads alone read as little as they can, for what they then miss more."""
    least = Kind("loki", budgets=(HeadBudget(Span.of((1, 0))),))
    even = search.costs.uniform(share)
    probes = [even, *([*even[:n], least, *even[n + 1 :]] for n in range(len(even)))]
    outcomes = search.outcomes("weighed", search.searching, probes, lambda done: None)
    kl = torch.tensor([[float(each.kl.mean()) for each in own] for own in outcomes])
    lost = kl[:, 0] + NEEDLES_COUNT * kl[:, 1]
    missed = torch.tensor([missed_share(search.missed, search.costs, each) for each in probes])
    each = (lost - lost[0])[1:] / (missed - missed[0])[1:].clamp(min=1e-6)
    each = each.clamp(min=0.1 * float(each.median()))  # one that gained by chance counts a little
    return (each / each.mean()).tolist()


def plans_of(
    search: BudgetSearch, layers: list[Kind], share: float, weights: list[float]
) -> dict[str, list[Kind]]:
    """All that read that part of the bytes, by name; those that cannot are left out."""
    target, plans = Target("bytes", share), {EVEN: search.costs.uniform(share)}
    worths = {"": plain}
    if weights:
        worths[", layers weighed"] = lambda layer, missed: weights[layer] * missed
        worths[", what is missed squared"] = lambda layer, missed: missed * missed
    for how, worth in worths.items():
        for name, ways in COMPOSITIONS.items():
            try:
                if not how or name in WEIGHED:
                    plans[name + how], _ = search.solved(target, ways, worth)
            except ValueError as error:
                print(f"{name}: {error}")
    if layers:
        plans["plan of layers"] = search.costs.uniform(share, layers)
        search.base = layers
        try:
            plans["plan of layers, budgets per head"], _ = search.solved(target, (RANKED,))
        finally:
            search.base = []
    return plans


def measured(
    search: BudgetSearch, args: argparse.Namespace, unseen: Sequence[torch.Tensor], tokenizer: Any
) -> None:
    layers = [kind_of(each.word) for each in read_plan(args.layers).layers] if args.layers else []
    passages = []
    for seed, ids in enumerate(unseen):
        passages += text_passages(ids, args.length, args.steps, args.pieces)
        passages.append(needle_passage(tokenizer, ids, args.length, args.steps, 100 + seed))
    passages.append(needle_passage(tokenizer, unseen[-1], args.length // 2, args.steps, 99))
    simulation = Simulation(search.config.budget, search.settings.rank, {})
    paths = [layer.path for layer in search.layers]
    weights = weights_of(search, min(args.bytes)) if args.weigh else []
    plans = {share: plans_of(search, layers, share, weights) for share in args.bytes}
    cases = [(share, name) for share in args.bytes for name in plans[share]]
    for share in args.bytes:
        for number in range(args.random):
            plans[share][f"random {number}"] = random_plan(search, share, number)
            cases.append((share, f"random {number}"))
    base: dict[float, torch.Tensor] = {}
    with watched(search.model, simulation.look) as run:
        evidence = Evidence(search.model, simulation, run, paths, passages, {})
        for share, name in cases:
            kinds, begin = plans[share][name], time.process_time()
            outcomes = [evidence.of(kinds, number) for number in range(len(passages))]
            text = [x for x, p in zip(outcomes, passages, strict=True) if not p.answers]
            asked = [x for x, p in zip(outcomes, passages, strict=True) if p.answers]
            kl = torch.cat([each.kl for each in text])
            base.setdefault(share, kl)
            found = torch.cat([each.found for each in asked]).float()
            row = {
                "target": share, "plan": name, "bytes": search.costs.share(kinds),
                "missed": missed_share(search.missed, search.costs, kinds),
                "kl": float(kl.mean()), "more": bounds(kl - base[share]), "tokens": len(kl),
                "same": float(torch.cat([each.same for each in text]).float().mean()),
                "needles": int(found.sum()), "asked": len(found),
                "wilson": interval(float(found.mean()), len(found)),
                "answers_kl": float(torch.cat([each.kl for each in asked]).mean()),
                "words": [str(kind) for kind in kinds],
                "cpu_s": round(time.process_time() - begin, 1),
            }  # fmt: skip
            write_rows("compositions", [{"given": asked_for(args), **row, **stamp("cpu")}])
            shown = {key: value for key, value in row.items() if key != "words"}
            print(shown, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--read", action="append", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--bytes", action="append", type=float, required=True)
    parser.add_argument("--layers", help="A plan of layers, as `loki tune` stores it.")
    parser.add_argument("--length", type=int, default=1900)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--pieces", type=int, default=2)
    parser.add_argument("--random", type=int, default=10)
    parser.add_argument("--weigh", action="store_true", help="Layers, and what is missed squared.")
    parser.add_argument("--dtype", default="auto", help="Of the model, and of what it caches.")
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, dtype=args.dtype)
    prompts = [encode(tokenizer, read_text([file]))[: args.length] for file in args.read]
    unseen = [encode(tokenizer, read_text([file])) for file in args.text]
    settings = BudgetSettings(Target("bytes", min(args.bytes)), "any", "auto", args.steps)
    search = BudgetSearch(model, tokenizer, settings, prompts, unseen[0])
    search.read(lambda done: None)
    print(f"read after {time.process_time():.0f} s of CPU", flush=True)
    measured(search, args, unseen, tokenizer)


if __name__ == "__main__":
    main()
