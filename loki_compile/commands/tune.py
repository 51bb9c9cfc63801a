"""`loki tune`: what each layer reads: what others chose, spans of keys, or so many per head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loki_compile.commands.options import (
    MODEL_HELP,
    MODEL_OPTIONS,
    NUMBER,
    OUT_OPTION,
    READING_OPTIONS,
    AskedModel,
    check_installed,
    check_picture,
    loki_options,
    text_of,
    with_options,
)
from loki_compile.commands.output import going_on, out, progress, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from loki_compile.commands.plan_search import Search, Tried
    from loki_compile.commands.span_search import Compared, SpanSearch


POLICIES = ("loki", "tidal", "moa")
# Options that not all searches have, by their parameters; "target" is that for budgets.
OWN = {
    "target": ("target", "heads", "rank", "steps"),
    "tidal": (
        *("top_k", "rank", "group_choice", "tolerance", "cost_context", "plans", "steps"),
        "picture",
    ),
    "moa": ("density", "sink", "effects"),
}
OF = {"tidal": "--policy tidal", "moa": "--policy moa", "target": "--policy loki or tidal"}


@click.command(epilog=MODEL_HELP)
@with_options(READING_OPTIONS)
@click.option("--policy", type=click.Choice(POLICIES), help="What the plan is for. [tidal; with "
              "--target loki]")  # fmt: skip
@click.option("--target", help="loki, tidal: budgets for each KV head. bytes:0.2: the part of the "
              "cache that a step reads, at most; mass:0.97: attention captured.")  # fmt: skip
@click.option("--heads", type=click.Choice(("ranked", "any")), default="ranked", show_default=True,
              help="--target: heads rank keys, or may also read the last ones, or what a head of "
              "an earlier layer chose.")  # fmt: skip
@click.option("--prompts", type=click.IntRange(1), default=4, show_default=True,
              help="Prompts whose attention is measured; moa: of each length.")  # fmt: skip
@click.option("--length", type=click.IntRange(256), help="Tokens of each prompt, and of the "
              "held-out text; moa: a half and a quarter too. [2048; moa 4096; or what the model "
              "allows]")  # fmt: skip
@click.option("--density", type=click.FloatRange(0.0, 1.0, min_open=True), default=0.5,
              show_default=True, help="moa: keys read, of all, at every length.")  # fmt: skip
@click.option("--sink", type=click.IntRange(0), default=64, show_default=True,
              help="moa: first keys that every head reads.")  # fmt: skip
@click.option("--effects", default="joint", show_default=True,
              help='moa: of all that a span leaves out, or "entrywise", as published.')  # fmt: skip
@click.option("--top-k", type=NUMBER, default="0.125", show_default=True,
              help="tidal: budget that the plan is for: 0.125 or 1024.")  # fmt: skip
@click.option("--rank", type=NUMBER, default="auto", show_default=True,
              help="tidal, --target: dims of the index.")  # fmt: skip
@click.option("--group-choice", default="max", show_default=True,
              help='tidal: "max" or "probability".')  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(0.0), default=0.01, show_default=True,
              help="tidal: nats of KL to dense that the plan may have more than choosing in every "
              "layer, at 95 % confidence; the cheapest such plan that finds as many needles is "
              "taken.")  # fmt: skip
@click.option("--cost-context", type=click.IntRange(256), default=32768, show_default=True,
              help="tidal: cached tokens that times are measured at.")  # fmt: skip
@click.option("--plans", type=click.IntRange(1, 32), default=10, show_default=True,
              help="tidal: plans, from cheap to dear, that the search begins with.")  # fmt: skip
@click.option("--steps", type=click.IntRange(48), default=128, show_default=True,
              help="tidal, --target: tokens decoded of each passage that judges.")  # fmt: skip
@OUT_OPTION
@click.option("--picture", type=click.Path(path_type=Path), help="tidal: PNG to write. [none]")
@with_options(MODEL_OPTIONS)
@click.pass_context
def command(context: click.Context, policy: str | None, **given: Any) -> None:
    """Find what each layer of MODEL reads under a policy, and store it.

    tidal: which layers choose keys, and which read what those chose. moa: how many of the last keys
    each KV head reads. --target: how many keys each KV head chooses, under policy="loki" or in a
    plan of "tidal". The policy then uses it. Ctrl-C loses nothing: the same command goes on from
    there.
    """
    target = given["target"]
    policy = policy or ("tidal" if target is None else "loki")
    if policy == "loki" and target is None:
        raise ValueError("--policy loki: found no target; needs --target bytes:0.2 or mass:0.97")
    search = policy if target is None or policy == "moa" else "target"
    for option in dict.fromkeys(sum(OWN.values(), ())):
        source = context.get_parameter_source(option)
        if option not in OWN[search] and source is click.core.ParameterSource.COMMANDLINE:
            name = f"--{option.replace('_', '-')}"
            of = next(OF[other] for other in OWN if option in OWN[other])
            raise ValueError(f"{name}: that is of {of}; needs {of}, or leave it out")
    check_installed("scipy")
    own = {name: given.pop(name) for name in OWN[search]}
    common = {name: value for name, value in given.items() if name not in sum(OWN.values(), ())}
    model = AskedModel.taken(common)
    files = (*common.pop("first_text"), *common.pop("more_text"))
    with going_on():
        if search == "target":
            from loki_compile.commands.tune_budgets import tune_budgets

            tune_budgets(model, files, policy=policy, **common, **own)
        else:
            (_tune_layers if policy == "tidal" else _tune_spans)(model, files, **common, **own)


def _tune_layers(
    asked: AskedModel,
    files: tuple[str, ...],
    prompts: int,
    length: int | None,
    folder: Path | None,
    picture: Path | None,
    **of_search: Any,
) -> None:
    from loki_compile.commands.models import (
        check_writable,
        fitting_context,
        load_config,
        load_tokenizer,
    )
    from loki_compile.commands.picture import draw_mass, plan_lines
    from loki_compile.commands.plan_search import TEXTS, Search, Settings
    from loki_compile.commands.texts import prompts_of
    from loki_compile.pca_store.layer_plan import save_plan
    from loki_compile.pca_store.store import Store

    settings = Settings(**of_search)
    loki_options(
        policy="tidal",
        top_k=settings.top_k,
        rank=settings.rank,
        group_choice=settings.group_choice,
    )
    root = Store(folder).root
    asked.check()
    check_writable("--out" if folder else "the store", root, folder=True)
    check_picture(picture)
    config, steps = load_config(asked.name), settings.steps
    length = fitting_context("--length", length, 2048, config, room=2 * steps)
    text, source = text_of(files, "train")
    tokenizer = load_tokenizer(asked.name)
    read, held_out = prompts_of(tokenizer, text, prompts, length, steps, TEXTS)
    say(f"loading {asked.name}; then it reads {len(read)} prompts eagerly, {read.numel()} tokens")
    search = Search(asked.load(), tokenizer, settings, list(read[:, None]), held_out)
    tried = _searched(search, asked.name, read.numel())
    plan = search.plan_of(tried[0], asked.name, source, tried)
    path = save_plan(plan, root)
    search.forget()
    out.print(_table(tried))
    for line in plan_lines(plan):
        show(line)
    if picture is not None:
        draw_mass(plan, picture)
        show(f"wrote {picture}")
    show(f'wrote {path}; policy="tidal" uses it')


def _searched(search: Search, name: str, tokens: int) -> list[Tried]:
    """The plans that a search has judged, the one to take first, with bars."""
    with progress() as bar:
        reading = bar.add_task(f"reading with {name}", total=tokens)
        trying = bar.add_task("trying plans on held-out text", total=None, visible=False)
        search.read(lambda done: bar.advance(reading, done))
        bar.update(trying, visible=True, total=search.runs)
        tried = search.compare(lambda done: bar.advance(trying, done))
        bar.update(trying, total=1, completed=1)
    if tried[0].kinds == tried[-1].kinds:
        say("no plan in which layers reuse was within --tolerance: every layer chooses")
    if not tried[-1].needles:
        say(
            "no needle is found where every layer chooses, so that none can be lost: judged by KL "
            "alone, of the answers too"
        )
    return tried


def _tune_spans(
    asked: AskedModel,
    files: tuple[str, ...],
    prompts: int,
    length: int | None,
    folder: Path | None,
    **of_search: Any,
) -> None:
    from loki_compile.commands.models import (
        check_writable,
        fitting_context,
        load_config,
        load_tokenizer,
    )
    from loki_compile.commands.span_search import (
        EFFECTS,
        SpanSearch,
        SpanSettings,
        lengths_of,
        span_prompts,
    )
    from loki_compile.pca_store.layer_plan import SPANS_SUFFIX, save_plan
    from loki_compile.pca_store.store import Store

    settings = SpanSettings(**of_search)
    if settings.effects not in EFFECTS:
        raise ValueError(f"--effects {settings.effects}: needs one of {', '.join(EFFECTS)}")
    root = Store(folder).root
    asked.check()
    check_writable("--out" if folder else "the store", root, folder=True)
    longest = fitting_context("--length", length, 4096, load_config(asked.name))
    lengths = lengths_of(longest, settings)
    text, source = text_of(files, "train")
    tokenizer = load_tokenizer(asked.name)
    made, what = span_prompts(tokenizer, text, lengths, prompts, given=bool(files))
    say(f"loading {asked.name}; what counts in {source}: {what}")
    search = SpanSearch(asked.load(), settings, made)
    for lacking in search.lacking(prompts):
        say(lacking)
    compared = _profiled(search, asked.name)
    plan = search.plan_of(asked.name, f"{source}: {what}"[:4096], compared)
    path = save_plan(plan, root, SPANS_SUFFIX)
    search.forget()
    _show_spans(search, compared, longest)
    show(f'wrote {path}; policy="moa" uses it')


def _profiled(search: SpanSearch, name: str) -> Compared:
    """What the spans that a search has chosen make of held-out text, with bars."""
    held_out = sum(map(len, search.held_out))
    with search, progress() as bar:
        reading = bar.add_task(f"profiling {name}", total=search.tokens)
        comparing = bar.add_task("held-out text", total=held_out, visible=False)
        search.read(lambda done: bar.advance(reading, done))
        search.choose()
        bar.update(comparing, visible=held_out > 0)
        return search.compare(lambda done: bar.advance(comparing, done))


def _show_spans(search: SpanSearch, compared: Compared, longest: int) -> None:
    out.print(_span_table(search.lengths, search.densities(), compared))
    for number, (layer, spans) in enumerate(search.plan.items()):
        share = f"{spans.share(longest):.0%} of {longest}"
        show(f"  layer {number} ({layer}) reads {share}: {', '.join(map(str, spans.heads))}")
    for layer, why in search.profiler.refused.items():
        say(f"{layer} is not in the plan, and reads all keys: {why}")
    show(f"the integer program is within {search.gap:.2%} of its optimum")


def _span_table(
    lengths: tuple[int, ...],
    densities: dict[str, float],
    compared: Compared,
) -> Table:
    from rich.table import Table

    title = "what is read, and what a held-out prompt makes of it: KL to dense, and loss gained"
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "read", *compared):
        table.add_column(column, justify="right")
    for number, length in enumerate(lengths):
        read = f"{densities[str(length)]:.1%}"
        of_length = [each[number] for each in compared.values()]
        pairs = ["" if pair is None else f"{pair[0]:.4f} {pair[1]:+.4f}" for pair in of_length]
        table.add_row(str(length), read, *pairs)
    return table


def _table(tried: list[Tried]) -> Table:
    from rich.table import Table

    title = "plans that were judged, the one to take first, and every layer choosing for itself"
    table = Table(title=title, title_justify="left")
    columns = "choose", "dense", "missed", "choosing time", "KL", "more than all"
    for column in (*columns, "same token", "needles", "answers' KL", "holds"):
        table.add_column(column, justify="left" if column == "choose" else "right")
    for each in tried:
        table.add_row(*each.cells())
    return table
