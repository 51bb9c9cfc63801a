"""Edits: attention of a prompt becomes `loki::prefill`, which reads spans."""

from __future__ import annotations

from collections.abc import Sequence

from loki_compile.kernels.ops import prefill
from loki_compile.kernels.span_prefill import flat_lines, hides_later_keys_alone
from loki_compile.passes.calls import fake_value
from loki_compile.passes.emit import canonical, cast, strided_like, whole_queries
from loki_compile.passes.graphs import call, finish
from loki_compile.passes.span_prefills import SpanPrefill
from torch import fx


def rewrite_prefills(gm: fx.GraphModule, prefills: Sequence[SpanPrefill]) -> fx.GraphModule:
    """Swaps the cores for `loki::prefill`. Whether a mask is causal and nothing else is asked once
    for all that read it."""
    graph = gm.graph
    plain: dict[fx.Node, fx.Node] = {}
    for each in prefills:
        site, spans = each.site, each.spans
        dtype = fake_value(site.node).dtype
        with graph.inserting_before(site.node):
            operands = [
                cast(graph, site, node, dtype)
                for node in (
                    whole_queries(graph, site),
                    canonical(graph, site.key, site),
                    canonical(graph, site.value, site),
                )
            ]
            mask = site.masks[0].node if site.masks else None
            if mask is not None and mask not in plain:
                plain[mask] = call(graph, hides_later_keys_alone, mask, like=site.node)
            out = call(
                graph, prefill, *operands, mask, None if mask is None else plain[mask],
                scale=site.scale, lines=flat_lines(spans, site.kv_heads), sink=spans.sink,
                recent=spans.recent, min_keys=spans.min_keys, like=site.node,
            )  # fmt: skip
            out = strided_like(graph, out, site)
        site.node.replace_all_uses_with(out)
    return finish(gm)
