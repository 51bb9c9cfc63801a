"""The calls that store new keys in a cache: what each stores, and how far the cache is filled then.

Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.attention import MAX_QUERY_TOKENS, AttentionSite, No, Reason
from loki_compile.passes.caches import CacheWrite
from loki_compile.passes.calls import (
    concrete,
    fake_value,
    may_overlap,
    mutates,
    op_name,
    operand,
    same_size,
    shape_of,
    writes_of,
)
from loki_compile.passes.graphs import ancestors
from loki_compile.passes.views import CALLS, is_number, items_of
from torch import fx


@dataclass(frozen=True)
class Stored:
    """What a call stores: `source`, whose dimensions line up from the right with those that the
    labels `target` are of, and how far the cache is filled then (`CacheWrite.fill`)."""

    source: Any
    target: list[Any] | None
    fill: tuple[Any, int] | None


def _index_copied(node: fx.Node, labels: list[Any]) -> Stored:
    if labels[operand(node, "dim") % len(labels)] in ("H", "D"):
        raise No(Reason.WRITE, op_name(node), "it indexes heads or head_dim")
    return Stored(operand(node, "source"), labels, (operand(node, "index"), 1))


def _scattered(node: fx.Node, labels: list[Any]) -> Stored:
    if not _scatters_rows(node, labels):
        raise No(Reason.WRITE, op_name(node), "it does not store whole rows")
    return Stored(operand(node, "src"), labels, (operand(node, "index"), 1))


def _copied(node: fx.Node, labels: list[Any]) -> Stored:
    return Stored(operand(node, "source"), labels, None)


def _assigned(node: fx.Node, labels: list[Any]) -> Stored:
    return _at_index(node, operand(node, "source"), operand(node, "index"), labels)


def _index_put(node: fx.Node, labels: list[Any]) -> Stored:
    if operand(node, "accumulate", False):
        raise No(Reason.WRITE, op_name(node), "it accumulates")
    # A whole dimension is None here.
    index = tuple(slice(None) if i is None else i for i in operand(node, "indices"))
    return _at_index(node, operand(node, "values"), index, labels)


def _at_index(node: fx.Node, source: Any, index: Any, labels: list[Any]) -> Stored:
    dims = indexed_dims(index, shape_of(node.args[0]) or ())  # type: ignore[arg-type]
    target = None if dims is None else [None if d is None else labels[d] for d in dims]
    return Stored(source, target, fill_of_index(index, labels))


# The calls that store rows, in place or in a copy, -> what each stores, given the labels of the
# dimensions ("B", "H", "T", "D") of what it stores into.
FORMS: dict[str, Callable[[fx.Node, list[Any]], Stored]] = {
    "index_copy_": _index_copied,
    "index_copy": _index_copied,
    "scatter_": _scattered,
    "scatter": _scattered,
    "copy_": _copied,
    "setitem": _assigned,
    "index_put_": _index_put,
    "index_put": _index_put,
}


# Those that store into a copy, which takes the cache's place.
REPLACING = tuple(name for name in FORMS if not name.endswith("_") and name != "setitem")


def names_numbers(node: fx.Node) -> bool:
    """Whether the call names a position for each number that it stores, and not for each row."""
    return FORMS.get(op_name(node)) is _scattered


def only_stores(node: fx.Node) -> bool:
    """Whether what the call leaves where it writes does not depend on what was there."""
    if op_name(node) not in FORMS or "reduce" in node.kwargs:
        return False
    return op_name(node) != "index_put_" or not operand(node, "accumulate")


# Calls behind which a later token's position is the greater one if it was before.
_KEEP_ORDER = {
    *CALLS, "add", "add_", "iadd", "arange", "size", "item", "int", "long", "stack", "cat", "max",
    "amax", "full", "zeros", "ones", "tensor",
}  # fmt: skip


def unordered_by(write: CacheWrite) -> str:
    """The call on the way to the position of a write behind which a later token may come first, as
    in a buffer that wraps around; "" where there is none."""
    what = None if write.fill is None else write.fill[0]
    for node in ancestors([what] if isinstance(what, fx.Node) else []):
        if node.op != "placeholder" and op_name(node) not in _KEEP_ORDER:
            return op_name(node) or node.op
    return ""


def counted_by(write: CacheWrite) -> tuple[fx.Node, int] | None:
    """The input, a tensor of one integer, that is the slot of a write's first row, and how many
    rows it stores, each in the slot behind the one before; None where slots come otherwise."""
    if write.fill is None or write.moved:
        return None
    what, plus = write.fill
    rows: Any = 1
    if isinstance(what, fx.Node) and op_name(what) in ("add", "iadd") and not what.kwargs:
        count = [x for x in what.args if isinstance(x, fx.Node) and op_name(x) == "arange"]
        rest = [x for x in what.args if x not in count]
        if len(count) != 1 or len(rest) != 1 or not {"device", "dtype"} >= count[0].kwargs.keys():
            return None
        (rows, *others), (what,) = count[0].args, rest
        if others:
            return None
    if plus != 1 or not isinstance(rows, int) or not isinstance(what, fx.Node):
        return None
    value = fake_value(what)
    if what.op != "placeholder" or not isinstance(value, torch.Tensor) or value.is_floating_point():
        return None
    return (what, rows) if all(concrete(size) == 1 for size in value.shape) else None


def mirrorable(
    node: fx.Node,
    views: tuple[fx.Node, ...],
    labels: list[Any],
    root_labels: list[Any],
    site: AttentionSite,
) -> CacheWrite:
    """The write of new keys that a call is, given the views from the cache to what it writes into.

    labels: of the dimensions of that; root_labels: of the cache's.
    """
    name = op_name(node)
    if name not in FORMS:
        raise No(Reason.WRITE, name, "not a copy of new keys")
    stored = FORMS[name](node, labels)
    source, target, fill = stored.source, stored.target, stored.fill
    if name == "copy_":
        fill = _fill_of_view(views, root_labels)
    head_axis = head_axis_of(source, target, site)
    if head_axis is None:
        raise No(Reason.WRITE, name, "the new keys do not line up with the cache")
    if name == "copy_" and not views and site.query_tokens > 0:
        moved = _moved_rows(source, node, labels, site)
        if moved:
            return CacheWrite(node, source, head_axis, moved=moved)
    rows = _rows(source, target)
    known = concrete(rows)
    if (known is None and not same_size(rows, site.tokens)) or (known or 0) > MAX_QUERY_TOKENS:
        raise No(Reason.WRITE, name, "it writes more rows than there are new tokens")
    batch_axis = batch_axis_of(source, target, node.args[0], labels)
    return CacheWrite(node, source, head_axis, views, fill, batch_axis=batch_axis)


def _moved_rows(
    source: fx.Node, write: fx.Node, labels: list[Any], site: AttentionSite
) -> tuple[fx.Node | CacheWrite, ...]:
    """The calls between the cache and its moved rows; () where they do more than move rows.

    Followed are a roll along the keys of the whole cache and writes of new keys into its result.
    """
    roll, cache = source, write.args[0]
    assert isinstance(cache, fx.Node)
    while isinstance(roll, fx.Node) and mutates(roll):
        roll = roll.args[0]  # type: ignore[assignment]
    if not isinstance(roll, fx.Node) or op_name(roll) != "roll" or roll.args[0] is not cache:
        return ()
    dims = operand(roll, "dims")
    dims = (dims,) if isinstance(dims, int) else dims
    if not dims or any(labels[d % len(labels)] != "T" for d in dims):
        return ()
    calls: list[fx.Node | CacheWrite] = [roll]
    for other in writes_of(roll.graph):
        if other.call is write:
            continue
        if may_overlap(other.operand, cache) and roll < other.call and other.call < write:
            return ()  # the index rolls where the copy stands, behind this write
        if not may_overlap(other.operand, roll):
            continue
        if other.operand is not roll or not other.call < write:
            return ()
        try:
            into = mirrorable(other.call, (), labels, labels, site)
        except No:
            return ()
        if into.moved:
            return ()
        calls.append(into)
    return tuple(calls)


def _scatters_rows(node: fx.Node, labels: list[Any]) -> bool:
    """Whether a scatter stores rows at tokens: all of a row's numbers have one position."""
    index, source = operand(node, "index"), operand(node, "src")
    wanted, shape = shape_of(index), shape_of(source)
    if labels[operand(node, "dim") % len(labels)] != "T" or "reduce" in node.kwargs:
        return False
    if len(node.args) > 4 or wanted is None or shape is None:
        return False
    alike = len(wanted) == len(shape) and all(map(same_size, wanted, shape))
    return alike and concrete(fake_value(index).stride(-1)) == 0


