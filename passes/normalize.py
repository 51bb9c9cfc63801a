"""One spelling per operation, so that the passes behind match one structure.

Dynamo keeps what the model wrote: `x.transpose(1, 2)` and `torch.transpose(x, 1, 2)`, `x @ y` and
`torch.matmul(x, y)`, `torch.concat` and `torch.cat`, `x[:, 0:]` and `x`. Here each becomes a call
of the method or function that PyTorch documents as the main one, a slice that leaves nothing out
becomes the tensor, new dimensions follow slices, of equal views one is left, an `einsum` of two
factors that is a matrix product becomes a `matmul`, and `exp(x - max) / sum` a `softmax`. Meaning
stays, and results bit for bit but for the order of einsum's sums and the rounding of that softmax.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from loki_compile.passes.calls import (
    ALIASES,
    SIGNATURES,
    einsum_terms,
    fake_value,
    may_overlap,
    op_name,
    same_size,
    shape_of,
    writes_of,
)
from loki_compile.passes.graphs import call, copy_of
from torch import fx

# Method or function name -> the function to call. Only names whose operands agree in order and
# keyword with the target's are here.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    "transpose": torch.transpose,
    "swapaxes": torch.transpose,
    "swapdims": torch.transpose,
    "movedim": torch.movedim,
    "moveaxis": torch.movedim,
    "permute": torch.permute,
    "unsqueeze": torch.unsqueeze,
    "squeeze": torch.squeeze,
    "select": torch.select,
    "narrow": torch.narrow,
    "concat": torch.cat,
    "concatenate": torch.cat,
    "repeat_interleave": torch.repeat_interleave,
    "index_copy": torch.index_copy,
    "index_put": torch.index_put,
    "matmul": torch.matmul,
    "__matmul__": torch.matmul,
    "bmm": torch.bmm,
    "softmax": torch.softmax,
}

_VARIADIC = ("permute",)

# Operations of more than one operand that passes look for by place.
_TENSORS = {
    **dict.fromkeys(("matmul", "bmm", "add", "sub", "mul", "div"), 2),
    **dict.fromkeys(("masked_fill", "where", "baddbmm"), 3),
}

_NUMPY_NAMES = {"axis": "dim", "axis0": "dim0", "axis1": "dim1"}


def _name_operands(node: fx.Node) -> None:
    """Gives operands PyTorch's own names (NumPy's are taken too), and tensors their places."""
    names = SIGNATURES.get(op_name(node), ())
    kwargs = {_NUMPY_NAMES.get(key, key): value for key, value in node.kwargs.items()}
    if not names or not set(kwargs) <= {*names, *node.kwargs}:
        return
    tensors = _TENSORS.get(op_name(node), 1)
    while len(node.args) < tensors and names[len(node.args)] in kwargs:
        node.args = (*node.args, kwargs.pop(names[len(node.args)]))
    node.kwargs = kwargs


def _matmul_of_einsum(node: fx.Node) -> fx.Node:
    """Makes permutations and a `matmul` of an einsum such as "bqhd,bkhd->bhqk"; returns the result.

    That is one letter for rows, one for columns and one for what is summed; all others are in both
    factors and in the result. Another einsum stays and is returned.
    """
    found = einsum_terms(node)
    if found is None:
        return node
    (*letters, out), factors = found
    only = [[c for c in out if c in letters[i] and c not in letters[1 - i]] for i in (0, 1)]
    if len(only[0]) != 1 or len(only[1]) != 1:
        return node
    if out.index(only[0][0]) > out.index(only[1][0]):  # rows first, as in the result
        factors, letters, only = factors[::-1], letters[::-1], only[::-1]
    (row,), (column,) = only
    batch = [c for c in out if c not in (row, column)]
    summed = [c for c in letters[0] if c not in out]
    wanted = [*batch, row, *summed], [*batch, *summed, column]
    if len(summed) != 1 or any(
        sorted(t) != sorted(w) for t, w in zip(letters, wanted, strict=True)
    ):
        return node
    sizes = [
        dict(zip(t, shape_of(factor) or (), strict=True))
        for t, factor in zip(letters, factors, strict=True)
    ]
    if not all(same_size(sizes[0][c], sizes[1][c]) for c in (*batch, *summed)):
        return node

    def ordered(source: fx.Node, have: list[str] | str, want: list[str] | str) -> fx.Node:
        order = tuple(have.index(c) for c in want)
        straight = order == tuple(range(len(order)))
        return source if straight else call(node.graph, torch.permute, source, order, like=node)

    with node.graph.inserting_before(node):
        pair = [ordered(*parts) for parts in zip(factors, letters, wanted, strict=True)]
        product = call(node.graph, torch.matmul, *pair, like=node)
        result = ordered(product, [*batch, row, column], out)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return result


def _softmax_by_hand(div: fx.Node) -> fx.Node | None:
    """The difference x - max of e / e.sum(-1, keepdim=True), e being exp(x - max); else None.

    That is the softmax of x as the difference reads it, over the last dimension.
    """
    if not _is_call(div, ("div", "truediv", "__truediv__"), 2):
        return None
    exp, total = div.args
    if not _is_call(exp, ("exp",), 1) or not _reduces_last(total, ("sum",), exp):
        return None
    shifted = exp.args[0]
    if not _is_call(shifted, ("sub", "__sub__"), 2):
        return None
    scores, most = shifted.args
    while _is_call(most, ("detach",), 1):
        (most,) = most.args
    if _is_call(most, ("getitem",), 2) and most.args[1] == 0:
        most = most.args[0]
    if not _reduces_last(most, ("amax", "max"), scores):
        return None
    behind = [node for node in (scores, shifted, exp, total) if isinstance(node, fx.Node)]
    if len({fake_value(node).dtype for node in behind}) > 1:
        return None
    order = {node: i for i, node in enumerate(div.graph.nodes)}
    for write in writes_of(div.graph):
        between = order[most] < write.position < order[div]
        if between and any(may_overlap(write.operand, node) for node in behind):
            return None
    return shifted


def _is_call(node: Any, names: tuple[str, ...], operands: int) -> TypeGuard[fx.Node]:
    """Whether it is a call of one of these, with so many operands by place and none by name."""
    if not isinstance(node, fx.Node) or op_name(node) not in names:
        return False
    return len(node.args) == operands and not node.kwargs


def _reduces_last(node: Any, names: tuple[str, ...], source: Any) -> TypeGuard[fx.Node]:
    """Whether it reduces the last dimension of `source`, and no other, to one, by one of these."""
    if not isinstance(node, fx.Node) or op_name(node) not in names or node.args[:1] != (source,):
        return False
    operands = dict(zip(("dim", "keepdim"), node.args[1:], strict=False))
    operands |= {
        {"axis": "dim", "keepdims": "keepdim"}.get(k, k): v for k, v in node.kwargs.items()
    }
    rank, dim = len(shape_of(source) or ()), operands.get("dim")
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    only = set(operands) == {"dim", "keepdim"} and operands["keepdim"] is True
    return only and dim in (-1, rank - 1)


def _name_softmax(div: fx.Node) -> fx.Node:
    """Puts a softmax in the place of one by hand, where the scores are read; else `div` stays."""
    shifted = _softmax_by_hand(div)
    if shifted is None:
        return div
    with div.graph.inserting_before(shifted):
        weights = call(div.graph, torch.softmax, shifted.args[0], -1, like=div)
    div.replace_all_uses_with(weights)
    div.graph.erase_node(div)
    return weights


def _takes_all(node: fx.Node) -> bool:
    """Whether the node is a tensor indexed by slices that leave nothing out: `x[:, 0:]`."""
    if op_name(node) != "getitem" or shape_of(node.args[0]) is None:
        return False
    index = node.args[1]
    return all(
        item is Ellipsis
        or (
            isinstance(item, slice)
            and item.start in (None, 0)
            and item.stop is None
            and item.step in (None, 1)
        )
        for item in (index if isinstance(index, tuple) else (index,))
    )


def _new_dims_apart(node: fx.Node) -> fx.Node:
    """Makes `x[a:b][:, None]` of `x[a:b, None]`; returns the last call."""
    index = node.args[1] if op_name(node) == "getitem" and shape_of(node.args[0]) else None
    items = list(index) if isinstance(index, tuple) else []
    whole = [i for i in items if i is not None and i is not Ellipsis and i != slice(None)]
    if not whole or not any(i is None for i in items):
        return node
    if not all(isinstance(i, slice) or type(i) is int for i in whole):
        return node  # advanced indexing
    taken = tuple(i for i in items if i is not None)
    new = tuple(
        i if i is None or i is Ellipsis else slice(None) for i in items if type(i) is not int
    )
    with node.graph.inserting_before(node):
        part = call(node.graph, operator.getitem, node.args[0], taken, like=node)
        grown = call(node.graph, operator.getitem, part, new, like=node)
    node.replace_all_uses_with(grown)
    node.graph.erase_node(node)
    return grown


def _whole_slices(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Slices that leave nothing out, and what they are slices of."""
    for node in filter(_takes_all, list(graph.nodes)):
        yield node, node.args[0]  # type: ignore[misc]


