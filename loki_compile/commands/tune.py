"""`loki tune`: what each layer of a model reads: which choose keys for others, or spans of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loki_compile.commands.options import (
    MODEL_HELP,
    MODEL_OPTIONS,
    NUMBER,
    OUT_OPTION,
    READING_OPTIONS,
    check_installed,
    check_picture,
    loki_options,
    text_of,
    with_options,
)
from loki_compile.commands.output import going_on, out, progress, say, show

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from loki_compile.commands.plan_search import Tried
    from loki_compile.commands.span_search import Compared, SpanSearch


POLICIES = ("tidal", "moa")
# Prompts' worth of text, at most, that held-out passages are spread over.
SPREAD = 32
# Options that one policy alone has, by their parameters.
OWN = {
    "tidal": (
        *("top_k", "rank", "group_choice", "tolerance", "cost_context", "plans", "steps"),
        "picture",
    ),
    "moa": ("density", "sink", "effects"),
}


@click.command(epilog=MODEL_HELP)
@with_options(READING_OPTIONS)
@click.option("--policy", type=click.Choice(POLICIES), default="tidal", show_default=True,
              help="What the plan is for.")  # fmt: skip
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
              help="tidal: dims of the index.")  # fmt: skip
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
              help="tidal: tokens decoded of each passage; five of these judge.")  # fmt: skip
@OUT_OPTION
@click.option("--picture", type=click.Path(path_type=Path), help="tidal: PNG to write. [none]")
@with_options(MODEL_OPTIONS)
@click.pass_context
def command(context: click.Context, policy: str, **given: Any) -> None:
    """Find what each layer of MODEL reads under a policy, and store it.

    tidal: which layers choose keys, and which read what those chose. moa: how many of the last keys
    each KV head reads. policy="tidal" or "moa" then uses it. Ctrl-C loses nothing: the same command
    goes on from there.
    """
    for other in POLICIES:
        for option in OWN[other]:
            source = context.get_parameter_source(option)
            if other != policy and source is click.core.ParameterSource.COMMANDLINE:
                name = f"--{option.replace('_', '-')}"
                raise ValueError(
                    f"{name}: that is of --policy {other}; needs --policy {other}, or leave it out"
                )
    own = {name: given[name] for name in OWN[policy]}
    files = (*given["first_text"], *given["more_text"])
    asked = _Asked(files=files, **{each.name: given[each.name] for each in fields(_Asked)[1:]})
    with going_on():
        (_tune_layers if policy == "tidal" else _tune_spans)(asked, **own)


@dataclass(frozen=True)
class _Asked:
    """What is given for any policy."""

    files: tuple[str, ...]
    name: str
    prompts: int
    length: int | None
    folder: Path | None
    device: str | None
    dtype: str
    random_weights: bool

    def store(self) -> Path:
        """The folder that plans go to.

        Raises:
          ValueError: it cannot be written, or there is no such device or dtype.
        """
        from loki_compile.commands.models import check_placement, check_writable
        from loki_compile.pca_store.store import Store

        root = Store(self.folder).root
        check_placement(self.device, self.dtype)
        check_writable("--out" if self.folder else "the store", root, folder=True)
        return root

    def model(self) -> Any:
        from loki_compile.commands.models import load_model

        return load_model(
            self.name, device=self.device, dtype=self.dtype, random_weights=self.random_weights
        )


def _tune_layers(asked: _Asked, picture: Path | None, **own: Any) -> None:
    from loki_compile.commands.models import load_tokenizer
    from loki_compile.commands.picture import draw_mass, plan_lines
    from loki_compile.commands.plan_search import Search, Settings
    from loki_compile.pca_store.layer_plan import save_plan

    settings = Settings(**own)
    chosen = {name: own[name] for name in ("top_k", "rank", "group_choice")}
    loki_options(policy="tidal", **chosen)
    root = asked.store()
    check_picture(picture)
    tokenizer = load_tokenizer(asked.name)
    read, held_out, source = _read_and_held_out(asked, tokenizer, settings.steps)
    say(f"loading {asked.name}; then it reads {len(read)} prompts eagerly, {read.numel()} tokens")
    search = Search(asked.model(), tokenizer, settings, list(read[:, None]), held_out)
    with progress() as bar:
        reading = bar.add_task(f"reading with {asked.name}", total=read.numel())
        trying = bar.add_task("trying plans on held-out text", total=None, visible=False)
        search.read(lambda done: bar.advance(reading, done))
        bar.update(trying, visible=True, total=search.runs)
        tried = search.compare(lambda done: bar.advance(trying, done))
        bar.update(trying, total=1, completed=1)
    plan = search.plan_of(tried[0], asked.name, source, tried)
    path = save_plan(plan, root)
    search.forget()
    out.print(_table(tried))
    for line in plan_lines(plan):
        show(line)
    if tried[0].kinds == tried[-1].kinds:
        say("no plan in which layers reuse was within --tolerance: every layer chooses")
    if picture is not None:
        draw_mass(plan, picture)
        show(f"wrote {picture}")
    show(f'wrote {path}; policy="tidal" uses it')


def _read_and_held_out(asked: _Asked, tokenizer: Any, steps: int) -> tuple[Tensor, Tensor, str]:
    """Prompts (count, length), ids behind them that judge plans, and what the text is.

    Raises:
      ValueError: too little text.
    """
    from loki_compile.commands.models import encode, fitting_context, load_config
    from loki_compile.commands.plan_search import TEXTS

    length = fitting_context(
        "--length", asked.length, 2048, load_config(asked.name), room=2 * steps
    )
    text, source = text_of(asked.files, "train")
    least = length + TEXTS * steps
    # Passages are spread over all that lies behind the prompts: text of several kinds judges best.
    ids = encode(tokenizer, text[: 16 * (asked.prompts + SPREAD) * (length + steps)])
    if len(ids) < length + least:
        raise ValueError(
            f"the text holds {len(ids)} tokens; needs {length + least}, one prompt and as much "
            "held out: pass more text, or a smaller --length"
        )
    count = min(asked.prompts, (len(ids) - least) // length)
    if count < asked.prompts:
        say(f"the text holds {count} prompts of the {asked.prompts} asked for")
    read, held_out = ids[: count * length].view(count, length), ids[count * length :]
    return read, held_out, source


def _tune_spans(asked: _Asked, density: float, sink: int, effects: str) -> None:
    from loki_compile.commands.models import fitting_context, load_config, load_tokenizer
    from loki_compile.commands.span_search import (
        EFFECTS,
        SpanSearch,
        SpanSettings,
        lengths_of,
        span_prompts,
    )
    from loki_compile.pca_store.layer_plan import SPANS_SUFFIX, save_plan

    check_installed("scipy")
    if effects not in EFFECTS:
        raise ValueError(f"--effects {effects}: needs one of {', '.join(EFFECTS)}")
    root = asked.store()
    settings = SpanSettings(density, sink, effects)
    longest = fitting_context("--length", asked.length, 4096, load_config(asked.name))
    lengths = lengths_of(longest, settings)
    text, source = text_of(asked.files, "train")
    made, what = span_prompts(
        load_tokenizer(asked.name), text, lengths, asked.prompts, given=bool(asked.files)
    )
    say(f"loading {asked.name}; what counts in {source}: {what}")
    search = SpanSearch(asked.model(), settings, made)
    for lacking in search.lacking(asked.prompts):
        say(lacking)
    held_out = sum(map(len, search.held_out))
    with search, progress() as bar:
        reading = bar.add_task(f"profiling {asked.name}", total=search.tokens)
        comparing = bar.add_task("held-out text", total=held_out, visible=False)
        search.read(lambda done: bar.advance(reading, done))
        search.choose()
        bar.update(comparing, visible=held_out > 0)
        compared = search.compare(lambda done: bar.advance(comparing, done))
    plan = search.plan_of(asked.name, f"{source}: {what}"[:4096], compared)
    path = save_plan(plan, root, SPANS_SUFFIX)
    search.forget()
    _show_spans(search, compared, longest)
    show(f'wrote {path}; policy="moa" uses it')


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
