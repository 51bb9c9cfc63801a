"""Keys and values behind their repetition over a group of query heads. Analysis only."""

from __future__ import annotations

import dataclasses
import math

import torch
from loki_compile.passes.attention import Core, Heads
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    may_overlap,
    op_name,
    same_size,
)
from loki_compile.passes.views import CASTS, Dim, View, operand_of_view, views_behind, widens
from torch import fx


def heads_at(
    node: fx.Node,
    at: tuple[int, int, int, int],
    core: Core,
    writes: list[Write],
    most: int | None = None,
    scaled: bool = False,
) -> Heads:
    """`heads_of`, unless what lies behind may be written into before the core reads it.

    A repetition or `clone` copies: it holds the cache as it was at that point, and what is written
    into the copy is not in the cache. In attention written out the keys are read by the first
    product, which lies before the core's node.
    """
    heads, walked = heads_of(node, at, most, scaled)
    copies = [step for step in walked if not may_overlap(step, heads.base)]
    order = {n: i for i, n in enumerate(core.node.graph.nodes)}
    read_early = op_name(core.node) != "scaled_dot_product_attention"
    frozen = [order[step] for step in copies + [node] * read_early]
    for write in writes:
        late = frozen and write.position > min(frozen) and may_overlap(write.operand, heads.base)
        if late or any(may_overlap(write.operand, copy) for copy in copies):
            return Heads(node, at, 1)
    return heads


def heads_of(
    node: fx.Node,
    at: tuple[int, int, int, int] = (0, 1, 2, 3),
    most: int | None = None,
    scaled: bool = False,
) -> tuple[Heads, tuple[fx.Node, ...]]:
    """A core's K or V operand as heads of the farthest tensor behind it, and the calls between.

    Between lie calls of `views.CALLS` that keep every entry and repeat nothing but heads: each KV
    head in place (`repeat_kv` by expand and reshape, `repeat_interleave`, an expand of one head),
    or all of them behind each other (`repeat`, or expand and reshape). Casts lead from one floating
    dtype to another. `at` says which dimension of `node` is batch, head, token and head_dim; `most`
    is the largest repetition to look behind. `scaled` says to look behind a product with a positive
    number too.
    """
    found: tuple[Heads, tuple[fx.Node, ...]] = Heads(node, at, 1), ()

    def behind(call: fx.Node) -> fx.Node | None:
        times = _times(call) if scaled else None
        if times is not None:
            return times[0]
        return operand_of_view(call) if op_name(call) not in CASTS or _recasts(call) else None

    for view in views_behind(node, behind):
        heads = _heads(view, at)
        if heads is not None and (most is None or heads.group <= most):
            times = [by[1] for by in map(_times, view.walked) if by is not None]
            found = dataclasses.replace(heads, factor=math.prod(times, start=1.0)), view.walked
    return found


def _heads(view: View, at: tuple[int, int, int, int]) -> Heads | None:
    """The source of a view as heads whose dimensions in the view are `at`; None for others."""
    if view.cut:
        return None
    order: list[int] = []
    group, interleaved = 1, False
    for dim in at:
        steps: Dim = view.factors(dim) if dim >= 0 else ()
        kept = [step for step in steps if step.axis is not None]
        if len(order) == 1:
            repeats = [concrete(step.size) for step in steps if step.axis is None]
            if None in repeats or (kept and kept[0] not in (steps[0], steps[-1])):
                return None
            group = math.prod(repeats)  # type: ignore[arg-type]
            interleaved = bool(kept) and group > 1 and kept[0] is steps[-1]
        elif len(kept) < len(steps):
            return None
        if len(kept) > 1 or any(not same_size(s.size, view.whole(s.axis)) for s in kept):
            return None
        ones = [s.axis for s in view.dims[dim] if s.axis is not None] if dim >= 0 else []
        order.append(next((s.axis for s in kept if s.axis is not None), (*ones, -1)[0]))
    # A dimension of size one may not say which of the source's it was: any of size one will do.
    left = [axis for axis in range(len(view.starts)) if axis not in order]
    order = [left.pop(0) if axis < 0 and left else axis for axis in order]
    if left or any(order[label] < 0 <= at[label] for label in (0, 2, 3)):
        return None
    return Heads(view.source, (order[0], order[1], order[2], order[3]), group, interleaved)


def _times(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor and the positive number that the call multiplies it with, by `mul` or `div`."""
    name, divides = op_name(node), op_name(node) in ("div", "truediv", "__truediv__")
    if not divides and name not in ("mul", "__mul__", "__rmul__"):
        return None
    if node.kwargs or len(node.args) != 2:
        return None
    tensor, number = node.args
    if not divides and isinstance(number, fx.Node):
        tensor, number = number, tensor
    if not isinstance(tensor, fx.Node) or isinstance(number, bool):
        return None
    if not isinstance(number, (int, float)) or not 0 < number < math.inf:
        return None
    before, after = fake_value(tensor), fake_value(node)
    if not isinstance(before, torch.Tensor) or before.dtype != after.dtype:
        return None
    return tensor, 1 / number if divides else float(number)


def _recasts(node: fx.Node) -> bool:
    """Whether a cast on one device leads from one floating dtype to another.

    The ops read a cache as it is stored. A cast that narrows it loses what they do not lose.
    """
    before, after = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
    floating = before.dtype.is_floating_point and after.dtype.is_floating_point
    return before.device == after.device and floating


def before_widening(query: fx.Node) -> fx.Node:
    """The queries before a cast that only widens them."""
    while op_name(query) in CASTS and widens(query):
        query = query.args[0]  # type: ignore[assignment]
    return query
