"""Python floats that Dynamo shows as symbols: which it must trace again with their values.

Under `dynamic=True`, or where a second model has another value in the same place, a float of the
model (a scale, an epsilon) comes in as an input. Inductor turns the arithmetic with it into that of
tensors; what it cannot turn it asks Dynamo, by an exception, to trace again as a number. Dynamo
takes that exception from a backend at work, and from nobody later. Variants are compiled later, and
a scale must be known before a site is judged: so both are asked for at once, here.

Floats alone: sizes and other ints stay as symbolic as they were.

Private API, run on torch 2.13 and read in 2.11: `FakeTensor.item_memo` of such an input,
`TensorifyState`, `TensorifyScalarRestartAnalysis`, `RestartAnalysis`, `compile_fx(inner_compile=)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext, tracing
from torch.utils._sympy.symbol import SymT, symbol_is_type

from loki_compile.passes.calls import fake_value, op_name, symbol_given_by
from loki_compile.passes.graphs import copy_of, fake_mode_of

__all__ = ["RestartAnalysis", "ask_for_values", "ask_what_inductor_asks", "float_inputs"]

_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "linear"})
_CORES = frozenset({"scaled_dot_product_attention", "flex_attention", "softmax"})


def float_inputs(graph: fx.Graph) -> dict[str, torch.SymFloat]:
    """The symbols of the floats that come in as inputs, by name."""
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        number = getattr(fake_value(node), "item_memo", None)
        if isinstance(number, torch.SymFloat):
            for name in _symbols(number):
                found[name] = number
    return found


def ask_for_values(graph: fx.Graph) -> None:
    """Has Dynamo trace again with the values of the floats that attention depends on.

    These are the ones that a fake tensor needed a value of while Dynamo traced (the scale of
    `scaled_dot_product_attention` is one), and those between a product and its softmax.

    Raises:
      TensorifyScalarRestartAnalysis: Dynamo's own, to be let through. Nothing is raised twice for
        one float.
    """
    inputs = float_inputs(graph)
    if not inputs:
        return
    fixed = {name for name, number in inputs.items() if number.node.expr.is_number}
    wanted = (fixed | set(_before_scores(graph))) & set(inputs)
    new = [name for name in sorted(wanted) if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def ask_what_inductor_asks(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raises now what Inductor would raise while it compiled this graph with float inputs.

    Inductor's own passes up to code generation run, on a copy.

    Raises:
      TensorifyScalarRestartAnalysis: Dynamo's own, to be let through.
    """
    if not float_inputs(gm.graph):
        return
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def stop_here(lowered: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
        return make_boxed_func(lowered.forward)

    with tracing(TracingContext(fake_mode_of(gm.graph))):
        compile_fx(copy_of(gm)[0], list(inputs), inner_compile=stop_here)  # type: ignore[arg-type]


def _before_scores(graph: fx.Graph) -> Iterator[str]:
    """Symbols of floats that a core is called with, or that meet scores before their softmax."""
    stack = [node for node in graph.nodes if op_name(node) in _CORES]
    seen = set(stack)
    while stack:
        node = stack.pop()
        whole = op_name(node) in _CORES and op_name(node) != "softmax"
        for read in node.all_input_nodes:
            value = fake_value(read)
            if isinstance(value, torch.SymFloat):
                yield from _symbols(value)
            # Before a product lies what makes queries and keys; before a core, another layer.
            elif not whole and read not in seen and op_name(read) not in _PRODUCTS:
                seen.add(read)
                stack.append(read)


def _symbols(number: torch.SymFloat) -> Iterator[str]:
    for symbol in symbol_given_by(number).free_symbols:
        if symbol_is_type(symbol, SymT.FLOAT):
            yield str(symbol)
