"""Finds every attention core of a graph: an `AttentionSite`, or `Skipped` with the reason.

What a core looks like in each spelling is not known here. Analysis only: nothing here edits a
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from loki_compile.passes import flash, flex, sdpa, written_out
from loki_compile.passes.attention import (
    MAX_QUERY_TOKENS,
    AttentionSite,
    Core,
    Heads,
    Latent,
    MaskTerm,
    No,
    Reason,
    Skipped,
)
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    hint_of,
    is_transformed,
    may_overlap,
    module_path,
    op_name,
    same_size,
    shape_of,
    writes_of,
)
from loki_compile.passes.heads import before_widening, heads_at
from loki_compile.passes.written_out import scores_that_leave
from torch import fx

_FLOATS = {torch.float32, torch.bfloat16, torch.float16}

# The call that a core is spelled around -> what it is: None where it is no attention.
SPELLINGS: dict[str, Callable[[fx.Node], Core | Skipped | None]] = {
    "scaled_dot_product_attention": sdpa.core_at,
    "softmax": written_out.core_at,
    "flex_attention": flex.core_at,
    flash.OP: flash.core_at,
}


def find_sites(
    graph: fx.Graph, *, max_query_tokens: int | None = MAX_QUERY_TOKENS
) -> tuple[list[AttentionSite], list[Skipped]]:
    """Every attention core of the graph, in order, as a site or with a reason.

    Cores with more than `max_query_tokens`, now or when they were traced, are skipped as prefill;
    None takes any number, and cores with `is_causal=True` as well: calibration observes prefills.
    """
    sites: list[AttentionSite] = []
    skipped: list[Skipped] = []
    writes = writes_of(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        spelling = SPELLINGS.get(op_name(node))
        core = spelling(node) if spelling else None
        if core is None:
            continue
        found: AttentionSite | Skipped
        if isinstance(core, Skipped):
            found = core
        else:
            before = [write for write in writes if write.position < order[core.node]]
            late = _written_after_reading(core, before, order)
            found = late or _site(core, max_query_tokens, before)
        if isinstance(found, AttentionSite):
            sites.append(found)
        else:
            skipped.append(found)
    skipped += scores_that_leave(graph)
    return sites, skipped


def _written_after_reading(
    core: Core, writes: list[Write], order: dict[fx.Node, int]
) -> Skipped | None:
    """Refuses a core whose operands change between the call that reads them and its last one.

    The ops read all of them at the core's node, where attention written out reads its values.
    """
    for operand_, reader in core.reads:
        for write in writes:
            if write.position > order[reader] and may_overlap(write.operand, operand_):
                details = (f"a write by `{op_name(write.call)}` after its operand was read",)
                return Skipped(core.node, Reason.SOFTMAX, details, module_path(core.node))
    return None


def _site(core: Core, max_query_tokens: int | None, writes: list[Write]) -> AttentionSite | Skipped:
    try:
        return _looked_into(core, max_query_tokens, writes)
    except No as no:
        return no.skipped(core.node, module_path(core.node))


def _looked_into(core: Core, max_query_tokens: int | None, writes: list[Write]) -> AttentionSite:
    if is_transformed(core.node):
        raise No(Reason.TRANSFORM, op_name(core.node))
    sizes, k_shape, v_shape = _sizes(core)
    _refuse_prefill(core, sizes["s"], max_query_tokens)
    key = heads_at(core.key, core.key_order, core, writes, scaled=True)
    # Values that are repeated more often than keys stay so: a copy of them is what is attended to.
    value = heads_at(core.value, core.value_order, core, writes, most=key.group)
    query = before_widening(core.query)
    _refuse_dtypes(core, query, key, value)
    q_shape = (sizes["b"], sizes["h"] * sizes["g"], sizes["s"], sizes["d"])
    shapes = q_shape, k_shape, v_shape
    heads, head_dim, group_dim, kv_heads, value_dim = _constants(
        (q_shape[1], q_shape[3], sizes["g"], k_shape[1], v_shape[3]), shapes
    )
    if not same_size(q_shape[0], k_shape[0]) or not same_size(q_shape[0], v_shape[0]):
        raise No(Reason.LAYOUT, f"batch {[shape[0] for shape in shapes]}")
    group = _group(core, (key, value), (heads, group_dim), (kv_heads, v_shape[1]))
    # Whoever observes heads takes them to be in blocks.
    if key.interleaved and max_query_tokens is None:
        raise No(Reason.GROUPS, "KV heads are repeated as tiles")
    _refuse_masks(core, {**sizes, "t": k_shape[2]})
    q_pe, latent = None, None
    if core.second_product is not None:
        query, key, q_pe, latent = _rows_of_two_products(core, (query, key), value, writes)
        if kv_heads != 1 or value_dim != latent.kv_lora_rank:
            raise No(Reason.SOFTMAX, "add")
        head_dim = latent.kv_lora_rank + latent.k_pe_dims
    tokens = concrete(q_shape[2])
    return AttentionSite(
        core=core,
        query=query,
        key=key,
        value=value,
        scale=(head_dim**-0.5 if core.scale is None else float(core.scale)) * key.factor,
        query_heads=heads,
        kv_heads=heads // group,
        query_tokens=-1 if tokens is None else tokens,
        head_dim=head_dim,
        value_dim=value_dim,
        path=module_path(core.node),
        group=group,
        interleaved=key.interleaved,
        latent=latent,
        q_pe=q_pe,
        group_dim=group_dim,
    )


def _sizes(core: Core) -> tuple[dict[str, Any], tuple[Any, ...], tuple[Any, ...]]:
    """The sizes of a core's queries by letter, and (B, heads, T, dims) of its keys and values."""
    shapes = [shape_of(x) for x in (core.query, core.key, core.value)]
    orders = (core.query_layout, core.key_order, core.value_order)
    if any(
        shape is None or len(shape) != len(order) - order.count(-1)  # type: ignore[arg-type]
        for shape, order in zip(shapes, orders, strict=True)
    ):
        raise No(Reason.LAYOUT, [None if shape is None else tuple(shape) for shape in shapes])
    sizes = dict(zip(core.query_layout, shapes[0] or (), strict=True))
    k_shape, v_shape = (
        tuple(1 if d < 0 or shape is None else shape[d] for d in order)
        for shape, order in zip(shapes[1:], (core.key_order, core.value_order), strict=True)
    )
    return {letter: sizes.get(letter, 1) for letter in "bhgsd"}, k_shape, v_shape


