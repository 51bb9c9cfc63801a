"""Unmodified Hugging Face decoders: with the whole budget, tokens equal eager's.

Tiny random models of different families, StaticCache and DynamicCache, through every door that
leads to the backend. Most run with an interpreter in Inductor's place; those marked `slow` and
the Llama run Inductor.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    StaticCache,
    cache_utils,
)

from loki_compile import reports, stats

SPARSE = {"min_context": 0, "top_k": 1.0}
PROMPT, NEW, VOCABULARY = 12, 7, 128

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}
_MHA = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}

# model type -> (configuration, attention layers, those of them that can be sparse)
FAMILIES = {
    "llama": (_LLAMA, 2, 2),
    "qwen3": (_LLAMA, 2, 2),
    "gpt2": (_GPT2, 2, 2),
    "gpt_neox": ({**_MHA, "rotary_pct": 0.5}, 2, 2),
    "falcon": (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128},
        2,
        2,
    ),
    "phi3": ({**_LLAMA, "pad_token_id": 0}, 2, 2),
    "mixtral": ({**_LLAMA, "num_local_experts": 4}, 2, 2),
    "opt": (
        {
            "hidden_size": 64,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
        2,
        2,
    ),
    "cohere": (_LLAMA, 2, 2),
    "olmo2": (_LLAMA, 2, 2),
    "starcoder2": (_LLAMA, 2, 2),
    "stablelm": (_LLAMA, 2, 2),
    "gemma3_text": (
        {**_LLAMA, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
        2,
        2,
    ),
    "gemma2": ({**_LLAMA, "sliding_window": 64}, 2, 2),
    "granite": (_LLAMA, 2, 2),
    "deepseek_v3": (
        {
            **_MHA,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 10,
        },
        2,
        2,
    ),
    "bloom": (
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
        2,
        2,
    ),
}


# With each kind of cache in every run; the others with one of them, in turn.
_BOTH = ("llama", "gpt2", "gemma3_text", "mixtral", "deepseek_v3")
# Close relatives of the others: in the slow run only.
_LESS_OFTEN = ("cohere", "starcoder2", "stablelm", "gemma2", "granite")
pytestmark = [pytest.mark.covers, pytest.mark.usefixtures("fresh")]


def make(model_type: str, seed: int = 0, **changes):
    """A random model whose logits are far enough apart for greedy tokens to be stable."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**FAMILIES[model_type][0], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 1, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def generate(model, ids, kind: str, **more):
    cache = {"cache_implementation": "static"} if kind == "static" else {}
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **cache, **more)


def sparse_sites() -> list[int]:
    """Sparse sites of each graph that has any."""
    counts = [report.count("sparse") for report in reports()]
    return [count for count in counts if count]


# --- every family, both caches


def _families():
    often = [family for family in FAMILIES if family not in (*_BOTH, *_LESS_OFTEN)]
    every = {*((family, kind) for family in _BOTH for kind in ("static", "dynamic"))}
    every |= {*zip(often, itertools.cycle(("static", "dynamic")), strict=False)}
    return [
        pytest.param(family, kind, marks=[pytest.mark.slow] * ((family, kind) not in every))
        for family in FAMILIES
        for kind in ("static", "dynamic")
    ]


@pytest.mark.parametrize(("model_type", "kind"), _families())
def test_greedy_tokens_equal_eagers(model_type, kind, interpreted):
    model = make(model_type)
    _, layers, sparse = FAMILIES[model_type]
    ids = prompt()
    expected = generate(model, ids, kind)
    model.compile(backend="loki", options=SPARSE)
    tokens = generate(model, ids, kind)
    assert tokens.tolist() == expected.tolist()
    if not sparse:
        assert stats()["sparse_steps"] == 0
        return
    assert sparse_sites() and set(sparse_sites()) == {sparse}
    assert stats()["sparse_steps"] == NEW - 1
    assert stats()["rebuilds"] == sparse
    decode = [report for report in reports() if report.count("sparse")]
    assert all(len(report.sites) == layers for report in decode)


