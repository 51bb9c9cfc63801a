"""Mistakes reach the user in the first call, as one line of their own, and leave nothing behind."""

import traceback

import pytest
import torch
from loki_compile.pca_store.basis import BasisSet, random_basis
from loki_compile.pca_store.store import Store
from toy_models import tiny_llama

from loki_compile import LokiConfig, backend, calibrate, reports, stats
from loki_compile.counts import forget_notices

pytestmark = pytest.mark.usefixtures("interpreted")

WRONG = {
    "an unknown option": ({"topk": 5}, 'did you mean "top_k"?'),
    "an impossible value": ({"min_context": -1}, "min_context=-1: needs"),
    "options that exclude each other": ({"top_k": 8}, "raise top_k, or lower sink or recent"),
    "a basis that is not there": ({"basis": "mine"}, "no basis 'mine'"),
    "an option that Inductor has not": ({"inductor": {"max_autotun": True}}, '"max_autotune"'),
}


def decoder(seed=5):
    pytest.importorskip("transformers")
    return tiny_llama(seed)


def generated(model, tokens=4):
    ids = torch.arange(11)[None] % 7
    return model.generate(ids, max_new_tokens=tokens, do_sample=False)


def called(model):
    with torch.no_grad():
        return model(torch.arange(11)[None] % 7).logits


class Broken(torch.nn.Module):
    """Its forward breaks into fragments."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        ids = ids + 0
        torch._dynamo.graph_break()
        return self.inner(ids)


def by_model_compile(options):
    model = decoder()
    model.compile(backend="loki", options=options)
    return lambda: generated(model)


def by_torch_compile(options):
    fast = torch.compile(decoder(), backend="loki", options=options)
    return lambda: called(fast)


def in_fragments(options):
    broken = Broken(decoder())
    broken.compile(backend="loki", options=options)
    return lambda: called(broken)


def with_fullgraph(options):
    fast = torch.compile(decoder(), backend="loki", options=options, fullgraph=True)
    return lambda: called(fast)


def refused(call, kind=ValueError):
    with pytest.raises(kind) as info:
        call()
    error = info.value
    shown = "".join(traceback.format_exception(error))
    return error, shown


PAGE = ("BackendCompilerFailed", "Set TORCHDYNAMO_VERBOSE", "from user code", "convert_frame.py")


@pytest.mark.parametrize("way", [by_model_compile, by_torch_compile, in_fragments, with_fullgraph])
def test_a_mistake_is_one_line_at_each_call(way, monkeypatch):
    looked_at = []
    monkeypatch.setattr(backend, "normalize", lambda gm: looked_at.append(gm))
    call = way({"basis": "mine"})
    for _ in range(3):
        error, shown = refused(call)
        assert "no basis 'mine'" in str(error)
        assert "\n" not in str(error)
        assert not [word for word in PAGE if word in shown]
        assert error.__cause__ is None and error.__context__ is None
    assert not looked_at and not reports()
    assert stats()["sparse_steps"] == stats()["dense_steps"] == 0


@pytest.mark.parametrize("wrong", WRONG)
def test_every_mistake_is_a_value_error_of_one_line(wrong):
    options, message = WRONG[wrong]
    fast = torch.compile(lambda x: x + 1, backend="loki", options=options)
    error, shown = refused(lambda: fast(torch.ones(3)))
    assert message in str(error) and "\n" not in str(error)
    assert error.args == (str(error),)
    assert not [word for word in PAGE if word in shown]


def test_an_unknown_mode_is_named():
    fast = torch.compile(lambda x: x + 1, backend="loki", mode="fast")
    error, _ = refused(lambda: fast(torch.ones(3)))
    assert "mode='fast': needs one of 'default'" in str(error)


def test_what_is_mended_works_at_once():
    model = decoder()
    expected = generated(model)
    model.compile(backend="loki", options={"topk": 5})
    refused(lambda: generated(model))
    model.compile(backend="loki", options={"top_k": 1.0})
    assert torch.equal(generated(model), expected)
    assert reports()


def test_a_basis_that_has_been_stored_meanwhile_is_found(tmp_path, monkeypatch):
    """The same call again, not a new one: nothing of the refusal may be cached."""
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    model = decoder()
    model.compile(backend="loki", options={"basis": "later"})
    refused(lambda: generated(model))
    text = torch.randint(64, (1, 50))
    Store().save(calibrate(model, [text], kind="pca", name="later"))
    model.compile(backend="loki", options={"basis": "later"})
    assert generated(model).shape[1] == 15


def test_a_basis_of_other_weights_is_one_line():
    model = decoder()
    shape = (model.config.num_key_value_heads, model.config.head_dim)
    basis = BasisSet((random_basis(*shape, seed=1, weights="0" * 32),))
    model.compile(backend="loki", options={"basis": basis, "min_context": 0})
    error, shown = refused(lambda: generated(model))
    assert "belongs to other weights" in str(error)
    assert "\n" not in str(error) and "Set TORCHDYNAMO_VERBOSE" not in shown


def test_strict_is_a_runtime_error_without_a_page_around_it():
    fast = torch.compile(lambda x: x * 2, backend="loki", options={"strict": True})
    for _ in range(2):
        error, shown = refused(lambda: fast(torch.ones(3)), RuntimeError)
        assert not isinstance(error, ValueError)
        assert str(error).startswith("strict=True, and this graph has no attention")
        assert "Set TORCHDYNAMO_VERBOSE" not in shown and "from user code" not in shown


def test_a_fault_of_ours_keeps_its_page(monkeypatch):
    """A KeyError in a pass is a bug to report, with Dynamo's page."""
    monkeypatch.setattr(backend, "take_parts", lambda gm: {}["nothing"])
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="KeyError"):
        called(torch.compile(decoder(), backend="loki"))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"top_k": 1.0}, "top_k=1.0 covers"), ({"min_context": 1 << 40}, "is longer than any")],
)
def test_what_can_never_be_sparse_is_said_once(options, word, caplog):
    forget_notices()
    model = decoder()
    model.compile(backend="loki", options=options)
    with caplog.at_level("WARNING", "loki_compile"):
        generated(model)
    assert sum(word in message for message in caplog.messages) == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 1.0, "min_context": 0}, {"top_k": 0.9}])
def test_what_may_be_sparse_is_not_warned_of(options):
    assert not LokiConfig(**options).notices()
