"""Decoding token by token measures what one call over the whole text would."""

import pytest
import torch
from torch.nn import functional as F

from loki_compile.commands.measure import (
    filled_cache,
    follow,
    generate,
    latencies,
    new_cache,
    recall_of,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        vocab_size=53,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(53, (41,), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_following_a_text_gives_its_log_probabilities(model, ids, cache):
    trace = follow(model, model, ids, 30, new_cache(model, cache, 41))
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, 30:-1]
    expected = F.cross_entropy(logits, ids[31:], reduction="none")
    torch.testing.assert_close(torch.tensor(trace.nats), expected, rtol=1e-4, atol=1e-5)
    assert trace.predicted == tuple(logits.argmax(-1).tolist())
    assert trace.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    assert len(trace.seconds) == 10


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generation_is_greedy(model, ids, cache):
    found = generate(model, model, ids, 7, new_cache(model, cache, 48))
    text = ids.tolist()
    with torch.no_grad():
        for token in found:
            assert token == model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()
            text.append(token)


def test_agreement_and_recall_count_positions(model, ids):
    trace = follow(model, model, ids, 30, new_cache(model, "dynamic", 41))
    wrong = (trace.predicted[0] + 1, *trace.predicted[1:])
    other = type(trace)(trace.nats, wrong, trace.seconds)
    assert trace.agreement(trace) == 1.0
    assert trace.agreement(other) == 0.9
    right, missed = trace.predicted[4], trace.predicted[6] + 1
    assert recall_of(trace, 30, [(34, [right]), (36, [missed])]) == [True, False]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_filled_cache_is_read_whole(model, cache):
    """The step behind it sees every one of its keys, and stands at the position after them."""
    filled = filled_cache(model, cache, 29, 5)
    assert int(filled.get_seq_length()) == 29
    token = torch.tensor([[7]])
    with torch.no_grad():
        before = model(token, past_key_values=filled).logits
        assert int(filled.get_seq_length()) == 30
        for place in (0, 28):
            again = filled_cache(model, cache, 29, 5)
            for layer, source in zip(again.layers, filled.layers, strict=True):
                layer.keys[:, :, :29] = source.keys[:, :, :29]
                layer.values[:, :, :29] = source.values[:, :, :29]
                layer.values[:, :, place] += 3
            assert not torch.allclose(model(token, past_key_values=again).logits, before)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_filled_window_is_what_reading_leaves(cache):
    torch.manual_seed(6)
    config = transformers.MistralConfig(
        hidden_size=24, intermediate_size=30, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, vocab_size=53, sliding_window=10,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    filled, read = filled_cache(model, cache, 29, 5), new_cache(model, cache, 34)
    tokens = torch.randint(53, (1, 31))
    with torch.no_grad():
        model(tokens[:, :29], past_key_values=read)
        for layer, source in zip(filled.layers, read.layers, strict=True):
            assert layer.keys.shape == source.keys.shape
            layer.keys.copy_(source.keys)
            layer.values.copy_(source.values)
        for at in (29, 30):
            step = tokens[:, at : at + 1]
            expected = model(step, past_key_values=read).logits
            torch.testing.assert_close(model(step, past_key_values=filled).logits, expected)
        assert filled.get_seq_length() == read.get_seq_length() == 31


def test_latencies_time_every_variant(model):
    calls = []

    def counted(*args, **kwargs):
        calls.append(int(kwargs["past_key_values"].get_seq_length()))
        return model(*args, **kwargs)

    found = latencies(model, {"one": model, "two": counted}, 33, rounds=2, steps_per_round=3)
    assert set(found) == {"one", "two"}
    assert all(ms > 0 for ms in found.values())
    assert calls == list(range(33, 33 + 3 + 6))
