"""A cache that keeps no keys but those that spans read: its tokens are those of policy="moa" over a
full cache, and its memory is that of the spans."""

import copy
from functools import partial

import pytest
import torch
from loki_compile.kernels.spans import Spans, heads_from
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.layer_plan import SPANS_SUFFIX, LayerPlan, PlannedLayer, save_plan
from toy_models import LONG, VOCABULARY, make_model, prompt, tiny_llama
from toy_policies import DirectPolicy
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import loki_compile
from loki_compile import SpanCache, stats
from loki_compile.generation.rings import Rings, slots_of_heads

FEW = {"min_context": 24, "sink": 1, "recent": 2}
WORD = "moa:2:7,0.25N"
NEW = 40
LONG_WORD = "moa:64:100,0.25N"


class Decoded(DirectPolicy):
    """The definition of what decoded tokens read; prompts attend to all of themselves."""

    def attention(self, query, key, value, *args, **kwargs):
        if query.shape[2] > 2:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, *args, **kwargs
            )
        return super().attention(query, key, value, *args, **kwargs)


def expected_ranks(spans, head, count):
    """The keys that a head reads of `count`, by `Spans.keys`."""
    read = spans.keys(count)[head]
    return {*range(min(spans.sink, count)), *range(count - (read - spans.sink), count)} & {
        *range(count)
    }


def generated(model, ids, cache, new=NEW, **options):
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(ids, past_key_values=cache, **options)


@pytest.mark.parametrize("sink, recent, min_keys", [(2, 1, 0), (0, 3, 9), (4, 2, 14), (40, 1, 1)])
@pytest.mark.parametrize("word", ["3,0.5N,1N,0", "9|-6+1N,2+0.25N,-4+0.75N,5"])
def test_slots_hold_what_spans_read_at_every_length(word, sink, recent, min_keys):
    spans = Spans(heads_from(word), sink, recent, min_keys)
    longest, prompts = 37, torch.tensor([1, 2, 11, 30])
    rings = Rings.of(spans, longest, torch.device("cpu"))
    slots = slots_of_heads(spans, longest)
    assert rings.size == sum(slots)
    read = [max(spans.keys(n)[head] for n in range(1, longest + 1)) for head in range(4)]
    assert [*slots] == read  # as many as are ever read, and none more
    held = rings.ranks(prompts)
    for step in range(longest - int(prompts.max()) + 1):
        count = prompts + step
        if step:
            held.scatter_(1, rings.newest(count), (count - 1).unsqueeze(1).expand(-1, 4))
        ranges = rings.ranges(count)
        assert ranges.dtype == torch.int32 and ranges.shape == (4, 4, 1, 4)
        for row in range(4):
            for head in range(4):
                first, stop, start, end = ranges[row, head, 0].tolist()
                assert first <= stop <= start <= end
                found = [*held[row, first:stop].tolist(), *held[row, start:end].tolist()]
                assert len(set(found)) == len(found)
                assert {*found} == expected_ranks(spans, head, int(count[row]))


@pytest.mark.parametrize("length", [5, 60])
@torch.no_grad()
def test_tokens_are_those_of_the_same_plan_over_a_full_cache(length):
    """From a prompt below min_context too, and one whose keys are dropped."""
    ids = prompt(3, length) % 60 + 2
    with Decoded(WORD, 2, FEW):
        expected = generated(tiny_llama(), ids, DynamicCache())
    model = tiny_llama()
    found = generated(model, ids, SpanCache(model, WORD, max_length=length + NEW, **FEW))
    assert torch.equal(found, expected)
    dense = generated(tiny_llama(), ids, DynamicCache())
    assert length < 24 or not torch.equal(dense, expected)  # or nothing would be shown


