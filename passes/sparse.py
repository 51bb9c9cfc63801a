"""Edits: the core of each sparse site becomes the two ops, positions and attention over them.

Decides nothing: sites, caches and budgets come from `plan`. Every added node carries a fake value;
placeholders are added behind the old ones, outputs behind the old ones, so that a caller of the
graph only ever appends arguments and strips results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loki_compile.kernels.fused import expanded_values, tiles_to_blocks
from loki_compile.kernels.kept import Layout
from loki_compile.kernels.ops import attend, attention
from loki_compile.kernels.positions import joined_positions, positions_of_heads
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.calls import concrete, fake_value
from loki_compile.passes.emit import absorbed, canonical, cast, replay, strided_like, whole_queries
from loki_compile.passes.graphs import call, finish
from loki_compile.passes.in_place import Rooms
from loki_compile.passes.masks import Masks, with_plain_masks
from loki_compile.passes.mirror import Placeholders, add_placeholders, grows_in_place, mirrored
from loki_compile.passes.plan import Plan, SparseSite
from loki_compile.passes.policy import Asked
from torch import fx


def keep_true(
    gm: fx.GraphModule,
    plan: Plan,
    layouts: Sequence[Layout | None],
    rooms: Rooms | None = None,
) -> fx.GraphModule:
    """Keeps true what is kept beside each cache, and leaves attention as it is: placeholders and
    outputs are those of `rewrite_sparse`."""
    _, _, outputs = _mirrored(gm.graph, plan, layouts, rooms)
    _append_outputs(gm.graph, outputs)
    return finish(gm)


def rewrite_sparse(
    gm: fx.GraphModule,
    plan: Plan,
    layouts: Sequence[Layout | None],
    rooms: Rooms | None = None,
) -> fx.GraphModule:
    """Keeps true what is kept beside each cache, and swaps each sparse site's core for the ops.

    Appends, for each cache of the plan of which something is kept, in order, the placeholders:
    index rows, (index scales,) key basis (Hkv, D, R) fp32, query basis (Hkv, D, R) fp32; or page
    bounds; and, for each such cache that is replaced rather than mutated, and grows in none of the
    `rooms`, the outputs: index rows (, index scales), or page bounds. `layouts` says how it is
    kept, None where nothing is. Behind these, for each site that is `weighed`, in order: the means
    over its rows of what `kernels.ops.select_weighed` tells of them, (2,) fp32.
    """
    graph = gm.graph
    plan = with_plain_masks(graph, plan)
    masks = Masks(graph)
    places, kept, outputs = _mirrored(graph, plan, layouts, rooms)
    shared: dict[Any, fx.Node] = {}
    chosen: list[fx.Node] = []
    weighed: list[fx.Node] = []
    for sparse in plan.sparse:
        with graph.inserting_before(sparse.site.node):
            of_cache = kept.get(sparse.cache, []), places.get(sparse.cache)
            asked, sinks = _asked(graph, sparse, *of_cache, masks, shared)
            if sparse.source is not None:
                chosen.append(_of_source(asked, plan.sparse[sparse.source], chosen[sparse.source]))
            else:
                chosen.append(_chosen(asked, sparse, plan, chosen))
                # Each leaves the graph by itself: joined they would cross from block to block.
                weighed += [_mean_of_rows(asked, sparse, each) for each in asked.weighed]
            if sparse.reads_all:
                continue
            out = _sparse_attention(asked, chosen[-1], sinks, masks)
        sparse.site.node.replace_all_uses_with(out)
    _append_outputs(graph, [*outputs, *weighed])
    return finish(gm)


def _mirrored(
    graph: fx.Graph, plan: Plan, layouts: Sequence[Layout | None], rooms: Rooms | None
) -> tuple[dict[int, Placeholders], dict[int, list[fx.Node]], list[fx.Node]]:
    """Of each cache of which something is kept, by its number: what that comes in by, and its
    tensors behind all writes; and those that leave the graph."""
    readers = {s.cache: s.site for s in reversed(plan.sparse)}  # the first of each cache
    places = {
        number: add_placeholders(graph, number, cache, layout, readers[number], rooms)
        for number, (cache, layout) in enumerate(zip(plan.caches, layouts, strict=True))
        if layout is not None
    }
    kept: dict[int, list[fx.Node]] = {}
    outputs: list[fx.Node] = []
    for number, place in places.items():
        cache, layout = plan.caches[number], layouts[number]
        assert layout is not None
        kept[number] = mirrored(graph, cache, layout, place, readers[number], rooms)
        if cache.replaced and not grows_in_place(cache, rooms):
            with graph.inserting_before(graph.output_node()):
                outputs += [replay(graph, cache.leaves, part) for part in kept[number]]
    return places, kept, outputs


def _append_outputs(graph: fx.Graph, outputs: list[fx.Node]) -> None:
    result = graph.output_node()
    result.args = ((*result.args[0], *outputs),)  # type: ignore[misc]


def _asked(
    graph: fx.Graph,
    sparse: SparseSite,
    kept: list[fx.Node],
    place: Placeholders | None,
    masks: Masks,
    shared: dict[Any, fx.Node],
) -> tuple[Asked, fx.Node | None]:
    """The site's operands as the ops take them, and its sink logits."""
    site = sparse.site
    query, sinks = _queries_and_sinks(graph, site)
    mask = masks.of(sparse)
    if place is not None and place.key_basis is not None:  # bounds of pages lie by head already
        views = sparse.views
        kept = [canonical(graph, site.key, site, replay(graph, views, part)) for part in kept]
    asked = Asked(
        graph=graph,
        site=site,
        choice=sparse.choice,
        query=query,
        key=canonical(graph, site.key, site),
        kept=tuple(kept),
        query_basis=None if place is None else place.query_basis,
        mask=mask,
        bounds=None if mask is None else masks.bounds_of(mask),
        shared=shared,
    )
    return asked, sinks


