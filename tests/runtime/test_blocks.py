"""Of equal blocks of a decode graph, one is compiled; what differs is compiled apart."""

from __future__ import annotations

import functools
import resource
from typing import Any

import pytest
import torch
from loki_compile.passes.blocks import find_blocks
from loki_compile.passes.graphs import fake_mode_of
from torch import Tensor, nn
from torch._inductor.output_code import CompiledFxGraph

from loki_compile import engines
from loki_compile.backend import loki
from loki_compile.floats import float_inputs
from loki_compile.piece_calls import with_room

PROMPT, NEW = 1103, 5  # above the default min_context


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor, cache: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        cache.mul_(0.5).add_(x.mean())
        x = x + self.down((self.up(x) * self.scale).relu() + shared)
        return (x * cache.mean()).tanh(), torch.cat([cache, x.detach()[0]])


class Stack(nn.Module):
    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block(scale) for scale in scales)

    def forward(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x, grown = self.first(x), []
        shared = caches[0].new_ones(1)
        for block, cache in zip(self.blocks, caches, strict=True):
            x, longer = block(x, cache, shared.cos())
            grown.append(longer)
        return x.tanh(), grown


def caches(lengths: list[int]) -> list[Tensor]:
    made = torch.Generator().manual_seed(7)
    found = [torch.rand(length, 6, generator=made) for length in lengths]
    for cache in found:
        torch._dynamo.mark_dynamic(cache, 0)
    return found


def captured(module: nn.Module, *args: Any) -> tuple[torch.fx.GraphModule, list[Any]]:
    """The graph of a call, and its inputs."""
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*given: Any) -> Any:
            found.append(given)
            return gm.forward(*given)

        found.append(gm)
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend)(*args)
    return found[0], list(found[1])


@pytest.fixture
def pieces(monkeypatch) -> list[torch.fx.GraphModule]:
    """What Inductor is given, which is run as it is."""
    given: list[torch.fx.GraphModule] = []

    def compiled(gm: torch.fx.GraphModule, inputs: Any, options: Any) -> Any:
        given.append(gm)
        return gm.forward

    monkeypatch.setattr(torch._inductor, "compile", compiled)
    return given


def by_blocks(gm: torch.fx.GraphModule, mode: str | None = None, **options: Any) -> Any:
    return engines.inductor_by_blocks(gm, [], mode=mode, options=options)


@pytest.mark.parametrize(
    "scales, compiled",
    [([0.5] * 4, 3), ([0.5] * 9, 3), ([0.5] * 3 + [0.25] + [0.5] * 3, 5), ([0.5] * 3, 1)],
    ids=["four", "nine", "one differs", "too few"],
)
def test_equal_blocks_are_compiled_once_and_what_differs_apart(pieces, scales, compiled):
    # Five where one differs: what is behind its residual sum is the others' and not compiled again.
    stack = Stack(scales)
    x, lengths = torch.rand(1, 1, 6), [5] * len(scales)
    gm, _ = captured(stack, x, caches(lengths))
    run = by_blocks(gm)
    assert len(pieces) == compiled
    _, inputs = captured(stack, x, caches(lengths))
    # The inputs of the second capture were written by its own call: each side gets copies.
    ours, theirs = ([x.clone() if isinstance(x, Tensor) else x for x in inputs] for _ in range(2))
    for got, expected in zip(run(*ours), gm.forward(*theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for got, expected in zip(ours, theirs, strict=True):  # what was written in place, too
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "how", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"freezing": True}], ids=str
)
def test_one_cuda_graph_or_frozen_weights_are_compiled_whole(pieces, how):
    gm, _ = captured(Stack([0.5] * 5), torch.rand(1, 1, 6), caches([5] * 5))
    by_blocks(gm, **how)
    assert len(pieces) == 1


