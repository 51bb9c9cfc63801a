"""A model's call, shown graph by graph to a function; afterwards as if it had not taken place.

Dynamo keeps what it compiles with the code of the function, shared by all models of a class, and
counts it: a watcher would use up the limit of the user's own `compile`, and be kept alive with its
graphs. So a copy of `forward`, which has code of its own, is compiled. Only fragments behind graph
breaks still lie with the model's code; they are counted apart where PyTorch can (2.13).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from loki_compile.floats import ask_for_values, float_inputs
from loki_compile.passes.normalize import normalize

Look = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

# Dynamo runs a frame eagerly, unseen, once it has been compiled this often.
_RECOMPILE_LIMIT = 1 << 16


@contextmanager
def watched(model: nn.Module, look: Look) -> Iterator[Callable[..., Any]]:
    """`model.forward`, each of whose graphs is handed to `look`, which says what runs in its place.

    It is for use inside the `with`; afterwards nothing holds `look` or what it returned.
    """
    watcher = _Watcher(look)
    apart: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        apart["isolate_recompiles"] = True
    limits = {
        "recompile_limit": _RECOMPILE_LIMIT,
        "accumulated_recompile_limit": _RECOMPILE_LIMIT,
    }
    try:
        with torch._dynamo.config.patch(limits):
            yield torch.compile(_copied(model.forward), backend=watcher.compile, **apart)
    finally:
        watcher.close()


class _Fragment:
    """What runs one graph, as long as somebody watches."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run: Callable[..., Any] | None = run

    def __call__(self, *args: Any) -> Any:
        assert self.run is not None
        return self.run(*args)


class _Watcher:
    def __init__(self, look: Look) -> None:
        self.look: Look | None = look
        self.fragments: list[_Fragment] = []

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        assert self.look is not None
        # A scale that is a symbol would hide its layer. Dynamo traces again, and comes back.
        if float_inputs(gm.graph):
            ask_for_values(normalize(gm)[0].graph)
        fragment = _Fragment(self.look(gm, example_inputs))
        self.fragments.append(fragment)
        return fragment

    def close(self) -> None:
        self.look = None
        for fragment in self.fragments:
            fragment.run = None
        self.fragments.clear()


def _copied(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own."""
    if isinstance(forward, types.MethodType):
        return types.MethodType(_copied(forward.__func__), forward.__self__)
    if not isinstance(forward, types.FunctionType):
        return _copied(lambda *args, **kwargs: forward(*args, **kwargs))
    copy = types.FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    copy.__dict__.update(forward.__dict__)
    return copy
