"""Attention written out: `matmul -> scale, cap, mask -> softmax -> matmul`, seen as one core.

From each softmax the chain is followed back to the product of queries and keys and forward to the
product with the values. What lies between is folded into the one form of a core: a scale, a soft
cap, masks and sink logits. Scores may be laid out in any way (`sites.Layout`): views on the way
are followed letter by letter. A softmax without both products (a router, a residual mixer) is no
attention. Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.fx_tools import (
    Write,
    concrete,
    einsum_terms,
    fake_value,
    may_overlap,
    module_path,
    op_name,
    operand,
    same_size,
    shape_of,
    writes_of,
)
from loki_compile.passes.sites import (
    SCORES,
    Core,
    Layout,
    MaskTerm,
    Reason,
    Skipped,
    before_fold,
    only_adds_dim,
    permutation,
    widens,
)
from torch import fx

_ADD = ("add", "add_", "iadd", "__add__", "__iadd__")
_MUL = ("mul", "mul_", "imul", "__mul__", "__imul__")
_DIV = ("div", "div_", "truediv", "itruediv", "true_divide", "__truediv__", "__itruediv__")
_SUB = ("sub", "sub_", "isub", "__sub__")
_PURE = ("eq", "ne", "__eq__", "__ne__", "lt", "le", "gt", "ge", "logical_not", "invert",
         "bitwise_not", "reshape", "unsqueeze", "tensor", "to", "bool")  # fmt: skip
_CASTS = ("to", "float", "type", "contiguous", "clone")
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")
_TURNS = ("transpose", "permute", "movedim")
_VIEWS = (*_TURNS, "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")

# A key whose logit is set to this has no weight beside any other: no visible logit is as low.
_HIDES = -1e7
# float32 keeps nothing of a score that is added to this.
_ABSORBS = -1e30


class _Scores:
    """What has been understood of the way from the product to the softmax, walking back."""

    def __init__(self) -> None:
        self.factor = 1.0  # of everything that lies further back
        self.floor = float("-inf")  # of everything that lies further back, after the factor
        self.masks: list[MaskTerm] = []
        self.softcap = 0.0
        self.query_scales: list[tuple[Callable[..., Any], fx.Node]] = []
        self.sinks: fx.Node | None = None
        self.row_sinks = False
        self.added: fx.Node | None = None  # a second product
        self.reads: list[tuple[fx.Node, fx.Node]] = []
        self.views: list[fx.Node] = []
        # How many of the views lie behind: each mask, and each step that goes by the last dimension
        # as that of keys.
        self.behind: list[int] = []
        self.by_keys: list[int] = []

    def add_mask(self, mask: fx.Node, reader: fx.Node, factor: float = 1.0, **more: Any) -> None:
        """Notes what the call `reader` adds to the scores, or hides of them.

        `factor` is that of `reader` alone; `more` are fields of a boolean mask's term."""
        term = MaskTerm(mask, factor * self.factor, **more)
        if self.floor > float("-inf"):
            floor = self.floor / term.factor
            if fake_value(mask).dtype == torch.bool:
                term = dataclasses.replace(term, fill=max(term.fill, floor))
            else:
                term = dataclasses.replace(term, floor=floor)
        self.masks.append(term)
        self.behind.append(len(self.views))
        self.reads.append((mask, reader))

    def lay_out(self, product: Layout, sizes: dict[str, Any], axis: int) -> Layout | str:
        """Gives each mask the layout of the scores that it meets, and returns that of the softmax.

        product: the layout that the scores begin with; axis: what the softmax sums. A string names
        what was not understood.
        """
        layouts = [product]
        for view in reversed(self.views):
            after = _after_view(layouts[-1], view, sizes)
            if after is None:
                return op_name(view)
            layouts.append(after)
        layouts.reverse()
        summed = [layouts[0][axis], *(layouts[number][-1] for number in self.by_keys)]
        if any(_held(letters, sizes) != "t" for letters in summed):
            return op_name(self.views[-1]) if self.views else "softmax"
        if self.sinks is not None and layouts[0] != SCORES:
            return "cat"
        self.masks = [
            dataclasses.replace(term, layout=layouts[number])
            for term, number in zip(self.masks, self.behind, strict=True)
        ]
        return layouts[0]

    def hide(self, fill: fx.Node, layout: Layout) -> bool:
        """Notes that `fill` sets weights in `layout` to zero; False unless a mask hides the same.

        A row that sees no key is zero then, whatever that mask fills with.
        """
        writes = writes_of(fill.graph)
        for i, term in enumerate(self.masks):
            same = term.layout == layout and _same_value(term.node, fill.args[1], writes)
            if term.inverted and same:
                self.masks[i] = dataclasses.replace(term, fill=float("-inf"))
                return True
        return False