@pytest.mark.parametrize(
    ("model_type", "kind"),  # in turn: no step here asks what the cache is
    [("llama", "static"), ("gpt2", "dynamic"), ("gemma3_text", "static"), ("falcon", "dynamic")],
)
def test_short_contexts_run_dense_by_default(model_type, kind, interpreted):
    model = make(model_type)
    ids = prompt()
    expected = generate(model, ids, kind)
    model.compile(backend="loki")
    assert generate(model, ids, kind).tolist() == expected.tolist()
    assert stats()["sparse_steps"] == stats()["rebuilds"] == 0
    assert interpreted.calls("loki.select") == interpreted.calls("loki.attend") == 0


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_left_padded_batches_equal_eagers(model_type, kind, interpreted):
    model = make(model_type)
    ids = prompt(batch=3)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :9] = 0, 0
    ids[mask == 0] = 0
    expected = generate(model, ids, kind, attention_mask=mask)
    model.compile(backend="loki", options=SPARSE)
    assert generate(model, ids, kind, attention_mask=mask).tolist() == expected.tolist()
    assert stats()["sparse_steps"] == NEW - 1


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_window_that_fills_while_decoding(model_type, interpreted):
    """Sliding layers change their graph when the window is full."""
    changes = {"sliding_window": 14} if model_type == "gemma3_text" else {}
    for kind in ("static", "dynamic"):
        torch._dynamo.reset()
        model = make(model_type, **changes)
        ids = prompt()
        expected = generate(model, ids, kind)
        model.compile(backend="loki", options=SPARSE)
        assert generate(model, ids, kind).tolist() == expected.tolist()


def test_a_budget_of_one_key_changes_the_tokens(interpreted):
    """Otherwise equal tokens would say nothing about attention."""
    model = make("llama")
    ids = prompt()
    expected = generate(model, ids, "dynamic")
    options = {"min_context": 0, "top_k": 1, "sink": 0, "recent": 0}
    model.compile(backend="loki", options=options)
    assert generate(model, ids, "dynamic").tolist() != expected.tolist()
    assert len(set(expected[0, PROMPT:].tolist())) > 2


# --- every door


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_compile_config_of_generate(model_type, interpreted):
    """What transformers does by itself on CUDA; forced on CPU. Prefill is outside the graph."""
    model = make(model_type)
    ids = prompt(batch=2)
    expected = generate(model, ids, "static", disable_compile=True)
    compile_config = CompileConfig(backend="loki", options=SPARSE, mode=None)
    compile_config._compile_all_devices = True
    tokens = generate(model, ids, "static", compile_config=compile_config)
    assert tokens.tolist() == expected.tolist()
    assert stats()["sparse_steps"] == NEW - 1 and stats()["rebuilds"] == 2
    assert all(len(report.sites) == report.count("sparse") for report in reports())


def test_compile_config_with_its_default_mode(interpreted):
    """mode="reduce-overhead" and no options: everything is short, so everything is dense."""
    model = make("llama")
    ids = prompt()
    expected = generate(model, ids, "static", disable_compile=True)
    compile_config = CompileConfig(backend="loki")
    compile_config._compile_all_devices = True
    tokens = generate(model, ids, "static", compile_config=compile_config)
    assert tokens.tolist() == expected.tolist()
    assert reports() and stats()["sparse_steps"] == 0


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_compiled_forward(kind, interpreted):
    model = make("llama")
    ids = prompt()
    expected = generate(model, ids, kind)
    model.forward = torch.compile(model.forward, backend="loki", options=SPARSE)
    assert generate(model, ids, kind).tolist() == expected.tolist()
    assert stats()["sparse_steps"] == NEW - 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_compiled_model_called_by_hand(kind, mode, interpreted):
    """Eager prefill, then steps of one and of three tokens through torch.compile(model)."""
    model = make("qwen3")
    fast = torch.compile(model, backend="loki", options={**SPARSE, "strict": True})
    ids = prompt(batch=2, length=PROMPT + NEW)

    def cache():
        if kind == "static":
            return StaticCache(model.config, max_cache_len=PROMPT + NEW + 2)
        return DynamicCache(config=model.config)

    with mode():
        here, there = cache(), cache()
        for past in (here, there):
            model(ids[:, :PROMPT], past_key_values=past)
        for at in range(PROMPT, PROMPT + NEW):
            logits = [
                f(ids[:, at : at + 1], past_key_values=past).logits
                for f, past in ((fast, here), (model, there))
            ]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert stats()["sparse_steps"] == NEW and stats()["rebuilds"] == 2


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_beams_equal_eagers(kind, interpreted):
    model = make("llama")
    ids = prompt()
    expected = generate(model, ids, kind, num_beams=3)
    model.compile(backend="loki", options=SPARSE)
    assert generate(model, ids, kind, num_beams=3).tolist() == expected.tolist()
    assert stats()["sparse_steps"] == NEW - 1


def test_a_second_longer_conversation(interpreted):
    """Another cache length: the graphs become symbolic."""
    model = make("llama")
    short, long = prompt(), prompt(length=2 * PROMPT)
    expected = [generate(model, ids, "static").tolist() for ids in (short, long, short)]
    model.compile(backend="loki", options=SPARSE)
    assert [generate(model, ids, "static").tolist() for ids in (short, long, short)] == expected
    assert stats()["sparse_steps"] == 3 * (NEW - 1)


