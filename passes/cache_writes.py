"""From a site's keys back to the cache they are read from, and to every write into that cache.

Two kinds of cache exist. One is *replaced*: each step builds a new tensor from the old one
(`torch.cat([past, new])`) and the graph returns it. The other is *mutated*: a placeholder that the
graph writes into (`index_copy_`, slice assignment, ...), where K is the placeholder itself and the
write has no users, so writes are found among the placeholder's users, never by walking back from
the attention core. Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.fx_tools import (
    ancestors,
    concrete,
    fake_value,
    mutates,
    op_name,
    operand,
    shape_of,
    source_name,
)
from loki_compile.passes.sites import (
    MAX_QUERY_TOKENS,
    AttentionSite,
    Reason,
    Skipped,
    permutation,
)
from torch import fx

_IN_PLACE_OPERATORS = tuple(
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor")
)
_FUNCTIONAL_WRITES = ("cat", "index_copy", "index_put")


@dataclass(frozen=True)
class CacheWrite:
    """One write of new keys. `views` lead from the cache to the tensor that is written into.

    `source` holds the new keys; `head_axis` is its dimension of KV heads (-1: one head, no such
    dimension); its last dimension is head_dim. `fill` = (what, plus) tells how far the cache is
    filled behind the write: the largest entry of `what` (a tensor node, an integer or an integer
    node) plus `plus`; None where the write does not say.
    """

    node: fx.Node
    source: fx.Node
    head_axis: int
    views: tuple[fx.Node, ...] = ()
    fill: tuple[Any, int] | None = None


@dataclass(frozen=True)
class KeyCache:
    """The cache behind a site's keys.

    `past` is the placeholder that brings it in. `root` holds the keys that the site reads: the
    same placeholder where the cache is mutated, the node that builds the new cache where it is
    replaced (then `output` is its place among the graph's outputs, after the views `leaves`: a
    sliding window keeps a slice). `views` lead from `root` to the site's `key.base`. `head_axis`
    and `token_axis` are dimensions of `root`; head_dim is last.
    """

    past: fx.Node
    root: fx.Node
    views: tuple[fx.Node, ...]
    writes: tuple[CacheWrite, ...]
    head_axis: int
    token_axis: int
    source: str
    output: int | None = None
    leaves: tuple[fx.Node, ...] = ()

    @property
    def replaced(self) -> bool:
        return self.output is not None


def trace_cache(site: AttentionSite) -> KeyCache | Skipped:
    """The cache that the site's keys are read from, or the reason why there is none to index."""

    def skip(reason: Reason, *details: Any) -> Skipped:
        return Skipped(site.node, reason, details, site.path)

    order = list(site.key.order)
    node, views = site.key.base, []
    while node.op != "placeholder" and op_name(node) not in _FUNCTIONAL_WRITES:
        dims = _view_dims(node)
        if dims is None:
            return skip(*_why_not_a_view(node))
        order = [_source_dim(dims, d) for d in order]
        if order[2] is None or order[3] is None:
            return skip(Reason.OPAQUE_VIEW, op_name(node))
        if not mutates(node):
            views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    rank = len(shape_of(node) or ())
    if order[3] != rank - 1:
        return skip(Reason.NON_CONTIGUOUS_HEAD_DIM, tuple(shape_of(node) or ()))
    labels: list[Any] = [None] * rank
    for label, dim in zip("BHTD", order, strict=True):
        if dim is not None and dim >= 0:
            labels[dim] = label
    shared = [d for d in range(rank) if labels[d] is None and concrete(shape_of(node)[d]) != 1]
    if shared:
        return skip(Reason.SHARED_TENSOR, tuple(shape_of(node) or ()))
    head_axis = -1 if order[1] is None else order[1]
    views.reverse()
    trace = _replaced if op_name(node) in _FUNCTIONAL_WRITES else _mutated
    found = trace(node, labels, site)
    if not isinstance(found, tuple):
        return skip(*found.reason)
    past, writes, output, leaves = found
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
    )


@dataclass(frozen=True)
class _No:
    reason: tuple[Any, ...]


