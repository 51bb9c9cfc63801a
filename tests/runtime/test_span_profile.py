"""Whole models: gradients at attention are autograd's, in the memory of a layer, and spans are."""

import pytest
import torch
from loki_compile.kernels.spans import Spans, span_of
from torch.nn import functional as F
from toy_models import make_model, prompt

from loki_compile.span_effects import attend_spans
from loki_compile.span_profile import SpanProfiler

transformers = pytest.importorskip("transformers")

RULES = Spans(tuple(map(span_of, ("0", "9", "0.25N", "1N"))), sink=3, recent=2)


def sliding_model():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).eval()


def eager_llama():
    model = make_model(layers=2)
    model.set_attn_implementation("eager")
    return model


MODELS = {
    "llama": lambda: make_model(layers=2),
    "written out": eager_llama,
    "sliding": sliding_model,
}


class Attention:
    """Stands in for a model's attention, holds each call's operands, and may read spans."""

    def __init__(self, model, spans=None):
        self.calls, self.spans = [], spans
        transformers.AttentionInterface.register("toy_spans", self)
        model.set_attn_implementation("toy_spans")

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        rows, tokens = query.shape[2], key.shape[2]
        at = torch.arange(tokens - rows, tokens)[:, None]
        seen = torch.arange(tokens) <= at
        window = getattr(module, "sliding_window", None)
        if window:
            seen = seen & (torch.arange(tokens) > at - window)
        group = query.shape[1] // key.shape[1]
        wide = [x.repeat_interleave(group, 1) for x in (key, value)]
        scores = (scaling * query @ wide[0].mT).masked_fill(~seen, -torch.inf)
        out = scores.softmax(-1) @ wide[1]
        path = f"model.layers.{module.layer_idx}.self_attn"
        if self.spans is not None and path in self.spans:
            mask = seen[None].to(torch.uint8)
            spans = self.spans[path]
            out = attend_spans(query[0], key[0], value[0], spans, scale=scaling, mask=mask)[None]
        if out.requires_grad:
            out.retain_grad()
        self.calls.append((path, query, key, value, seen, out, scaling))
        return out.transpose(1, 2), None


def expected(model, inputs, labels, of_loss):
    """Signed joint effects, by autograd over the whole model and brute force, in fp64."""
    model = model.double()
    held = Attention(model)
    logits = model(**inputs).logits[0, -len(labels) :]
    if of_loss:
        F.cross_entropy(logits, labels).backward()
    else:
        chances = logits.softmax(-1).gather(-1, labels[:, None])
        ((1 - chances) / chances).log().sum().backward()
    found = {}
    for path, query, key, value, seen, out, scale in held.calls:
        effects = torch.zeros(key.shape[1], len(RULES.heads), dtype=torch.float64)
        for rule, span in enumerate(RULES.heads):
            one = Spans((span,), RULES.sink, RULES.recent)
            mask = seen[None].to(torch.uint8)
            other = attend_spans(query[0], key[0], value[0], one, scale=scale, mask=mask)
            change = ((other - out[0]) * out.grad[0]).sum((1, 2))
            effects[:, rule] = change.unflatten(0, (key.shape[1], -1)).sum(1)
        found[path] = effects.detach()
    return found


@pytest.mark.parametrize(
    "name, of_loss",
    [
        ("llama", False),
        ("sliding", False),
        pytest.param("written out", False, marks=pytest.mark.slow),
        pytest.param("llama", True, marks=pytest.mark.slow),
    ],
)
def test_effects_of_a_whole_prompt_are_those_of_autograd_over_the_model(name, of_loss):
    model, ids = MODELS[name](), prompt(1, 90)
    inputs = {"input_ids": ids[:, :-1], "use_cache": False}
    labels = ids[0, 60:]
    with SpanProfiler(model) as profiler:
        found = profiler.effects(inputs, labels, RULES, published=of_loss)
    layers = len(model.model.layers)
    assert [layer.path for layer in profiler.layers] == [
        f"model.layers.{n}.self_attn" for n in range(layers)
    ]
    truth = expected(model, inputs, labels, of_loss)
    for path, effects in truth.items():
        scale = effects.abs().max()
        torch.testing.assert_close(
            found.effects[path].rows.double().sum(1) / scale, effects / scale, rtol=0, atol=1e-3
        )
        assert (found.effects[path].rows[..., -1] == 0).all()


def test_effects_behind_a_cache_are_those_of_the_rows_that_are_decoded():
    model, ids = make_model(layers=2), prompt(2, 90)
    labels = ids[0, 71:]

    def inputs(kind):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model.to(kind)(ids[:, :70], past_key_values=cache)
        return {"input_ids": ids[:, 70:-1], "past_key_values": cache, "use_cache": True}

    with SpanProfiler(model) as profiler:
        found = profiler.effects(inputs(torch.float32), labels, RULES)
    truth = expected(model, inputs(torch.float64), labels, False)
    for path, effects in truth.items():
        assert found.effects[path].visible == 89
        scale = effects.abs().max()
        torch.testing.assert_close(
            found.effects[path].rows.double().sum(1) / scale, effects / scale, rtol=0, atol=1e-3
        )


@pytest.mark.parametrize(
    "name",
    ["sliding", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "written out"))],
)
def test_the_measured_loss_is_that_of_a_model_whose_attention_reads_spans(name):
    model, ids = MODELS[name](), prompt(3, 80)
    inputs = {"input_ids": ids[:, :-1], "use_cache": False}
    labels = ids[0, 40:]
    spans = {
        "model.layers.0.self_attn": Spans((span_of("5"), span_of("0.5N")), 2, 2),
        "model.layers.1.self_attn": Spans((span_of("0"),), 2, 3),
    }
    with SpanProfiler(model) as profiler:
        dense, _ = profiler.loss(inputs, labels, {})
        found, logs = profiler.loss(inputs, labels, spans)
    Attention(model.double(), spans)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -len(labels) :]
    assert abs(found - float(F.cross_entropy(logits, labels))) < 1e-4
    assert abs(found - dense) > 1e-3
    torch.testing.assert_close(logs, logits.log_softmax(-1).float(), rtol=0, atol=1e-3)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        SpanProfiler(make_model().train())
