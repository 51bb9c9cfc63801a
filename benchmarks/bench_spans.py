"""What the profile behind `loki tune --policy moa` is worth, and what it costs.

    python benchmarks/bench_spans.py truth reference --length 1024     50 random plans, measured
    python benchmarks/bench_spans.py cost /path/to/model --length 1000 --length 2000

`truth`: rank correlation (Spearman) of what plans are predicted to lose with what they do lose, on
the prompts that were profiled and on others; "free" plans give each head any span, the others are
of one density. `cost`: CPU seconds and memory of one prompt, each length in a process of its own.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time

import click
import numpy as np
import torch
from loki_compile.kernels.spans import Spans

from loki_compile.commands.models import load_model, load_tokenizer
from loki_compile.commands.options import text_of
from loki_compile.commands.span_choice import together
from loki_compile.commands.span_search import SpanPrompt, SpanSearch, SpanSettings, span_prompts


@click.group()
def main() -> None:
    """As the docstring of this file says."""


@main.command()
@click.argument("name", metavar="MODEL")
@click.option("--text", "files", multiple=True)
@click.option("--length", default=1024)
@click.option("--prompts", default=4)
@click.option("--held-out", default=2)
@click.option("--plans", default=50)
@click.option("--density", type=float, help="Of the plans of one density, beside free ones.")
@click.option("--dtype", default="float32")
def truth(
    name: str,
    files: tuple[str, ...],
    length: int,
    prompts: int,
    held_out: int,
    plans: int,
    density: float | None,
    dtype: str,
) -> None:
    """Predicted against measured losses of random plans."""
    text, _ = text_of(files, "train")
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype=dtype)
    made, what = span_prompts(tokenizer, text, [length], prompts + held_out - 1, given=bool(files))
    read, others = made[0][:prompts], made[0][prompts:]
    print(f"{name}, {length} tokens, {what}: {len(read)} prompts, {len(others)} held out")
    joint = _search(model, "joint", read)
    single = _search(model, "entrywise", read)
    for aim in (None, density) if density else (None,):
        picks = _random_plans(joint, plans, aim)
        predicted = {
            "joint": [together(joint.rows[0], pick) for pick in picks],
            "joint, heads apart": [_summed(joint, pick) for pick in picks],
            "entry-wise (published)": [_summed(single, pick) for pick in picks],
            "keys left out": [-joint.shares[0, range(len(pick)), pick].sum() for pick in picks],
        }
        print(f"plans {'free' if aim is None else f'of density {aim}'}: rank correlation with")
        for where, each in (("the same prompts", read), ("held-out prompts", others)):
            loss, divergence = _measured(joint, picks, each)
            for way, values in predicted.items():
                ranks = [_spearman(values, truth) for truth in (loss, divergence)]
                print(f"  {where}: {way:24} loss {ranks[0]:.3f}  KL {ranks[1]:.3f}")


@main.command()
@click.argument("name", metavar="MODEL")
@click.option("--text", "files", multiple=True)
@click.option("--length", "lengths", multiple=True, type=int)
@click.option("--dtype", default="auto")
@click.option("--here", is_flag=True, hidden=True)
def cost(
    name: str, files: tuple[str, ...], lengths: tuple[int, ...], dtype: str, here: bool
) -> None:
    """CPU seconds and memory of profiling one prompt, its answer included."""
    if not here:
        for length in lengths:
            more = [word for file in files for word in ("--text", file)]
            own = [sys.executable, __file__, "cost", name, "--length", str(length), *more]
            subprocess.run([*own, "--dtype", dtype, "--here"], check=True)
        return
    (length,) = lengths
    text, _ = text_of(files, "train")
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype=dtype)
    before, begin = _peak(), time.process_time()
    made, what = span_prompts(tokenizer, text, [length], 1, given=bool(files))
    _search(model, "joint", made[0][:1])
    print(
        f"{name}, {length} tokens ({what}): {time.process_time() - begin:.1f} s of CPU, "
        f"{_peak():.2f} GB at most, {before:.2f} GB with the model loaded"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _search(model: object, effects: str, prompts: list[SpanPrompt]) -> SpanSearch:
    """Profiled; still to be left."""
    search = SpanSearch(model, SpanSettings(0.5, 64, effects), [prompts])
    search.read_from = [prompts]  # none is held out here
    search.__enter__()
    search.read(lambda done: None)
    search.forget()
    return search


def _summed(search: SpanSearch, pick: np.ndarray) -> float:
    return float(search.losses[0, range(len(pick)), pick].sum())


def _random_plans(search: SpanSearch, count: int, density: float | None) -> list[np.ndarray]:
    drawn = random.Random(0)
    shares = search.shares[0]
    groups, options = shares.shape
    made = []
    while len(made) < count:
        pick = np.array([drawn.randrange(options) for _ in range(groups)])
        for _ in range(100_000):
            read = shares[range(groups), pick].sum()
            if density is None or abs(read - density) < 0.01:
                made.append(pick)
                break
            group, option = drawn.randrange(groups), drawn.randrange(options)
            if (shares[group, option] > shares[group, pick[group]]) == (read < density):
                pick[group] = option
    return made


def _measured(
    search: SpanSearch, picks: list[np.ndarray], prompts: list[SpanPrompt]
) -> tuple[list[float], list[float]]:
    """Of each plan the loss gained, and the divergence from dense logits."""
    loss, divergence = np.zeros(len(picks)), np.zeros(len(picks))
    for prompt in prompts:
        ids, start, caches = search.ready(prompt, len(picks) + 1)
        inputs = ({**search.inputs(ids[start:-1], cache)} for cache in caches)
        dense, logs = search.profiler.loss(next(inputs), ids[start + 1 :], {})
        for number, pick in enumerate(picks):
            plan: dict[str, Spans] = search.plan_with(pick)
            other, found = search.profiler.loss(next(inputs), ids[start + 1 :], plan)
            loss[number] += other - dense
            divergence[number] += float((logs.exp() * (logs - found)).sum(-1).mean())
    return loss.tolist(), divergence.tolist()


def _spearman(one: list[float], other: list[float]) -> float:
    from scipy import stats

    return float(stats.spearmanr(one, other).statistic)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
