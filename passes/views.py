"""A tensor as a rearrangement of another: one algebra, one table of calls. Analysis only.

Each dimension of a `View` is a product of factors, which are steps along the dimensions of its
source. So `transpose` exchanges dimensions, `reshape` regroups factors, `expand` adds one that
moves along nothing, and a repetition of heads, folded heads or a dimension for groups are forms of
a view. `CALLS` says for each call that rearranges what it does to the view of its first operand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.calls import (
    concrete,
    fake_value,
    op_name,
    operand,
    same_size,
    shape_of,
)
from torch import fx

TURNS = ("transpose", "permute", "movedim")
CASTS = ("to", "float", "double", "half", "bfloat16", "type")
COPIES = ("contiguous", "clone")
SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "unbind")


@dataclass(frozen=True)
class Step:
    """A factor of a dimension: advancing by one moves `step` along `axis` of the source.

    axis: None where it moves along none, since the tensor was expanded.
    """

    axis: int | None
    size: Any
    step: int = 1


Dim = tuple[Step, ...]


@dataclass(frozen=True)
class View:
    """A tensor as a rearrangement of `source`, of which it takes a window that begins at `starts`.

    `dims` has the factors of each dimension, outermost first; those of size one may be among them,
    to say which dimension of the source it was. `starts` has None for a number that is not
    constant; `cut` are the source's dimensions that are not taken whole. `walked` are the nodes
    between, first to last, `source` not among them.
    """

    source: fx.Node
    dims: tuple[Dim, ...]
    starts: tuple[int | None, ...]
    cut: frozenset[int] = frozenset()
    walked: tuple[fx.Node, ...] = ()

    @property
    def sizes(self) -> tuple[Any, ...]:
        return tuple(math.prod(step.size for step in steps) for steps in self.dims)

    def factors(self, dim: int) -> Dim:
        """Those of a dimension that are not of size one."""
        return tuple(step for step in self.dims[dim] if concrete(step.size) != 1)

    def axis(self, dim: int) -> int | None:
        """The dimension of the source that a dimension is, or is a window of; None: no single one.

        None too where it is new, or of size one and nobody's.
        """
        steps = self.factors(dim) or self.dims[dim][:1]
        return steps[0].axis if len(steps) == 1 else None

    def whole(self, axis: int | None) -> Any:
        """The size of a dimension of the source."""
        return 1 if axis is None else (shape_of(self.source) or ())[axis]

    def with_dims(self, dims: Sequence[Dim]) -> View:
        return dataclasses.replace(self, dims=tuple(dims))

    def with_dim(self, dim: int, *new: Dim) -> View:
        """The view with others in the place of one dimension."""
        return self.with_dims([*self.dims[:dim], *new, *self.dims[dim + 1 :]])


def identity(node: fx.Node) -> View:
    sizes = shape_of(node) or ()
    return View(node, tuple((Step(d, n),) for d, n in enumerate(sizes)), (0,) * len(sizes))


def operand_of_view(node: fx.Node) -> fx.Node | None:
    """The tensor that a call of `CALLS` rearranges; None for another call."""
    source = node.args[0] if node.args else None
    if op_name(node) == "getitem" and isinstance(source, fx.Node) and op_name(source) in SPLITS:
        source = source.args[0] if source.args else None
    if op_name(node) not in CALLS or not isinstance(source, fx.Node):
        return None
    return source if shape_of(node) is not None and shape_of(source) is not None else None


def through(node: fx.Node, view: View) -> View | None:
    """The view that a call of `CALLS` gives, for one of its operand; None where it is not followed.

    A cast is a view whatever it casts to: callers look at that. No other call changes the dtype.
    """
    source = operand_of_view(node)
    if source is None or (op_name(node) not in CASTS and not same_type(node, source)):
        return None
    after = CALLS[op_name(node)](node, view)
    return after and dataclasses.replace(after, walked=(*after.walked, node))


def view_of(node: fx.Node, follows: Callable[[fx.Node, View], bool]) -> View:
    """Back through calls that only rearrange, to the first that does not.

    follows: whether a call, and the view behind it, may be among them.
    """
    source = operand_of_view(node)
    after = through(node, view_of(source, follows)) if source is not None else None
    return after if after is not None and follows(node, after) else identity(node)


def views_behind(
    node: fx.Node, behind: Callable[[fx.Node], fx.Node | None] = operand_of_view
) -> Iterator[View]:
    """`node` as a view of itself, of the tensor it rearranges, of what that rearranges, ...

    Views that cannot be expressed are left out. behind: what to look at behind a call; one that is
    not in `CALLS` changes numbers and moves none.
    """
    calls: list[fx.Node] = []
    source: fx.Node | None = node
    while source is not None:
        view: View | None = identity(source)
        for step in reversed(calls):
            view = through(step, view) if view and op_name(step) in CALLS else view
        if view is not None:
            yield dataclasses.replace(view, walked=tuple(reversed(calls)))
        calls.append(source)
        source = behind(source)


def same_type(a: fx.Node, b: fx.Node) -> bool:
    x, y = fake_value(a), fake_value(b)
    return (x.dtype, x.device) == (y.dtype, y.device)


def widens(node: fx.Node) -> bool:
    """Whether a cast on one device keeps the dtype or makes it float32, which no value notices.

    The ops compute in float32 whatever they are given: a product of widened operands is theirs.
    """
    before, after = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
    wider = after.dtype == torch.float32 and before.dtype in (torch.float16, torch.bfloat16)
    return before.device == after.device and (wider or before.dtype == after.dtype)


def splits_heads(node: fx.Node) -> bool:
    """Whether the call makes (..., heads, head_dim) of a last dimension that holds both."""
    source = node.args[0] if node.args else None
    before, after = shape_of(source), shape_of(node)
    if op_name(node) not in ("reshape", "unflatten") or before is None or after is None:
        return False
    if len(after) != len(before) + 1 or concrete(after[-2]) is None:
        return False
    return same_size(after[-2] * after[-1], before[-1]) and all(
        map(same_size, after[:-2], before[:-1])
    )


# --- the calls


def permutation(node: fx.Node) -> list[int]:
    """For one of `TURNS`: which dimension of the input each output one is."""
    rank = len(shape_of(node) or ())
    name = op_name(node)
    if name == "transpose":
        a, b = operand(node, "dim0") % rank, operand(node, "dim1") % rank
        back = list(range(rank))
        back[a], back[b] = b, a
        return back
    if name == "permute":
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dims")
        return [d % rank for d in dims]
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    moved = torch.movedim(probe, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    return [size - 2 for size in moved.shape]


def _turned(node: fx.Node, view: View) -> View:
    return view.with_dims([view.dims[d] for d in permutation(node)])


def _copied(node: fx.Node, view: View) -> View:
    return view


def _unsqueezed(node: fx.Node, view: View) -> View:
    dims = list(view.dims)
    dims.insert(operand(node, "dim") % (len(dims) + 1), ())
    return view.with_dims(dims)


def _squeezed(node: fx.Node, view: View) -> View | None:
    dim = operand(node, "dim")
    if not isinstance(dim, int):
        return _regrouped(node, view)
    same_rank = len(shape_of(node) or ()) == len(view.dims)
    return view if same_rank else view.with_dim(dim % len(view.dims))


def _expanded(node: fx.Node, view: View) -> View | None:
    return spread(view, tuple(shape_of(node) or ()))


def spread(view: View, sizes: tuple[Any, ...]) -> View | None:
    """Broadcast to `sizes`."""
    missing = len(sizes) - len(view.dims)
    if missing < 0:
        return None
    dims: list[Dim] = [()] * missing + list(view.dims)
    for dim, size in enumerate(sizes):
        before = math.prod(step.size for step in dims[dim])
        if not same_size(before, size):
            if concrete(before) != 1:
                return None
            dims[dim] = (*dims[dim], Step(None, size, 0))
    return view.with_dims(dims)


def _each_repeated(node: fx.Node, view: View) -> View | None:
    repeats, dim = operand(node, "repeats"), operand(node, "dim")
    if type(repeats) is not int or not isinstance(dim, int):
        return None
    dim %= len(view.dims)
    return view.with_dim(dim, (*view.dims[dim], Step(None, repeats, 0)))


def _repeated(node: fx.Node, view: View) -> View | None:
    times = node.args[1:]
    if len(times) == 1 and isinstance(times[0], (list, tuple)):
        times = tuple(times[0])
    missing = len(times) - len(view.dims)
    if node.kwargs or missing < 0 or not all(type(n) is int and n > 0 for n in times):
        return None
    dims: list[Dim] = [()] * missing + list(view.dims)
    return view.with_dims(
        [dim if n == 1 else (Step(None, n, 0), *dim) for n, dim in zip(times, dims, strict=True)]
    )


def _narrowed(node: fx.Node, view: View) -> View | None:
    dim = operand(node, "dim") % len(view.dims)
    return _window(view, dim, operand(node, "start"), (shape_of(node) or ())[dim])


def _selected(node: fx.Node, view: View) -> View | None:
    return _taken(view, operand(node, "dim") % len(view.dims), operand(node, "index"))


def _part_or_index(node: fx.Node, view: View) -> View | None:
    split = node.args[0]
    if not isinstance(split, fx.Node) or op_name(split) not in SPLITS:
        return indexed(view, node.args[1], shape_of(node))
    parts, number, name = fake_value(split), node.args[1], op_name(split)
    at = 1 if name == "unbind" else 2
    dim = split.kwargs.get("dim", split.args[at] if len(split.args) > at else 0)
    if not isinstance(parts, (tuple, list)) or type(number) is not int or type(dim) is not int:
        return None
    dim, number = dim % len(view.dims), number % len(parts)
    if name == "unbind":
        return _taken(view, dim, number)
    sizes = [concrete(part.shape[dim]) for part in parts]
    before = sum(n for n in sizes[:number] if n is not None)
    start = before if None not in sizes[:number] else None
    return _window(view, dim, start, parts[number].shape[dim])


def indexed(view: View, index: Any, shape: Sequence[Any] | None = None) -> View | None:
    """`view[index]` for slices, numbers, None and `...`.

    shape: of the result; where it is not known, slices must have constant ends.
    """
    dim = 0
    for item in items_of(index, len(view.dims)):
        after: View | None = None
        if item is None:
            after = view.with_dims([*view.dims[:dim], (), *view.dims[dim:]])
        elif isinstance(item, slice) and shape is not None:
            step = 1 if item.step is None else item.step
            after = _window(view, dim, item.start or 0, shape[dim], step)
        elif isinstance(item, slice):
            after = _sliced(view, dim, item)
        elif is_number(item):
            after = _taken(view, dim, item)
        if after is None:
            return None
        view, dim = after, dim + (item is None or isinstance(item, slice))
    return view


def items_of(index: Any, rank: int) -> list[Any]:
    """An index of a tensor as one item for each dimension (and each None), without an ellipsis."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    at = next((n for n, item in enumerate(items) if item is Ellipsis), len(items))
    items[at : at + 1] = [slice(None)] * (rank - taken)
    return items


