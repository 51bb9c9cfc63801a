"""From a site's keys back to the cache they are read from, and to every write into that cache.

Two kinds of cache exist. One is *replaced*: each step builds a new tensor from the old one
(`torch.cat([past, new])`) and the graph returns it. The other is *mutated*: a placeholder that the
graph writes into (`index_copy_`, slice assignment, ...), where K is the placeholder itself and the
write has no users, so writes are found among the placeholder's users, never by walking back from
the attention core. Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    may_overlap,
    mutates,
    op_name,
    operand,
    same_size,
    shape_of,
    source_name,
    writes_of,
)
from loki_compile.passes.sites import (
    MAX_QUERY_TOKENS,
    AttentionSite,
    Heads,
    Reason,
    Skipped,
    permutation,
)
from torch import fx

_FUNCTIONAL_WRITES = ("cat", "index_copy", "index_put")

_REARRANGEMENTS = (
    "reshape", "to", "float", "type", "repeat", "repeat_interleave", "flatten", "unflatten",
    "getitem", "transpose", "permute", "movedim", "expand", "unsqueeze", "squeeze", "select",
    "narrow", "flip", "roll", "index_select", "gather", "contiguous", "clone", "detach",
)  # fmt: skip


@dataclass(frozen=True)
class CacheWrite:
    """One write of new keys. `views` lead from the cache to the tensor that is written into.

    `source` holds the new keys; `head_axis` is its dimension of KV heads (-1: one head, no such
    dimension); its last dimension is head_dim, or heads and head_dim in one (then it is `head_axis`
    too). `fill` = (what, plus) tells how far the cache is
    filled behind the write: the largest entry of `what` (a tensor node, an integer or an integer
    node) plus `plus`; None where the write does not say.

    A full window moves all its rows before it takes new ones (`roll`, a write into the result, a
    copy back): then `moved` has those calls in order, new keys come in by the writes among them,
    and `node` copies the result back. `batch_axis` is the source's dimension of sequences, as many
    as the cache has; -1 where there is none, or none is seen.
    """

    node: fx.Node
    source: fx.Node
    head_axis: int
    views: tuple[fx.Node, ...] = ()
    fill: tuple[Any, int] | None = None
    moved: tuple[fx.Node | CacheWrite, ...] = ()
    batch_axis: int = -1


@dataclass(frozen=True)
class KeyCache:
    """The cache behind a site's keys.

    `past` is the placeholder that brings it in. `root` holds the keys that the site reads: the
    same placeholder where the cache is mutated, the node that builds the new cache where it is
    replaced (then `output` is its place among the graph's outputs, after the views `leaves`: a
    sliding window keeps a slice). `views` lead from `root` to the site's `key.base`. `head_axis`
    and `token_axis` are dimensions of `root`; head_dim is last, or heads and head_dim in one, where
    `heads_are_folded`; `batch_axis` is that of sequences (-1: none is seen). `beside` is a second
    cache of the same tokens, written by the same calls, whose rows continue these: both have one
    index.
    """

    past: fx.Node
    root: fx.Node
    views: tuple[fx.Node, ...] = field(compare=False)
    writes: tuple[CacheWrite, ...]
    head_axis: int
    token_axis: int
    source: str
    output: int | None = None
    leaves: tuple[fx.Node, ...] = ()
    beside: KeyCache | None = None
    batch_axis: int = -1

    @property
    def rows_apart(self) -> bool:
        """Whether sequences lie along a dimension of the cache and of all that is written into it,
        and there may be several."""
        if self.batch_axis < 0 or concrete((shape_of(self.past) or ())[self.batch_axis]) == 1:
            return False
        inner = [step for write in self.writes for step in (*write.moved, write)]
        steps = [step for step in inner if isinstance(step, CacheWrite) and not step.moved]
        together = self.beside is None or self.beside.rows_apart
        return together and all(step.batch_axis >= 0 for step in steps)

    @property
    def replaced(self) -> bool:
        return self.output is not None

    @property
    def heads_are_folded(self) -> bool:
        """Whether the last dimension is heads and head_dim in one."""
        return self.head_axis == len(shape_of(self.root) or ()) - 1

    @property
    def grows(self) -> bool:
        """Whether each step makes it longer, instead of storing into slots that it has."""
        return self.replaced and op_name(self.root) == "cat"

    @property
    def new_keys(self) -> list[fx.Node]:
        """The tensors of new keys that the graph writes into the cache."""
        inner = [step for write in self.writes for step in (*write.moved, write)]
        return [step.source for step in inner if isinstance(step, CacheWrite) and not step.moved]


def trace_cache(site: AttentionSite, all_writes: list[Write]) -> KeyCache | Skipped:
    """The cache that the site's keys are read from, or the reason why there is none to index.

    all_writes: `writes_of` the site's graph.
    """

    def skip(reason: Reason, *details: Any) -> Skipped:
        return Skipped(site.node, reason, details, site.path)

    order: list[Any] = list(site.key.order)
    node, views = site.key.base, []
    while node.op != "placeholder" and op_name(node) not in _FUNCTIONAL_WRITES:
        last = len(shape_of(node) or ()) - 1
        apart = splits_heads(node) and (order[1], order[3]) == (last - 1, last)
        dims = [*range(last), last - 1] if apart else _view_dims(node)
        if dims is None:
            return skip(*_why_not_a_view(node, all_writes))
        order = [_source_dim(dims, d) for d in order]
        if order[2] is None or order[3] is None:
            return skip(Reason.OPAQUE_VIEW, op_name(node))
        if not mutates(node):
            views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    rank = len(shape_of(node) or ())
    if op_name(node) == "cat" and operand(node, "dim", 0) % rank == order[3]:
        return skip(*_why_not_a_view(node, all_writes))  # parts of keys, not past and new keys
    if order[3] != rank - 1 or not (
        _rows_lie_together(site.key) and _rows_lie_together(site.value)
    ):
        return skip(Reason.NON_CONTIGUOUS_HEAD_DIM, tuple(shape_of(node) or ()))
    labels: list[Any] = [None] * rank
    for label, dim in zip("BHTD", order, strict=True):
        if dim is not None and dim >= 0:
            labels[dim] = label
    sizes = [concrete(size) for size in shape_of(node) or ()]
    shared = [d for d in range(rank) if labels[d] is None and sizes[d] != 1]
    folded = order[1] == rank - 1
    width = site.head_dim * site.kv_heads if folded else site.head_dim
    if shared or sizes[-1] != width or ("H" in labels and sizes[order[1]] != site.kv_heads):
        return skip(Reason.SHARED_TENSOR, tuple(shape_of(node) or ()))
    head_axis = -1 if order[1] is None else order[1]
    views.reverse()
    trace = _replaced if op_name(node) in _FUNCTIONAL_WRITES else _mutated
    found = trace(node, labels, site)
    if not isinstance(found, tuple):
        return skip(*found.reason)
    past, writes, output, leaves = found
    known = {write.node for write in writes}
    for write in all_writes:
        touched = [n for n in (past, node) if may_overlap(write.operand, n)]
        if touched and write.call not in known:
            return skip(Reason.WRITE, op_name(write.call), "its effect is not known")
    if any(may_overlap(write.source, past) for write in writes):
        return skip(Reason.WRITE, op_name(writes[0].node), "it moves keys within the cache")
    return KeyCache(
        past=past,
        root=node,
        views=tuple(views),
        writes=writes,
        head_axis=head_axis,
        token_axis=order[2],
        source=source_name(past) or past.name,
        output=output,
        leaves=leaves,
        batch_axis=-1 if order[0] is None else order[0],
    )


@dataclass(frozen=True)
class _No:
    reason: tuple[Any, ...]


def _replaced(
    node: fx.Node, labels: list[Any], site: AttentionSite
) -> tuple[fx.Node, tuple[CacheWrite, ...], int, tuple[fx.Node, ...]] | _No:
    """The cache is rebuilt by one call from a placeholder and the new keys, and returned."""
    target: list[Any] | None
    fill = None
    if op_name(node) == "cat":
        tensors = operand(node, "tensors")
        dim = operand(node, "dim", 0) % len(labels)
        if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or labels[dim] != "T":
            return _No((Reason.WRITE, "cat", "not (past, new) along the key dimension"))
        past, source = tensors
        target = labels
    else:
        past = node.args[0]
        source = operand(node, "source" if op_name(node) == "index_copy" else "values")
        target = labels if op_name(node) == "index_copy" else _after_index(node, labels)
        if op_name(node) == "index_copy":
            fill = (operand(node, "index"), 1)
        else:
            if operand(node, "accumulate", False):
                return _No((Reason.WRITE, op_name(node), "it accumulates"))
            fill = _fill_of_index(_full_slices(operand(node, "indices")), labels)
    if not isinstance(past, fx.Node) or past.op != "placeholder":
        return _No((Reason.NO_CACHE, op_name(node)))
    if len(shape_of(past) or ()) != len(labels):
        return _No((Reason.WRITE, op_name(node), "the past has other dimensions"))
    if op_name(node) == "index_copy" and _indexes_features(node, labels):
        return _No((Reason.WRITE, op_name(node), "it indexes heads or head_dim"))
    head_axis = _head_axis(source, target, site)
    if head_axis is None:
        return _No((Reason.WRITE, op_name(node), "the new keys do not line up with the cache"))
    left = _way_out(node)
    if left is None:
        users = ", ".join(sorted({op_name(user) or user.op for user in node.users}))
        return _No((Reason.CACHE_LEAVES, f"its users are {users}"))
    batch_axis = _batch_axis(source, target, past, labels)
    return past, (CacheWrite(node, source, head_axis, fill=fill, batch_axis=batch_axis),), *left


def _way_out(node: fx.Node) -> tuple[int, tuple[fx.Node, ...]] | None:
    """Where a replaced cache leaves the graph: its place among the outputs, and the slices before.

    A cache that leaves more than once, or whose slice is followed by other views, is not followed.
    """
    outputs = list(node.graph.output_node().args[0])  # type: ignore[arg-type]
    slices = [
        user
        for user in node.users
        if op_name(user) == "getitem"
        and _view_dims(user) == list(range(len(shape_of(node) or ())))
        and user in outputs
    ]
    ways: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, ())] if node in outputs else []
    ways += [(user, (user,)) for user in slices]
    if len(ways) != 1 or outputs.count(ways[0][0]) != 1:
        return None
    return outputs.index(ways[0][0]), ways[0][1]


def _mutated(
    root: fx.Node, labels: list[Any], site: AttentionSite
) -> tuple[fx.Node, tuple[CacheWrite, ...], None, tuple[fx.Node, ...]] | _No:
    """The writes into a placeholder that can be mirrored, through any of its views, in order."""
    writes: list[CacheWrite] = []
    aliases: list[tuple[fx.Node, tuple[fx.Node, ...], list[Any]]] = [(root, (), labels)]
    for alias, views, at in aliases:
        for user in alias.users:
            first = user.args[0] if user.args else None
            if first is not alias:
                continue
            if mutates(user):
                write = _mirrorable(user, views, at, labels, site)
                if isinstance(write, _No):
                    return write
                writes.append(write)
                aliases.append((user, views, at))
                continue
            dims = _view_dims(user)
            if dims is not None:
                after = [None if d is None else at[d] for d in dims]
                aliases.append((user, (*views, user), after))
    position = {node: i for i, node in enumerate(root.graph.nodes)}
    writes.sort(key=lambda write: position[write.node])
    return root, tuple(writes), None, ()


def _mirrorable(
    node: fx.Node,
    views: tuple[fx.Node, ...],
    labels: list[Any],
    root_labels: list[Any],
    site: AttentionSite,
) -> CacheWrite | _No:
    name, fill = op_name(node), None
    target: list[Any] | None
    if name == "index_copy_":
        source, target = operand(node, "source"), labels
        fill = (operand(node, "index"), 1)
        if _indexes_features(node, labels):
            return _No((Reason.WRITE, name, "it indexes heads or head_dim"))
    elif name == "scatter_":
        source, target = operand(node, "src"), labels
        fill = (operand(node, "index"), 1)
        if not _scatters_rows(node, labels):
            return _No((Reason.WRITE, name, "it does not store whole rows"))
    elif name == "copy_":
        source, target = operand(node, "source"), labels
        fill = _fill_of_view(views, root_labels)
    elif name in ("setitem", "index_put_"):
        if name == "index_put_" and operand(node, "accumulate", False):
            return _No((Reason.WRITE, name, "it accumulates"))
        source = operand(node, "source" if name == "setitem" else "values")
        target = _after_index(node, labels)
        index = operand(node, "index" if name == "setitem" else "indices")
        fill = _fill_of_index(index if name == "setitem" else _full_slices(index), labels)
    else:
        return _No((Reason.WRITE, name, "not a copy of new keys"))
    head_axis = _head_axis(source, target, site)
    if head_axis is None:
        return _No((Reason.WRITE, name, "the new keys do not line up with the cache"))
    if name == "copy_" and not views and site.query_tokens > 0:
        moved = _moved_rows(source, node, labels, site)
        if moved:
            return CacheWrite(node, source, head_axis, moved=moved)
    rows = _rows(source, target)
    known = concrete(rows)
    if (known is None and not same_size(rows, site.tokens)) or (known or 0) > MAX_QUERY_TOKENS:
        return _No((Reason.WRITE, name, "it writes more rows than there are new tokens"))
    batch_axis = _batch_axis(source, target, node.args[0], labels)
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
        into = _mirrorable(other.call, (), labels, labels, site)
        if isinstance(into, _No) or into.moved:
            return ()
        calls.append(into)
    return tuple(calls)


def _indexes_features(node: fx.Node, labels: list[Any]) -> bool:
    """Whether an index_copy indexes heads or head_dim, so that rows lose their place."""
    return labels[operand(node, "dim") % len(labels)] in ("H", "D")


def _scatters_rows(node: fx.Node, labels: list[Any]) -> bool:
    """Whether a scatter_ stores rows at tokens: all of a row's numbers have one position."""
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


