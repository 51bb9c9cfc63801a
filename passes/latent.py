"""Keys and values that each step expands from a cached latent, as attention over the latent itself.

Multi-head latent attention caches a latent c per token, and a part r that all heads share, and
makes of them, in each step and for all tokens, keys k_h = W_h c ++ r and values v_h = U_h c. But

    q_h . k_h = (W_h' q_h) . c + q_h . r        sum_t p_t v_ht = U_h sum_t p_t c_t

so that queries which have absorbed W_h meet the cached rows c ++ r as one KV head, whose values
are c. `absorb` finds that form behind a site's keys and values by following views, concatenations
and copies into fresh tensors back to one linear map. Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from loki_compile.passes.attention import AttentionSite, HeadMaps, Heads, Latent, Reason, Skipped
from loki_compile.passes.caches import CacheWrite, KeyCache
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    may_overlap,
    op_name,
    operand,
    same_size,
    shape_of,
)
from loki_compile.passes.trace_caches import trace_cache
from loki_compile.passes.views import (
    CASTS,
    Step,
    View,
    identity,
    indexed,
    same_type,
    spread,
    view_of,
)
from torch import fx

_ALLOCATIONS = ("new_empty", "empty", "new_zeros", "zeros", "empty_like", "zeros_like")


class _No(Exception):
    """Not that form; the message ends the sentence of `Reason.LATENT`."""


def absorb(
    site: AttentionSite, writes: list[Write], dims: Any
) -> tuple[AttentionSite, KeyCache] | Skipped:
    """The site over its cached latent, and the cache of that; or why it is not of that form.

    writes: `writes_of` the site's graph; dims: the latent's, for the reason.
    """
    try:
        found = site if site.latent is not None else _Absorption(site, writes).result()
        return found, _cache_of(found, writes)
    except _No as no:
        return Skipped(site.node, Reason.LATENT, (dims, str(no)), site.path)


def over_rows(site: AttentionSite, writes: list[Write]) -> AttentionSite | None:
    """The site over the rows that its keys and values are expanded from, cached or not."""
    if site.latent is not None:
        return site
    try:
        return _Absorption(site, writes).result()
    except _No:
        return None


class _Absorption:
    def __init__(self, site: AttentionSite, writes: list[Write]) -> None:
        self.site, self.writes = site, writes
        self.position = {node: i for i, node in enumerate(site.node.graph.nodes)}
        self.computed: list[fx.Node] = []  # between the cached rows and the core
        self.fills: list[fx.Node] = []

    def result(self) -> AttentionSite:
        site = self.site
        if site.group != 1 or -1 in (*site.key.order, *site.value.order):
            raise _No("the heads that are made of it are repeated")
        value = self._ordered(_view_of(site.value.base), site.value)
        pieces = self._pieces()
        expanded = [(at, view) for at, view in pieces if _is_linear(view.source)]
        direct = [(at, view) for at, view in pieces if not _is_linear(view.source)]
        if len(expanded) != 1 or len(direct) > 1 or not _is_linear(value.source):
            raise _No(
                "not by one linear map without a bias, beside one part that is taken as it is"
            )
        ((absorbed_at, key),) = expanded
        rows, dims = self._rows(key, value)
        heads = _heads_of_rows(key, rows)
        if heads != _heads_of_rows(value, rows):
            raise _No("keys and values take its dimensions differently")
        k_pe_at, k_pe_dims, k_pe, at = _taken_as_it_is(direct, rows, heads, dims)
        latent = Latent(
            keys=self._maps(key, dims),
            values=self._maps(value, dims),
            kv_lora_rank=dims,
            absorbed_at=absorbed_at,
            k_pe_at=k_pe_at,
            k_pe_dims=k_pe_dims,
            k_pe=k_pe,
            at=at,
        )
        self._refuse_other_dtypes(latent, heads)
        self._refuse_writes_between(latent, heads)
        return dataclasses.replace(
            site,
            key=heads,
            value=heads,
            kv_heads=1,
            group=site.query_heads,
            head_dim=dims + k_pe_dims,
            value_dim=dims,
            latent=latent,
        )

    def _rows(self, key: View, value: View) -> tuple[View, int]:
        """The latent that both linear maps are of, as a view of its rows, and its dims."""
        latent = _input_of(key.source)
        seen, seen_by_values = _view_of(latent), _view_of(_input_of(value.source))
        self.computed += [key.source, value.source, *seen.walked, *seen_by_values.walked]
        if (seen.source, seen.dims, seen.starts) != (
            seen_by_values.source, seen_by_values.dims, seen_by_values.starts,
        ):  # fmt: skip
            raise _No("the values come from something else than the keys")
        # Views of the cache are `trace_cache`'s to follow; a slice of its rows is not.
        rows = identity(latent) if _whole(seen, -1) else seen
        return rows, concrete((shape_of(latent) or (0,))[-1]) or 0

    def _pieces(self) -> list[tuple[int, View]]:
        """What the keys' head_dim is put together from: first dim and (B, H, T, dims) of each."""
        base, last = self.site.key.base, self.site.key.order[3]
        if op_name(base) == "cat" and operand(base, "dim", 0) in (last, last - 4):
            self.computed.append(base)
            tensors: Any = operand(base, "tensors")
            pieces = [(0, _view_of(tensor)) for tensor in tensors]
        elif op_name(base) in _ALLOCATIONS:
            pieces = self._filled_pieces(base, last)
        else:
            pieces = [(0, _view_of(base))]
        ordered = [(at, self._ordered(view, self.site.key)) for at, view in pieces]
        if op_name(base) == "cat":
            sizes = [_concrete_size(view.dims[3]) for _, view in ordered]
            ordered = [(sum(sizes[:i]), view) for i, (_, view) in enumerate(ordered)]
        ordered.sort(key=lambda piece: piece[0])
        end = 0
        for at, view in ordered:
            if at != end:
                raise _No("the keys are not put together from whole parts")
            end += _concrete_size(view.dims[3])
        if end != self.site.head_dim:
            raise _No("the keys are not put together from whole parts")
        return ordered

    def _filled_pieces(self, base: fx.Node, last: int) -> list[tuple[int, View]]:
        """The parts that are copied into a fresh tensor."""
        pieces = []
        for write in self.writes:
            if not may_overlap(write.operand, base) or self._behind_core(write):
                continue
            target, source = _copied_into(write.call)
            if target is None or target.source is not base or shape_of(source) is None:
                raise _No(f"the keys are written by `{op_name(write.call)}`")
            if not all(_whole(target, dim) for dim in range(4) if dim != last):
                raise _No("the keys are not put together from whole parts")
            if fake_value(source).dtype != fake_value(base).dtype:
                raise _No("the keys are of another dtype")
            self.fills.append(write.call)
            view = spread(_view_of(source), target.sizes)
            if view is None or _concrete_size(target.dims[last]) != _concrete_size(view.dims[last]):
                raise _No("the keys are not put together from whole parts")
            pieces.append((_start(target, last), view))
        return pieces

    def _ordered(self, view: View, heads: Heads) -> View:
        """The view of `heads.base` with dimensions (B, H, T, last)."""
        self.computed += view.walked
        if len(view.dims) != 4:
            raise _No("keys and values are not 4-D")
        return dataclasses.replace(view, dims=tuple(view.dims[d] for d in heads.order))

    def _maps(self, view: View, dims: int) -> HeadMaps:
        """Which rows of the weight make (B, H, T, dims), for a view of the linear map's result."""
        node, heads = view.source, self.site.query_heads
        weight, columns = node.args[1], op_name(node) != "linear"
        shape = shape_of(weight) or ()
        if not isinstance(weight, fx.Node) or len(shape) != 2:
            raise _No("its linear map is not one matrix")
        if any(may_overlap(write.operand, weight) for write in self.writes):
            raise _No("its linear map is written into")
        count, width = concrete(shape[int(columns)]), concrete(shape[1 - int(columns)])
        features = len(shape_of(node) or ()) - 1
        steps, per_head = view.dims[1], view.dims[3]
        if count is None or width != dims or [s.axis for s in (*steps, *per_head)] != (
            [features] * (1 + (heads > 1))
        ) or any(concrete(s.size) != heads for s in steps):  # fmt: skip
            raise _No("its linear map does not make heads of dims in one order")
        size, first = _concrete_size(per_head), _start(view, features)
        block = steps[0].step if steps else count
        if per_head[0].step != 1 or block < size:
            raise _No("its linear map does not make heads of dims in one order")
        inside = 0 if first + heads * block <= count else first % block
        start = first - inside
        if inside + size > block or start + heads * block > count:
            raise _No("its linear map does not make heads of dims in one order")
        return HeadMaps(weight, columns, start, block, inside, size)

    def _refuse_other_dtypes(self, latent: Latent, heads: Heads) -> None:
        tensors = [heads.base, *(m.weight for m in (latent.keys, latent.values) if m is not None)]
        tensors += [latent.k_pe.base] if latent.k_pe is not None else []
        if {fake_value(node).dtype for node in tensors} != {fake_value(self.site.query).dtype}:
            raise _No("it is cached in another dtype than that of attention")

    def _behind_core(self, write: Write) -> bool:
        return write.position > self.position[self.site.node]

    def _refuse_writes_between(self, latent: Latent, heads: Heads) -> None:
        """What the core reads must be what the cached rows still say when it runs."""
        bases = [heads.base, *([latent.k_pe.base] if latent.k_pe is not None else [])]
        fresh = [n for n in self.computed if not any(may_overlap(n, base) for base in bases)]
        readers = [n for n in (*fresh, *self.fills, self.site.node) if n.op != "placeholder"]
        first_read = min(self.position[node] for node in readers)
        for write in self.writes:
            if write.call in self.fills or self._behind_core(write):
                continue
            late = write.position > first_read and any(
                may_overlap(write.operand, base) for base in bases
            )
            if late or any(
                write.position > self.position[node] and may_overlap(write.operand, node)
                for node in fresh
            ):
                raise _No(f"`{op_name(write.call)}` writes between the expansion and attention")


