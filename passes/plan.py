"""Decides, per site, between sparse and dense, and with what budget. Edits nothing.

Everything that can be known before a key is seen is decided here; the rank of an index, which may
come from a basis that is fitted later, is the runtime's to fill in (`kernels` sees it as a shape).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from loki_compile.kernels.kept import Keeps
from loki_compile.kernels.ops import BACKENDS, unserved
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
from loki_compile.passes.policy import Choice, Policy
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
    choice: Choice
    note: str = ""
    masks_at: fx.Node | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of each attention core of one graph.

    `keeps` says of each of `caches` what is kept beside it: a cache that sites rank in two ways is
    there twice.
    """

    sparse: tuple[SparseSite, ...]
    dense: tuple[Skipped, ...]
    sites: tuple[AttentionSite, ...]
    caches: tuple[KeyCache, ...] = ()
    keeps: tuple[Keeps, ...] = ()

    def on(self, mapping: dict[fx.Node, fx.Node]) -> Plan:
        """The same plan for a copy of its graph, given the map from old nodes to new."""
        return remap(self, mapping)


def make_plan(
    sites: list[AttentionSite],
    skipped: list[Skipped],
    *,
    policy: Policy,
    layers: str | tuple[int | str, ...],
) -> Plan:
    """Traces each site's cache and decides.

    Args:
      policy: how each site chooses its keys. Where no row can ever see more than `min_keys` of the
        budget, the site is left dense.
      layers: "all", or numbers and path patterns of the sites that may be sparse, see
        `AttentionSite.is_among`.
    """
    dense = list(skipped)
    sparse: list[SparseSite] = []
    caches: list[tuple[KeyCache, Keeps]] = []
    writes = writes_of(sites[0].node.graph) if sites else []
    for number, (site, choice) in enumerate(zip(sites, policy(sites), strict=True)):
        if layers != "all" and not site.is_among(layers, number):
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
        if why_not := choice.ranking.refuses(site, cache):
            refused = (choice.ranking.name, why_not)
            dense.append(Skipped(site.node, Reason.POLICY, refused, site.path))
            continue
        slots, least = _most_keys(site, cache), choice.budget.min_keys
        if slots is not None and slots <= least:
            details = (slots, least)
            dense.append(Skipped(site.node, Reason.SHORT_CACHE, details, site.path))
            continue
        kept = (cache, choice.ranking.keeps)
        if kept not in caches:
            caches.append(kept)
        if any(term.varies(heads) for term in site.masks for heads in "hg"):
            choice = dataclasses.replace(choice, per_head=True)
        sparse.append(
            SparseSite(
                site,
                caches.index(kept),
                cache.views,
                choice,
                note=BACKENDS[device].note(),
                masks_at=masks_at(site, writes),
            )
        )
    return Plan(
        tuple(sparse),
        tuple(dense),
        tuple(sites),
        tuple(cache for cache, _ in caches),
        tuple(keeps for _, keeps in caches),
    )


def masks_at(site: AttentionSite, writes: list[Write]) -> fx.Node | None:
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
