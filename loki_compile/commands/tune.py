"""`loki tune`: which layers of a model choose keys, and which read what those chose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loki_compile.commands.options import (
    MODEL_HELP,
    MODEL_OPTIONS,
    NUMBER,
    text_of,
    with_options,
)
from loki_compile.commands.output import out, progress, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from loki_compile.commands.plan_search import Tried


@click.command(epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.argument("more_text", metavar="[FILES]...", nargs=-1)
@click.option("--text", "first_text", multiple=True, help="Text files. [Python's own library]")
@click.option("--prompts", type=click.IntRange(1), default=4, show_default=True,
              help="Prompts whose attention is measured.")  # fmt: skip
@click.option("--length", type=click.IntRange(256), help="Tokens of each prompt, and of the "
              "held-out text. [2048, or what the model allows]")  # fmt: skip
@click.option("--top-k", type=NUMBER, default="0.125", show_default=True,
              help="Budget that the plan is for: 0.125 or 1024.")  # fmt: skip
@click.option("--rank", type=NUMBER, default="0.25", show_default=True, help="Dims of the index.")
@click.option("--group-choice", default="max", show_default=True, help='"max" or "probability".')
@click.option("--cost", type=click.FloatRange(0.05, 1.0), default=0.5, show_default=True,
              help="Time of choosing, of what it takes where every layer chooses.")  # fmt: skip
@click.option("--cost-context", type=click.IntRange(256), default=32768, show_default=True,
              help="Cached tokens that times are measured at.")  # fmt: skip
@click.option("--plans", type=click.IntRange(1, 32), default=8, show_default=True,
              help="Plans that are compared by what they make of held-out text.")  # fmt: skip
@click.option("--steps", type=click.IntRange(4), default=48, show_default=True,
              help="Tokens of held-out text that each plan decodes.")  # fmt: skip
@click.option("--out", "folder", type=click.Path(path_type=Path), help="Folder. [the store]")
@click.option("--picture", type=click.Path(path_type=Path), help="PNG to write. [none]")
@with_options(MODEL_OPTIONS)
def command(
    name: str,
    more_text: tuple[str, ...],
    first_text: tuple[str, ...],
    prompts: int,
    length: int | None,
    top_k: int | float,
    rank: int | float,
    group_choice: str,
    cost: float,
    cost_context: int,
    plans: int,
    steps: int,
    folder: Path | None,
    picture: Path | None,
    device: str | None,
    dtype: str,
    random_weights: bool,
) -> None:
    """Find which layers of MODEL choose keys and which read what those chose, and store it.

    policy="tidal" then uses it. Ctrl-C loses nothing: the same command goes on from there.
    """
    from loki_compile.commands.models import (
        check_placement,
        check_writable,
        encode,
        fitting_context,
        load_config,
        load_model,
        load_tokenizer,
    )
    from loki_compile.commands.picture import draw_mass, plan_lines
    from loki_compile.commands.plan_search import Search, Settings
    from loki_compile.pca_store.layer_plan import save_plan
    from loki_compile.pca_store.store import Store

    root = Store(folder).root
    check_placement(device, dtype)
    check_writable("--out" if folder else "the store", root, folder=True)
    if picture is not None:
        check_writable("--picture", picture)
    settings = Settings(top_k, rank, cost, cost_context, plans, steps, group_choice)
    length = fitting_context("--length", length, 2048, load_config(name), room=steps + 64)
    text, source = text_of((*first_text, *more_text), "train")
    tokenizer = load_tokenizer(name)
    needed = (prompts + 1) * length + steps
    ids = encode(tokenizer, text[: 16 * needed])
    if len(ids) < 2 * length + steps:
        raise ValueError(
            f"the text holds {len(ids)} tokens; needs {2 * length + steps}, one prompt and as much "
            "held out: pass more text, or a smaller --length"
        )
    count = min(prompts, (len(ids) - steps) // length - 1)
    if count < prompts:
        say(f"the text holds {count} prompts of the {prompts} asked for")
    read, held_out = ids[: count * length].view(count, length), ids[count * length :]
    say(f"loading {name}; then it reads {count} prompts eagerly, {count * length} tokens")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    search = Search(model, tokenizer, settings, list(read[:, None]), held_out[: length + steps])
    try:
        with progress() as bar:
            reading = bar.add_task(f"reading with {name}", total=count * length)
            trying = bar.add_task("trying plans on held-out text", total=None, visible=False)
            search.read(lambda done: bar.advance(reading, done))
            bar.update(trying, visible=True, total=search.runs)
            tried = search.compare(lambda done: bar.advance(trying, done))
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        raise
    out.print(_table(tried))
    plan = search.plan_of(tried[0], name, source, tried)
    path = save_plan(plan, root)
    search.forget()
    for line in plan_lines(plan):
        show(line)
    if picture is not None:
        draw_mass(plan, picture)
        show(f"wrote {picture}")
    show(f'wrote {path}; policy="tidal" uses it')


def _table(tried: list[Tried]) -> Table:
    from rich.table import Table

    title = "plans on held-out text, best first, and every layer choosing for itself"
    table = Table(title=title, title_justify="left")
    for column in ("choose", "dense", "missed", "choosing time", "KL", "same token", "needles"):
        table.add_column(column, justify="left" if column == "choose" else "right")
    for each in tried:
        table.add_row(*each.cells())
    return table