_VIEWS = ("getitem", "select", "narrow", "transpose", "permute", "unsqueeze")


def _equal_views(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Views that were taken before, and the first one that is equal."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if op_name(node) not in _VIEWS or not may_overlap(node, node.args[0]):
            continue
        one = first.setdefault(_key((node.target, node.args, tuple(node.kwargs.items()))), node)
        if one is not node:
            yield node, one


def _read_instead(
    pairs: Iterator[tuple[fx.Node, fx.Node]], mapping: dict[fx.Node, fx.Node]
) -> None:
    """Puts the second of each pair in the place of the first, save where that one is returned."""
    stands_for: dict[fx.Node, fx.Node] = {}
    for node, other in pairs:
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user.op != "output")
        if not node.users:
            stands_for[node] = other
            node.graph.erase_node(node)
    for old, new in mapping.items():
        mapping[old] = stands_for.get(new, new)


def _key(value: Any) -> Any:
    """Something hashable that is equal for equal operands of one type."""
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_key, value))
    if isinstance(value, slice):
        return slice, _key(value.start), _key(value.stop), _key(value.step)
    return type(value), value


def normalize(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Returns a copy of `gm` in one spelling, and the map from its nodes to the copy's."""
    copy, mapping = copy_of(gm)
    for old, node in mapping.items():
        if op_name(node) == "einsum":
            mapping[old] = _matmul_of_einsum(node)
            continue
        if op_name(node) == "getitem":
            mapping[old] = _new_dims_apart(node)
            continue
        _name_operands(node)
        if node.target is getattr and node.args[1] == "mT":
            node.target, node.args = torch.transpose, (node.args[0], -2, -1)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or name not in _FUNCTIONS:
            continue
        if node.op == "call_function" and name not in ALIASES:
            continue
        if name in _VARIADIC and len(node.args) > 2:
            node.args = (node.args[0], node.args[1:])
        node.op, node.target = "call_function", _FUNCTIONS[name]
    renamed = {node: _name_softmax(node) for node in list(copy.graph.nodes)}
    for old, node in mapping.items():
        mapping[old] = renamed.get(node, node)
    _read_instead(_whole_slices(copy.graph), mapping)
    _read_instead(_equal_views(copy.graph), mapping)
    copy.graph.lint()
    copy.recompile()
    return copy, mapping