def _cache_of(site: AttentionSite, writes: list[Write]) -> KeyCache:
    """The cache of the rows; where they lie in two tensors, both caches as one."""
    latent = site.latent
    assert latent is not None
    k_pe = latent.k_pe
    if k_pe is None:
        cache = trace_cache(site, writes)
        if isinstance(cache, Skipped):
            raise _No(cache.sentence())
        return cache
    cache = trace_cache(dataclasses.replace(site, head_dim=latent.kv_lora_rank), writes)
    if isinstance(cache, Skipped):
        raise _No(cache.sentence())
    of_k_pe = dataclasses.replace(site, key=k_pe, value=k_pe, head_dim=latent.k_pe_dims)
    k_pe_cache = trace_cache(of_k_pe, writes)
    if isinstance(k_pe_cache, Skipped):
        raise _No(f"beside it, {k_pe_cache.sentence()}")
    if not _written_alike(cache, k_pe_cache):
        raise _No("the part beside it is cached in another way")
    return dataclasses.replace(cache, k_pe=k_pe_cache)


def _is_linear(node: fx.Node) -> bool:
    """Whether the call multiplies its first operand's last dimension by a matrix, no more."""
    if op_name(node) == "linear":
        bias = [*node.args[2:], *node.kwargs.values()]
        return len(node.args) >= 2 and all(operand is None for operand in bias)
    if op_name(node) != "matmul" or node.kwargs or len(node.args) != 2:
        return False
    return len(shape_of(node.args[0]) or ()) > 2 and len(shape_of(node.args[1]) or ()) == 2


