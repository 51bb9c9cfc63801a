"""As on a device: in steady state no step reads a number back, for which the host would wait.

There is no device here. What asks whether reading waits (`caches.reading_waits`) is told that it
does, so that steps take the ways that they take there, and what is read back is counted.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_models import tiny_llama
from toy_options import FEW, MODES
from transformers import DynamicCache, StaticCache

from loki_compile import lengths, runtime, step_indexes, variants, witness
from loki_compile.counts import stats
from loki_compile.runtime import DecodeGraph

READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.unique_consecutive,
}


class ReadBack(TorchDispatchMode):
    """Counts what a device would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READS:
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Answer:
    """On the host already, once the event is reached."""

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer.numpy()

    def __bool__(self) -> bool:
        return bool(self.answer)

    def query(self) -> bool:
        return True


@pytest.fixture
def as_on_a_device(monkeypatch):
    for module in (lengths, runtime, step_indexes, variants, witness):
        monkeypatch.setattr(module, "reading_waits", lambda _: True)
    monkeypatch.setattr(witness, "without_waiting", lambda answer: (Answer(answer),) * 2)


@pytest.fixture
def read_back(monkeypatch) -> list[str]:
    """What calls of decode graphs read back. (Dynamo runs nothing compiled within a mode.)"""
    read: list[str] = []
    run = DecodeGraph.__call__

    def watched(self, *args):
        with ReadBack() as reads:
            outputs = run(self, *args)
        read.extend(reads.ops)
        return outputs

    monkeypatch.setattr(DecodeGraph, "__call__", watched)
    return read


@MODES
@pytest.mark.parametrize("kind", ["static", "growing"])
def test_a_step_in_steady_state_reads_nothing_back(
    kind, mode, as_on_a_device, read_back, interpreted
):
    model = tiny_llama()
    fast = torch.compile(model, backend="loki", options=FEW)
    if kind == "static":
        past = StaticCache(model.config, max_cache_len=60)
    else:
        past = DynamicCache(config=model.config)
    ids = torch.randint(64, (1, 20))
    with mode():
        model(ids, past_key_values=past)
        for _ in range(4):  # compiled, built
            fast(ids[:, :1], past_key_values=past)
        before = stats()
        read_back.clear()
        for _ in range(5):
            fast(ids[:, :1], past_key_values=past)
    assert read_back == []
    after = stats()
    assert after["sparse_steps"] - before["sparse_steps"] == 5
    assert after["rebuilds"] == before["rebuilds"]


def test_what_is_read_back_is_found(as_on_a_device):
    with ReadBack() as reads:
        assert torch.ones(1).item() == 1 and torch.equal(torch.ones(2), torch.ones(2))
    assert [name.split(".")[1] for name in reads.ops] == ["_local_scalar_dense", "equal"]