@torch.no_grad()
def test_rows_of_a_padded_batch_read_by_their_own_lengths():
    ids, mask = prompt(4, 50, rows=3) % 60 + 2, torch.ones(3, 50, dtype=torch.int64)
    mask[0, :30] = 0
    mask[2, :7] = 0
    with Decoded(WORD, 2, FEW):
        expected = generated(tiny_llama(), ids, DynamicCache(), attention_mask=mask)
    model = tiny_llama()
    cache = SpanCache(model, WORD, max_length=50 + NEW, **FEW)
    found = generated(model, ids, cache, attention_mask=mask)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_beams_take_their_keys_with_them():
    ids = prompt(5, 50, rows=2) % 60 + 2
    with Decoded(WORD, 2, FEW):
        expected = generated(tiny_llama(), ids, DynamicCache(), num_beams=3)
    model = tiny_llama()
    cache = SpanCache(model, WORD, max_length=50 + NEW, **FEW)
    assert torch.equal(generated(model, ids, cache, num_beams=3), expected)
    kept = [t.clone() for t in (cache.layers[1].keys, cache.layers[1].hidden)]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 4]))
    assert torch.equal(cache.layers[1].keys, kept[0][[0, 2]])
    assert torch.equal(cache.layers[1].hidden, kept[1][[0, 2]])


@torch.no_grad()
def test_at_default_options_its_tokens_are_those_of_the_policy_over_a_full_cache(
    interpreted, fresh
):
    full = make_model(1)
    full.compile(backend="loki", options={"policy": LONG_WORD})
    expected = generated(full, prompt(1), DynamicCache(), 12)
    assert stats()["sparse_steps"] == 11
    model = make_model(1)
    cache = SpanCache(model, LONG_WORD, max_length=LONG + 12)
    assert torch.equal(generated(model, prompt(1), cache, 12), expected)


@torch.no_grad()
def test_one_compiled_graph_decodes_at_all_lengths(fresh):
    """With Inductor."""
    model, ids, new = make_model(1), prompt(1), 12
    expected = generated(model, ids, SpanCache(model, LONG_WORD, max_length=LONG + new), new)
    model.compile(backend="loki")
    torch._dynamo.utils.counters.clear()
    found = generated(model, ids, SpanCache(model, LONG_WORD, max_length=LONG + new), new)
    assert torch.equal(found, expected)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the prompt's, and one
    name = "span_cache_steps"
    assert (stats()["span_cache_prompts"], stats()[name]) == (2, 2 * (new - 1))  # eager ones too


@torch.no_grad()
def test_what_it_served_is_counted_for_each_model_whatever_became_of_the_cache():
    loki_compile.reset_stats()
    ids = prompt(5, 50, rows=2) % 60 + 2
    model, other = tiny_llama(), tiny_llama()
    with torch.inference_mode():
        cache = SpanCache(model, WORD, max_length=90, **FEW)
    generated(model, ids, cache, 4)
    cache.reset()
    generated(model, ids, cache, 3)
    fork = copy.deepcopy(cache)
    for each in (cache, fork):
        model(ids[:, :1], past_key_values=each)
    del cache, fork
    generated(other, ids, SpanCache(other, WORD, max_length=90, **FEW), 2)
    counts = [
        (each["span_cache_prompts"], each["span_cache_steps"])
        for each in stats()["models"].values()
    ]
    assert counts == [(2, 7), (1, 1)]
    assert (stats()["span_cache_prompts"], stats()["span_cache_steps"]) == (3, 8)
    loki_compile.reset_stats()
    assert stats()["span_cache_steps"] == 0 and not stats()["models"]


@torch.no_grad()
def test_its_memory_is_that_of_the_spans():
    model, ids = make_model(2), prompt(1, 600)
    plan = {0: "moa:4:60,0.25N", 1: "dense"}
    cache = SpanCache(model, plan, max_length=1000, min_context=0)
    assert cache.nbytes == 0
    model(ids, past_key_values=cache)
    slots = (4 + 60) + (4 + 250) + 2 * 1000
    assert cache.nbytes == slots * 2 * 16 * 4
    assert cache.share == slots / 4000
    assert [spans.sink for spans in cache.plan] == [4, 4]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in cache.layers for t in (layer.keys, layer.values)}  # fmt: skip
    assert sum(kept.values()) == cache.nbytes
    cache.reset()
    assert cache.nbytes == 0 and int(cache.get_seq_length()) == 0
    model(ids, past_key_values=cache)
    assert int(cache.get_seq_length()) == 600


