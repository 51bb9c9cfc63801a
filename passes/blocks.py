"""A graph as a row of pieces, of which many are equal: decoders repeat a block.

The pieces lie between *necks*: places that one tensor crosses, as the residual stream does between
attention and what follows it. What all blocks read (rotations, masks) is computed in the first
piece and crosses every neck. Equal are pieces that make the same calls, with the same constants, of
inputs of the same kind: what is made of one serves the others with their own weights and caches.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.calls import (
    fake_value,
    hint_of,
    memory_of,
    op_name,
    symbol_given_by,
    written_operands,
)
from loki_compile.passes.graphs import ancestors
from torch import fx

# As many equal pieces as are worth a call each, and the share of a graph's calls that may be left
# to compile: below them a graph is one piece.
_LEAST_EQUAL, _MOST_LEFT = 4, 0.6

# Calls of a piece that is hardly worth one of its own.
_SMALL = 16

# A value that is read over more than this share of a graph is no block's own.
_OF_ALL = 1 / 4

# Calls that change what later ones do, wherever these lie.
_MODES = ("_enter_", "_exit_", "_set_grad", "_functorch", "_vmap", "_saved_tensors", "_seed")


@dataclass(frozen=True)
class Piece:
    """Consecutive calls of a graph.

    Attributes:
      calls: the nodes, in order.
      inputs: the nodes from outside that it takes: what the calls read, then the symbols that
        shapes are made of.
      outputs: the calls of it that are read outside.
      symbols: those of the inputs' sizes, in an order that equal pieces share.
      kind: equal for pieces of which one compiled form serves all, as far as what is known of one's
        symbols holds for those of the others.
    """

    calls: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    symbols: tuple[Any, ...]
    kind: Hashable

    def graph_module(self, root: fx.GraphModule) -> fx.GraphModule:
        """The piece alone: a graph of `inputs` that returns `outputs` as a tuple."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate(self.inputs):
            mapping[node] = graph.placeholder(f"input_{number}")  # names are part of caches' keys
            mapping[node].meta["example_value"] = fake_value(node)
        for node in self.calls:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
        graph.output(tuple(mapping[node] for node in self.outputs))
        return fx.GraphModule(root, graph)


def find_blocks(graph: fx.Graph) -> tuple[Piece, ...] | None:
    """The graph's calls as pieces, to be run in this order; None where too few of them are equal.

    A call that all blocks read comes earlier than in the graph, if nothing that it depends on is
    ever written.
    """
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    rest = [n for n in graph.nodes if n.op not in ("call_function", "call_method")]
    if any(node.op not in ("placeholder", "output") for node in rest) or any(map(_is_mode, calls)):
        return None
    symbols = _symbols_of(graph)
    shared, calls = _shared_first(calls)
    cuts = [0, *_necks(calls, shared), len(calls)]
    spans = [tuple(calls[a:b]) for a, b in itertools.pairwise(cuts) if b > a]
    pieces: list[Piece] = []
    while True:
        found = [_piece(span, symbols) for span in spans]
        if any(piece is None for piece in found):
            return None
        pieces = [piece for piece in found if piece is not None]
        joined = _joined(pieces)
        if len(joined) == len(spans):
            break
        spans = joined
    kinds = Counter(piece.kind for piece in pieces)
    to_compile = {piece.kind: len(piece.calls) for piece in pieces}
    if max(kinds.values(), default=0) < _LEAST_EQUAL:
        return None
    return tuple(pieces) if sum(to_compile.values()) <= _MOST_LEFT * len(calls) else None


def _is_mode(node: fx.Node) -> bool:
    """Whether a call may change what others do, or calls a graph of its own."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return op_name(node).rpartition(".")[2].startswith(_MODES)


def _symbols_of(graph: fx.Graph) -> dict[Any, fx.Node]:
    """The input that brings each symbol."""
    found: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and symbol_given_by(value).is_Symbol:
            found.setdefault(symbol_given_by(value), node)
    return found


def _shared_first(calls: list[fx.Node]) -> tuple[set[fx.Node], list[fx.Node]]:
    """The calls that are no block's own, and all calls with these, where possible, in front."""
    place = {node: number for number, node in enumerate(calls)}
    reach = _last_reads(calls, place)
    shared = {node for node in calls if reach[node] - place[node] > _OF_ALL * len(calls)}
    written = {
        memory_of(value)
        for node in calls
        for operand in written_operands(node)
        if isinstance(value := fake_value(operand), torch.Tensor)
    }

    def stays(node: fx.Node) -> bool:
        value = fake_value(node)
        if isinstance(value, torch.Tensor):
            return memory_of(value) in written
        return not isinstance(value, (torch.SymInt, int))

    first: set[fx.Node] = set()
    for node in calls:
        if node in shared:
            needed = list(ancestors([node]))
            if not any(map(stays, needed)):
                first.update(n for n in needed if n in place)
    return shared, [n for n in calls if n in first] + [n for n in calls if n not in first]


def _last_reads(calls: Sequence[fx.Node], place: dict[fx.Node, int]) -> dict[fx.Node, int]:
    return {n: max((place.get(user, 0) for user in n.users), default=0) for n in calls}


