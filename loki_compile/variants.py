"""What a graph is compiled to, and what is computed beside it: all of it made when first needed.

The runtime knows calls; this file knows the graph: its dense and its sparse variant, the one that
is dense and keeps indexes true, the graph that tells how far a cache is filled, and those that tell
what masks let see of one.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loki_compile.caches import GivenSize, reading_waits
from loki_compile.engines import Variant, in_turn
from loki_compile.kernels.kept import Layout
from loki_compile.passes.appends import Append
from loki_compile.passes.attention import MaskTerm
from loki_compile.passes.calls import fake_value
from loki_compile.passes.dense import rewrite_dense
from loki_compile.passes.graphs import copy_of, extract, log_change, ops_of, remap
from loki_compile.passes.in_place import Rooms, add_rooms, new_capacity, write_behind
from loki_compile.passes.masks import what_is_seen
from loki_compile.passes.plan import Plan
from loki_compile.passes.rollback import what_to_save
from loki_compile.passes.row_products import FEW
from loki_compile.passes.sparse import keep_true, rewrite_sparse
from loki_compile.passes.write_forms import counted_by

log = logging.getLogger("loki_compile")


@dataclass(frozen=True)
class Counted:
    """The slots that a call writes in a cache, as one of its arguments counts them on the host."""

    argument: int
    rows: int

    def slots(self, args: Sequence[Any]) -> tuple[int, int]:
        """The first of them, and the one behind the last."""
        first = int(args[self.argument])
        return first, first + self.rows


@dataclass
class FillGraph:
    """Computes, outside the compiled graph, how far one cache will be filled in its slots."""

    gm: fx.GraphModule
    place: int  # of the cache, in the plan
    plus: list[int]
    counted: Counted | None = None  # says the same, sooner

    def __post_init__(self) -> None:
        inputs = self.gm.graph.find_nodes(op="placeholder")
        self.reads = [number for number, node in enumerate(inputs) if node.users]
        for node in inputs:
            if not node.users:  # a call has hundreds, and this runs at every step
                self.gm.graph.erase_node(node)
        self.gm.recompile()

    def read(self, args: Sequence[Any]) -> int | Tensor:
        """Tokens in the slots behind this step; a tensor where the call's positions are one."""
        if self.counted is not None:
            return self.counted.slots(args)[1]
        with torch.no_grad():
            values = self.gm.forward(*[args[number] for number in self.reads])
        ends = [v.max() if isinstance(v, Tensor) else int(v) for v in values]
        ends = [end + plus for end, plus in zip(ends, self.plus, strict=True)]
        return ends[0] if len(ends) == 1 else max(ends)


