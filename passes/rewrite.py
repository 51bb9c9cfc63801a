"""Edits: the dense variant of a graph (packed query groups) and the sparse one.

Decides nothing: sites, caches and budgets come from `plan`. Every added node carries a fake value;
placeholders are added behind the old ones, outputs behind the old ones, so that a caller of the
graph only ever appends arguments and strips results.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels.ops import (
    attend,
    hidden_below,
    index_rows,
    mask_bounds,
    select,
    without_autocast,
)
from loki_compile.passes.cache_writes import CacheWrite, KeyCache, splits_heads
from loki_compile.passes.fx_tools import (
    call,
    concrete,
    copy_of,
    extract,
    fake_mode_of,
    fake_value,
    finish,
    input_of,
    may_overlap,
    op_name,
    operand,
    shape_of,
    writes_of,
    written_operands,
)
from loki_compile.passes.plan import Plan, SparseSite
from loki_compile.passes.sites import (
    QUERIES,
    SCORES,
    AttentionSite,
    HeadMaps,
    Heads,
    Latent,
    Layout,
    MaskRule,
    MaskTerm,
)
from torch import fx


@dataclass(frozen=True)
class IndexLayout:
    """What one cache's key index looks like: `rank` dims of `dtype`; int8 carries scales.

    `each_row`: every sequence of the batch is projected by a basis of its own.
    """

    rank: int
    dtype: torch.dtype
    each_row: bool = False

    @property
    def parts(self) -> int:
        """Tensors that make up the index: its rows, and for int8 their scales."""
        return 2 if self.dtype == torch.int8 else 1


def pack_groups(gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> fx.GraphModule:
    """Lets the query heads of a KV group share one read of K and V, in dense attention.

    q (B, Hkv*G, 1, D) becomes (B, Hkv, G, D), which costs nothing and is exact up to rounding,
    and the repetition of K and V disappears. Sites with several new tokens, or whose heads are
    not grouped, stay as they are.
    """
    graph = gm.graph
    for site in sites:
        if site.group == 1 or site.tiled or site.query_tokens != 1 or not site.sdpa:
            continue
        with graph.inserting_before(site.node):
            # What SDPA computes in: autocast would do the same to the operands, where it is on, and
            # casts behind which they were found did.
            dtype = fake_value(site.node).dtype
            query, key, value = (
                _cast(graph, site, node, dtype)
                for node in (
                    site.query,
                    _canonical(graph, site.key, site),
                    _canonical(graph, site.value, site),
                )
            )
            query = call(graph, _rows_of_group, query, site.kv_heads, like=site.node)
            mask = None
            for term in site.masks:  # an SDPA call has one at most
                mask = call(graph, _mask_of_group, term.node, site.kv_heads, like=site.node)
                if fake_value(mask).is_floating_point():
                    mask = _cast(graph, site, mask, dtype)
            out = call(
                graph,
                torch.nn.functional.scaled_dot_product_attention,
                query,
                key,
                value,
                attn_mask=mask,
                scale=site.scale,
                like=site.node,
            )
            out = call(graph, _rows_of_heads, out, like=site.node)
        site.node.replace_all_uses_with(out)
    return finish(gm)


def _cast(graph: fx.Graph, site: AttentionSite, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if fake_value(node).dtype == dtype:
        return node
    return call(graph, torch.Tensor.to, node, dtype, like=site.node)


def rewrite_sparse(
    gm: fx.GraphModule, plan: Plan, layouts: Sequence[IndexLayout]
) -> fx.GraphModule:
    """Mirrors each cache write into its index and swaps each sparse site's core for the ops.

    Appends, for each cache of the plan in order, the placeholders: index rows, (index scales,)
    key basis (Hkv, D, R) fp32, query basis (Hkv, D, R) fp32; and, for each cache that is replaced
    rather than mutated, the outputs: index rows (, index scales).
    """
    graph = gm.graph
    plan = _with_plain_masks(graph, plan)
    bounds: dict[fx.Node, fx.Node] = {}
    blind: dict[fx.Node, fx.Node] = {}
    masks: dict[tuple[tuple[MaskTerm, ...], fx.Node], fx.Node] = {}
    complete = _masks_complete(graph, [s.site for s in plan.sparse])
    indexes: list[tuple[list[fx.Node], fx.Node]] = []
    outputs: list[fx.Node] = []
    kv_heads = {s.cache: s.site.kv_heads for s in plan.sparse}
    head_dims = {s.cache: s.site.head_dim for s in plan.sparse}
    places = [
        _add_placeholders(graph, number, cache, layout, kv_heads[number], head_dims[number])
        for number, (cache, layout) in enumerate(zip(plan.caches, layouts, strict=True))
    ]
    for cache, layout, (parts, key_basis, query_basis) in zip(
        plan.caches, layouts, places, strict=True
    ):
        for write in cache.writes:
            parts = _mirror(graph, cache, write, parts, key_basis, layout)
        if cache.replaced:
            with graph.inserting_before(graph.output_node()):
                outputs += [_replay(graph, cache.leaves, part) for part in parts]
        indexes.append((parts, query_basis))
    for sparse in plan.sparse:
        with graph.inserting_before(sparse.site.node):
            parts, query_basis = indexes[sparse.cache]
            out = _sparse_attention(
                graph, sparse, parts, query_basis, masks, bounds, blind,
                complete.get(sparse.site.node),
            )  # fmt: skip
        sparse.site.node.replace_all_uses_with(out)
        if sparse.site.latent is not None:
            _drop_fills(graph, sparse.site.latent)
    result = graph.output_node()
    result.args = ((*result.args[0], *outputs),)  # type: ignore[misc]
    return finish(gm)


def lay_out_first_keys(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph whose first keys and values leave it as the graph says: contiguous.

    A cache that grows begins as `cat([empty, keys])`. Inductor (run on 2.13) makes a copy of the
    keys of it, in the layout that they have, where eager makes a contiguous tensor, as each later
    step does. Dynamo guards strides: the first step behind a prompt of another length would be
    compiled again, for minutes.
    """
    results: Any = gm.graph.output_node().args[0]
    if not any(isinstance(node, fx.Node) and _begins_a_cache(node) for node in results):
        return gm
    gm, _ = copy_of(gm)
    result = gm.graph.output_node()
    results = result.args[0]
    laid: dict[Any, fx.Node] = {}
    for node in results:
        if isinstance(node, fx.Node) and _begins_a_cache(node) and node not in laid:
            with gm.graph.inserting_before(result):
                laid[node] = call(gm.graph, torch.Tensor.contiguous, node, like=node)
    result.args = (tuple(laid.get(node, node) for node in results),)
    return finish(gm)


