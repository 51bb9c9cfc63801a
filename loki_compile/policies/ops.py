"""The call of `loki::select` that rankings share."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from loki_compile.kernels.ops import KEEP_ALL_Q16, select, select_weighed
from loki_compile.kernels.positions import row_budgets, widest_slots
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import call
from loki_compile.passes.policy import Asked


def selected(
    asked: Asked, basis: fx.Node | None, index: fx.Node, index_scale: fx.Node | None, **more: Any
) -> fx.Node:
    """The best keys of each row by `kernels.ops.select`, which says what the operands are. Where
    the choice is to be weighed, what that says of the rows is left in `asked.weighed`."""
    choice, site = asked.choice, asked.site
    budget = choice.budget
    top_k, keep_q16 = budget.top_k, budget.keep_q16
    if choice.budgets is not None:
        top_k, keep_q16 = None, KEEP_ALL_Q16
        more |= _budgets(asked)
    if choice.by_probability and not choice.per_head:
        more["by_probability"] = True
    if budget.mass:
        more["mass"] = budget.mass
    op = select_weighed if choice.weighed else select
    chosen = call(
        asked.graph, op, asked.query, basis, index, index_scale, asked.mask, asked.bounds,
        scale=site.scale, top_k=top_k, keep_q16=keep_q16, sink=budget.sink,
        recent=budget.recent, min_keys=budget.min_keys, per_head=choice.per_head,
        like=site.node, **more,
    )  # fmt: skip
    if not choice.weighed:
        return chosen
    asked.weighed.append(call(asked.graph, operator.getitem, chosen, 1, like=site.node))
    return call(asked.graph, operator.getitem, chosen, 0, like=site.node)


def _budgets(asked: Asked) -> dict[str, Any]:
    """How many keys rows choose where KV heads have budgets of their own: the operands that say so.
    Sites of equal budgets that read one mask share the tensor."""
    budgets, site = asked.choice.budgets, asked.site
    assert budgets is not None
    key = fake_value(asked.key)
    heads = site.query_heads if asked.choice.per_head else key.shape[1]
    # Sizes by name: symbols have no hash, and comparing them would guard the graph.
    what = ("budgets", asked.bounds, heads, budgets, f"{key.shape[1:3]}", key.device)
    if what not in asked.shared:
        asked.shared[what] = call(
            asked.graph, row_budgets, asked.query, asked.key, asked.bounds, heads,
            *budgets.numbers, like=site.node,
        )  # fmt: skip
    slots: Any = budgets.slots(key.shape[2])
    if not isinstance(slots, int):
        slots = call(asked.graph, widest_slots, asked.key, *budgets.numbers, like=site.node)
    return {"budgets": asked.shared[what], "slots": slots}
