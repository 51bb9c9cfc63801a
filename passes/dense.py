"""Edits of dense graphs: exact attention by our own op, query groups packed, first keys laid out as
later steps lay them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loki_compile.kernels.fused import rows_of_group, rows_of_heads
from loki_compile.kernels.masks import joint_mask, mask_of_group
from loki_compile.kernels.ops import attention, attention_pays
from loki_compile.passes.attention import MAX_QUERY_TOKENS, AttentionSite, MaskTerm
from loki_compile.passes.calls import concrete, fake_value, op_name, operand, shape_of, writes_of
from loki_compile.passes.emit import canonical, cast, strided_like, whole_queries
from loki_compile.passes.graphs import call, copy_of, finish
from loki_compile.passes.slots import masks_at
from torch import fx


def rewrite_dense(
    gm: fx.GraphModule, sites: Sequence[AttentionSite], *, few_tokens: bool = False
) -> fx.GraphModule:
    """Exact attention, as fast as can be: by `loki::attention` where that is faster, else by
    PyTorch's own, with groups packed. `few_tokens`: calls that bring their number of new tokens
    bring few."""
    ours = [site for site in sites if served_by_attention(site, few_tokens=few_tokens)]
    gm = attend_to_all(gm, ours)
    return pack_groups(gm, [site for site in sites if site not in ours])


def served_by_attention(site: AttentionSite, *, few_tokens: bool = False) -> bool:
    """Whether the site is a call of SDPA with few query tokens that `loki::attention` computes as
    well, and sooner. `few_tokens` as in `rewrite_dense`."""
    if not site.sdpa or site.interleaved or site.core.causal or site.latent is not None:
        return False
    if site.query_tokens < 0 and not few_tokens:
        return False
    if site.query_tokens >= 0 and not 1 <= site.query_tokens <= MAX_QUERY_TOKENS:
        return False
    key = fake_value(site.key.base)
    rows = [fake_value(x.base).stride(x.order[3]) for x in (site.key, site.value)]
    seen = [(shape_of(term.node) or (1,))[-1] for term in site.masks]
    if any(concrete(step) != 1 for step in rows) or any(concrete(size) == 1 for size in seen):
        return False  # head_dim is not one run of memory, or a mask is one for all keys
    return attention_pays(key.device.type)


def attend_to_all(gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> fx.GraphModule:
    """Swaps SDPA for `loki::attention`, which reads keys and values as they lie in the cache, once
    for all query heads of a group and all query tokens."""
    if not sites:
        return gm
    graph = gm.graph
    writes = writes_of(graph)
    joint: dict[tuple[tuple[MaskTerm, ...], fx.Node], fx.Node] = {}
    for site in sites:
        mask = None
        if site.masks:
            behind = masks_at(site, writes)
            assert behind is not None
            if (site.masks, behind) not in joint:
                rules = [(term.factor, term.inverted, term.fill, term.floor) for term in site.masks]
                nodes = [term.node for term in site.masks]
                dtype = fake_value(site.query).dtype
                with graph.inserting_after(behind):
                    made = call(graph, joint_mask, rules, dtype, *nodes, like=site.node)
                joint[site.masks, behind] = made
            mask = joint[site.masks, behind]
        with graph.inserting_before(site.node):
            query = cast(graph, site, whole_queries(graph, site), fake_value(site.node).dtype)
            if concrete(fake_value(query).stride(3)) != 1:
                query = call(graph, torch.Tensor.contiguous, query, like=site.node)
            out = call(
                graph,
                attention,
                query,
                canonical(graph, site.key, site),
                canonical(graph, site.value, site),
                mask,
                scale=site.scale,
                like=site.node,
            )
            out = strided_like(graph, out, site)
        site.node.replace_all_uses_with(out)
    return finish(gm)


def pack_groups(gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> fx.GraphModule:
    """Lets the query heads of a KV group share one read of K and V, in dense attention.

    q (B, Hkv*G, 1, D) becomes (B, Hkv, G, D), which costs nothing and is exact up to rounding,
    and the repetition of K and V disappears. Sites with several new tokens, or whose heads are
    not grouped, stay as they are.
    """
    graph = gm.graph
    for site in sites:
        if site.group == 1 or site.interleaved or site.query_tokens != 1 or not site.sdpa:
            continue
        with graph.inserting_before(site.node):
            # What SDPA computes in: autocast would do the same to the operands, where it is on, and
            # casts behind which they were found did.
            dtype = fake_value(site.node).dtype
            query, key, value = (
                cast(graph, site, node, dtype)
                for node in (
                    site.query,
                    canonical(graph, site.key, site),
                    canonical(graph, site.value, site),
                )
            )
            query = call(graph, rows_of_group, query, site.kv_heads, like=site.node)
            mask = None
            for term in site.masks:  # an SDPA call has one at most
                mask = call(graph, mask_of_group, term.node, site.kv_heads, like=site.node)
                if fake_value(mask).is_floating_point():
                    mask = cast(graph, site, mask, dtype)
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
            out = call(graph, rows_of_heads, out, like=site.node)
        site.node.replace_all_uses_with(out)
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


def first_keys(graph: fx.Graph) -> list[tuple[int, int]]:
    """The outputs that a cache which grows begins as: their numbers, and the axes they grow in."""
    results: Any = graph.output_node().args[0]
    return [
        (place, operand(node, "dim", 0) % len(shape_of(node) or ()))
        for place, node in enumerate(results)
        if isinstance(node, fx.Node) and _begins_a_cache(node) and results.count(node) == 1
    ]


def _begins_a_cache(node: fx.Node) -> bool:
    if op_name(node) != "cat" or not fake_value(node).is_contiguous():
        return False
    parts = operand(node, "tensors")
    return isinstance(parts, (list, tuple)) and any(
        0 in [concrete(size) for size in shape_of(part) or ()] for part in parts
    )
