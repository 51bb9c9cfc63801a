"""The first and the last keys (StreamingLLM, arXiv 2309.17453): nothing is ranked, nothing is kept.

Positions depend on masks alone, so that all sites that read one mask share them.
"""

from __future__ import annotations

from torch import fx

from loki_compile.kernels.positions import window_positions
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked, Ranking


def positions(asked: Asked) -> fx.Node:
    site, choice = asked.site, asked.choice
    heads = site.query_heads if choice.per_head else fake_value(asked.key).shape[1]
    # Sizes by name: symbols have no hash, and comparing them would guard the graph.
    sizes = f"{fake_value(asked.query).shape[::2]} {fake_value(asked.key).shape[2]}"
    device = fake_value(asked.key).device
    what = ("window", asked.mask, heads, choice.budget, sizes, device)
    if what not in asked.shared:
        asked.shared[what] = call(
            asked.graph, window_positions, asked.query, asked.key, asked.mask, heads,
            *choice.budget.numbers, like=site.node,
        )  # fmt: skip
    return asked.shared[what]


WINDOW = Ranking("window", positions)