class Scaled(nn.Module):
    """A stack whose input is multiplied by a number that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.number = Stack([0.5] * 5), 0.5

    def forward(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.stack(x * self.number, caches)


def test_a_graph_with_a_float_as_an_input_is_compiled_whole(pieces):
    """Inductor would have a piece without it ask Dynamo for its value, too late."""
    x, scaled = torch.rand(1, 1, 6), Scaled()
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    step = torch.compile(scaled, backend=backend)
    with torch.no_grad():
        for number in (0.5, 0.25):  # from the second on, Dynamo has it as an input
            scaled.number = number
            step(x, caches([5] * 5))
    assert [len(float_inputs(gm.graph)) for gm in found] == [0, 1]
    by_blocks(found[1])
    assert len(pieces) == 1


def test_what_is_known_of_one_blocks_sizes_is_checked_for_the_others(monkeypatch):
    gm, _ = captured(Stack([0.5] * 5), torch.rand(1, 1, 6), caches([5] * 5))
    shape_env = fake_mode_of(gm.graph).shape_env

    def compiled(piece: torch.fx.GraphModule, inputs: Any, options: Any) -> Any:
        for value in inputs:
            if isinstance(value, Tensor) and isinstance(value.shape[0], torch.SymInt):
                assert value.shape[0] < 4321  # a guard
        return piece.forward

    monkeypatch.setattr(torch._inductor, "compile", compiled)
    by_blocks(gm)
    guarded = {guard.expr for guard in shape_env.guards if "4321" in str(guard.expr)}
    assert len(guarded) == 5


def test_caches_of_other_lengths_are_other_blocks(pieces):
    gm, _ = captured(Stack([0.5] * 9), torch.rand(1, 1, 6), caches([5] * 5 + [7] * 4))
    by_blocks(gm)
    assert len(pieces) == 4  # both lengths, and what lies before and behind


def test_a_region_of_autocast_is_not_cut():
    class Casting(Stack):
        def forward(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x, caches)

    for kind, cut in ((Stack, True), (Casting, False)):
        gm, _ = captured(kind([0.5] * 5), torch.rand(1, 1, 6), caches([5] * 5))
        assert (find_blocks(gm.graph) is not None) is cut


class Writing(nn.Module):
    """Blocks that write their caches in place and return nothing but what the next one reads."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block(0.5) for _ in range(5))
        self.marked = marked

    def forward(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x, grown = x.tanh(), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, longer = block(x, cache, x.new_ones(1))
            grown += [longer] if self.marked else []
        return x.tanh(), grown


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "marked, grad",
    [(False, False), (False, True), (True, False)],
    ids=["written", "gradients recorded outside", "sizes marked dynamic"],
)
def test_what_pieces_are_wrapped_in_is_left_out_where_it_adds_nothing(marked, grad, monkeypatch):
    """AOTAutograd's wrappers mark the sizes of grown caches for Dynamo: such pieces keep them."""
    module = Writing(marked)
    gm, inputs = captured(module, torch.rand(1, 1, 6), caches([5] * 5))
    with torch.no_grad():
        run = by_blocks(gm)
    wrapped = []
    call = CompiledFxGraph.__call__

    def counting(self: CompiledFxGraph, args: Any) -> Any:
        wrapped.append(self)
        return call(self, args)

    monkeypatch.setattr(CompiledFxGraph, "__call__", counting)
    ours, theirs = ([x.clone() if isinstance(x, Tensor) else x for x in inputs] for _ in range(2))
    for number in range(3):
        wrapped.clear()
        tensors = [x for x in ours if isinstance(x, Tensor)]
        before = [x._version for x in tensors]
        with torch.set_grad_enabled(grad):
            got = run(*ours)
            assert torch.is_grad_enabled() is grad
        with torch.no_grad():
            expected = gm.forward(*theirs)
        torch.testing.assert_close(list(got), list(expected))
        torch.testing.assert_close(ours, theirs)
        counted = sum(x._version > y for x, y in zip(tensors, before, strict=True))
        if number == 0:
            first = counted
            assert len(wrapped) == 7
        else:
            assert len(wrapped) == (5 if marked else 0)
        assert counted == first >= 5
        assert all("dynamic_indices" in str(vars(x)) for x in got[1:])


def faults_at(depth: int, run: Any, faults: list[int]) -> None:
    """Pages that a call maps which is made `depth` frames further down, the least of two."""
    if depth:
        faults_at(depth - 1, run, faults)
        return
    counts = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    faults.append(min(counts))


def test_no_piece_maps_memory_for_its_frames_at_any_depth_of_the_stack():
    def piece() -> None:
        pass

    def row() -> None:
        for _ in range(100):
            piece()

    found: dict[str, list[int]] = {"bare": [], "with room": []}
    for name, run in (("bare", row), ("with room", with_room(row))):
        for depth in range(250):
            faults_at(depth, run, found[name])
    assert max(found["bare"]) >= 100, "no depth where a chunk of frames ends: nothing is tested"
    assert max(found["with room"]) < 20


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module, cache: str) -> Tensor:
    ids = torch.randint(1, 64, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    out = model.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
        cache_implementation=cache, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_inductor_compiles_as_much_of_five_layers_as_of_more(cache, monkeypatch):
    real, given = torch._inductor.compile, []

    def counted(gm: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(gm)
        return real(gm, *args, **kwargs)

    monkeypatch.setattr(torch._inductor, "compile", counted)
    model = llama(5)
    model.compile(backend="loki")
    got = logits(model, cache)
    kinds: list[int] = []

    def engine(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        kinds.append(len({piece.kind for piece in find_blocks(gm.graph) or ()}))
        return gm.forward

    for layers in (8, 5):
        model = llama(layers)
        model.compile(backend=functools.partial(loki, engine=engine))
        expected = logits(model, cache)
    assert kinds == [3, 3] and len(given) == 3
    torch.testing.assert_close(got, expected)
