"""Models under `torch.autocast`, at default options: rotary embeddings leave keys in float32 where
values and attention itself have autocast's dtype."""

import contextlib

import pytest
import torch
from loki_compile.kernels.fused import index_rows
from torch._dynamo.backends.common import aot_autograd
from toy_conversation import Conversation, tokens
from toy_decoders import REWRITTEN, ToyDecoder
from toy_masks import no_mask
from toy_models import tiny_llama
from toy_options import EVERYTHING
from toy_writes import cat_bhtd, index_copy_method

from loki_compile import reports, stats
from loki_compile.backend import loki

PROMPT = 1500
STATIC = next(s for s in REWRITTEN if s.write is index_copy_method)
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def model():
    model = tiny_llama()
    model.config.max_position_embeddings = 4096
    return model


def calling(model, where, dtype):
    """A compiled function of (ids, cache), and the state in which it is called."""
    inside = torch.autocast("cpu", dtype) if where == "inside" else contextlib.nullcontext()
    around = torch.autocast("cpu", dtype) if where == "around" else contextlib.nullcontext()

    def forward(ids, cache):
        with inside:
            return model(input_ids=ids, past_key_values=cache).logits

    return forward, around


@pytest.mark.parametrize(
    ("implementation", "where", "dtype"),  # every pair of two values meets
    [
        ("sdpa", "around", torch.bfloat16),
        ("sdpa", "inside", torch.float16),
        ("eager", "around", torch.float16),
        ("eager", "inside", torch.bfloat16),
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_are_as_near_to_fp32_as_eagers(model, implementation, where, dtype, interpreted):
    from transformers import DynamicCache

    model.set_attn_implementation(implementation)
    forward, around = calling(model, where, dtype)
    ids = torch.randint(64, (1, PROMPT + 4))

    def decode(step, state):
        cache, logits = DynamicCache(config=model.config), []
        with state:
            forward(ids[:, :PROMPT], cache)
            for at in range(PROMPT, PROMPT + 4):
                logits.append(step(ids[:, at : at + 1], cache).float())
        return torch.cat(logits, 1)

    truth = []
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :PROMPT], past_key_values=cache)
    for at in range(PROMPT, PROMPT + 4):
        truth.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits)
    truth = torch.cat(truth, 1)
    theirs = decode(forward, around)
    ours = decode(torch.compile(forward, backend="loki", options=EVERYTHING), around)
    assert stats()["sparse_steps"] == 4 and stats()["dense_steps"] == 0
    error, eagers = (float((x - truth).abs().max()) for x in (ours, theirs))
    assert 0 < error <= 2 * eagers, (error, eagers)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_generate_decodes_sparse_with_default_options(model, implementation, interpreted):
    model.set_attn_implementation(implementation)
    ids = torch.randint(64, (1, PROMPT))
    fast = torch.compile(model.forward, backend="loki")
    model.forward = fast
    with torch.autocast("cpu", torch.bfloat16):
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert out.shape[1] == PROMPT + 6
    assert stats()["sparse_steps"] == 5
    assert {site.outcome for site in reports()[-1].sites} == {"sparse"}


@torch.no_grad()
def test_the_index_under_autocast_is_the_one_without(interpreted):
    """Projected in fp32: in bf16, rows of int8 would even have scales of another dtype."""
    keys, basis = torch.randn(1, 2, 9, 16), torch.randn(2, 16, 4)
    for dtype in (torch.float32, torch.int8):
        expected = index_rows(keys, basis, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = index_rows(keys, basis, dtype)
        for a, b in zip(found, expected, strict=True):
            assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


def static_into_own_dtype(k, v, ck, cv, pos):
    """Any dtype may come in."""
    ck[:, :, pos] = k.transpose(1, 2).to(ck.dtype)
    cv[:, :, pos] = v.transpose(1, 2).to(cv.dtype)
    return ck, cv, ()


def read_in_own_dtype(k, v, ck, cv, pos):
    static_into_own_dtype(k, v, ck, cv, pos)
    return ck.to(k.dtype), cv.to(v.dtype), ()


@pytest.mark.parametrize("cached", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("index_dtype", ["cache", "int8"])
@torch.no_grad()
def test_a_static_cache_of_any_dtype(cached, index_dtype, interpreted):
    spelling = STATIC.but(write=static_into_own_dtype, cache_dtype=cached, slots=PROMPT + 50)
    module = ToyDecoder(spelling).eval()
    options = {**EVERYTHING, "index_dtype": index_dtype}
    fast = torch.compile(module, backend="loki", options=options)
    here = Conversation.start(spelling, filled=PROMPT)
    there = here.fork()
    for x in tokens(spelling, 3):
        with torch.autocast("cpu", torch.bfloat16):
            out, theirs = here.step(fast, x), there.step(module, x)
        assert out.dtype == theirs.dtype
        torch.testing.assert_close(out, theirs, rtol=0.03, atol=0.1)
    assert stats()["sparse_steps"] == 3 and stats()["rebuilds"] == 1


@torch.no_grad()
def test_a_cache_that_the_ops_cannot_read_stays_dense_with_a_reason(interpreted):
    spelling = STATIC.but(write=read_in_own_dtype, cache_dtype=torch.float64, slots=PROMPT + 50)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki")
    here = Conversation.start(spelling, filled=PROMPT)
    with torch.autocast("cpu", torch.bfloat16):
        here.step(fast, tokens(spelling, 1)[0])
    (site,) = reports()[-1].sites
    assert site.outcome == "dense" and "torch.float64" in site.reason
    assert stats()["sparse_steps"] == 0


@pytest.mark.parametrize("min_context", [0, 4096])
@torch.no_grad()
def test_a_variant_is_compiled_under_the_autocast_it_was_traced_under(
    use_engine, min_context, compiled_at_once
):
    """Variants are compiled when they are first needed, behind Dynamo's back."""
    torch._dynamo.reset()
    trace = aot_autograd(fw_compiler=lambda gm, _: gm)
    use_engine(lambda gm, inputs, **_: trace(gm, list(inputs)))
    spelling = next(s for s in REWRITTEN if s.write is cat_bhtd).but(mask=no_mask)
    module = ToyDecoder(spelling).eval()
    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    made = []

    def capture(gm, example_inputs):
        made.append((loki(gm, example_inputs, min_context=min_context, top_k=1.0), example_inputs))
        return gm.forward

    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.compile(module, backend=capture, dynamic=False)(*inputs)
    ((graph, given),) = made
    found = graph(*given)  # no autocast any more
    new = found[1][:, :, -1:]  # of keys, in a cache of fp32
    assert new.dtype == torch.float32 and torch.equal(new, new.bfloat16().float())
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("where", ["around", "inside"])
@torch.no_grad()
def test_short_contexts_run_dense_and_equal_eager(model, where, interpreted):
    from transformers import DynamicCache

    forward, around = calling(model, where, torch.bfloat16)
    ids, found = torch.randint(64, (1, 33)), []
    for step in (forward, torch.compile(forward, backend="loki")):
        cache = DynamicCache(config=model.config)
        with around:
            forward(ids[:, :30], cache)
            found.append([step(ids[:, at : at + 1], cache) for at in range(30, 33)])
    torch.testing.assert_close(*map(torch.cat, found), rtol=0.02, atol=0.02)
    assert (stats()["dense_steps"], stats()["sparse_steps"]) == (3, 0)
