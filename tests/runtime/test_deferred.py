"""What a conversation calls once is not compiled before that is worth it; all else at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loki_compile.passes.calls import op_name
from torch import nn

from loki_compile import backend, deferred, reports, stats

PROMPT = 1103  # above the default min_context
pytestmark = pytest.mark.usefixtures("fresh")


def llama(attention: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=2048,
        attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(tokens: int = PROMPT, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, (1, tokens), generator=torch.Generator().manual_seed(seed))


def talk(model: nn.Module, tokens: int = PROMPT, cache: str = "dynamic", new: int = 5) -> list[int]:
    out = model.generate(
        prompt(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        cache_implementation=cache,
    )  # fmt: skip
    return out[0, tokens:].tolist()


class Engine:
    """Notes what graphs it is given."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def __call__(self, gm: Any, inputs: Any, **_: Any) -> Any:
        ops = str({op_name(node) for node in gm.graph.nodes})
        kinds = {"select": "sparse", "flex_attention": "flex"}
        self.compiled.append(next((kind for op, kind in kinds.items() if op in ops), "dense"))
        return gm.forward


@pytest.fixture
def dear(monkeypatch, use_engine) -> Engine:
    """An engine whose compilations count as never worth it."""
    monkeypatch.setattr(deferred.PRICE, "of", lambda nodes: float("inf"))
    use_engine(engine := Engine())
    return engine


def test_a_first_answer_compiles_the_step_that_all_tokens_go_through_and_nothing_else(dear):
    model = llama()
    model.compile(backend="loki")
    talk(model)
    assert dear.compiled == ["sparse"]
    assert stats()["sparse_steps"] == 4 and stats()["interpreted_steps"] == 0
    told = [report.now for report in reports()]
    assert [text.startswith("node by node, uncompiled") for text in told] == [True, False]


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 2), (False, 5)])
def test_the_first_step_behind_a_prompt_is_traced_for_every_length_unless_none_is_to_vary(
    dynamic, graphs, interpreted
):
    model = llama()
    model.compile(backend="loki", dynamic=dynamic)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    talk(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == graphs


def test_the_kernels_are_begun_while_the_prompt_is_read(dear, monkeypatch):
    begun: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(backend, "begin_building", lambda *what: begun.append(what))
    model = llama()
    model.compile(backend="loki")
    with torch.no_grad():
        model(prompt())
    assert begun == [("cpu", torch.float32)]


def test_no_later_conversation_of_any_length_compiles(dear):
    model = llama()
    model.compile(backend="loki")
    talk(model)
    dear.compiled.clear()
    for tokens in (PROMPT + 7, PROMPT, PROMPT - 1, PROMPT + 7, PROMPT + 40):
        talk(model, tokens)
    assert dear.compiled == []
    assert stats()["dense_steps"] == 0


def steps_behind(model: nn.Module, cache: Any, step: Any, count: int, change: Any = None) -> None:
    """The prompt uncompiled, then so many steps; `change` is done to the cache between them."""
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        for number in range(count):
            step(prompt(1, number), past_key_values=cache)
            if change is not None:
                change(cache)


def test_behind_an_uncompiled_prompt_tight_caches_get_room_and_one_step_is_compiled(dear):
    """Dynamo's first graph is for tensors of any length that lie tight: it is called once, since it
    leaves room behind them."""
    from transformers import DynamicCache

    model = llama()
    step = torch.compile(model, backend="loki", dynamic=True)
    for _ in range(3):
        cache = DynamicCache(config=model.config)
        steps_behind(model, cache, step, 7)  # how many references such calls take is known then
        place = cache.layers[1].values.data_ptr()
        with torch.no_grad():
            step(prompt(1), past_key_values=cache)
        assert cache.layers[1].values.data_ptr() == place
    assert dear.compiled == ["sparse"]
    told = [report.now for report in reports()]
    assert [text.startswith("node by node, uncompiled") for text in told] == [True, False]


def test_caches_that_are_laid_out_anew_behind_each_step_compile_the_second(dear):
    """As beams are: the graph for tight caches is every step's."""
    from transformers import DynamicCache

    model = llama()
    step = torch.compile(model, backend="loki", dynamic=True)
    cache = DynamicCache(config=model.config)
    steps_behind(model, cache, step, 5, lambda c: c.reorder_cache(torch.tensor([0])))
    assert dear.compiled == ["sparse"] and stats()["sparse_steps"] == 5


def test_a_static_caches_step_is_compiled_at_once(dear):
    model = llama()
    model.compile(backend="loki")
    talk(model, cache="static")
    assert dear.compiled == ["sparse"]


def test_flex_attention_is_never_run_as_it_is(dear):
    """Node by node it holds all scores at once: the square of a prompt."""
    model = llama("flex_attention")
    model.compile(backend="loki")
    with torch.no_grad():
        model(prompt(400), use_cache=False)
    assert "flex" in dear.compiled


def test_what_is_called_often_enough_is_compiled_and_goes_on_as_before(monkeypatch, use_engine):
    use_engine(engine := Engine())
    model = llama()
    wanted = talk(model)
    model.compile(backend="loki", options={"top_k": 1.0, "min_context": 0})
    monkeypatch.setattr(deferred.PRICE, "of", lambda nodes: 1e-9)
    assert talk(model) == wanted
    assert engine.compiled == ["sparse"]
    assert talk(model) == wanted
    assert sorted(engine.compiled) == ["dense", "sparse"]  # the prefill, and the step as before
    assert talk(model) == wanted
    assert len(engine.compiled) == 2
    first, *_ = [report.now for report in reports()]
    assert first == ""


def test_a_prefill_that_is_not_compiled_is_the_models_own_to_the_bit(dear):
    model = llama()
    with torch.no_grad():
        wanted = model(prompt(), use_cache=False).logits
        found = torch.compile(model, backend="loki")(prompt(), use_cache=False).logits
    assert torch.equal(found, wanted) and dear.compiled == []


def test_prices_are_learned_from_what_compilations_took():
    price = deferred.Price()
    assert price.of(2000) > 5
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    price.timed(lambda gm: gm.forward)(gm)
    assert 0 < price.of(2000) < 5


def test_a_graph_is_compiled_when_running_it_has_cost_as_much(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(deferred.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(deferred.PRICE, "of", lambda nodes: 5.0)
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    asked: list[str] = []

    def compile_now(gm, what, missed):
        asked.append(what)
        return lambda x: [x]

    graph = deferred.Deferred(compile_now, gm, "a prefill", lambda: None)
    assert [graph(1) for _ in range(3)] == [2, 2, 2]  # each takes 10 s, of which 2 would be saved
    assert "15 s" not in graph.state() and graph.state() and not asked
    assert [graph(1), graph(1)] == [[1], [1]] and asked == ["a prefill"]
    assert graph.state() == ""