def _begins_a_cache(node: fx.Node) -> bool:
    if op_name(node) != "cat" or not fake_value(node).is_contiguous():
        return False
    parts = operand(node, "tensors")
    return isinstance(parts, (list, tuple)) and any(
        0 in [concrete(size) for size in shape_of(part) or ()] for part in parts
    )


def what_is_seen(gm: fx.GraphModule, plan: Plan, number: int) -> fx.GraphModule | None:
    """A graph with the inputs of `gm` that computes which tokens of cache `number` the newest token
    of each sequence sees, bool (1 or B, T), by the masks of the first site that reads it.

    None where there is no mask, or none that can be computed before the graph writes anything.
    """
    gm, mapping = copy_of(gm)
    plan = _with_plain_masks(gm.graph, plan.on(mapping))
    site = next(sparse.site for sparse in plan.sparse if sparse.cache == number)
    complete = _masks_complete(gm.graph, [site]).get(site.node)
    if complete is None:
        return None
    mask = _one_mask(gm.graph, site, complete)
    with gm.graph.inserting_after(mask):
        seen = call(gm.graph, seen_by_newest, mask, like=site.node)
    return extract(gm, [seen], [site.node])


def seen_by_newest(mask: torch.Tensor) -> torch.Tensor:
    """A `joint_mask` (Bm, Hm, Sm, T) as what any head of its last row sees: bool (Bm, T)."""
    least = hidden_below(mask.dtype) if mask.is_floating_point() else 0
    return (mask[:, :, -1] > least).any(1)


def _add_placeholders(
    graph: fx.Graph,
    number: int,
    cache: KeyCache,
    layout: IndexLayout,
    kv_heads: int,
    head_dim: int,
) -> tuple[list[fx.Node], fx.Node, fx.Node]:
    past = fake_value(cache.past)
    sizes = list(past.shape)
    basis_sizes: list[Any] = [kv_heads, head_dim, layout.rank]
    if layout.each_row:
        basis_sizes.insert(0, sizes[cache.batch_axis])
    each = kv_heads if cache.heads_are_folded else 1
    wanted: list[tuple[str, list[Any], torch.dtype]] = [
        ("index", [*sizes[:-1], each * layout.rank], layout.dtype)
    ]
    if layout.parts == 2:
        wanted.append(("index_scale", [*sizes[:-1], each], torch.float32))
    wanted += [("key_basis", basis_sizes, torch.float32)]
    wanted += [("query_basis", basis_sizes, torch.float32)]
    last = graph.find_nodes(op="placeholder")[-1]
    nodes = []
    for name, shape, dtype in wanted:
        with graph.inserting_after(last):
            last = graph.placeholder(f"loki_{name}_{number}")
        with fake_mode_of(graph):
            last.meta["example_value"] = torch.empty(shape, dtype=dtype, device=past.device)
        # AOTAutograd reads both of every placeholder; the static mark lets CUDA graphs keep the
        # address instead of copying (a replaced cache's index is a new tensor at each step).
        last._dynamo_source = None  # type: ignore[attr-defined]
        static = not (cache.replaced and name.startswith("index"))
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"} if static else {}
        nodes.append(last)
    return nodes[:-2], nodes[-2], nodes[-1]