def _input_of(linear: fx.Node) -> fx.Node:
    return linear.args[0]  # type: ignore[return-value]


def _heads_of_rows(view: View, rows: View) -> Heads:
    """The rows behind a view (B, H, T, last) of something that has the dimensions of `rows`."""
    batch, token = _axis(view, 0, rows), _axis(view, 2, rows)
    shape = shape_of(rows.source) or ()
    left = [dim for dim in range(len(shape) - 1) if dim not in (batch, token)]
    if batch is None and left:
        batch = left.pop(0)
    sizes = [concrete(shape[dim]) for dim in left]
    if token is None or batch is None or len(left) > 1 or any(size != 1 for size in sizes):
        raise _No("its tokens are not those of the keys")
    order = (batch, left[0] if left else -1, token, len(shape) - 1)
    return Heads(rows.source, order, group=1)


def _taken_as_it_is(
    direct: list[tuple[int, View]], rows: View, heads: Heads, dims: int
) -> tuple[int, int, Heads | None, int]:
    """What all heads take as it is beside a latent of so many dims (of keys: from which dim on, how
    many), the rows of it where these are a tensor of their own, and where in its rows the latent
    begins. No row may hold more."""
    k_pe_at, k_pe_dims, k_pe, at = 0, 0, None, 0
    if direct:
        ((k_pe_at, shared),) = direct
        if any(step.axis is not None for step in shared.dims[1]):
            raise _No("the part beside it differs between heads")
        beside = _heads_of_rows(shared, identity(shared.source))
        k_pe_dims, at = _concrete_size(shared.dims[3]), _start(rows, -1)
        if shared.source is not rows.source:
            k_pe = beside
        elif beside != heads or (at, _start(shared, -1)) not in ((0, dims), (k_pe_dims, 0)):
            raise _No("its rows hold more than it and the part beside it")
    held = [(heads, dims + k_pe_dims)] if k_pe is None else [(heads, dims), (k_pe, k_pe_dims)]
    if any(concrete((shape_of(tensor.base) or (0,))[-1]) != width for tensor, width in held):
        raise _No("its rows hold more than it and the part beside it")
    return k_pe_at, k_pe_dims, k_pe, at


