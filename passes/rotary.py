"""Finds keys and queries as they were before the rotary embedding, for pre-rotary calibration.

No spelling of RoPE is matched. Between the projection that makes a key and the key itself, all
paths meet in some nodes (the articulations, or dominators, of that slice of the graph). Rotation
lies between two of them: it is the stretch that takes in a tensor with one entry per token that
no parameter made (cosines and sines, complex phases). A key norm takes in parameters alone; a
partial rotation lies, like a whole one, between the split and the concatenation. The node in front
of the first such stretch is the key before rotation.

Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from loki_compile.passes.calls import concrete, fake_value, same_size, shape_of
from loki_compile.passes.graphs import ancestors, nearest_matrix
from torch import fx


@dataclass(frozen=True)
class Unrotated:
    """`node`, brought to the layout of the rotated tensor, is that tensor before rotation.

    First, where `heads` is not 0, its last dimension is split into (heads, head_dim); then its
    dimensions are permuted by `order`.
    """

    node: fx.Node
    heads: int
    order: tuple[int, ...]

    def restore(self, value: torch.Tensor) -> torch.Tensor:
        """The value of `node`, in the rotated tensor's layout."""
        if self.heads:
            value = value.unflatten(-1, (self.heads, -1))
        return value.permute(self.order)


def before_rotation(
    rotated: fx.Node, token_axis: int, is_parameter: Callable[[fx.Node], bool]
) -> Unrotated | None:
    """The tensor that was rotated to give `rotated`, or None where nothing rotates it.

    Args:
        rotated: keys or queries, 4-D, or 3-D for a single head; head_dim is last.
        token_axis: the dimension of tokens in `rotated`.
        is_parameter: whether a placeholder is a parameter of the model.

    Raises:
        ValueError: it is rotated, and the layout before rotation cannot be told.
    """
    shape = shape_of(rotated)
    assert shape is not None
    found = _in_front_of_rotation(rotated, shape[token_axis], is_parameter)
    if found is None:
        return None
    for node in reversed(found):
        layout = _layout(node, shape)
        if layout is not None:
            return Unrotated(node, *layout)
    raise ValueError(
        f"the keys or queries before rotation ({found[-1].name}, shape "
        f"{tuple(shape_of(found[-1]) or ())}) do not line up with those after it "
        f"({tuple(shape)}); needed a layout of (batch, heads, tokens, head_dim) that can be told "
        "by its sizes: use another batch length, or post-rotary calibration"
    )


def _in_front_of_rotation(
    rotated: fx.Node, tokens: int | torch.SymInt, is_parameter: Callable[[fx.Node], bool]
) -> list[fx.Node] | None:
    """The articulations from the projection to the last one in front of the first rotation."""
    matrix = nearest_matrix([rotated], is_parameter)
    if matrix is None:
        return None
    behind = list(ancestors([rotated]))
    projection = next(node for node in behind if matrix in node.all_input_nodes)
    stretch = _between(projection, rotated, set(behind))
    inside = set(stretch)
    passed: list[fx.Node] = []
    cuts = _articulations(stretch)
    for node in stretch:
        rotates = node is not projection and any(
            _is_per_token(source, tokens, is_parameter)
            for source in node.all_input_nodes
            if source not in inside
        )
        if rotates:
            return passed
        if node in cuts:
            passed.append(node)
    return None


def _between(start: fx.Node, end: fx.Node, ancestors_of_end: set[fx.Node]) -> list[fx.Node]:
    """The nodes on any path from `start` to `end`, in graph order, both included."""
    reached = {start}
    node = start
    while node is not end:
        node = node.next
        if node in ancestors_of_end and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return [node for node in start.graph.nodes if node in reached]


def _articulations(stretch: list[fx.Node]) -> set[fx.Node]:
    """The nodes that every path from the first to the last one runs through."""
    place = {node: i for i, node in enumerate(stretch)}
    cuts, farthest = set(), 0
    for i, node in enumerate(stretch):
        if farthest <= i:
            cuts.add(node)
        farthest = max([farthest, *(place[user] for user in node.users if user in place)])
    return cuts


def _is_per_token(
    node: fx.Node, tokens: int | torch.SymInt, is_parameter: Callable[[fx.Node], bool]
) -> bool:
    """Whether the node is a tensor with one entry per token that no parameter took part in."""
    shape = shape_of(node)
    if shape is None or not any(same_size(size, tokens) for size in shape):
        return False
    sources = ancestors([node])
    return not any(source.op == "placeholder" and is_parameter(source) for source in sources)


def _layout(node: fx.Node, rotated: torch.Size) -> tuple[int, tuple[int, ...]] | None:
    """How to bring `node` to the layout of `rotated`, by sizes: (heads to split off, order)."""
    shape = shape_of(node)
    if shape is None or fake_value(node).dtype.is_complex:
        return None
    sizes, heads = list(shape), 0
    rank = len(rotated)
    if len(sizes) == rank - 1 == 3:
        folded, head_dim = concrete(sizes[-1]), concrete(rotated[-1])
        if folded is None or head_dim is None or folded % head_dim:
            return None
        heads = folded // head_dim
        sizes[-1:] = [heads, head_dim]
    if len(sizes) != rank:
        return None
    identity = tuple(range(rank))
    orders = [identity, (0, 2, 1, *identity[3:])] if rank == 4 else [identity]
    fitting = [
        order
        for order in orders
        if all(same_size(sizes[d], rotated[i]) for i, d in enumerate(order))
    ]
    # As many tokens as heads: either layout would fit, and one of them is wrong.
    return (heads, fitting[0]) if len(fitting) == 1 else None
