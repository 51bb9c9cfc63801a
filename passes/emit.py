"""Nodes that several edits add: casts, views, calls like those of the model, queries and layouts.

Every added node carries a fake value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from loki_compile.kernels.fused import QUERIES, absorbed_queries, laid_out, queries_by_head
from loki_compile.passes.attention import AttentionSite, Heads, Latent
from loki_compile.passes.calls import concrete, fake_value, op_name, shape_of
from loki_compile.passes.graphs import call, fake_mode_of
from loki_compile.passes.views import splits_heads
from torch import fx


def cast(graph: fx.Graph, site: AttentionSite, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if fake_value(node).dtype == dtype:
        return node
    return call(graph, torch.Tensor.to, node, dtype, like=site.node)


def call_like(graph: fx.Graph, node: fx.Node, substitutes: dict[fx.Node, fx.Node]) -> fx.Node:
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


def replay(graph: fx.Graph, views: Sequence[fx.Node], start: fx.Node) -> fx.Node:
    """The same views, from another tensor whose shape differs in the last dimension only."""
    node = start
    for view in views:
        if splits_heads(view):
            heads = fake_value(view).shape[-2]
            node = call(graph, torch.unflatten, node, -1, (heads, -1), like=view)
        elif op_name(view) == "reshape":
            sizes: Any = view.args[1] if isinstance(view.args[1], (tuple, list)) else view.args[1:]
            sizes = (*sizes[:-1], fake_value(node).shape[-1])
            node = call(graph, torch.reshape, node, sizes, like=view)
        else:
            node = call_like(graph, view, {view.args[0]: node})  # type: ignore[dict-item]
    return node


def canonical(
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


def whole_queries(graph: fx.Graph, site: AttentionSite) -> fx.Node:
    parts = [node for node in (site.query, site.q_pe) if node is not None]
    if site.core.query_layout != QUERIES:
        layout = site.core.query_layout
        parts = [call(graph, queries_by_head, part, layout, like=site.node) for part in parts]
    return parts[0] if len(parts) == 1 else call(graph, torch.cat, parts, -1, like=site.node)


def absorbed(graph: fx.Graph, query: fx.Node, latent: Latent, *, like: fx.Node) -> fx.Node:
    if latent.keys is None:  # the model did
        return query
    return call(
        graph,
        absorbed_queries,
        query,
        latent.keys.weight,
        *latent.absorption,
        like=like,
    )


def strided_like(graph: fx.Graph, out: fx.Node, site: AttentionSite) -> fx.Node:
    """`out` (B, Hq, S, Dv), contiguous, with the layout of the core that it replaces and, for later
    `view`s, with its dimensions in the same order of memory."""
    value = fake_value(site.node)
    if site.core.out_layout != QUERIES:
        out = call(graph, laid_out, out, site.core.out_layout, site.group_dim, like=site.node)
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


def insert_rows(graph: fx.Graph, site: AttentionSite) -> tuple[fx.Node, fx.Node]:
    """In front of a core over latents: its queries (B, Hq, S, D) and its keys (B, 1, T, D), whole.

    For those who look on: decoding never puts whole rows together.
    """
    latent = site.latent
    assert latent is not None
    with graph.inserting_before(site.node):
        query = absorbed(graph, whole_queries(graph, site), latent, like=site.node)
        rows = canonical(graph, site.key, site)
        if latent.k_pe is not None:
            k_pe = canonical(graph, latent.k_pe, site)
            rows = call(graph, torch.cat, [rows, k_pe], -1, like=site.node)
    return query, rows
