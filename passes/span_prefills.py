"""Finds, in a prefill, the cores that a plan of spans can serve. Analysis only."""

from __future__ import annotations

from dataclasses import dataclass

from loki_compile.kernels.fused import SCORES
from loki_compile.kernels.span_prefill import PAYS, obstacle, pays, share_read
from loki_compile.kernels.spans import Spans
from loki_compile.passes.attention import MAX_QUERY_TOKENS, AttentionSite
from loki_compile.passes.calls import concrete, fake_value, hint_of, same_size, shape_of
from loki_compile.passes.sites import find_sites
from torch import fx


@dataclass(frozen=True)
class SpanPrefill:
    """A core of a prefill, and the spans that its KV heads read."""

    site: AttentionSite
    spans: Spans


def find_prefills(graph: fx.Graph) -> list[AttentionSite]:
    """The cores of a graph with more new tokens than are decoded."""
    sites, _ = find_sites(graph, max_query_tokens=None)
    return [site for site in sites if (hint_of(site.tokens) or 0) > MAX_QUERY_TOKENS]


def too_wide(site: AttentionSite, spans: Spans) -> tuple[str, bool]:
    """Why spans do not pay at the length that the graph was traced with, "" where they do; and
    whether it has that length alone."""
    tokens = hint_of(site.tokens) or 0
    if pays(spans, tokens):
        return "", False
    share = f"spans read {share_read(spans, tokens):.0%} of {tokens} tokens' keys"
    return f"{share}, and below {PAYS:.0%} they pay", concrete(site.tokens) is not None


def why_not(site: AttentionSite) -> str:
    """Why spans cannot serve a prefill; "" where they can, if its mask turns out to be causal."""
    keys = shape_of(site.key.base)
    if not site.sdpa or site.latent is not None or site.interleaved:
        return "it is no plain scaled_dot_product_attention"
    if keys is None or not same_size(keys[site.key.order[2]], site.tokens):
        return "its tokens lie behind others, or in a cache that is longer"
    if not site.core.causal and not site.masks:
        return "it is not causal"
    for term in site.masks:
        mask = shape_of(term.node) or ()
        if site.core.causal or term.rule is not None or term.layout != SCORES:
            return "its mask is more than one of all rows and keys"
        if len(mask) != 4 or term.varies("h") or term.varies("g"):
            return "its mask differs among heads"
        if not all(same_size(size, site.tokens) for size in mask[2:]):
            return "its mask is more than one of all rows and keys"
    return obstacle(fake_value(site.key.base).device.type)
