"""The ways that a prompt gets into `generate`, and a window that wraps on the way: tokens are the
uncompiled model's, under `lossless` and `corrected` alike. What neither can do is refused.

Inductor's place is taken by an interpreter, and drafts of every length are made.
"""

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    TextStreamer,
)

import loki_compile
from loki_compile.generation.pace import Pace

PROMPT, NEW = 40, 12
# All keys for `corrected`, so that nothing but the correction could differ.
OPTIONS = {"min_context": 0, "sink": 2, "recent": 4, "policy": "oracle"}
LOOPS = {
    "lossless": (loki_compile.lossless, {"top_k": 0.5}),
    "corrected": (lambda **more: loki_compile.corrected(5, **more), {"top_k": 1.0}),
}
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _drafting(monkeypatch, interpreted, fresh):
    cycles = []
    monkeypatch.setattr(Pace, "next", lambda self, n: max(0, min(n, 1 + len(cycles) % 3)))
    monkeypatch.setattr(Pace, "took", lambda self, *taken: cycles.append(taken))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def mistral(window):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, head_dim=16, sliding_window=window)
    return MistralForCausalLM(config).eval()


def prompts():
    """Two rows, the second padded on the left."""
    ids = torch.randint(2, 97, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids, mask


def by_embeddings(model, **more):
    ids, mask = prompts()
    return answered(
        model, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, **more
    )


def behind_a_cache(model, **more):
    """`generate` gets the new tokens alone, and the mask of all."""
    ids, mask = prompts()
    cache, old = DynamicCache(config=model.config), PROMPT - 10
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.forward(
        ids[:, :old],
        attention_mask=mask[:, :old],
        position_ids=positions[:, :old],
        past_key_values=cache,
    )
    return answered(model, ids[:, old:], attention_mask=mask, past_key_values=cache, **more)


def answered(model, *ids, **more):
    out = model.generate(
        *ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **more
    )
    return out.sequences[:, -NEW:], out.past_key_values


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("way", [by_embeddings, behind_a_cache], ids=lambda way: way.__name__)
@torch.no_grad()
def test_a_prompt_that_is_not_all_of_the_cache_is_no_matter(way, loop):
    make, options = LOOPS[loop]
    truth, full = way(llama())
    model = llama()
    model.compile(backend="loki", options={**OPTIONS, **options})
    found, cache = way(model, custom_generate=make())
    assert torch.equal(found, truth)
    seen = prompts()[1].bool()
    for here, there in zip(cache.layers, full.layers, strict=True):
        keys = [layer.keys[:, :, :PROMPT].transpose(1, 2)[seen] for layer in (here, there)]
        torch.testing.assert_close(*keys, rtol=0, atol=2e-5)


@pytest.mark.parametrize("loop", LOOPS)
@torch.no_grad()
def test_a_window_that_what_is_embedded_would_wrap_is_refused(loop):
    make, options = LOOPS[loop]
    model = mistral(PROMPT + 5)
    model.compile(backend="loki", options={**OPTIONS, **options})
    with pytest.raises(ValueError, match="has wrapped"):
        by_embeddings(model, custom_generate=make())


@pytest.mark.parametrize("kind", ["growing", pytest.param("static", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_loop_by_hand_goes_on_densely_where_a_window_wraps(kind):
    window, before = 30, 20

    def started(model):
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=80)
        first = model.forward(prompts()[0][:1, :before], past_key_values=cache).logits[:, -1:]
        return cache, [first.argmax(-1)]

    uncompiled = mistral(window)
    cache, truth = started(uncompiled)
    for _ in range(window):
        truth.append(uncompiled(truth[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    truth = torch.cat(truth, 1)
    model = mistral(window)
    model.compile(backend="loki", options={**OPTIONS, "top_k": 0.5})
    cache, found = started(model)
    decoder = loki_compile.LosslessDecoder(model, cache)
    while sum(x.shape[1] for x in found) < truth.shape[1]:
        left = truth.shape[1] - sum(x.shape[1] for x in found)
        found.append(decoder.next(found[-1][:, -1:], most=left))
    assert any(x.shape[1] > 1 for x in found) and found[-1].shape[1] == 1
    assert torch.equal(torch.cat(found, 1), truth)


@torch.no_grad()
def test_a_static_window_that_is_longer_than_all_tokens_is_not_refused():
    model = mistral(4096)
    truth, _ = answered(model, prompts()[0], cache_implementation="static")
    model.compile(backend="loki", options={**OPTIONS, "top_k": 0.5})
    loop = loki_compile.lossless()
    found, _ = answered(model, prompts()[0], cache_implementation="static", custom_generate=loop)
    assert torch.equal(found, truth)


class Words:
    """A tokenizer whose words are numbers."""

    def decode(self, ids, **_):
        return "".join(f"{number} " for number in ids)


class Kept(TextStreamer):
    def __init__(self, **more):
        super().__init__(Words(), **more)
        self.text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("skip", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_streamer_gets_what_generates_own_gets(skip, loop):
    make, options = LOOPS[loop]
    ids = prompts()[0][:1]
    truth, found = Kept(skip_prompt=skip), Kept(skip_prompt=skip)
    answered(llama(), ids, streamer=truth)
    model = llama()
    model.compile(backend="loki", options={**OPTIONS, **options})
    answered(model, ids, custom_generate=make(streamer=found))
    assert found.text == truth.text


@torch.no_grad()
def test_what_drafts_would_disturb_is_refused(monkeypatch):
    model = llama()
    model.compile(backend="loki", options=OPTIONS)
    loop = loki_compile.lossless()
    with pytest.raises(ValueError, match=r"found guidance_scale=1\.5"):
        answered(model, prompts()[0], guidance_scale=1.5, custom_generate=loop)
    monkeypatch.setattr(type(model), "tp_size", 2)
    with pytest.raises(ValueError, match="a model that 2 processes share"):
        answered(model, prompts()[0], custom_generate=loop)
    with pytest.raises(ValueError, match="a model that 2 processes share"):
        loki_compile.LosslessDecoder(model, DynamicCache(config=model.config))
