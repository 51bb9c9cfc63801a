"""What became of each attention site, and why: the report behind `explain`, logs and artifacts."""

from __future__ import annotations

import json
import logging
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch._dynamo.utils import counters
from torch._logging import trace_structured

from loki_compile.head_reads import reads_of
from loki_compile.kernels.kept import Keeps, PageLayout
from loki_compile.passes.attention import Reason
from loki_compile.policies.kinds import SPANS, Kind

if TYPE_CHECKING:
    from loki_compile.caches import CacheBinding
    from loki_compile.config import LokiConfig
    from loki_compile.passes.attention import AttentionSite, Skipped
    from loki_compile.passes.plan import Plan, SparseSite
    from loki_compile.readings import Reading

log = logging.getLogger("loki_compile")

_KEPT_GRAPHS = 256


class Running(Protocol):
    """The function of a graph that can tell how it fares."""

    gave_up: str | None

    def state(self) -> str:
        """What differs now from the plan, in words: "" if nothing does."""

    def fitted_bases(self) -> dict[str, str]:
        """Of each site whose cache has an automatic basis, by its path: what it was fitted from."""

    def readings(self) -> dict[str, Reading]:
        """Of each site whose rows are weighed, by its path: what they read so far."""


@dataclass(frozen=True)
class SiteReport:
    """One attention site of one graph.

    outcome: "sparse", "dense by plan" or "dense". reason: why it is dense, "" where sparse; see:
    the section of this project's documents that says what would have to change.
    Heads and dims are counts; index_bytes_per_token is what the key index costs per cached token,
    its scales with it (None where dense); basis tells where the projection comes from; note
    is what one should know of its policy and of the kernels that serve its device, mostly "";
    policy chooses keys, or says whose choice is read; reads is the path of the site whose it is;
    spans is what KV heads read where that is spans, as a word of `policy=`; keys and left_out are
    what `stats` has of the site, None where its rows are not weighed, or have not run.
    Where KV heads have budgets of their own: budgets is those, as a word of `policy=` has them,
    whoever chooses for a head; shares, of 8192 keys, how much each reads; ranking_heads how many
    rank keys themselves, None where all or none do.
    """

    path: str
    cache: str
    outcome: str
    reason: str
    query_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    rank: int | None = None
    basis: str = ""
    index_bytes_per_token: float | None = None
    note: str = ""
    see: str = ""
    policy: str = ""
    reads: str = ""
    spans: str = ""
    keys: float | None = None
    left_out: float | None = None
    budgets: str = ""
    shares: tuple[float, ...] = ()
    ranking_heads: int | None = None


@dataclass(frozen=True)
class GraphReport:
    """All attention sites of one graph, in the order in which the graph runs them.

    now: what runs in place of the plan at this moment ("gave up: ..."); "" while it is as planned.
    """

    sites: tuple[SiteReport, ...]
    now: str = ""

    def count(self, outcome: str) -> int:
        return sum(site.outcome == outcome for site in self.sites)


