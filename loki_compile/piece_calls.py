"""Calls one compiled piece of a graph after the other, with nothing between them.

What `torch._inductor.compile` returns wraps Inductor's own function in five others, which cost a
step of 30 blocks as much as 2 of its 50 ms: behind each block their code has left the processor's
caches. At its first call a piece is watched. Where the wrappers hand on the arguments as they are,
return the results as they are, and only count up versions of what is written, later calls go to
Inductor's function, and versions are counted for all pieces at once.

All of them are called from a frame with room behind it. CPython keeps the frames of a thread in
chunks of 16 KiB; where a chunk happens to end between a row and its pieces, each call into a piece
maps memory, and gives it back: 0.1 ms for each block, at some depths of the stack.

Private API, checked on torch 2.11 and 2.13: `CompiledFxGraph` with its `current_callable`, which
takes a list that it empties. Where the walk to it finds none, a piece stays wrapped.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from loki_compile.passes.blocks import Piece

# The words of a chunk of CPython's stack of frames.
_CHUNK_WORDS = 16 * 1024 // 8


@dataclass(frozen=True)
class Direct:
    """What a piece's wrappers come to.

    Attributes:
      function: takes the piece's arguments as a list, which it empties; returns its results.
      written: numbers of the arguments whose versions are counted up at each call.
    """

    function: Callable[[list[Any]], Sequence[Any]]
    written: tuple[int, ...]


def in_a_row(
    graph: fx.Graph, pieces: Sequence[Piece], runs: Sequence[Callable[..., Any]]
) -> Callable[..., Any]:
    """A function of the graph's inputs that calls one piece's function after the other.

    Args:
      graph: its inputs and outputs are those of the function.
      pieces: all calls of the graph, in order.
      runs: compiled, for each piece; equal pieces share one function.
    """
    first = _FirstCalls()
    run_first = _row(graph, pieces, [first.watched(run) for run in runs])
    rest: Callable[..., Any] | None = None

    def run_all(*args: Any) -> Any:
        nonlocal rest
        if rest is None:
            results = run_first(*args)
            rest = with_room(_without_wrappers(graph, pieces, runs, first.direct))
            return results
        if not torch.is_grad_enabled():
            return rest(*args)
        with torch.no_grad():
            return rest(*args)

    return run_all


def _row(
    graph: fx.Graph, pieces: Sequence[Piece], calls: Sequence[Callable[[list[Any]], Any]]
) -> Callable[..., Any]:
    """The row as a line of Python for each call. An intermediate result lives as long as it is
    read; results may be fewer than what a piece returns, never more."""
    row = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(graph.find_nodes(op="placeholder")):
        made[node] = row.placeholder(f"input_{number}")
    for piece, call in zip(pieces, calls, strict=True):
        results = row.call_function(call, ([made[node] for node in piece.inputs],))
        for number, node in enumerate(piece.outputs):
            made[node] = row.call_function(operator.getitem, (results, number))
    row.output(fx.map_arg(graph.output_node().args[0], made.__getitem__))
    run: Callable[..., Any] = fx.GraphModule(torch.nn.Module(), row).forward
    return run


def _without_wrappers(
    graph: fx.Graph,
    pieces: Sequence[Piece],
    runs: Sequence[Callable[..., Any]],
    direct: dict[Callable[..., Any], Direct | None],
) -> Callable[..., Any]:
    calls, written = [], []
    given = list(graph.find_nodes(op="placeholder"))
    for piece, run in zip(pieces, runs, strict=True):
        found = direct[run]
        calls.append(found.function if found else _unboxed(run))
        written += [piece.inputs[number] for number in found.written] if found else []
    counted = [given.index(node) for node in dict.fromkeys(written) if node in given]
    row = _row(graph, pieces, calls)
    if not counted:
        return row
    count_up = torch.autograd.graph.increment_version

    def run_all(*args: Any) -> Any:
        count_up([args[number] for number in counted])
        return row(*args)

    return run_all


def with_room(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, called from a frame that fits into no chunk of CPython's stack that is begun already.

    The interpreter gives such a frame a chunk of its own with 1000 words to spare (`push_chunk` in
    pystate.c, checked on 3.11): more than a piece and what it calls take.
    """

    def call(*args: Any) -> Any:
        return run(*args)

    # What a frame reserves for its operands is not written, unlike its variables: pages that are
    # not touched are not mapped.
    call.__code__ = call.__code__.replace(co_stacksize=_CHUNK_WORDS)
    return call


def _unboxed(run: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    return lambda args: run(*args)


class _FirstCalls:
    """Watches the first call of each function; `direct` has what was found."""

    def __init__(self) -> None:
        self.direct: dict[Callable[..., Any], Direct | None] = {}

    def watched(self, run: Callable[..., Any]) -> Callable[[list[Any]], Any]:
        def call(args: list[Any]) -> Any:
            if run in self.direct:
                return run(*args)
            results, self.direct[run] = _watch(run, args)
            return results

        return call


def _watch(run: Callable[..., Any], args: list[Any]) -> tuple[Any, Direct | None]:
    """The results of a call, and what its wrappers come to, None where they do more."""
    compiled = inductors(run)
    if compiled is None:
        return run(*args), None
    function = compiled.current_callable
    before = [_version(arg) for arg in args]
    seen: list[tuple[list[Any], list[int | None], bool, Any]] = []

    def watching(given: list[Any]) -> Any:
        taken, versions = list(given), [_version(arg) for arg in given]
        results = function(given)
        seen.append((taken, versions, torch._C._is_any_autocast_enabled(), results))
        return results

    autocast = torch._C._is_any_autocast_enabled()
    compiled.current_callable = watching
    try:
        results = run(*args)
    finally:
        compiled.current_callable = function
    if len(seen) != 1:  # another thread calls it as well
        return results, None
    taken, versions, autocast_within, returned = seen[0]
    as_they_are = _same(taken, args) and _same(returned, results) and autocast == autocast_within
    if not as_they_are or any(vars(x) for x in results if isinstance(x, torch.Tensor)):
        return results, None
    written = tuple(i for i, version in enumerate(versions) if version != before[i])
    return results, Direct(function, written)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _version(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def inductors(run: Callable[..., Any]) -> Any:
    """The one compiled graph that a function calls, None where there is not exactly one."""
    from torch._inductor.output_code import CompiledFxGraph

    found = [value for value in _reached(run) if isinstance(value, CompiledFxGraph)]
    return found[0] if len(found) == 1 else None


def _reached(run: Callable[..., Any]) -> Iterator[Any]:
    """A function, and what it and those that it calls hold in closures, functions and objects of
    PyTorch that are called."""
    seen: set[int] = set()
    waiting: list[Any] = [run]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        held: list[Any] = []
        if isinstance(value, types.FunctionType):
            held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        elif type(value).__module__.startswith("torch._functorch."):
            held = list(getattr(value, "__dict__", {}).values())
        waiting.extend(x for x in held if callable(x) and not isinstance(x, torch.nn.Module))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
