"""What compiles rewritten graphs: Inductor, or what a user or a test puts in its place; and when:
at once, or behind Dynamo's back, when a graph is first needed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from loki_compile import instruction_sets
from loki_compile.counts import Tally, say_compiling
from loki_compile.direct_calls import call_directly
from loki_compile.floats import RestartAnalysis, float_inputs
from loki_compile.passes.blocks import Piece, find_blocks
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import copy_of, fake_mode_of
from loki_compile.passes.row_products import FEW, find_row_products, sum_rows
from loki_compile.piece_calls import in_a_row, with_room

log = logging.getLogger("loki_compile")

# One compiled form of a graph.
Variant = Callable[..., Any]
# Compiles a graph: (gm, inputs, *, mode, options) -> a function of the same inputs.
Engine = Callable[..., Callable[..., Any]]


def default() -> Engine:
    """The engine of graphs that name none; see `default_engine`."""
    return _engine


def _fakes(gm: fx.GraphModule) -> list[Any]:
    return [fake_value(node) for node in gm.graph.find_nodes(op="placeholder")]


def inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    """The engine that users get.

    Args:
      gm: a graph, which may be edited.
      inputs: its inputs, fake where Dynamo has returned already.
      mode: torch.compile's mode, or None.
      options: `LokiConfig.inductor`.

    Returns:
      A function of the graph's inputs that returns its outputs as a list or tuple.
    """
    patches = torch._inductor.list_mode_options(mode) if mode and mode != "default" else {}
    devices = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
    known = instruction_sets.options() if devices == {"cpu"} else {}
    run = torch._inductor.compile(gm, list(inputs), options={**known, **patches, **options})
    if devices == {"cpu"}:
        call_directly(run)
    return run


def inductor_by_blocks(
    gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    """`inductor` for graphs that are compiled behind Dynamo's back and record no gradients: of
    equal blocks, one is compiled.

    A graph is compiled whole where it is one CUDA graph, where weights become constants
    (`freezing`), where a float comes in as an input (Inductor would ask for its value as often as a
    block does without it), and where few of its blocks are equal; on a device as well, which would
    wait for the host to call each block (0.1 ms on a CPU, not measured elsewhere).
    """
    patches = torch._inductor.list_mode_options(mode) if mode and mode != "default" else {}
    patches = {**patches, **options}
    with torch._inductor.config.patch(patches):
        whole = torch._inductor.config.triton.cudagraphs or torch._inductor.config.freezing
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    if any(value.device.type != "cpu" for value in tensors) or float_inputs(gm.graph):
        whole = True
    pieces = None if whole else find_blocks(gm.graph)
    if pieces is None:
        return with_room(inductor(gm, inputs, mode=mode, options=options))
    runs: dict[Hashable, Callable[..., Any]] = {}
    compiled: dict[Hashable, Piece] = {}
    for piece in pieces:
        if piece.kind not in runs:
            compiled[piece.kind] = piece
            values = [fake_value(node) for node in piece.inputs]
            # What AOTAutograd notes of one graph is none of another's.
            with torch._guards.tracing(torch._guards.TracingContext(fake_mode_of(gm.graph))):
                runs[piece.kind] = inductor(
                    piece.graph_module(gm), values, mode=mode, options=options
                )
    for piece in pieces:
        _guard_as(compiled[piece.kind], piece, fake_mode_of(gm.graph).shape_env)
    log.debug("%d pieces of a graph, %d compiled", len(pieces), len(runs))
    return in_a_row(gm.graph, pieces, [runs[piece.kind] for piece in pieces])


def _guard_as(compiled: Piece, piece: Piece, shape_env: Any) -> None:
    """Adds guards: what is known of the sizes of the piece that was compiled, of another's.

    Each cache's length is a symbol of its own, and what was compiled may rely on a guard on one.

    Private API, checked on torch 2.11 and 2.13: the fields of a `ShapeGuard`.
    """
    symbols = dict(zip(compiled.symbols, piece.symbols, strict=True))
    own = {symbol for symbol, other in symbols.items() if symbol != other}
    if not own:
        return
    there = {guard.expr for guard in shape_env.guards}
    for guard in list(shape_env.guards):
        free = guard.expr.free_symbols
        if free & own and free <= symbols.keys():
            expr = guard.expr.xreplace(symbols)
            if expr not in there:
                there.add(expr)
                shape_env.guards.append(guard._replace(expr=expr))


def in_blocks(engine: Engine) -> Engine:
    """The engine for graphs that are compiled behind Dynamo's back: another is left as it is."""
    return inductor_by_blocks if engine is inductor else engine