def _fill_of_index(index: Any, labels: list[Any]) -> tuple[Any, int] | None:
    """Where `x[index]` ends at the token dimension, for x with these labels."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(i is Ellipsis for i in items):
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(labels) + 1 - len(items))
    token = labels.index("T") if "T" in labels else len(items)
    if any(i is None for i in items) or token >= len(items):
        return None
    return _end_of(items[token])


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
        return _fill_of_index(view.args[1], labels)
    if op_name(view) not in ("select", "narrow"):
        return None
    if labels[operand(view, "dim") % len(labels)] != "T":
        return None
    if op_name(view) == "select":
        return _end_of(operand(view, "index"))
    start, length = operand(view, "start"), operand(view, "length")
    return (start, length) if isinstance(length, int) else None


def _head_axis(source: Any, target: list[Any] | None, site: AttentionSite) -> int | None:
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


def _batch_axis(source: Any, target: list[Any] | None, cache: Any, labels: list[Any]) -> int:
    """Dimension of sequences in `source`, if it holds as many as the cache (with `labels`)."""
    shape, sizes = shape_of(source), shape_of(cache)
    if shape is None or sizes is None or not target or "B" not in target or "B" not in labels:
        return -1
    axis = target.index("B") - (len(target) - len(shape))
    return axis if axis >= 0 and same_size(shape[axis], sizes[labels.index("B")]) else -1


def _after_index(node: fx.Node, labels: list[Any]) -> list[Any] | None:
    """Labels of `tensor[index]` for a setitem or index_put of the tensor with `labels`."""
    index = operand(node, "index" if op_name(node) == "setitem" else "indices")
    if op_name(node) != "setitem":
        index = _full_slices(index)
    dims = indexed_dims(index, shape_of(node.args[0]) or ())  # type: ignore[arg-type]
    if dims is None:
        return None
    return [None if d is None else labels[d] for d in dims]


def _full_slices(indices: Sequence[Any]) -> tuple[Any, ...]:
    """The indices of an index_put, which spells a full slice as None, as those of a setitem."""
    return tuple(slice(None) if i is None else i for i in indices)


def _rows_lie_together(heads: Heads) -> bool:
    """Whether a key or value row is one run of memory, as the kernels need it."""
    value = fake_value(heads.base)
    return value.shape[heads.order[3]] == 1 or concrete(value.stride(heads.order[3])) == 1


def _source_dim(dims: list[int | None], dim: int | None) -> int | None:
    return dim if dim is None or dim < 0 else dims[dim]


def _view_dims(node: fx.Node) -> list[int | None] | None:
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


def _why_not_a_view(node: fx.Node, writes: list[Write]) -> tuple[Any, ...]:
    """OPAQUE_VIEW where only rearrangements and casts lie between here and a cache."""
    origin = _before_rearrangements(node)
    reads_cache = isinstance(origin, fx.Node) and (
        origin.op == "placeholder" or (op_name(origin) in _FUNCTIONAL_WRITES and origin is not node)
    )
    if reads_cache:
        return (Reason.OPAQUE_VIEW, op_name(node))
    latent = _latent(node, writes)
    if latent is not None:
        return (Reason.LATENT, (shape_of(latent) or ("?",))[-1], "")
    return (Reason.NO_CACHE, op_name(node) or node.op)


def _before_rearrangements(node: Any) -> Any:
    while isinstance(node, fx.Node) and op_name(node) in _REARRANGEMENTS and node.args:
        node = node.args[0]
    return node


def _latent(keys: fx.Node, writes: list[Write]) -> fx.Node | None:
    """The cache that a linear map of this graph expands to keys, if there is one.

    Its result may reach the keys by views, concatenation, or copies into a fresh tensor.
    """
    queue, seen = [keys], {keys}
    for node in queue:
        if op_name(node) in ("linear", "matmul", "einsum"):
            for source in map(_before_rearrangements, node.all_input_nodes):
                grown = op_name(source) in _FUNCTIONAL_WRITES and _way_out(source) is not None
                written = source.op == "placeholder" and any(
                    may_overlap(write.operand, source) for write in writes
                )
                if grown or written:
                    return source
            continue
        sources = list(node.all_input_nodes)
        if op_name(node) in ("new_empty", "empty", "zeros", "new_zeros", "empty_like"):
            sources = [w.call for w in writes if may_overlap(w.operand, node)]
        new = [source for source in sources if source not in seen]
        seen.update(new)
        queue += new
    return None
