"""Finds keys and queries as they were before the rotary embedding, and which dims it turns.

No spelling of RoPE is matched. Between the projection that makes a key and the key itself, all
paths meet in some nodes (the articulations, or dominators, of that slice of the graph). Rotation
lies between two of them: it is the stretch that takes in a tensor with one entry per token that
no parameter made (cosines and sines, complex phases). A key norm takes in parameters alone; a
partial rotation lies, like a whole one, between the split and the concatenation. The node in front
of the first such stretch is the key before rotation.

Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.calls import concrete, fake_value, hint_of, same_size, shape_of
from loki_compile.passes.graphs import ancestors, nearest_matrix
from torch import fx
from torch.fx.node import map_arg

log = logging.getLogger("loki_compile")


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


def rotated_pairs(
    rotated: fx.Node,
    tokens: int | torch.SymInt,
    head_dim: int,
    is_parameter: Callable[[fx.Node], bool],
    known: dict[str, tuple[tuple[int, int], ...]],
) -> tuple[tuple[int, int], ...]:
    """The pairs of dims that the rotary embedding turns, each by an angle of its own: () where
    nothing rotates them, or what does cannot be told.

    Args:
        rotated: keys whose last dimension is head_dim, or heads and head_dim in one.
        tokens: their number of tokens.
        known: what was found before, by the calls of the rotation: layers are alike. Added to.
    """
    found = _in_front_of_rotation(rotated, tokens, is_parameter)
    start = next((node for node in reversed(found or ()) if shape_of(node) is not None), None)
    if start is None:
        return ()
    stretch = _between(start, rotated, set(ancestors([rotated])))
    alike = _spelled(stretch)
    if alike not in known:
        known[alike] = _pairs_of(stretch, head_dim)
    return known[alike]


def _spelled(stretch: list[fx.Node]) -> str:
    """Equal for stretches of the same calls on operands of the same shapes and dtypes."""
    number = {node: i for i, node in enumerate(stretch)}

    def name(node: fx.Node) -> Any:
        value = fake_value(node)
        like = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
        return (number.get(node, -1), str(like))

    calls = [(str(node.target), map_arg((node.args, node.kwargs), name)) for node in stretch[1:]]
    return str((name(stretch[0]), calls))


def _pairs_of(stretch: list[fx.Node], head_dim: int) -> tuple[tuple[int, int], ...]:
    """Of the last node's dims: those that depend on the same entries of the first one."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng([]):
            depends = _dependence(stretch, head_dim)
    except Exception as error:  # a call that runs on no CPU, or has no derivative: of any kind
        log.debug("what rotates %s cannot be told: %s", stretch[-1].name, error)
        return ()
    together = (depends.float() @ depends.float().mT) > 0
    pairs = []
    for dim in range(head_dim):
        with_it = together[dim].nonzero().flatten().tolist()
        if len(with_it) > 2:
            return ()  # more than a rotation: a norm behind it, a mixture of heads
        if len(with_it) == 2 and with_it[0] == dim:
            pairs.append((with_it[0], with_it[1]))
    return tuple(pairs)


def _dependence(stretch: list[fx.Node], head_dim: int) -> torch.Tensor:
    """Which entries of the first node each dim of the last one depends on: bool (head_dim, N)."""
    torch.manual_seed(0)
    inside = set(stretch)
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in values:
            assert node not in inside
            values[node] = _random_like(fake_value(node))
        return values[node]

    start = _random_like(fake_value(stretch[0])).requires_grad_()
    values[stretch[0]] = start.clone()  # what comes may write into it
    for node in stretch[1:]:
        args, kwargs = map_arg((node.args, node.kwargs), value)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    by_dim = values[stretch[-1]].unflatten(-1, (-1, head_dim)).flatten(0, -2).sum(0)
    rows = [torch.autograd.grad(dim, start, retain_graph=True)[0].flatten() for dim in by_dim]
    return torch.stack(rows) != 0


def _random_like(fake: Any) -> Any:
    """On the CPU; sizes that are symbols are those of the call that was traced."""
    if isinstance(fake, torch.SymInt):
        return hint_of(fake)
    if not isinstance(fake, torch.Tensor):
        return fake
    shape = [hint_of(size) for size in fake.shape]
    if not (fake.dtype.is_floating_point or fake.dtype.is_complex):
        raise TypeError(f"found an operand of dtype {fake.dtype}")
    return torch.rand(shape, dtype=fake.dtype) + 0.5  # type: ignore[arg-type]


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
