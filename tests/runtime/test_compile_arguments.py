"""Every documented argument of torch.compile, at default options: sparse, and no graph too many."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis

from loki_compile import backend, engines, explain, reports, stats

CACHED = 1103  # above the default min_context
STEPS = 4
pytestmark = pytest.mark.usefixtures("interpreted")


def new_cache(kind: str, model: nn.Module) -> Any:
    from transformers import DynamicCache, StaticCache

    if kind == "growing":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=CACHED + 80)


def llama(head_dim: int = 8) -> nn.Module:
    """One layer with random weights, (B,S) ids -> logits over 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, vocab_size=64, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decode(
    model: nn.Module, step: Callable[..., Any], kind: str, *, cached=CACHED, steps=STEPS, own=True
) -> Tensor:
    """Logits (steps,V) of a conversation whose prompt is run uncompiled, as is usual.

    A token is a tensor of its `own`, as in `generate`, or a slice with the strides of all ids.
    """
    cache = new_cache(kind, model)
    ids = torch.randint(0, 64, (1, cached + steps), generator=torch.Generator().manual_seed(3))
    type(model).forward(model, ids[:, :cached], past_key_values=cache, logits_to_keep=1)
    rows = []
    for token in ids[:, cached:].split(1, 1):
        token = token.clone(memory_format=torch.contiguous_format) if own else token
        rows.append(step(token, past_key_values=cache).logits[0])
    return torch.cat(rows)


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: Any, _: Any, **__: Any) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


def compiled_reports() -> list[Any]:
    """Of graphs that are not run node by node, as a first step's are."""
    return [report for report in reports() if not report.now.startswith("node by node")]


def graphs_of_plain_dynamo(model: nn.Module, kind: str, **arguments: Any) -> int:
    torch._dynamo.reset()
    plain = Counting()
    decode(model, torch.compile(model, backend=plain, **arguments), kind)
    torch._dynamo.reset()
    return plain.graphs


# --- the sweep


@pytest.mark.parametrize(
    ("kind", "dynamic", "strict"),  # every pair of two values meets
    [
        ("static", None, False),
        ("growing", None, True),
        ("static", True, True),
        ("growing", True, False),
        ("static", False, False),
        ("growing", False, True),
    ],
)
def test_decoding_is_sparse_in_as_many_graphs_as_plain_dynamo_makes(kind, dynamic, strict):
    model = llama()
    wanted = decode(model, model, kind)
    arguments = {"dynamic": dynamic, "fullgraph": strict}
    plain = graphs_of_plain_dynamo(model, kind, **arguments)
    model.compile(backend="loki", options={"strict": strict}, **arguments)
    decode(model, model, kind)
    assert stats()["sparse_steps"] == STEPS and stats()["dense_steps"] == 0
    assert len(compiled_reports()) <= plain and len(reports()) <= plain + 1
    assert all(site.outcome == "sparse" for report in reports() for site in report.sites)
    torch._dynamo.reset()
    model.compile(backend="loki", options={"min_context": 0, "top_k": 1.0}, **arguments)
    torch.testing.assert_close(decode(model, model, kind), wanted, rtol=0, atol=2e-4)
    assert stats()["sparse_steps"] == 2 * STEPS


@pytest.mark.parametrize(
    ("kind", "mode"),  # the mode is the engine's alone, the cache the graphs'
    [
        ("static", "default"),
        ("growing", "reduce-overhead"),
        ("static", "max-autotune"),
        ("growing", "max-autotune-no-cudagraphs"),
    ],
)
def test_every_mode_is_sparse(kind, mode):
    model = llama()
    plain = graphs_of_plain_dynamo(model, kind)
    model.compile(backend="loki", mode=mode)
    assert decode(model, model, kind).isfinite().all()
    assert stats()["sparse_steps"] == STEPS and len(reports()) <= plain


def through_wrapper(model):
    return torch.compile(model, backend="loki")


def through_forward(model):
    return torch.compile(model.forward, backend="loki")


def through_own_forward(model):
    model.forward = torch.compile(model.forward, backend="loki")
    return model


def through_method(model):
    model.compile(backend="loki")
    return model


@pytest.mark.parametrize(
    "reach", [through_wrapper, through_forward, through_own_forward, through_method]
)
def test_every_way_to_compile_a_model_is_sparse(reach):
    model = llama()
    decode(model, reach(model), "growing")
    assert stats()["sparse_steps"] == STEPS


# --- floats that come in as symbols


