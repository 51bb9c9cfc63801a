"""Keys ranked by themselves: the best choice that any ranking could make at its budget, in the time
of reading all keys. Nothing is kept. What a ranking loses against it is the ranking's fault, what
this loses against dense attention the budget's."""

from __future__ import annotations

from torch import fx

from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.policy import Asked, Ranking
from loki_compile.policies.ops import selected


def positions(asked: Asked) -> fx.Node:
    return selected(asked, None, asked.key, None)


def refuses(site: AttentionSite, cache: KeyCache) -> str:
    if cache.k_pe is not None:
        return "the rows that it would read lie in two tensors"
    return ""


EXACT = Ranking("oracle", positions, refuses=refuses, weighs=True)