def _replaced(
    node: fx.Node, labels: list[Any], site: AttentionSite
) -> tuple[fx.Node, tuple[CacheWrite, ...], int, tuple[fx.Node, ...]] | _No:
    """The cache is rebuilt by one call from a placeholder and the new keys, and returned."""
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
    if not isinstance(past, fx.Node) or past.op != "placeholder":
        return _No((Reason.NO_CACHE, op_name(node)))
    head_axis = _head_axis(source, target, site)
    if head_axis is None:
        return _No((Reason.WRITE, op_name(node), "the new keys do not line up with the cache"))
    left = _way_out(node)
    if left is None:
        users = ", ".join(sorted({op_name(user) or user.op for user in node.users}))
        return _No((Reason.CACHE_LEAVES, f"its users are {users}"))
    return past, (CacheWrite(node, source, head_axis),), *left


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
    ways = [(node, ())] if node in outputs else []
    ways += [(user, (user,)) for user in slices]
    if len(ways) != 1 or outputs.count(ways[0][0]) != 1:
        return None
    return outputs.index(ways[0][0]), ways[0][1]


def _mutated(
    root: fx.Node, labels: list[Any], site: AttentionSite
) -> tuple[fx.Node, tuple[CacheWrite, ...], None, tuple[fx.Node, ...]] | _No:
    """Every write into a placeholder through any of its views, in graph order."""
    writes: list[CacheWrite] = []
    aliases: list[tuple[fx.Node, tuple[fx.Node, ...], list[Any]]] = [(root, (), labels)]
    for alias, views, at in aliases:
        for user in alias.users:
            if _writes_into(user, alias):
                write = _mirrorable(user, views, at, site)
                if isinstance(write, _No):
                    return write
                writes.append(write)
                aliases.append((user, views, at))
                continue
            if user.op == "output":
                continue
            if not _only_reads(user, alias):
                return _No((Reason.WRITE, op_name(user) or str(user.target), "effect not known"))
            dims = _view_dims(user) if user.args and user.args[0] is alias else None
            if dims is not None:
                after = [None if d is None else at[d] for d in dims]
                aliases.append((user, (*views, user), after))
            elif _may_alias(user) and any(mutates(reader) for reader in user.users):
                return _No((Reason.WRITE, op_name(user), "written through a view"))
    position = {node: i for i, node in enumerate(root.graph.nodes)}
    writes.sort(key=lambda write: position[write.node])
    return root, tuple(writes), None, ()


def _mirrorable(
    node: fx.Node, views: tuple[fx.Node, ...], labels: list[Any], site: AttentionSite
) -> CacheWrite | _No:
    name, fill = op_name(node), None
    if name == "index_copy_":
        source, target = operand(node, "source"), labels
        fill = (operand(node, "index"), 1)
        dim = operand(node, "dim") % len(labels)
        if labels[dim] in ("H", "D"):
            return _No((Reason.WRITE, name, "it indexes heads or head_dim"))
    elif name == "copy_":
        source, target = operand(node, "source"), labels
    elif name in ("setitem", "index_put_"):
        if name == "index_put_" and operand(node, "accumulate", False):
            return _No((Reason.WRITE, name, "it accumulates"))
        source = operand(node, "source" if name == "setitem" else "values")
        target = _after_index(node, labels)
        fill = _fill_of_index(node, labels)
    else:
        return _No((Reason.WRITE, name, "not a copy of new keys"))
    head_axis = _head_axis(source, target, site)
    if head_axis is None:
        return _No((Reason.WRITE, name, "the new keys do not line up with the cache"))
    rows = _rows(source, target)
    if rows is None or rows > MAX_QUERY_TOKENS:
        return _No((Reason.WRITE, name, "it writes more rows than there are new tokens"))
    return CacheWrite(node, source, head_axis, views, fill)


def _rows(source: Any, target: list[Any] | None) -> int | None:
    """Key rows that a write stores per head, where that is a constant."""
    shape = shape_of(source) or ()
    axis = target.index("T") - (len(target) - len(shape)) if target and "T" in target else -1
    return concrete(shape[axis]) if axis >= 0 else 1


def _fill_of_index(node: fx.Node, labels: list[Any]) -> tuple[Any, int] | None:
    """The item of a setitem's or index_put's index that stands at the token dimension."""
    index = operand(node, "index" if op_name(node) == "setitem" else "indices")
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if Ellipsis in [i for i in items if i is Ellipsis]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(labels) + 1 - len(items))
    token = labels.index("T") if "T" in labels else len(items)
    if None in items or token >= len(items):
        return None
    item = items[token]
    if isinstance(item, slice):
        return None if item.stop is None else (item.stop, 0)
    return item, 1


