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

import dataclasses
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
from loki_compile.passes.views import (
    TURNS,
    Step,
    View,
    identity,
    items_of,
    operand_of_view,
    permutation,
    through,
)
from loki_compile.passes.write_forms import indexed_dims
from torch import Tensor, fx
from torch.utils._pytree import tree_map

# Dimensions of one layer's keys: (B, Hkv, T, D) in any order. Inputs that have more are cut down.
KEY_DIMS = 4
_FOLLOWED = (*TURNS, "select", "getitem")
_WRITES = ("setitem", "index_copy_", "copy_")


@dataclass(frozen=True)
class Part:
    """What the numbers (dimension, index) select, one after the other, of the input at `base`."""

    base: int
    numbers: tuple[tuple[int, int], ...]

    def of(self, args: Sequence[Any]) -> Tensor:
        """The part, a view, given the graph's own inputs."""
        part: Tensor = args[self.base]
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
    for node in list(graph.nodes):
        _take_numbers_first(node)
    parts: list[Part] = []
    inputs = graph.find_nodes(op="placeholder")
    for place, base in enumerate(inputs):
        if len(shape_of(base) or ()) <= KEY_DIMS or _overlaps_itself(fake_value(base)):
            continue
        if any(other is not base and may_overlap(other, base) for other in inputs):
            continue  # another input is a view of it: AOTAutograd has to see both
        parts += _Cut(place, base).parts()
    graph.lint()
    gm.recompile()
    return parts


def _take_numbers_first(node: fx.Node) -> None:
    """Makes `x[0][:, at] = k` of `x[0, :, at] = k`, for x of several layers.

    PyTorch takes the numbers of an index before it looks at the rest of it.
    """
    if op_name(node) not in ("getitem", "setitem"):
        return
    index: Any = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    plain = itertools.takewhile(lambda item: item is not None and item is not Ellipsis, items)
    numbers = [dim for dim, item in enumerate(plain) if type(item) is int]
    numbers = numbers[: max(0, len(shape_of(node.args[0]) or ()) - KEY_DIMS)]
    left = tuple(item for dim, item in enumerate(items) if dim not in numbers)
    if not numbers or (not left and op_name(node) == "getitem"):
        return
    first = tuple(items[dim] if dim in numbers else slice(None) for dim in range(numbers[-1] + 1))
    with node.graph.inserting_before(node):
        part = call(node.graph, operator.getitem, node.args[0], first, like=node)
    node.args = (part, left or (Ellipsis,), *node.args[2:])