@torch.no_grad()
def test_the_plan_that_is_stored_for_the_model_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    model = make_model(2)
    with pytest.raises(ValueError, match="no plan of spans that is stored for this model"):
        SpanCache(model, max_length=100)
    words = ("moa:64:128,0.5N", "dense")
    layers = []
    for number, (layer, word) in enumerate(zip(model.model.layers, words, strict=True)):
        weight = layer.self_attn.k_proj.weight
        marks = weights_fingerprint(weight), block_fingerprints(weight, 16)
        layers.append(PlannedLayer(f"model.layers.{number}.self_attn", *marks, 2, word))
    plan = LayerPlan(tuple(layers), "toy", 0.5, "text", "2026-11-27T00:00:00+00:00")
    file = save_plan(plan, suffix=SPANS_SUFFIX)
    by_name = SpanCache(model, max_length=4000)
    by_file = SpanCache(model, str(file), max_length=4000)
    by_hand = SpanCache(model, dict(enumerate(words)), max_length=4000)
    assert by_name.plan == by_file.plan == by_hand.plan
    other = tiny_llama()
    with pytest.raises(ValueError, match="that plan is of toy"):
        SpanCache(other, str(file), max_length=100)


def test_published_spans_are_folded_to_kv_heads(tmp_path):
    file = tmp_path / "moa.json"
    file.write_text('{"alphas": [[64, 128, 0, 256]], "betas": [[0, 0, 0.5, 0]]}')
    cache = SpanCache(make_model(1), str(file), max_length=1000)
    assert [span.keys(400) for span in cache.plan[0].heads] == [128, 256]
    assert [span.keys(800) for span in cache.plan[0].heads] == [128, 400]
    with pytest.raises(ValueError, match="it has 1 layers, and the model 2"):
        SpanCache(make_model(2), str(file), max_length=1000)


@torch.no_grad()
def test_what_needs_dropped_keys_is_refused_in_one_line():
    model, ids = tiny_llama(), prompt(1, 40) % 60 + 2
    cache = SpanCache(model, WORD, max_length=50, **FEW)
    generated(model, ids, cache, 3)

    def refused(match, act, error=ValueError):
        with pytest.raises(error, match=match) as caught:
            act()
        assert "\n" not in str(caught.value).strip()

    cache.crop(0)
    refused("needed a cache that can be rewound", lambda: cache.crop(-2))
    refused("needed one at a time", lambda: model(ids[:, :5], past_key_values=cache))
    longer = torch.cat((ids, ids[:, :9]), 1)
    refused("needed one at a time", lambda: generated(model, longer, cache))
    refused("or a new cache", lambda: setattr(cache, "plan", WORD))
    new = SpanCache(model, WORD, max_length=50, **FEW)
    refused("a prompt of 55 tokens", lambda: model(prompt(1, 55) % 60, past_key_values=new))
    refused("more tokens than the max_length", lambda: generated(model, ids, new, 14), RuntimeError)
    compiled = tiny_llama()
    compiled.compile(backend="loki")
    lossless = {"custom_generate": loki_compile.lossless()}
    corrected = {"custom_generate": loki_compile.corrected(2)}
    for way in (lossless, corrected):
        another = SpanCache(compiled, WORD, max_length=90, **FEW)
        refused("outside its spans is gone", partial(generated, compiled, ids, another, **way))


def test_what_it_cannot_serve_is_refused_when_it_is_made():
    model = tiny_llama()
    for plan, match in (
        ("loki", "layer 0 is to do 'loki', which may read any key"),
        ({0: WORD}, "layer 1 is to do 'loki'"),
        ("tidal", "plan of all layers"),
        ("moa:2:7,8,9", "has 2 KV heads, and is to read 3 spans"),
    ):
        with pytest.raises(ValueError, match=match):
            SpanCache(model, plan, max_length=50)
    for length in (0, 1.5, True):
        with pytest.raises(ValueError, match="needs a count of tokens"):
            SpanCache(model, WORD, max_length=length)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="needed 'sdpa' for a SpanCache"):
        SpanCache(model, WORD, max_length=50)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    sliding = MistralForCausalLM(MistralConfig(**sizes, **heads))
    with pytest.raises(ValueError, match="layers of sliding_attention"):
        SpanCache(sliding, WORD, max_length=50)


@torch.no_grad()
def test_other_caches_and_other_attentions_are_as_before():
    ids = prompt(1, 40) % VOCABULARY
    model, before = make_model(1), make_model(1)
    cache = SpanCache(model, WORD, max_length=60, **FEW)
    assert torch.equal(model(ids).logits, before(ids).logits)
    assert torch.equal(generated(model, ids, None, 9), generated(before, ids, None, 9))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention that does not know it"):
        model(ids, past_key_values=cache)
