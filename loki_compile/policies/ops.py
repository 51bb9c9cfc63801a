"""The call of `loki::select` that rankings share."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from loki_compile.kernels.ops import select, select_weighed
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked


def selected(
    asked: Asked, basis: fx.Node | None, index: fx.Node, index_scale: fx.Node | None, **more: Any
) -> fx.Node:
    """The best keys of each row by `kernels.ops.select`, which says what the operands are. Where
    the choice is to be weighed, what that says of the rows is left in `asked.weighed`."""
    choice, site = asked.choice, asked.site
    budget = choice.budget
    if choice.by_probability and not choice.per_head:
        more["by_probability"] = True
    if budget.mass:
        more["mass"] = budget.mass
    op = select_weighed if choice.weighed else select
    chosen = call(
        asked.graph, op, asked.query, basis, index, index_scale, asked.mask, asked.bounds,
        scale=site.scale, top_k=budget.top_k, keep_q16=budget.keep_q16, sink=budget.sink,
        recent=budget.recent, min_keys=budget.min_keys, per_head=choice.per_head,
        like=site.node, **more,
    )  # fmt: skip
    if not choice.weighed:
        return chosen
    asked.weighed.append(call(asked.graph, operator.getitem, chosen, 1, like=site.node))
    return call(asked.graph, operator.getitem, chosen, 0, like=site.node)