def chain_core(softmax: fx.Node) -> Core | Skipped | None:
    """The core around a softmax, `Skipped` if it is attention but not understood, else None."""
    axis: Any = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    shape = shape_of(softmax)
    if not shape or axis is None:
        return None
    axis %= len(shape)
    out = _product_with_values(softmax)
    if out is None:
        return None
    node, steps, odd = out
    over_keys = axis == len(shape) - 1  # as nearly always; another dimension has to be seen to be

    def skip(reason: Reason, *details: Any) -> Skipped | None:
        return Skipped(node, reason, details, module_path(softmax)) if over_keys else None

    back = _straight_back(softmax, axis)
    if not any(op_name(node) in _PRODUCTS for node in back):
        scores_in = [node for node in back if node.op == "placeholder" and _like(node, softmax)]
        if not scores_in:
            return None
        return skip(Reason.BROKEN, f"come from another graph ({scores_in[0].name})")
    if odd:
        return skip(Reason.WEIGHTS_USED, odd)
    scores = _Scores()
    product = _fold(softmax.args[0], scores)
    if isinstance(product, str):
        return skip(Reason.SOFTMAX, product)
    trimmed = any(op_name(step) == "getitem" for step in steps)
    if trimmed != (scores.sinks is not None or scores.row_sinks):
        return skip(Reason.SOFTMAX, "a slice of the weights")
    factors = _factors(product, scores)
    if isinstance(factors, str):
        return skip(Reason.SOFTMAX, factors)
    first = _queries_by_keys(*factors, product, scores)
    second: _Second | None = None
    beside = None
    if first is not None:
        layout = scores.lay_out(first.layout, first.sizes, axis)
        if isinstance(layout, str):
            return skip(Reason.SOFTMAX, layout)
        over_keys = True
        beside = _second_product(scores, first)
        if (beside is None) != (scores.added is None):
            return skip(Reason.SOFTMAX, "add")
        first = _named(dataclasses.replace(first, layout=layout), scores)
    if first is not None:
        weights = _weights(first.layout, steps, scores, first.sizes)
        if isinstance(weights, fx.Node):
            return skip(Reason.SOFTMAX, op_name(weights))
        read = steps[-1] if steps else softmax
        second = _weights_by_values(node, read, weights, first.sizes, scores)
    masks = _with_deep_fills(scores.masks)
    if masks is None:
        return skip(Reason.SOFTMAX, "a fill beside other masks")
    if first is None or second is None:
        if not _is_batched(product) and any(op_name(step) in _VIEWS for step in steps):
            return None
        return skip(Reason.LAYOUT, f"{op_name(product)} of {tuple(shape_of(product) or ())}")
    # A softmax of nothing but -inf is NaN, unless a sink takes part or the weights are zeroed.
    zeroed = any(op_name(step) == "masked_fill" for step in steps)
    return Core(
        node=node,
        query=first.query,
        key=first.key,
        value=second.value,
        masks=tuple(reversed(masks)),
        scale=scores.factor,
        query_scales=tuple(scores.query_scales),
        key_order=first.key_order,
        value_order=second.value_order,
        softcap=scores.softcap,
        sinks=scores.sinks,
        row_sinks=scores.row_sinks,
        nan_rows=not zeroed and scores.sinks is None and not scores.row_sinks,
        reads=tuple(scores.reads),
        query_layout=first.query_layout,
        out_layout=second.layout,
        beside=beside,
    )


def _second_product(
    scores: _Scores, first: _First
) -> tuple[fx.Node, fx.Node, tuple[int, int, int, int]] | None:
    """Queries, keys and their order of the product that is added, if it is laid out alike."""
    if scores.added is None:
        return None
    operands = [*scores.added.args[:2], None]
    other = _queries_by_keys(operands[0], operands[1], scores.added, scores)
    if other is None or (other.query_layout, other.layout) != (first.query_layout, first.layout):
        return None
    if any(not same_size(first.sizes[c], n) for c, n in other.sizes.items() if c != "d"):
        return None
    return other.query, other.key, other.key_order


