"""`loki explain`: what each attention site of a model becomes, as a table with sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loki_compile.commands.options import (
    LOKI_OPTIONS,
    MODEL_HELP,
    MODEL_OPTIONS,
    check_basis,
    check_picture,
    dense_because,
    loki_options,
    runs_sparse,
    with_options,
)
from loki_compile.commands.output import out, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from loki_compile.config import LokiConfig
    from loki_compile.report import Folded, GraphReport


@click.command(epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.option("--cache", type=click.Choice(["static", "dynamic"]), default="static")
@click.option("--context", type=click.IntRange(2), help="Cached tokens that budgets and memory are "
              "given for. [4096, or what the model allows]")  # fmt: skip
@click.option("--basis", help="Store name, path or hub id.")
@click.option(
    "--prefill",
    type=click.Choice(["dense", "spans"]),
    help="spans: also what a prompt of --context tokens reads; the model reads it once.",
)
@click.option("--picture", type=click.Path(path_type=Path),
              help='With --policy tidal: PNG of who reads what whom chose. [none]')  # fmt: skip
@with_options(LOKI_OPTIONS)
@with_options(MODEL_OPTIONS)
def command(
    name: str,
    cache: str,
    context: int | None,
    basis: str | None,
    prefill: str | None,
    picture: Path | None,
    device: str | None,
    dtype: str,
    random_weights: bool,
    **loki: Any,
) -> None:
    """What each attention site of MODEL becomes in a decode step, and why."""
    from loki_compile.commands.measure import decode_reports, prompt_reports
    from loki_compile.commands.models import (
        check_placement,
        fitting_context,
        load_config,
        load_model,
    )
    from loki_compile.config import LokiConfig
    from loki_compile.report import given_up

    config = LokiConfig.from_options(loki_options(basis=basis, prefill=prefill, **loki))
    if picture is not None and config.policy != "tidal":
        raise ValueError("--picture: shows who reads what whom chose; needs --policy tidal")
    check_picture(picture)
    check_placement(device, dtype)
    check_basis(basis or "auto")
    context = fitting_context("--context", context, 4096, load_config(name))
    say(f"loading {name}; then one decode step is traced, and nothing compiled")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    found = decode_reports(model, cache, context, config.to_options())
    out.print(site_table(found, config, context))
    out.print(summary(found, config, context))
    if config.prefill == "spans":
        say(f"a prompt of {context} tokens is read")
        _show_prompt(prompt_reports(model, cache, context, config.to_options()))
    for sentence in given_up():
        out.print(sentence)
    if config.policy == "tidal":
        _show_plan(model, config, picture)
    elif config.policy == "moa" or config.plan_file:
        show(_plan_of_spans(model, config))
    elif config.open_budget:
        _show_budgets(model, config)


def _show_budgets(model: Any, config: LokiConfig) -> None:
    """Whether the plan of budgets that is stored for a model serves, if there is one."""
    from loki_compile.commands.stored import stored_plan, weights_of, why_not_used

    plan = stored_plan("loki", lambda: weights_of(model))
    if plan is None:
        return
    found = f"the plan of budgets that `loki tune` found {plan.created[:10]}"
    found += f" from {plan.source or 'some text'}"
    why = why_not_used(plan, config)
    show(f"{found} is not used: {why}" if why else f"KV heads read what {found} has for them")


def _show_prompt(reports: Sequence[GraphReport]) -> None:
    """A line for each kind of layer: what it reads of a prompt, or why it is dense."""
    from loki_compile.report import fold

    for row in fold(reports):
        show(f"  {row.where}: {row.sites[0].reason} ({row.sites[0].see})")


def _plan_of_spans(model: Any, config: LokiConfig) -> str:
    """Where what is read comes from, under "moa" or the plan of a file."""
    from loki_compile.commands.stored import plan_in, stored_plan, weights_of
    from loki_compile.plan_words import differing
    from loki_compile.published import PublishedSpans

    plan = plan_in(config.plan_file) if config.plan_file else None
    if isinstance(plan, PublishedSpans):
        return f"the plan is as published in {plan.origin}"
    plan = plan or stored_plan("moa", lambda: weights_of(model))
    if plan is None:
        return (
            "no plan of spans is stored for this model, so that spans are a guess, as long for "
            "every head as top_k: `loki tune --policy moa`"
        )
    found = f"the plan is as `loki tune` found {plan.created[:10]}"
    other = differing(plan, config)
    return f"{found}, from {plan.source or 'some text'}" + (f"; {other}" if other else "")


def _show_plan(model: Any, config: LokiConfig, picture: Path | None) -> None:
    """The plan that is stored for a model: a line for each group of layers, and what they capture.

    Raises:
        ValueError: a picture is asked for, and no plan is stored.
    """
    from loki_compile.commands.picture import draw_mass, mass_lines, plan_lines
    from loki_compile.commands.stored import stored_plan, weights_of
    from loki_compile.plan_words import differing

    plan = stored_plan("tidal", lambda: weights_of(model))
    if plan is None:
        if picture is not None:
            raise ValueError(
                "--picture: no plan is stored for this model; needs one, by `loki tune`"
            )
        show(
            "no plan is stored for this model, so that which layers choose is a guess: `loki tune`"
        )
        return
    for line in plan_lines(plan):
        show(line)
    if other := differing(plan, config):
        show(f"  {other}")
    show("  attention captured, in tenths, by choosing layer (row) and reader; [] as planned:")
    for line in mass_lines(plan):
        show(line)
    if picture is not None:
        draw_mass(plan, picture)
        show(f"wrote {picture}")


def site_table(reports: Sequence[GraphReport], config: LokiConfig, context: int) -> Table:
    """A table of all sites, with budget and index memory at `context` visible keys."""
    from rich.table import Table

    from loki_compile.report import fold

    table = Table(title=f"attention sites, with {context} cached tokens", title_justify="left")
    for name, justify in (
        ("site", "left"),
        ("became", "left"),
        ("heads q/kv", "right"),
        ("dims", "right"),
        ("keys read", "right"),
        ("index", "right"),
        ("policy and basis, or why not", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in fold(reports):
        table.add_row(*_row(row, config, context))
    return table


def _row(row: Folded, config: LokiConfig, context: int) -> list[str]:
    from loki_compile.commands.traffic import keys_read

    site = row.sites[0]
    sparse = site.outcome == "sparse"
    dims = f"{site.head_dim}" if site.head_dim else ""
    keys, index, outcome = "", "", row.now or site.outcome
    if sparse:
        dims = row.dims if site.basis else dims
        if not runs_sparse(config, context):
            outcome, keys = "dense here", f"all {context}"
        else:
            keys = f"{keys_read(site, config, context)} of {context}"
    # Sites that share a cache share its index.
    each = {s.cache or s.path: s.index_bytes_per_token for s in row.sites}
    if None not in each.values():
        index = _bytes(sum(each.values()) * context)  # type: ignore[arg-type]
    chooses = site.policy if site.policy != "loki" else ""
    served = "; ".join(part for part in (chooses, site.basis, site.note) if part)
    why = served if sparse else f"{site.reason} ({site.see})"
    return [row.where, outcome, row.heads, dims, keys, index, why]


def summary(reports: Sequence[GraphReport], config: LokiConfig, context: int) -> str:
    """One line: how many sites, how many sparse, what the indexes cost in all."""
    sites = [site for report in reports for site in report.sites]
    sparse = [site for site in sites if site.outcome == "sparse"]
    # Sites that share a cache share its index.
    each = {
        (number, site.cache): site.index_bytes_per_token or 0
        for number, report in enumerate(reports)
        for site in report.sites
    }
    memory = sum(each.values()) * context
    line = f"{len(sparse)} of {len(sites)} sites sparse in {len(reports)} graph(s)"
    if sparse and (why := dense_because(config, context)):
        return f"{line}; at {context} cached tokens they run dense ({why})"
    return f"{line}; indexes take {_bytes(memory)} at {context} cached tokens" if sparse else line


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
