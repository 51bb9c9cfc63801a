"""Attention written out: `matmul -> scale, cap, mask -> softmax -> matmul`, seen as one core.

From each softmax the chain is followed back to the product of queries and keys and forward to the
product with the values. What lies between is folded into the one form of a core: a scale, a soft
cap, masks and sink logits. Each product may have batch and heads in one dimension. A softmax
without both products (a router, a residual mixer) is no attention. Analysis only: nothing here
edits a graph.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from loki_compile.passes.fx_tools import (
    Write,
    concrete,
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
    Core,
    MaskTerm,
    Reason,
    Skipped,
    before_fold,
    folds,
    unfolds,
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
        self.reads: list[tuple[fx.Node, fx.Node]] = []
        self.unfolded: list[Any] = []  # (B, Hq, S, T) wherever the scores change between 3-D and it

    def add_mask(self, mask: fx.Node, reader: fx.Node, factor: float = 1.0, **more: Any) -> None:
        """Notes what the call `reader` adds to the scores, or hides of them.

        `factor` is that of `reader` alone; `more` are fields of a boolean mask's term."""
        shape, out = shape_of(mask) or (), shape_of(reader) or ()
        folded = len(shape) == len(out) == 3 and concrete(shape[0]) != 1
        term = MaskTerm(mask, factor * self.factor, folded=folded, **more)
        if self.floor > float("-inf"):
            floor = self.floor / term.factor
            if fake_value(mask).dtype == torch.bool:
                term = dataclasses.replace(term, fill=max(term.fill, floor))
            else:
                term = dataclasses.replace(term, floor=floor)
        self.masks.append(term)
        self.reads.append((mask, reader))

    def hide(self, fill: fx.Node) -> bool:
        """Notes that `fill` sets weights to zero; False unless a mask hides the same keys.

        A row that sees no key is zero then, whatever that mask fills with.
        """
        writes = writes_of(fill.graph)
        for i, term in enumerate(self.masks):
            if term.inverted and _same_value(term.node, fill.args[1], writes):
                self.masks[i] = dataclasses.replace(term, fill=float("-inf"))
                return True
        return False


def chain_core(softmax: fx.Node) -> Core | Skipped | None:
    """The core around a softmax, `Skipped` if it is attention but not understood, else None."""
    axis: Any = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    shape = shape_of(softmax)
    if shape is None or axis is None or axis % len(shape) != len(shape) - 1:
        return None
    out = _product_with_values(softmax)
    if out is None:
        return None

    def skip(reason: Reason, *details: Any) -> Skipped:
        return Skipped(out[0], reason, details, module_path(softmax))

    back = _straight_back(softmax)
    if not any(op_name(node) in _PRODUCTS for node in back):
        scores_in = [node for node in back if node.op == "placeholder" and _like(node, softmax)]
        if not scores_in:
            return None
        return skip(Reason.BROKEN, f"come from another graph ({scores_in[0].name})")
    node, trimmed, odd, zeroed = out
    if odd:
        return skip(Reason.WEIGHTS_USED, odd)
    scores = _Scores()
    product = _fold(softmax.args[0], scores)
    if isinstance(product, str):
        return skip(Reason.SOFTMAX, product)
    if not all(scores.hide(fill) for fill in zeroed):
        return skip(Reason.SOFTMAX, op_name(zeroed[0]))
    if trimmed != (scores.sinks is not None or scores.row_sinks):
        return skip(Reason.SOFTMAX, "a slice of the weights")
    factors = _factors(product, scores)
    if isinstance(factors, str):
        return skip(Reason.SOFTMAX, factors)
    query = _queries(factors[0], product, scores)
    key = _operand(factors[1], (0, 1, 3, 2), product, scores)
    value = _operand(node.args[1], (0, 1, 2, 3), node, scores)
    if op_name(product) == "einsum" or op_name(node) not in ("matmul", "bmm"):
        query = None
    if query is None or key is None or value is None:
        return skip(Reason.LAYOUT, f"{op_name(product)} of {tuple(shape_of(product) or ())}")
    heads = shape_of(query) or ()
    if any(not same_size(apart[d], heads[d]) for apart in scores.unfolded for d in (0, 1)):
        return skip(Reason.SOFTMAX, "reshape")
    return Core(
        node=node,
        query=query,
        key=key[0],
        value=value[0],
        masks=tuple(reversed(scores.masks)),
        scale=scores.factor,
        query_scales=tuple(scores.query_scales),
        key_order=key[1],
        value_order=value[1],
        softcap=scores.softcap,
        sinks=scores.sinks,
        row_sinks=scores.row_sinks,
        # A softmax of nothing but -inf is NaN, unless a sink takes part or the weights are zeroed.
        nan_rows=not zeroed and scores.sinks is None and not scores.row_sinks,
        reads=tuple(scores.reads),
    )


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