def scores_that_leave(graph: fx.Graph) -> list[Skipped]:
    """Products of queries and keys whose scores, or weights, are an output of the graph: what reads
    values with them is not seen, and may not be compiled at all."""
    returned = set(graph.output_node().all_input_nodes)
    found = []
    for product in graph.nodes:
        if op_name(product) not in ("matmul", "bmm") or not _by_turned_keys(product):
            continue
        scores = [product]
        for node in scores:
            scores += [n for n in node.users if _like(n, node) and _goes_on(n)]
        readers = [user for node in scores for user in node.users]
        if any(op_name(n) == "softmax" and _product_with_values(n) for n in readers):
            continue  # the values are read here as well
        left = [node for node in scores if node in returned]
        if left:
            details = (f"leave this graph ({left[0].name})",)
            found.append(Skipped(product, Reason.BROKEN, details, module_path(product)))
    return found


def _goes_on(node: fx.Node) -> bool:
    """Whether a call makes other scores of scores, or the weights that no product here reads."""
    if op_name(node) == "softmax":
        return _product_with_values(node) is None
    return op_name(node) in _STEPS


def _by_turned_keys(product: fx.Node) -> bool:
    """Whether the second factor is (..., D, T), turned from the (..., T, D) that caches keep."""
    keys: Any = product.args[1] if len(product.args) > 1 else None
    rank = len(shape_of(keys) or ())
    if rank < 3 or len(shape_of(product) or ()) != rank:
        return False
    if op_name(keys) == "transpose":
        dims = {operand(keys, "dim0"), operand(keys, "dim1")}
        return {d % rank for d in dims if isinstance(d, int)} == {rank - 2, rank - 1}
    return op_name(keys) == "permute" and keys.args[-1] not in (-1, rank - 1)


def _factors(product: fx.Node, scores: _Scores) -> tuple[Any, Any] | str:
    """Queries and keys of the product; what `baddbmm` adds to it and scales it by goes to `scores`.

    A string names what was not understood.
    """
    if op_name(product) != "baddbmm":
        return product.args[0], product.args[1] if len(product.args) > 1 else None
    added, query, key = product.args[:3]
    beta, alpha = product.kwargs.get("beta", 1), product.kwargs.get("alpha", 1)
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)) or alpha <= 0:
        return "baddbmm"
    if beta != 0 and not _is_zeros(added):
        if scores.softcap or scores.query_scales or not isinstance(added, fx.Node) or beta < 0:
            return "baddbmm"
        scores.add_mask(added, product, float(beta))
    scores.factor *= alpha
    return query, key


def _is_zeros(node: Any) -> bool:
    """Whether the node makes zeros that only its one reader sees."""
    return isinstance(node, fx.Node) and op_name(node) == "zeros" and len(node.users) == 1


@dataclass(frozen=True)
class _First:
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


def _named(first: _First, scores: _Scores) -> _First | None:
    """The same with "s" and "g" for "x" and "y", in the masks of `scores` too.

    None where these cannot be told.
    """
    names = first.names(scores.masks)
    if names is None:
        return None

    def named(layout: Layout) -> Layout:
        return tuple("".join(names.get(letter, letter) for letter in held) for held in layout)

    scores.masks = [dataclasses.replace(term, layout=named(term.layout)) for term in scores.masks]
    return dataclasses.replace(
        first,
        query_layout=named(first.query_layout),
        layout=named(first.layout),
        sizes={names.get(letter, letter): size for letter, size in first.sizes.items()},
    )


@dataclass(frozen=True)
class _Second:
    """The product of weights and values, with the layout of its result."""

    value: fx.Node
    value_order: tuple[int, int, int, int]
    layout: Layout


def _held(letters: str, sizes: dict[str, Any]) -> str:
    """The letters without those of size one, which may be anywhere."""
    return "".join(letter for letter in letters if concrete(sizes[letter]) != 1)


def _after_view(layout: Layout, view: fx.Node, sizes: dict[str, Any]) -> Layout | None:
    """The layout behind a call that turns, splits or joins dimensions; None if it mixes them."""
    if op_name(view) in _TURNS:
        return tuple(layout[d] for d in permutation(view))
    left = list("".join(layout))
    after = []
    for size in shape_of(view) or ():
        held = ""
        while left and not (held and same_size(math.prod(sizes[c] for c in held), size)):
            if concrete(size) == 1 and concrete(sizes[left[0]]) != 1:
                break
            held += left.pop(0)
        if not same_size(math.prod(sizes[c] for c in held), size):
            return None
        after.append(held)
    if any(concrete(sizes[c]) != 1 for c in left):
        return None
    return (*after[:-1], after[-1] + "".join(left))


