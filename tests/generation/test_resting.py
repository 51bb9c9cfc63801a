"""Steps that rest are dense and write no index; what is ranked behind them mirrors the cache."""

import math

import pytest
import torch
from toy_loops import Loop, far_from_dense, true_indexes
from toy_models import LONG, make_model, prompt

import loki_compile
from loki_compile import stats
from loki_compile.buffers import Growing
from loki_compile.exact_steps import exact, resting
from loki_compile.generation.caches import rewind
from loki_compile.generation.pace import Pace
from loki_compile.indexes import indexes_of

OPTIONS = {"top_k": 0.5, "min_context": 0}
DEEP = 2  # layers of the model, all of which have an index


def new_tokens(count: int):
    return prompt(3, count).split(1, 1)


class Resting(Loop):
    """A loop of one row, whose cache can be set back."""

    def rest(self, new):
        with resting():
            return self.step(new)

    def back(self, tokens: int) -> None:
        rewind(self.cache, tokens)
        self.ids, self.mask = self.ids[:, :-tokens], self.mask[:, :-tokens]


@pytest.mark.parametrize("index_dtype", ["int8", "cache"])
@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_rows_that_came_while_resting_are_projected_and_no_others(
    kind, index_dtype, interpreted, fresh
):
    model = make_model(DEEP)
    model.compile(backend="loki", options={**OPTIONS, "index_dtype": index_dtype})
    loop = Resting(model, kind, 1)
    for n, new in enumerate(new_tokens(12)):
        run = loop.rest if 3 <= n < 9 else loop.step
        run(new)
    ran = stats()
    assert ran["sparse_steps"] == 6
    assert ran["dense_because"] == {"resting": 6}
    assert ran["rebuilds"] == DEEP, "the index was caught up with, not built anew"
    if index_dtype == "int8":
        assert true_indexes(loop.cache, LONG + 12) == DEEP
        return
    for layer in loop.cache.layers:
        (index,) = indexes_of(layer.keys)
        assert index.valid
        rows = layer.keys @ index.basis.key
        torch.testing.assert_close(index.tensors[0], rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taken_off", [1, 3, 6])
@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_a_cache_that_is_set_back_while_resting(kind, taken_off, interpreted, fresh):
    """Rows that were mirrored before are written over by steps that mirror nothing."""
    model = make_model(DEEP)
    model.compile(backend="loki", options=OPTIONS)
    loop = Resting(model, kind, 1)
    new = iter(new_tokens(16))
    for run, times in ((loop.step, 4), (loop.rest, 3)):
        for _ in range(times):
            run(next(new))
    loop.back(taken_off)
    for _ in range(4):
        loop.rest(next(new))
    loop.step(next(new))
    assert true_indexes(loop.cache, LONG + 12 - taken_off) == DEEP


@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_an_edit_while_resting_is_seen(kind, interpreted, fresh):
    model = make_model(DEEP)
    model.compile(backend="loki", options=OPTIONS)
    loop = Resting(model, kind, 1)
    new = iter(new_tokens(9))
    for run, times in ((loop.step, 3), (loop.rest, 3)):
        for _ in range(times):
            run(next(new))
    loop.cache.layers[0].keys[:, :, 5] += 1
    loop.rest(next(new))
    loop.step(next(new))
    assert true_indexes(loop.cache, LONG + 8) == DEEP


@torch.no_grad()
def test_several_tokens_behind_a_rest(interpreted, fresh):
    """Another graph finds the indexes behind, and builds them anew."""
    model = make_model(DEEP)
    model.compile(backend="loki", options=OPTIONS)
    loop = Resting(model, "static", 1)
    for run, times in ((loop.step, 2), (loop.rest, 3)):
        for new in new_tokens(times):
            run(new)
    loop.step(prompt(3, 3))
    assert true_indexes(loop.cache, LONG + 8) == DEEP


@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_a_decoder_rests_where_it_drafts_nothing(kind, monkeypatch, interpreted, fresh):
    # How many references to a past mean that it is held once, as no call of other tests has shown.
    monkeypatch.setattr(Growing, "fewest", math.inf)
    drafts = iter([2, 0, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0])
    monkeypatch.setattr(Pace, "next", lambda self, limit: next(drafts))
    model, uncompiled = make_model(DEEP), make_model(DEEP)
    model.compile(backend="loki", options={**OPTIONS, "top_k": 0.1})
    loop = Loop(model, kind, 1)
    decoder = loki_compile.LosslessDecoder(model, loop.cache)
    newest, made = prompt(3, 1), []
    for _ in range(12):
        made.append(newest)
        newest = decoder.next(newest)
    path = torch.cat(made, 1)
    newest = path[:, :1]
    truth = Loop(uncompiled, kind, 1)
    for n in range(1, path.shape[1]):
        newest = truth.step(newest)[:, -1:].argmax(-1)
        assert newest == path[:, n : n + 1]
    ran = stats()
    # Behind a cycle of drafts the first step is exact: it finds what several tokens have left.
    assert ran["dense_because"] == {"exact": 6, "resting": 6}
    assert ran["sparse_steps"] == 5
    ids = torch.cat((prompt(1), path), 1)
    held = int(loop.cache.get_seq_length())
    mask = torch.ones(1, held, dtype=torch.int64)
    assert far_from_dense(loop.cache, ids[:, :held], mask, uncompiled) < 5e-5


@torch.no_grad()
def test_drafts_and_what_verifies_them_stay_in_the_caches_memory_at_default_options(
    interpreted, fresh
):
    """Steps of one token and of several are graphs of their own, which take one cache in turn."""
    model = make_model(3)  # from three layers on Dynamo holds one past less often than others
    model.compile(backend="loki")
    loop = Resting(model, "growing", 1)
    places = []
    for n in range(12):
        for new in new_tokens(2):
            loop.step(new)
        loop.back(2)
        with exact():
            loop.step(prompt(4, 2 + n % 3))
        loop.back(1)
        places.append([layer.keys.untyped_storage().data_ptr() for layer in loop.cache.layers])
    assert all(place == places[-1] for place in places[-6:])
    ran = stats()
    assert ran["sparse_steps"] == 24 and ran["dense_because"] == {"exact": 12}
