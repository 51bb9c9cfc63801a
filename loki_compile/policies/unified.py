"""Keys ranked by themselves, one set of them for all heads of a layer, whose query heads name keys
in turn; a quarter of the budget goes to the last keys (LessIsMore, arXiv 2508.07101)."""

from __future__ import annotations

from torch import fx

from loki_compile.kernels.positions import unified_positions
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked, Ranking
from loki_compile.policies.exact import EXACT

RECENT_PART = 4


def positions(asked: Asked) -> fx.Node:
    return call(
        asked.graph, unified_positions, asked.query, asked.key, asked.mask,
        fake_value(asked.key).shape[1], asked.site.scale, RECENT_PART, *asked.choice.budget.numbers,
        like=asked.site.node,
    )  # fmt: skip


def refuses(site: AttentionSite, cache: KeyCache) -> str:
    if any(term.varies(heads) for term in site.masks for heads in "hg"):
        return "its heads see keys by masks of their own"
    return EXACT.refuses(site, cache)


UNIFIED = Ranking("unified", positions, refuses=refuses)