def _axis(view: View, dim: int, rows: View) -> int | None:
    """The dimension of the rows' source that a whole dimension of the view is; None: size one."""
    if not view.dims[dim]:
        return None
    if not _whole_axis(view, dim):
        raise _No("its tokens are not those of the keys")
    axis = view.dims[dim][0].axis
    assert axis is not None
    if not _whole_axis(rows, axis):
        raise _No("its tokens are not those of the keys")
    return rows.dims[axis][0].axis


def _whole_axis(view: View, dim: int) -> bool:
    """Whether a dimension of the view is one of its source, from its first entry to its last."""
    steps = view.dims[dim]
    if len(steps) != 1 or steps[0].axis is None or steps[0].step != 1:
        return False
    whole = (shape_of(view.source) or ())[steps[0].axis]
    return view.starts[steps[0].axis] == 0 and same_size(steps[0].size, whole)


def _whole(view: View, dim: int) -> bool:
    """The same, of dimensions in the source's order; one of size one is whole as well."""
    axis = dim % len(view.dims)
    shape = shape_of(view.source) or ()
    if not view.dims[axis]:
        return len(shape) == len(view.dims) and concrete(shape[axis]) == 1
    return view.dims[axis][0].axis == axis + len(shape) - len(view.dims) and _whole_axis(view, axis)


def _start(view: View, axis: int) -> int:
    """Where a view begins in a dimension of its source."""
    start = view.starts[axis]
    if start is None:
        raise _No("where a part of it begins is not a constant")
    return start