def _rows(source: Any, target: list[Any] | None) -> Any:
    """Key rows that a write stores per head."""
    shape = shape_of(source) or ()
    axis = target.index("T") - (len(target) - len(shape)) if target and "T" in target else -1
    return shape[axis] if axis >= 0 else 1


def fill_of_index(index: Any, labels: list[Any]) -> tuple[Any, int] | None:
    """Where `x[index]` ends at the token dimension, for x with these labels."""
    items = items_of(index, len(labels))
    if any(i is None for i in items) or "T" not in labels or len(items) != len(labels):
        return None
    return _end_of(items[labels.index("T")])


def _end_of(item: Any) -> tuple[Any, int] | None:
    """The end of a slice, or the position behind an index; None where counted from the end."""
    end, plus = (item.stop, 0) if isinstance(item, slice) else (item, 1)
    return None if end is None or (isinstance(end, int) and end < 0) else (end, plus)


def _fill_of_view(views: tuple[fx.Node, ...], labels: list[Any]) -> tuple[Any, int] | None:
    """Where a copy into the one view of a cache with these labels ends at the token dimension."""
    if len(views) != 1:
        return None
    (view,) = views
    if op_name(view) == "getitem":
        return fill_of_index(view.args[1], labels)
    if op_name(view) not in ("select", "narrow"):
        return None
    if labels[operand(view, "dim") % len(labels)] != "T":
        return None
    if op_name(view) == "select":
        return _end_of(operand(view, "index"))
    start, length = operand(view, "start"), operand(view, "length")
    return (start, length) if isinstance(length, int) else None


