"""Loki (NeurIPS 2024, arXiv 2406.02542): keys are ranked by R of their D dims, in a basis in which
those hold most of what tells keys apart. The projected keys are kept beside the cache."""

from __future__ import annotations

from torch import fx

from loki_compile.kernels.kept import Keeps
from loki_compile.passes.policy import Asked, Ranking
from loki_compile.policies.ops import selected


def positions(asked: Asked) -> fx.Node:
    if not asked.kept:  # no head of it ranks keys
        return selected(asked, None, asked.key, None)
    index, *scale = asked.kept
    return selected(asked, asked.query_basis, index, scale[0] if scale else None)


LOW_RANK = Ranking("loki", positions, Keeps.INDEX, weighs=True)