def _weights(
    layout: Layout, steps: list[fx.Node], scores: _Scores, sizes: dict[str, Any]
) -> Layout | fx.Node:
    """The layout of the weights behind `steps`, or the step that was not understood."""
    for step in steps:
        if op_name(step) in _VIEWS:
            after = _after_view(layout, step, sizes)
            if after is None:
                return step
            layout = after
        if op_name(step) == "getitem" and _held(layout[-1], sizes) != "t":
            return step
        if op_name(step) == "masked_fill" and not scores.hide(step, layout):
            return step
    return layout


def _queries_by_keys(query: Any, key: Any, product: fx.Node, scores: _Scores) -> _First | None:
    """The product's queries and keys, before they are folded or given a dimension for groups."""
    if op_name(product) == "einsum":
        return _einsum_of_keys(product, scores)
    if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
        return None
    shapes = [tuple(shape_of(node) or ()) for node in (query, key, product)]
    rank = len(shapes[2])
    if len(shapes[1]) != rank:
        return None
    if rank == 5 and len(shapes[0]) == rank:
        found = _before_group(key)
        if found is None or found[1].index(-1) > 2:
            return None
        source, order = found
        at = [d for d in range(3) if order[d] >= 0]
        batch = ["g"] * 3
        batch[at[0]], batch[at[1]] = "b", "h"
        sizes = dict(zip((*batch, "s", "d"), shapes[0], strict=True))
        if not all(map(same_size, shapes[0][:4], shapes[2][:4])):
            return None
        scores.reads += [(query, product), (source, product)]
        return _First(
            query=query,
            query_layout=(*batch, "s", "d"),
            key=source,
            key_order=(order[at[0]], order[at[1]], order[4], order[3]),
            layout=(*batch, "s", "t"),
            sizes={**sizes, "t": shapes[2][4]},
        )
    queries = _queries(query, product, scores)
    keys = _operand(key, (0, 1, 3, 2), product, scores)
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
    return _First(*queries, *keys, layout, sizes)


def _einsum_of_keys(product: fx.Node, scores: _Scores) -> _First | None:
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
    scores.reads += [(query, product), (key, product)]
    b, h, t, d = (layouts[1].index(c) if c in layouts[1] else -1 for c in "bhtd")
    return _First(query, layouts[0], key, (b, h, t, d), layouts[2], sizes, group)


def _weights_by_values(
    product: fx.Node, read: fx.Node, weights: Layout, sizes: dict[str, Any], scores: _Scores
) -> _Second | None:
    """The values of the last product, which reads the weights `read`, and how its result is laid
    out."""
    if op_name(product) == "einsum":
        return _einsum_of_values(product, read, weights, sizes, scores)
    held = [_held(letters, sizes) for letters in weights]
    value = product.args[1] if len(product.args) > 1 else None
    rank = len(weights)
    if op_name(product) not in ("matmul", "bmm") or not isinstance(value, fx.Node):
        return None
    if len(shape_of(value) or ()) != rank or rank not in (3, 4, 5) or held[-1] != "t":
        return None
    out = (*weights[:-1], "d")
    batch = held[:-2]
    if rank == 3:
        found = _operand(value, (0, 1, 2, 3), product, scores)
        if found is None or batch != [_held("bh", sizes)]:
            return None
        return _Second(*found, out)
    # One KV head may have the group's dimension of size one.
    heads = ("bh", "bg") if rank == 4 else ("bhg",)
    for letters in (order for term in heads for order in itertools.permutations(term)):
        if batch != [_held(c, sizes) if c in sizes else "" for c in letters]:
            continue
        source, order = value, list(range(rank))
        if rank == 5:
            before = _before_group(value)
            if before is None or before[1][letters.index("g")] != -1:
                continue
            source, order = before
        at = dict(zip((*letters, "t", "d"), order, strict=True))
        if "h" not in at and concrete((shape_of(value) or ())[at["g"]]) != 1:
            continue
        scores.reads.append((source, product))
        return _Second(source, (at["b"], at.get("h", at.get("g", -1)), at["t"], at["d"]), out)
    return None