def test_assisted_decoding_equals_eagers(interpreted):
    """The cache is cropped after every round; several tokens are verified at once."""
    model, assistant = make("llama"), make("llama", seed=1, num_hidden_layers=1)
    ids = prompt()
    expected = generate(model, ids, "dynamic", assistant_model=assistant)
    model.compile(backend="loki", options=SPARSE)
    tokens = generate(model, ids, "dynamic", assistant_model=assistant)
    assert tokens.tolist() == expected.tolist()
    assert stats()["sparse_steps"] > 0 and stats()["dense_steps"] == 0


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_penalties_of_generate_see_eagers_logits(kind, interpreted):
    model = make("llama")
    ids = prompt(batch=2)
    penalties = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    plain, expected = generate(model, ids, kind), generate(model, ids, kind, **penalties)
    assert plain.tolist() != expected.tolist()
    model.compile(backend="loki", options=SPARSE)
    assert generate(model, ids, kind, **penalties).tolist() == expected.tolist()
    assert stats()["sparse_steps"] == NEW - 1


def contrastive(model, step, ids, candidates: int = 3, alpha: float = 0.6) -> list[int]:
    """Contrastive search (Su et al. 2022, eq. 5): each step tries the likeliest tokens as a batch
    and keeps the one that is likely and whose state is unlike all earlier ones."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(ids, past_key_values=cache, output_hidden_states=True)
        states, logits, tokens = out.hidden_states[-1][0], out.logits[0, -1], []
        for _ in range(NEW):
            likely = logits.softmax(-1).topk(candidates)
            cache.batch_repeat_interleave(candidates)
            out = step(likely.indices[:, None], past_key_values=cache, output_hidden_states=True)
            new = out.hidden_states[-1][:, -1]
            alike = torch.cosine_similarity(new[:, None], states[None], dim=-1).amax(-1)
            best = int(((1 - alpha) * likely.values - alpha * alike).argmax())
            cache.batch_select_indices(torch.tensor([best]))
            states, logits = torch.cat([states, new[best, None]]), out.logits[best, -1]
            tokens.append(int(likely.indices[best]))
    return tokens


def test_contrastive_search_equals_eagers(interpreted):
    """The caches are repeated for the candidates, and one is kept: new tensors each time."""
    model = make("llama")
    ids = prompt()
    expected = contrastive(model, model, ids)
    assert expected != generate(model, ids, "dynamic")[0, PROMPT:].tolist()
    fast = torch.compile(model, backend="loki", options=SPARSE)
    assert contrastive(model, fast, ids) == expected
    assert stats()["sparse_steps"] == NEW


@pytest.mark.filterwarnings("ignore")  # of torch.export, about what the wrapper keeps
def test_an_exported_decoder_decodes_sparse_and_export_itself_sees_no_backend(interpreted):
    """torch.export of a compiled model traces the model; what it made compiles like any module."""
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model = make("llama")
    ids = prompt(length=NEW)
    cache = StaticCache(model.config, max_cache_len=64)
    with torch.no_grad():
        expected = [model(token[None, None], past_key_values=cache).logits for token in ids[0]]
    model.compile(backend="loki", options=SPARSE)
    model.generation_config.cache_implementation = "static"
    model.generation_config.use_cache = True
    wrapped = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=64)
    example = {"input_ids": ids[:, :1], "cache_position": torch.zeros(1, dtype=torch.long)}
    program = torch.export.export(wrapped, (), example, strict=False)
    assert not [node for node in program.graph.nodes if "loki" in str(node.target)]
    assert not reports()
    fast = torch.compile(program.module(), backend="loki", options=SPARSE)
    with torch.no_grad():
        for at, truth in enumerate(expected):
            logits = fast(input_ids=ids[:, at : at + 1], cache_position=torch.tensor([at]))
            torch.testing.assert_close(logits, truth, rtol=0, atol=1e-4)
    assert stats()["sparse_steps"] == NEW and set(sparse_sites()) == {2}


def decode_beside_eager(model, fast, here, there, ids):
    """An eager prefill into both caches, then steps whose logits must agree; the sites found."""
    with torch.no_grad():
        for past in (here, there):
            model(ids[:, :PROMPT], past_key_values=past)
        for at in range(PROMPT, PROMPT + NEW):
            logits = [
                step(ids[:, at : at + 1], past_key_values=past).logits
                for step, past in ((fast, here), (model, there))
            ]
            torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    return [site for report in reports() for site in report.sites]


class Int8Layer(cache_utils.QuantizedLayer):
    """Keys and values in 8 bits; the last few as they are."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantised):
        return quantised[0] * quantised[1]


