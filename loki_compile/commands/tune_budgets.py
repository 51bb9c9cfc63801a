"""`loki tune --target`: how many keys each KV head chooses, within so many bytes or for so much
attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki_compile.commands.options import AskedModel, loki_options, text_of
from loki_compile.commands.output import announcing, out, progress, say, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loki_compile.commands.budget_search import BudgetSearch, Judged
    from loki_compile.pca_store.layer_plan import LayerPlan

# Of a plan of layers with budgets that was not better than the plan without: no policy finds it.
TRIED_SUFFIX = ".tidal-budgets.json"


def tune_budgets(
    asked: AskedModel,
    files: tuple[str, ...],
    policy: str,
    prompts: int,
    length: int | None,
    folder: Path | None,
    target: str,
    heads: str,
    rank: int | float | str,
    steps: int,
) -> None:
    from loki_compile.commands.budget_search import TEXTS, BudgetSearch, BudgetSettings, Target
    from loki_compile.commands.models import (
        check_writable,
        fitting_context,
        load_config,
        load_tokenizer,
    )
    from loki_compile.commands.texts import prompts_of
    from loki_compile.pca_store.store import Store

    aim = Target.of(target)
    _check(policy, heads, rank)
    root = Store(folder).root
    asked.check()
    check_writable("--out" if folder else "the store", root, folder=True)
    length = fitting_context("--length", length, 2048, load_config(asked.name), room=2 * steps)
    if length < 4 * steps:
        raise ValueError(
            f"--length {length}: needles are asked for in {steps} tokens of half of it; needs "
            f"{4 * steps} or more, or fewer --steps"
        )
    text, source = text_of(files, "train")
    tokenizer = load_tokenizer(asked.name)
    read, held_out = prompts_of(tokenizer, text, prompts, length, steps, TEXTS)
    say(
        f"loading {asked.name}; then it reads {len(read)} prompts and as many with needles, eagerly"
    )
    model = asked.load()
    layers = _stored_layers(model) if policy == "tidal" else None
    words = () if layers is None else tuple(layer.word for layer in layers.layers)
    settings = BudgetSettings(aim, heads, rank, steps, words)
    search = BudgetSearch(model, tokenizer, settings, list(read), held_out)
    found = _searched(search, asked.name, layers)
    plan = search.plan_of(*found, asked.name, source)
    _show(search, *found)
    _store(plan, layers, root)
    search.forget()


def _check(policy: str, heads: str, rank: int | float | str) -> None:
    """Refuses what cannot be together.

    Raises:
        ValueError: as said.
    """
    if policy == "tidal" and heads != "ranked":
        raise ValueError(f"--heads {heads}: a plan of tidal says who chooses; needs --policy loki")
    if isinstance(rank, str) and rank != "auto":
        raise ValueError(f"--rank {rank}: bytes are counted for one rank; needs 32, 0.5 or auto")
    loki_options(rank=rank)


def _stored_layers(model: Any) -> LayerPlan:
    """The plan of layers that is stored for a model.

    Raises:
        ValueError: there is none.
    """
    from loki_compile.commands.stored import stored_plan, weights_of

    plan = stored_plan("tidal", lambda: weights_of(model))
    if plan is None:
        raise ValueError(
            "--policy tidal --target: no plan of layers is stored for this model; needs one: run "
            "`loki tune` without --target first"
        )
    return plan


def _searched(
    search: BudgetSearch, name: str, layers: LayerPlan | None
) -> tuple[Judged, Judged, tuple[float, float]]:
    """What the solved plan makes of held-out text, and one budget for all heads, with bars."""
    began = announcing(name)
    with progress() as bar:
        began(f"reading {search.tokens} tokens")
        reading = bar.add_task(f"reading with {name}", total=search.tokens)
        trying = bar.add_task("trying ways to come by keys", total=None, visible=False)
        judging = bar.add_task("held-out text", total=search.runs, visible=False)
        search.read(lambda done: bar.advance(reading, done))
        own = [layer.weights for layer in search.layers]
        if layers is not None and own != [layer.weights for layer in layers.layers]:
            raise ValueError(
                f"--policy tidal: the stored plan has {len(layers.layers)} layers, and {len(own)} "
                "were seen, or others: needs a plan of all of them; run `loki tune` again"
            )
        bar.update(trying, visible=search.trials > 0, total=search.trials)
        began("solving for the target")
        search.choose(lambda done: bar.advance(trying, done))
        began(f"judging on {len(search.passages)} passages of held-out text")
        bar.update(judging, visible=True)
        return search.judge(lambda done: bar.advance(judging, done))


def _store(plan: LayerPlan, layers: LayerPlan | None, root: Path) -> None:
    from dataclasses import replace

    from loki_compile.pca_store.layer_plan import BUDGETS_SUFFIX, SUFFIX, USED, save_plan

    used = plan.scores[USED]
    suffix = BUDGETS_SUFFIX
    if layers is not None:
        plan = replace(plan, mass=layers.mass, scores={**layers.scores, **plan.scores})
        suffix = SUFFIX if used else TRIED_SUFFIX
    path = save_plan(plan, root, suffix)
    policy = "loki" if layers is None else "tidal"
    if used:
        show(f'wrote {path}; policy="{policy}" uses it')
    else:
        show(f"wrote {path}; it is not used, unless policy= names that file")


def _show(search: BudgetSearch, ours: Judged, uniform: Judged, more: tuple[float, float]) -> None:
    from rich.table import Table

    from loki_compile.commands.budget_search import beats, needles_decide

    title = "over the same held-out tokens, behind so much of the cache's bytes"
    table = Table(title=title, title_justify="left")
    for column in ("", "bytes", "missed", "KL", "same token", "needles", "answers' KL"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(*ours.cells("budgets per KV head"))
    table.add_row(*uniform.cells("one budget for all"))
    out.print(table)
    for number, line in enumerate(_lines(search)):
        show(f"  layer {number} {line}")
    ways = ", ".join(search.ways)
    show(f"keys come by: {ways}; the integer program is within {search.gap:.2%} of its optimum")
    interval = f"{more[0]:+.4f} to {more[1]:+.4f} nats of KL more"
    if uniform.bytes > ours.bytes * 1.01:
        say(
            f"one budget for all cannot read as little: {uniform.bytes:.1%} of the bytes is its "
            f"least, against {ours.bytes:.1%}"
        )
    needles = f"{ours.needles} needles against {uniform.needles}"
    if not needles_decide(ours, uniform):
        needles = (
            "no needle found by either, so judged by KL alone, of the answers too: "
            f"{ours.answers:.4f} against {uniform.answers:.4f}"
        )
    better = beats(ours, uniform, more)
    lost = ", which is what refuses them" if more[1] < 0 and not better else ""
    surely = "surely" if better else "not surely"
    show(f"budgets per KV head are {surely} better: {interval} (95 % bounds), {needles}{lost}")


def _lines(search: BudgetSearch) -> Sequence[str]:
    made = []
    for kind, keys in zip(search.kinds, search.costs.keys(search.kinds), strict=True):
        word = str(kind)
        made.append(f"{word}: {', '.join(map(str, keys))} of {search.costs.tokens} keys")
    return made