def _einsum_of_values(
    product: fx.Node, read: fx.Node, weights: Layout, sizes: dict[str, Any], scores: _Scores
) -> _Second | None:
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
    if summed[0] not in term or _held(held[summed[0]], sizes) != "t":
        return None
    held |= {summed[0]: "t", dims[0]: "d"}
    order = {held[c]: place for place, c in enumerate(term)}
    if set(order) - {"b", "h", "t", "d"} or len(order) < len(term) or "b" not in order:
        return None
    shape = shape_of(value) or ()
    if any(c in order and not same_size(shape[order[c]], sizes[c]) for c in "bh"):
        return None
    scores.reads.append((value, product))
    return _Second(
        value,
        (order["b"], order.get("h", -1), order["t"], order["d"]),
        tuple(held[c] for c in out),
    )


def _is_batched(product: fx.Node) -> bool:
    """Whether the second factor differs between sequences, as keys do, and no weights."""
    factors = einsum_terms(product)
    second = factors[1][1] if factors else product.args[-1]
    return len(shape_of(second) or ()) > 2


def _before_group(node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """Behind a 5-D operand that has a dimension for groups: the 4-D tensor without it, and the
    dimension there of each of the five, -1 for the group's."""
    order: list[int] = list(range(5))
    grown: set[int] = set()
    while node.args and isinstance(node.args[0], fx.Node):
        name, source = op_name(node), node.args[0]
        before, after = shape_of(source) or (), shape_of(node) or ()
        if name in _TURNS:
            back = permutation(node)
            order = [back[d] for d in order]
            grown = {back[d] for d in grown}
        elif name == "expand" and len(before) == 5:
            grown |= {d for d in range(5) if not same_size(before[d], after[d])}
        elif name in ("unsqueeze", "getitem", "reshape") and len(before) == 4:
            new = [d for d in range(5) if _adds_dim(node, d, before, after)]
            # Of several, all are of size one: any will do.
            if not new or grown - {new[0]}:
                return None
            return source, [-1 if d == new[0] else d - (d > new[0]) for d in order]
        elif name not in ("contiguous", "detach", "alias") and not (
            name in ("to", "float") and widens(node)
        ):
            return None
        node = source
    return None


def _adds_dim(node: fx.Node, dim: int, before: Any, after: Any) -> bool:
    """Whether the view does nothing but insert a dimension of size one at `dim`."""
    if op_name(node) != "reshape":
        return only_adds_dim(node, dim)
    rest = (*after[:dim], *after[dim + 1 :])
    return concrete(after[dim]) == 1 and all(map(same_size, rest, before))


def _queries(query: Any, reader: fx.Node, scores: _Scores) -> tuple[fx.Node, Layout] | None:
    """The 4-D queries behind an operand of the product; scaling on the way goes to `scores`."""
    order = (0, 1, 2, 3)
    while isinstance(query, fx.Node) and len(shape_of(query) or ()) == 3:
        found = before_fold(query, (0, 1, 2))
        if found is not None:
            query, order, reader = found
            break
        scales = _STEPS.get(op_name(query)) if op_name(query) in (*_MUL, *_DIV) else None
        query = scales(query, scores) if scales else None
    if not isinstance(query, fx.Node) or len(shape_of(query) or ()) != 4:
        return None
    scores.reads.append((query, reader))
    letters = dict(zip(order, "bhsd", strict=True))
    return query, tuple(letters[dim] for dim in range(4))


def _operand(
    node: Any, at: tuple[int, int, int, int], reader: fx.Node, scores: _Scores
) -> tuple[fx.Node, tuple[int, int, int, int]] | None:
    """The 4-D keys or values behind an operand of a product, and where their dimensions are.

    at: the dimensions of batch, heads, tokens and head_dim where the operand is 4-D.
    """
    if not isinstance(node, fx.Node):
        return None
    rank = len(shape_of(node) or ())
    if rank == 4:
        scores.reads.append((node, reader))
        return node, at
    found = before_fold(node, (0, at[2] - 1, at[3] - 1)) if rank == 3 else None
    if found is None:
        return None
    scores.reads.append((found[0], found[2]))
    return found[0], found[1]


def _like(node: fx.Node, scores: fx.Node) -> bool:
    """Whether a tensor has the scores' own shape: numbers for each head, query and key."""
    shape, wanted = shape_of(node) or (), shape_of(scores) or ()
    return len(shape) == len(wanted) >= 3 and all(map(same_size, shape, wanted))


def _straight_back(softmax: fx.Node, axis: int) -> list[fx.Node]:
    """The nodes of the scores' own shape behind a softmax, up to and with its products."""
    found, queue = [], list(softmax.all_input_nodes)
    seen: set[fx.Node] = set()
    while queue:
        node = queue.pop()
        if node in seen or len(seen) > 64:
            continue
        seen.add(node)
        found.append(node)
        if op_name(node) not in _PRODUCTS:
            queue += [n for n in node.all_input_nodes if _reaches(n, softmax, axis)]
    return found


def _reaches(node: fx.Node, softmax: fx.Node, axis: int) -> bool:
    """Whether a tensor can hold scores: the size that the softmax sums, give or take a sink."""
    shape, summed = shape_of(node), shape_of(softmax)
    if not shape or not summed or len(shape) < 3:
        return False
    last = shape[-1:] if axis == len(summed) - 1 else shape
    wanted = concrete(summed[axis])
    return wanted is None or any(concrete(n) in (None, wanted, wanted - 1) for n in last)


def _product_with_values(softmax: fx.Node) -> tuple[fx.Node, list[fx.Node], str] | None:
    """Forward from the weights: the product with the values, the calls on the way to it, and the
    name of another reader of the weights ("" if there is none)."""
    node, odd = softmax, ""
    walked: list[fx.Node] = []
    for _ in range(8):
        products = [user for user in node.users if _mixes_values(user, node)]
        others = [u for u in node.users if u not in products]
        if len(products) == 1:
            odd = odd or (op_name(others[0]) or "output" if others else "")
            return products[0], walked, odd
        steps = [u for u in others if _keeps_weights(u)]
        if len(steps) != 1 or products:
            return None
        if len(others) > 1:
            odd = odd or next(op_name(u) or "output" for u in others if u is not steps[0])
        walked += steps
        node = steps[0]
    return None


def _mixes_values(product: fx.Node, weights: fx.Node) -> bool:
    """Whether the weights are what a product takes as its first factor."""
    name = op_name(product)
    if name == "einsum":
        return weights in product.all_input_nodes
    return name in _PRODUCTS and product.args[name == "baddbmm"] is weights


def _keeps_weights(node: fx.Node) -> bool:
    name = op_name(node)
    if name in (*_CASTS, *_VIEWS):
        return True
    if name == "dropout":
        probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is False or bool(probability == 0.0)
    if name == "getitem":
        index = node.args[1]
        return isinstance(index, tuple) and index == (Ellipsis, slice(None, -1, None))
    return name == "masked_fill" and _number(node.args[2]) == 0


def _fold(node: Any, scores: _Scores) -> fx.Node | str:
    """Walks back from the softmax's input to the product; the name of what stopped it, else."""
    while isinstance(node, fx.Node):
        name = op_name(node)
        if name in _PRODUCTS:
            return node
        step = _STEPS.get(name)
        # The queries can carry what multiplies the product alone, nothing that is added to it.
        plain = not scores.query_scales or name in (*_MUL, *_DIV, *_CASTS) or step is _fold_view
        previous = step(node, scores) if step and plain else None
        if previous is None:
            return name or node.op
        node = previous
    return "a constant"


def _fold_add(node: fx.Node, scores: _Scores) -> fx.Node | None:
    left, right = node.args[:2]
    if node.kwargs or not isinstance(left, fx.Node):  # alpha=
        return None
    if not isinstance(right, fx.Node):
        return left if isinstance(right, (int, float)) else None  # the same for every key
    if scores.added is None and all(op_name(x) in ("einsum", "matmul") for x in (left, right)):
        scores.added = right
        return left
    turned = not (_holds_product(left, turned=False) or _holds_product(right, turned=False))
    for inner, mask in ((left, right), (right, left)):
        if _holds_product(inner, turned) and not _holds_product(mask, turned):
            # Under a soft cap an added term would be capped too: not the one form. What is added as
            # a number may not be taken for a mask that hides.
            if scores.softcap or not fake_value(mask).dtype.is_floating_point:
                return None
            scores.add_mask(mask, node)
            return inner
    return None


def _fold_mul(node: fx.Node, scores: _Scores) -> fx.Node | None:
    left, right = node.args[:2]
    for inner, number in ((left, right), (right, left)):
        if isinstance(inner, fx.Node) and isinstance(number, (int, float)):
            if number <= 0:
                return None
            scores.factor *= number
            return inner
    scaled = _fold_one_number(operator.mul, left, right, node, scores)
    return scaled or _fold_one_number(operator.mul, right, left, node, scores)


def _fold_div(node: fx.Node, scores: _Scores) -> fx.Node | None:
    inner, number = node.args[:2]
    if node.kwargs:  # rounding_mode=
        return None
    if isinstance(inner, fx.Node) and isinstance(number, (int, float)) and number > 0:
        scores.factor /= number
        return inner
    return _fold_one_number(operator.truediv, inner, number, node, scores)


def _fold_one_number(
    function: Callable[..., Any], inner: Any, scale: Any, node: fx.Node, scores: _Scores
) -> fx.Node | None:
    """A factor that only the running model knows, a tensor of one number: the queries carry it."""
    if not isinstance(inner, fx.Node) or not isinstance(scale, fx.Node):
        return None
    value, before, after = fake_value(scale), fake_value(inner), fake_value(node)
    if not isinstance(value, torch.Tensor) or not isinstance(before, torch.Tensor):
        return None
    if not value.dtype == before.dtype == after.dtype or value.device != before.device:
        return None
    if value.ndim > 1 or before.ndim < 3 or any(concrete(size) != 1 for size in value.shape):
        return None
    scores.query_scales.append((function, scale))
    scores.reads.append((scale, node))
    return inner


def _fold_tanh(node: fx.Node, scores: _Scores) -> fx.Node | None:
    """c * tanh(x / c): what follows tanh is the cap, and what precedes it is scaled back by it."""
    if scores.softcap:
        return None
    scores.softcap = scores.factor
    return node.args[0]  # type: ignore[return-value]


def _fold_cast(node: fx.Node, scores: _Scores) -> fx.Node | None:
    return node.args[0]  # type: ignore[return-value]


def _fold_fill(node: fx.Node, scores: _Scores) -> fx.Node | None:
    """masked_fill(mask, very low), where(mask, scores, very low), where(mask, very low, scores)."""
    if op_name(node) == "where":
        if len(node.args) != 3:
            return None
        mask, inner, fill = node.args
        inverted = _number(inner) is not None
        inner, fill = (fill, inner) if inverted else (inner, fill)
    else:
        inner, mask, fill = node.args[0], node.args[1], node.args[2]
        inverted = True
    if not isinstance(inner, fx.Node) or not isinstance(mask, fx.Node) or scores.softcap:
        return None
    value = fake_value(mask)
    number = _number(fill)
    if value is None or str(value.dtype) != "torch.bool" or number is None:
        return None
    lowest = torch.finfo(fake_value(node).dtype).min
    if number > lowest and number * scores.factor > _HIDES:
        return None
    scores.add_mask(mask, node, inverted=inverted, fill=number)
    return inner


def _fold_clamp(node: fx.Node, scores: _Scores) -> fx.Node | None:
    """max(scores, very low): what a mask adds or fills with goes no lower."""
    inner, bound = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    low = _very_low(bound)
    more = {key for key, value in node.kwargs.items() if key != "min" and value is not None}
    if not isinstance(inner, fx.Node) or low is None or more or len(node.args) > 2:
        return None
    if scores.softcap:
        return None
    scores.floor = max(scores.floor, low * scores.factor)
    return inner


def _fold_view(node: fx.Node, scores: _Scores) -> fx.Node | None:
    """Another layout of the scores: `lay_out` looks into it."""
    scores.views.append(node)
    return node.args[0]  # type: ignore[return-value]


def _with_deep_fills(masks: list[MaskTerm]) -> list[MaskTerm] | None:
    """The same masks with fills that no score changes when it is added to them, near the lowest
    number of float32.

    In a row that sees no key such a fill is all that counts. Fills that are less deep keep their
    meaning if they are one number and nothing is added to it; else None.
    """
    fills = {term.fill * term.factor for term in masks if term.fill > float("-inf")}
    if all(fill <= _ABSORBS for fill in fills):
        return masks
    if len(fills) > 1 or any(fake_value(term.node).dtype != torch.bool for term in masks):
        return None
    (fill,) = fills
    deeper = 2.0 ** (127 - math.floor(math.log2(-fill)))  # exact, so that equal fills stay equal
    if fill * deeper < torch.finfo(torch.float32).min:
        return None
    return [dataclasses.replace(term, fill=term.fill * deeper) for term in masks]


def _very_low(bound: Any) -> float | None:
    """The number, if it is so low that no score reaches it or changes it."""
    number = _number(bound)
    return number if number is not None and number <= _ABSORBS else None


def _number(value: Any) -> float | None:
    """A number that is given as it is or as a constant tensor."""
    if isinstance(value, fx.Node) and op_name(value) in ("tensor", "scalar_tensor", "full"):
        value = value.args[1 if op_name(value) == "full" else 0]
    return float(value) if isinstance(value, (int, float)) else None


def _same_value(a: Any, b: Any, writes: list[Write], depth: int = 4) -> bool:
    """Whether two operands are one, or come from one by the same calls; nothing writes into it."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and bool(a == b)
    if a is b:
        return not any(may_overlap(write.operand, a) for write in writes)
    if depth == 0 or op_name(a) not in _PURE or op_name(a) != op_name(b) or a.kwargs or b.kwargs:
        return False
    return len(a.args) == len(b.args) and all(
        _same_value(x, y, writes, depth - 1) for x, y in zip(a.args, b.args, strict=True)
    )


def _fold_sub(node: fx.Node, scores: _Scores) -> fx.Node | None:
    """scores - scores.max(...): a softmax does not see what is the same for every key."""
    inner, shift = node.args[:2]
    if not isinstance(inner, fx.Node) or not isinstance(shift, fx.Node) or node.kwargs:
        return None
    shape = shape_of(shift)
    if shape is None or (len(shape) and concrete(shape[-1]) != 1):
        return None
    while op_name(shift) == "detach" and isinstance(shift.args[0], fx.Node):
        shift = shift.args[0]
    source = shift.args[0] if op_name(shift) == "getitem" and shift.args[1] == 0 else shift
    if not isinstance(source, fx.Node) or op_name(source) not in ("max", "amax"):
        return None
    scores.by_keys.append(len(scores.views))
    return inner if source.args[0] is inner else None


def _fold_cat(node: fx.Node, scores: _Scores) -> fx.Node | None:
    """cat([scores, sink logits], dim=-1): one more column without a value."""
    tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return None
    if scores.sinks is not None or scores.row_sinks:
        return None
    inner, sinks = tensors
    shape = shape_of(sinks)
    if scores.factor != 1.0 or scores.softcap or scores.masks or shape is None:
        return None
    if len(shape) != 4 or dim not in (-1, 3) or concrete(shape[-1]) != 1 or scores.views:
        return None
    scores.by_keys.append(0)
    scores.sinks = _per_head(sinks, concrete(shape[1]))
    if scores.sinks is None:  # another one for each row: subtracted from the scores, it becomes 0
        if scores.floor > float("-inf"):
            return None
        scores.row_sinks = True
        scores.add_mask(sinks, node, -1.0, per_row=True)
    return inner


def _per_head(node: fx.Node, heads: int | None) -> fx.Node | None:
    """Back from sink logits (B, Hq, S, 1) to the (Hq,) they were spread from."""
    for _ in range(4):
        shape = shape_of(node)
        if shape is not None and len(shape) == 1:
            return node if concrete(shape[0]) == heads else None
        if op_name(node) not in ("expand", "reshape", *_CASTS) or not node.args:
            return None
        source, before = node.args[0], shape_of(node.args[0])
        if op_name(node) == "reshape" and (before is None or len(before) != 1):
            return None
        if op_name(node) == "reshape" and [concrete(n) for n in shape or ()][1:2] != [heads]:
            return None  # another one for each token
        if not isinstance(source, fx.Node):
            return None
        node = source
    return None


def _holds_product(node: Any, turned: bool = True) -> bool:
    """Whether the scores come through this operand: a product lies straight behind it.

    turned: look behind views that turn dimensions, too.
    """
    if not isinstance(node, fx.Node):
        return False
    for _ in range(16):
        name = op_name(node)
        if name in _PRODUCTS:
            return True
        if name not in _STEPS or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if name in _TURNS and not turned:
            return False
        inner = [a for a in node.args[: 2 + (name == "where")] if isinstance(a, fx.Node)]
        if len(inner) > 1 and name in (*_ADD, *_MUL, "where"):
            return any(_holds_product(a, turned) for a in inner)
        node = node.args[0]
    return False


_STEPS = {
    **dict.fromkeys(_ADD, _fold_add),
    **dict.fromkeys(_MUL, _fold_mul),
    **dict.fromkeys(_DIV, _fold_div),
    **dict.fromkeys(_SUB, _fold_sub),
    **dict.fromkeys(_CASTS, _fold_cast),
    **dict.fromkeys(_VIEWS, _fold_view),
    **dict.fromkeys(("max", "maximum", "clamp", "clamp_min"), _fold_clamp),
    "tanh": _fold_tanh,
    "masked_fill": _fold_fill,
    "masked_fill_": _fold_fill,
    "where": _fold_fill,
    "cat": _fold_cat,
}