def _chosen(asked: Asked, sparse: SparseSite, plan: Plan, chosen: Sequence[fx.Node]) -> fx.Node:
    """Positions that a site chooses, some of its KV heads maybe reading what those of `chosen`
    hold, the positions of earlier sites."""
    choice, site = sparse.choice, asked.site
    assert choice.ranking is not None
    own = None
    if choice.budgets is None or choice.budgets.own:
        own = choice.ranking.positions(asked)
    if not sparse.borrowed:
        assert own is not None
        return own
    group = site.query_heads // site.kv_heads
    lists: dict[fx.Node, AttentionSite] = {} if own is None else {own: site}
    lists |= {chosen[n]: plan.sparse[n].site for n, _ in filter(None, sparse.borrowed)}
    made = {node: fake_value(node).shape[1] for node in lists}
    # Where query heads chose for themselves in any of them, so they read here.
    wide = any(made[node] != whose.kv_heads for node, whose in lists.items())
    numbers, rows = {node: number for number, node in enumerate(lists)}, []
    for head, place in ((h, p) for h in range(site.kv_heads) for p in range(group if wide else 1)):
        source = sparse.borrowed[head]
        node, its = (own, head) if source is None else (chosen[source[0]], source[1])
        assert node is not None
        each = made[node] // lists[node].kv_heads
        rows.append((numbers[node], its * each + place * each // (group if wide else 1)))
    return call(asked.graph, joined_positions, tuple(rows), *lists, like=site.node)


def _mean_of_rows(asked: Asked, sparse: SparseSite, weighed: fx.Node) -> fx.Node:
    """The mean over its rows of what `kernels.ops.select_weighed` tells of them, (2,) fp32; of the
    heads that choose."""
    budgets = sparse.choice.budgets
    if sparse.borrowed and budgets is not None:
        each = fake_value(weighed).shape[1] // asked.site.kv_heads
        own = tuple(head * each + place for head in budgets.own for place in range(each))
        weighed = call(asked.graph, positions_of_heads, weighed, own, like=weighed)
    return call(asked.graph, torch.mean, weighed, (0, 1, 2), like=weighed)


def _of_source(asked: Asked, source: SparseSite, positions: fx.Node) -> fx.Node:
    """Positions that another site chose, for each KV head or query head of this one."""
    site, there = asked.site, source.site
    heads: Sequence[int] = asked.choice.heads
    if not heads:  # the same, as far as there are as many
        heads = [head * there.kv_heads // site.kv_heads for head in range(site.kv_heads)]
    made = fake_value(positions).shape[1]
    if made != there.kv_heads:  # each query head of the source chose for itself
        here, group = site.query_heads // site.kv_heads, there.query_heads // there.kv_heads
        heads = [head * group + place * group // here for head in heads for place in range(here)]
    if list(heads) == list(range(made)):
        return positions
    return call(asked.graph, positions_of_heads, positions, tuple(heads), like=site.node)


def _sparse_attention(
    asked: Asked, positions: fx.Node, sinks: fx.Node | None, masks: Masks
) -> fx.Node:
    """What the site's core returns, by way of the ops; `positions` are what its ranking made."""
    graph, site, mask = asked.graph, asked.site, asked.mask
    out = _attended(asked, positions, sinks)
    if site.core.nan_if_fully_masked and mask is not None:
        blind = masks.blind_rows_of(mask)
        out = call(graph, torch.masked_fill, out, blind, float("nan"), like=site.node)
    if site.latent is not None and site.latent.values is not None:
        weight, maps = site.latent.values.weight, site.latent.values.numbers
        out = call(graph, expanded_values, out, weight, maps, like=site.node)
    if site.interleaved:
        out = call(graph, tiles_to_blocks, out, 1, site.group, like=site.node)
    out = cast(graph, site, out, fake_value(site.node).dtype)
    return strided_like(graph, out, site)


def _queries_and_sinks(graph: fx.Graph, site: AttentionSite) -> tuple[fx.Node, fx.Node | None]:
    """Queries (B, Hq, S, D) of what is cached, and sink logits (Hq,), heads in blocks."""
    query, sinks = whole_queries(graph, site), site.core.sink_logits
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
    if site.interleaved:  # ops know blocks of query heads: bring the heads into that order and back
        query = call(graph, tiles_to_blocks, query, 1, site.kv_heads, like=site.node)
        if sinks is not None:
            sinks = call(graph, tiles_to_blocks, sinks, 0, site.kv_heads, like=site.node)
    if site.latent is not None:
        query = absorbed(graph, query, site.latent, like=site.node)
    if concrete(fake_value(query).stride(3)) != 1:  # the ops read rows that are one run of memory
        query = call(graph, torch.Tensor.contiguous, query, like=site.node)
    return query, sinks


def _attended(asked: Asked, positions: fx.Node, sinks: fx.Node | None) -> fx.Node:
    graph, site = asked.graph, asked.site
    latent, k_pe = site.latent, None
    value = canonical(graph, site.value, site)
    if latent is not None and latent.k_pe is not None:
        k_pe = canonical(graph, latent.k_pe, site)
    elif latent is not None and latent.k_pe_dims:
        value = call(graph, torch.narrow, value, 3, latent.at, latent.kv_lora_rank, like=site.node)
    ranking = asked.choice.ranking
    in_ranges = ranking is not None and ranking.ranges
    return call(
        graph,
        attention if in_ranges else attend,
        *(asked.query, asked.key, value),
        *(() if in_ranges else (positions,)),
        asked.mask,
        scale=site.scale,
        softcap=site.core.softcap,
        sink_logits=sinks,
        k_pe=k_pe,
        **({"ranges": positions} if in_ranges else {}),
        like=site.node,
    )