class Reports(list[GraphReport]):
    """Reports that print as a short table: equal layers in one row, graphs that decode first."""

    def __str__(self) -> str:
        return as_text(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("..." if cycle else str(self))


@dataclass(frozen=True)
class Folded:
    """Sites of one graph that differ in their layer alone, and what a table shows of them.

    where: "layers 0-29: model.layers.*.self_attn". heads: query heads / KV heads. dims: of the
    index, of head_dim. now: as in `GraphReport`.
    """

    sites: tuple[SiteReport, ...]
    where: str
    now: str = ""

    @property
    def heads(self) -> str:
        site = self.sites[0]
        return f"{site.query_heads}/{site.kv_heads}" if site.query_heads else ""

    @property
    def dims(self) -> str:
        ranks = {site.rank for site in self.sites if site.rank is not None}
        shown = "?" if not ranks else "-".join(map(str, sorted({min(ranks), max(ranks)})))
        return f"{shown} of {self.sites[0].head_dim}"

    @property
    def reads(self) -> str:
        """What rows read so far, on average, where that is known."""
        known = [(s.keys, s.left_out) for s in self.sites if s.keys is not None]
        if not known:
            return ""
        keys = sum(keys for keys, _ in known) / len(known)
        left_out = sum(share or 0.0 for _, share in known) / len(known)
        return f"reads {keys:.0f} keys, leaves out {left_out:.1%}"


def fold(reports: Iterable[GraphReport]) -> list[Folded]:
    """The rows of all sites: those of graphs that decode first, prefills last, equal rows once."""
    rows: dict[Folded, None] = {}
    for report in sorted(reports, key=_by_plan):
        kinds: dict[tuple[Any, ...], list[SiteReport]] = {}
        for site in report.sites:
            alike = replace(
                site, path="", cache="", rank=None, index_bytes_per_token=None, keys=None,
                left_out=None,
            )  # fmt: skip
            kinds.setdefault((alike, _NUMBER.sub("*", site.path)), []).append(site)
        for sites in kinds.values():
            for same, where in _by_layer(sites):
                rows[Folded(tuple(same), where, report.now)] = None
    return list(rows)


def as_text(reports: Sequence[GraphReport]) -> str:
    """What became of all sites, a line per kind of layer; what runs now where that is not the plan.
    Graphs without a decode step are one line at the end."""
    if not reports:
        return NOTHING
    tables: dict[tuple[Folded, ...], int] = {}
    last: list[GraphReport] = []
    for report in reports:
        if _by_plan(report):
            last.append(report)
        else:
            rows = tuple(fold([report]))
            tables[rows] = tables.get(rows, 0) + 1
    lines = []
    for rows, count in tables.items():
        sites = sum(len(row.sites) for row in rows)
        sparse = sum(len(row.sites) for row in rows if row.sites[0].outcome == "sparse")
        graphs = "1 graph" if count == 1 else f"{count} graphs"
        lines.append(f"{graphs} of {sites} attention sites, {sparse} sparse")
        if rows[0].now:
            lines.append(f"  now: {rows[0].now}")
        cells = [_cells(row) for row in rows]
        widths = [max(len(cell[i]) for cell in cells) for i in range(len(cells[0]))]
        for cell in cells:
            padded = (text.ljust(width) for text, width in zip(cell, widths, strict=True))
            lines.append("  " + "  ".join(padded).rstrip())
    if last:
        sites = sum(len(report.sites) for report in last)
        reasons = dict.fromkeys(site.reason for report in last for site in report.sites)
        graphs = "1 graph" if len(last) == 1 else f"{len(last)} graphs"
        why = f"dense by plan: {'; '.join(reasons)}" if sites else "nothing to rewrite"
        lines.append(f"{graphs} of {sites} attention sites, {why}")
        lines += [f"  now: {now}" for now in dict.fromkeys(r.now for r in last if r.now)]
    return "\n".join(lines)


NOTHING = (
    'No graph was compiled by backend="loki". torch.compile(model, ...).generate() runs the model '
    'uncompiled: call model.compile(backend="loki") and then model.generate().'
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _by_plan(report: GraphReport) -> bool:
    """Whether nothing was to be sparse here: prefills, and graphs without attention."""
    return all(site.outcome == "dense by plan" for site in report.sites)


def _cells(row: Folded) -> tuple[str, str, str, str, str]:
    site = row.sites[0]
    heads = f"{row.heads} heads" if row.heads else ""
    if site.outcome == "sparse":
        more = [f"policy {site.policy}"] if site.policy != "loki" else []
        more += [f"basis {site.basis}"] if site.basis else []
        more += [words for words in (site.note, row.reads) if words]
        dims = f"{row.dims} dims" if site.basis else ""
        return row.where, site.outcome, heads, dims, "; ".join(more)
    return row.where, site.outcome, heads, "", f"{site.reason} ({site.see})"


def _by_layer(sites: Sequence[SiteReport]) -> list[tuple[list[SiteReport], str]]:
    """Sites whose paths differ in numbers alone, with what to call them: apart by every number but
    the last that differs, which becomes a range."""
    numbers = [tuple(map(int, _NUMBER.findall(site.path))) for site in sites]
    differ = [at for at, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    if not differ:
        site = sites[0]
        name = site.path or site.cache or "(fragment)"
        more = f" ({len(sites)} sites)" if len(sites) > 1 else ""
        return [(list(sites), name + more)]
    if len(differ) > 1:
        groups: dict[int, list[SiteReport]] = {}
        for site, found in zip(sites, numbers, strict=True):
            groups.setdefault(found[differ[0]], []).append(site)
        return [part for group in groups.values() for part in _by_layer(group)]
    (at,) = differ
    match = list(_NUMBER.finditer(sites[0].path))[at]
    before, after = sites[0].path[: match.start()], sites[0].path[match.end() :]
    kind = before.rstrip(".").rpartition(".")[2] or "layers"
    shown = shown_ranges({found[at] for found in numbers})
    return [(list(sites), f"{kind} {shown}: {before}*{after}")]


def shown_ranges(numbers: Iterable[int]) -> str:
    """ "0-4, 6, 8-9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


_lock = threading.Lock()
_reports: deque[tuple[GraphReport, Callable[[], Running | None]]] = deque(maxlen=_KEPT_GRAPHS)


def reports() -> Reports:
    """The reports of the graphs compiled by this process, oldest first (the last 256); a list that
    prints as a table.

    They say what is, not what was planned: sites of a graph that gave up are dense, with the
    reason, and `now` tells what is held back or interpreted.
    """
    with _lock:
        kept = list(_reports)
    return Reports(_as_it_is(report, graph()) for report, graph in kept)


def _as_it_is(report: GraphReport, graph: Running | None) -> GraphReport:
    if graph is None:
        return report
    now, fitted, read = graph.state(), graph.fitted_bases(), graph.readings()
    sites = tuple(replace(site, basis=fitted.get(site.path, site.basis)) for site in report.sites)
    sites = tuple(
        replace(site, keys=read[site.path].keys, left_out=read[site.path].left_out)
        if site.outcome != "dense" and site.path in read
        else site
        for site in sites
    )
    if graph.gave_up is not None:
        sites = tuple(
            replace(site, outcome="dense", reason=now, index_bytes_per_token=None)
            if site.outcome == "sparse"
            else site
            for site in sites
        )
    return GraphReport(sites, now)


def clear_reports() -> None:
    """Forgets all reports."""
    with _lock:
        _reports.clear()


def given_up() -> list[str]:
    """What Dynamo runs eagerly, unseen, because it compiled it too often; and what to set.

    One sentence per limit that was reached in this process; `torch._dynamo.utils.counters.clear()`
    forgets them. Dynamo says it in words only (checked on torch 2.11 and 2.13).
    """
    sentences = []
    for text, frames in counters["unimplemented"].items():
        limit = re.search(r"exceeding the (\w+) cache size limit \(currently set to (\d+)\)", text)
        if limit is not None:
            sentences.append(
                f"Dynamo gave up {frames} frame(s) after {limit[2]} compilations: they run eagerly "
                f"and dense. Set torch._dynamo.config.{limit[1]} above {limit[2]} beforehand."
            )
    return sentences


def record_graph(
    plan: Plan,
    config: LokiConfig,
    bindings: list[CacheBinding],
    running: Running | None,
    adapters: int = 0,
) -> GraphReport:
    """Keeps, logs and traces what the plan decided for one graph; `adapters` as for `describe`.

    running: asked how the graph fares, as long as it lives.
    """
    report = describe(plan, config, bindings, adapters)
    told = (lambda: None) if running is None else weakref.ref(running)
    with _lock:
        _reports.append((report, told))
    for site in report.sites:
        name = site.path or site.cache or "attention"
        if site.outcome == "sparse":
            note = f" ({site.note})" if site.note else ""
            log.debug("%s: sparse, rank %s, basis %s%s", name, site.rank, site.basis, note)
        else:
            log.debug("%s: %s: %s", name, site.outcome, site.reason)
    if report.sites:
        sparse, dense = report.count("sparse"), report.count("dense")
        counters["loki"]["sites_sparse"] += sparse
        counters["loki"]["sites_dense"] += dense
        log.info(
            "graph with %d attention sites: %d sparse, %d dense by plan, %d dense",
            len(report.sites),
            sparse,
            report.count("dense by plan"),
            dense,
        )
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "loki_compile_sites", "encoding": "json"},
            payload_fn=lambda: json.dumps([asdict(site) for site in report.sites]),
        )
    return report


def describe(
    plan: Plan, config: LokiConfig, bindings: list[CacheBinding], adapters: int = 0
) -> GraphReport:
    """The report of a plan; order of the graph.

    adapters: low-rank adapters that the graph adds, which a stored basis was not fitted for.
    """
    entries: list[tuple[Any, SiteReport]] = [
        (sparse.site.node, _sparse_report(plan, sparse, bindings[sparse.cache], config, adapters))
        for sparse in plan.sparse
    ]
    known = {site.node: site for site in plan.sites}
    entries += [(skip.node, _dense_report(skip, known.get(skip.node))) for skip in plan.dense]
    if entries:
        position = {node: i for i, node in enumerate(entries[0][0].graph.nodes)}
        entries.sort(key=lambda entry: position[entry[0]])
    return GraphReport(tuple(report for _, report in entries))


def _sparse_report(
    plan: Plan, sparse: SparseSite, binding: CacheBinding, config: LokiConfig, adapters: int
) -> SiteReport:
    site, policy = sparse.site, _policy_text(plan, sparse)
    rank = binding.rank(config.rank) if binding.keeps is Keeps.INDEX else None
    outcome, reason, see, own = "sparse", "", "", reads_of(plan, sparse)
    if sparse.reads_all:
        outcome, see = "dense by plan", _see(Reason.READS_ALL)
        reason = f"reads all keys, and chooses for others ({policy})"
    return SiteReport(
        path=site.path,
        cache=plan.caches[sparse.cache].source,
        outcome=outcome,
        reason=reason,
        see=see,
        query_heads=site.query_heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        rank=rank,
        basis=_basis_text(binding, adapters),
        index_bytes_per_token=_bytes_per_token(binding, rank, config),
        note="; ".join(filter(None, ("" if own is None else str(own), sparse.note))),
        policy=policy,
        reads="" if sparse.source is None else plan.sparse[sparse.source].site.path,
        spans=_spans_text(sparse),
        budgets="" if own is None else own.word,
        shares=() if own is None else own.shares,
        ranking_heads=None if own is None else own.rank,
    )


def _dense_report(skip: Skipped, site: AttentionSite | None) -> SiteReport:
    return SiteReport(
        path=skip.path,
        cache="",
        outcome="dense by plan" if skip.by_plan else "dense",
        reason=skip.sentence(),
        see=_see(skip.reason),
        query_heads=site.query_heads if site else None,
        kv_heads=site.kv_heads if site else None,
        head_dim=site.head_dim if site else None,
    )


def _see(reason: Reason) -> str:
    return f"docs/coverage.md#{reason.name.lower()}"


def _policy_text(plan: Plan, sparse: SparseSite) -> str:
    """By what a site chooses, or whose choice it reads."""
    if sparse.source is None:
        return sparse.choice.ranking.name if sparse.choice.ranking is not None else ""
    source = plan.sparse[sparse.source].site
    number = next(n for n, site in enumerate(plan.sites) if site.node is source.node)
    return f"reuse of layer {source.layer(number)}" + ", heads mapped" * bool(sparse.choice.heads)


def _spans_text(sparse: SparseSite) -> str:
    spans = sparse.choice.spans
    return "" if spans is None else str(Kind(SPANS, spans=spans.heads, sink=spans.sink))


def _bytes_per_token(binding: CacheBinding, rank: int | None, config: LokiConfig) -> float | None:
    """What is kept beside the cache for each of its tokens; None where a spectrum will decide."""
    heads, item = binding.kv_heads, binding.form.item_bytes
    if isinstance(binding.layout, PageLayout):
        return heads * 2 * binding.head_dim * item / binding.layout.page
    if binding.keeps is Keeps.NOTHING:
        return 0.0
    if rank is None:
        return None
    return heads * (rank + 4 if config.index_dtype != "cache" else rank * item)


def _basis_text(binding: CacheBinding, adapters: int) -> str:
    if binding.basis is None or not adapters:
        return binding.basis_name()
    return (
        f"{binding.basis_name()}, of the base weights: {adapters} adapters change what it was "
        "fitted for (merge them and calibrate, or check with loki eval)"
    )