def _constants(sizes: Sequence[Any], shapes: Sequence[tuple[Any, ...]]) -> list[int]:
    """Sizes that no call may change, of a core with these shapes."""
    known = [number for size in sizes if (number := concrete(size)) is not None]
    if len(known) < len(sizes):
        raise No(Reason.LAYOUT, list(shapes))
    return known


def _refuse_prefill(core: Core, tokens: Any, most: int | None) -> None:
    seen = hint_of(tokens)
    if most is not None and (seen is None or seen > most or core.causal):
        raise No(Reason.PREFILL, tokens)


def _refuse_dtypes(core: Core, query: fx.Node, key: Heads, value: Heads) -> None:
    read = (query, key.base, value.base, core.node, *(by for _, by in core.query_scales))
    dtypes = {fake_value(x).dtype for x in read}
    if not dtypes <= _FLOATS:
        raise No(Reason.DTYPE, ", ".join(sorted(map(str, dtypes))))


def _refuse_masks(core: Core, sizes: dict[str, Any]) -> None:
    for term in core.masks:
        if not _broadcasts(term, sizes):
            raise No(Reason.MASK, tuple(shape_of(term.node) or ()))
    if core.row_sinks and all(term.per_row for term in core.masks):
        raise No(Reason.SOFTMAX, "cat")  # no mask says which keys the sink is subtracted for


