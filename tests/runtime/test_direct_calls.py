"""Code that Inductor compiled calls the CPU kernels of our ops, unless something looks on."""

from __future__ import annotations

import pytest
import torch
from loki_compile.kernels import ops
from torch.utils._python_dispatch import TorchDispatchMode

from loki_compile import direct_calls, engines

pytestmark = pytest.mark.usefixtures("fresh")
HEADS, KEYS, DIM = 4, 70, 32


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor]:
    return (ops.attention(q + 0, k, v, None, scale=0.25) * 2,)


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, HEADS, 1, DIM), (1, 2, KEYS, DIM), (1, 2, KEYS, DIM)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture
def calls(monkeypatch):
    """The names of kernels that were called directly, by what is compiled in this test."""
    seen: list[str] = []

    def noted(name, kernel):
        def run(*args, **kwargs):
            seen.append(name)
            return kernel(*args, **kwargs)

        return run

    for name, kernel in ops.CPU_KERNELS.items():
        monkeypatch.setitem(ops.CPU_KERNELS, name, noted(name, kernel))
    direct_calls.torch_with_kernels.cache_clear()
    yield seen
    direct_calls.torch_with_kernels.cache_clear()


def compiled(qkv):
    gm = torch.fx.symbolic_trace(attend)
    run = engines.inductor(gm, qkv, mode=None, options={"fx_graph_cache": False})
    with torch.no_grad():
        run(*qkv)  # PyTorch itself looks on at a first call
    return run


def test_the_kernel_is_called_and_gives_what_the_op_gives(qkv, calls):
    run = compiled(qkv)
    calls.clear()
    with torch.no_grad():
        out = run(*qkv)[0]
    assert calls == ["attention"]
    torch.testing.assert_close(out, attend(*qkv)[0])
    assert calls == ["attention"], "the op itself goes by the dispatcher"


def test_a_dispatch_mode_sees_the_op(qkv, calls):
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    run = compiled(qkv)
    with torch.no_grad(), Names() as names:
        run(*qkv)
    assert "loki.attention.default" in names.seen and calls == []


def test_the_profiler_sees_the_op(qkv, calls):
    run = compiled(qkv)
    with torch.no_grad(), torch.profiler.profile() as profile:
        run(*qkv)
    assert "loki::attention" in {event.key for event in profile.key_averages()}
    assert calls == []


def test_what_else_the_code_asks_of_torch_it_gets():
    shown = direct_calls.torch_with_kernels()
    assert shown.float32 is torch.float32 and shown.ops.aten is torch.ops.aten
    assert shown.ops.loki.select.default is not torch.ops.loki.select.default
    assert shown.nn is torch.nn


def test_a_function_that_inductor_did_not_make_is_left_alone():
    before = dict(globals())
    direct_calls.call_directly(attend)
    assert globals() == before
