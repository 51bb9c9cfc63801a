"""`loki bench`: tokens per second by context, dense and sparse in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from loki_compile.commands.options import (
    LOKI_OPTIONS,
    MODEL_HELP,
    MODEL_OPTIONS,
    loki_options,
    say_if_dense,
    with_options,
)
from loki_compile.commands.output import announcing, err, out, say, show


@click.command(epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.option("--context", "contexts", type=click.IntRange(1), multiple=True,
              help="May be repeated. [1024, 4096, 16384 where the model allows]")  # fmt: skip
@click.option("--cache", type=click.Choice(["static", "dynamic"]), default="static")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--out", "file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
@with_options(LOKI_OPTIONS)
@with_options(MODEL_OPTIONS)
def command(
    name: str,
    contexts: tuple[int, ...],
    cache: str,
    rounds: int,
    file: Path | None,
    device: str | None,
    dtype: str,
    random_weights: bool,
    **loki: Any,
) -> None:
    """Tokens per second of MODEL by context, dense and sparse in one run, over a cache of noise."""
    from loki_compile.commands.measure import latencies, many_variants, room_for, variants
    from loki_compile.commands.models import (
        check_placement,
        check_writable,
        fitting_context,
        load_config,
        load_model,
        longest_context,
    )

    options = loki_options(**loki)
    check_placement(device, dtype)
    if file is not None:
        check_writable("--out", file)
    config, room = load_config(name), room_for(rounds)
    if contexts:
        for context in contexts:
            fitting_context("--context", context, context, config, room)
    else:
        longest = longest_context(config) - room
        contexts = tuple(c for c in (1024, 4096, 16384) if c <= longest) or (max(longest, 1),)
    for context in contexts:
        say_if_dense(options, context)
    say(f"loading {name}")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    steps = variants(model, {"loki": options})
    table = Table(title=f"{name}: tokens per second ({cache} cache)", title_justify="left")
    for column in ("cached tokens", *steps, "against the faster dense"):
        table.add_column(column, justify="right")
    rows = []
    with many_variants(), err.status("compiling and timing") as status:
        for context in contexts:
            status.update(f"{context} cached tokens")
            begin = announcing(f"{context} cached tokens")
            ms = latencies(model, steps, context, cache=cache, rounds=rounds, begin=begin)
            ratio = min(ms["eager"], ms["inductor"]) / ms["loki"]
            table.add_row(
                str(context), *(f"{1e3 / ms[step]:.1f}" for step in steps), f"{ratio:.2f}x"
            )
            rows.append({"context": context, "ms_per_token": ms, "against_dense": ratio})
    out.print(table)
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n")
        show(f"wrote {file}")
