"""Tensors that a graph makes longer: which `cat` of a past and new rows can be done in its memory.

`cat([past, new])` copies the past at every step. Where the result is returned and otherwise only
read, in ways that do not ask how it lies in memory, the new rows may as well be written behind the
past, in memory that has room there. Analysis only: `in_place` edits, `loki_compile.buffers` has the
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import (
    concrete,
    fake_value,
    hint_of,
    may_overlap,
    op_name,
    operand,
    same_size,
    writes_of,
)
from loki_compile.passes.graphs import input_of
from torch import fx
from torch.fx.node import map_arg

# Rows of room with which reads are tried: no size of a real tensor, most likely.
_ROOM = 1021


@dataclass(frozen=True)
class Append:
    """`root` is `cat([past, source], axis)`, and output number `output`; `past` is an input."""

    past: fx.Node
    root: fx.Node
    source: fx.Node
    axis: int
    output: int

    @property
    def lies_tight(self) -> bool:
        """Whether the graph is for pasts whose strides follow from their length."""
        past = fake_value(self.past)
        length = _symbols(past.shape[self.axis])
        return any(length & _symbols(step) for step in past.stride())


def _symbols(size: Any) -> set[Any]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


def find_appends(graph: fx.Graph) -> tuple[Append, ...]:
    """Every `cat` of the graph whose new rows may be written behind its past, in order."""
    outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
    written = [write.operand for write in writes_of(graph)]
    found = [
        append
        for node in graph.nodes
        if op_name(node) == "cat" and outputs.count(node) == 1
        if (append := _append(graph, node, outputs)) is not None
        if not any(may_overlap(x, y) for x in written for y in (append.past, node))
        if _reads_stand_room(append, outputs)
    ]
    pasts = [append.past for append in found]
    return tuple(append for append in found if pasts.count(append.past) == 1)


def grown_in_place(cache: KeyCache, appends: Sequence[Append]) -> tuple[int, ...]:
    """The numbers of the appends that write a cache, and the one beside it; () where not all of it
    grows in place."""
    numbers = [number for number, append in enumerate(appends) if append.root is cache.root]
    if not numbers or cache.leaves:
        return ()
    if cache.k_pe is None:
        return (numbers[0],)
    beside = grown_in_place(cache.k_pe, appends)
    return (numbers[0], *beside) if beside else ()


def _append(graph: fx.Graph, node: fx.Node, outputs: list[Any]) -> Append | None:
    tensors = operand(node, "tensors")
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return None
    past, source = tensors
    if not isinstance(past, fx.Node) or past.op != "placeholder" or not isinstance(source, fx.Node):
        return None
    x, new, whole = fake_value(past), fake_value(source), fake_value(node)
    if not all(type(v).__name__ == "FakeTensor" for v in (x, new, whole)):
        return None  # of another kind, with memory of its own
    if any(v.dtype != x.dtype or v.device != x.device or v.ndim != x.ndim for v in (new, whole)):
        return None
    if x.requires_grad or new.requires_grad or whole.requires_grad:
        return None
    axis = operand(node, "dim", 0) % whole.ndim
    others = [dim for dim in range(x.ndim) if dim != axis]
    if not all(same_size(x.shape[dim], new.shape[dim]) for dim in others):
        return None
    count = new.shape[axis]
    if concrete(count) is None and input_of(graph, count) is None:
        return None
    if may_overlap(source, past) or any(
        isinstance(other, fx.Node) and other is not node and may_overlap(other, node)
        for other in outputs
    ):
        return None
    return Append(past, node, source, axis, outputs.index(node))


def _reads_stand_room(append: Append, outputs: list[Any]) -> bool:
    """Whether all that reads the longer tensor can read one with room between its rows.

    Views are tried; what another library makes of strides is not known.
    """
    whole = fake_value(append.root)
    sizes = [hint for size in whole.shape if (hint := hint_of(size)) is not None]
    if len(sizes) < whole.ndim:
        return False
    roomy = [size + _ROOM * (dim == append.axis) for dim, size in enumerate(sizes)]
    room = torch.empty(roomy, dtype=whole.dtype, device="meta")
    views = {append.root: room.narrow(append.axis, 0, sizes[append.axis])}
    queue = [append.root]
    for node in queue:
        for user in node.users:
            if user.op == "output" or user in views:
                continue
            if "::" in op_name(user) or "." in op_name(user) or op_name(user) == "as_strided":
                return False
            if not may_overlap(user, append.root):
                continue
            try:
                views[user] = _view(user, views)
                queue.append(user)
            except (RuntimeError, TypeError, ValueError):
                return False
    return True


def _view(node: fx.Node, views: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """What a view is of such a tensor."""

    def value(source: fx.Node) -> Any:
        if source in views:
            return views[source]
        size = hint_of(fake_value(source))
        if not isinstance(size, int):
            raise TypeError(f"{source} is no size that is known")
        return size

    args, kwargs = map_arg((node.args, node.kwargs), value)
    if node.op == "call_method":
        done = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        done = node.target(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(done, torch.Tensor):
        raise TypeError(f"{node} is no tensor")
    return done
