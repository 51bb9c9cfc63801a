"""prefill="spans": a prompt's rows read the spans that they would read if they were decoded."""

import pytest
import torch
from loki_compile.kernels import span_prefill
from loki_compile.kernels.ops import prefill
from loki_compile.kernels.spans import Spans, heads_from
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.layer_plan import SPANS_SUFFIX, LayerPlan, PlannedLayer, save_plan
from torch._dynamo.exc import TorchDynamoException
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode
from toy_models import make_model, new_cache, prompt, started
from transformers import DynamicCache

import loki_compile
from loki_compile import LokiConfig, explain, reports

CPU = torch.device("cpu")
WORD, OPTIONS = "moa:16:100,0.25N", {"min_context": 64, "prefill": "spans"}
SPANS = Spans(heads_from("100,0.25N"), 16, 32, 64)
sdpa = torch.nn.functional.scaled_dot_product_attention


def seen(spans, tokens):
    """bool (1, Hkv, S, S): what each row reads, by `Spans.keys`."""
    mask = torch.zeros(1, len(spans.heads), tokens, tokens, dtype=torch.bool)
    for row in range(tokens):
        for head, keys in enumerate(spans.keys(row + 1)):
            mask[0, head, row, : min(spans.sink, keys)] = True
            mask[0, head, row, row + 1 - max(keys - spans.sink, 0) : row + 1] = True
            if keys == row + 1:
                mask[0, head, row, : row + 1] = True
    return mask


