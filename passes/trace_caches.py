"""From a site's keys back to the cache they are read from, and to every write into that cache.

In a mutated cache K is the placeholder itself and the write has no users, so writes are found among
the placeholder's users, never by walking back from the attention core. Analysis only: nothing here
edits a graph.
"""

from __future__ import annotations

from typing import Any

from loki_compile.passes.attention import AttentionSite, Heads, No, Reason, Skipped
from loki_compile.passes.caches import CacheWrite, KeyCache
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    may_overlap,
    mutates,
    op_name,
    operand,
    shape_of,
    source_name,
)
from loki_compile.passes.views import (
    TURNS,
    identity,
    operand_of_view,
    splits_heads,
    through,
)
from loki_compile.passes.write_forms import (
    FORMS,
    REPLACING,
    Stored,
    batch_axis_of,
    head_axis_of,
    mirrorable,
)
from torch import fx

_FUNCTIONAL_WRITES = ("cat", *REPLACING)
_BY_SIZE = ("reshape", "flatten", "unflatten", "squeeze")
_SHARE_MEMORY = (
    *TURNS, *_BY_SIZE, "unsqueeze", "narrow", "select", "getitem", "detach", "alias",
)  # fmt: skip
_REARRANGEMENTS = (
    "reshape", "to", "float", "type", "repeat", "repeat_interleave", "flatten", "unflatten",
    "getitem", "transpose", "permute", "movedim", "expand", "unsqueeze", "squeeze", "select",
    "narrow", "flip", "roll", "index_select", "gather", "contiguous", "clone", "detach",
)  # fmt: skip


def trace_cache(site: AttentionSite, all_writes: list[Write]) -> KeyCache | Skipped:
    """The cache that the site's keys are read from, or the reason why there is none to index.

    all_writes: `writes_of` the site's graph.
    """
    try:
        return _traced(site, all_writes)
    except No as no:
        return no.skipped(site.node, site.path)


def _traced(site: AttentionSite, all_writes: list[Write]) -> KeyCache:
    root, order, views = _root_of(site.key, all_writes)
    if order[3] != len(shape_of(root) or ()) - 1 or not (
        _rows_lie_together(site.key) and _rows_lie_together(site.value)
    ):
        raise No(Reason.NON_CONTIGUOUS_HEAD_DIM, tuple(shape_of(root) or ()))
    labels = _labels(root, order, site)
    trace = _replaced if op_name(root) in _FUNCTIONAL_WRITES else _mutated
    past, writes, output, leaves = trace(root, labels, site)
    known = {write.node for write in writes}
    for write in all_writes:
        touched = [node for node in (past, root) if may_overlap(write.operand, node)]
        if touched and write.call not in known:
            raise No(Reason.WRITE, op_name(write.call), "its effect is not known")
    if any(may_overlap(write.source, past) for write in writes):
        raise No(Reason.WRITE, op_name(writes[0].node), "it moves keys within the cache")
    return KeyCache(
        past=past,
        root=root,
        views=views,
        writes=writes,
        head_axis=-1 if order[1] is None else order[1],
        token_axis=order[2],
        source=source_name(past) or past.name,
        output=output,
        leaves=leaves,
        batch_axis=-1 if order[0] is None else order[0],
    )


def _root_of(key: Heads, all_writes: list[Write]) -> tuple[fx.Node, list[Any], tuple[fx.Node, ...]]:
    """The tensor that a site's keys are views of, its dimensions of batch, heads, tokens and
    head_dim (heads and head_dim may be one; None: it has none), and the views between."""
    order: list[Any] = list(key.order)
    node, views = key.base, []
    while node.op != "placeholder" and op_name(node) not in _FUNCTIONAL_WRITES:
        last = len(shape_of(node) or ()) - 1
        apart = splits_heads(node) and (order[1], order[3]) == (last - 1, last)
        dims = [*range(last), last - 1] if apart else view_dims(node)
        if dims is None:
            raise No(*_why_not_a_view(node, all_writes))
        order = [d if d is None or d < 0 else dims[d] for d in order]
        if order[2] is None or order[3] is None:
            raise No(Reason.OPAQUE_VIEW, op_name(node))
        if not mutates(node):
            views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    rank = len(shape_of(node) or ())
    if op_name(node) == "cat" and operand(node, "dim", 0) % rank == order[3]:
        raise No(*_why_not_a_view(node, all_writes))  # parts of keys, not past and new keys
    return node, order, tuple(reversed(views))


def _labels(root: fx.Node, order: list[Any], site: AttentionSite) -> list[Any]:
    """What each dimension of a cache is ("B", "H", "T", "D"), which must hold the site's keys and
    nothing else; None for one of size one."""
    sizes = [concrete(size) for size in shape_of(root) or ()]
    labels: list[Any] = [None] * len(sizes)
    for label, dim in zip("BHTD", order, strict=True):
        if dim is not None and dim >= 0:
            labels[dim] = label
    shared = [dim for dim, size in enumerate(sizes) if labels[dim] is None and size != 1]
    folded = order[1] == len(sizes) - 1
    width = site.head_dim * site.kv_heads if folded else site.head_dim
    if shared or sizes[-1] != width or ("H" in labels and sizes[order[1]] != site.kv_heads):
        raise No(Reason.SHARED_TENSOR, tuple(shape_of(root) or ()))
    return labels