def _necks(calls: Sequence[fx.Node], shared: set[fx.Node]) -> Iterator[int]:
    """The places in the row of calls that at most one tensor crosses which is not shared."""
    place = {node: number for number, node in enumerate(calls)}
    crossing = [0] * (len(calls) + 1)
    for node, last in _last_reads(calls, place).items():
        value = fake_value(node)
        if isinstance(value, torch.SymInt):
            continue
        weight = 2  # neither a tensor nor a size: nothing that is passed from piece to piece
        if isinstance(value, torch.Tensor):
            weight = 0 if node in shared else 1
        for at in range(place[node] + 1, last + 1):
            crossing[at] += weight
    yield from (at for at in range(1, len(calls)) if crossing[at] <= 1)


def _joined(pieces: Sequence[Piece]) -> list[tuple[fx.Node, ...]]:
    """The pieces' calls, as one where that saves a call per block and compiles nothing twice:
    pieces that only ever follow one another, and small ones that are rare."""
    count = Counter(piece.kind for piece in pieces)
    pairs = Counter((a.kind, b.kind) for a, b in itertools.pairwise(pieces))
    spans: list[tuple[fx.Node, ...]] = []
    number = 0
    while number < len(pieces):
        a, b = pieces[number], pieces[number + 1] if number + 1 < len(pieces) else None
        if b and (
            (a.kind != b.kind and count[a.kind] == count[b.kind] == pairs[a.kind, b.kind])
            or (
                max(count[a.kind], count[b.kind]) < _LEAST_EQUAL
                and min(len(a.calls), len(b.calls)) < _SMALL
            )
        ):
            spans.append(a.calls + b.calls)
            number += 2
        else:
            spans.append(a.calls)
            number += 1
    return spans


def _piece(calls: tuple[fx.Node, ...], symbols: dict[Any, fx.Node]) -> Piece | None:
    """None where a size that its inputs have is brought by none of the graph's inputs."""
    own = {node: number for number, node in enumerate(calls)}
    inputs = list(dict.fromkeys(s for n in calls for s in n.all_input_nodes if s not in own))
    values = map(fake_value, (*inputs, *calls))
    free = list(dict.fromkeys(s for value in values for s in _free_symbols(value)))
    if not all(symbol in symbols for symbol in free):
        return None
    inputs = list(dict.fromkeys([*inputs, *(symbols[symbol] for symbol in free)]))
    outputs = tuple(node for node in calls if any(user not in own for user in node.users))
    if not all(isinstance(fake_value(node), (torch.Tensor, torch.SymInt)) for node in outputs):
        return None
    outside = {node: f"input {number}" for number, node in enumerate(inputs)}
    memories: dict[int, int] = {}
    named = {symbol: f"size_{number}" for number, symbol in enumerate(free)}
    kind = (
        tuple((node.op, node.target, _operands(node, own, outside)) for node in calls),
        tuple(own[node] for node in outputs),
        tuple(_kind_of_input(fake_value(node), memories, named) for node in inputs),
    )
    return Piece(calls, tuple(inputs), outputs, tuple(free), kind)


def _operands(node: fx.Node, own: dict[fx.Node, int], outside: dict[fx.Node, str]) -> Hashable:
    """What a call is given, in words that say of each node which one it is in its piece."""

    def worded(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return own.get(value, outside.get(value)), "node"
        if isinstance(value, (tuple, list)):
            return type(value).__name__, tuple(map(worded, value))
        if isinstance(value, dict):
            return "dict", tuple((name, worded(item)) for name, item in value.items())
        if isinstance(value, slice):
            return "slice", worded((value.start, value.stop, value.step))
        return type(value), repr(value)

    return worded(node.args), worded(dict(node.kwargs))


def _kind_of_input(value: Any, memories: dict[int, int], named: dict[Any, str]) -> Hashable:
    """What a compiled piece relies on in an input, and which of its inputs share a memory."""
    if not isinstance(value, torch.Tensor):
        return type(value), _size_in_words(value, named)
    memory = memories.setdefault(memory_of(value), len(memories))
    return (
        (type(value), value.dtype, value.device, value.requires_grad, value.is_inference()),
        value.ndim,
        tuple(_size_in_words(size, named) for size in _sizes_of(value)),
        memory,
    )


def _size_in_words(size: Any, named: dict[Any, str]) -> Hashable:
    """A size in its piece's symbols, and what is known of it: its value now, and its range.

    Private API, checked on torch 2.11 and 2.13: `ShapeEnv.bound_sympy`.
    """
    if not isinstance(size, torch.SymInt):
        return type(size), repr(size)
    node = size.node
    words = str(node.expr.xreplace({s: type(s)(name) for s, name in named.items()}))
    return words, hint_of(size), str(node.shape_env.bound_sympy(node.expr))


def _sizes_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, *tensor.stride(), tensor.storage_offset())


def _free_symbols(value: Any) -> list[Any]:
    """The symbols in a fake tensor's layout, or in a size, as they are met."""
    sizes = _sizes_of(value) if isinstance(value, torch.Tensor) else (value,)
    found = [size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)]
    return [symbol for symbols in found for symbol in sorted(symbols, key=str)]
