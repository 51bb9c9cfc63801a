"""Decides, per site, between sparse and dense, and with what budget. Edits nothing.

Everything that can be known before a key is seen is decided here; the rank of an index, which may
come from a basis that is fitted later, is the runtime's to fill in (`kernels` sees it as a shape).
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field

from loki_compile.kernels.ops import BACKENDS, Budget, unserved
from loki_compile.passes.attention import AttentionSite, Reason, Skipped
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    may_overlap,
    shape_of,
    writes_of,
)
from loki_compile.passes.graphs import input_of, remap
from loki_compile.passes.latent import absorb
from loki_compile.passes.trace_caches import trace_cache
from torch import fx


@dataclass(frozen=True)
class SparseSite:
    """A site that the sparse variant rewrites. `cache` numbers its cache in `Plan.caches`.

    `views` lead from that cache to the site's keys: layers that share a cache share its index,
    whatever part of it each reads. `note` is what the kernels of its device say to their user.
    `masks_at` is the node behind which the site's masks are as its core reads them; None where it
    has none.
    """

    site: AttentionSite
    cache: int
    views: tuple[fx.Node, ...]
    budget: Budget
    per_head: bool
    note: str = ""
    masks_at: fx.Node | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of each attention core of one graph."""

    sparse: tuple[SparseSite, ...]
    dense: tuple[Skipped, ...]
    sites: tuple[AttentionSite, ...]
    caches: tuple[KeyCache, ...] = field(default=())

    def on(self, mapping: dict[fx.Node, fx.Node]) -> Plan:
        """The same plan for a copy of its graph, given the map from old nodes to new."""
        return remap(self, mapping)


def make_plan(
    sites: list[AttentionSite],
    skipped: list[Skipped],
    *,
    budget: Budget,
    per_head: bool,
    layers: str | tuple[int | str, ...],
) -> Plan:
    """Traces each site's cache and decides.

    Args:
      budget: of every site; a cache in which no row can ever see more than its `min_keys` is left
        dense.
      per_head: each query head chooses for itself, instead of one choice for a KV group.
      layers: "all", or numbers and path patterns (`fnmatch`) of the sites that may be sparse.
    """
    dense = list(skipped)
    sparse: list[SparseSite] = []
    caches: list[KeyCache] = []
    writes = writes_of(sites[0].node.graph) if sites else []
    for number, site in enumerate(sites):
        if not _selected(site, number, layers):
            dense.append(Skipped(site.node, Reason.LAYER_OFF, (layers,), site.path))
            continue
        cache = trace_cache(site, writes) if site.latent is None else None
        if cache is None or (isinstance(cache, Skipped) and cache.reason is Reason.LATENT):
            dims = site.value_dim if cache is None else cache.details[0]
            absorbed = absorb(site, writes, dims)
            site, cache = absorbed if isinstance(absorbed, tuple) else (site, absorbed)
        if isinstance(cache, Skipped):
            dense.append(cache)
            continue
        device = fake_value(cache.past).device.type
        why_not = unserved(device)
        if why_not:
            dense.append(Skipped(site.node, Reason.DEVICE, (device, why_not), site.path))
            continue
        if site.query_tokens < 0 and not _counts_tokens(site, cache):
            dense.append(Skipped(site.node, Reason.PREFILL, (site.tokens,), site.path))
            continue
        slots = _most_keys(site, cache)
        if slots is not None and slots <= budget.min_keys:
            details = (slots, budget.min_keys)
            dense.append(Skipped(site.node, Reason.SHORT_CACHE, details, site.path))
            continue
        if cache not in caches:
            caches.append(cache)
        heads_differ = any(term.varies(heads) for term in site.masks for heads in "hg")
        each = per_head or heads_differ
        sparse.append(
            SparseSite(
                site,
                caches.index(cache),
                cache.views,
                budget,
                each,
                note=BACKENDS[device].note(),
                masks_at=_masks_at(site, writes),
            )
        )
    return Plan(tuple(sparse), tuple(dense), tuple(sites), tuple(caches))


def _masks_at(site: AttentionSite, writes: list[Write]) -> fx.Node | None:
    """The node behind which the site's masks are as its core reads them; None without masks.

    That is the last of the masks, or the last call before the core that writes into one: a mask may
    be allocated first and filled in place. Layers that read the same masks share the node.
    """
    masks = [term.node for term in site.masks]
    if not masks:
        return None
    before = [write for write in writes if write.call < site.node]
    filled = [w.call for w in before if any(may_overlap(w.operand, mask) for mask in masks)]
    return max(*masks, *filled, site.node.graph.find_nodes(op="placeholder")[-1])


def _counts_tokens(site: AttentionSite, cache: KeyCache) -> bool:
    """Whether a number of new tokens that each call brings can be told when it runs, and no window
    of the cache depends on it."""
    return not cache.leaves and input_of(site.node.graph, site.tokens) is not None


def _most_keys(site: AttentionSite, cache: KeyCache) -> int | None:
    """Keys that the site can ever see, where that is a constant: a static cache, a window."""
    if cache.grows:
        kept = shape_of(cache.leaves[-1]) if cache.leaves else None
        window = concrete(kept[cache.token_axis]) if kept is not None else None
        return None if window is None else window + site.query_tokens
    shape = shape_of(site.key.base)
    return concrete(shape[site.key.order[2]]) if shape is not None else None


def _selected(site: AttentionSite, number: int, layers: str | tuple[int | str, ...]) -> bool:
    if layers == "all":
        return True
    digits = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site.path)
    layer = int(digits[1]) if digits else number
    return any(
        layer == pick if isinstance(pick, int) else fnmatch.fnmatch(site.path, pick)
        for pick in layers
    )
