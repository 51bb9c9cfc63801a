"""What prompts ask, seen in compiled prefills, is what an automatic basis is fitted for."""

from __future__ import annotations

import copy

import pytest
import torch
from loki_compile.kernels.moments import MOMENT_ROWS
from loki_compile.pca_store.covariance import KeyCovariance
from torch import nn
from toy_models import LONG, make_model, new_cache, prompt
from toy_options import MODES

from loki_compile import reports, stats
from loki_compile.indexes import indexes_of

CACHES = pytest.mark.parametrize("kind", ["static", "growing"])
PAIRS = [(d, d + 8) for d in range(8)]
ASKED = "from the prompt's queries and the keys, over rotations"
RANK = 8  # of 16, the default
ALONE = "from the keys alone, over rotations"


def positions(model, ids, mask):
    where = mask.cumsum(1) - 1 if mask is not None else torch.arange(ids.shape[1])[None]
    return where.clamp(min=0).expand(len(ids), -1)


def read(model, cache, ids, mask=None, filled=0):
    """A call of the model, padding on the left; logits of the last token."""
    where = positions(model, ids, mask)[:, filled:]
    given = {"attention_mask": mask} if mask is not None else {}
    more = {"position_ids": where, "past_key_values": cache, "logits_to_keep": 1}
    return model(ids[:, filled:], **more, **given).logits[:, -1]


def decode(model, cache, steps, start, mask=None):
    for at in range(start, start + steps):
        ids = prompt(at, 1, 1 if mask is None else len(mask))
        more = {}
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            more = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        model(ids, past_key_values=cache, **more)


def queries_of(model, ids, mask=None):
    """Of the first layer, (B, Hq, T, D), by a run of the model as it is."""
    seen = []
    attend = nn.functional.scaled_dot_product_attention

    def look(query, *args, **kwargs):
        seen.append(query)
        return attend(query, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "scaled_dot_product_attention", look)
        read(make_model(dtype=model.dtype), new_cache(model, "growing"), ids, mask)
    return seen[0]


def expected(keys, queries, real=None):
    """The products of query and key basis that the moments of some rows lead to, (Hkv, D, D)."""
    rows = torch.arange(1, MOMENT_ROWS + 1) * queries.shape[2]
    rows = (rows + MOMENT_ROWS - 1) // MOMENT_ROWS - 1
    moments = KeyCovariance(2, 16)
    moments.update(keys, None, None if real is None else real[None])
    kept = rows if real is None else rows[real[rows]]
    picked = queries[0, :, kept].double().unflatten(0, (2, -1)).flatten(1, 2)
    moments.add_query_moment(picked.mT @ picked, picked.shape[1])
    query, key = moments.over_rotations(PAIRS).score_optimal().truncate(RANK)
    return query @ key.mT


def close(index, row, product):
    basis = index.basis
    found = (basis.query @ basis.key.mT).float()
    torch.testing.assert_close(found[row] if found.ndim == 4 else found, product, rtol=0, atol=0.02)


def fitted_from():
    """What the reports say of the automatic bases that were used."""
    return {s.basis for r in reports() for s in r.sites if s.outcome == "sparse"}


@CACHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@MODES
def test_a_basis_is_fitted_for_what_the_prompt_asks(kind, dtype, mode, interpreted):
    model, ids = make_model(dtype=dtype), prompt(1)
    queries = queries_of(model, ids)
    model.compile(backend="loki")
    with mode():
        cache = new_cache(model, kind)
        read(model, cache, ids)
        decode(model, cache, 2, LONG)
    assert stats()["sparse_steps"] == 2 and stats()["fitted_bases"] == 1
    assert fitted_from() == {f"auto (fitted to each sequence, {ASKED})"}
    (layer,) = cache.layers
    (index,) = indexes_of(layer.keys)
    close(index, 0, expected(layer.keys[:, :, :LONG], queries))


@CACHES
def test_rows_of_padding_do_not_count(kind, interpreted):
    """Each sequence of a batch has the basis of its own tokens, however they are padded."""
    model, ids = make_model(), prompt(1, rows=2)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, :700] = 0
    queries = queries_of(model, ids, mask)
    model.compile(backend="loki", options={"min_context": 300})
    with torch.no_grad():
        cache = new_cache(model, kind)
        read(model, cache, ids, mask)
        decode(model, cache, 1, LONG, mask)
    assert fitted_from() == {f"auto (fitted to each sequence, {ASKED})"}
    (layer,) = cache.layers
    (index,) = indexes_of(layer.keys)
    for row in range(2):
        own = slice(row, row + 1)
        product = expected(layer.keys[own, :, :LONG], queries[own], mask[row].bool())
        close(index, row, product)


