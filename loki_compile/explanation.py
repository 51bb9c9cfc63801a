"""`explain(model, ...)`: what each attention site of a call would become, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from loki_compile.backend import analyse
from loki_compile.config import LokiConfig
from loki_compile.report import Folded, GraphReport, Reports, fold
from loki_compile.watching import watched

if TYPE_CHECKING:
    from rich.table import Table


def explain(
    model: nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Reports:
    """The report of each graph of `model(*args, **kwargs)`; nothing is compiled or rewritten.

    The call itself takes place once, eagerly: a cache that is passed grows by its tokens. Pass a
    decode step (one token and a filled cache), since prefills stay dense by plan.

    Args:
        model: any module.
        *args, **kwargs: what it is called with.
        options: as in `torch.compile(..., options=)`.

    Raises:
        ValueError: an option or a basis that the backend would refuse.
    """
    config = LokiConfig.from_options(options)
    found = Reports()
    refused: list[ValueError] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            found.append(analyse(gm, example_inputs, config))
        except ValueError as error:  # Dynamo would bury it in one of its own
            refused.append(error)
        return gm.forward

    model = getattr(model, "_orig_mod", model)
    with torch.no_grad(), watched(model, look) as run:
        run(*args, **kwargs)
    if refused:
        raise refused[0]
    return found


def site_table(reports: Sequence[GraphReport], config: LokiConfig, context: int) -> Table:
    """A table of all sites, with budget and index memory at `context` visible keys."""
    from rich.table import Table

    table = Table(title=f"attention sites, with {context} cached tokens", title_justify="left")
    for name, justify in (
        ("site", "left"),
        ("became", "left"),
        ("heads q/kv", "right"),
        ("dims", "right"),
        ("keys read", "right"),
        ("index", "right"),
        ("basis, or why not", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in fold(reports):
        table.add_row(*_row(row, config, context))
    return table


def _row(row: Folded, config: LokiConfig, context: int) -> list[str]:
    site = row.sites[0]
    sparse = site.outcome == "sparse"
    dims = f"{site.head_dim}" if site.head_dim else ""
    keys, index, outcome = "", "", row.now or site.outcome
    if sparse:
        dims = row.dims
        if not _runs_sparse(config, context):
            outcome, keys = "dense here", f"all {context}"
        else:
            keys = f"{config.budget.keys(context)} of {context}"
        # Sites that share a cache share its index.
        each = {s.cache or s.path: s.index_bytes_per_token for s in row.sites}
        if None not in each.values():
            index = _bytes(sum(each.values()) * context)  # type: ignore[arg-type]
    served = f"{site.basis}; {site.note}" if site.note else site.basis
    why = served if sparse else f"{site.reason} ({site.see})"
    return [row.where, outcome, row.heads, dims, keys, index, why]


def _runs_sparse(config: LokiConfig, context: int) -> bool:
    """As the runtime decides: `min_context=0` forces the sparse variant."""
    if config.min_context == 0:
        return True
    return context >= config.min_context and not config.budget.covers(context)


def dense_because(config: LokiConfig, context: int) -> str:
    """Why nothing runs sparse at `context` visible keys; "" where it does."""
    if _runs_sparse(config, context):
        return ""
    if context < config.min_context:
        return f"min_context={config.min_context}"
    return f"top_k={config.top_k} covers them"


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
