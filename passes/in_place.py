"""Edits: new rows are written behind their past, in memory with room there, instead of a `cat`.

For each `Append` the graph takes the longer tensor as an input, whose last rows it writes; the
output is None, for whoever calls the graph has that tensor already.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels.fused import append_rows
from loki_compile.passes.appends import Append
from loki_compile.passes.calls import fake_value, hint_of, symbol_given_by
from loki_compile.passes.graphs import call, fake_mode_of, finish
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree

# Rows of room that graphs are traced with: whatever Inductor asks of them has the answers of a
# large number that nothing divides.
_ROOM = 65521


@dataclass(frozen=True)
class Rooms:
    """The inputs that tensors with room come in by: `of` each longer tensor its own; `capacity` is
    how many rows the memory of each has, a number that every call brings."""

    appends: tuple[Append, ...]
    capacity: fx.Node
    of: dict[fx.Node, fx.Node]

    def like(
        self, whole: fx.Node, axis: int, sizes: Sequence[Any], dtype: torch.dtype, every: int = 1
    ) -> Any:
        """A fake tensor of these sizes, in memory that has a row along `axis` for `every` so many
        rows of room that `whole` has."""
        capacity = fake_value(self.capacity)
        memory = list(sizes)
        memory[axis] = capacity if every == 1 else (capacity + every - 1) // every
        strides = [math.prod(memory[dim + 1 :]) for dim in range(len(memory))]
        with fake_mode_of(whole.graph):
            device = fake_value(whole).device
            return torch.empty_strided(list(sizes), strides, dtype=dtype, device=device)


def new_capacity(graph: fx.Graph, appends: Sequence[Append]) -> torch.SymInt:
    """A number of rows that calls bring, for all forms of a graph.

    Each takes it, whether or not it grows: what one form asks of it, the next takes for granted.
    """
    shape_env = fake_mode_of(graph).shape_env
    lengths = [hint_of(fake_value(append.root).shape[append.axis]) or 0 for append in appends]
    hint = max(lengths) + _ROOM
    source = ConstantSource("loki_capacity")
    symbol = shape_env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    capacity: torch.SymInt = shape_env.create_symintnode(symbol, hint=hint, source=source)
    return capacity


def add_rooms(graph: fx.Graph, appends: Sequence[Append], capacity: torch.SymInt) -> Rooms:
    """Adds the inputs behind those of the graph: the capacity, then the longer tensors in order."""
    node = _placeholder(graph, "loki_capacity")
    node.meta["example_value"] = capacity
    rooms = Rooms(tuple(appends), node, {})
    for number, append in enumerate(appends):
        whole = fake_value(append.root)
        node = _placeholder(graph, f"loki_room_{number}")
        node.meta["example_value"] = rooms.like(append.root, append.axis, whole.shape, whole.dtype)
        node.meta["tensor_dict"] = {}
        rooms.of[append.root] = node
    return rooms


def write_behind(gm: fx.GraphModule, rooms: Rooms) -> fx.GraphModule:
    """The last edit of a graph, which reads and writes the `rooms`.

    Pasts that nothing reads any more are inputs no more: Inductor would ask how they lie in memory,
    and those that are ours lie otherwise than the first of a conversation. A past that alone brings
    a size which the graph computes with stays.
    """
    graph = gm.graph
    result = graph.output_node()
    outputs = list(result.args[0])  # type: ignore[arg-type]
    for append in rooms.appends:
        outputs[append.output] = None
    result.args = (tuple(outputs),)
    for append in rooms.appends:
        room = rooms.of[append.root]
        with graph.inserting_after(append.root):
            call(graph, append_rows, room, append.source, append.axis, like=append.root)
        append.root.replace_all_uses_with(room)
        graph.erase_node(append.root)
    gm = finish(gm)
    sizes = _SizesOfGraph(graph)
    for append in rooms.appends:
        if not append.past.users and not sizes.need(append.past):
            sizes.forget(append.past)
            graph.erase_node(append.past)
    gm.recompile()
    return gm


class _SizesOfGraph:
    """Of each symbol how many nodes of a graph have it, and how many inputs have it as a number or
    a size."""

    def __init__(self, graph: fx.Graph) -> None:
        self.used: Counter[Any] = Counter()
        self.brought: Counter[Any] = Counter()
        for node in graph.nodes:
            if node.op != "output":
                used, brought = _symbols_of(node)
                self.used.update(used)
                self.brought.update(brought)

    def need(self, past: fx.Node) -> bool:
        """Whether the rest of the graph has a symbol that no other input has as a number or a
        size."""
        used, brought = _symbols_of(past)
        return any(self.used[s] > 1 and self.brought[s] == (s in brought) for s in used)

    def forget(self, past: fx.Node) -> None:
        used, brought = _symbols_of(past)
        self.used.subtract(used)
        self.brought.subtract(brought)


def _symbols_of(node: fx.Node) -> tuple[set[Any], set[Any]]:
    """The symbols in a node's sizes; of an input those that it has as a number or a size."""
    sizes = _sizes_of(node)
    used = set().union(*(size.free_symbols for size in sizes))
    return used, {s for s in sizes if s.is_Symbol} if node.op == "placeholder" else set()


def _sizes_of(node: fx.Node) -> list[Any]:
    """The expressions of a tensor's symbolic sizes and strides, or of a symbolic number."""
    value = fake_value(node)
    if isinstance(value, torch.SymInt):
        return [symbol_given_by(value) if node.op == "placeholder" else value.node.expr]
    tensors = [each for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]
    numbers = [number for tensor in tensors for number in (*tensor.shape, *tensor.stride())]
    return [number.node.expr for number in numbers if isinstance(number, torch.SymInt)]


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node._dynamo_source = None  # type: ignore[attr-defined]  # AOTAutograd reads it
    return node