@CACHES
@MODES
def test_it_outlives_dense_steps_and_chunks(kind, mode, interpreted):
    """A prompt below `min_context` in two chunks: decoding is dense at first."""
    model, ids = make_model(), prompt(1, 1010)
    model.compile(backend="loki")
    with mode():
        cache = new_cache(model, kind)
        read(model, cache, ids[:, :700])
        read(model, cache, ids, filled=700)
        decode(model, cache, 18, 1010)
    assert stats()["dense_because"].keys() <= {"short"} and stats()["sparse_steps"] > 3
    none = "auto (fitted to each sequence)"  # of a graph that was dense throughout
    assert fitted_from() - {none} == {f"auto (fitted to each sequence, {ASKED})"}


@CACHES
def test_a_prompt_that_was_read_eagerly_is_fitted_from_its_keys(kind, interpreted):
    model, ids = make_model(), prompt(1)
    cache = new_cache(model, kind)
    with torch.no_grad():
        read(model, cache, ids)
        model.compile(backend="loki")
        decode(model, cache, 2, LONG)
    assert fitted_from() == {f"auto (fitted to each sequence, {ALONE})"}
    (layer,) = cache.layers
    (index,) = indexes_of(layer.keys)
    moments = KeyCovariance(2, 16)
    moments.update(layer.keys[:, :, :LONG])
    key = moments.over_rotations(PAIRS).pca().truncate(RANK)[1]
    close(index, 0, key @ key.mT)


@CACHES
def test_another_prompt_in_its_place_does_not_inherit_what_was_asked(kind, interpreted):
    """The cache is written by hand behind a compiled prefill."""
    model, ids = make_model(), prompt(1)
    model.compile(backend="loki")
    with torch.no_grad():
        cache = new_cache(model, kind)
        read(model, cache, ids)
        cache.layers[0].keys.copy_(torch.randn_like(cache.layers[0].keys))
        decode(model, cache, 2, LONG)
    assert fitted_from() == {f"auto (fitted to each sequence, {ALONE})"}


def test_conversations_in_turn_have_what_each_of_them_asked(interpreted):
    model = make_model()
    prompts = [prompt(seed, LONG + seed) for seed in (1, 2, 3)]
    queries = [queries_of(model, ids) for ids in prompts]
    model.compile(backend="loki")
    with torch.no_grad():
        caches = [new_cache(model, "growing") for _ in prompts]
        for cache, ids in zip(caches, prompts, strict=True):
            read(model, cache, ids)
        for cache in caches:
            decode(model, cache, 1, LONG)
    assert stats()["fitted_bases"] == 3
    for cache, ids, asked in zip(caches, prompts, queries, strict=True):
        (layer,) = cache.layers
        (index,) = indexes_of(layer.keys)
        close(index, 0, expected(layer.keys[:, :, : ids.shape[1]], asked))


def test_a_copied_cache_is_fitted_from_its_keys(interpreted):
    """A prompt that was read once and serves several answers is not known by its copies."""
    model, ids = make_model(), prompt(1)
    model.compile(backend="loki")
    with torch.no_grad():
        cache = new_cache(model, "growing")
        read(model, cache, ids)
        decode(model, copy.deepcopy(cache), 1, LONG)
    assert fitted_from() == {f"auto (fitted to each sequence, {ALONE})"}


@pytest.mark.parametrize("options", [{"policy": "oracle"}, {"policy": "quest"}], ids=str)
def test_nothing_is_asked_where_no_basis_will_be_fitted(options, interpreted, compiled_at_once):
    model, ids = make_model(), prompt(1)
    model.compile(backend="loki", options=options)
    with torch.no_grad():
        read(model, new_cache(model, "growing"), ids)
    (gm,) = interpreted.graphs
    assert not [node for node in gm.graph.nodes if "query_moment" in str(node.target)]


@CACHES
def test_the_prefill_is_inductors_bit_for_bit_and_no_graph_is_added(kind, compiled_at_once):
    ids = prompt(1, 300)
    runs = []
    for backend, options in (("inductor", None), ("loki", {"pack_gqa": False})):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = make_model(2)
        model.compile(backend=backend, options=options)
        with torch.no_grad():
            cache = new_cache(model, kind, 512)
            logits = read(model, cache, ids)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        runs.append((logits, *(layer.keys for layer in cache.layers), graphs))
    for theirs, ours in zip(*runs, strict=True):
        assert theirs == ours if isinstance(theirs, int) else torch.equal(theirs, ours)


def test_a_prompt_of_another_length_compiles_no_more_than_inductor_does(
    interpreted, compiled_at_once
):
    model = make_model()
    model.compile(backend="loki")
    with torch.no_grad():
        for length in (LONG, LONG + 5, LONG + 11, LONG - 30):
            read(model, new_cache(model, "growing"), prompt(2, length))
    assert len(interpreted.graphs) == 2  # one length, then any