QUANTISED = {"int8": lambda: Int8Layer(residual_length=4)}
if hasattr(cache_utils, "Fp8QuantizedLayer"):  # of newer versions
    QUANTISED["fp8"] = cache_utils.Fp8QuantizedLayer


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_caches_stay_dense_with_a_reason(kind, interpreted):
    model = make("llama")
    ids = prompt(length=PROMPT + NEW)
    fast = torch.compile(model, backend="loki", options=SPARSE)
    here, there = (Cache(layers=[QUANTISED[kind]() for _ in range(2)]) for _ in range(2))
    sites = decode_beside_eager(model, fast, here, there, ids)
    assert sites and all(site.outcome == "dense" and site.reason for site in sites)
    assert stats()["sparse_steps"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloads from a GPU")
def test_offloaded_caches_equal_eagers(interpreted):
    """Every step finds new tensors on the device, or sites that say why they are dense."""
    model = make("llama").cuda()
    ids = prompt(length=PROMPT + NEW).cuda()
    fast = torch.compile(model, backend="loki", options=SPARSE)
    here, there = (DynamicCache(config=model.config, offloading=on) for on in (True, False))
    sites = decode_beside_eager(model, fast, here, there, ids)
    assert all(site.outcome != "dense" or site.reason for site in sites)


def test_encoder_decoder_models_decode_sparse(interpreted):
    """Self-attention grows; cross-attention reads a cache that no step writes."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    ids = prompt()
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, num_beams=1)
    model.compile(backend="loki", options=SPARSE)
    tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False, num_beams=1)
    assert tokens.tolist() == expected.tolist()
    assert stats()["sparse_steps"] > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_both_attention_implementations(kind, implementation, interpreted):
    model = make("llama", attn_implementation=implementation)
    ids = prompt()
    expected = generate(model, ids, kind)
    model.compile(backend="loki", options=SPARSE)
    assert generate(model, ids, kind).tolist() == expected.tolist()
    assert stats()["sparse_steps"] == NEW - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_half_precision_logits_are_as_near_to_fp32_as_eagers(kind, dtype, interpreted):
    exact = make("llama")
    half = make("llama").to(dtype)
    exact.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    fast = torch.compile(half, backend="loki", options=SPARSE)
    ids = prompt(batch=2, length=PROMPT + NEW)

    def cache(model):
        if kind == "static":
            return StaticCache(model.config, max_cache_len=PROMPT + NEW)
        return DynamicCache(config=model.config)

    caches = [cache(exact), cache(half), cache(half)]
    ours = theirs = 0.0
    with torch.no_grad():
        for model, past in zip((exact, half, half), caches, strict=True):
            model(ids[:, :PROMPT], past_key_values=past)
        for at in range(PROMPT, PROMPT + NEW):
            truth, eager, out = (
                model(ids[:, at : at + 1], past_key_values=past).logits.float()
                for model, past in zip((exact, half, fast), caches, strict=True)
            )
            ours = max(ours, (out - truth).abs().max().item())
            theirs = max(theirs, (eager - truth).abs().max().item())
    assert stats()["sparse_steps"] == NEW
    assert ours <= 2 * theirs


# --- Inductor below


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_llama_under_inductor(kind):
    model = make("llama")
    ids = prompt(batch=2)
    expected = generate(model, ids, kind)
    model.compile(backend="loki", options=SPARSE)
    assert generate(model, ids, kind).tolist() == expected.tolist()
    assert stats()["sparse_steps"] == NEW - 1 and stats()["rebuilds"] == 2


@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
def test_llama_below_min_context_is_inductors_bit_for_bit(kind):
    model = make("llama")
    ids = prompt(batch=2, length=PROMPT + 3)
    runs = []
    for backend, options in (("inductor", None), ("loki", {"pack_gqa": False, "min_context": 50})):
        torch._dynamo.reset()
        fast = torch.compile(model, backend=backend, options=options)
        if kind == "static":
            cache = StaticCache(model.config, max_cache_len=100)
        else:
            cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :PROMPT], past_key_values=cache)
            steps = range(PROMPT, PROMPT + 3)
            runs.append([fast(ids[:, t : t + 1], past_key_values=cache).logits for t in steps])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert stats()["dense_steps"] == 3 and stats()["sparse_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("model_type", [m for m in FAMILIES if m != "llama"])
def test_families_under_inductor(model_type, kind):
    model = make(model_type)
    ids = prompt(batch=2)
    expected = generate(model, ids, kind)
    model.compile(backend="loki", options=SPARSE)
    assert generate(model, ids, kind).tolist() == expected.tolist()
    assert bool(stats()["sparse_steps"]) == bool(FAMILIES[model_type][2])
