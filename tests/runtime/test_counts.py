"""What `stats`, notices and reports say of what ran."""

from __future__ import annotations

import logging

import pytest
import torch
from toy_capture import clear_runtime
from toy_models import LONG, make_model, new_cache, prompt, started

from loki_compile import reports, stats
from loki_compile.counts import say_once

CACHES = pytest.mark.parametrize("kind", ["static", "growing"])


def notices(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "loki_compile.notices"]


@CACHES
@torch.no_grad()
def test_dense_steps_are_counted_by_reason(kind, interpreted):
    model = make_model()
    model.compile(backend="loki")
    short = started(model, kind, prompt(1, 40))
    for step in range(3):
        model(torch.full((1, 1), step + 2), past_key_values=short)
    long = started(model, kind, prompt(2))
    for step in range(4):
        model(torch.full((1, 1), step + 2), past_key_values=long)
    assert stats()["dense_because"] == {"short": 3}
    assert (stats()["dense_steps"], stats()["sparse_steps"]) == (3, 4)
    assert 0 < stats()["index_bytes"] <= stats()["peak_index_bytes"]


@torch.no_grad()
def test_models_are_counted_apart(interpreted):
    for steps in (2, 3):
        model = make_model()
        model.compile(backend="loki")
        cache = started(model, "static", prompt(1))
        for step in range(steps):
            model(torch.full((1, 1), step + 2), past_key_values=cache)
    first, second = stats()["models"].values()
    assert (first["sparse_steps"], second["sparse_steps"]) == (2, 3)
    assert (first["rebuilds"], second["rebuilds"]) == (1, 1)
    assert stats()["sparse_steps"] == 5 and len(set(stats()["models"])) == 2


@CACHES
@torch.no_grad()
def test_what_is_long_and_the_first_sparse_step_are_said_once(kind, interpreted, caplog):
    model = make_model(2)
    model.compile(backend="loki")
    for seed in (1, 2):
        cache = new_cache(model, kind)
        model(prompt(seed), past_key_values=cache)
        for step in range(3):
            model(torch.full((1, 1), step + 2), past_key_values=cache)
    said = notices(caplog)
    assert len(said) == len(set(said))
    (done,) = [line for line in said if "first sparse step" in line]
    assert "2 of 2 attention sites" in done and "loki_compile.stats()" in done
    assert any("compiling the sparse variant" in line for line in said)
    assert all(r.levelno == logging.WARNING for r in caplog.records if "notices" in r.name)


@pytest.mark.parametrize(
    ("options", "slots", "words"),
    [
        ({"top_k": 1.0}, LONG + 9, "covers every context"),
        ({"min_context": 4000}, LONG + 9, "min_context"),
        ({}, 900, "min_context"),
    ],
)
@torch.no_grad()
def test_options_that_leave_nothing_sparse_are_said_once(
    options, slots, words, interpreted, caplog
):
    model = make_model()
    model.compile(backend="loki", options=options)
    cache = new_cache(model, "static", slots)
    model(prompt(1, 800), past_key_values=cache)
    for step in range(4):
        model(torch.full((1, 1), step + 2), past_key_values=cache)
    found = [line for line in notices(caplog) if words in line]
    assert len(found) == 1 and stats()["sparse_steps"] == 0


@torch.no_grad()
def test_a_model_in_which_nothing_became_sparse_is_said_once(interpreted, caplog):
    """Keys that are cached in another form than attention reads them."""

    class Squared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(8, 16)

        def forward(self, x, keys, values):
            keys = torch.cat([keys, x.unflatten(-1, (2, 4)).transpose(1, 2)], 2)
            query = self.q(x)[..., :8].unflatten(-1, (2, 4)).transpose(1, 2)
            out = torch.nn.functional.scaled_dot_product_attention(query, keys.square(), values)
            return out, keys

    clear_runtime()
    model = torch.compile(Squared().eval(), backend="loki")
    keys = torch.randn(1, 2, 1500, 4)
    for _ in range(3):
        model(torch.randn(1, 1, 8), keys, torch.randn(1, 2, 1501, 4))
    (said,) = [line for line in notices(caplog) if "became sparse" in line]
    assert "loki_compile.reports()" in said and reports()[-1].count("dense") == 1


@torch.no_grad()
def test_a_model_without_attention_is_said_once(interpreted, caplog):
    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.mix(x).relu()

    clear_runtime()
    model = Mixer().eval()
    model.compile(backend="loki")
    model(torch.ones(2, 4))
    assert not notices(caplog)
    for _ in range(3):
        assert torch.equal(model(torch.ones(2, 4)), model.forward(torch.ones(2, 4)))
    (said,) = notices(caplog)
    assert "nothing is sparse" in said and "docs/coverage.md" in said


@torch.no_grad()
def test_pieces_of_a_model_without_attention_are_not_remarked_on(interpreted, caplog):
    model = make_model(2)
    inner = model.model.forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return inner(*args, **kwargs)

    model.model.forward = broken
    model.compile(backend="loki")
    cache = started(model, "static", prompt(1))
    for step in range(4):
        model(torch.full((1, 1), step + 2), past_key_values=cache)
    assert stats()["sparse_steps"] == 4
    assert not [line for line in notices(caplog) if "nothing is sparse" in line]


@pytest.mark.parametrize("layers", ["nowhere.*", (7,)])
@torch.no_grad()
def test_layers_that_are_none_of_a_models_are_said_once(layers, interpreted, caplog):
    """Also where they are all that was asked for, so that nothing became sparse."""
    model = make_model(2)
    model.compile(backend="loki", options={"layers": layers})
    cache = started(model, "static", prompt(1))
    for step in range(3):
        model(torch.full((1, 1), step + 2), past_key_values=cache)
    (said,) = [line for line in notices(caplog) if "layers names" in line]
    assert "none of the 2 attention sites" in said and stats()["sparse_steps"] == 0


def test_a_notice_is_given_once_and_can_be_silenced(caplog):
    clear_runtime()
    for _ in range(3):
        say_once("key", "the sentence")
    assert notices(caplog) == ["loki_compile: the sentence"]