def with_row_products(engine: Engine) -> Engine:
    """Inductor for graphs that need not be its own to the bit: on CPUs, products with few rows are
    sums that it vectorises (`passes.row_products`). Another engine is left as it is; so is
    `freezing`, under which weights get an order of their own."""
    if engine not in (inductor, inductor_by_blocks):
        return engine

    def run(
        gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None, options: dict[str, Any]
    ) -> Callable[..., Any]:
        with torch._inductor.config.patch(options):
            frozen = torch._inductor.config.freezing
        if not frozen and any(isinstance(value, torch.Tensor) for value in inputs):
            gm = sum_rows(gm, find_row_products(gm.graph, gm.meta.get(FEW, ())))
        return engine(gm, inputs, mode=mode, options=options)

    return run


def interpreter(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """The engine that runs a graph as it is, node by node: nothing to wait for, nothing fused."""
    run: Callable[..., Any] = gm.forward
    return run


_engine: Engine = inductor


@contextlib.contextmanager
def default_engine(engine: Engine) -> Iterator[None]:
    """Graphs that are traced within it, in any thread, go to this engine if they name no other.

    For where a backend can be given by its name only. What is compiled already stays as it is.
    """
    global _engine
    before, _engine = _engine, engine
    try:
        yield
    finally:
        _engine = before


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Where a thread makes graphs behind Dynamo's back: Dynamo and other threads wait for it.

    One graph's values share a fake mode, which serves one thread at a time, and while `torch.fx`
    traces, it patches modules for the whole process. Never to be asked for by who holds a lock that
    Dynamo's thread may want.

    Private API, checked on torch 2.11 and 2.13: Dynamo's lock, and the flag that it sets as well.
    Without the flag, what other threads call meanwhile raises that `torch.fx` is tracing it.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = before


def autocast_now(gm: fx.GraphModule) -> list[tuple[str, torch.dtype, bool]]:
    """Autocast as it is: (type, dtype, whether enabled) for each type of device in the graph."""
    values = [value for value in _fakes(gm) if isinstance(value, torch.Tensor)]
    types = {"cpu", *(value.device.type for value in values)}
    return [
        (name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name))
        for name in sorted(filter(torch.amp.is_autocast_available, types))
    ]


def compile_late(
    gm: fx.GraphModule,
    what: str,
    missed: Callable[[], None],
    *,
    compile_graph: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    known: int,
    tally: Tally,
    sites: int,
    autocast: Sequence[tuple[str, torch.dtype, bool]],
) -> Variant:
    """Compiles a graph after Dynamo has returned, under the fake mode it traced with.

    Private API, checked on torch 2.11 and 2.13: `torch._guards.tracing` and the guards of a
    `ShapeEnv`. Dynamo's guards exist already, so a guard that Inductor adds now must be checked by
    us; where it does not hold, the same graph runs node by node.

    `autocast` is `autocast_now` of then: whoever traces the graph again takes the casts of
    autocast from the state around it.
    """
    say_compiling(tally, what, sites)
    values = _fakes(gm)
    fake_mode = fake_mode_of(gm.graph)
    shape_env = fake_mode.shape_env
    try:
        with contextlib.ExitStack() as around:
            around.enter_context(torch._guards.tracing(torch._guards.TracingContext(fake_mode)))
            for device_type, dtype, enabled in autocast:
                around.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
            run = compile_graph(copy_of(gm)[0], values)  # Inductor may edit what it is given
    except RestartAnalysis as error:  # for Dynamo, which has returned: nobody would trace again
        log.warning(
            "Inductor wants a decode graph traced again (%s), too late: the graph runs node by "
            "node, slowly. torch._dynamo.config.specialize_float=True avoids it.",
            type(error).__name__,
        )
        return gm
    added = shape_env.guards[known:]
    return run if not added else _where_guards_hold(run, gm, added, missed)


def _where_guards_hold(
    run: Callable[..., Any], gm: fx.GraphModule, added: Sequence[Any], missed: Callable[[], None]
) -> Variant:
    """A compiled graph that is called where guards hold; elsewhere the same graph runs node by
    node, and `missed` is told."""
    log.debug("late guards: %s", [guard.expr for guard in added])
    values, shape_env = _fakes(gm), fake_mode_of(gm.graph).shape_env
    symbols = [v for v in values if isinstance(v, torch.SymInt)]
    places = [i for i, v in enumerate(values) if isinstance(v, torch.SymInt)]
    code = shape_env.produce_guards_expression(
        symbols, guards=list({guard.expr: guard for guard in added}.values())
    )
    if code is not None:
        code = compile(code, "<late guards>", "eval")  # it is evaluated at each call

    def run_or_interpret(*args: Any) -> Any:
        sizes = [args[place] for place in places]
        if code is None or shape_env.evaluate_guards_expression(code, sizes):
            return run(*args)
        missed()
        return gm(*args)

    return run_or_interpret
