"""What is decoded sparsely goes through dense attention once more: the cache is dense decoding's.

Inductor's place is taken by an interpreter, but where a test says so.
"""

import pytest
import torch
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_loops import Loop, far_from_dense, true_indexes
from toy_masks import causal
from toy_models import LONG, make_model, new_cache, prompt
from toy_writes import cat_bhtd, index_copy_method
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import loki_compile
from loki_compile import stats

slow = pytest.mark.slow
STEPS = 20


@pytest.mark.parametrize(
    "rows, policy, indexes, kind",
    [
        (3, "loki", 3, "static"),
        (1, "tidal", 3, "growing"),
        pytest.param(1, "loki", 3, "static", marks=slow),
        pytest.param(1, "loki", 3, "growing", marks=slow),
        pytest.param(3, "loki", 3, "growing", marks=slow),
        pytest.param(1, "tidal", 3, "static", marks=slow),
        pytest.param(3, "tidal", 3, "static", marks=slow),
        pytest.param(3, "tidal", 3, "growing", marks=slow),
        pytest.param(3, "kascade", 0, "static", marks=slow),
        pytest.param(1, "kascade", 0, "growing", marks=slow),
    ],
)
@torch.no_grad()
def test_a_corrected_cache_is_that_of_a_dense_prefill(
    rows, policy, indexes, kind, interpreted, fresh
):
    model, uncompiled = make_model(3), make_model(3)
    model.compile(backend="loki", options={"policy": policy})
    loop = Loop(model, kind, rows)
    new = prompt(2, STEPS, rows)
    for n in range(STEPS):
        loop.step(new[:, n : n + 1])
    assert stats()["sparse_steps"] == STEPS
    assert far_from_dense(loop.cache, loop.ids, loop.mask, uncompiled) > 0.1
    built = stats()["rebuilds"]
    loki_compile.correct(model, loop.cache, new, **loop.inputs(new))
    assert far_from_dense(loop.cache, loop.ids, loop.mask, uncompiled) < 5e-5
    assert int(loop.cache.get_seq_length()) == LONG + STEPS
    assert true_indexes(loop.cache, LONG + STEPS) == indexes
    loop.step(new[:, :1])
    assert stats()["sparse_steps"] == STEPS + 1
    assert stats()["rebuilds"] == built
    assert true_indexes(loop.cache, LONG + STEPS + 1) == indexes


@pytest.mark.parametrize(
    "kind, rows",
    [
        ("growing", 2),
        pytest.param("growing", 1, marks=slow),
        pytest.param("static", 1, marks=slow),
        pytest.param("static", 2, marks=slow),
    ],
)
@torch.no_grad()
def test_generate_corrects_every_so_many_steps(rows, kind, interpreted, fresh):
    model, uncompiled = make_model(2), make_model(2)
    model.compile(backend="loki")
    ids, mask = prompt(1, rows=rows), torch.ones(rows, LONG, dtype=torch.int64)
    mask[1:, :30] = 0
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=new_cache(model, kind),
        max_new_tokens=33,
        do_sample=False,
        return_dict_in_generate=True,
        custom_generate=loki_compile.corrected(every=16),
    )
    ran = stats()
    assert ran["sparse_steps"] == 32
    assert ran["dense_because"] == {"exact": 4}, "16 tokens are two calls of 8"
    assert ran["rebuilds"] == 2, "one of each layer"
    mask = torch.cat((mask, mask.new_ones(rows, 32)), 1)
    cache = out.past_key_values
    assert far_from_dense(cache, out.sequences[:, :-1], mask, uncompiled) < 5e-5


@torch.no_grad()
def test_short_contexts_are_dense_and_not_corrected(interpreted, fresh):
    model = make_model()
    model.compile(backend="loki")
    loop = loki_compile.corrected(every=4)
    model.generate(prompt(1, 50), max_new_tokens=20, do_sample=False, custom_generate=loop)
    assert set(stats()["dense_because"]) == {"short"}


@torch.no_grad()
def test_a_corrected_cache_through_inductor(fresh):
    model, uncompiled = make_model(), make_model()
    model.compile(backend="loki")
    loop = Loop(model, "growing", 1)
    new = prompt(2, 12)
    for n in range(12):
        loop.step(new[:, n : n + 1])
    loki_compile.correct(model, loop.cache, new)
    assert stats()["sparse_steps"] == 12
    assert stats()["dense_because"] == {"exact": 2}
    assert far_from_dense(loop.cache, loop.ids, loop.mask, uncompiled) < 5e-5
    assert true_indexes(loop.cache, LONG + 12) == 1


