"""Caches that share one tensor become inputs of their own.

Hand-written decoders keep all layers' keys and values in one tensor and take one layer's out of it
by numbers (`cache[layer, 0, :, :, pos] = k`), or store keys and values by one write
(`cache[:, start:end] = kv`) and take them apart behind it. Where a graph uses an input by such
parts alone, each is a tensor by itself, and no two of them share memory: the graph takes the parts
as inputs behind its own, and whoever runs it cuts them out of the tensor (`Part.of`). What lies
behind sees plain caches, and Inductor writes into them in place, where it would copy the whole
tensor.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.calls import (
    concrete,
    fake_value,
    may_overlap,
    op_name,
    operand,
    shape_of,
    share_memory,
    writes_of,
)
from loki_compile.passes.graphs import call, fake_mode_of
from loki_compile.passes.views import indexed_dims, permutation
from torch import Tensor, fx
from torch.utils._pytree import tree_map

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
    _return_what_they_write(graph)
    _select_by_numbers(graph)
    _write_part_by_part(graph)
    parts: list[Part] = []
    inputs = graph.find_nodes(op="placeholder")
    for place, holder in enumerate(inputs):
        found = _parts_of(holder, ())
        if not found or found == [(holder, ())] or _overlaps_itself(fake_value(holder)):
            continue
        if any(other is not holder and may_overlap(other, holder) for other in inputs):
            continue  # another input is a view of it: AOTAutograd has to see both
        for node, numbers in found:
            part = _add_input(graph, holder, node, numbers)
            _move_views(node, part)
            node.replace_all_uses_with(part)
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


def _move_views(old: fx.Node, part: fx.Node) -> None:
    """Gives every view of `old`, in whatever way it was made, the memory of the new input."""
    memory, start = fake_value(part).untyped_storage(), fake_value(old).storage_offset()

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not share_memory(value, fake_value(old)):
            return value
        at = start * fake_value(old).itemsize // value.itemsize  # `value` may have another dtype
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(memory, value.storage_offset() - at, value.shape, value.stride())  # type: ignore[call-overload]

    views = list(old.users)
    with fake_mode_of(part.graph):
        for view in views:
            value = fake_value(view)
            view.meta["example_value"] = tree_map(moved, value)
            if view.meta["example_value"] is not value:
                views += [user for user in view.users if user not in views]


def _return_what_they_write(graph: fx.Graph) -> None:
    """Calls that write into a tensor of several layers return it: their readers read that."""
    for node in list(graph.nodes):
        whole = node.args[0] if node.args else None
        if op_name(node) == "index_copy_" and len(shape_of(whole) or ()) > KEY_DIMS:
            node.replace_all_uses_with(whole, delete_user_cb=lambda user: user.op != "output")


def _select_by_numbers(graph: fx.Graph) -> None:
    """One `select` for each part of an input that calls name by numbers, also behind views of it.

    PyTorch takes the numbers of an index before it looks at the rest of it.
    """
    parts: dict[tuple[fx.Node, int, int], fx.Node] = {}
    for node in list(graph.nodes):
        whole, numbers, left = _numbers_taken(node)
        if whole is None:
            continue
        numbers = numbers[: max(0, len(shape_of(whole) or ()) - KEY_DIMS)]
        part = _part_behind_views(whole, dict(numbers), node, parts) if numbers else None
        if part is None:
            continue
        taken = {dim for dim, _ in numbers}
        left = [item for dim, item in enumerate(left) if dim not in taken]
        if left or op_name(node) == "setitem":
            node.args = (part, tuple(left) or (Ellipsis,), *node.args[2:])
        else:
            node.replace_all_uses_with(part)
            graph.erase_node(node)
    _erase_unread_views(graph)


def _erase_unread_views(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and (op_name(node) == "unbind" or _is_view(node)):
            graph.erase_node(node)


def _part_behind_views(
    whole: fx.Node,
    numbers: dict[int, int],
    reader: fx.Node,
    parts: dict[tuple[fx.Node, int, int], fx.Node],
) -> fx.Node | None:
    """What `numbers` (of each dimension) select of a tensor: a view of a part of an input.

    The calls are put before `reader`; `parts` has the selects that exist. None where the tensor is
    not a view of an input by slices and turns, or a slice cuts what the numbers count.
    """
    graph = whole.graph
    if whole.op == "placeholder" or whole in parts.values():
        for gone, (dim, number) in enumerate(sorted(numbers.items())):
            size = concrete((shape_of(whole) or ())[dim - gone])
            key = whole, dim - gone, number + size if number < 0 and size is not None else number
            if key not in parts:
                with graph.inserting_before(reader):
                    parts[key] = call(graph, torch.select, *key, like=reader)
            whole = parts[key]
        return whole
    if not _is_view(whole):
        return None
    source: Any = whole.args[0]
    if op_name(whole) == "getitem":
        slices = _items(whole.args[1], len(shape_of(source) or ()))
        if any(slices[dim] != slice(None) for dim in numbers):
            return None
        part = _part_behind_views(source, numbers, reader, parts)
        rest = tuple(item for dim, item in enumerate(slices) if dim not in numbers)
        if part is None or all(item == slice(None) for item in rest):
            return part
        with graph.inserting_before(reader):
            return call(graph, operator.getitem, part, rest, like=reader)
    back = permutation(whole)
    part = _part_behind_views(source, {back[d]: n for d, n in numbers.items()}, reader, parts)
    kept = [d for i, d in enumerate(back) if i not in numbers]
    order = tuple(sorted(kept).index(d) for d in kept)
    if part is None or order == tuple(range(len(order))):
        return part
    with graph.inserting_before(reader):
        return call(graph, torch.permute, part, order, like=reader)


def _is_view(node: fx.Node) -> bool:
    """Whether the call turns a tensor of several layers, or takes slices of it."""
    source = node.args[0] if node.args else None
    if len(shape_of(node) or ()) <= KEY_DIMS or not isinstance(source, fx.Node):
        return False
    if op_name(node) in ("transpose", "permute", "movedim"):
        return True
    return op_name(node) == "getitem" and all(
        isinstance(item, slice) for item in _items(node.args[1], len(shape_of(source) or ()))
    )


def _items(index: Any, rank: int) -> list[Any]:
    """An index of a tensor as one item for each dimension (and each None), without an ellipsis."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    at = next((n for n, item in enumerate(items) if item is Ellipsis), len(items))
    items[at : at + 1] = [slice(None)] * (rank - taken)
    return items


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


