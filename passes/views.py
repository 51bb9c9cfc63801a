"""What a call that rearranges a tensor does with its dimensions. Analysis only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loki_compile.passes.calls import (
    concrete,
    fake_value,
    mutates,
    op_name,
    operand,
    same_size,
    shape_of,
)
from torch import fx


def permutation(node: fx.Node) -> list[int]:
    """For a transpose, permute or movedim: which dimension of the input each output one is."""
    rank = len(shape_of(node) or ())
    name = op_name(node)
    if name == "transpose":
        a, b = operand(node, "dim0") % rank, operand(node, "dim1") % rank
        back = list(range(rank))
        back[a], back[b] = b, a
        return back
    if name == "permute":
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dims")
        return [d % rank for d in dims]
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    moved = torch.movedim(probe, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    return [size - 2 for size in moved.shape]


def widens(node: fx.Node) -> bool:
    """Whether a cast on one device keeps the dtype or makes it float32, which no value notices.

    The ops compute in float32 whatever they are given: a product of widened operands is theirs.
    """
    before, after = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
    wider = after.dtype == torch.float32 and before.dtype in (torch.float16, torch.bfloat16)
    return before.device == after.device and (wider or before.dtype == after.dtype)


def only_adds_dim(node: fx.Node, dim: int) -> bool:
    """Whether the view does nothing but insert a dimension of size one at `dim`."""
    if op_name(node) == "unsqueeze":
        return operand(node, "dim") % len(shape_of(node) or (0,)) == dim
    index = node.args[1]
    if not isinstance(index, tuple):
        return False
    return (
        index.count(None) == 1
        and index.index(None) == dim
        and all(i is None or i == slice(None) for i in index)
    )


def view_dims(node: fx.Node) -> list[int | None] | None:
    """For a view: the input dimension that each output dimension is (None: new); else None.

    A call that writes into its first operand returns that operand, so it is a view as well.
    """
    name = op_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or shape_of(source) is None:
        return None
    rank = len(shape_of(source) or ())
    if mutates(node) and shape_of(node) is not None:
        return list(range(rank))
    if name in ("transpose", "permute", "movedim"):
        return list(permutation(node))
    if name == "narrow":
        full = operand(node, "dim") % rank != rank - 1
        return list(range(rank)) if full else None
    if name == "select":
        dim = operand(node, "dim") % rank
        return [d for d in range(rank) if d != dim]
    if name == "unsqueeze":
        dim = operand(node, "dim") % (rank + 1)
        return [None if d == dim else d - (d > dim) for d in range(rank + 1)]
    if name == "getitem":
        index = node.args[1]
        items = index if isinstance(index, tuple) else (index,)
        if any(
            shape_of(item) is not None or isinstance(item, (list, torch.Tensor)) for item in items
        ):
            return None  # advanced indexing copies
        dims = indexed_dims(index, shape_of(source) or ())
        # A slice of head_dim is not the key any more.
        return dims if dims and dims[-1] == rank - 1 and _whole_last(index, rank) else None
    return None


def splits_heads(node: fx.Node) -> bool:
    """Whether the call makes (..., heads, head_dim) of a last dimension that holds both."""
    source = node.args[0] if node.args else None
    before, after = shape_of(source), shape_of(node)
    if op_name(node) not in ("reshape", "unflatten") or before is None or after is None:
        return False
    if len(after) != len(before) + 1 or concrete(after[-2]) is None:
        return False
    return same_size(after[-2] * after[-1], before[-1]) and all(
        map(same_size, after[:-2], before[:-1])
    )


def indexed_dims(index: Any, shape: Sequence[Any]) -> list[int | None] | None:
    """NumPy's rule: the input dimension behind each dimension of `x[index]`, None where new."""
    items, rank = list(index) if isinstance(index, tuple) else [index], len(shape)
    consumed = sum(1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis in [i for i in items if i is Ellipsis]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - consumed)
    else:
        items += [slice(None)] * (rank - consumed)
    out: list[int | None] = []
    advanced: list[int] = []  # positions among items
    counted: dict[int, int] = {}  # dimension of the indices, from the right -> dimension of x
    advanced_rank, insert_at, dim = 0, 0, 0
    for position, item in enumerate(items):
        if item is None:
            out.append(None)
            continue
        if isinstance(item, slice):
            out.append(dim)
        elif shape_of(item) is not None:
            value = fake_value(item)
            if value.dtype == torch.bool:
                return None
            if not advanced:
                insert_at = len(out)
            advanced.append(position)
            advanced_rank = max(advanced_rank, value.ndim)
            axis = _counting_axis(item, shape[dim])
            if axis is not None:
                counted[axis] = dim
        elif not _is_int(item):
            return None
        elif advanced:
            return None  # an int between tensors joins their broadcast; not worth following
        dim += 1
    if not advanced:
        return out
    if advanced[-1] - advanced[0] + 1 != len(advanced):
        insert_at = 0
    out[insert_at:insert_at] = [counted.get(axis) for axis in range(-advanced_rank, 0)]
    return out


def _counting_axis(item: Any, size: Any) -> int | None:
    """The axis (from the right) along which an index tensor counts a dimension from 0 to its end.

    `cache[torch.arange(B)[:, None], :, pos]` pairs rows as a slice would.
    """
    shape = fake_value(item).shape
    node, axes = item, [d for d, n in enumerate(shape) if concrete(n) != 1]
    while op_name(node) in ("unsqueeze", "getitem", "reshape", "to"):
        node = node.args[0]
    ends = [a for a in node.args if isinstance(a, (int, fx.Node))]
    if op_name(node) != "arange" or len(ends) != len(node.args) or len(ends) > 2:
        return None
    if (len(ends) == 2 and ends[0] != 0) or "step" in node.kwargs or "start" in node.kwargs:
        return None
    counted = shape_of(node)
    whole = same_size(counted[0], size) if counted else False
    if not whole or len(axes) != 1 or not same_size(shape[axes[0]], size):
        return None
    return axes[0] - len(shape)


def _is_int(item: Any) -> bool:
    return (isinstance(item, int) and not isinstance(item, bool)) or (
        isinstance(item, fx.Node) and isinstance(fake_value(item), (int, torch.SymInt))
    )


def _whole_last(index: Any, rank: int) -> bool:
    """Whether an index leaves the last dimension whole."""
    items = index if isinstance(index, tuple) else (index,)
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    last_is_indexed = used == rank or (Ellipsis in items and items[-1] is not Ellipsis)
    return not last_is_indexed or items[-1] == slice(None)
