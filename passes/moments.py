"""Edits: a prefill says, beside what it computes, what its queries are like.

Decides nothing: which queries, of which cache, comes from `prompts`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from loki_compile.kernels.moments import query_moment, real_rows
from loki_compile.passes.attention import AttentionSite, MaskTerm
from loki_compile.passes.emit import whole_queries
from loki_compile.passes.graphs import call, finish
from loki_compile.passes.prompts import AskedCache
from torch import fx


def add_query_moments(gm: fx.GraphModule, asked: Sequence[AskedCache]) -> fx.GraphModule:
    """Appends, for each cache that is asked, two outputs: the moment of its queries, (B, Hkv, D, D)
    fp32, summed over some rows and the query heads of each group; and how many rows those are,
    (B or 1,) fp32. Rows of padding are not among them.
    """
    graph = gm.graph
    rows: dict[Any, fx.Node | None] = {}
    outputs: list[fx.Node] = []
    for cache in asked:
        sums, counts = [], []
        for site in cache.sites:
            with graph.inserting_before(site.node):
                query = whole_queries(graph, site)
                real = _real_rows(graph, site, query, rows)
                both = call(graph, query_moment, query, site.kv_heads, real, like=site.node)
                sums.append(call(graph, operator.getitem, both, 0, like=site.node))
                counts.append(call(graph, operator.getitem, both, 1, like=site.node))
        with graph.inserting_before(graph.output_node()):
            for parts in (sums, counts):
                total = parts[0]
                for part in parts[1:]:
                    total = call(graph, torch.add, total, part, like=cache.sites[0].node)
                outputs.append(total)
    result = graph.output_node()
    result.args = ((*result.args[0], *outputs),)  # type: ignore[misc]
    return finish(gm)


def _real_rows(
    graph: fx.Graph, site: AttentionSite, query: fx.Node, known: dict[Any, fx.Node | None]
) -> fx.Node | None:
    """Which of the rows are of real tokens; layers that read the same masks share it."""
    terms: tuple[MaskTerm, ...] = tuple(term for term in site.masks if not term.per_row)
    if not terms:
        return None
    key = (terms, str(site.tokens))
    if key not in known:
        rules = tuple((term.factor, term.inverted) for term in terms)
        nodes = [term.node for term in terms]
        known[key] = call(graph, real_rows, query, rules, *nodes, like=site.node)
    return known[key]
