"""Caches that share one tensor become inputs of their own.

Hand-written decoders keep all layers' keys and values in one tensor and take one layer's out of it
by numbers: `cache[layer, 0, :, :, pos] = k`. Where a graph uses an input in this way alone, each
part is a tensor by itself, and no two of them share memory: the graph takes the parts as inputs
behind its own, and whoever runs it cuts them out of the tensor (`Part.of`). What lies behind sees
plain caches, and Inductor writes into them in place, where it would copy the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.fx_tools import (
    call,
    concrete,
    fake_mode_of,
    fake_value,
    may_overlap,
    op_name,
    operand,
    shape_of,
)
from torch import Tensor, fx

# Dimensions of one layer's keys: (B, Hkv, T, D) in any order. Inputs that have more are cut down.
KEY_DIMS = 4


@dataclass(frozen=True)
class Part:
    """What the numbers (dimension, index) select, one after the other, of the input at `holder`."""

    holder: int
    numbers: tuple[tuple[int, int], ...]

    def of(self, args: Sequence[Any]) -> Tensor:
        """The part, a view, given the graph's own inputs."""
        part: Tensor = args[self.holder]
        for dim, number in self.numbers:
            part = part.select(dim, number)
        return part


def with_parts(args: Sequence[Any], parts: Sequence[Part]) -> tuple[Any, ...]:
    """The inputs of a graph whose parts were taken, given its own."""
    return (*args, *(part.of(args) for part in parts))


def take_parts(gm: fx.GraphModule) -> list[Part]:
    """Adds an input for each part of an input that the graph uses by such parts alone.

    Edits `gm`, which must be a copy of Dynamo's. The new inputs are the last ones, in order; the
    inputs that they are parts of stay, and have no users any more.
    """
    graph = gm.graph
    _select_by_numbers(graph)
    parts: list[Part] = []
    inputs = graph.find_nodes(op="placeholder")
    for place, holder in enumerate(inputs):
        found = _parts_of(holder, ())
        if not found or found == [(holder, ())] or _overlaps_itself(fake_value(holder)):
            continue
        if any(other is not holder and may_overlap(other, holder) for other in inputs):
            continue  # another input is a view of it: AOTAutograd has to see both
        for node, numbers in found:
            node.replace_all_uses_with(_add_input(graph, holder, node, numbers))
            parts.append(Part(place, numbers))
        for view in reversed(_views_of(holder)):
            graph.erase_node(view)
    graph.lint()
    gm.recompile()
    return parts


_Found = list[tuple[fx.Node, tuple[tuple[int, int], ...]]]


def _parts_of(node: fx.Node, numbers: tuple[tuple[int, int], ...]) -> _Found | None:
    """The parts that a tensor is used by, with their numbers; None where it is used otherwise.

    Parts at different numbers of one dimension share no memory, unless the tensor overlaps itself.
    """
    rank = len(shape_of(node) or ())
    if rank <= KEY_DIMS:
        return [(node, numbers)]
    if any(op_name(u) != "select" or type(operand(u, "index")) is not int for u in node.users):
        return None
    if len({operand(user, "dim") % rank for user in node.users}) != 1:
        return None
    found: _Found = []
    for user in node.users:
        number = operand(user, "index")
        inner = _parts_of(user, (*numbers, (operand(user, "dim") % rank, number)))
        if inner is None or number < 0:
            return None
        found += inner
    return found


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two places of a tensor may be one in memory, as in what was expanded."""
    if tensor.is_contiguous():
        return False
    known = [(concrete(n), concrete(m)) for n, m in zip(tensor.stride(), tensor.shape, strict=True)]
    steps = [(step, many) for step, many in known if step is not None and many is not None]
    reach = 1
    for step, many in sorted(steps):
        if many > 1 and step < reach:
            return True
        reach = max(reach, step * many)
    return len(steps) < len(known)


def _views_of(node: fx.Node) -> list[fx.Node]:
    """The selected parts of a tensor and of its parts, sources first."""
    return [view for user in node.users for view in (user, *_views_of(user))]


def _add_input(
    graph: fx.Graph, holder: fx.Node, part: fx.Node, numbers: tuple[tuple[int, int], ...]
) -> fx.Node:
    """An input of the part's sizes and strides, whose memory nothing else has."""
    last = graph.find_nodes(op="placeholder")[-1]
    name = "_".join([holder.name, *(str(number) for _, number in numbers)])
    with graph.inserting_after(last):
        new = graph.placeholder(name)
    like = fake_value(part)
    with fake_mode_of(graph):
        new.meta["example_value"] = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=like.device
        )
    # AOTAutograd reads both of every input; whether the address stays is as it is for the holder.
    new._dynamo_source = None  # type: ignore[attr-defined]
    new.meta["tensor_dict"] = dict(holder.meta.get("tensor_dict", {}))
    return new


def _select_by_numbers(graph: fx.Graph) -> None:
    """One `select` for each part of an input that calls name by numbers.

    PyTorch takes the numbers of an index before it looks at the rest of it.
    """
    parts: dict[tuple[fx.Node, int, int], fx.Node] = {}
    for node in list(graph.nodes):
        whole, numbers, left = _numbers_taken(node)
        if whole is None or (whole.op != "placeholder" and whole not in parts.values()):
            continue
        numbers = numbers[: max(0, len(shape_of(whole) or ()) - KEY_DIMS)]
        if not numbers:
            continue
        for gone, (dim, number) in enumerate(numbers):
            size = concrete((shape_of(whole) or ())[dim - gone])
            key = whole, dim - gone, number + size if number < 0 and size is not None else number
            if key not in parts:
                with graph.inserting_before(node):
                    parts[key] = call(graph, torch.select, *key, like=node)
            whole = parts[key]
        taken = {dim for dim, _ in numbers}
        left = [item for dim, item in enumerate(left) if dim not in taken]
        if left or op_name(node) == "setitem":
            node.args = (whole, tuple(left) or (Ellipsis,), *node.args[2:])
        else:
            node.replace_all_uses_with(whole)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if op_name(node) == "unbind" and not node.users:
            graph.erase_node(node)


def _numbers_taken(node: fx.Node) -> tuple[fx.Node | None, list[tuple[int, int]], list[Any]]:
    """The tensor that a call takes at constant numbers, those (dimension, number), and its index.

    The index is empty where nothing of it is left beside them.
    """
    name = op_name(node)
    if name not in ("getitem", "setitem", "select") or not isinstance(node.args[0], fx.Node):
        return None, [], []
    whole: Any = node.args[0]
    if name == "select":
        dim, number = operand(node, "dim"), operand(node, "index")
    elif op_name(whole) == "unbind":
        dim, number = (*whole.args[1:], whole.kwargs.get("dim", 0))[0], node.args[1]
        whole = whole.args[0]
    else:
        index: Any = node.args[1]
        left = list(index) if isinstance(index, tuple) else [index]
        plain = next((n for n, i in enumerate(left) if i is None or i is Ellipsis), len(left))
        return whole, [(n, i) for n, i in enumerate(left[:plain]) if type(i) is int], left
    rank = len(shape_of(whole) or ())
    return whole, [(dim % rank, number)] if rank and type(number) is int else [], []
