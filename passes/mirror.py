"""Edits: each cache write is repeated, by the model's own call, on what is kept beside the cache.

Placeholders are added behind the old ones, so that a caller of the graph only ever appends
arguments.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels.fused import (
    append_rows,
    as_written,
    keys_by_head,
    project_new_keys,
    unwritten,
)
from loki_compile.kernels.kept import IndexLayout, Layout, PageLayout
from loki_compile.kernels.ops import extend_pages, update_pages
from loki_compile.passes.appends import grown_in_place
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.caches import CacheWrite, KeyCache
from loki_compile.passes.calls import fake_value, operand
from loki_compile.passes.emit import call_like, replay
from loki_compile.passes.graphs import call, fake_mode_of
from loki_compile.passes.in_place import Rooms
from loki_compile.passes.write_forms import names_numbers
from torch import fx


@dataclass(frozen=True)
class Placeholders:
    """What a cache's kept tensors come in by; an index also has the basis that new keys and queries
    are projected by."""

    kept: list[fx.Node]
    key_basis: fx.Node | None = None
    query_basis: fx.Node | None = None


def add_placeholders(
    graph: fx.Graph,
    number: int,
    cache: KeyCache,
    layout: Layout,
    site: AttentionSite,
    rooms: Rooms | None = None,
) -> Placeholders:
    """Behind the graph's own inputs: what is kept of a cache, and what that needs. `site` is one
    that reads the cache, whose number is `number`.

    What is kept of a cache that grows in place (it has one of the `rooms`) does so too, and comes
    in as long as it will be.
    """
    past = fake_value(cache.root if grows_in_place(cache, rooms) else cache.past)
    sizes, kv_heads = list(past.shape), site.kv_heads
    if isinstance(layout, PageLayout):
        tokens = sizes[cache.token_axis]
        pages = (tokens + layout.page - 1) // layout.page
        shape = [sizes[cache.batch_axis], kv_heads, pages, 2 * site.head_dim]
        wanted = [("page_bounds", shape, layout.dtype, 2)]
        (bounds,) = _add(graph, number, cache, wanted, rooms, layout.page)
        return Placeholders([bounds])
    basis_sizes: list[Any] = [kv_heads, site.head_dim, layout.rank]
    if layout.each_row:
        basis_sizes.insert(0, sizes[cache.batch_axis])
    each = kv_heads if cache.heads_are_folded else 1
    axis = cache.token_axis
    wanted = [("index", [*sizes[:-1], each * layout.rank], layout.dtype, axis)]
    if layout.tensors == 2:
        wanted.append(("index_scale", [*sizes[:-1], each], torch.float32, axis))
    wanted += [("key_basis", basis_sizes, torch.float32, -1)]
    wanted += [("query_basis", basis_sizes, torch.float32, -1)]
    *kept, key_basis, query_basis = _add(graph, number, cache, wanted, rooms)
    return Placeholders(kept, key_basis, query_basis)


def grows_in_place(cache: KeyCache, rooms: Rooms | None) -> bool:
    """Whether new rows of a cache, and of the one beside it, are written behind the past."""
    return rooms is not None and bool(grown_in_place(cache, rooms.appends))


def _add(
    graph: fx.Graph,
    number: int,
    cache: KeyCache,
    wanted: list[tuple[str, list[Any], torch.dtype, int]],
    rooms: Rooms | None,
    every: int = 1,
) -> list[fx.Node]:
    """Of each: its name, shape, dtype, and the dimension with a row for `every` so many tokens (-1:
    none such)."""
    in_place = grows_in_place(cache, rooms)
    last = graph.find_nodes(op="placeholder")[-1]
    nodes = []
    for name, shape, dtype, axis in wanted:
        with graph.inserting_after(last):
            last = graph.placeholder(f"loki_{name}_{number}")
        if in_place and axis >= 0:
            assert rooms is not None
            last.meta["example_value"] = rooms.like(cache.root, axis, shape, dtype, every)
        else:
            with fake_mode_of(graph):
                device = fake_value(cache.past).device
                last.meta["example_value"] = torch.empty(shape, dtype=dtype, device=device)
        # AOTAutograd reads both of every placeholder; the static mark lets CUDA graphs keep the
        # address instead of copying (what is kept of a replaced cache is new at each step).
        last._dynamo_source = None  # type: ignore[attr-defined]
        static = not cache.replaced or axis < 0
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"} if static else {}
        nodes.append(last)
    return nodes


def mirrored(
    graph: fx.Graph,
    cache: KeyCache,
    layout: Layout,
    places: Placeholders,
    site: AttentionSite,
    rooms: Rooms | None = None,
) -> list[fx.Node]:
    """Makes a graph keep true what is kept of a cache; returns its tensors behind all writes.

    `site` is the first that reads the cache: bounds of pages are made anew in front of it.
    """
    in_place = grows_in_place(cache, rooms)
    if isinstance(layout, PageLayout):
        return [_mirror_pages(graph, cache, layout, places.kept[0], site, in_place)]
    kept = places.kept
    assert places.key_basis is not None
    for write in cache.writes:
        kept = mirror_write(graph, cache, write, kept, places.key_basis, layout, in_place)
    return kept


def _mirror_pages(
    graph: fx.Graph,
    cache: KeyCache,
    layout: PageLayout,
    bounds: fx.Node,
    site: AttentionSite,
    in_place: bool,
) -> fx.Node:
    """Bounds of the pages that the step stores keys in, from those keys and the ones before them.

    Where a step stores what, its writes know: they are repeated on a tensor of zeros, with ones.
    """
    if not cache.writes:
        return bounds
    each = site.kv_heads if cache.heads_are_folded else 1
    first = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(first):
        written = call(graph, unwritten, cache.past, each, like=site.node)
    for write in cache.writes:
        with graph.inserting_after(write.node):
            marker = graph.call_function(operator.pos, (0,))
        with graph.inserting_before(marker):
            ones = call(graph, as_written, write.source, each, like=write.node)
            written = _mirror_part(graph, cache, write, {write: ones}, 0, written)
        graph.erase_node(marker)
    with graph.inserting_before(site.node):
        # The whole cache, of which this site may read less than the next.
        keys, written = (
            call(
                graph, keys_by_head, rows, cache.head_axis, cache.batch_axis, site.kv_heads,
                like=site.node,
            )
            for rows in (cache.root, written)
        )  # fmt: skip
        # A cache that is replaced stays as it was, and so does what is kept of it.
        copied = cache.replaced and not in_place
        done = extend_pages if copied else update_pages
        after = call(graph, done, bounds, keys, written, page=layout.page, like=site.node)
    return after if copied else bounds


def mirror_write(
    graph: fx.Graph,
    cache: KeyCache,
    write: CacheWrite,
    parts: list[fx.Node],
    key_basis: fx.Node,
    layout: IndexLayout,
    in_place: bool = False,
) -> list[fx.Node]:
    """Repeats a cache write on the index with the projected keys; returns the index after it.

    in_place: `parts` are as long as the cache will be, and take the new rows at their ends.
    """
    last = write.node
    if cache.k_pe is not None:
        beside = cache.k_pe.writes[cache.writes.index(write)]
        rest = dict(zip(_taking_keys(write), _taking_keys(beside), strict=True))
        last = max(write.node, beside.node)  # in the graph's order
    with graph.inserting_after(last):
        marker = graph.call_function(operator.pos, (0,))  # holds the place; removed below
    with graph.inserting_before(marker):
        new = {}
        for step in _taking_keys(write):
            source = step.source
            if cache.k_pe is not None:
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
        if in_place:
            for number, index in enumerate(parts):
                rows = call(graph, operator.getitem, new[write], number, like=write.node)
                call(graph, append_rows, index, rows, cache.token_axis, like=write.node)
            after = parts
        else:
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
                call_like(graph, step.node, {step.source: rows, into: target})
                image[step.node] = target
            else:
                image[step] = call_like(graph, step, image)
        call_like(graph, write.node, {**image, write.source: image[write.source]})
        return index
    rows = call(graph, operator.getitem, new[write], number, like=write.node)
    target = replay(graph, write.views, index)
    images = {write.source: rows, _written(cache, write): target}
    if names_numbers(write.node):
        at, width = operand(write.node, "index"), fake_value(rows).shape[-1]
        images[at] = call(graph, torch.narrow, at, -1, 0, width, like=write.node)
    done = call_like(graph, write.node, images)
    return done if cache.replaced else index


def _written(cache: KeyCache, write: CacheWrite) -> fx.Node:
    """The tensor that a write's call names as its target."""
    return cache.past if cache.replaced else write.node.args[0]  # type: ignore[return-value]
