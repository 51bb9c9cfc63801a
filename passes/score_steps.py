"""What may lie between the product of queries and keys and the softmax: `STEPS`.

Each step is folded into the one form of a core: a scale, a soft cap, masks and sink logits. Scores
may be laid out in any way: views on the way are followed letter by letter. Analysis only.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from loki_compile.kernels.fused import SCORES, Layout
from loki_compile.passes.attention import MaskTerm, No, Reason
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    may_overlap,
    op_name,
    shape_of,
    writes_of,
)
from loki_compile.passes.products import PRODUCTS, VIEWS, after_view, without_ones
from loki_compile.passes.views import TURNS
from torch import fx

_ADD = ("add", "add_", "iadd", "__add__", "__iadd__")
MUL = ("mul", "mul_", "imul", "__mul__", "__imul__")
DIV = ("div", "div_", "truediv", "itruediv", "true_divide", "__truediv__", "__itruediv__")
_SUB = ("sub", "sub_", "isub", "__sub__")
_PURE = ("eq", "ne", "__eq__", "__ne__", "lt", "le", "gt", "ge", "logical_not", "invert",
         "bitwise_not", "reshape", "unsqueeze", "tensor", "to", "bool")  # fmt: skip
CASTS = ("to", "float", "type", "contiguous", "clone")

# A key whose logit is set to this has no weight beside any other: no visible logit is as low.
_HIDES = -1e7
# float32 keeps nothing of a score that is added to this.
_ABSORBS = -1e30


class Scores:
    """What has been understood of the way from the product to the softmax, walking back."""

    def __init__(self) -> None:
        self.factor = 1.0  # of everything that lies further back
        self.floor = float("-inf")  # of everything that lies further back, after the factor
        self.masks: list[MaskTerm] = []
        self.softcap = 0.0
        self.query_scales: list[tuple[Callable[..., Any], fx.Node]] = []
        self.sink_logits: fx.Node | None = None
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

    def lay_out(self, product: Layout, sizes: dict[str, Any], axis: int) -> Layout:
        """Gives each mask the layout of the scores that it meets, and returns that of the softmax.

        product: the layout that the scores begin with; axis: what the softmax sums.
        """
        layouts = [product]
        for view in reversed(self.views):
            after = after_view(layouts[-1], view, sizes)
            if after is None:
                raise No(Reason.SOFTMAX, op_name(view))
            layouts.append(after)
        layouts.reverse()
        summed = [layouts[0][axis], *(layouts[number][-1] for number in self.by_keys)]
        if any(without_ones(letters, sizes) != "t" for letters in summed):
            raise No(Reason.SOFTMAX, op_name(self.views[-1]) if self.views else "softmax")
        if self.sink_logits is not None and layouts[0] != SCORES:
            raise No(Reason.SOFTMAX, "cat")
        self.masks = [
            dataclasses.replace(term, layout=layouts[number])
            for term, number in zip(self.masks, self.behind, strict=True)
        ]
        return layouts[0]

    def unscaled(self, query: fx.Node) -> fx.Node | None:
        """Queries before a call that scales them, which is noted; None for another call.

        Of two products each would have a scale of its own.
        """
        scales = op_name(query) in (*MUL, *DIV) and self.added is None
        return STEPS[op_name(query)](query, self) if scales else None

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


def _fold_add(node: fx.Node, scores: Scores) -> fx.Node | None:
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


def _fold_mul(node: fx.Node, scores: Scores) -> fx.Node | None:
    left, right = node.args[:2]
    for inner, number in ((left, right), (right, left)):
        if isinstance(inner, fx.Node) and isinstance(number, (int, float)):
            if number <= 0:
                return None
            scores.factor *= number
            return inner
    scaled = _fold_one_number(operator.mul, left, right, node, scores)
    return scaled or _fold_one_number(operator.mul, right, left, node, scores)


def _fold_div(node: fx.Node, scores: Scores) -> fx.Node | None:
    inner, number = node.args[:2]
    if node.kwargs:  # rounding_mode=
        return None
    if isinstance(inner, fx.Node) and isinstance(number, (int, float)) and number > 0:
        scores.factor /= number
        return inner
    return _fold_one_number(operator.truediv, inner, number, node, scores)


def _fold_one_number(
    function: Callable[..., Any], inner: Any, scale: Any, node: fx.Node, scores: Scores
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


def _fold_tanh(node: fx.Node, scores: Scores) -> fx.Node | None:
    """c * tanh(x / c): what follows tanh is the cap, and what precedes it is scaled back by it."""
    if scores.softcap:
        return None
    scores.softcap = scores.factor
    return node.args[0]  # type: ignore[return-value]


def _fold_cast(node: fx.Node, scores: Scores) -> fx.Node | None:
    return node.args[0]  # type: ignore[return-value]


def _fold_fill(node: fx.Node, scores: Scores) -> fx.Node | None:
    """masked_fill(mask, very low), where(mask, scores, very low), where(mask, very low, scores)."""
    if op_name(node) == "where":
        if len(node.args) != 3:
            return None
        mask, inner, fill = node.args
        inverted = number_of(inner) is not None
        inner, fill = (fill, inner) if inverted else (inner, fill)
    else:
        inner, mask, fill = node.args[0], node.args[1], node.args[2]
        inverted = True
    if not isinstance(inner, fx.Node) or not isinstance(mask, fx.Node) or scores.softcap:
        return None
    value = fake_value(mask)
    number = number_of(fill)
    if value is None or str(value.dtype) != "torch.bool" or number is None:
        return None
    lowest = torch.finfo(fake_value(node).dtype).min
    if number > lowest and number * scores.factor > _HIDES:
        return None
    scores.add_mask(mask, node, inverted=inverted, fill=number)
    return inner


def _fold_clamp(node: fx.Node, scores: Scores) -> fx.Node | None:
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


def fold_view(node: fx.Node, scores: Scores) -> fx.Node | None:
    """Another layout of the scores: `lay_out` looks into it."""
    scores.views.append(node)
    return node.args[0]  # type: ignore[return-value]


def with_deep_fills(masks: list[MaskTerm]) -> list[MaskTerm] | None:
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
    number = number_of(bound)
    return number if number is not None and number <= _ABSORBS else None


def number_of(value: Any) -> float | None:
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


def _fold_sub(node: fx.Node, scores: Scores) -> fx.Node | None:
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


def _fold_cat(node: fx.Node, scores: Scores) -> fx.Node | None:
    """cat([scores, sink logits], dim=-1): one more column without a value."""
    tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
        return None
    if scores.sink_logits is not None or scores.row_sinks:
        return None
    inner, sinks = tensors
    shape = shape_of(sinks)
    if scores.factor != 1.0 or scores.softcap or scores.masks or shape is None:
        return None
    if len(shape) != 4 or dim not in (-1, 3) or concrete(shape[-1]) != 1 or scores.views:
        return None
    scores.by_keys.append(0)
    scores.sink_logits = _per_head(sinks, concrete(shape[1]))
    if scores.sink_logits is None:  # one for each row: subtracted from the scores, it becomes 0
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
        if op_name(node) not in ("expand", "reshape", *CASTS) or not node.args:
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
        if name in PRODUCTS:
            return True
        if name not in STEPS or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if name in TURNS and not turned:
            return False
        inner = [a for a in node.args[: 2 + (name == "where")] if isinstance(a, fx.Node)]
        if len(inner) > 1 and name in (*_ADD, *MUL, "where"):
            return any(_holds_product(a, turned) for a in inner)
        node = node.args[0]
    return False


STEPS = {
    **dict.fromkeys(_ADD, _fold_add),
    **dict.fromkeys(MUL, _fold_mul),
    **dict.fromkeys(DIV, _fold_div),
    **dict.fromkeys(_SUB, _fold_sub),
    **dict.fromkeys(CASTS, _fold_cast),
    **dict.fromkeys(VIEWS, fold_view),
    **dict.fromkeys(("max", "maximum", "clamp", "clamp_min"), _fold_clamp),
    "tanh": _fold_tanh,
    "masked_fill": _fold_fill,
    "masked_fill_": _fold_fill,
    "where": _fold_fill,
    "cat": _fold_cat,
}