def _group(
    core: Core,
    operands: tuple[Heads, Heads],
    query_heads: tuple[int, int],
    kv_heads: tuple[int, Any],
) -> int:
    """Query heads for each KV head.

    operands: keys and values, behind their repetition; query_heads: how many, and how many of these
    lie along a dimension of groups; kv_heads: of the core's own keys, and of its values.
    """
    (key, value), (heads, group_dim) = operands, query_heads
    # K may already be grouped by views (`repeat_kv`), by the flag, by a dimension of its own, or by
    # broadcasting one head.
    by_flag = heads // kv_heads[0] if kv_heads[0] and heads % kv_heads[0] == 0 else 0
    spread = by_flag > group_dim and kv_heads[0] > 1 and not core.grouped
    if by_flag < group_dim or by_flag < 1 or spread:
        raise No(Reason.GROUPS, f"{heads} query heads, {kv_heads[0]} KV heads")
    alike = (key.group, key.interleaved) == (value.group, value.interleaved)
    if not same_size(*kv_heads) or not alike:
        raise No(Reason.GROUPS, "keys and values are repeated differently")
    if key.interleaved and by_flag > 1:
        raise No(Reason.GROUPS, "KV heads are repeated as tiles of blocks")
    return by_flag * key.group


def _rows_of_two_products(
    core: Core, first: tuple[fx.Node, Heads], value: Heads, writes: list[Write]
) -> tuple[fx.Node, Heads, fx.Node, Latent]:
    """Queries and rows of a latent that is the values too, and queries and rows of what lies beside
    it, for a core of two products, whose keys must be such rows of the same tokens."""
    assert core.second_product is not None
    query, key, order = core.second_product
    pairs = [first, (before_widening(query), heads_at(key, order, core, writes, scaled=True))]
    if pairs[0][1].base is not value.base:
        pairs.reverse()
    (query, key_), (q_pe, k_pe) = pairs
    plain = all((h.group, h.factor, h.interleaved) == (1, 1.0, False) for h in (key_, k_pe))
    shapes = [_ordered_shape(heads) for heads in (key_, k_pe)]
    dims, k_pe_dims = concrete(shapes[0][3]), concrete(shapes[1][3])
    alike = all(map(same_size, shapes[0][:3], shapes[1][:3])) and concrete(shapes[0][1]) == 1
    dtypes = {fake_value(x).dtype for x in (query, q_pe, key_.base, k_pe.base)}
    same_rows = (key_.base, key_.order) == (value.base, value.order)
    if not (same_rows and plain and alike) or dims is None or k_pe_dims is None or len(dtypes) > 1:
        raise No(Reason.SOFTMAX, "add")
    return query, key_, q_pe, Latent(None, None, dims, 0, dims, k_pe_dims, k_pe)


def _ordered_shape(heads: Heads) -> tuple[Any, ...]:
    shape = shape_of(heads.base) or ()
    return tuple(1 if dim < 0 else shape[dim] for dim in heads.order)


def _broadcasts(term: MaskTerm, sizes: dict[str, Any]) -> bool:
    if term.rule is not None:
        return True
    mask, shape = term.node, shape_of(term.node)
    if shape is None or not 1 <= len(shape) <= len(term.layout):
        return False
    dtype = fake_value(mask).dtype
    if not (dtype == torch.bool or dtype.is_floating_point):
        return False
    for size, letters in zip(reversed(shape), reversed(term.layout), strict=False):
        target = math.prod(sizes[letter] for letter in letters)
        if "t" in letters and concrete(size) == 1 and concrete(target) != 1 and not term.per_row:
            return False  # a mask that broadcasts over keys says nothing per key
        # Keys and mask may name the same length by different symbols: the op compares real sizes.
        if concrete(size) != 1 and letters != "t" and not same_size(size, target):
            return False
        if "b" in letters and "t" in letters and concrete(size) != 1:
            return False
    # The key dimension must be whole.
    return any("t" in letters for letters in term.layout[-len(shape) :])
