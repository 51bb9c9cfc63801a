"""Attention written out: `matmul -> scale, cap, mask -> softmax -> matmul`, seen as one core.

From each softmax the chain is followed back to the product of queries and keys and forward to the
product with the values. What lies between is folded into the one form of a core: a scale, a soft
cap, masks and sink logits. A softmax without both products (a router, a residual mixer) is no
attention. Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

from typing import Any

from loki_compile.passes.fx_tools import concrete, fake_value, module_path, op_name, shape_of
from loki_compile.passes.sites import Core, MaskTerm, Reason, Skipped
from torch import fx

_ADD = ("add", "add_", "iadd", "__add__", "__iadd__")
_MUL = ("mul", "mul_", "imul", "__mul__", "__imul__")
_DIV = ("div", "div_", "truediv", "itruediv", "true_divide", "__truediv__", "__itruediv__")
_SUB = ("sub", "sub_", "isub", "__sub__")
_CASTS = ("to", "float", "type", "contiguous", "clone")
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")


class _Scores:
    """What has been understood of the way from the product to the softmax, walking back."""

    def __init__(self) -> None:
        self.factor = 1.0  # of everything that lies further back
        self.masks: list[MaskTerm] = []
        self.softcap = 0.0
        self.sinks: fx.Node | None = None


def chain_core(softmax: fx.Node) -> Core | Skipped | None:
    """The core around a softmax, `Skipped` if it is attention but not understood, else None."""
    axis = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    shape = shape_of(softmax)
    if shape is None or axis is None or axis % len(shape) != len(shape) - 1:
        return None
    out = _product_with_values(softmax)
    behind = any(op_name(node) in _PRODUCTS for node in _straight_back(softmax))
    if out is None or not behind:
        return None

    def skip(reason: Reason, *details: Any) -> Skipped:
        return Skipped(out[0], reason, details, module_path(softmax))

    node, trimmed, odd = out
    if odd:
        return skip(Reason.WEIGHTS_USED, odd)
    scores = _Scores()
    product = _fold(softmax.args[0], scores)
    if isinstance(product, str):
        return skip(Reason.SOFTMAX, product)
    if trimmed != (scores.sinks is not None):
        return skip(Reason.SOFTMAX, "a slice of the weights")
    if op_name(product) != "matmul" or op_name(node) != "matmul" or len(shape) != 4:
        return skip(Reason.LAYOUT, f"{op_name(product)} of {tuple(shape_of(product) or ())}")
    query, key = product.args[:2]
    return Core(
        node=node,
        query=query,
        key=key,
        value=node.args[1],  # type: ignore[arg-type]
        masks=tuple(reversed(scores.masks)),
        scale=scores.factor,
        key_order=(0, 1, 3, 2),
        softcap=scores.softcap,
        sinks=scores.sinks,
    )


def _straight_back(softmax: fx.Node) -> list[fx.Node]:
    """The nodes of the scores' own shape behind a softmax, up to and with its products."""
    found, queue, seen = [], list(softmax.all_input_nodes), set()
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


def _product_with_values(softmax: fx.Node) -> tuple[fx.Node, bool, str] | None:
    """Forward from the weights: the product with the values, whether a sink column is cut off,
    and the name of another reader of the weights ("" if there is none)."""
    node, trimmed, odd = softmax, False, ""
    for _ in range(8):
        products = [u for u in node.users if op_name(u) in _PRODUCTS and u.args[0] is node]
        others = [u for u in node.users if u not in products]
        if len(products) == 1 and node is not None:
            return products[0], trimmed, odd or (op_name(others[0]) or "output" if others else "")
        steps = [u for u in others if _keeps_weights(u)]
        if len(steps) != 1 or products:
            return None
        if len(others) > 1:
            odd = odd or next(op_name(u) or "output" for u in others if u is not steps[0])
        trimmed = trimmed or op_name(steps[0]) == "getitem"
        node = steps[0]
    return None


def _keeps_weights(node: fx.Node) -> bool:
    name = op_name(node)
    if name in _CASTS or name == "reshape":
        return True
    if name == "dropout":
        probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is False or probability == 0.0
    if name == "getitem":
        index = node.args[1]
        return isinstance(index, tuple) and index == (Ellipsis, slice(None, -1, None))
    return False


def _fold(node: Any, scores: _Scores) -> fx.Node | str:
    """Walks back from the softmax's input to the product; the name of what stopped it, else."""
    while isinstance(node, fx.Node):
        name = op_name(node)
        if name in _PRODUCTS:
            return node
        step = _STEPS.get(name)
        previous = step(node, scores) if step else None
        if previous is None:
            return name or node.op
        node = previous
    return "a constant"


def _fold_add(node: fx.Node, scores: _Scores) -> fx.Node | None:
    left, right = node.args[:2]
    if node.kwargs or not isinstance(left, fx.Node):  # alpha=
        return None
    if isinstance(right, (int, float)):
        return left  # the same for every key
    for inner, mask in ((left, right), (right, left)):
        if _holds_product(inner) and not _holds_product(mask):
            # Under a soft cap an added term would be capped too: not the one form.
            if scores.softcap:
                return None
            scores.masks.append(MaskTerm(mask, scores.factor))
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
    return None


def _fold_div(node: fx.Node, scores: _Scores) -> fx.Node | None:
    inner, number = node.args[:2]
    if node.kwargs:  # rounding_mode=
        return None
    if isinstance(inner, fx.Node) and isinstance(number, (int, float)) and number > 0:
        scores.factor /= number
        return inner
    return None


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
    scores.masks.append(MaskTerm(mask, scores.factor, inverted, low))
    return inner


def _very_low(fill: Any) -> float | None:
    """The number, given as it is or as a constant tensor, if it hides a key from the softmax."""
    if isinstance(fill, fx.Node) and op_name(fill) in ("tensor", "full"):
        fill = fill.args[0] if op_name(fill) == "tensor" else fill.args[1]
    return float(fill) if isinstance(fill, (int, float)) and fill <= -1e37 else None


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
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or scores.sinks is not None:
        return None
    inner, sinks = tensors
    shape = shape_of(sinks)
    if scores.factor != 1.0 or scores.softcap or scores.masks or shape is None:
        return None
    if dim not in (-1, len(shape) - 1) or concrete(shape[-1]) != 1:
        return None
    scores.sinks = _per_head(sinks, concrete(shape[1]))
    return inner if scores.sinks is not None else None


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
        if len(inner) == 2 and name in (*_ADD, "where"):
            return any(_holds_product(a) for a in inner)
        node = node.args[0]
    return False


_STEPS = {
    **dict.fromkeys(_ADD, _fold_add),
    **dict.fromkeys(_MUL, _fold_mul),
    **dict.fromkeys(_DIV, _fold_div),
    **dict.fromkeys(_SUB, _fold_sub),
    **dict.fromkeys(_CASTS, _fold_cast),
    "tanh": _fold_tanh,
    "masked_fill": _fold_fill,
    "masked_fill_": _fold_fill,
    "where": _fold_fill,
    "cat": _fold_cat,
}