def is_number(item: Any) -> bool:
    return (isinstance(item, int) and not isinstance(item, bool)) or (
        isinstance(item, fx.Node) and isinstance(fake_value(item), (int, torch.SymInt))
    )


def _sliced(view: View, dim: int, item: slice) -> View | None:
    if item == slice(None):
        return view
    size = concrete(view.sizes[dim])
    if size is None or not all(e is None or type(e) is int for e in (item.start, item.stop)):
        return None
    if item.step not in (None, 1):
        return None
    start, stop, _ = item.indices(size)
    return _window(view, dim, start, stop - start) if stop > start else None


def _taken(view: View, dim: int, index: Any) -> View | None:
    cut = _window(view, dim, index, 1)
    return cut and cut.with_dim(dim)


def _window(view: View, dim: int, start: Any, length: Any, step: int = 1) -> View | None:
    """`length` entries of a dimension from `start` on; a start that is no number is not known."""
    size = view.sizes[dim]
    if step == 1 and same_size(size, length):
        return view
    steps = view.factors(dim) or view.dims[dim][:1]
    if type(step) is not int or len(steps) != 1 or steps[0].axis is None:
        return None
    axis, stride = steps[0].axis, steps[0].step
    known = start if type(start) is int else None
    if known is not None and known < 0:
        known = known + size if type(size) is int else None
    begun = view.starts[axis]
    starts = list(view.starts)
    starts[axis] = None if begun is None or known is None else begun + known * stride
    return dataclasses.replace(
        view.with_dim(dim, (Step(axis, length, stride * step),)),
        starts=tuple(starts),
        cut=view.cut | {axis},
    )