@pytest.mark.parametrize(
    ("case", "attention", "strict"),  # every pair of two values meets
    [
        ("second model", "sdpa", False),
        ("second model", "eager", True),
        ("dynamic=True", "sdpa", True),
        ("dynamic=True", "eager", False),
    ],
)
def test_a_scale_that_is_first_shown_as_a_symbol_is_traced_again(case, attention, strict):
    """What is given up is no verdict: not for strict=True, and not in the reports."""
    options = {"strict": strict}
    first, second = llama(), llama(12)
    for model in (first, second):
        model.set_attn_implementation(attention)
    if case == "second model":
        first.compile(backend="loki", options=options)
        decode(first, first, "static", steps=1)
        second.compile(backend="loki", options=options)
    else:
        second.compile(backend="loki", options=options, dynamic=True)
    decode(second, second, "static", steps=1)
    assert stats()["dense_steps"] == 0
    assert all(site.outcome == "sparse" for report in reports() for site in report.sites)
    assert len(reports()) == stats()["sparse_steps"] == 1 + (case == "second model")


def test_explain_judges_the_trace_that_stays():
    first, second = llama(), llama(12)
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for model in (first, second):
            cache = new_cache("static", model)
            model(torch.zeros(1, CACHED, dtype=torch.long), past_key_values=cache)
            (report,) = explain(model, ids, past_key_values=cache)
            assert [site.outcome for site in report.sites] == ["sparse"] * len(report.sites)


class Tempered(nn.Module):
    """A model whose logits are divided by a float that each call brings."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, ids: Tensor, temperature: float, past_key_values: Any) -> Tensor:
        return self.model(ids, past_key_values=past_key_values).logits / temperature


@torch.no_grad()
def test_a_float_that_attention_does_not_read_stays_an_input():
    """Another value at each step: plain Dynamo makes no graph for it, nor do we."""

    def graphs(chosen: Any) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = Tempered().eval()
        cache = new_cache("static", module.model)
        module.model(torch.arange(CACHED)[None] % 64, past_key_values=cache)
        step = torch.compile(module, backend=chosen) if chosen else module
        ids = torch.tensor([[7]])
        return [step(ids, 0.5 + 0.25 * i, cache) for i in range(6)]

    plain = Counting()
    graphs(plain)
    rows = graphs("loki")
    assert len(reports()) <= plain.graphs < 6 and stats()["sparse_steps"] == 6
    assert all(row.isfinite().all() for row in rows)


@pytest.mark.parametrize("variant", ["sparse", "dense"])
@torch.no_grad()
def test_a_wish_to_trace_again_that_comes_too_late_costs_speed_alone(variant, use_engine, caplog):
    """Dynamo has returned when a variant is compiled: nobody is there to take its exception."""

    def wishes(gm, inputs, **_):
        raise TensorifyScalarRestartAnalysis

    use_engine(wishes)
    model = llama()
    cached = CACHED if variant == "sparse" else 301  # below the default min_context
    wanted = decode(model, model, "static", cached=cached)
    options = {"top_k": 1.0, "min_context": 0} if variant == "sparse" else {}
    model.compile(backend="loki", options=options)
    with caplog.at_level(logging.WARNING, logger="loki_compile"):
        out = decode(model, model, "static", cached=cached)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-4)
    assert stats()[f"{variant}_steps"] == STEPS
    assert "node by node" in caplog.text and "stays dense" not in caplog.text


def test_strict_still_refuses_what_stays_dense_when_it_is_traced_again():
    model = llama()
    model.compile(backend="loki", options={"strict": True}, dynamic=True)
    with pytest.raises(RuntimeError, match=r"^strict=True") as error, torch.no_grad():
        model.forward(torch.zeros(1, 9, dtype=torch.long), use_cache=False)
        model(torch.zeros(1, 9, dtype=torch.long), use_cache=False, output_attentions=True)
    assert "computed value" not in str(error.value)
    assert not reports()


# --- sizes


@pytest.mark.parametrize("policy", ["loki", "loki:16+0.1N,last=0.3N"])
@torch.no_grad()
def test_the_passes_add_no_guard(policy, monkeypatch, use_engine):
    """A guard that analysis adds is one that Dynamo checks for, and recompiles for."""
    before, seen = {}, []

    def note(gm):
        env = backend.fake_mode_of(gm.graph).shape_env
        before.setdefault(env, len(env.guards))
        return normalize(gm)

    def count(gm, inputs, **_):
        env = backend.fake_mode_of(gm.graph).shape_env
        seen.append((len(env.guards) - before[env], len(env.backed_var_to_val)))
        return gm.forward

    normalize = backend.normalize
    monkeypatch.setattr(backend, "normalize", note)
    use_engine(count)
    model = llama()
    model.compile(backend="loki", options={"top_k": 0.5, "policy": policy})
    decode(model, model, "growing", steps=3)
    decode(model, model, "growing", cached=901)  # the dense variant
    assert [added for added, _ in seen] == [0] * len(seen)
    assert any(symbols for _, symbols in seen) and len(seen) == 2  # the first serves one length


@pytest.mark.parametrize(("own", "graphs"), [(True, 2), (False, 3)])
def test_conversations_of_other_lengths_share_one_graph(own, graphs):
    """Dynamo's first graph has numbers for sizes; of slices it guards the strides, once more."""

    def talk(chosen: Any) -> nn.Module:
        torch._dynamo.reset()
        model = llama()
        model.compile(backend=chosen)
        for cached in (1981, 1981, 1980):
            decode(model, model, "growing", cached=cached, steps=2, own=own)
        return model

    plain = Counting()
    talk(plain)
    model = talk("loki")
    # With a slice one more is traced: caches that lie tight are given room.
    assert plain.graphs == graphs and len(reports()) == graphs + (not own)
    assert len(compiled_reports()) < graphs
    with torch.compiler.set_stance("fail_on_recompile"):
        for cached in (1979, 2048, 1200):
            decode(model, model, "growing", cached=cached, steps=2, own=own)
    assert stats()["dense_steps"] == 0


