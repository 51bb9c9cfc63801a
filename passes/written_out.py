"""A spelling of attention: `matmul -> scale, cap, mask -> softmax -> matmul`, seen as one core.

From each softmax the chain is followed back to the product of queries and keys and forward to the
product with the values. What may lie between is `score_steps`' to fold, the products are
`products`' to read. A softmax without both products (a router, a residual mixer) is no attention.
Analysis only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from loki_compile.kernels.fused import Layout
from loki_compile.passes.attention import Core, No, Reason, Skipped
from loki_compile.passes.calls import concrete, module_path, op_name, operand, same_size, shape_of
from loki_compile.passes.products import (
    PRODUCTS,
    VIEWS,
    ScoreProduct,
    after_view,
    is_batched,
    queries_by_keys,
    weights_by_values,
    without_ones,
)
from loki_compile.passes.score_steps import (
    CASTS,
    DIV,
    MUL,
    STEPS,
    Scores,
    fold_view,
    number_of,
    with_deep_fills,
)
from torch import fx


def core_at(softmax: fx.Node) -> Core | Skipped | None:
    """The core around a softmax, `Skipped` if it is attention but not understood, else None."""
    axis: Any = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    rank = len(shape_of(softmax) or ())
    found = _product_with_values(softmax) if rank and axis is not None else None
    if found is None:
        return None
    node, steps, odd = found
    walked, scores, axis = [softmax, *steps], Scores(), axis % rank
    over_keys = axis == rank - 1  # as nearly always; another dimension has to be seen to be
    try:
        product = _product_behind(walked, axis, odd, scores)
        first = _first_product(product, walked, axis, scores) if product is not None else None
        over_keys = True
        return None if first is None else _core(node, first, walked, scores)
    except No as no:
        return no.skipped(node, module_path(softmax)) if over_keys else None


def _product_behind(walked: list[fx.Node], axis: int, odd: str, scores: Scores) -> fx.Node | None:
    """The product of queries and keys; what is between goes to `scores`. None where there is none.

    walked: the calls from the softmax to the product with the values; odd: another reader.
    """
    softmax, back = walked[0], _straight_back(walked[0], axis)
    if not any(op_name(node) in PRODUCTS for node in back):
        scores_in = [node for node in back if node.op == "placeholder" and _like(node, softmax)]
        if not scores_in:
            return None
        raise No(Reason.BROKEN, f"come from another graph ({scores_in[0].name})")
    if odd:
        raise No(Reason.WEIGHTS_USED, odd)
    product = _fold(softmax.args[0], scores)
    trimmed = any(op_name(step) == "getitem" for step in walked)
    if trimmed != (scores.sink_logits is not None or scores.row_sinks):
        raise No(Reason.SOFTMAX, "a slice of the weights")
    return product


def _first_product(
    product: fx.Node, walked: list[fx.Node], axis: int, scores: Scores
) -> tuple[fx.Node, ScoreProduct] | None:
    """The product and its operands, laid out as the softmax sees it; None for no attention."""
    query, key = _factors(product, scores)
    first = queries_by_keys(query, key, product, scores.reads, scores.unscaled)
    if first is None:
        _refuse_layout(product, walked)
        return None
    layout = scores.lay_out(first.layout, first.sizes, axis)
    return product, dataclasses.replace(first, layout=layout)


def _refuse_layout(product: fx.Node, walked: list[fx.Node]) -> None:
    """Says that dimensions cannot be told, unless the product is of weights and so no attention."""
    if is_batched(product) or not any(op_name(step) in VIEWS for step in walked):
        raise No(Reason.LAYOUT, f"{op_name(product)} of {tuple(shape_of(product) or ())}")


def _core(
    node: fx.Node, found: tuple[fx.Node, ScoreProduct], walked: list[fx.Node], scores: Scores
) -> Core | None:
    product, laid_out = found
    other = _second_product(scores, laid_out)
    if (other is None) != (scores.added is None):
        raise No(Reason.SOFTMAX, "add")
    first, second = _named(laid_out, scores), None
    if first is not None:
        weights = _weights(first.layout, walked, scores, first.sizes)
        second = weights_by_values(node, walked[-1], weights, first.sizes, scores.reads)
    masks = with_deep_fills(scores.masks)
    if masks is None:
        raise No(Reason.SOFTMAX, "a fill beside other masks")
    if first is None or second is None:
        _refuse_layout(product, walked)
        return None
    # A softmax of nothing but -inf is NaN, unless a sink takes part or the weights are zeroed.
    zeroed = any(op_name(step) == "masked_fill" for step in walked)
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
        sink_logits=scores.sink_logits,
        row_sinks=scores.row_sinks,
        nan_if_fully_masked=not zeroed and scores.sink_logits is None and not scores.row_sinks,
        reads=tuple(scores.reads),
        query_layout=first.query_layout,
        out_layout=second.layout,
        second_product=other,
    )


def _second_product(
    scores: Scores, first: ScoreProduct
) -> tuple[fx.Node, fx.Node, tuple[int, int, int, int]] | None:
    """Queries, keys and their order of the product that is added, if it is laid out alike."""
    if scores.added is None:
        return None
    query, key = (*scores.added.args, None)[:2]
    other = queries_by_keys(query, key, scores.added, scores.reads, scores.unscaled)
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
    return op_name(node) in STEPS


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


def _factors(product: fx.Node, scores: Scores) -> tuple[Any, Any]:
    """Queries and keys; what `baddbmm` adds to their product and scales it by goes to `scores`."""
    if op_name(product) != "baddbmm":
        return product.args[0], product.args[1] if len(product.args) > 1 else None
    added, query, key = product.args[:3]
    beta, alpha = product.kwargs.get("beta", 1), product.kwargs.get("alpha", 1)
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)) or alpha <= 0:
        raise No(Reason.SOFTMAX, "baddbmm")
    if beta != 0 and not _is_zeros(added):
        if scores.softcap or scores.query_scales or not isinstance(added, fx.Node) or beta < 0:
            raise No(Reason.SOFTMAX, "baddbmm")
        scores.add_mask(added, product, float(beta))
    scores.factor *= alpha
    return query, key


def _is_zeros(node: Any) -> bool:
    """Whether the node makes zeros that only its one reader sees."""
    return isinstance(node, fx.Node) and op_name(node) == "zeros" and len(node.users) == 1


def _named(first: ScoreProduct, scores: Scores) -> ScoreProduct | None:
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


def _weights(layout: Layout, steps: list[fx.Node], scores: Scores, sizes: dict[str, Any]) -> Layout:
    """The layout of the weights behind `steps`."""
    for step in steps:
        name, after = op_name(step), layout
        if name in VIEWS:
            after = after_view(layout, step, sizes) or ()
        if (
            not after
            or (name == "getitem" and without_ones(after[-1], sizes) != "t")
            or (name == "masked_fill" and not scores.hide(step, after))
        ):
            raise No(Reason.SOFTMAX, name)
        layout = after
    return layout


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
        if op_name(node) not in PRODUCTS:
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
    return name in PRODUCTS and product.args[name == "baddbmm"] is weights


def _keeps_weights(node: fx.Node) -> bool:
    name = op_name(node)
    if name in (*CASTS, *VIEWS):
        return True
    if name == "dropout":
        probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return training is False or bool(probability == 0.0)
    if name == "getitem":
        index = node.args[1]
        return isinstance(index, tuple) and index == (Ellipsis, slice(None, -1, None))
    return name == "masked_fill" and number_of(node.args[2]) == 0


def _fold(node: Any, scores: Scores) -> fx.Node:
    """Walks back from the softmax's input to the product."""
    while isinstance(node, fx.Node):
        name = op_name(node)
        if name in PRODUCTS:
            return node
        step = STEPS.get(name)
        # The queries can carry what multiplies the product alone, nothing that is added to it.
        plain = not scores.query_scales or name in (*MUL, *DIV, *CASTS) or step is fold_view
        previous = step(node, scores) if step and plain else None
        if previous is None:
            raise No(Reason.SOFTMAX, name or node.op)
        node = previous
    raise No(Reason.SOFTMAX, "a constant")
