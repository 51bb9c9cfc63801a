"""What must be saved so that a graph which failed half-way can be run again with the same result.

A step that writes its cache in place may raise behind some of its writes. Running it again gives
what one whole run gives, if what it reads is what it was. New keys that are stored into slots of a
cache (`index_copy_`, slice assignment, ...) need no saving where nothing reads that cache earlier
in the graph: the second run stores the same keys into the same slots before it reads any. Whatever
else the graph writes (a counter of filled slots, a window that moves its rows) must be put back.

Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    may_overlap,
    mutates,
    writes_of,
)
from loki_compile.passes.write_forms import only_stores
from torch import fx
from torch.fx.node import map_arg

# Tensors of at most so many numbers are saved before every run: counters, not caches.
FEW_NUMBERS = 64


@dataclass(frozen=True)
class Undo:
    """Positions, among a graph's placeholders, of what it writes and a second run would notice.

    `small` are tensors of a few numbers; saving the `large` takes time and memory. `alone` says
    that no other process takes part: one would be sent by a second run what it does not expect.
    """

    small: tuple[int, ...]
    large: tuple[int, ...]
    alone: bool = True


def what_to_save(graph: fx.Graph) -> Undo:
    """The inputs that must be put back before the graph is run again."""
    writes = writes_of(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    small: list[int] = []
    large: list[int] = []
    for place, past in enumerate(graph.find_nodes(op="placeholder")):
        into = [write for write in writes if may_overlap(write.operand, past)]
        if not into or _stored_before_read(past, into, order):
            continue
        sizes = [concrete(size) for size in fake_value(past).shape]
        few = None not in sizes and math.prod(sizes) <= FEW_NUMBERS  # type: ignore[arg-type]
        (small if few else large).append(place)
    return Undo(tuple(small), tuple(large), not any(map(_is_collective, graph.nodes)))


def _is_collective(node: fx.Node) -> bool:
    """Whether other processes may take part in a call: one of torch.distributed, or on a tensor of
    its kinds (DTensor)."""
    kinds = (type(fake_value(node)), node.target if callable(node.target) else None)
    homes = [getattr(kind, "__module__", None) or "" for kind in kinds]
    return "c10d" in str(node.target) or any(h.startswith("torch.distributed") for h in homes)


def _stored_before_read(past: fx.Node, writes: list[Write], order: dict[fx.Node, int]) -> bool:
    """Whether all that is written into `past` is stored there before anything reads it."""
    if not all(only_stores(write.call) for write in writes):
        return False
    last = writes[-1].position
    return not any(_reads(node, past) for node, position in order.items() if position <= last)


def _reads(node: fx.Node, past: fx.Node) -> bool:
    """Whether a call may read the memory of `past`: what is a view of it does not."""
    read: list[fx.Node] = []
    target = node.args[:1] if mutates(node) else ()
    map_arg((node.args[len(target) :], node.kwargs), read.append)
    if not mutates(node):  # a result that lies in an operand's memory is a view of it
        read = [source for source in read if not may_overlap(node, source)]
    return any(may_overlap(source, past) for source in read)
