"""Keys and values behind their repetition over a group of query heads. Analysis only."""

from __future__ import annotations

import math

import torch
from loki_compile.passes.attention import Core, Heads
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
from loki_compile.passes.views import only_adds_dim, permutation, widens
from torch import fx


def heads_at(
    node: fx.Node,
    at: tuple[int, int, int, int],
    core: Core,
    writes: list[Write],
    most: int | None = None,
    scaled: bool = False,
) -> Heads:
    """`heads_of`, unless what lies behind may be written into before the core reads it.

    A repetition or `contiguous` copies: it holds the cache as it was at that point. In attention
    written out the keys are read by the first product, which lies before the core's node.
    """
    heads = heads_of(node, at, most, scaled)
    written = [write for write in writes if may_overlap(write.operand, heads.base)]
    if not written:
        return heads
    frozen = [node] if op_name(core.node) != "scaled_dot_product_attention" else []
    walked = node
    while walked is not heads.base:
        if not may_overlap(walked, heads.base):
            frozen.append(walked)
        walked = walked.all_input_nodes[0]
    order = {n: i for i, n in enumerate(core.node.graph.nodes)}
    if frozen and any(write.position > min(order[n] for n in frozen) for write in written):
        return Heads(node, at, 1)
    return heads


def heads_of(
    node: fx.Node,
    at: tuple[int, int, int, int] = (0, 1, 2, 3),
    most: int | None = None,
    scaled: bool = False,
) -> Heads:
    """Walks from a core's K or V operand back through permutations and head repetition.

    Stops at the first node that is neither; `base` is that node. The views it understands are
    transposes, permutations, casts between floating dtypes, a repetition of each KV head in place
    (`repeat_kv` by expand and reshape, `repeat_interleave`, an expand of one head), one of all KV
    heads behind each other (`repeat`, or expand and reshape) and copies that keep the values. `at`
    says which dimension of `node` is batch, head, token and head_dim; `most` is the largest
    repetition to look behind. `scaled` says to look behind a product with a positive number too.
    """
    base, order, group, tiled, number = node, list(at), 1, False, 1.0
    while True:
        times = _times(base) if scaled else None
        if times is not None:
            base, number = times[0], number * times[1]
            continue
        step, tiles = _through(base, order), False
        if step is None and group == 1:
            step, tiles = _through_tiles(base, order), True
        beyond = step is not None and most is not None and group * step[2] > most
        if step is None or beyond or (tiled and step[2] > 1):
            return Heads(base, (order[0], order[1], order[2], order[3]), group, tiled, number)
        one_head = order[1] >= 0 and concrete((shape_of(step[0]) or ())[step[1][1]]) == 1
        tiled = tiled or (tiles and not one_head)
        base, order, factor = step
        group *= factor


