"""What watches: graphs as Dynamo makes them, engines that note what they get, calls of ops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from loki_compile.kernels import cpu
from loki_compile.kernels.ops import with_bool_mask
from loki_compile.passes.normalize import normalize
from torch import fx

from loki_compile import reset_stats
from loki_compile.counts import forget_notices
from loki_compile.deferred import PRICE
from loki_compile.engines import Engine, interpreter
from loki_compile.report import clear_reports


@dataclass
class Compiled:
    """An interpreter as engine, and the graphs that were handed to it, in order."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return interpreter(gm, inputs, **options)

    def calls(self, name: str) -> int:
        """Calls of an op such as "loki.select" in all graphs."""
        return sum(count_calls(gm.graph, name) for gm in self.graphs)


@contextmanager
def recorded(name: str, calls: list[tuple[tuple[Any, ...], torch.Tensor]]) -> Iterator[None]:
    """Calls of loki::<name> on the CPU are noted: their positional arguments and their result."""
    library = torch.library.Library("loki", "IMPL")
    kernel = with_bool_mask(getattr(cpu, name))

    def note(*args, **kwargs):
        calls.append((args, kernel(*args, **kwargs)))
        return calls[-1][1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the kernel is overridden is the purpose
        library.impl(name, note, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def count_calls(graph: fx.Graph, name: str) -> int:
    return sum(
        node.op in ("call_function", "call_method") and str(node.target).startswith(name)
        for node in graph.nodes
    )


def count_attention(graph: fx.Graph) -> int:
    return sum(
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "scaled_dot_product_attention"
        for node in graph.nodes
    )


def interpret(use_engine: Callable[[Engine], None]) -> Compiled:
    """Puts an interpreter in Inductor's place: seconds become milliseconds.

    Returns what collects the graphs that Inductor would have compiled.
    """
    compiled = Compiled()
    torch._dynamo.reset()
    clear_runtime()
    use_engine(compiled)
    return compiled


def is_sparse(gm: fx.GraphModule) -> bool:
    """Whether an engine is given the sparse variant."""
    return count_calls(gm.graph, "loki.attend") > 0


def clear_runtime() -> None:
    """Forgets counts, reports, the bases that were fitted and what compiling took here."""
    PRICE.seconds, PRICE.nodes = 0.0, 0
    reset_stats()
    clear_reports()
    forget_notices()


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The first graph that Dynamo makes of a call, which runs."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    return graphs[0]


def normal_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    return normalize(capture(function, *args, **kwargs))[0]