@pytest.mark.parametrize(
    "spelling",
    [
        Spelling(cat_bhtd, new_tokens=3, mask=causal, growing=True),
        Spelling(index_copy_method, new_tokens=2, mask=causal),
    ],
    ids=lambda s: s.name,
)
@pytest.mark.parametrize("policy, kept", [("loki", 1), ("quest", 1), ("oracle", 0)])
@torch.no_grad()
def test_exact_steps_are_dense_and_keep_true_what_is_kept(
    policy, kept, spelling, interpreted, fresh
):
    module = ToyDecoder(spelling).eval()
    options = {"policy": policy, "min_context": 0, "top_k": 0.3, "sink": 1, "recent": 2}
    run = torch.compile(module, backend="loki", options=options)
    here = Conversation.start(spelling, filled=20)
    there = here.fork()
    for n, x in enumerate(tokens(spelling, 9)):
        if n % 3 == 0:
            here.step(run, x)
            there.step(module, x)
            continue
        with loki_compile.exact():
            out = here.step(run, x)
        torch.testing.assert_close(out, there.step(module, x), rtol=0, atol=2e-5)
    ran = stats()
    assert ran["sparse_steps"] == 3
    assert ran["dense_because"] == {"exact": 6}
    assert ran["rebuilds"] == kept, "no exact step has made it old"


# --- what is refused


@torch.no_grad()
def refused(message, model=None, cache=None, new=None, **inputs):
    with pytest.raises(ValueError, match=message) as raised:
        loki_compile.correct(model, cache, new, **inputs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("every", [0, -3, 2.0, True, "32"])
def test_steps_between_corrections_are_a_count(every):
    with pytest.raises(ValueError, match="needs a count of steps"):
        loki_compile.corrected(every=every)


@torch.no_grad()
def test_a_model_that_is_not_compiled_is_refused(fresh):
    model = make_model()
    loop = Loop(model, "growing", 1)
    refused('no call of which backend="loki" has compiled', model, loop.cache, loop.ids[:, -4:])
    with pytest.raises(ValueError, match="has compiled"):
        model.generate(
            prompt(1, 9), max_new_tokens=3, custom_generate=loki_compile.corrected(every=1)
        )


@torch.no_grad()
def test_what_cannot_be_corrected_is_refused(interpreted, fresh):
    model = make_model()
    model.compile(backend="loki")
    loop = Loop(model, "growing", 1)
    new = prompt(2, 4)
    for n in range(4):
        loop.step(new[:, n : n + 1])
    length = loop.cache.get_seq_length()
    refused("needed the last ones that it holds", model, loop.cache, prompt(2, length + 1))
    refused(r"needed \(B, N\)", model, loop.cache, new[0])
    refused(r"needed \(B, N\)", model, loop.cache, new[:, :0])
    refused("cache of type tuple", model, (), new)
    loop.cache.layers[0].recurrent_states = {}
    refused("recurrent state", model, loop.cache, new)
    assert loop.cache.get_seq_length() == length, "as it was"


def tiny_window(window: int):
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=window,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["growing", pytest.param("static", marks=slow)])
@torch.no_grad()
def test_windows_that_wrap_are_refused(kind, interpreted, fresh):
    model = tiny_window(30)
    model.compile(backend="loki", options={"min_context": 0})
    cache = new_cache(model, kind, 64)
    ids = prompt(1, 40) % 64
    model(input_ids=ids[:, :20], past_key_values=cache)
    loki_compile.correct(model, cache, ids[:, 16:20])
    for n in range(20, 40):
        model(input_ids=ids[:, n : n + 1], past_key_values=cache)
    refused("has wrapped", model, cache, ids[:, 36:40])
    with pytest.raises(ValueError, match="has wrapped"):
        loop = loki_compile.corrected(every=4)
        model.generate(ids[:, :20], max_new_tokens=20, custom_generate=loop)


def test_beams_are_refused(interpreted, fresh):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.compile(backend="loki")
    ids = prompt(1, 9) % 64
    for loop in (loki_compile.corrected(), loki_compile.lossless()):
        with pytest.raises(ValueError, match="found num_beams=2"):
            model.generate(ids, max_new_tokens=3, num_beams=2, custom_generate=loop)
        with pytest.raises(ValueError, match="needed a cache"):
            model.generate(ids, max_new_tokens=3, use_cache=False, custom_generate=loop)
