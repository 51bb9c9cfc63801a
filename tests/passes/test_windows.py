"""Sliding windows: the index moves with the rows of a full window, and leaves with a slice."""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import loki_compile
from loki_compile.engines import interpreter
from loki_compile.indexes import indexes_of

pytestmark = pytest.mark.covers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "sliding_window": 16,
}
STEPS = 14


def every_layer_windowed():
    return MistralForCausalLM(MistralConfig(**SIZES)).eval()


def one_layer_windowed():
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, layer_types=kinds)).eval()


@pytest.fixture(autouse=True)
def interpreted(use_engine):
    """The rewritten graphs run node by node: what is tested here is the rewriting.

    Inputs must lie in memory as they were traced, as Inductor demands.
    """

    def strict(gm, inputs, **options):
        run_as_it_is = interpreter(gm, inputs, **options)

        def run(*args):
            for fake, real in zip(inputs, args, strict=True):
                if isinstance(fake, torch.Tensor) and fake.is_contiguous():
                    assert real.is_contiguous(), "Inductor refuses these strides"
            return run_as_it_is(*args)

        return run

    use_engine(strict)
    torch._dynamo.reset()
    loki_compile.reset_stats()
    torch.manual_seed(0)


def decode(model, kind: str, prompt: int, **options):
    """Decodes compiled and not, side by side; the largest difference of logits, and the cache."""

    def empty():
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=64)

    ours, truth = empty(), empty()
    ids = torch.randint(1, 128, (1, prompt + STEPS))
    step = torch.compile(model, backend="loki", options={"min_context": 0, **options})
    apart = []
    with torch.no_grad():
        for cache in (ours, truth):
            model(ids[:, :prompt], past_key_values=cache)
        for at in range(prompt, prompt + STEPS):
            token = ids[:, at : at + 1]
            got = step(token, past_key_values=ours).logits
            want = model(token, past_key_values=truth).logits
            apart.append(got - want)
    return float(torch.cat(apart).abs().max()), ours


@pytest.mark.parametrize(
    ("build", "prompt", "kind"),  # every pair of two values meets
    [
        (every_layer_windowed, 12, "static"),
        (every_layer_windowed, 30, "dynamic"),
        (one_layer_windowed, 12, "dynamic"),
        (one_layer_windowed, 30, "static"),
    ],
)
def test_a_window_that_fills_and_moves_decodes_like_the_model(build, prompt, kind):
    worst, _ = decode(build(), kind, prompt, top_k=1.0)
    assert worst < 1e-5
    assert loki_compile.stats()["sparse_steps"] == STEPS
    # One index per layer, then only moved; the full layer's basis is fitted anew from 24 keys on.
    doubled = build is one_layer_windowed and prompt + STEPS > 2 * prompt
    assert loki_compile.stats()["rebuilds"] == 2 + doubled


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize(("prompt", "index_dtype"), [(12, "cache"), (30, "int8")])
def test_the_index_of_a_moving_window_stays_the_projection_of_its_keys(prompt, kind, index_dtype):
    _, cache = decode(
        every_layer_windowed(), kind, prompt, top_k=8, sink=1, recent=2, index_dtype=index_dtype
    )
    for layer in cache.layers:
        index, *others = indexes_of(layer.keys)
        assert not others
        rows = torch.matmul(layer.keys, index.basis.key)
        if index_dtype == "int8":
            held, scale = index.tensors
            held, slack = held * scale, scale * 0.501 + 1e-6
        else:
            held, slack = index.tensors[0], torch.tensor(1e-5)
        assert ((held - rows).abs() <= slack).all()
