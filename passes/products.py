"""The two products of attention written out: queries by keys, and weights by values.

Each is seen as letters ("bhgstd") over the dimensions of its operands and its result: whatever
their order, folded or apart, with or without a dimension for query groups, by `matmul`, `bmm`,
`baddbmm` or `einsum`. `written_out` follows what lies between the two. Analysis only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loki_compile.kernels.fused import SCORES, Layout
from loki_compile.passes.attention import MaskTerm
from loki_compile.passes.calls import (
    concrete,
    einsum_terms,
    may_overlap,
    op_name,
    same_size,
    shape_of,
)
from loki_compile.passes.views import (
    CALLS,
    CASTS,
    TURNS,
    Step,
    View,
    operand_of_view,
    views_behind,
    widens,
)
from torch import fx

VIEWS = (*TURNS, "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")

# (operand, call that reads it).
Reads = list[tuple[fx.Node, fx.Node]]

# A call that scales queries -> the queries before it; None for another call.
Unscaled = Callable[[fx.Node], "fx.Node | None"]


@dataclass(frozen=True)
class ScoreProduct:
    """The product of queries and keys, with the layout of its result. `key_order` as in `Core`.

    Of two letters that only queries have, "x" and "y" in that order, one is new tokens and the
    other a group of heads; `group` is the one that must be the group, if it can be told.
    """

    query: fx.Node
    query_layout: Layout
    key: fx.Node
    key_order: tuple[int, int, int, int]
    layout: Layout
    sizes: dict[str, Any]
    group: str = ""

    def names(self, masks: Sequence[MaskTerm]) -> dict[str, str] | None:
        """What "x" and "y" are; None if that cannot be told, or masks say otherwise."""
        if "x" not in self.sizes:
            return {}
        varying = [c for c in "xy" if any(term.varies(c) for term in masks)]
        single = [c for c in "xy" if concrete(self.sizes[c]) == 1]
        if self.group:
            tokens = "y" if self.group == "x" else "x"
        elif len(single) == 1:
            (tokens,) = single
        elif len(varying) == 1:  # a mask that says the same of all tokens has none to hide
            (tokens,) = varying
        else:
            return None
        group = "y" if tokens == "x" else "x"
        if varying == [group] and tokens not in single:
            return None
        return {tokens: "s", group: "g"}


@dataclass(frozen=True)
class ValueProduct:
    """The product of weights and values, with the layout of its result."""

    value: fx.Node
    value_order: tuple[int, int, int, int]
    layout: Layout


def without_ones(letters: str, sizes: dict[str, Any]) -> str:
    """The letters without those of size one, which may be anywhere."""
    return "".join(letter for letter in letters if concrete(sizes[letter]) != 1)


def after_view(layout: Layout, view: fx.Node, sizes: dict[str, Any]) -> Layout | None:
    """The layout behind a call that turns, splits or joins dimensions; None if it mixes them."""
    letters = "".join(layout)
    dims = tuple(tuple(Step(letters.index(c), sizes[c]) for c in held) for held in layout)
    seen = CALLS[op_name(view)](view, View(view, dims, (0,) * len(letters)))
    if seen is None:
        return None
    steps = [step for dim in seen.dims for step in dim]
    if any(s.axis is None or not same_size(s.size, sizes[letters[s.axis]]) for s in steps):
        return None
    after = ["".join(letters[s.axis] for s in dim if s.axis is not None) for dim in seen.dims]
    after[-1] += "".join(c for c in letters if c not in "".join(after))  # of size one
    return tuple(after)


def queries_by_keys(
    query: Any, key: Any, product: fx.Node, reads: Reads, unscaled: Unscaled
) -> ScoreProduct | None:
    """The product's queries and keys, before they are folded or given a dimension for groups.

    Which call reads what is noted in `reads`; `unscaled` goes behind a call that scales queries.
    """
    if op_name(product) == "einsum":
        return _einsum_of_keys(product, reads)
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return None
    shapes = [tuple(shape_of(node) or ()) for node in (query, key, product)]
    rank = len(shapes[2])
    if len(shapes[1]) != rank:
        return None
    if rank == 5 and len(shapes[0]) == rank:
        found = _before_group(key, product, reads)
        if found is None or found[1].index(-1) > 2:
            return None
        source, order = found
        at = [d for d in range(3) if order[d] >= 0]
        batch = ["g"] * 3
        batch[at[0]], batch[at[1]] = "b", "h"
        sizes = dict(zip((*batch, "s", "d"), shapes[0], strict=True))
        if not all(map(same_size, shapes[0][:4], shapes[2][:4])):
            return None
        reads.append((query, product))
        return ScoreProduct(
            query=query,
            query_layout=(*batch, "s", "d"),
            key=source,
            key_order=(order[at[0]], order[at[1]], order[4], order[3]),
            layout=(*batch, "s", "t"),
            sizes={**sizes, "t": shapes[2][4]},
        )
    queries = _queries(query, product, reads, unscaled)
    keys = _operand(key, (0, 1, 3, 2), product, reads)
    if queries is None or keys is None:
        return None
    sizes = dict(zip(queries[1], shape_of(queries[0]) or (), strict=True))
    sizes["t"] = shapes[2][-1]
    layout: Layout = SCORES if rank == 4 else ("bh", "s", "t")
    if len(layout) != rank or any(
        not same_size(math.prod(sizes[c] for c in held), size)
        for held, size in zip(layout, shapes[2], strict=True)
    ):
        return None
    return ScoreProduct(*queries, *keys, layout, sizes)


def _einsum_of_keys(product: fx.Node, reads: Reads) -> ScoreProduct | None:
    """A product whose keys lack letters that the queries have, or all rows of queries."""
    found = einsum_terms(product)
    if found is None:
        return None
    (*terms, out), factors = found
    keys = 0 if out[-1] in terms[0] else 1
    q_term, k_term = terms[1 - keys], terms[keys]
    query, key = factors[1 - keys], factors[keys]
    batch = [c for c in k_term if c in q_term and c in out]
    tokens = [c for c in k_term if c not in q_term]
    summed = [c for c in q_term if c in k_term and c not in out]
    rows = [c for c in q_term if c not in k_term]
    if tokens != [out[-1]] or len(summed) != 1 or len(batch) not in (1, 2) or len(rows) > 2:
        return None
    if sorted(out) != sorted([*batch, *rows, *tokens]) or (len(batch) == 1 and len(rows) < 2):
        return None
    name = dict(zip((*batch, *summed, *tokens), "bhdt"[: len(batch)] + "dt", strict=True))
    name |= dict(zip(rows, "s" if len(rows) == 1 else "xy", strict=False))
    layouts = [tuple(name[c] for c in term) for term in (q_term, k_term, out)]
    sizes = dict(zip(layouts[1], shape_of(key) or (), strict=True))
    for letter, size in zip(layouts[0], shape_of(query) or (), strict=True):
        if not same_size(sizes.setdefault(letter, size), size):
            return None
    group = ""
    if len(rows) == 2 and len(batch) == 2:  # heads are split into KV heads and their groups
        at = layouts[0].index("h")
        beside = [*layouts[0][at + 1 : at + 2], *layouts[0][max(at - 1, 0) : at]]
        group = next((c for c in beside if c in "xy"), "")
        if not group:
            return None
    reads += [(query, product), (key, product)]
    b, h, t, d = (layouts[1].index(c) if c in layouts[1] else -1 for c in "bhtd")
    return ScoreProduct(query, layouts[0], key, (b, h, t, d), layouts[2], sizes, group)


def weights_by_values(
    product: fx.Node, read: fx.Node, weights: Layout, sizes: dict[str, Any], reads: Reads
) -> ValueProduct | None:
    """The values of the last product, which reads the weights `read`, and how its result is laid
    out."""
    if op_name(product) == "einsum":
        return _einsum_of_values(product, read, weights, sizes, reads)
    held = [without_ones(letters, sizes) for letters in weights]
    value = product.args[1] if len(product.args) > 1 else None
    rank = len(weights)
    if op_name(product) not in ("matmul", "bmm") or not isinstance(value, fx.Node):
        return None
    if len(shape_of(value) or ()) != rank or rank not in (3, 4, 5) or held[-1] != "t":
        return None
    out = (*weights[:-1], "d")
    batch = held[:-2]
    if rank == 3:
        found = _operand(value, (0, 1, 2, 3), product, reads)
        if found is None or batch != [without_ones("bh", sizes)]:
            return None
        return ValueProduct(*found, out)
    # One KV head may have the group's dimension of size one.
    heads = ("bh", "bg") if rank == 4 else ("bhg",)
    for letters in (order for term in heads for order in itertools.permutations(term)):
        if batch != [without_ones(c, sizes) if c in sizes else "" for c in letters]:
            continue
        source, order = value, list(range(rank))
        if rank == 5:
            before = _before_group(value, product, reads)
            if before is None or before[1][letters.index("g")] != -1:
                continue
            source, order = before
        at = dict(zip((*letters, "t", "d"), order, strict=True))
        if "h" not in at and concrete((shape_of(value) or ())[at["g"]]) != 1:
            continue
        reads.append((source, product))
        return ValueProduct(source, (at["b"], at.get("h", at.get("g", -1)), at["t"], at["d"]), out)
    return None


def _einsum_of_values(
    product: fx.Node, read: fx.Node, weights: Layout, sizes: dict[str, Any], reads: Reads
) -> ValueProduct | None:
    found = einsum_terms(product)
    if found is None:
        return None
    (*terms, out), factors = found
    at = factors.index(read)
    value, term = factors[1 - at], terms[1 - at]
    held = dict(zip(terms[at], weights, strict=True))
    summed = [c for c in terms[at] if c not in out]
    dims = [c for c in term if c not in held]
    if value is read or len(summed) != 1 or len(dims) != 1 or dims[0] not in out:
        return None
    if summed[0] not in term or without_ones(held[summed[0]], sizes) != "t":
        return None
    held |= {summed[0]: "t", dims[0]: "d"}
    order = {held[c]: place for place, c in enumerate(term)}
    if set(order) - {"b", "h", "t", "d"} or len(order) < len(term) or "b" not in order:
        return None
    shape = shape_of(value) or ()
    if any(c in order and not same_size(shape[order[c]], sizes[c]) for c in "bh"):
        return None
    reads.append((value, product))
    return ValueProduct(
        value,
        (order["b"], order.get("h", -1), order["t"], order["d"]),
        tuple(held[c] for c in out),
    )


def is_batched(product: fx.Node) -> bool:
    """Whether the second factor differs between sequences, as keys do, and no weights."""
    factors = einsum_terms(product)
    second = factors[1][1] if factors else product.args[-1]
    return len(shape_of(second) or ()) > 2


def _four_dims(node: fx.Node, product: fx.Node, reads: Reads) -> View | None:
    """A factor of the product as a view of the nearest 4-D tensor behind it, all of that.

    Copies on the way read what they copy, and nothing may be written into them.
    """

    def behind(call: fx.Node) -> fx.Node | None:
        return operand_of_view(call) if op_name(call) not in CASTS or widens(call) else None

    view = next((view for view in views_behind(node, behind) if len(view.starts) == 4), None)
    if view is None or view.cut:
        return None
    copies = [step for step in view.walked if not may_overlap(step, view.source)]
    reads += [(view.source, (*copies, product)[0]), *((copy, copy) for copy in copies)]
    return view


def _before_group(
    node: fx.Node, product: fx.Node, reads: Reads
) -> tuple[fx.Node, list[int]] | None:
    """Behind a 5-D operand that has a dimension for groups: the 4-D tensor without it, and the
    dimension there of each of the five, -1 for the group's."""
    view = _four_dims(node, product, reads)
    if view is None:
        return None
    steps = [view.factors(dim) for dim in range(5)]
    spread = [dim for dim in range(5) if any(step.axis is None for step in steps[dim])]
    if len(spread) > 1 or any(len(held) > 1 for held in steps):
        return None
    order = [held[0].axis if held else None for held in steps]
    free = [dim for dim in range(5) if order[dim] is None]
    left: list[int | None] = [axis for axis in range(4) if axis not in order]
    if len(free) != len(left) + 1:
        return None
    # Of several that may be the group's, all are of size one: any will do.
    group = [*spread, *(dim for dim in free if not view.dims[dim]), *free][0]
    for dim in free:
        order[dim] = -1 if dim == group else left.pop(0)
    return view.source, [axis for axis in order if axis is not None]