# --- two models


def test_two_models_of_other_head_dims_take_no_more_graphs_than_plain_dynamo_makes():
    def alternate(chosen: Any) -> None:
        torch._dynamo.reset()
        models = [llama(), llama(12)]
        for model in models:
            model.compile(backend=chosen)
        for _ in range(3):
            for model in models:
                decode(model, model, "growing", steps=3)

    plain = Counting()
    alternate(plain)
    alternate("loki")
    assert len(compiled_reports()) <= plain.graphs and len(reports()) <= plain.graphs + 1
    assert stats()["dense_steps"] == 0 and stats()["sparse_steps"] == 18


# --- Dynamo's own switches


def test_floats_that_dynamo_specialises_itself():
    with torch._dynamo.config.patch(specialize_float=True):
        model = llama(12)
        model.compile(backend="loki", dynamic=True, options={"strict": True})
        decode(model, model, "static")
    assert stats()["sparse_steps"] == STEPS and len(reports()) == 1


def test_force_eager_runs_nothing_of_ours():
    model = llama()
    model.compile(backend="loki")
    with torch.compiler.set_stance("force_eager"):
        decode(model, model, "static")
    assert not reports() and stats()["sparse_steps"] == stats()["dense_steps"] == 0


@pytest.mark.parametrize("kind", ["static", "growing"])
def test_a_second_conversation_needs_no_compilation(kind):
    model = llama()
    model.compile(backend="loki")
    decode(model, model, kind)
    with torch._dynamo.config.patch(error_on_recompile=True):
        decode(model, model, kind)
    assert stats()["sparse_steps"] == 2 * STEPS


# --- a chat


@pytest.mark.parametrize(
    ("kind", "dynamic"),  # where `dynamic` is given, a static cache's steps are those of the sweep
    [("static", None), ("growing", None), ("growing", True)],
)
def test_chats_make_no_graph_that_plain_dynamo_does_not_make(kind, dynamic):
    """A prompt of another length is where Dynamo makes its one dynamic graph of a prefill."""

    def chat(model: nn.Module, lengths: tuple[int, ...]) -> None:
        cache = new_cache(kind, model)
        ids = torch.zeros(1, 0, dtype=torch.long)
        for length in lengths:
            ids = torch.cat([ids, torch.randint(1, 64, (1, length))], 1)
            ids = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, pad_token_id=0,
                max_new_tokens=3, min_new_tokens=3, do_sample=False,
            )  # fmt: skip

    def chats(chosen: Any, count: Callable[[], int]) -> list[int]:
        torch._dynamo.reset()
        model = llama()
        model.compile(backend=chosen, dynamic=dynamic)
        made = []
        for lengths in ((1041, 13, 15, 12), (1030, 12, 16, 14), (1027, 17, 12, 13)):
            chat(model, lengths)
            made.append(count())
        return made

    plain = Counting()
    theirs = chats(plain, lambda: plain.graphs)
    ours = chats("loki", lambda: len(reports()))
    assert all(mine <= other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)
    assert ours[2] == ours[1] <= ours[0] + (dynamic is None)
    assert stats()["sparse_steps"] == 3 * 4 * 2 and stats()["dense_steps"] == 0


@torch.no_grad()
def test_the_first_step_behind_a_prompt_of_another_length_is_not_compiled_again():
    """Under Inductor itself, which gives a prefill's keys another layout than eager and later steps
    do, and would have Dynamo trace that step once more, in mid-stream."""
    torch._dynamo.reset()
    model = llama()
    model.compile(backend=functools.partial(backend.loki, engine=engines.inductor))
    from torch._dynamo.utils import counters
    from transformers import DynamicCache

    new_graphs = []
    for length in (CACHED, CACHED - 1, CACHED + 100):
        cache = DynamicCache(config=model.config)
        model(torch.randint(64, (1, length)), past_key_values=cache)
        before = counters["stats"]["unique_graphs"]
        for step in range(3):
            model(torch.full((1, 1), step), past_key_values=cache)
        new_graphs.append(counters["stats"]["unique_graphs"] - before)
    assert new_graphs == [1, 0, 0]
