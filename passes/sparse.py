"""Edits: the core of each sparse site becomes the two ops, positions and attention over them.

Decides nothing: sites, caches and budgets come from `plan`. Every added node carries a fake value;
placeholders are added behind the old ones, outputs behind the old ones, so that a caller of the
graph only ever appends arguments and strips results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loki_compile.kernels.fused import expanded_values, tiles_to_blocks
from loki_compile.kernels.ops import attend, select
from loki_compile.passes.attention import AttentionSite, Latent
from loki_compile.passes.calls import concrete, fake_value, may_overlap, written_operands
from loki_compile.passes.emit import absorbed, canonical, cast, replay, strided_like, whole_queries
from loki_compile.passes.graphs import call, finish
from loki_compile.passes.masks import Masks, with_plain_masks
from loki_compile.passes.mirror import IndexLayout, add_placeholders, mirror_write
from loki_compile.passes.plan import Plan, SparseSite
from torch import fx


def rewrite_sparse(
    gm: fx.GraphModule, plan: Plan, layouts: Sequence[IndexLayout]
) -> fx.GraphModule:
    """Mirrors each cache write into its index and swaps each sparse site's core for the ops.

    Appends, for each cache of the plan in order, the placeholders: index rows, (index scales,)
    key basis (Hkv, D, R) fp32, query basis (Hkv, D, R) fp32; and, for each cache that is replaced
    rather than mutated, the outputs: index rows (, index scales).
    """
    graph = gm.graph
    plan = with_plain_masks(graph, plan)
    masks = Masks(graph)
    indexes: list[tuple[list[fx.Node], fx.Node]] = []
    outputs: list[fx.Node] = []
    kv_heads = {s.cache: s.site.kv_heads for s in plan.sparse}
    head_dims = {s.cache: s.site.head_dim for s in plan.sparse}
    places = [
        add_placeholders(graph, number, cache, layout, kv_heads[number], head_dims[number])
        for number, (cache, layout) in enumerate(zip(plan.caches, layouts, strict=True))
    ]
    for cache, layout, (parts, key_basis, query_basis) in zip(
        plan.caches, layouts, places, strict=True
    ):
        for write in cache.writes:
            parts = mirror_write(graph, cache, write, parts, key_basis, layout)
        if cache.replaced:
            with graph.inserting_before(graph.output_node()):
                outputs += [replay(graph, cache.leaves, part) for part in parts]
        indexes.append((parts, query_basis))
    for sparse in plan.sparse:
        with graph.inserting_before(sparse.site.node):
            out = _sparse_attention(graph, sparse, *indexes[sparse.cache], masks)
        sparse.site.node.replace_all_uses_with(out)
        if sparse.site.latent is not None:
            _drop_fills(graph, sparse.site.latent)
    result = graph.output_node()
    result.args = ((*result.args[0], *outputs),)  # type: ignore[misc]
    return finish(gm)


def _sparse_attention(
    graph: fx.Graph,
    sparse: SparseSite,
    index: list[fx.Node],
    query_basis: fx.Node,
    masks: Masks,
) -> fx.Node:
    """What the site's core returns, by way of the ops."""
    site = sparse.site
    query, sinks = _queries_and_sinks(graph, site)
    mask = masks.of(sparse)
    positions = _positions(graph, sparse, query, query_basis, index, mask, masks)
    out = _attended(graph, site, query, positions, mask, sinks)
    if site.core.nan_rows and mask is not None:
        blind = masks.blind_rows_of(mask)
        out = call(graph, torch.masked_fill, out, blind, float("nan"), like=site.node)
    if site.latent is not None and site.latent.values is not None:
        weight, maps = site.latent.values.weight, site.latent.values.numbers
        out = call(graph, expanded_values, out, weight, maps, like=site.node)
    if site.tiled:
        out = call(graph, tiles_to_blocks, out, 1, site.group, like=site.node)
    out = cast(graph, site, out, fake_value(site.node).dtype)
    return strided_like(graph, out, site)


