"""Plans of layers on text that none of them was chosen by, against choosing in every layer.

    OMP_NUM_THREADS=1 python benchmarks/bench_plans.py MODEL --plan PLAN.json --maps GPL-3 \\
        --text MPL-1.1 --text argparse.py

The plan of `loki tune`, those that need no search, exact ranking, 20 random plans of equal cost
(what the tuned plan's layers do, dealt out anew; the first layer chooses), and plans that are
dense in 0 and 1, choose in 2 and choose again in one layer by hand. Every reader has the head map
that is best on the first prompt of --maps, as `loki tune` has it. Simulated, all over the same
tokens (`loki_compile.simulation`). KL is in nats, with bounds (one-sided 95 % each) of how much it
is more than where every layer chooses; needles with Wilson's 95 % intervals; missed is attention on
keys that are not read, on the first context of the first text.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import asked_for, stamp, write_rows
from loki_compile.pca_store.layer_plan import read_plan

from loki_compile import LokiConfig
from loki_compile.captured import captured_mass, summed_up
from loki_compile.commands.evidence import Evidence, bounds, needle_passage, text_passages
from loki_compile.commands.models import encode, load_model, load_tokenizer, read_text
from loki_compile.commands.scores import interval
from loki_compile.planning import with_sources
from loki_compile.policies.kinds import Kind, kind_of
from loki_compile.policies.presets import preset
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

DENSE, LOKI, REUSE = Kind(dense=True), Kind("loki"), Kind(reuse=True)


def plans_of(args: argparse.Namespace, layers: int) -> dict[str, list[Kind]]:
    """By name, sources not spelled out where a reader reads the last choice before it."""
    plans = {"every layer chooses": [LOKI] * layers, "dense": [DENSE] * layers}
    for file in args.plan:
        plans[Path(file).stem] = [kind_of(layer.word) for layer in read_plan(file).layers]
    for name in ("tidal", "tidal-published", "kascade"):
        plans[name] = preset(name, layers)
    plans["oracle"] = [Kind("oracle")] * layers
    tuned = plans[Path(args.plan[0]).stem]
    drawn = random.Random(1)
    kept = [REUSE if kind.reuse else kind for kind in tuned]
    while sum(name.startswith("random") for name in plans) < args.random:
        trial = [*kept]
        drawn.shuffle(trial)
        if trial[0].ranking:
            plans[f"random {len(plans)}"] = trial
    for layer in range(3, layers, args.every):
        kinds = [DENSE, DENSE, LOKI, *[REUSE] * (layers - 3)]
        kinds[layer] = LOKI
        plans[f"single {layer}"] = kinds
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--plan", action="append", required=True)
    parser.add_argument("--maps", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--length", type=int, default=1900)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--pieces", type=int, default=2)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--every", type=int, default=3)
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    config = LokiConfig(min_context=0)
    maps = encode(tokenizer, read_text([args.maps]))[: args.length]
    texts = [encode(tokenizer, read_text([file])) for file in args.text]
    mass = summed_up(captured_mass(model, [maps[None]], config.budget, config.rank))
    first = texts[0][None, : args.length]
    unseen = captured_mass(model, [first], config.budget, config.rank)
    passages = []
    for seed, ids in enumerate(texts):
        passages += text_passages(ids, args.length, args.steps, args.pieces)
        passages.append(needle_passage(tokenizer, ids, args.length, args.steps, 100 + seed))
    half = needle_passage(tokenizer, texts[-1], args.length // 2, args.steps, 99)
    passages.append(half)

    def spelled(kinds: Sequence[Kind]) -> list[Kind]:
        known = with_sources(mass.heads, [0] * len(kinds), kinds)
        assert known is not None
        return [a if a.source is not None else b for a, b in zip(kinds, known, strict=True)]

    def missed(kinds: Sequence[Kind]) -> float:
        total = 0.0
        for layer, kind in enumerate(kinds):
            if kind.dense:
                continue
            source = layer if kind.source is None else kind.source
            share = unseen.captured[kinds[source].ranking, source, layer] / unseen.rows
            heads = kind.heads or range(len(share))
            total += 1 - float(share[range(len(share)), list(heads)].mean())
        return total / len(kinds)

    simulation = Simulation(config.budget, config.rank, {})
    rows, base = [], None
    with watched(model, simulation.look) as run:
        evidence = Evidence(model, simulation, run, mass.paths, passages, {})
        for name, given in plans_of(args, len(mass.paths)).items():
            begin, kinds = time.process_time(), spelled(given)
            outcomes = [evidence.of(kinds, number) for number in range(len(passages))]
            text = [x for x, p in zip(outcomes, passages, strict=True) if not p.answers]
            kl = torch.cat([each.kl for each in text])
            found = torch.cat([each.found for each in outcomes]).float()
            base = kl if base is None else base
            asked = [x.kl for x, p in zip(outcomes, passages, strict=True) if p.answers]
            low, high = bounds(kl - base)
            least, most = interval(float(found.mean()), len(found))
            rows.append({
                "plan": name, "kl": float(kl.mean()), "more": [low, high], "tokens": len(kl),
                "same": float(torch.cat([each.same for each in text]).float().mean()),
                "needles": int(found.sum()), "asked": len(found), "wilson": [least, most],
                "answers_kl": float(torch.cat(asked).mean()), "missed": missed(kinds),
                "choose": sum(bool(kind.ranking) for kind in kinds),
                "dense": sum(kind.dense for kind in kinds),
                "words": [str(kind) for kind in kinds],
                "cpu_s": round(time.process_time() - begin, 1),
            })  # fmt: skip
            write_rows("plans", [{"given": asked_for(args), **rows[-1], **stamp("cpu")}])
            print({key: value for key, value in rows[-1].items() if key != "words"}, flush=True)


if __name__ == "__main__":
    main()