class InSpans(TorchFunctionMode):
    """Attention by its definition, in the place of SDPA's over prompts."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not sdpa or args[0].shape[2] <= 8:
            return function(*args, **kwargs)
        q, k, v = (x.double() for x in args[:3])
        mask = seen(SPANS, q.shape[2])
        k, v, mask = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v, mask))
        return sdpa(q, k, v, mask, scale=kwargs.get("scale")).to(args[0].dtype)


@pytest.mark.parametrize("sink, recent, min_keys", [(0, 1, 0), (16, 32, 64), (150, 3, 140)])
@pytest.mark.parametrize("word", ["100,0.25N", "9|-60+1N,2+0.5N", "1N,0"])
def test_block_masks_are_those_of_the_definition(word, sink, recent, min_keys):
    spans = Spans(heads_from(word), sink, recent, min_keys)
    for tokens in (300, 512):
        rule = span_prefill.visible_by(spans, 2, CPU)
        made = span_prefill.block_mask(spans, 4, tokens, CPU)
        asked = create_block_mask(rule, 1, 4, tokens, tokens, device="cpu")
        at = torch.arange(tokens)
        found = rule(None, torch.arange(4)[:, None, None], at[:, None], at)
        assert torch.equal(found, seen(spans, tokens)[0].repeat_interleave(2, 0))
        needed, listed = asked.to_dense().bool(), made.to_dense().bool()
        assert not (needed & ~listed).any()  # none is left out that holds a key
        assert listed.sum() <= needed.sum() + 4  # nor read in vain
        whole = made.full_kv_num_blocks[0]
        for head, row in (whole > 0).nonzero().tolist():  # what is read without asking the rule
            for block in made.full_kv_indices[0, head, row, : whole[head, row]].tolist():
                rows, keys = (slice(128 * n, 128 * n + 128) for n in (row, block))
                assert found[head, rows, keys].all()


def by_op(q, k, v, mask=None, plain=None, spans=SPANS):
    return prefill(
        q, k, v, mask, plain, scale=0.3, lines=span_prefill.flat_lines(spans, k.shape[1]),
        sink=spans.sink, recent=spans.recent, min_keys=spans.min_keys,
    )  # fmt: skip


def inputs(tokens, heads=4, kv_heads=2, dims=16, dtype=torch.float32):
    shapes = [(2, h, tokens, dims) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    "heads, dims, dtype",
    [
        (4, 16, torch.float32),
        pytest.param(2, 40, torch.float32, marks=pytest.mark.slow),
        pytest.param(4, 64, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_prompts_of_any_length_read_spans(heads, dims, dtype, fresh, caplog):
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (700, 901, 1024):
        q, k, v = inputs(tokens, heads, 2, dims, dtype)
        group = heads // 2
        mask = seen(SPANS, tokens).repeat_interleave(group, 1)
        k_, v_ = (x.double().repeat_interleave(group, 1) for x in (k, v))
        truth = sdpa(q.double(), k_, v_, mask, scale=0.3)
        found = by_op(q, k, v)
        assert found.is_contiguous() and found.dtype == dtype
        assert (found.double() - truth).abs().max() < 40 * torch.finfo(dtype).eps
    assert not any("prompts are dense" in message for message in caplog.messages)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


def test_dense_where_a_mask_hides_more_or_spans_leave_too_little_out():
    q, k, v = inputs(700)
    dense = sdpa(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    wide = Spans(heads_from("0.9N"), 4)
    assert torch.equal(by_op(q, k, v, spans=Spans(wide.heads * 2, 4)), dense)
    causal = torch.ones(700, 700, dtype=torch.bool).tril()[None, None]
    padded = causal.clone()
    padded[..., :5] = False
    added = torch.zeros(1, 1, 700, 700).masked_fill(~causal, torch.finfo(torch.float32).min)
    plain = span_prefill.hides_later_keys_alone
    assert [bool(plain(mask)) for mask in (causal, padded, added)] == [True, False, True]
    assert not plain(added - 0.5 * causal) and not plain(torch.ones_like(causal))
    hidden = sdpa(q, k, v, padded, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(
        by_op(q, k, v, padded, plain(padded)), hidden, rtol=0, atol=0, equal_nan=True
    )


def test_where_flex_attention_does_not_compile_prompts_are_dense_and_that_is_said(
    monkeypatch, caplog
):
    def fails(*_, **__):
        raise TorchDynamoException("no such template\nand more")

    monkeypatch.setattr(span_prefill, "compiled_attention", lambda: fails)
    q, k, v = inputs(700, dims=24)
    for _ in range(2):
        dense = sdpa(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        assert torch.equal(by_op(q, k, v), dense)
    (said,) = caplog.messages
    assert said.endswith("no such template") and "prompts are dense" in said


@torch.no_grad()
def test_a_model_reads_its_prompt_by_spans_and_says_so(interpreted, fresh, monkeypatch):
    monkeypatch.setattr(span_prefill, "compiled_attention", lambda: flex_attention)  # sooner so
    ids = prompt(1, 900)
    with InSpans():
        expected = make_model(2)(ids).logits
    model, plain = make_model(2), make_model(2)
    model.compile(backend="loki", options={"policy": WORD, **OPTIONS})
    for mask in (None, torch.ones_like(ids)):  # a mask that is none, too
        found = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - plain(ids).logits).abs().max() > 1e-2
    (site, _) = reports()[-1].sites
    assert site.outcome == "dense by plan" and "reads spans where its mask is causal" in site.reason
    padded = torch.ones_like(ids)
    padded[:, :9] = 0
    loki_compile.reset_stats()
    found, dense = (x(ids, attention_mask=padded).logits[:, 9:] for x in (model, plain))
    torch.testing.assert_close(found, dense, rtol=0, atol=0)
    ran = loki_compile.stats()
    assert (ran["span_prefills"], ran["span_prefills_dense_because"]) == (0, {"mask": 2})
    out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 903) and loki_compile.stats()["sparse_steps"] == 2
    assert loki_compile.stats()["span_prefills"] == 2  # its prompt, once in each layer


def reasons(model, cache, options, tokens=900, **more):
    (found,) = explain(model, prompt(1, tokens), past_key_values=cache, options=options, **more)
    return [site.reason for site in found.sites]


@torch.no_grad()
def test_what_spans_cannot_serve_is_dense_and_says_why():
    model = make_model(2)
    more = {"attention_mask": torch.ones(1, 900, dtype=torch.int64)}
    for policy, cache, why in (
        (WORD, new_cache(model, "static"), "in a cache that is longer"),
        ("loki", DynamicCache(), "its policy has no spans for it"),
        ({0: WORD, 1: "dense"}, DynamicCache(), "its policy has no spans for it"),
    ):
        found = reasons(model, cache, {**OPTIONS, "policy": policy}, **more)
        assert why in found[-1] and 'dense under prefill="spans"' in found[-1]
    behind = started(model, "growing", prompt(2, 30))
    found = reasons(model, behind, {**OPTIONS, "policy": WORD})
    assert "its tokens lie behind others" in found[0]
    layers = reasons(model, DynamicCache(), {"policy": WORD, **OPTIONS, "layers": (1,)})
    assert 'spans": left out by layers=(1,)' in layers[0] and "reads spans" in layers[1]
    short = reasons(model, DynamicCache(), {"policy": WORD, **OPTIONS}, tokens=90)
    assert all("spans read 90% of 90 tokens' keys, and below 70% they pay" in r for r in short)
    default = reasons(model, DynamicCache(), {"policy": WORD})
    assert all("up to 8 are rewritten" in reason for reason in default)
    with pytest.raises(ValueError, match="prefill='sparse'"):
        LokiConfig(prefill="sparse")


@pytest.mark.parametrize(
    "policy, may",
    [("loki", False), ("tidal", False), ({0: "loki"}, False), ("moa", True), (WORD, True),
     ({0: "loki", 1: WORD}, True), ("a.spans.json", True)],
)  # fmt: skip
def test_a_policy_without_spans_is_said_to_leave_prompts_dense(policy, may):
    said = LokiConfig(policy=policy, prefill="spans").notices()
    assert any("prompts will be dense" in notice for notice in said) != may


def test_a_prompt_whose_gradients_are_recorded_is_dense_and_says_why(interpreted, fresh):
    model = make_model(2).requires_grad_(True)
    model.compile(backend="loki", options={"policy": WORD, **OPTIONS})
    assert model(prompt(1, 900), use_cache=False).logits.requires_grad
    assert all("gradients are recorded" in site.reason for site in reports()[-1].sites)


@torch.no_grad()
def test_the_plan_that_is_stored_is_found_in_the_graph_of_a_prompt(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    model, layers = make_model(2), []
    for number, (layer, word) in enumerate(
        zip(model.model.layers, ("moa:64:128,0.5N", "dense"), strict=True)
    ):
        weight = layer.self_attn.k_proj.weight
        marks = weights_fingerprint(weight), block_fingerprints(weight, 16)
        layers.append(PlannedLayer(f"model.layers.{number}.self_attn", *marks, 2, word))
    save_plan(
        LayerPlan(tuple(layers), "toy", 0.5, "text", "2026-11-27T00:00:00+00:00"),
        suffix=SPANS_SUFFIX,
    )
    found = reasons(model, DynamicCache(), {"policy": "moa", **OPTIONS})
    share = Spans(heads_from("128,0.5N"), 64).share(8192)
    assert f"{share:.0%} of 8192 keys" in found[0] and "no spans for it" in found[1]