def _queries_and_sinks(graph: fx.Graph, site: AttentionSite) -> tuple[fx.Node, fx.Node | None]:
    """Queries (B, Hq, S, D) of what is cached, and sink logits (Hq,), heads in blocks."""
    query, sinks = whole_queries(graph, site), site.core.sinks
    # SDPA computes in the dtype that it returns (autocast's, whatever it is given). Attention
    # written out may have better queries than its last product returns: they are not rounded.
    wide = fake_value(site.node).dtype
    for node in () if site.sdpa else (query, *(by for _, by in site.core.query_scales)):
        wide = torch.promote_types(wide, fake_value(node).dtype)
    query = cast(graph, site, query, wide)
    for scaled, by in site.core.query_scales:
        query = call(graph, scaled, query, by, like=site.node)
    if site.core.row_sinks:
        sinks = call(graph, torch.Tensor.new_zeros, query, (site.query_heads,), like=site.node)
    if site.tiled:  # the ops know blocks of query heads: bring the heads into that order and back
        query = call(graph, tiles_to_blocks, query, 1, site.kv_heads, like=site.node)
        if sinks is not None:
            sinks = call(graph, tiles_to_blocks, sinks, 0, site.kv_heads, like=site.node)
    if site.latent is not None:
        query = absorbed(graph, query, site.latent, like=site.node)
    if concrete(fake_value(query).stride(3)) != 1:  # the ops read rows that are one run of memory
        query = call(graph, torch.Tensor.contiguous, query, like=site.node)
    return query, sinks


def _positions(
    graph: fx.Graph,
    sparse: SparseSite,
    query: fx.Node,
    query_basis: fx.Node,
    index: list[fx.Node],
    mask: fx.Node | None,
    masks: Masks,
) -> fx.Node:
    site, budget = sparse.site, sparse.budget
    rows = [canonical(graph, site.key, site, replay(graph, sparse.views, part)) for part in index]
    return call(
        graph,
        select,
        query,
        query_basis,
        rows[0],
        rows[1] if len(rows) == 2 else None,
        mask,
        None if mask is None else masks.bounds_of(mask),
        scale=site.scale,
        top_k=budget.top_k,
        keep_q16=budget.keep_q16,
        sink=budget.sink,
        recent=budget.recent,
        min_keys=budget.min_keys,
        per_head=sparse.per_head,
        like=site.node,
    )


def _attended(
    graph: fx.Graph,
    site: AttentionSite,
    query: fx.Node,
    positions: fx.Node,
    mask: fx.Node | None,
    sinks: fx.Node | None,
) -> fx.Node:
    latent, rest = site.latent, None
    key, value = (canonical(graph, heads, site) for heads in (site.key, site.value))
    if latent is not None and latent.rest is not None:
        rest = canonical(graph, latent.rest, site)
    elif latent is not None and latent.kept:
        value = call(graph, torch.narrow, value, 3, latent.at, latent.dims, like=site.node)
    return call(
        graph,
        attend,
        query,
        key,
        value,
        positions,
        mask,
        scale=site.scale,
        softcap=site.core.softcap,
        sinks=sinks,
        k_rest=rest,
        like=site.node,
    )


def _drop_fills(graph: fx.Graph, latent: Latent) -> None:
    """Removes the copies that put expanded keys together, unless something else reads those.

    Dead code that writes is not removed by `finish`. That nothing reads them shows only when the
    core is replaced, which is why no analysis names them.
    """
    if not latent.fills:
        return
    keys = latent.fills[0].args[0]
    while isinstance(keys, fx.Node) and keys.args and isinstance(keys.args[0], fx.Node):
        if not may_overlap(keys, keys.args[0]):
            break
        keys = keys.args[0]
    assert isinstance(keys, fx.Node)
    dead = [keys]
    for node in dead:
        for user in node.users:
            outside = [w for w in written_operands(user) if not may_overlap(w, keys)]
            if user.op == "output" or outside:
                return
            if user not in dead:
                dead.append(user)
    for node in sorted(dead, reverse=True):
        graph.erase_node(node)
