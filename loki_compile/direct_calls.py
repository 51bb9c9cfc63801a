"""Has what Inductor compiled call the CPU kernels of our ops without PyTorch's dispatcher.

Between code that Inductor wrote in Python and a kernel that is called from Python the dispatcher
only turns each argument into its own kind of value and back: 10 µs of the 20 of a `loki::select`
over few keys, 3 % of a step of 30 layers behind 1500 tokens (docs/measured.md). Where something
looks on, a dispatch mode or the profiler, ops are called as ops.

Private API, checked on torch 2.13: the module that Inductor's code lies in names the ops
by its global `torch`, as `torch.ops.loki.select.default`. Where there is no such module, nothing is
changed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from loki_compile.kernels.ops import CPU_KERNELS
from loki_compile.piece_calls import inductors


def call_directly(run: Callable[..., Any]) -> None:
    """Changes a function that `torch._inductor.compile` returned, for CPUs alone."""
    compiled = inductors(run)
    if compiled is None:
        return
    function = compiled.current_callable
    module = getattr(getattr(function, "__func__", function), "__globals__", {})
    if module.get("call") == function and module.get("torch") is torch:
        module["torch"] = torch_with_kernels()


@functools.cache
def torch_with_kernels() -> types.ModuleType:
    """PyTorch, but for our ops."""
    shown = _Shown("torch", torch)
    shown.__dict__.update(vars(torch))
    ops, loki = _Shown("torch.ops", torch.ops), _Shown("torch.ops.loki", torch.ops.loki)
    shown.__dict__["ops"], ops.__dict__["loki"] = ops, loki
    for name, kernel in CPU_KERNELS.items():
        op = getattr(torch.ops.loki, name).default
        setattr(loki, name, types.SimpleNamespace(default=_unless_watched(kernel, op)))
    return shown


class _Shown(types.ModuleType):
    """What a namespace has, and what is put before it."""

    def __init__(self, name: str, behind: Any) -> None:
        super().__init__(name)
        self.__dict__["behind"] = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["behind"], name)


def _unless_watched(kernel: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    modes, profiling = torch._C._len_torch_dispatch_stack, torch._C._autograd._profiler_enabled

    def call(*args: Any, **kwargs: Any) -> Any:
        if modes() or profiling():
            return op(*args, **kwargs)
        return kernel(*args, **kwargs)

    return call
