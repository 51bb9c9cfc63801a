"""Edits: the masks of a site become one mask, which all sites that read them share."""

from __future__ import annotations

import dataclasses
from typing import Any

from loki_compile.kernels.fused import SCORES
from loki_compile.kernels.masks import (
    blind_rows,
    joint_mask,
    mask_bounds,
    plain_mask,
    seen_by_newest,
    visible_by,
)
from loki_compile.passes.attention import AttentionSite, MaskRule, MaskTerm
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import call, copy_of, extract, input_of
from loki_compile.passes.plan import Plan, SparseSite
from torch import fx


def with_plain_masks(graph: fx.Graph, plan: Plan) -> Plan:
    """The plan with masks in the terms that `joint_mask` knows: no rules, laid out as (B, Hq, S, T)
    in blocks of heads.

    Layers that read the same mask share what is made of it.
    """
    plain: dict[tuple[Any, ...], MaskTerm] = {}
    sparse = []
    for old in plan.sparse:
        site, behind, terms = old.site, old.masks_at, []
        sizes = (site.query_heads // site.group_dim, site.group_dim, _tokens(graph, site))
        for term in site.masks:
            tiles = site.kv_heads if site.interleaved else 0
            assert behind is not None
            key = (term, sizes, tiles, behind)
            if term.rule is not None:
                terms.append(MaskTerm(_ask(graph, site, term.rule, behind)))
                continue
            if (term.layout != SCORES or tiles) and key not in plain:
                operands = (term.layout, sizes, tiles)
                with graph.inserting_after(behind):
                    node = call(graph, plain_mask, term.node, *operands, like=site.node)
                plain[key] = MaskTerm(node, term.factor, term.inverted, term.fill, term.floor)
            terms.append(plain.get(key, term))
        core = dataclasses.replace(site.core, masks=tuple(terms))
        site = dataclasses.replace(site, core=core)
        at = None if behind is None else max(behind, *(term.node for term in terms))
        sparse.append(dataclasses.replace(old, site=site, masks_at=at))
    return dataclasses.replace(plan, sparse=tuple(sparse))


def _tokens(graph: fx.Graph, site: AttentionSite) -> Any:
    """The number of new tokens, or the input that brings it."""
    if site.query_tokens > 0:
        return site.query_tokens
    place = input_of(graph, site.tokens)
    assert place is not None  # the plan has looked
    return graph.find_nodes(op="placeholder")[place]


def _ask(graph: fx.Graph, site: AttentionSite, rule: MaskRule, behind: fx.Node) -> fx.Node:
    """The mask that a rule describes, as a node behind `behind`."""
    assert graph.owning_module is not None
    with graph.inserting_after(behind):
        named = graph.get_attr(rule.name)
    named.meta["example_value"] = graph.owning_module.get_submodule(rule.name)
    with graph.inserting_after(named):
        return call(
            graph,
            visible_by,
            named,
            site.query,
            site.key.base,
            site.key.order[2],
            *rule.operands,
            like=site.node,
        )


class Masks:
    """The masks of a graph's sites in the form that the ops take. Sites that read the same masks at
    the same place share one."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.joint: dict[tuple[tuple[MaskTerm, ...], fx.Node], fx.Node] = {}
        self.bounds: dict[fx.Node, fx.Node] = {}
        self.blind: dict[fx.Node, fx.Node] = {}

    def of(self, sparse: SparseSite) -> fx.Node | None:
        """The masks of a site `with_plain_masks` as one 4-D `joint_mask`."""
        site, behind = sparse.site, sparse.masks_at
        if behind is None:
            return None
        if (site.masks, behind) not in self.joint:
            nodes = [term.node for term in site.masks]
            rules = [(term.factor, term.inverted, term.fill, term.floor) for term in site.masks]
            dtype = fake_value(site.query).dtype
            with self.graph.inserting_after(behind):
                self.joint[site.masks, behind] = call(
                    self.graph, joint_mask, rules, dtype, *nodes, like=site.node
                )
        return self.joint[site.masks, behind]

    def bounds_of(self, mask: fx.Node) -> fx.Node:
        """The `mask_bounds` of a mask that `of` returned."""
        if mask not in self.bounds:
            with self.graph.inserting_after(mask):
                self.bounds[mask] = call(self.graph, mask_bounds, mask, like=mask)
        return self.bounds[mask]

    def blind_rows_of(self, mask: fx.Node) -> fx.Node:
        """The `blind_rows` of a mask that `of` returned."""
        if mask not in self.blind:
            bounds = self.bounds_of(mask)
            with self.graph.inserting_after(bounds):
                self.blind[mask] = call(self.graph, blind_rows, mask, bounds, like=mask)
        return self.blind[mask]


def what_is_seen(gm: fx.GraphModule, plan: Plan, number: int) -> fx.GraphModule | None:
    """A graph with the inputs of `gm` that computes which tokens of cache `number` the newest token
    of each sequence sees, bool (1 or B, T), by the masks of the first site that reads it.

    None where there is no mask, or none that can be computed before the graph writes anything.
    """
    gm, mapping = copy_of(gm)
    plan = with_plain_masks(gm.graph, plan.on(mapping))
    first = next(sparse for sparse in plan.sparse if sparse.cache == number)
    mask = Masks(gm.graph).of(first)
    if mask is None:
        return None
    with gm.graph.inserting_after(mask):
        seen = call(gm.graph, seen_by_newest, mask, like=mask)
    return extract(gm, [seen], [first.site.node])
