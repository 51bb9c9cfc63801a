"""Quest (ICML 2024, arXiv 2406.10774): a key is ranked by the greatest score that any key of its
page could have, which bounds of the page's dims tell. Those are kept beside the cache."""

from __future__ import annotations

import torch
from torch import fx

from loki_compile.kernels.kept import PAGE, Keeps
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked, Ranking
from loki_compile.policies.ops import selected


def positions(asked: Asked) -> fx.Node:
    (bounds,) = asked.kept
    tokens = call(asked.graph, torch.Tensor.size, asked.key, 2, like=asked.site.node)
    return selected(asked, None, bounds, None, page=PAGE, keys=tokens)


def refuses(site: AttentionSite, cache: KeyCache) -> str:
    if site.latent is not None:
        return "it caches latents, whose bounds do not bound the keys"
    if cache.leaves or any(write.moved for write in cache.writes):
        return "its cache is a window whose keys move from page to page"
    if cache.batch_axis < 0:
        return "which dimension of its cache holds sequences is not seen"
    return ""


PAGES = Ranking("quest", positions, Keeps.PAGES, refuses)
