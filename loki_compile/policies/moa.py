"""The first keys and a span alpha + beta N of the last ones, of each KV head its own (MoA, arXiv
2406.14909): nothing is ranked, nothing is kept, and no position is made. A step attends to two
ranges of each head.

Where the keys lie that rows see depends on masks alone, so that all sites that read one mask share
that; layers of equal spans share the ranges too.
"""

from __future__ import annotations

from torch import fx

from loki_compile.kernels.positions import span_ranges, visible_slots
from loki_compile.passes.attention import AttentionSite, MaskTerm
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked, Ranking


def ranges(asked: Asked) -> fx.Node:
    spans = asked.choice.spans
    assert spans is not None
    key = fake_value(asked.key)
    # Sizes by name: symbols have no hash, and comparing them would guard the graph.
    alike = f"{fake_value(asked.query).shape[::2]} {key.shape[1:3]}"
    seen = ("visible slots", asked.mask, alike, key.device)
    if seen not in asked.shared:
        asked.shared[seen] = call(
            asked.graph, visible_slots, asked.query, asked.key, asked.mask, like=asked.site.node
        )
    read = (*seen, spans)
    if read not in asked.shared:
        asked.shared[read] = call(
            asked.graph, span_ranges, asked.shared[seen], key.shape[1], *spans.numbers,
            like=asked.site.node,
        )  # fmt: skip
    return asked.shared[read]


def refuses(site: AttentionSite, cache: KeyCache) -> str:
    """Ranges are of a KV head: where its query heads see other keys each, those of one may hold
    none that another sees."""
    if any(_differs_in_groups(term, site) for term in site.masks):
        return "query heads of one KV head see keys by masks of their own"
    return ""


def _differs_in_groups(term: MaskTerm, site: AttentionSite) -> bool:
    group = site.query_heads // site.kv_heads
    if group == 1 or term.per_row:  # what is the same for all keys of a row hides none of them
        return False
    if term.rule is not None:
        return term.rule.per_head
    of_kv_heads = site.group_dim == group and not site.interleaved  # what "h" counts in its layout
    return term.varies("g") or (term.varies("h") and not of_kv_heads)


MOA = Ranking("moa", ranges, refuses=refuses, ranges=True)