def _replaced(
    node: fx.Node, labels: list[Any], site: AttentionSite
) -> tuple[fx.Node, tuple[CacheWrite, ...], int, tuple[fx.Node, ...]]:
    """The cache is rebuilt by one call from a placeholder and the new keys, and returned."""
    if op_name(node) == "cat":
        tensors = operand(node, "tensors")
        dim = operand(node, "dim", 0) % len(labels)
        if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or labels[dim] != "T":
            raise No(Reason.WRITE, "cat", "not (past, new) along the key dimension")
        past, stored = tensors[0], Stored(tensors[1], labels, None)
    else:
        past, stored = node.args[0], FORMS[op_name(node)](node, labels)
    if not isinstance(past, fx.Node) or past.op != "placeholder":
        raise No(Reason.NO_CACHE, op_name(node))
    if len(shape_of(past) or ()) != len(labels):
        raise No(Reason.WRITE, op_name(node), "the past has other dimensions")
    source, target = stored.source, stored.target
    head_axis = head_axis_of(source, target, site)
    if head_axis is None:
        raise No(Reason.WRITE, op_name(node), "the new keys do not line up with the cache")
    left = _way_out(node)
    if left is None:
        users = ", ".join(sorted({op_name(user) or user.op for user in node.users}))
        raise No(Reason.CACHE_LEAVES, f"its users are {users}")
    batch_axis = batch_axis_of(source, target, past, labels)
    return (
        past,
        (CacheWrite(node, source, head_axis, fill=stored.fill, batch_axis=batch_axis),),
        *left,
    )


def _way_out(node: fx.Node) -> tuple[int, tuple[fx.Node, ...]] | None:
    """Where a replaced cache leaves the graph: its place among the outputs, and the slices before.

    A cache that leaves more than once, or whose slice is followed by other views, is not followed.
    """
    outputs = list(node.graph.output_node().args[0])  # type: ignore[arg-type]
    slices = [
        user
        for user in node.users
        if op_name(user) == "getitem"
        and view_dims(user) == list(range(len(shape_of(node) or ())))
        and user in outputs
    ]
    ways: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, ())] if node in outputs else []
    ways += [(user, (user,)) for user in slices]
    if len(ways) != 1 or outputs.count(ways[0][0]) != 1:
        return None
    return outputs.index(ways[0][0]), ways[0][1]


def _mutated(
    root: fx.Node, labels: list[Any], site: AttentionSite
) -> tuple[fx.Node, tuple[CacheWrite, ...], None, tuple[fx.Node, ...]]:
    """The writes into a placeholder that can be mirrored, through any of its views, in order."""
    writes: list[CacheWrite] = []
    aliases: list[tuple[fx.Node, tuple[fx.Node, ...], list[Any]]] = [(root, (), labels)]
    for alias, views, at in aliases:
        for user in alias.users:
            first = user.args[0] if user.args else None
            if first is not alias:
                continue
            if mutates(user):
                writes.append(mirrorable(user, views, at, labels, site))
                aliases.append((user, views, at))
                continue
            dims = view_dims(user)
            if dims is not None:
                after = [None if d is None else at[d] for d in dims]
                aliases.append((user, (*views, user), after))
    position = {node: i for i, node in enumerate(root.graph.nodes)}
    writes.sort(key=lambda write: position[write.node])
    return root, tuple(writes), None, ()


def _rows_lie_together(heads: Heads) -> bool:
    """Whether a key or value row is one run of memory, as the kernels need it."""
    value = fake_value(heads.base)
    return value.shape[heads.order[3]] == 1 or concrete(value.stride(heads.order[3])) == 1


def view_dims(node: fx.Node) -> list[int | None] | None:
    """For a view of a cache: the input dimension that each output one is (None: new); else None.

    A view shares memory, takes rows whole and joins or splits no dimensions, so that whatever has
    the cache's dimensions but the last can be seen in the same way. A call that writes into its
    first operand returns that operand: it is a view as well.
    """
    source = node.args[0] if node.args else None
    if mutates(node) and isinstance(source, fx.Node) and shape_of(node) is not None:
        return list(range(len(shape_of(node) or ())))
    source, name = operand_of_view(node), op_name(node)
    if source is None or name not in _SHARE_MEMORY or source is not node.args[0]:
        return None
    if name == "squeeze" and not isinstance(operand(node, "dim"), int):
        return None  # another last dimension may be of size one
    view, last = through(node, identity(source)), len(shape_of(source) or ()) - 1
    if view is None or last in view.cut:
        return None
    dims = [view.axis(dim) for dim in range(len(view.dims))]
    if name in _BY_SIZE and dims[-1:] != [last]:
        return None
    known = [dim for dim in dims if dim is not None]
    new = [view.sizes[at] for at, dim in enumerate(dims) if dim is None]
    if len(set(known)) < len(known) or any(concrete(size) != 1 for size in new):
        return None
    return dims


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