def _head_axis(source: Any, target: list[Any] | None, site: AttentionSite) -> int | None:
    """Dimension of KV heads in `source`, whose dimensions line up with `target` from the right."""
    shape = shape_of(source)
    if shape is None or not target or target[-1] != "D" or concrete(shape[-1]) != site.head_dim:
        return None
    if "H" not in target:
        return -1
    axis = target.index("H") - (len(target) - len(shape))
    kv_heads = site.kv_heads
    return axis if axis >= 0 and concrete(shape[axis]) == kv_heads else None


def _after_index(node: fx.Node, labels: list[Any]) -> list[Any] | None:
    """Labels of `tensor[index]` for a setitem or index_put of the tensor with `labels`."""
    index = operand(node, "index" if op_name(node) == "setitem" else "indices")
    if op_name(node) != "setitem":  # index_put spells a full slice as None
        index = tuple(slice(None) if i is None else i for i in index)
    dims = _indexed_dims(index, len(labels))
    if dims is None:
        return None
    return [None if d is None else labels[d] for d in dims]


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
        return list(permutation(node) or []) or None
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
        dims = _indexed_dims(index, rank)
        # A slice of head_dim is not the key any more.
        return dims if dims and dims[-1] == rank - 1 and _whole_last(index, rank) else None
    return None


def _indexed_dims(index: Any, rank: int) -> list[int | None] | None:
    """NumPy's rule: the input dimension behind each dimension of `x[index]`, None where new."""
    items = list(index) if isinstance(index, tuple) else [index]
    consumed = sum(1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis in [i for i in items if i is Ellipsis]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - consumed)
    else:
        items += [slice(None)] * (rank - consumed)
    out: list[int | None] = []
    advanced: list[int] = []  # positions among items
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
        elif not _is_int(item):
            return None
        elif advanced:
            return None  # an int between tensors joins their broadcast; not worth following
        dim += 1
    if not advanced:
        return out
    if advanced[-1] - advanced[0] + 1 != len(advanced):
        insert_at = 0
    out[insert_at:insert_at] = [None] * advanced_rank
    return out


def _is_int(item: Any) -> bool:
    return isinstance(item, int) or (
        isinstance(item, fx.Node) and isinstance(fake_value(item), (int, torch.SymInt))
    )


def _whole_last(index: Any, rank: int) -> bool:
    """Whether an index leaves the last dimension whole."""
    items = index if isinstance(index, tuple) else (index,)
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    last_is_indexed = used == rank or (Ellipsis in items and items[-1] is not Ellipsis)
    return not last_is_indexed or items[-1] == slice(None)


def _writes_into(node: fx.Node, tensor: fx.Node) -> bool:
    return bool(mutates(node) and node.args and node.args[0] is tensor)


def _only_reads(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether the call is known not to write into `tensor`."""
    if mutates(node):
        return node.args[0] is not tensor
    if node.op == "call_method":
        return True
    if node.op != "call_function" or node.target in _IN_PLACE_OPERATORS or "out" in node.kwargs:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return not any(getattr(node.target, o)._schema.is_mutable for o in node.target.overloads())
    return not isinstance(node.target, torch._ops.HigherOrderOperator)


def _may_alias(node: fx.Node) -> bool:
    """Views whose dimensions are not followed here, but through which a cache could be written."""
    return op_name(node) in ("reshape", "flatten", "unflatten", "squeeze", "expand", "unbind",
                             "chunk", "split", "getitem", "narrow", "detach", "alias")  # fmt: skip


def _why_not_a_view(node: fx.Node) -> tuple[Any, ...]:
    reads_cache = any(
        source.op == "placeholder" and len(shape_of(source) or ()) >= 3
        for source in ancestors([node])
    )
    if reads_cache and op_name(node) in ("reshape", "to", "repeat", "flatten", "getitem", "float"):
        return (Reason.OPAQUE_VIEW, op_name(node))
    return (Reason.NO_CACHE, op_name(node) or node.op)


def key_weight(cache: KeyCache, is_parameter: Any) -> fx.Node | None:
    """The parameter that makes the keys: the nearest matrix behind the new keys, breadth first.

    It identifies a site's keys whatever the graph, the module path or the kind of cache.
    """
    starts = [write.source for write in cache.writes]
    return nearest_matrix(starts, is_parameter)


def nearest_matrix(starts: list[fx.Node], is_parameter: Any) -> fx.Node | None:
    """The nearest placeholder of two or more dimensions for which `is_parameter` holds."""
    for node in ancestors(starts):
        if node.op == "placeholder" and is_parameter(node) and len(shape_of(node) or ()) >= 2:
            return node
    return None
