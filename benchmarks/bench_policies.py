"""What each way to choose keys loses, on a real model, through the compiled decode path.

    python benchmarks/bench_policies.py MODEL --text FILE [--context 3000] [--steps 48]
    python benchmarks/bench_policies.py MODEL --text FILE --plans --top-k 0.125 512 128
         [--prefill compiled | eager] [--only "loki, max" ...] [--basis NAME] [--rank 0.25]
    python benchmarks/bench_policies.py --draw policies policies_auto       results/policies.png

Steps of a text are decoded behind a prefill of its first tokens, each policy at the same budget,
each step fed the text's own next token. Of every layer it is noted what share of each query head's
attention lies on keys that it does not read (missed mass; mean over layers, heads and steps; 0 for
a layer that reads all), and of every step how far its logits are from dense attention's (KL
divergence, same greedy token). The prompt is read through the backend, as `model.compile` has it,
or eagerly, so that an automatic basis is fitted from keys alone. Graphs run node by node: for speed
see `bench_kernels.py`, `bench_reuse.py` and `bench_decode.py`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, stamp, table, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from loki_compile import reset_stats, stats
from loki_compile.backend import loki
from loki_compile.commands.missed import Seen, Watch

SETTINGS: dict[str, dict[str, Any]] = {
    "oracle, max": {"policy": "oracle"},
    "oracle, probability": {"policy": "oracle", "group_choice": "probability"},
    "oracle, each head": {"policy": "oracle", "share": "head"},
    "loki, max": {"policy": "loki"},
    "loki, probability": {"policy": "loki", "group_choice": "probability"},
    "quest, max": {"policy": "quest"},
    "quest, probability": {"policy": "quest", "group_choice": "probability"},
    "window": {"policy": "window"},
}
# Plans of all layers, beside those in which each layer chooses.
PLANS: dict[str, dict[str, Any]] = {
    "oracle": {"policy": "oracle", "group_choice": "probability"},
    "loki": {"policy": "loki", "group_choice": "probability"},
    "tidal": {"policy": "tidal"},
    "tidal-published": {"policy": "tidal-published"},
    "lessismore": {"policy": "lessismore"},
    "kascade": {"policy": "kascade"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--draw", nargs="+", metavar="NAME", help="of results: measure nothing")
    parser.add_argument("--context", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--top-k", type=number, nargs="+", default=[0.125])
    parser.add_argument("--plans", action="store_true", help="plans of all layers instead")
    parser.add_argument("--only", nargs="+", default=[], help="names of settings")
    parser.add_argument("--rank", type=float, default=0.25, help="a fraction below 1, or a count")
    parser.add_argument("--basis", default="auto")
    parser.add_argument("--prefill", choices=("compiled", "eager"), default="compiled")
    parser.add_argument("--name", default="policies", help="file under benchmarks/results/")
    args = parser.parse_args()
    if args.draw:
        recorded = [row for name in args.draw for row in rows_of(name)]
        unlike = {label_of(row): row for row in recorded}  # the newest of each
        draw(list(unlike.values()), recorded[0], RESULTS / f"{args.draw[0]}.png")
        return
    if args.model is None or args.text is None:
        parser.error("needs MODEL and --text FILE, or --draw NAME")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = tokenizer(args.text.read_text(), return_tensors="pt").input_ids
    needed = args.context + args.steps
    if ids.shape[1] < needed:
        raise SystemExit(f"{args.text} has {ids.shape[1]} tokens; needed {needed}: a longer text.")
    rows = []
    with torch.no_grad():
        prefilled = DynamicCache(config=model.config)
        model(ids[:, : args.context], past_key_values=prefilled, logits_to_keep=1)
        dense = decode(model.forward, copy_of(prefilled, model), ids, args)
        settings = PLANS if args.plans else SETTINGS
        chosen = [name for name in settings if not args.only or name in args.only]
        for top_k, name in itertools.product(args.top_k, chosen):
            watch = Watch()
            watch.seen = Seen()
            torch._dynamo.reset()
            reset_stats()

            rank = args.rank if args.rank < 1 else int(args.rank)
            options = {"top_k": top_k, "rank": rank, "basis": args.basis, **settings[name]}
            backend = functools.partial(loki, engine=watch.engine)
            step = torch.compile(model.forward, backend=backend, options=options)
            ranked = args.prefill == "compiled"
            cache = DynamicCache(config=model.config) if ranked else copy_of(prefilled, model)
            if ranked:
                step(ids[:, : args.context], past_key_values=cache, logits_to_keep=1)
            logits = decode(step, cache, ids, args)
            if stats()["sparse_steps"] != args.steps:
                raise SystemExit(f"{name}: {stats()}; needed {args.steps} sparse steps.")
            both = (dense.log_softmax(-1), logits.log_softmax(-1))
            kl = (both[0].exp() * (both[0] - both[1])).sum(-1).mean()
            same = (dense.argmax(-1) == logits.argmax(-1)).float().mean()
            share = sum(watch.seen.missed) / args.steps / model.config.num_hidden_layers
            row = {"setting": name, "top_k": top_k, "missed_mass": share}
            row |= {"kl": float(kl), "same_token": float(same)}
            if args.basis == "auto" and settings[name]["policy"] == "loki":
                row["fitted"] = "keys and queries" if ranked else "keys alone"
            rows.append(row)
            print(table([row], list(row)), flush=True)
    print(table(rows, list(rows[0])))
    about = {"model": Path(args.model).name, "text": args.text.name, "context": args.context}
    about |= {"prefill": args.prefill, "basis": args.basis, "rank": args.rank}
    about |= {"steps": args.steps, **stamp("cpu")}
    write_rows(args.name, [{**row, **about} for row in rows])
    if len(args.top_k) == 1:
        draw(rows, about, RESULTS / f"{args.name}.png")


def rows_of(name: str) -> list[dict[str, Any]]:
    return list(map(json.loads, (RESULTS / f"{name}.jsonl").read_text().splitlines()))


def label_of(row: dict[str, Any]) -> str:
    return row["setting"] + (f" ({row['fitted']})" if "fitted" in row else "")


def number(text: str) -> int | float:
    """A count of keys, or a fraction of those that a row sees."""
    return int(text) if text.isdecimal() else float(text)


def copy_of(prefilled: DynamicCache, model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(prefilled.layers):
        cache.update(layer.keys.clone(), layer.values.clone(), number)
    return cache


def decode(step: Any, cache: DynamicCache, ids: Tensor, args: Any) -> Tensor:
    """Logits (steps, vocabulary) behind each of the text's tokens."""
    out = []
    for at in range(args.context, args.context + args.steps):
        out.append(step(ids[:, at : at + 1], past_key_values=cache).logits[0, -1].float())
    return torch.stack(out)


def draw(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    rows = sorted(rows, key=lambda row: row["missed_mass"])
    names = list(map(label_of, rows))
    bars = axes.barh(names, [row["missed_mass"] for row in rows], color="#4878a8")
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"attention on keys that are not read: {rows[0]['top_k']:g} of {about['context']} keys"
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
