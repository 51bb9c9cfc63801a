"""Decoders of libraries from PyPI that transformers never saw: x-transformers and ibm-fms.

Both grow their caches by `torch.cat`. x-transformers is given all tokens at each step and cuts off
those it has; its cache is a list of objects. ibm-fms' cache is a list of tuples.
"""

import pytest
import torch

from loki_compile.counts import reset_stats, stats
from loki_compile.engines import interpreter
from loki_compile.report import clear_reports, reports

pytestmark = pytest.mark.covers

PROMPT, STEPS = 12, 6
TOLERANCE = 2e-5  # of logits of size 1 to 4, in fp32


@pytest.fixture(autouse=True)
def _clean(use_engine):
    """Rewritten graphs run node by node: what Inductor makes of them is not the question here."""
    use_engine(interpreter)
    torch._dynamo.reset()
    clear_reports()
    reset_stats()
    yield
    torch._dynamo.reset()


def _same_as_uncompiled(decode, model) -> list:
    """Decodes uncompiled and compiled, sparse forced at full budget; returns the compiled sites."""
    with torch.no_grad():
        expected = decode(model, model)
        options = {"top_k": 1.0, "min_context": 0}
        found = decode(model, torch.compile(model, backend="loki", options=options))
    assert found.shape == expected.shape and found.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    return [site for graph in reports() for site in graph.sites]


# ----------------------------------------------------------------------------- x-transformers


def _x_transformer(**options):
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=48, depth=2, heads=6, attn_dim_head=16, **options)
    return x_transformers.TransformerWrapper(num_tokens=97, max_seq_len=64, attn_layers=layers)


def _decode_x_transformer(model, step):
    tokens = torch.randint(0, 97, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    _, cache = model(tokens[:, :PROMPT], return_intermediates=True)
    logits = []
    for end in range(PROMPT + 1, PROMPT + STEPS + 1):
        out, cache = step(tokens[:, :end], cache=cache, return_intermediates=True)
        logits.append(out[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_kv_heads": 2}, {"alibi_pos_bias": True}, {"attn_one_kv_head": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_x_transformers_decodes_sparse(options):
    model = _x_transformer(attn_flash=True, **options).eval()
    sites = _same_as_uncompiled(_decode_x_transformer, model)
    assert {site.outcome for site in sites} == {"sparse"}, sites
    assert stats()["sparse_steps"] == STEPS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "the attention weights are used by"),  # they are kept beside the keys
        ({"attn_flash": True, "rotary_pos_emb": True}, "the keys are computed in this graph"),
    ],
    ids=["weights kept", "all keys rotated at each step"],
)
def test_x_transformers_stays_dense_with_a_reason(options, reason):
    sites = _same_as_uncompiled(_decode_x_transformer, _x_transformer(**options).eval())
    assert sites and all(site.outcome == "dense" and reason in site.reason for site in sites), sites
    assert stats()["sparse_steps"] == 0


# ------------------------------------------------------------------------------------ ibm-fms


def _fms_llama(kv_heads: int):
    llama = pytest.importorskip("fms.models.llama")
    config = llama.LLaMAConfig(
        src_vocab_size=97, emb_dim=64, nheads=4, kvheads=kv_heads, nlayers=2,
        max_expected_seq_len=64,
    )  # fmt: skip
    return llama.LLaMA(config)


def _fms_bigcode():
    bigcode = pytest.importorskip("fms.models.gpt_bigcode")
    config = bigcode.GPTBigCodeConfig(
        src_vocab_size=97, emb_dim=64, nheads=4, nlayers=2, max_expected_seq_len=64
    )
    return bigcode.GPTBigCode(config)


def _decode_fms(model, step):
    tokens = torch.randint(1, 97, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    _, cache = model(tokens[:, :PROMPT], use_cache=True)
    logits = []
    for at in range(PROMPT, PROMPT + STEPS):
        out, cache = step(tokens[:, at : at + 1], past_key_value_states=cache, use_cache=True)
        logits.append(out[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize(
    "build",
    [lambda: _fms_llama(0), lambda: _fms_llama(2), _fms_bigcode],
    ids=["one KV head for each", "grouped", "multi-query"],
)
def test_ibm_fms_decodes_sparse(build):
    torch.manual_seed(0)
    model = build()
    model.reset_parameters()
    sites = _same_as_uncompiled(_decode_fms, model.eval())
    assert {site.outcome for site in sites} == {"sparse"}, sites
    assert stats()["sparse_steps"] == STEPS
