"""Quest (ICML 2024, arXiv 2406.10774): a key is ranked by the greatest score that any key of its
page could have, which bounds of the page's dims tell. Those are kept beside the cache."""

from __future__ import annotations

import torch
from torch import fx

from loki_compile.kernels.kept import PAGE, Keeps
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import fake_value, same_size
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked, Ranking
from loki_compile.passes.write_forms import unordered_by
from loki_compile.policies.ops import selected


def positions(asked: Asked) -> fx.Node:
    (bounds,) = asked.kept
    batch, rows = fake_value(asked.key).shape[0], fake_value(bounds).shape[0]
    if not same_size(batch, rows):  # the cache holds more sequences than decode
        batch = call(asked.graph, torch.Tensor.size, asked.key, 0, like=asked.site.node)
        bounds = call(asked.graph, torch.narrow, bounds, 0, 0, batch, like=asked.site.node)
    tokens = call(asked.graph, torch.Tensor.size, asked.key, 2, like=asked.site.node)
    return selected(asked, None, bounds, None, page=PAGE, keys=tokens)


def refuses(site: AttentionSite, cache: KeyCache) -> str:
    if site.latent is not None:
        return "it caches latents, whose bounds do not bound the keys"
    if cache.leaves or any(write.moved for write in cache.writes):
        return "its cache is a window whose keys move from page to page"
    if cache.batch_axis < 0:
        return "which dimension of its cache holds sequences is not seen"
    if not _reads_from_the_start(site, cache):
        return "it reads a part of its cache that does not begin where the cache does"
    unordered = "" if cache.grows else next(filter(None, map(unordered_by, cache.writes)), "")
    if unordered:
        return f"its positions may wrap around: they are computed by `{unordered}`"
    slots = fake_value(cache.past).shape[cache.token_axis]
    read = fake_value(site.key.base).shape[site.key.order[2]]
    if cache.writes and not cache.grows and not site.masks and same_size(slots, read):
        return "its keys are written over where no mask hides what is left of the page"
    return ""


def _reads_from_the_start(site: AttentionSite, cache: KeyCache) -> bool:
    """Whether the site's keys are the first ones of the cache, of its first sequences."""
    whole, part = fake_value(cache.root), fake_value(site.key.base)
    axes = (cache.batch_axis, cache.token_axis)
    return same_size(whole.storage_offset(), part.storage_offset()) and all(
        same_size(whole.stride(axis), part.stride(site.key.order[dim]))
        for axis, dim in zip(axes, (0, 2), strict=True)
        if not same_size(whole.shape[axis], 1)
    )


PAGES = Ranking("quest", positions, Keeps.PAGES, refuses)