def _write_part_by_part(graph: fx.Graph) -> None:
    """Makes a write for each part of one into a tensor that all else takes at numbers."""
    for node in list(graph.nodes):
        whole, index, source = _written(node)
        if whole is None or shape_of(source) is None:
            continue
        shape = shape_of(whole) or ()
        selects = [user for user in whole.users if op_name(user) == "select"]
        dims = {operand(user, "dim") % len(shape) for user in selects}
        size = concrete(shape[next(iter(dims))]) if len(dims) == 1 else None
        if len(shape) <= KEY_DIMS or size is None:
            continue
        (dim,) = dims
        if op_name(node) == "index_copy_":
            at, along = dim, operand(node, "dim") % len(shape)
            if along == dim:
                continue
            operands: tuple[Any, ...] = (along - (along > dim), operand(node, "index"))
        else:
            index = _items(index, len(shape))
            left = [
                item for item, counted in zip(index, _dims_of(index), strict=True) if counted != dim
            ]
            region = indexed_dims(tuple(index), shape)
            if region is None or dim not in region:
                continue
            rest = indexed_dims(tuple(left), [n for d, n in enumerate(shape) if d != dim])
            moved = [d - (d > dim) if d is not None else None for d in region if d != dim]
            at = region.index(dim) - len(region) + len(shape_of(source) or ())
            if rest != moved:
                continue  # indices that the dimension keeps apart would come together
            operands = (tuple(left),)
        if may_overlap(source, whole) or at < 0 or concrete((shape_of(source) or ())[at]) != size:
            continue
        known = {operand(user, "index"): user for user in selects}
        with graph.inserting_before(node):
            for number in range(size):
                part = known.get(number)
                if part is None:
                    part = call(graph, torch.select, whole, dim, number, like=node)
                elif node < part:
                    node.prepend(part)
                new = _select_of(source, at, number, node)
                function = torch.Tensor.index_copy_ if len(operands) > 1 else operator.setitem
                call(graph, function, part, *operands, new, like=node)
        graph.erase_node(node)
    _erase_unread_views(graph)


def _written(node: fx.Node) -> tuple[Any, Any, Any]:
    """The tensor that a call stores into, at what index, and what; else None, three times."""
    if op_name(node) == "setitem":
        return node.args[0], operand(node, "index"), operand(node, "source")
    if node.users or op_name(node) not in ("index_copy_", "copy_"):
        return None, None, None
    into: Any = node.args[0]
    if op_name(node) == "copy_" and _is_view(into) and op_name(into) == "getitem":
        return into.args[0], into.args[1], operand(node, "source")
    return into, (Ellipsis,), operand(node, "source")


def _dims_of(items: list[Any]) -> list[int | None]:
    """The dimension that each item of an index is for; None is for a new one."""
    taken = itertools.count()
    return [None if item is None else next(taken) for item in items]


def _select_of(source: fx.Node, dim: int, number: int, reader: fx.Node) -> fx.Node:
    """`source.select(dim, number)`, which of a stack is what was stacked."""
    if op_name(source) == "stack":
        tensors: Any = source.args[0]
        rank = len(shape_of(source) or ())
        along: Any = (*source.args[1:], source.kwargs.get("dim", 0))[0]
        still = not any(
            may_overlap(write.operand, node)
            for write in writes_of(source.graph)
            for node in (source, *tensors)
        )
        if along % rank == dim and still:
            return tensors[number]  # type: ignore[no-any-return]
    return call(source.graph, torch.select, source, dim, number, like=reader)