def _queries(query: Any, reader: fx.Node, scores: _Scores) -> fx.Node | None:
    """The 4-D queries behind an operand of the product; scaling on the way goes to `scores`."""
    while isinstance(query, fx.Node) and len(shape_of(query) or ()) == 3:
        found = before_fold(query, (0, 1, 2))
        if found is not None:
            query, order, reader = found
            if order != (0, 1, 2, 3):
                return None
            break
        scales = _STEPS.get(op_name(query)) if op_name(query) in (*_MUL, *_DIV) else None
        query = scales(query, scores) if scales else None
    if not isinstance(query, fx.Node) or len(shape_of(query) or ()) != 4:
        return None
    scores.reads.append((query, reader))
    return query


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


def _straight_back(softmax: fx.Node) -> list[fx.Node]:
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
            tokens = (shape_of(softmax) or (0,))[-1]
            queue += [n for n in node.all_input_nodes if _reaches(n, tokens)]
    return found


def _reaches(node: fx.Node, tokens: Any) -> bool:
    """Whether a tensor can hold scores: the softmax's last size, give or take a sink."""
    shape = shape_of(node)
    if not shape or len(shape) < 3:
        return False
    last, wanted = concrete(shape[-1]), concrete(tokens)
    return last is None or wanted is None or last in (wanted, wanted - 1)


def _product_with_values(softmax: fx.Node) -> tuple[fx.Node, bool, str, list[fx.Node]] | None:
    """Forward from the weights: the product with the values, whether a sink column is cut off,
    the name of another reader of the weights ("" if there is none), and the calls that set weights
    to zero."""
    node, trimmed, odd = softmax, False, ""
    zeroed: list[fx.Node] = []
    for _ in range(8):
        products = [user for user in node.users if _mixes_values(user, node)]
        others = [u for u in node.users if u not in products]
        if len(products) == 1 and node is not None:
            odd = odd or (op_name(others[0]) or "output" if others else "")
            return products[0], trimmed, odd, zeroed
        steps = [u for u in others if _keeps_weights(u)]
        if len(steps) != 1 or products:
            return None
        if len(others) > 1:
            odd = odd or next(op_name(u) or "output" for u in others if u is not steps[0])
        trimmed = trimmed or op_name(steps[0]) == "getitem"
        zeroed += steps if op_name(steps[0]) == "masked_fill" else []
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
    if name in _CASTS or folds(node) or unfolds(node):
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
    for inner, mask in ((left, right), (right, left)):
        if _holds_product(inner) and not _holds_product(mask):
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
    """masked_fill(mask, very low) and where(mask, scores, very low)."""
    if op_name(node) == "where":
        if len(node.args) != 3:
            return None
        mask, inner, fill, inverted = node.args[0], node.args[1], node.args[2], False
    else:
        inner, mask, fill = node.args[0], node.args[1], node.args[2]
        inverted = True
    if not isinstance(inner, fx.Node) or not isinstance(mask, fx.Node) or scores.softcap:
        return None
    value = fake_value(mask)
    low = _very_low(fill)
    if value is None or str(value.dtype) != "torch.bool" or low is None:
        return None
    scores.add_mask(mask, node, inverted=inverted, fill=low)
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
    """A change between (B, Hq, S, T) and (B * Hq, S, T)."""
    if not folds(node) and not unfolds(node):
        return None
    scores.unfolded.append(shape_of(node.args[0] if folds(node) else node))
    return node.args[0]  # type: ignore[return-value]


def _very_low(fill: Any) -> float | None:
    """The number, if it hides a key from the softmax."""
    number = _number(fill)
    return number if number is not None and number <= -1e37 else None


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
    source = shift.args[0] if op_name(shift) == "getitem" and shift.args[1] == 0 else shift
    is_max = isinstance(source, fx.Node) and op_name(source) in ("max", "amax")
    return inner if is_max and source.args[0] is inner else None  # type: ignore[union-attr]


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
    if len(shape) != 4 or dim not in (-1, 3) or concrete(shape[-1]) != 1 or scores.unfolded:
        return None
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
        if not isinstance(source, fx.Node):
            return None
        node = source
    return None


def _holds_product(node: Any) -> bool:
    """Whether the scores come through this operand: a product lies straight behind it."""
    if not isinstance(node, fx.Node):
        return False
    for _ in range(16):
        name = op_name(node)
        if name in _PRODUCTS:
            return True
        if name not in _STEPS or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        inner = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(inner) == 2 and name in (*_ADD, *_MUL, "where"):
            return any(_holds_product(a) for a in inner)
        node = node.args[0]
    return False


_STEPS = {
    **dict.fromkeys(_ADD, _fold_add),
    **dict.fromkeys(_MUL, _fold_mul),
    **dict.fromkeys(_DIV, _fold_div),
    **dict.fromkeys(_SUB, _fold_sub),
    **dict.fromkeys(_CASTS, _fold_cast),
    **dict.fromkeys(("reshape", "flatten", "unflatten"), _fold_view),
    **dict.fromkeys(("max", "maximum", "clamp", "clamp_min"), _fold_clamp),
    "tanh": _fold_tanh,
    "masked_fill": _fold_fill,
    "masked_fill_": _fold_fill,
    "where": _fold_fill,
    "cat": _fold_cat,
}