def project_new_keys(
    source: torch.Tensor,
    basis: torch.Tensor,
    head_axis: int,
    dtype: torch.dtype,
    batch_axis: int = -1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`index_rows` for keys in any layout whose last dimension is head_dim.

    source (..., D) with the KV heads at `head_axis` (-1: one head, no such dimension); basis
    (Hkv, D, R) fp32, or (B, Hkv, D, R) for the sequences along `batch_axis`. Returns rows (..., R)
    and, for int8, their scales (..., 1). Where `head_axis` is the last dimension it holds heads and
    head_dim in one, and so do the results.
    """
    if head_axis == source.ndim - 1:
        apart = source.unflatten(-1, (basis.shape[-3], -1))
        rows, scale = project_new_keys(apart, basis, head_axis, dtype, batch_axis)
        return rows.flatten(-2), None if scale is None else scale.flatten(-2)
    if basis.ndim == 4:
        apart = rows_and_heads_first(source, head_axis, batch_axis)
        together = (apart.shape[0], apart.shape[1], -1, apart.shape[-1])
        rows, scale = index_rows(apart.reshape(together), basis, dtype)

        def as_it_was(x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(*apart.shape[:-1], x.shape[-1])
            if head_axis < 0:
                return x.squeeze(1).movedim(0, batch_axis)
            return x.movedim((0, 1), (batch_axis, head_axis))

        return as_it_was(rows), None if scale is None else as_it_was(scale)
    heads_first = source.unsqueeze(0) if head_axis < 0 else source.movedim(head_axis, 0)
    flat = heads_first.reshape(1, heads_first.shape[0], -1, heads_first.shape[-1])
    rows, scale = index_rows(flat, basis, dtype)

    def back(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(*heads_first.shape[:-1], x.shape[-1])
        return x.squeeze(0) if head_axis < 0 else x.movedim(0, head_axis)

    return back(rows), None if scale is None else back(scale)


def rows_and_heads_first(x: torch.Tensor, head_axis: int, batch_axis: int) -> torch.Tensor:
    """Keys in any layout as a view (B, Hkv, ..., D); -1 as `head_axis`: one head."""
    if head_axis < 0:
        return x.movedim(batch_axis, 0).unsqueeze(1)
    return x.movedim((batch_axis, head_axis), (0, 1))


def _mirror(
    graph: fx.Graph,
    cache: KeyCache,
    write: CacheWrite,
    parts: list[fx.Node],
    key_basis: fx.Node,
    layout: IndexLayout,
) -> list[fx.Node]:
    """Repeats a cache write on the index with the projected keys; returns the index after it."""
    last = write.node
    if cache.beside is not None:
        beside = cache.beside.writes[cache.writes.index(write)]
        rest = dict(zip(_taking_keys(write), _taking_keys(beside), strict=True))
        last = max(write.node, beside.node)  # in the graph's order
    with graph.inserting_after(last):
        marker = graph.call_function(operator.pos, (0,))  # holds the place; removed below
    with graph.inserting_before(marker):
        new = {}
        for step in _taking_keys(write):
            source = step.source
            if cache.beside is not None:
                source = call(graph, torch.cat, [source, rest[step].source], -1, like=step.node)
            new[step] = call(
                graph,
                project_new_keys,
                source,
                key_basis,
                step.head_axis,
                layout.dtype,
                step.batch_axis,
                like=step.node,
            )
        after = [
            _mirror_part(graph, cache, write, new, number, index)
            for number, index in enumerate(parts)
        ]
    graph.erase_node(marker)
    return after


def _taking_keys(write: CacheWrite) -> list[CacheWrite]:
    """The steps of a write that bring new keys in: the write itself, or those among moved rows."""
    if not write.moved:
        return [write]
    return [step for step in write.moved if isinstance(step, CacheWrite)]


def _mirror_part(
    graph: fx.Graph,
    cache: KeyCache,
    write: CacheWrite,
    new: dict[CacheWrite, fx.Node],
    number: int,
    index: fx.Node,
) -> fx.Node:
    """The write on one part of the index; `new` has the projected keys of each write in it."""
    if write.moved:
        image = {_written(cache, write): index}
        for step in write.moved:
            if isinstance(step, CacheWrite):
                rows = call(graph, operator.getitem, new[step], number, like=step.node)
                into: Any = step.node.args[0]
                target = image[into]
                _call_like(graph, step.node, {step.source: rows, into: target})
                image[step.node] = target
            else:
                image[step] = _call_like(graph, step, image)
        _call_like(graph, write.node, {**image, write.source: image[write.source]})
        return index
    rows = call(graph, operator.getitem, new[write], number, like=write.node)
    target = _replay(graph, write.views, index)
    images = {write.source: rows, _written(cache, write): target}
    if op_name(write.node) == "scatter_":  # names a position for each number of a row
        at, width = operand(write.node, "index"), fake_value(rows).shape[-1]
        images[at] = call(graph, torch.narrow, at, -1, 0, width, like=write.node)
    done = _call_like(graph, write.node, images)
    return done if cache.replaced else index


def _written(cache: KeyCache, write: CacheWrite) -> fx.Node:
    """The tensor that a write's call names as its target."""
    return cache.past if cache.replaced else write.node.args[0]  # type: ignore[return-value]


def _replay(graph: fx.Graph, views: Sequence[fx.Node], start: fx.Node) -> fx.Node:
    """The same views, from another tensor whose shape differs in the last dimension only."""
    node = start
    for view in views:
        if splits_heads(view):
            heads = fake_value(view).shape[-2]
            node = call(graph, torch.unflatten, node, -1, (heads, -1), like=view)
        else:
            node = _call_like(graph, view, {view.args[0]: node})  # type: ignore[dict-item]
    return node


def _call_like(graph: fx.Graph, node: fx.Node, substitutes: dict[fx.Node, fx.Node]) -> fx.Node:
    """The call of `node` with some operands replaced, with its own fake value."""
    new = graph.node_copy(node, lambda source: substitutes.get(source, source))
    fake = fx.node.map_arg((new.args, new.kwargs), fake_value)
    args, kwargs = fake
    with fake_mode_of(graph), torch.no_grad():
        if new.op == "call_method":
            new.meta["example_value"] = getattr(args[0], str(new.target))(*args[1:], **kwargs)
        else:
            new.meta["example_value"] = new.target(*args, **kwargs)  # type: ignore[operator]
    return new


def _canonical(
    graph: fx.Graph, heads: Heads, site: AttentionSite, base: fx.Node | None = None
) -> fx.Node:
    """(B, Hkv, T, last) of keys, values or their index, as a view of `base`."""
    node = heads.base if base is None else base
    order = list(heads.order)
    if order[1] < 0:
        rank = len(shape_of(node) or ())
        node = call(graph, torch.unsqueeze, node, rank - 1, like=site.node)
        order = [d if d != rank - 1 else rank for d in order]
        order[1] = rank - 1
    if order != [0, 1, 2, 3]:
        node = call(graph, torch.permute, node, tuple(order), like=site.node)
    return node


def _sparse_attention(
    graph: fx.Graph,
    sparse: SparseSite,
    parts: list[fx.Node],
    query_basis: fx.Node,
    masks: dict[tuple[tuple[MaskTerm, ...], fx.Node], fx.Node],
    bounds: dict[fx.Node, fx.Node],
    blind: dict[fx.Node, fx.Node],
    complete: fx.Node | None,
) -> fx.Node:
    site, budget = sparse.site, sparse.budget
    dtype = fake_value(site.node).dtype
    query, sinks = _queries_by_head(graph, site), site.sinks
    # SDPA computes in the dtype that it returns (autocast's, whatever it is given). Attention
    # written out may have better queries than its last product returns: they are not rounded.
    wide = dtype
    for node in () if site.sdpa else (query, *(by for _, by in site.query_scales)):
        wide = torch.promote_types(wide, fake_value(node).dtype)
    query = _cast(graph, site, query, wide)
    for scaled, by in site.query_scales:
        query = call(graph, scaled, query, by, like=site.node)
    if site.row_sinks:
        sinks = call(graph, torch.Tensor.new_zeros, query, (site.query_heads,), like=site.node)
    if site.tiled:  # the ops know blocks of query heads: bring the heads into that order and back
        query = call(graph, _tiles_to_blocks, query, 1, site.kv_heads, like=site.node)
        if sinks is not None:
            sinks = call(graph, _tiles_to_blocks, sinks, 0, site.kv_heads, like=site.node)
    latent = site.latent
    if latent is not None:
        query = _absorb(graph, query, latent, like=site.node)
    if concrete(fake_value(query).stride(3)) != 1:  # the ops read rows that are one run of memory
        query = call(graph, torch.Tensor.contiguous, query, like=site.node)
    key = _canonical(graph, site.key, site)
    value, rest = _canonical(graph, site.value, site), None
    if latent is not None and latent.rest is not None:
        rest = _canonical(graph, latent.rest, site)
    elif latent is not None and latent.kept:
        value = call(graph, torch.narrow, value, 3, latent.at, latent.dims, like=site.node)
    index = [
        _canonical(graph, site.key, site, _replay(graph, sparse.views, part)) for part in parts
    ]
    mask, bound = None, None
    if complete is not None:
        if (site.masks, complete) not in masks:
            masks[site.masks, complete] = _one_mask(graph, site, complete)
        mask = masks[site.masks, complete]
        if mask not in bounds:
            with graph.inserting_after(mask):
                bounds[mask] = call(graph, mask_bounds, mask, like=site.node)
        bound = bounds[mask]
        if site.nan_rows and mask not in blind:
            with graph.inserting_after(bound):
                blind[mask] = call(graph, blind_rows, mask, bound, like=site.node)
    positions = call(
        graph,
        select,
        query,
        query_basis,
        index[0],
        index[1] if len(index) == 2 else None,
        mask,
        bound,
        scale=site.scale,
        top_k=budget.top_k,
        keep_q16=budget.keep_q16,
        sink=budget.sink,
        recent=budget.recent,
        min_keys=budget.min_keys,
        per_head=sparse.per_head,
        like=site.node,
    )
    out = call(
        graph,
        attend,
        query,
        key,
        value,
        positions,
        mask,
        scale=site.scale,
        softcap=site.softcap,
        sink_logits=sinks,
        k_rest=rest,
        like=site.node,
    )
    if site.nan_rows and mask is not None:
        out = call(graph, torch.masked_fill, out, blind[mask], float("nan"), like=site.node)
    if latent is not None and latent.values is not None:
        weight, maps = latent.values.weight, _numbers(latent.values)
        out = call(graph, expanded_values, out, weight, maps, like=site.node)
    if site.tiled:
        out = call(graph, _tiles_to_blocks, out, 1, site.group, like=site.node)
    out = _cast(graph, site, out, dtype)
    return _strided_like(graph, out, site)


def _queries_by_head(graph: fx.Graph, site: AttentionSite) -> fx.Node:
    parts = [node for node in (site.query, site.query_rest) if node is not None]
    if site.query_layout != QUERIES:
        layout = site.query_layout
        parts = [call(graph, queries_by_head, part, layout, like=site.node) for part in parts]
    return parts[0] if len(parts) == 1 else call(graph, torch.cat, parts, -1, like=site.node)


def queries_by_head(query: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Queries whose dimensions are the letters of `layout`, as (B, Hq, S, D)."""
    letters = "".join(layout)
    for letter in "bhgs":
        if letter not in letters:
            query, letters = query.unsqueeze(-1), letters + letter
    return query.permute([letters.index(letter) for letter in "bhgsd"]).flatten(1, 2)


def laid_out(out: torch.Tensor, layout: Layout, apart: int) -> torch.Tensor:
    """(B, Hq, S, Dv), its heads in blocks of `apart`, in another layout."""
    out = out.unflatten(1, (-1, apart))
    sizes = dict(zip("bhgsd", out.shape, strict=True))
    held = "".join(layout)
    letters = held + "".join(letter for letter in "bhgsd" if letter not in held)
    out = out.permute(["bhgsd".index(letter) for letter in letters])
    return out.reshape([math.prod(sizes[letter] for letter in dim) for dim in layout])


def insert_rows(graph: fx.Graph, site: AttentionSite) -> tuple[fx.Node, fx.Node]:
    """In front of a core over latents: its queries (B, Hq, S, D) and its keys (B, 1, T, D), whole.

    For those who look on: decoding never puts whole rows together.
    """
    latent = site.latent
    assert latent is not None
    with graph.inserting_before(site.node):
        query = _absorb(graph, _queries_by_head(graph, site), latent, like=site.node)
        rows = _canonical(graph, site.key, site)
        if latent.rest is not None:
            rest = _canonical(graph, latent.rest, site)
            rows = call(graph, torch.cat, [rows, rest], -1, like=site.node)
    return query, rows


def unit_queries(weight: torch.Tensor, latent: Latent, heads: int) -> torch.Tensor:
    """(1, heads, D, row dims): what cached rows meet when each head asks for each of the D dims of
    expanded keys in turn. `weight` is the tensor of `latent.keys`.
    """
    assert latent.keys is not None
    dims = latent.keys.dims + latent.kept
    unit = torch.eye(dims, dtype=weight.dtype, device=weight.device).expand(1, heads, dims, dims)
    kept = (latent.kept_at, latent.kept)
    maps = _numbers(latent.keys)
    with without_autocast(weight.device.type):
        return absorbed_queries(unit, weight, maps, latent.absorbed_at, kept, latent.at == 0)


def _absorb(graph: fx.Graph, query: fx.Node, latent: Latent, *, like: fx.Node) -> fx.Node:
    if latent.keys is None:  # the model did
        return query
    return call(
        graph,
        absorbed_queries,
        query,
        latent.keys.weight,
        _numbers(latent.keys),
        latent.absorbed_at,
        (latent.kept_at, latent.kept),
        latent.at == 0,
        like=like,
    )


def _numbers(maps: HeadMaps) -> tuple[bool, int, int, int, int]:
    return maps.columns, maps.start, maps.block, maps.inside, maps.dims


def _of_heads(weight: torch.Tensor, heads: int, maps: tuple[bool, int, int, int, int]) -> Any:
    """The heads' maps (Hq, dims, latent dims) in a weight, as a view; `maps` as in `HeadMaps`."""
    columns, start, block, inside, dims = maps
    rows = weight.t() if columns else weight
    rows = rows.narrow(0, start, heads * block).unflatten(0, (heads, block))
    return rows.narrow(1, inside, dims)


def _by_heads(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """x (B, Hq, S, m) times maps (Hq, m, n): (B, Hq, S, n), reading each map once."""
    batch, tokens = x.shape[0], x.shape[2]
    product = torch.bmm(x.transpose(0, 1).flatten(1, 2), maps)
    return product.unflatten(1, (batch, tokens)).transpose(0, 1)


def absorbed_queries(
    query: torch.Tensor,
    weight: torch.Tensor,
    maps: tuple[bool, int, int, int, int],
    absorbed_at: int,
    kept: tuple[int, int],
    latent_first: bool,
) -> torch.Tensor:
    """Queries of expanded keys (B, Hq, S, D) as queries of the cached rows: (B, Hq, S, row dims).

    Those dims that met keys expanded by `maps` of `weight` take the map in and meet the latent; the
    `kept` ones (first, how many) stay, behind the latent's or in front of them, as in a row.
    """
    part = query.narrow(3, absorbed_at, maps[-1])
    absorbed = _by_heads(part, _of_heads(weight, query.shape[1], maps))
    if not kept[1]:
        return absorbed.contiguous()
    both = (absorbed, query.narrow(3, *kept))
    return torch.cat(both if latent_first else both[::-1], -1).contiguous()


def expanded_values(
    out: torch.Tensor, weight: torch.Tensor, maps: tuple[bool, int, int, int, int]
) -> torch.Tensor:
    """Weighted latents (B, Hq, S, latent dims) as weighted values: (B, Hq, S, Dv), contiguous."""
    return _by_heads(out, _of_heads(weight, out.shape[1], maps).transpose(1, 2)).contiguous()


def _drop_fills(graph: fx.Graph, latent: Latent) -> None:
    """Removes the copies that put expanded keys together, unless something else reads those.

    Dead code that writes is not removed by `finish`.
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


def _with_plain_masks(graph: fx.Graph, plan: Plan) -> Plan:
    """The plan with masks in the terms that `joint_mask` knows: no rules, laid out as (B, Hq, S, T)
    in blocks of heads.

    Layers that read the same mask share what is made of it.
    """
    complete = _masks_complete(graph, [s.site for s in plan.sparse])
    plain: dict[tuple[Any, ...], MaskTerm] = {}
    sparse = []
    for old in plan.sparse:
        site, terms = old.site, []
        sizes = (site.query_heads // site.apart, site.apart, _tokens(graph, site))
        for term in site.masks:
            tiles = site.kv_heads if site.tiled else 0
            behind = complete[site.node]
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
        site = dataclasses.replace(site, masks=tuple(terms))
        sparse.append(dataclasses.replace(old, site=site))
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


def visible_by(
    rule: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, token_axis: int, *operands: Any
) -> torch.Tensor:
    """What `rule(batch, head, query, key, *operands)` says of every key: bool (B, Hq, S, T), each
    but the last may be 1.

    query (B, Hq, S, D); key has its T keys along `token_axis`. Numbers are int64, as in PyTorch's
    `create_mask`.
    """
    sizes = (*query.shape[:3], key.shape[token_axis])
    numbers = [
        torch.arange(size, device=query.device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, size in enumerate(sizes)
    ]
    visible = rule(*numbers, *operands)
    return visible.broadcast_to(torch.broadcast_shapes(visible.shape, (1, 1, 1, sizes[3])))


def plain_mask(
    mask: torch.Tensor, layout: Layout, sizes: tuple[int, int, int], tiles: int
) -> torch.Tensor:
    """A mask for scores in another layout as one that broadcasts to (B, Hq, S, T).

    mask: its dimensions are the last ones of `layout`, or of size one. `sizes`: heads, groups and
    tokens of `layout`. `tiles`, if not 0, is the number of KV heads whose tiles its query heads are
    in: they are brought into blocks.
    """
    if layout != SCORES:
        mask = _by_letters(mask, layout, dict(zip("hgs", sizes, strict=True)))
        if (mask.shape[1] == 1) != (mask.shape[2] == 1):
            mask = mask.expand(-1, *sizes[:2], -1, -1)
        mask = mask.flatten(1, 2)
    if tiles and mask.ndim > 2 and mask.shape[-3] != 1:
        mask = _tiles_to_blocks(mask, mask.ndim - 3, tiles)
    return mask


def _by_letters(mask: torch.Tensor, layout: Layout, sizes: dict[str, int]) -> torch.Tensor:
    """The mask as (B, heads, groups, S, T), each of which may be 1."""
    mask = mask[(None,) * (len(layout) - mask.ndim)]
    apart: list[Any] = []
    for size, letters in zip(mask.shape, layout, strict=True):
        known = math.prod(sizes.get(letter, 1) for letter in letters)
        wide = [sizes.get(letter, size // known) for letter in letters]
        apart += [1] * len(letters) if size == 1 else wide
    held = "".join(layout)
    missing = [letter for letter in "bhgst" if letter not in held]
    mask = mask.reshape(apart)[(..., *[None] * len(missing))]
    return mask.permute([(held + "".join(missing)).index(letter) for letter in "bhgst"])


def _tiles_to_blocks(x: torch.Tensor, dim: int, tile: int) -> torch.Tensor:
    """Heads 0 1 2 0 1 2 (numbers of their KV heads; tile=3) become 0 0 1 1 2 2.

    With the size of a block as `tile` it is the way back.
    """
    return x.unflatten(dim, (-1, tile)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _masks_complete(graph: fx.Graph, sites: Sequence[AttentionSite]) -> dict[fx.Node, fx.Node]:
    """For each masked core, the node behind which its masks are as the core reads them.

    That is the last of the masks, or the last call before the core that writes into one: a mask may
    be allocated first and filled in place. Layers that read the same masks share the node.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    writes = writes_of(graph)
    last_input = graph.find_nodes(op="placeholder")[-1]
    complete = {}
    for site in sites:
        masks = [term.node for term in site.masks]
        if not masks:
            continue
        before = [write for write in writes if write.position < order[site.node]]
        filled = [w.call for w in before if any(may_overlap(w.operand, mask) for mask in masks)]
        last = max((*masks, *filled), key=lambda node: order[node])
        complete[site.node] = last_input if last.op == "placeholder" else last
    return complete


def _one_mask(graph: fx.Graph, site: AttentionSite, complete: fx.Node) -> fx.Node:
    """The site's masks as one 4-D mask, placed behind `complete` so that all layers share it."""
    nodes = [term.node for term in site.masks]
    rules = [(term.factor, term.inverted, term.fill, term.floor) for term in site.masks]
    dtype = fake_value(site.query).dtype
    with graph.inserting_after(complete):
        return call(graph, joint_mask, rules, dtype, *nodes, like=site.node)


def joint_mask(
    rules: Sequence[tuple[float, bool, float, float]], dtype: torch.dtype, *masks: torch.Tensor
) -> torch.Tensor:
    """One 4-D mask that does what several do one after the other.

    `rules` has factor, inverted, fill and floor of each, as in `MaskTerm`. uint8 (1 = visible)
    where all are bool and fill with -inf, else floating, `dtype` where no mask has one, or float32
    where that would make -inf of a fill. A score is added to the fill instead of replaced by it,
    which rounds to the same: fills are huge.
    """
    masks = tuple(_as_4d(mask) for mask in masks)
    keeps = {
        i: ~mask if inverted else mask
        for i, (mask, (_, inverted, _, _)) in enumerate(zip(masks, rules, strict=True))
        if mask.dtype == torch.bool
    }
    if len(keeps) == len(masks) and all(fill == float("-inf") for _, _, fill, _ in rules):
        visible = functools.reduce(torch.logical_and, keeps.values())
        # Inductor's C++ stores a comparison of int64 as bool ten times slower than by way of int32
        # (torch 2.13), and this one is as long as the cache.
        return _stored(visible.to(torch.int32).to(torch.uint8))
    lowest = torch.finfo(dtype).min
    wide = any(float("-inf") < fill * factor < lowest for factor, _, fill, _ in rules)
    dtype = torch.float32 if wide else dtype
    joint = torch.zeros((1, 1, 1, 1), dtype=dtype, device=masks[0].device)
    for i, (mask, (factor, _, fill, floor)) in enumerate(zip(masks, rules, strict=True)):
        if i in keeps:
            joint = torch.where(keeps[i], joint, fill * factor)
        else:
            term = mask.float() if wide else mask
            term = term if factor == 1.0 else term * factor
            joint = term if i == 0 else joint + term
        if floor > float("-inf"):  # of the sum: two masks at their lowest would be -inf
            joint = joint.clamp(min=floor * factor)
    return _stored(joint)


def blind_rows(mask: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Which rows of a `joint_mask` hide every key by -inf: bool (Bm, Hm, Sm, 1).

    `bounds` are the mask's `mask_bounds`; they take very low numbers for hidden as well.
    """
    if mask.is_floating_point():
        return mask.amax(-1, keepdim=True) == float("-inf")
    return bounds[..., 2:] == 0


def _stored(mask: torch.Tensor) -> torch.Tensor:
    """The same mask, which Inductor computes into memory once.

    Each of our ops asks for exact strides, and Inductor answers with a buffer of its own for every
    use of a value that it has not stored: two whole masks per layer (torch 2.13). It stores what
    as_strided reads.
    """
    for dim in range(3):
        if isinstance(mask.stride(dim), int) and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)  # expanded: the ops broadcast it again
    mask = mask.contiguous()
    return mask.as_strided(mask.shape, mask.stride())


def _rows_of_group(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, Hkv*G, 1, D) -> (B, Hkv, G, D), a view."""
    return query.squeeze(2).unflatten(1, (kv_heads, -1))


def _rows_of_heads(out: torch.Tensor) -> torch.Tensor:
    """(B, Hkv, G, Dv) -> (B, Hkv*G, 1, Dv)."""
    return out.flatten(1, 2).unsqueeze(2)


def _mask_of_group(mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """A mask whose rows are the query heads of the group instead of the one query token."""
    mask = _as_4d(mask)
    return mask if mask.shape[1] == 1 else _rows_of_group(mask, kv_heads)


def _as_4d(mask: torch.Tensor) -> torch.Tensor:
    """A mask with leading dimensions of size one added, so that it has four."""
    return mask[(None,) * (4 - mask.ndim)]


def _strided_like(graph: fx.Graph, out: fx.Node, site: AttentionSite) -> fx.Node:
    """`out` (B, Hq, S, Dv), contiguous, with the layout of the core that it replaces and, for later
    `view`s, with its dimensions in the same order of memory."""
    value = fake_value(site.node)
    if site.out_layout != QUERIES:
        out = call(graph, laid_out, out, site.out_layout, site.apart, like=site.node)
    elif site.query_tokens == 1 or value.is_contiguous():
        return out
    steps = [concrete(step) for step in value.stride()]
    strides = [math.inf if step is None else step for step in steps]  # no symbol is in the last one
    order = sorted(range(value.ndim), key=lambda dim: -strides[dim])
    if value.is_contiguous() or order == list(range(value.ndim)):
        return call(graph, torch.Tensor.contiguous, out, like=site.node)
    back = tuple(order.index(d) for d in range(value.ndim))
    out = call(graph, torch.permute, out, tuple(order), like=site.node)
    out = call(graph, torch.Tensor.contiguous, out, like=site.node)
    return call(graph, torch.permute, out, back, like=site.node)


def bytes_per_token(site: AttentionSite, layout: IndexLayout) -> int:
    """Index bytes that one cached token costs at this site: what `explain` calls index memory."""
    row = layout.rank * torch.empty((), dtype=layout.dtype).element_size()
    return site.kv_heads * (row + (4 if layout.parts == 2 else 0))