def _concrete_size(steps: tuple[Step, ...]) -> int:
    """The size of a dimension that is one run of entries."""
    size = concrete(steps[0].size) if len(steps) == 1 and steps[0].axis is not None else None
    if size is None:
        raise _No("the keys are not put together from whole parts")
    return size


def _view_of(node: fx.Node) -> View:
    """Back through calls that only rearrange, to the first that does not."""
    view = view_of(node, _rearranges)
    return view.with_dims([view.factors(dim) for dim in range(len(view.dims))])


def _rearranges(node: fx.Node, view: View) -> bool:
    """Windows of the source's features are followed; one of its tokens is a view of a cache."""
    last = len(view.starts) - 1
    same = op_name(node) not in CASTS or same_type(node, node.args[0])  # type: ignore[arg-type]
    return same and view.cut <= {last} and (not view.starts or view.starts[last] is not None)


def _copied_into(call: fx.Node) -> tuple[View | None, Any]:
    """For a copy into a tensor: where it goes, and what it copies."""
    if op_name(call) == "copy_":
        return _view_of(call.args[0]), operand(call, "source")  # type: ignore[arg-type]
    if op_name(call) == "setitem":
        into = _view_of(call.args[0])  # type: ignore[arg-type]
        return indexed(into, operand(call, "index")), operand(call, "source")
    return None, None


# --- two caches that are written alike


def _written_alike(a: KeyCache, b: KeyCache) -> bool:
    """Whether both take their new rows by the same calls, at the same tokens."""
    if a.replaced != b.replaced or len(a.writes) != len(b.writes):
        return False
    pairs: dict[fx.Node, fx.Node] = {a.past: b.past, a.root: b.root}
    ways = ((a.views, b.views), (a.leaves, b.leaves))
    return all(_same_write(x, y, pairs) for x, y in zip(a.writes, b.writes, strict=True)) and all(
        _same_calls(x, y, pairs) for x, y in ways
    )


def _same_write(a: CacheWrite, b: CacheWrite, pairs: dict[fx.Node, fx.Node]) -> bool:
    if len(a.moved) != len(b.moved) or not _same_calls(a.views, b.views, pairs):
        return False
    for x, y in zip(a.moved, b.moved, strict=True):
        if isinstance(x, CacheWrite) != isinstance(y, CacheWrite):
            return False
        if isinstance(x, CacheWrite) and isinstance(y, CacheWrite):
            if not _same_write(x, y, pairs):
                return False
        elif not _same_calls((x,), (y,), pairs):  # type: ignore[arg-type]
            return False
    rows = [(shape_of(write.source) or ())[:-1] for write in (a, b)]
    if len(rows[0]) != len(rows[1]) or not all(map(same_size, *rows)):
        return False
    if a.source not in pairs:
        pairs[a.source] = b.source
    return _same_calls((a.node,), (b.node,), pairs)


def _same_calls(
    a: tuple[fx.Node, ...], b: tuple[fx.Node, ...], pairs: dict[fx.Node, fx.Node]
) -> bool:
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if op_name(x) != op_name(y) or x.kwargs.keys() != y.kwargs.keys():
            return False
        values = [(x.kwargs[key], y.kwargs[key]) for key in x.kwargs]
        if not _same(x.args, y.args, pairs) or not all(_same(*v, pairs) for v in values):
            return False
        pairs[x] = y
    return True


def _same(a: Any, b: Any, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Whether two operands are one, or counterparts in `pairs`, or known to be one number."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        numbers = [fake_value(node) for node in (a, b)]
        if all(isinstance(n, (int, torch.SymInt)) for n in numbers):
            return same_size(*numbers)
        return pairs.get(a, a) is b
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y, pairs) for x, y in zip(a, b, strict=True))
    if isinstance(a, slice) and isinstance(b, slice):
        ends = ((a.start, b.start), (a.stop, b.stop), (a.step, b.step))
        return all(_same(x, y, pairs) for x, y in ends)
    return type(a) is type(b) and bool(a == b)
