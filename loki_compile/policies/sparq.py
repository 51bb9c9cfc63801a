"""SparQ (ICML 2024, arXiv 2312.04985): keys are ranked by the `rank` dims of their own in which the
queries of their KV head are largest in magnitude. Nothing is kept and no basis is needed.

Queries that are zero in all other dims rank so over the keys as they are cached: the choice is
SparQ's, the time that of reading all keys. To save time, keys would have to be kept dim by dim too.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked, Ranking
from loki_compile.policies.exact import EXACT
from loki_compile.policies.ops import selected


def largest_dims(query: Tensor, heads: int, count: int) -> Tensor:
    """The queries that rank: only in `count` dims, and scaled up for those that are left out.

    The dims are those of the greatest sums of magnitudes over the query heads that choose together,
    of equal ones the first. A query is divided by the root of the share that its magnitude in these
    has of that in all, the temperature at which the softmax of its scores stands for attention.

    Args:
      query: (B, Hq, S, D), heads in blocks of those that choose together.
      heads: how many choose: Hkv, or Hq.

    Returns:
      As `query`.
    """
    wide = query.float().unflatten(1, (heads, -1))  # (B, heads, G, S, D)
    magnitude = wide.abs()
    total = magnitude.sum(2, keepdim=True)
    order = torch.argsort(total, dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(magnitude[:, :, :1]).scatter(-1, order[..., :count], 1.0)
    share = (magnitude * kept).sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True)
    # A query of zeros ranks nothing: its share is no number.
    return (wide * kept * torch.where(share > 0, share, 1.0).rsqrt()).flatten(1, 2).to(query.dtype)


def positions(asked: Asked) -> fx.Node:
    query, key = fake_value(asked.query), fake_value(asked.key)
    heads = query.shape[1] if asked.choice.per_head else key.shape[1]
    count = asked.choice.dims(query.shape[3])
    ranking = call(asked.graph, largest_dims, asked.query, heads, count, like=asked.site.node)
    return selected(dataclasses.replace(asked, query=ranking), None, asked.key, None)


SPARQ = Ranking("sparq", positions, refuses=EXACT.refuses, weighs=True)