def _queries(
    query: Any, product: fx.Node, reads: Reads, unscaled: Unscaled
) -> tuple[fx.Node, Layout] | None:
    """The 4-D queries behind an operand of the product."""
    order = (0, 1, 2, 3)
    while isinstance(query, fx.Node) and len(shape_of(query) or ()) == 3:
        found = _before_fold(query, (0, 1, 2), product, reads)
        if found is not None:
            query, order = found
            break
        query = unscaled(query)
    else:
        if not isinstance(query, fx.Node) or len(shape_of(query) or ()) != 4:
            return None
        reads.append((query, product))
    letters = dict(zip(order, "bhsd", strict=True))
    return query, tuple(letters[dim] for dim in range(4))


def _operand(
    node: Any, at: tuple[int, int, int, int], product: fx.Node, reads: Reads
) -> tuple[fx.Node, tuple[int, int, int, int]] | None:
    """The 4-D keys or values behind an operand of a product, and where their dimensions are.

    at: the dimensions of batch, heads, tokens and head_dim where the operand is 4-D.
    """
    if not isinstance(node, fx.Node):
        return None
    rank = len(shape_of(node) or ())
    if rank == 4:
        reads.append((node, product))
        return node, at
    return _before_fold(node, (0, at[2] - 1, at[3] - 1), product, reads) if rank == 3 else None


def _before_fold(
    node: fx.Node, at: tuple[int, int, int], product: fx.Node, reads: Reads
) -> tuple[fx.Node, tuple[int, int, int, int]] | None:
    """From a 3-D operand of a batched product back to its 4-D self.

    at: the dimensions of `node` that are batch and heads in one, tokens, head_dim. Returns the 4-D
    node and its dimensions of batch, heads, tokens, head_dim.
    """
    view = _four_dims(node, product, reads)
    if view is None:
        return None
    fold, *others = ([step.axis for step in view.factors(dim) or view.dims[dim][:1]] for dim in at)
    raw = [step.axis for step in view.dims[at[0]]]
    left: list[int | None] = [
        axis for axis in range(4) if all(axis not in held for held in (fold, *others))
    ]
    if len(fold) < 2:
        fold = raw if len(raw) == 2 else sorted([*fold, *left[: 2 - len(fold)]], key=str)
    order = [axis for held in (fold, *others) for axis in held if axis is not None]
    if set(order) != set(range(4)) or [len(held) for held in (fold, *others)] != [2, 1, 1]:
        return None
    return view.source, (order[0], order[1], order[2], order[3])