class _Cut:
    """An input as parts, each of one number of those of its dimensions that are `counted`.

    `views` has, in order, the views of the input down to such as are no larger than one layer's
    keys, and each write into a larger one, as the view that it writes into. `counted` are the
    dimensions of which all small views take a number; there are none where these are too few.
    """

    def __init__(self, place: int, base: fx.Node) -> None:
        self.place, self.base, self.views = place, base, {base: identity(base)}
        for node in base.graph.nodes:
            source = _looked_into(node)
            if source not in self.views or self._is_small(source):
                continue
            view = self.views[source]
            if op_name(node) in _WRITES:
                self.views[node] = view
            elif op_name(node) in _FOLLOWED and (after := through(node, view)) and all(after.dims):
                self.views[node] = after
        taken = [
            {axis for axis, start in enumerate(view.starts) if start is not None} - {*_axes(view)}
            for node, view in self.views.items()
            if self._is_small(node)
        ]
        counted = sorted(set.intersection(*taken)) if taken else []
        needed = len(shape_of(base) or ()) - KEY_DIMS
        self.counted = counted[:needed] if len(counted) >= needed else []
        self.made: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        self.found: list[Part] = []

    def parts(self) -> list[Part]:
        """The parts, which the graph reads and writes now instead of the input; none, and nothing
        has changed, where it uses the input by anything else."""
        gone = [node for node in self.views if node is not self.base]
        if not self.counted or not all(map(self._falls_apart, self.views)):
            return []
        for node in gone:
            every = itertools.product(*(_numbers(self.views[node], axis) for axis in self.counted))
            if op_name(node) in _WRITES:
                for numbers in every:
                    self._write(node, numbers)
            elif self._is_small(node):
                part = self._part(node, next(every))
                _move_views(node, part)
                node.replace_all_uses_with(part)
        unbound = [user for node in self.views for user in node.users if op_name(user) == "unbind"]
        for node in sorted([*gone, *unbound], reverse=True):
            node.graph.erase_node(node)
        return self.found

    def _is_small(self, node: fx.Node) -> bool:
        return len(self.views[node].dims) <= KEY_DIMS

    def _falls_apart(self, node: fx.Node) -> bool:
        """Whether all that a view is used for, or stored into it, can be done part by part."""
        if op_name(node) in _WRITES and self._write_of_one(node) is None:
            return False
        users = [user for user in node.users if op_name(user) != "unbind"]
        users += [item for user in node.users if user not in users for item in user.users]
        return self._is_small(node) or (
            all(user in self.views and _looked_into(user) is node for user in users)
            and all(_numbers(self.views[node], axis) for axis in self.counted)
        )

    def _kept(self, node: fx.Node) -> list[int]:
        """The dimensions of a view that its parts have."""
        axes = enumerate(_axes(self.views[node]))
        return [dim for dim, axis in axes if axis not in self.counted]

    def _part(self, node: fx.Node, numbers: tuple[int, ...]) -> fx.Node:
        """What a view of the input is of the part with these numbers."""
        if (node, numbers) not in self.made:
            self.made[node, numbers] = self._new_part(node, numbers)
        return self.made[node, numbers]

    def _new_part(self, node: fx.Node, numbers: tuple[int, ...]) -> fx.Node:
        if node is self.base:
            selects = [(axis - gone, numbers[gone]) for gone, axis in enumerate(self.counted)]
            self.found.append(Part(self.place, tuple(selects)))
            return _add_input(node, self.found[-1])
        source = _looked_into(node)
        part, kept = self._part(source, numbers), self._kept(source)
        with node.graph.inserting_before(node):
            if op_name(node) in TURNS:
                order = tuple(kept.index(dim) for dim in permutation(node) if dim in kept)
                if order != tuple(range(len(order))):
                    return call(node.graph, torch.permute, part, order, like=node)
            elif op_name(node) not in _WRITES:
                left = tuple(_items(node)[dim] for dim in kept)
                if any(item != slice(None) for item in left):
                    return call(node.graph, operator.getitem, part, left, like=node)
        return part

    def _write_of_one(self, write: fx.Node) -> tuple[tuple[Any, ...], dict[int, int]] | None:
        """The index at which a part is written into where several are, and the dimensions of what
        is stored that count parts, with those of the input; None where it is not stored so."""
        items, source = _items(write), operand(write, "source")
        shape, sizes = shape_of(write.args[0]) or (), shape_of(source)
        kept, axes, dims = self._kept(write), _axes(self.views[write]), itertools.count()
        left = tuple(item for item in items if item is None or next(dims) in kept)
        region = indexed_dims(tuple(items), shape)
        rest = indexed_dims(left, [shape[dim] for dim in kept])
        if sizes is None or region is None or rest is None:
            return None
        without = [dim for dim in region if dim is None or dim in kept]
        if [None if dim is None else kept[dim] for dim in rest] != without:
            return None  # indices that the dimensions of parts keep apart would come together
        along = {
            at - len(region) + len(sizes): axes[dim]
            for at, dim in enumerate(region)
            if dim is not None and dim not in kept
        }
        each = len(along) == len(axes) - len(kept) and all(
            at >= 0 and concrete(sizes[at]) == len(_numbers(self.views[write], axis))
            for at, axis in along.items()
        )
        if not each or may_overlap(source, _looked_into(write)):
            return None
        return left or (Ellipsis,), along

    def _write(self, write: fx.Node, numbers: tuple[int, ...]) -> None:
        """Stores what a write stores into the part with these numbers."""
        index, along = self._write_of_one(write) or ((), {})
        part, new = self._part(write, numbers), operand(write, "source")
        with write.graph.inserting_before(write):
            for dim, axis in sorted(along.items(), reverse=True):
                number = numbers[self.counted.index(axis)]
                at = _numbers(self.views[write], axis).index(number)
                new = _select_of(new, dim, at, write)
            call(write.graph, operator.setitem, part, index, new, like=write)


def _looked_into(node: fx.Node) -> Any:
    """The tensor that a call writes into or is a view of."""
    return node.args[0] if op_name(node) in _WRITES else operand_of_view(node)


def _items(node: fx.Node) -> list[Any]:
    """The index at which a call looks into a tensor, as `items_of` has it."""
    source, name = _looked_into(node), op_name(node)
    items: list[Any] = [slice(None)] * len(shape_of(source) or ())
    if name in ("getitem", "setitem") and node.args[0] is source:
        return items_of(node.args[1], len(items))
    if name == "getitem":
        unbind: Any = node.args[0]
        items[(*unbind.args[1:], unbind.kwargs.get("dim", 0))[0]] = node.args[1]
    elif name in ("select", "index_copy_"):
        items[operand(node, "dim")] = operand(node, "index")
    return items


def _axes(view: View) -> list[Any]:
    """The dimension of the input that each of a view is."""
    return [view.axis(dim) for dim in range(len(view.dims))]


def _numbers(view: View, axis: int) -> range:
    """The entries of a dimension of the input that a view takes; none where they are not known."""
    start, axes = view.starts[axis], _axes(view)
    step = view.dims[axes.index(axis)][0] if axis in axes else Step(axis, 1)
    size = concrete(step.size)
    if start is None or size is None:
        return range(0)
    return range(start, start + size * step.step, step.step)


def _add_input(base: fx.Node, part: Part) -> fx.Node:
    """An input of the part's sizes and strides, whose memory nothing else has."""
    graph = base.graph
    name = "_".join([base.name, *(str(number) for _, number in part.numbers)])
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        new = graph.placeholder(name)
    with fake_mode_of(graph):
        like = dataclasses.replace(part, base=0).of([fake_value(base)])
        new.meta["example_value"] = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=like.device
        )
    # AOTAutograd reads both of every input; whether the address stays is as it is for the base.
    new._dynamo_source = None  # type: ignore[attr-defined]
    new.meta["tensor_dict"] = dict(base.meta.get("tensor_dict", {}))
    return new


def _move_views(old: fx.Node, part: fx.Node) -> None:
    """Gives every view of `old`, in whatever way it was made, the memory of `part`."""
    memory = fake_value(part).untyped_storage()
    start = fake_value(old).storage_offset() - fake_value(part).storage_offset()

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