def head_axis_of(source: Any, target: list[Any] | None, site: AttentionSite) -> int | None:
    """Dimension of KV heads in `source`, whose dimensions line up with `target` from the right."""
    shape = shape_of(source)
    if shape is None or not target or target[-1] != "D":
        return None
    if "H" not in target and concrete(shape[-1]) == site.head_dim * site.kv_heads:
        return -1 if site.kv_heads == 1 else len(shape) - 1
    if "H" not in target or concrete(shape[-1]) != site.head_dim:
        return None
    axis = target.index("H") - (len(target) - len(shape))
    kv_heads = site.kv_heads
    return axis if axis >= 0 and concrete(shape[axis]) == kv_heads else None


def batch_axis_of(source: Any, target: list[Any] | None, cache: Any, labels: list[Any]) -> int:
    """Dimension of sequences in `source`, if it holds as many as the cache (with `labels`)."""
    shape, sizes = shape_of(source), shape_of(cache)
    if shape is None or sizes is None or not target or "B" not in target or "B" not in labels:
        return -1
    axis = target.index("B") - (len(target) - len(shape))
    return axis if axis >= 0 and same_size(shape[axis], sizes[labels.index("B")]) else -1


# --- indices that copy


def indexed_dims(index: Any, shape: Sequence[Any]) -> list[int | None] | None:
    """NumPy's rule: the input dimension behind each dimension of `x[index]`, None where new."""
    items = items_of(index, len(shape))
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
        elif not is_number(item):
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
