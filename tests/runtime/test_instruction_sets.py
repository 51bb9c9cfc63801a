"""Of the processor's instruction sets Inductor's program for the widest alone is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._inductor import config, cpu_vec_isa

from loki_compile import instruction_sets
from loki_compile.engines import inductor

pytestmark = pytest.mark.skipif(
    "avx2" not in cpu_vec_isa.x86_isa_checker(), reason="Inductor knows several sets of x86 alone"
)


@pytest.fixture
def asked(monkeypatch):
    """The instruction sets that the compiler was asked about, which it knows."""
    asked = []
    monkeypatch.setattr(
        cpu_vec_isa.VecISA, "check_build", lambda isa, code: asked.append(str(isa)) or True
    )
    instruction_sets.widest_passes.cache_clear()
    yield asked
    instruction_sets.widest_passes.cache_clear()


def compiled_with(monkeypatch, **options):
    """The options that Inductor is given for a graph of CPU tensors."""
    given = []
    monkeypatch.setattr(
        torch._inductor, "compile", lambda gm, inputs, options: given.append(options)
    )
    gm = fx.symbolic_trace(lambda x: x + 1)
    inductor(gm, [torch.zeros(2)], mode=None, options=options)
    return given[0]


def test_the_compiler_is_asked_once_and_for_the_widest(asked, monkeypatch):
    for _ in range(2):
        assert compiled_with(monkeypatch) == {"cpp.vec_isa_ok": True}
    here = set(cpu_vec_isa.x86_isa_checker())
    assert len(asked) == 1 and set(asked[0].split()) == (here - {"avx2"} or here)


def test_where_it_does_not_pass_inductor_asks_for_itself(asked, monkeypatch):
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda isa, code: False)
    assert compiled_with(monkeypatch) == {}


def test_what_a_user_says_of_the_compiler_stands(asked, monkeypatch):
    assert compiled_with(monkeypatch, **{"cpp.vec_isa_ok": False})["cpp.vec_isa_ok"] is False
    asked.clear()
    with config.patch({"cpp.vec_isa_ok": False}):
        assert compiled_with(monkeypatch) == {}
    assert asked == []