def _regrouped(node: fx.Node, view: View) -> View | None:
    """Factors are regrouped, and split where a dimension ends within one."""
    queue = [step for steps in view.dims for step in steps]
    dims: list[Dim] = []
    for size in shape_of(node) or ():
        taken: list[Step] = []
        while not same_size(math.prod(step.size for step in taken), size):
            if not queue:
                return None
            step = queue.pop(0)
            wanted, known = concrete(size), concrete(step.size)
            rest = concrete(math.prod(other.size for other in taken))
            if wanted is not None and known is not None and rest is not None:
                left = wanted // rest if rest else 0
                if left * rest != wanted or not left or (known > left and known % left):
                    return None
                if known > left:
                    inner = known // left
                    queue.insert(0, dataclasses.replace(step, size=inner))
                    step = dataclasses.replace(step, size=left, step=step.step * inner)
            taken.append(step)
        if not taken and queue and concrete(queue[0].size) == 1:
            taken.append(queue.pop(0))
        dims.append(tuple(taken))
    return None if any(concrete(step.size) != 1 for step in queue) else view.with_dims(dims)


CALLS: dict[str, Callable[[fx.Node, View], View | None]] = {
    **dict.fromkeys(TURNS, _turned),
    **dict.fromkeys(("reshape", "flatten", "unflatten"), _regrouped),
    **dict.fromkeys((*COPIES, "detach", "alias", *CASTS), _copied),
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "expand": _expanded,
    "repeat_interleave": _each_repeated,
    "repeat": _repeated,
    "narrow": _narrowed,
    "select": _selected,
    "getitem": _part_or_index,
}