def _times(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor and the positive number that the call multiplies it with, by `mul` or `div`."""
    name, divides = op_name(node), op_name(node) in ("div", "truediv", "__truediv__")
    if not divides and name not in ("mul", "__mul__", "__rmul__"):
        return None
    if node.kwargs or len(node.args) != 2:
        return None
    tensor, number = node.args
    if not divides and isinstance(number, fx.Node):
        tensor, number = number, tensor
    if not isinstance(tensor, fx.Node) or isinstance(number, bool):
        return None
    if not isinstance(number, (int, float)) or not 0 < number < math.inf:
        return None
    before, after = fake_value(tensor), fake_value(node)
    if not isinstance(before, torch.Tensor) or before.dtype != after.dtype:
        return None
    return tensor, 1 / number if divides else float(number)


def _through(node: fx.Node, order: list[int]) -> tuple[fx.Node, list[int], int] | None:
    """One view back: the node before it, the order on that node, the repetition it adds."""
    name = op_name(node)
    if name in ("transpose", "permute", "movedim", "contiguous", "detach", "alias", "to", "float"):
        source = node.args[0]
        if not isinstance(source, fx.Node) or shape_of(source) is None:
            return None
        if name in ("contiguous", "detach", "alias"):
            return source, order, 1
        if name in ("to", "float"):
            return (source, order, 1) if _recasts(node) else None
        back = permutation(node)
        return source, [back[d] if d >= 0 else d for d in order], 1
    if name == "repeat_interleave":
        source, repeats = node.args[0], operand(node, "repeats")
        dim = operand(node, "dim")
        if isinstance(source, fx.Node) and isinstance(repeats, int) and isinstance(dim, int):
            rank = len(shape_of(source) or ())
            return (source, order, repeats) if dim % rank == order[1] else None
        return None
    if name in ("unsqueeze", "getitem"):
        return _through_new_head(node, order)
    if name == "expand":
        source = node.args[0]
        return _expanded_head(node, source, order) if isinstance(source, fx.Node) else None
    if name in ("reshape", "flatten"):
        return _through_repeat(node, order, new=order[1] + 1)
    return None


def _through_tiles(node: fx.Node, order: list[int]) -> tuple[fx.Node, list[int], int] | None:
    """One view back from all KV heads, repeated behind each other: like `_through`."""
    if op_name(node) in ("reshape", "flatten"):
        return _through_repeat(node, order, new=order[1])
    if op_name(node) != "repeat" or node.kwargs or order[1] < 0:
        return None
    source, times = node.args[0], node.args[1:]
    if len(times) == 1 and isinstance(times[0], (list, tuple)):
        times = tuple(times[0])
    rank = len(shape_of(source) or ())
    if not isinstance(source, fx.Node) or len(times) != rank:
        return None
    if any(n != 1 for dim, n in enumerate(times) if dim != order[1]):
        return None
    factor = times[order[1]]
    return (source, order, factor) if isinstance(factor, int) and factor > 0 else None


def _recasts(node: fx.Node) -> bool:
    """Whether a cast on one device leads from one floating dtype to another.

    The ops read a cache as it is stored. A cast that narrows it loses what they do not lose.
    """
    before, after = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
    floating = before.dtype.is_floating_point and after.dtype.is_floating_point
    return before.device == after.device and floating


def before_widening(query: fx.Node) -> fx.Node:
    """The queries before a cast that only widens them."""
    while op_name(query) in ("to", "float") and widens(query):
        query = query.args[0]  # type: ignore[assignment]
    return query


def _through_new_head(node: fx.Node, order: list[int]) -> tuple[fx.Node, list[int], int] | None:
    """`k.unsqueeze(1)` or `k[:, None]` that makes the head dimension of a single KV head."""
    source = node.args[0]
    rank = len(shape_of(node) or ())
    if not isinstance(source, fx.Node) or order[1] < 0:
        return None
    if op_name(node) == "unsqueeze":
        new = operand(node, "dim") % rank
    else:
        index = node.args[1]
        if not isinstance(index, tuple) or index.count(None) != 1:
            return None
        if any(i is not None and i != slice(None) for i in index):
            return None
        new = index.index(None)
    if new != order[1]:
        return None
    return source, [-1 if d == new else d - (d > new) for d in order], 1


def _expanded_head(
    node: fx.Node, source: fx.Node, order: list[int]
) -> tuple[fx.Node, list[int], int] | None:
    """One KV head expanded to all query heads; no other dimension may grow."""
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None or len(before) != len(after) or order[1] < 0:
        return None
    factor = 1
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        if same_size(old, new):
            continue
        times = concrete(new)
        if dim != order[1] or concrete(old) != 1 or times is None:
            return None
        factor = times
    return source, order, factor


def _through_repeat(
    node: fx.Node, order: list[int], *, new: int
) -> tuple[fx.Node, list[int], int] | None:
    """`repeat_kv`: a new dimension beside the heads, expanded to the group, folded into them.

    new: its place; behind the heads it makes blocks, in front of them tiles.
    """
    if order[1] < 0:
        return None
    expand = node.args[0]
    if not isinstance(expand, fx.Node) or op_name(expand) != "expand":
        return None
    grown = expand.args[0]
    if not isinstance(grown, fx.Node) or op_name(grown) not in ("unsqueeze", "getitem"):
        return None
    source = grown.args[0]
    if not isinstance(source, fx.Node):
        return None
    head, base, wide, out = order[1], shape_of(source), shape_of(expand), shape_of(node)
    if base is None or wide is None or out is None or len(base) != 4 or len(wide) != 5:
        return None
    group, kv_heads = concrete(wide[new]), concrete(base[head])
    thin = shape_of(grown)
    if group is None or kv_heads is None or thin is None or concrete(thin[new]) != 1:
        return None
    if concrete(out[head]) != group * kv_heads:
        return None
    for dim in range(4):
        if dim != head and not same_size(base[dim], out[dim]):
            return None
        if not same_size(wide[dim + (dim >= new)], base[dim]):
            return None
    if not only_adds_dim(grown, new):
        return None
    return source, order, group