class Variants:
    """The forms of one graph with at least one sparse site."""

    def __init__(
        self,
        gm: fx.GraphModule,
        plan: Plan,
        pack_gqa: bool,
        compile_graph: Callable[[fx.GraphModule, str, Callable[[], None]], Variant],
        counts: Sequence[int | GivenSize],
        appends: Sequence[Append] = (),
    ) -> None:
        """
        Args:
          appends: what both variants write in place.
          compile_graph: makes a variant of a graph, given in words which it is, and what to call
            when it has to be run node by node.
          counts: new tokens of each sparse site.
        """
        self.gm = gm
        self.plan = plan
        self.pack_gqa = pack_gqa
        self.appends = tuple(appends)
        self.capacity: torch.SymInt | None = None
        self.compile_graph = compile_graph
        self.rules = {sparse.choice.rule for sparse in plan.sparse}
        self.token_counts = [count for count in set(counts) if not isinstance(count, int)]
        tokens = [sparse.site.tokens for sparse in plan.sparse]
        self.few = frozenset(x.node.expr for x in tokens if isinstance(x, torch.SymInt))
        self.outputs = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.undo = what_to_save(gm.graph)
        self.fill = _fill_graph(gm, plan)
        self.runs: list[Variant] = []  # what was made of the variants
        waits = any(reading_waits(fake_value(cache.past)) for cache in plan.caches)
        self.positions_wait = self.fill is not None and waits
        # Where calls write each cache, in the plan's order; None where only a graph could tell.
        self.counted = [None] * len(plan.caches) if waits else _counted(gm, plan)
        if self.fill is not None:
            self.fill.counted = self.counted[self.fill.place]
        self.seen_graphs: dict[tuple[MaskTerm, ...], fx.GraphModule | None] = {}

    @property
    def sparse_sites(self) -> int:
        return sum(not sparse.reads_all for sparse in self.plan.sparse)

    @property
    def sites(self) -> int:
        return len(self.plan.sites)

    def dense(self, missed: Callable[[], None], *, copying: bool = False) -> Variant:
        """The graph with exact attention as fast as can be, compiled; `copying` what grows, as it
        was written: of its inputs, it takes the capacity alone."""
        gm, mapping = copy_of(self.gm)
        before = ops_of(gm.graph)
        rooms = self._rooms(gm, mapping, () if copying else self.appends)
        if self.pack_gqa:
            gm = rewrite_dense(gm, self.plan.on(mapping).sites)
        return self._compiled(gm, "dense", before, rooms, missed)

    def sparse(self, layouts: Sequence[Layout | None], missed: Callable[[], None]) -> Variant:
        """The graph with its sparse sites rewritten, compiled; `layouts` as `rewrite_sparse` takes
        them."""
        gm, mapping = copy_of(self.gm)
        plan = self.plan.on(mapping)
        sparse_sites = {s.site.node for s in plan.sparse if not s.reads_all}
        before = ops_of(gm.graph)
        rooms = self._rooms(gm, mapping, self.appends)
        gm = rewrite_sparse(gm, plan, layouts, rooms)
        if self.pack_gqa:
            gm = rewrite_dense(gm, [s for s in plan.sites if s.node not in sparse_sites])
        gm.meta[FEW] = self.few
        return self._compiled(gm, "sparse", before, rooms, missed)

    def exact(self, layouts: Sequence[Layout | None], missed: Callable[[], None]) -> Variant:
        """The dense graph that keeps true what is kept beside caches, compiled: it takes and
        returns what the sparse one does. It is called with few tokens alone."""
        gm, mapping = copy_of(self.gm)
        plan = self.plan.on(mapping)
        before = ops_of(gm.graph)
        rooms = self._rooms(gm, mapping, self.appends)
        gm = keep_true(gm, plan, layouts, rooms)
        if self.pack_gqa:
            gm = rewrite_dense(gm, plan.sites, few_tokens=True)
        gm.meta[FEW] = self.few
        return self._compiled(gm, "exact", before, rooms, missed)

    def _rooms(
        self, gm: fx.GraphModule, mapping: dict[fx.Node, fx.Node], appends: Sequence[Append]
    ) -> Rooms | None:
        """Inputs for what grows, in a copy of the graph."""
        if not self.appends:
            return None
        if self.capacity is None:
            self.capacity = new_capacity(self.gm.graph, self.appends)
        return add_rooms(gm.graph, remap(tuple(appends), mapping), self.capacity)

    def _compiled(
        self,
        gm: fx.GraphModule,
        which: str,
        before: Counter[str],
        rooms: Rooms | None,
        missed: Callable[[], None],
    ) -> Variant:
        """The last edit, and the engine's work. A variant takes all inputs, which a graph that
        writes behind its pasts does not."""
        inputs = gm.graph.find_nodes(op="placeholder")
        if rooms is not None:
            gm = write_behind(gm, rooms)
        log_change(log, which, before, gm.graph)
        run = self.compile_graph(gm, f"the {which} variant of a decode graph", missed)
        self.runs.append(run)
        left = set(gm.graph.find_nodes(op="placeholder"))
        if len(left) == len(inputs):
            return run
        pick = operator.itemgetter(*(i for i, node in enumerate(inputs) if node in left))
        return lambda *args: run(*pick(args))

    def seen(
        self, args: Sequence[Any], place: int, known: dict[tuple[MaskTerm, ...], Tensor | None]
    ) -> Tensor | None:
        """Which tokens of a cache the newest token of each sequence sees, bool (1 or B, T).

        known: what was asked for in this call already, and is kept there.
        """
        masks = next(s.site.masks for s in self.plan.sparse if s.cache == place)
        if masks not in known:
            if masks not in self.seen_graphs:
                with in_turn():
                    self.seen_graphs[masks] = what_is_seen(self.gm, self.plan, place)
            graph = self.seen_graphs[masks]
            known[masks] = None if graph is None else graph(*args)[0]
        return known[masks]


def _counted(gm: fx.GraphModule, plan: Plan) -> list[Counted | None]:
    found: list[Counted | None] = []
    places = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    for cache in plan.caches:
        counted = None
        if len(cache.writes) == 1 and cache.k_pe is None and not cache.grows:
            (write,) = cache.writes
            said = counted_by(write)
            # What counts is read before the call, as the write reads it: nothing counts up between.
            if said is not None and extract(gm, [write.fill[0]], [write.node]):  # type: ignore[index]
                counted = Counted(places[said[0]], said[1])
        found.append(counted)
    return found


def _fill_graph(gm: fx.GraphModule, plan: Plan) -> FillGraph | None:
    """For the first cache with slots whose writes say where they go: layers advance together."""
    for place, cache in enumerate(plan.caches):
        writes = [write for write in cache.writes if write.fill is not None]
        fills = [write.fill for write in writes if write.fill is not None]
        if cache.grows or not fills:
            continue
        graph = extract(gm, [what for what, _ in fills], [write.node for write in writes])
        if graph is not None:
            return FillGraph(graph, place, [plus for _, plus in fills])
    return None
