"""The PCA store: bases are right, files are whole or refused, saves are atomic."""

import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loki_compile.pca_store import basis_header, covariance
from loki_compile.pca_store.basis import (
    Basis,
    BasisMismatch,
    BasisSet,
    random_basis,
)
from loki_compile.pca_store.basis_file import decode, encode, header_of
from loki_compile.pca_store.basis_header import BasisFileError, read_header
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.fingerprint import weights_fingerprint
from loki_compile.pca_store.metadata import BasisNotFound, combine_fingerprints
from loki_compile.pca_store.store import (
    HUB_FILE,
    BasisSaveError,
    Store,
    default_root,
    file_name,
)
from tally import cases, count

pytestmark = [pytest.mark.soak, pytest.mark.covers]

SITE_A, SITE_B, SITE_C = (digit * 32 for digit in "abc")

few = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
many = settings(few, max_examples=cases(6).max_examples)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def bad_files_are_counted():
    """For the table of `make soak`: each file that is refused makes one error."""
    real = basis_header.file_error

    def counted(source, problem):
        count("store: bad files refused", not isinstance(problem, BasisFileError))
        return real(source, problem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(basis_header, "file_error", counted)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small lose more to a busy second core than they gain by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def low_rank_keys(seed, *, batch=2, heads=3, tokens=97, dim=15, decay=2.0):
    """Keys (B, Hkv, T, D) fp64 with a common mean and variances that fall by 10^-decay."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64)
    mix = mix * torch.logspace(0, -decay, dim, dtype=torch.float64)
    noise = torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    mean = torch.randn(heads, 1, dim, generator=generator, dtype=torch.float64)
    return noise @ mix.mT + 3 * mean


def moments(keys, queries=None, mask=None):
    sums = KeyCovariance(keys.shape[1], keys.shape[3])
    sums.update(keys, queries, mask)
    return sums


def fitted_set(kind="score-optimal", seed=0, **metadata):
    """Two sites of different dims."""
    bases = []
    for site, heads, dim in ((SITE_A, 2, 5), (SITE_B, 1, 7)):
        keys = low_rank_keys(seed, heads=heads, dim=dim, tokens=31)
        sums = moments(keys, low_rank_keys(seed + 1, heads=2 * heads, dim=dim, tokens=31))
        fit = sums.pca if kind == "pca" else sums.score_optimal
        bases.append(fit(weights=site, layer=f"layers.{len(bases)}.attn"))
    return BasisSet(tuple(bases), **{"model": "org/tiny-1.5", "dtype": "bfloat16", **metadata})


def assert_same(one, other):
    for name in ("kind", "model", "calibration", "dtype", "source", "created", "fingerprint"):
        assert getattr(one, name) == getattr(other, name)
    assert dict(one.rope) == dict(other.rope)
    assert dict(one.versions) == dict(other.versions)
    assert len(one.bases) == len(other.bases)
    for a, b in zip(one.bases, other.bases, strict=True):
        assert (a.kind, a.weights, a.layer, a.tokens) == (b.kind, b.weights, b.layer, b.tokens)
        for name in ("query", "key", "spectrum"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def score_error(basis, rank, query_moment, key_covariance):
    """E (q.k - Aq.Bk)^2 per head, for independent q and centred k with these moments."""
    query, key = (side.double() for side in basis.truncate(rank))
    rest = torch.eye(basis.head_dim, dtype=torch.float64) - query @ key.mT
    product = query_moment @ rest @ key_covariance @ rest.mT
    return product.diagonal(dim1=-2, dim2=-1).sum(-1)


# ---------------------------------------------------------------- moments


class TestKeyCovariance:
    @few
    @given(seeds, st.lists(st.integers(1, 96), max_size=4), st.integers(1, 40))
    def test_streaming_in_pieces_equals_the_whole_batch(self, seed, cuts, chunk):
        keys = low_rank_keys(seed)
        sums = KeyCovariance(3, 15)
        original, covariance.CHUNK_TOKENS = covariance.CHUNK_TOKENS, chunk
        try:
            for piece in torch.tensor_split(keys, sorted(cuts), dim=2):
                sums.update(piece)
        finally:
            covariance.CHUNK_TOKENS = original
        rows = keys.transpose(0, 1).flatten(1, 2)
        expected = torch.stack([torch.cov(head.T) for head in rows])
        torch.testing.assert_close(sums._key_covariance(), expected, rtol=1e-10, atol=1e-10)
        assert sums.tokens == rows.shape[1]

    @few
    @given(seeds, st.integers(0, 97))
    def test_merging_equals_seeing_everything(self, seed, cut):
        keys, queries = low_rank_keys(seed), low_rank_keys(seed + 1, heads=6)
        one = moments(keys[:, :, :cut], queries[:, :, :cut])
        other = moments(keys[:, :, cut:], queries[:, :, cut:])
        untouched = other._scatter.clone()
        one.merge(other)
        whole = moments(keys, queries)
        for name in ("_count", "_mean", "_scatter", "_query_count", "_query_moment"):
            torch.testing.assert_close(getattr(one, name), getattr(whole, name))
        assert torch.equal(other._scatter, untouched)

    def test_a_large_common_mean_costs_no_precision(self):
        keys = low_rank_keys(1)
        near, far = moments(keys), moments(keys + 1e7)
        torch.testing.assert_close(
            far._key_covariance(), near._key_covariance(), rtol=1e-6, atol=1e-8
        )

    @few
    @given(seeds)
    def test_masked_tokens_and_non_finite_rows_leave_no_trace(self, seed):
        keys, queries = low_rank_keys(seed), low_rank_keys(seed + 1, heads=6)[:, :, -20:]
        mask = torch.rand(2, 97, generator=torch.Generator().manual_seed(seed)) < 0.7
        poisoned, asked = keys.clone(), queries.clone()
        poisoned.transpose(1, 2)[~mask] = float("nan")
        asked.transpose(1, 2)[~mask[:, -20:]] = 1e300
        clean = moments(keys, queries, mask)
        for sums in (moments(poisoned, asked, mask), moments(poisoned, asked)):
            for name in ("_count", "_mean", "_scatter", "_query_count", "_query_moment"):
                torch.testing.assert_close(getattr(sums, name), getattr(clean, name))
        assert clean.tokens == int(mask.sum())
        assert clean.queries == 2 * int(mask[:, -20:].sum())

    def test_queries_are_summed_over_the_query_heads_of_their_group(self):
        queries = low_rank_keys(3, heads=6, tokens=13)
        sums = moments(low_rank_keys(2, heads=3, tokens=13), queries)
        rows = torch.stack([queries[:, 2 * h : 2 * h + 2].flatten(0, 2) for h in range(3)])
        torch.testing.assert_close(sums._query_moment, rows.mT @ rows)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_any_float_dtype_and_strides(self, dtype):
        keys = low_rank_keys(4).to(dtype)
        strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(moments(strided)._scatter, moments(keys.double())._scatter)

    @pytest.mark.parametrize(
        ("keys", "queries", "mask"),
        [
            ((2, 2, 9, 15), None, None),
            ((2, 3, 9, 14), None, None),
            ((3, 9, 15), None, None),
            ((2, 3, 9, 15), (2, 4, 9, 15), None),
            ((2, 3, 9, 15), (1, 3, 9, 15), None),
            ((2, 3, 9, 15), (2, 3, 10, 15), None),
            ((2, 3, 9, 15), None, (2, 8)),
        ],
    )
    def test_shapes_that_do_not_fit_are_refused(self, keys, queries, mask):
        sums = KeyCovariance(3, 15)
        with pytest.raises(ValueError, match="needed"):
            sums.update(
                torch.zeros(keys),
                None if queries is None else torch.zeros(queries),
                None if mask is None else torch.ones(mask, dtype=torch.bool),
            )
        assert sums.tokens == 0

    def test_a_mask_that_is_not_bool_is_refused(self):
        with pytest.raises(ValueError, match=r"torch\.bool"):
            KeyCovariance(3, 15).update(torch.zeros(1, 3, 2, 15), mask=torch.ones(1, 2))

    def test_moments_of_other_dims_do_not_merge(self):
        with pytest.raises(ValueError, match="one site only"):
            KeyCovariance(3, 15).merge(KeyCovariance(3, 16))

    @pytest.mark.parametrize("pairs", [(), ((0, 3), (4, 1)), ((0, 1),)], ids=str)
    def test_over_rotations_is_what_quarter_turns_of_each_pair_come_to(self, pairs):
        """Four quarter turns have the mean and the second moment of all rotations."""
        generator = torch.Generator().manual_seed(3)
        keys = torch.randn(1, 2, 30, 5, generator=generator, dtype=torch.float64) + 1.5
        queries = torch.randn(1, 4, 30, 5, generator=generator, dtype=torch.float64) - 0.5
        seen, turned = KeyCovariance(2, 5), KeyCovariance(2, 5)
        seen.update(keys, queries)

        def turn(x, quarters):
            x = x.clone()
            for (a, b), times in zip(pairs, quarters, strict=True):
                for _ in range(times):
                    x[..., a], x[..., b] = -x[..., b].clone(), x[..., a].clone()
            return x

        for quarters in itertools.product(range(4), repeat=len(pairs)):
            turned.update(turn(keys, quarters), turn(queries, quarters))
        times = 4 ** len(pairs)
        for name, value in seen.over_rotations(pairs).state().items():
            whole = 1 if name == "mean" else times
            torch.testing.assert_close(value * whole, turned.state()[name], rtol=0, atol=1e-9)

    def test_queries_may_come_as_their_sum(self):
        seen, summed = KeyCovariance(2, 5), KeyCovariance(2, 5)
        keys, queries = torch.randn(1, 2, 9, 5).double(), torch.randn(1, 4, 9, 5).double()
        seen.update(keys, queries)
        summed.update(keys)
        rows = queries[0].unflatten(0, (2, 2)).flatten(1, 2)
        summed.add_query_moment(rows.mT @ rows, 18)
        for name, value in seen.state().items():
            torch.testing.assert_close(summed.state()[name], value, rtol=0, atol=1e-12)

    def test_nothing_seen_is_an_error(self):
        with pytest.raises(ValueError, match="no keys"):
            KeyCovariance(1, 3).pca()
        with pytest.raises(ValueError, match="no queries"):
            moments(torch.randn(1, 1, 9, 3)).score_optimal()


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.bfloat16),
    ],
    ids=["inference", "default device", "autocast", "default dtype"],
)
def test_the_modes_of_the_caller_do_not_leak_in(mode):
    keys = low_rank_keys(9).float()
    keys.requires_grad_()
    data = encode(fitted_set())

    def everything():
        sums = moments(keys, keys)
        bases = [sums.pca(), sums.score_optimal(), random_basis(2, 8, seed=0)]
        return sums, [*bases, *decode(data, "memory").bases], weights_fingerprint(keys)

    _, expected, fingerprint = everything()
    with mode():
        sums, bases, inside = everything()
        truncated = bases[1].truncate(3)
    assert inside == fingerprint
    for basis, outside in zip(bases, expected, strict=True):
        for name in ("query", "key", "spectrum"):
            assert torch.equal(getattr(basis, name), getattr(outside, name))
            assert not getattr(basis, name).is_inference()
    assert not any(side.is_inference() or side.requires_grad for side in truncated)
    # What was begun inside a mode goes on outside of it.
    sums.update(keys, keys)
    sums.merge(sums)
    assert sums.tokens == 4 * 2 * 97


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------- fits


class TestPca:
    @few
    @given(seeds, st.integers(1, 40))
    def test_orthonormal_and_ordered_however_few_tokens(self, seed, tokens):
        basis = moments(low_rank_keys(seed, tokens=tokens)).pca()
        gram = basis.key.mT @ basis.key
        torch.testing.assert_close(gram, torch.eye(15).expand(3, 15, 15), rtol=0, atol=1e-5)
        assert (basis.spectrum.diff(dim=-1) <= 0).all()
        assert basis.query is basis.key

    @few
    @given(seeds)
    def test_spectrum_is_the_variance_along_each_direction(self, seed):
        keys = low_rank_keys(seed)
        basis = moments(keys).pca()
        along = (keys @ basis.key.double()).transpose(0, 1).flatten(1, 2).var(1)
        torch.testing.assert_close(basis.spectrum.double(), along, rtol=1e-3, atol=1e-5)

    @few
    @given(seeds)
    def test_the_same_keys_in_another_order_give_the_same_basis(self, seed):
        keys = low_rank_keys(seed, decay=1.0)
        order = torch.randperm(97, generator=torch.Generator().manual_seed(seed))
        one, other = moments(keys).pca(), moments(keys[:, :, order]).pca()
        largest = one.key.gather(1, one.key.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()
        # Directions of nearly equal variance may mix; the leading one is apart in this data.
        torch.testing.assert_close(other.spectrum, one.spectrum)
        torch.testing.assert_close(
            (other.key * one.key).sum(1)[:, 0].abs(), torch.ones(3), rtol=0, atol=1e-3
        )

    @pytest.mark.parametrize("scale", [0.0, 1e-44, 1e30, 3e38])
    def test_constant_tiny_and_huge_keys_still_give_a_basis(self, scale):
        keys = torch.randn(1, 2, 50, 8).clamp(-1, 1) * scale
        sums = moments(keys, keys)
        for basis in (sums.pca(), sums.score_optimal()):
            assert 1 <= basis.rank_for("variance:0.9") <= 8
            full = (basis.query @ basis.key.mT - torch.eye(8)).abs().max()
            assert full < 1e-3

    def test_a_head_without_one_finite_key_is_completed(self):
        keys = torch.randn(1, 2, 50, 8)
        keys[:, 1] = float("nan")
        sums = moments(keys, keys)
        for basis in (sums.pca(), sums.score_optimal()):
            assert torch.isfinite(basis.key).all()


def ridged(moment, samples):
    """What the score-optimal fit takes a moment of this many samples for."""
    dim = moment.shape[-1]
    ridge = max(covariance.RIDGE * dim / samples, covariance.RIDGE_FLOOR)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return moment + ridge * mean * torch.eye(dim, dtype=torch.float64)


class TestScoreOptimal:
    @few
    @given(seeds, st.integers(2, 300), st.integers(1, 14))
    def test_is_the_optimum_of_eckart_and_young_and_beats_pca(self, seed, tokens, rank):
        keys = low_rank_keys(seed, tokens=tokens)
        queries = low_rank_keys(seed + 1, heads=6, tokens=tokens, decay=1.0)
        sums = moments(keys, queries)
        query_moment = ridged(sums._query_moment / sums.queries, sums.queries)
        key_covariance = ridged(sums._key_covariance(), sums.tokens)
        singular = torch.linalg.svdvals(
            torch.linalg.cholesky(query_moment).mT @ torch.linalg.cholesky(key_covariance)
        )
        optimum, total = singular[:, rank:].square().sum(-1), singular.square().sum(-1)
        found = score_error(sums.score_optimal(), rank, query_moment, key_covariance)
        assert (found - optimum <= 1e-12 * total).all()
        assert (found < score_error(sums.pca(), rank, query_moment, key_covariance)).all()

    @few
    @given(seeds, st.integers(1, 7))
    def test_beats_pca_on_the_moments_themselves(self, seed, rank):
        keys = low_rank_keys(seed, tokens=500, decay=1.0)
        queries = low_rank_keys(seed + 1, heads=6, tokens=500, decay=1.0)
        sums = moments(keys, queries)
        seen = sums._query_moment / sums._query_count, sums._key_covariance()
        best = score_error(sums.score_optimal(), rank, *seen)
        assert (best < score_error(sums.pca(), rank, *seen)).all()

    def test_beats_pca_on_keys_and_queries_it_has_not_seen(self):
        for seed in range(5):
            keys = low_rank_keys(seed, tokens=1000, decay=1.0)
            queries = low_rank_keys(seed + 100, heads=6, tokens=1000, decay=1.0)
            sums = moments(keys[:, :, :100], queries[:, :, :100])
            rest = moments(keys[:, :, 100:], queries[:, :, 100:])
            unseen = rest._query_moment / rest._query_count, rest._key_covariance()
            for rank in (2, 4, 8):
                best = score_error(sums.score_optimal(), rank, *unseen)
                assert (best < score_error(sums.pca(), rank, *unseen)).all(), (seed, rank)

    @few
    @given(seeds, st.integers(2, 40))
    def test_at_full_rank_every_score_is_exact_whatever_was_seen(self, seed, tokens):
        keys = low_rank_keys(seed, tokens=tokens)
        basis = moments(keys, low_rank_keys(seed + 1, heads=6, tokens=tokens)).score_optimal()
        q, k = torch.randn(3, 8, 15), torch.randn(3, 50, 15)
        scores = (q @ basis.query) @ (k @ basis.key).mT
        torch.testing.assert_close(scores, q @ k.mT, rtol=1e-3, atol=1e-3)

    def test_its_first_columns_do_not_depend_on_how_many_are_kept(self):
        basis = moments(low_rank_keys(5), low_rank_keys(6, heads=6)).score_optimal()
        query, key = basis.truncate(4)
        assert torch.equal(query, basis.query[..., :4])
        assert torch.equal(key, basis.key[..., :4])
        assert query.is_contiguous() and key.is_contiguous()


def recall(basis, rank, queries, keys, top_k):
    """Mean share of the true top_k keys that the approximate scores choose as well."""
    query, key = basis.truncate(rank)
    approximate = (queries @ query) @ (keys @ key).mT
    chosen = torch.zeros_like(approximate).scatter_(-1, approximate.topk(top_k).indices, 1)
    return float(chosen.gather(-1, (queries @ keys.mT).topk(top_k).indices).mean())


@pytest.mark.parametrize("kind", ["pca", "random"])
@settings(few, max_examples=10)
@given(seed=seeds)
def test_recall_rises_with_rank_and_is_whole_at_head_dim(kind, seed):
    keys = low_rank_keys(seed, batch=1, heads=2, tokens=600, dim=32, decay=0.5)
    queries = torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(seed))
    basis = moments(keys).pca() if kind == "pca" else random_basis(2, 32, seed=seed % 2**31)
    rows = (keys - keys.mean(2, keepdim=True))[0].float()
    recalls = [recall(basis, rank, queries, rows, 40) for rank in (2, 4, 8, 16, 32)]
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.999


# ---------------------------------------------------------------- Basis and BasisSet


class TestBasis:
    def test_rank_by_count_fraction_and_variance(self):
        eye = torch.eye(8).expand(2, 8, 8).clone()
        spectrum = torch.tensor([[8.0, 1, 1, 0, 0, 0, 0, 0], [4, 3, 2, 1, 0, 0, 0, 0]])
        basis = Basis(eye, eye, spectrum)
        assert basis.rank_for(3) == 3
        assert basis.rank_for(1) == 1
        assert basis.rank_for(1.0) == 8
        assert basis.rank_for(0.25) == 2
        assert basis.rank_for(0.26) == 3
        assert basis.rank_for(1e-9) == 1
        # Head 0 reaches 0.8 with one dim, head 1 (0.4, 0.7, 0.9) with three: the layer takes three.
        assert basis.rank_for("variance:0.8") == 3
        assert basis.rank_for("variance:0.9") == 3
        assert basis.rank_for("variance:0.91") == 4
        assert basis.rank_for("variance:1.0") == 4

    def test_a_rank_that_nobody_chose_is_half_of_the_dims_or_all_columns_that_there_are(self):
        eye = torch.eye(9).expand(2, 9, 9)
        spectrum = torch.ones(2, 9)
        for columns, rank in ((9, 5), (5, 5), (4, 4), (1, 1)):
            kept = eye[..., :columns].contiguous()
            basis = Basis(kept, kept, spectrum, kind="attention")
            assert basis.rank_for("auto") == rank
        with pytest.raises(ValueError, match="holds 1 of 9 dims"):
            basis.rank_for(0.5)

    def test_a_fraction_is_not_rounded_up_by_float_noise(self):
        basis = random_basis(1, 100, seed=0)
        assert 0.07 * 100 > 7
        assert basis.rank_for(0.07) == 7

    @few
    @given(seeds, st.floats(0.01, 1.0))
    def test_variance_rank_is_the_smallest_that_reaches_the_share(self, seed, share):
        basis = moments(low_rank_keys(seed, decay=3.0)).pca()
        rank = basis.rank_for(f"variance:{share}")
        running = basis.spectrum.double().cumsum(-1) / basis.spectrum.double().sum(-1, True)
        assert (running[:, rank - 1] >= share - 1e-12).all()
        assert rank == 1 or (running[:, rank - 2] < share + 1e-12).any()

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            (0, "found rank 0 for a head_dim of 8"),
            (-1, "1 to 8"),
            (9, "found rank 9 for a head_dim of 8"),
            (0.0, "fraction"),
            (1.5, "fraction"),
            (float("nan"), "fraction"),
            (True, "found rank=True"),
            (None, "found rank=None"),
            ("variance:0", "variance:0.9"),
            ("variance:1.1", "variance:0.9"),
            ("variance:x", "variance:0.9"),
            ("0.9", "variance:0.9"),
            ("spectrum:0.9", "variance:0.9"),
        ],
    )
    def test_ranks_that_cannot_be_are_refused(self, spec, said):
        basis = replace(random_basis(2, 8, seed=0), layer="layers.7.attn")
        with pytest.raises(ValueError, match=said):
            basis.rank_for(spec)

    def test_a_truncated_basis_says_what_it_holds(self):
        whole = random_basis(2, 8, seed=0, layer="layers.7.attn")
        query, key = whole.truncate(3)
        assert query is key
        part = Basis(query, key, whole.spectrum, "random", layer="layers.7.attn")
        assert part.truncate(3)[0].shape == (2, 8, 3)
        with pytest.raises(ValueError, match=r"layers\.7\.attn.*holds 3 of 8 dims"):
            part.rank_for(0.5)
        with pytest.raises(ValueError, match="holds 3 of 8 dims"):
            part.truncate(4)

    @pytest.mark.parametrize(
        "broken",
        [
            {"key": torch.zeros(2, 8, 9), "query": torch.zeros(2, 8, 9)},
            {"key": torch.zeros(8, 8), "query": torch.zeros(8, 8)},
            {"key": torch.zeros(2, 8, 0), "query": torch.zeros(2, 8, 0)},
            {"query": torch.zeros(2, 8, 7)},
            {"query": torch.zeros(2, 8, 8)},
            {"spectrum": torch.zeros(2, 7)},
            {"spectrum": torch.zeros(2, 8, dtype=torch.float64)},
            {"spectrum": torch.full((2, 8), float("nan"))},
            {"spectrum": -torch.ones(2, 8)},
            {"spectrum": torch.arange(16.0).reshape(2, 8)},
            {"kind": "pcb"},
        ],
    )
    def test_what_cannot_be_a_basis_is_refused(self, broken):
        with pytest.raises(ValueError, match="needed"):
            replace(random_basis(2, 8, seed=0), **broken)

    def test_equal_projections_become_one_tensor(self):
        basis = random_basis(2, 8, seed=0)
        assert replace(basis, query=basis.key.clone()).query is basis.key


class TestBasisSet:
    def test_neither_it_nor_its_bases_can_be_changed(self):
        whole = fitted_set()
        with pytest.raises(FrozenInstanceError):
            whole.bases = ()
        with pytest.raises(FrozenInstanceError):
            whole.bases[0].kind = "pca"

    def test_find_by_weights_and_by_use_of_shared_weights(self):
        shared = [random_basis(1, 4, seed=i, weights=SITE_A) for i in range(2)]
        other = random_basis(1, 4, seed=9, weights=SITE_B)
        bases = BasisSet((shared[0], other, shared[1]))
        assert bases.find(SITE_A) is shared[0]
        assert bases.find(SITE_A, occurrence=1) is shared[1]
        assert bases.find(SITE_A, occurrence=5) is shared[1]
        assert bases.find(SITE_B) is other
        assert bases.find(SITE_C) is None

    def test_mismatch_names_site_both_fingerprints_and_the_command(self):
        bases = fitted_set()
        site = {"layer": "layers.1.attn", "num_kv_heads": 1, "head_dim": 7}
        assert bases.match(SITE_B, **site) is bases.bases[1]
        with pytest.raises(BasisMismatch) as caught:
            bases.match(SITE_C, **site)
        for part in ("layers.1.attn", SITE_C, SITE_B, "org/tiny-1.5", "loki calibrate"):
            assert part in str(caught.value)
        with pytest.raises(
            BasisMismatch, match=r"layers\.1\.attn \(2 KV heads x 9 dims.*1 KV heads x 7"
        ):
            bases.match(SITE_B, layer="layers.1.attn", num_kv_heads=2, head_dim=9)
        with pytest.raises(BasisMismatch, match="no such layer"):
            bases.match(SITE_C, layer="layers.5.attn", num_kv_heads=1, head_dim=7)

    @pytest.mark.parametrize(
        "metadata",
        [
            {"calibration": "rotary"},
            {"model": "two\nlines"},
            {"model": "red\x1b[31m"},
            {"source": "x" * 5000},
            {"dtype": None},
            {"rope": {"inf": float("inf")}},
            {"rope": {"object": object()}},
            {"rope": ["list"]},
            {"versions": {"torch": 2}},
            {"created": "yesterday"},
            {"created": "2026-01-01T00:00:00"},
            {"bases": ()},
        ],
    )
    def test_metadata_that_cannot_be_stored_is_refused_at_once(self, metadata):
        with pytest.raises(ValueError, match="found"):
            replace(fitted_set(), **metadata)

    def test_bases_need_fingerprints_and_one_kind(self):
        with pytest.raises(ValueError, match="hex digits"):
            BasisSet((random_basis(1, 4, seed=0),))
        with pytest.raises(ValueError, match="one kind"):
            BasisSet((*fitted_set("pca").bases, *fitted_set("score-optimal").bases))


# ---------------------------------------------------------------- fingerprints


class TestFingerprint:
    def test_is_sha256_of_shape_dtype_and_fp32_bytes(self):
        weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
        said = b"(2, 3) torch.bfloat16 " + np.arange(6, dtype="<f4").tobytes()
        assert weights_fingerprint(weight) == hashlib.sha256(said).hexdigest()[:32]

    def test_of_a_large_weight_4096_elements_count(self):
        """Stored bases are found by it: another sample would lose them all."""
        weight = torch.arange(10_007.0).reshape(10_007, 1)
        taken = np.arange(4096) * 10_007 // 4096
        said = b"(10007, 1) torch.float32 " + taken.astype("<f4").tobytes()
        assert weights_fingerprint(weight) == hashlib.sha256(said).hexdigest()[:32]

    @few
    @given(seeds, st.integers(1, 90), st.integers(1, 90))
    def test_strides_do_not_matter(self, seed, rows, columns):
        weight = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed)).T
        assert weights_fingerprint(weight) == weights_fingerprint(weight.contiguous())

    def test_shape_dtype_and_values_matter(self):
        weight = torch.randn(300, 70)
        changed = weight.clone()
        changed[0, 0] += 1
        variants = [weight, weight.T, weight.double(), weight.reshape(-1), weight[:-1], changed]
        assert len({weights_fingerprint(variant) for variant in variants}) == len(variants)

    def test_the_sample_spans_the_whole_weight(self):
        weight = torch.randn(100, 1001)
        changed = weight.clone()
        changed[50:] += 1
        assert weights_fingerprint(weight[:50]) == weights_fingerprint(changed[:50])
        assert weights_fingerprint(weight) != weights_fingerprint(changed)

    @pytest.mark.parametrize(
        "weight",
        [
            torch.tensor(3.0),
            torch.zeros(0, 3),
            torch.ones(5, dtype=torch.bool),
            torch.ones(5, 5).to(torch.float8_e4m3fn),
            torch.ones(5, 5, dtype=torch.int32),
            torch.ones(5, 5, requires_grad=True),
        ],
    )
    def test_any_weight_has_one(self, weight):
        assert len(weights_fingerprint(weight)) == 32

    def test_meta_weights_have_none(self):
        assert weights_fingerprint(torch.empty(3, device="meta")) == ""

    def test_combining_ignores_order_and_keeps_repetition(self):
        assert combine_fingerprints([SITE_A, SITE_B]) == combine_fingerprints([SITE_B, SITE_A])
        assert combine_fingerprints([SITE_A]) != combine_fingerprints([SITE_A, SITE_A])


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def whole():
    """The bytes of a good file."""
    return encode(fitted_set(rope={"rope_theta": 1e6, "é": [1, None]}, source="plain text"))


def forge(meta=None, tensors=None, *, checksum=None, extra_metadata=None, of=None):
    """A file with a right checksum over whatever it holds, written from the documented format."""
    original = of or encode(fitted_set())
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    record = json.loads(header["__metadata__"]["loki_compile.basis"])
    values = safetensors.torch.load(original)
    text = meta(record) if meta else record
    text = text if isinstance(text, str) else json.dumps(text if text is not None else record)
    if tensors:
        tensors(values)
    digest = hashlib.sha256(text.encode("utf-8", "replace"))
    for name in sorted(values):
        digest.update(name.encode() + values[name].contiguous().view(torch.uint8).numpy().tobytes())
    metadata = {
        "loki_compile.basis": text,
        "loki_compile.sha256": checksum or digest.hexdigest(),
        **(extra_metadata or {}),
    }
    return safetensors.torch.save(values, metadata=metadata)


def with_header(data, change):
    """The file with its raw safetensors header text changed and the length set right."""
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


class TestFileFormat:
    @pytest.mark.parametrize("kind", ["pca", "score-optimal"])
    def test_round_trip(self, tmp_path, kind):
        saved = fitted_set(
            kind,
            calibration="pre-rotary",
            rope={"rope_theta": 5e5, "rope_type": "yarn", "long": [1.0, 2.5], "none": None},
            source="wikitext-103 é",
        )
        path = Store(tmp_path).save(saved)
        loaded = Store(tmp_path).load(path)
        assert_same(saved, loaded)
        assert all((b.query is b.key) == (kind == "pca") for b in loaded.bases)
        assert Store().verify(path).fingerprint == saved.fingerprint

    def test_a_truncated_and_a_shared_basis_round_trip(self):
        whole_basis = random_basis(2, 8, seed=0)
        part = Basis(*whole_basis.truncate(3), whole_basis.spectrum, "random", SITE_A)
        saved = BasisSet((part, replace(part, weights=SITE_B)))
        assert_same(saved, decode(encode(saved), "memory"))

    def test_a_forged_file_that_follows_the_format_loads(self):
        # Without this, every refusal below could be a forgery that is wrong in another way.
        assert_same(decode(forge(), "forged"), decode(encode(fitted_set()), "made"))

    @pytest.mark.parametrize("version", [1, 2])
    def test_files_of_earlier_versions_load(self, version):
        """They know no blocks (1), and nothing that was measured."""
        unknown = ("blocks", "measured") if version == 1 else ("measured",)

        def earlier(record):
            record["format"] = version
            for site in record["sites"]:
                for name in unknown:
                    del site[name]

        found, now = decode(forge(earlier), "old"), fitted_set()
        for old, new in zip(found.bases, now.bases, strict=True):
            assert torch.equal(old.key, new.key) and torch.equal(old.query, new.query)
            assert (old.weights, old.tokens, old.measured) == (new.weights, new.tokens, {})

    def test_what_was_measured_is_kept(self):
        bases = fitted_set()
        measured = {"missed_mass": 0.05, "rank": 16.0}
        known = tuple(dataclasses.replace(basis, measured=measured) for basis in bases.bases)
        found = decode(encode(dataclasses.replace(bases, bases=known)), "here")
        assert [basis.measured for basis in found.bases] == [measured] * len(known)

    @pytest.mark.parametrize("value", [[], {"a": 1}, {"a": "b"}, {"a": True}, {"\n": 1.0}], ids=str)
    def test_what_cannot_have_been_measured_is_refused(self, value):
        def change(record):
            record["sites"][0]["measured"] = value

        with pytest.raises(BasisFileError, match="measured"):
            decode(forge(change), "forged")

    def test_header_alone_says_all_but_tensors(self, tmp_path):
        saved = fitted_set()
        header = read_header(Store(tmp_path).save(saved))
        assert header == header_of(saved)
        assert (header.fingerprint, header.tokens) == (saved.fingerprint, saved.tokens)

    def test_every_flipped_bit_is_refused(self, whole):
        for bit in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BasisFileError):
                decode(bytes(flipped), "flipped")

    @many
    @given(st.data())
    def test_a_spliced_file_is_refused_or_means_the_same(self, whole, data):
        positions = st.integers(0, len(whole))
        start, end = sorted([data.draw(positions), data.draw(positions)])
        middle = data.draw(st.binary(max_size=20) | st.just(whole[start:end][::-1]))
        spliced = whole[:start] + middle + whole[end:]
        try:
            loaded = decode(spliced, "spliced")
        except BasisFileError:
            return
        assert_same(loaded, decode(whole, "whole"))

    def test_a_file_cut_anywhere_is_refused(self, whole, tmp_path):
        start = 8 + int.from_bytes(whole[:8], "little")
        cuts = [*range(24), *range(24, start, 31), start - 1, *range(start, len(whole), 53)]
        path = tmp_path / "cut.safetensors"
        for cut in [*cuts, len(whole) - 1]:
            with pytest.raises(BasisFileError, match=r"cut\.safetensors.*loki calibrate"):
                path.write_bytes(whole[:cut])
                Store(tmp_path).load(path)
            with pytest.raises(BasisFileError):
                read_header(path)

    @pytest.mark.parametrize("tail", [b"\0", b"PK\x03\x04", b"x" * 4096])
    def test_bytes_behind_the_end_are_refused(self, whole, tail):
        with pytest.raises(BasisFileError, match="as the header implies"):
            decode(whole + tail, "longer")

    @many
    @given(st.binary(max_size=200))
    @example(b"")
    @example(b"\xff" * 8)
    @example((2**63).to_bytes(8, "little") + b"{}")
    @example((2).to_bytes(8, "little") + b"{}")
    @example((2).to_bytes(8, "little") + b"[]")
    def test_random_bytes_are_refused(self, junk):
        with pytest.raises(BasisFileError):
            decode(junk, "junk")

    def test_a_header_that_claims_too_much_is_refused_without_reading_it(self, tmp_path):
        path = tmp_path / "claims.safetensors"
        for claimed in (basis_header.MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1):
            with path.open("wb") as file:
                file.write(claimed.to_bytes(8, "little"))
                file.truncate(basis_header.MAX_HEADER_BYTES + 4096)
            with pytest.raises(BasisFileError, match="the header claims"):
                Store(tmp_path).load(path)

    def test_a_file_beyond_the_size_limit_is_refused_without_reading_it(self, tmp_path):
        path = tmp_path / "vast.safetensors"
        with path.open("wb") as file:
            file.truncate(basis_header.MAX_FILE_BYTES + 1)
        with pytest.raises(BasisFileError, match="needed at most"):
            Store(tmp_path).load(path)

    def test_a_deeply_nested_header_is_refused(self, whole):
        for deep in (b"[" * 200_000, b'{"a":' * 200_000):
            with pytest.raises(BasisFileError, match="not JSON"):
                decode(with_header(whole, lambda _, deep=deep: deep), "deep")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda text: text.replace(b'"F32"', b'"I32"', 1), "dtype"),
            (lambda text: text.replace(b'"shape":[2,5,5]', b'"shape":[2,25]', 1), "shape"),
            (lambda text: text.replace(b'"shape":[2,5,5]', b'"shape":[true,50]', 1), "integers"),
            (lambda text: text.replace(b'"shape":[2,5,5]', b'"shape":"25"', 1), "integers"),
            (lambda text: text.replace(b'"shape":[2,5,5]', b'"shape":[-2,-5,5]', 1), "shape"),
            (lambda text: text.replace(b'"key.0"', b'"key.9"', 1), "key"),
            (lambda text: text.replace(b'"key.0"', b'"spectrum.0"', 1), "repeated names"),
            (lambda text: text.replace(b'"data_offsets"', b'"offsets"', 1), "entry"),
            (lambda text: text.replace(b'"__metadata__"', b'"__metadatb__"', 1), "__metadata__"),
            (lambda text: text.replace(b"loki_compile.sha256", b"loki_compile.sha257"), "metadata"),
            (lambda text: text.replace(b'"shape":[2,5,5]', b'"shape":NaN', 1), "NaN"),
            (lambda text: b"\xff" + text, "not JSON"),
            (lambda text: b"[1]", "JSON object"),
        ],
    )
    def test_a_header_that_was_edited_is_refused(self, whole, change, said):
        edited = with_header(whole, change)
        assert edited != whole
        with pytest.raises(BasisFileError, match=said):
            decode(edited, "edited")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda h: h["key.0"].update(h["query.0"]), "[oO]ffset"),
            (lambda h: h["key.0"].update(data_offsets=["a", {}]), "[hH]eader"),
            (lambda h: h["__metadata__"].update({"loki_compile.basis": 7}), "of type int"),
            (lambda h: h["__metadata__"].update({"loki_compile.sha256": 7}), "printable"),
            (lambda h: h.update(__metadata__=[]), "__metadata__"),
            (lambda h: h.update({"key.0": []}), "key.0"),
        ],
    )
    def test_a_header_with_entries_that_cannot_be_is_refused(self, whole, change, said):
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        change(header)
        with pytest.raises(BasisFileError, match=said):
            decode(with_header(whole, lambda _: json.dumps(header).encode()), "edited")

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            (lambda t: t.update(extra=torch.zeros(3)), "'extra'"),
            (lambda t: t.update({"../../key.0": torch.zeros(3)}), "key.0"),
            (lambda t: t.pop("spectrum.1"), "spectrum.1"),
            (lambda t: t.update({"key.0": t["key.0"].half()}), "'F16'"),
            (lambda t: t.update({"key.0": t["key.0"].double()}), "'F64'"),
            (lambda t: t.update({"key.0": t["key.0"][:1].clone()}), "as the metadata says"),
            (lambda t: t.update({"key.0": t["key.0"].flatten()}), "as the metadata says"),
            (lambda t: t["key.0"].fill_(float("nan")), "NaN or infinity"),
            (lambda t: t["query.1"].fill_(float("inf")), "NaN or infinity"),
            (lambda t: t["spectrum.0"].fill_(-1.0), "spectrum"),
        ],
    )
    def test_tensors_that_do_not_belong_are_refused(self, tensors, said):
        with pytest.raises(BasisFileError, match=said):
            decode(forge(tensors=tensors), "forged")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"format": 4}, "format version 4"),
            ({"format": True}, "format version True"),
            ({"format": 1.0}, "format version 1.0"),
            ({"format": None}, "format version None"),
            ({"kind": "pickle"}, "kind"),
            ({"kind": ["pca"]}, "kind"),
            ({"kind": "pca"}, "query.0"),
            ({"model": 5}, "model"),
            ({"model": "a\x00b"}, "printable"),
            ({"model": "\ud800"}, "printable"),
            ({"calibration": "none"}, "calibration"),
            ({"rope": "x"}, "rope"),
            ({"versions": []}, "versions"),
            ({"created": 3}, "created"),
            ({"sites": []}, "number of sites"),
            ({"sites": {}}, "list"),
            ({"sites": [5]}, "site"),
            ({"sites": [{}] * 5000}, "at most"),
            ({"model_fingerprint": SITE_C}, "as its sites imply"),
            ({"unknown": 1}, "needed the fields"),
        ],
    )
    def test_metadata_of_the_wrong_type_or_value_is_refused(self, changes, said):
        with pytest.raises(BasisFileError, match=said):
            decode(forge(meta=lambda record: {**record, **changes}), "forged")

    @pytest.mark.parametrize(
        "site",
        [
            {"weights": "../../etc"},
            {"weights": 7},
            {"layer": "\x1b[2J"},
            {"num_kv_heads": 0},
            {"num_kv_heads": 2.0},
            {"num_kv_heads": 10**9},
            {"head_dim": -5},
            {"head_dim": 2**70},
            {"columns": 6},
            {"columns": True},
            {"tokens": -1},
            {"more": 1},
        ],
    )
    def test_a_site_with_implausible_fields_is_refused(self, site):
        def change(record):
            record["sites"][0] |= site
            return record

        with pytest.raises(BasisFileError, match="found"):
            decode(forge(meta=change), "forged")

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=6,
    )

    @many
    @given(st.data())
    def test_any_json_in_any_field_loads_or_is_refused(self, whole, data):
        def change(record):
            spot = data.draw(st.sampled_from([record, *record["sites"]]))
            spot[data.draw(st.sampled_from(sorted(spot)))] = data.draw(self.json_values)
            return record

        try:
            loaded = decode(forge(meta=change, of=whole), "forged")
        except BasisFileError:
            return
        encode(loaded)

    @pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"format": 1}', "1" * 5000])
    def test_metadata_that_is_no_record_is_refused(self, text):
        with pytest.raises(BasisFileError):
            decode(forge(meta=lambda record: text), "forged")

    def test_a_wrong_checksum_and_a_foreign_metadata_field_are_refused(self):
        with pytest.raises(BasisFileError, match="sha256"):
            decode(forge(checksum="0" * 64), "forged")
        with pytest.raises(BasisFileError, match="__metadata__"):
            decode(forge(extra_metadata={"format": "pt"}), "forged")
        with pytest.raises(BasisFileError, match="__metadata__"):
            decode(safetensors.torch.save({"w": torch.zeros(3)}), "another model's weights")

    def test_verify_refuses_columns_that_are_not_orthonormal(self, tmp_path):
        path = tmp_path / "bent.safetensors"
        bent = forge(tensors=lambda t: t["key.0"].mul_(1.01), of=encode(fitted_set("pca")))
        path.write_bytes(bent)
        Store(tmp_path).load(path)
        with pytest.raises(BasisFileError, match=r"layers\.0\.attn.*orthonormal"):
            Store(tmp_path).verify(path)

    def test_a_pickle_is_refused_and_not_run(self, tmp_path):
        marker = tmp_path / "ran"

        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {marker}",)

        path = tmp_path / "evil.safetensors"
        path.write_bytes(pickle.dumps(Payload()))
        with pytest.raises(BasisFileError):
            Store(tmp_path).load(path)
        torch.save({"key.0": Payload()}, path)
        with pytest.raises(BasisFileError):
            Store(tmp_path).load(path)
        assert not marker.exists()

    def test_what_is_not_a_regular_file_is_refused(self, tmp_path):
        pipe = tmp_path / "pipe.safetensors"
        os.mkfifo(pipe)
        with pytest.raises(BasisFileError, match="regular file"):
            Store(tmp_path).load(pipe)
        with pytest.raises(BasisFileError, match="cannot be read"):
            Store(tmp_path).verify(tmp_path / "absent.safetensors")

    def test_dims_beyond_what_a_reader_accepts_are_not_written(self, monkeypatch):
        monkeypatch.setattr(basis_header, "MAX_HEAD_DIM", 6)
        with pytest.raises(ValueError, match="head_dim 7"):
            encode(fitted_set())
        monkeypatch.setattr(basis_header, "MAX_HEAD_DIM", 7)
        monkeypatch.setattr(basis_header, "MAX_FILE_BYTES", 500)
        with pytest.raises(ValueError, match="needed at most 500"):
            encode(fitted_set())


# ---------------------------------------------------------------- the store


class TestLookup:
    def test_by_path_store_name_and_model_name(self, tmp_path, monkeypatch):
        store = Store(tmp_path / "store")
        old = fitted_set("pca", created="2026-01-01T00:00:00+00:00")
        new = fitted_set("score-optimal", created="2026-01-02T00:00:00+01:00")
        paths = [store.save(new), store.save(old)]
        assert [entry.path for entry in store.list()] == paths
        assert store.load("org/tiny-1.5").kind == "score-optimal"
        assert store.load(store.list()[1].name).kind == "pca"
        assert store.load(str(paths[1])).kind == "pca"
        assert paths[0].parent == store.root
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / HUB_FILE).write_bytes(paths[1].read_bytes())
        assert store.load(folder).kind == "pca"
        monkeypatch.chdir(tmp_path)
        assert store.load("model").kind == "pca"
        monkeypatch.setenv("HOME", str(tmp_path))
        assert store.load(f"~/model/{HUB_FILE}").kind == "pca"

    @pytest.mark.parametrize(
        "name",
        [
            "./absent",
            "~/absent",
            "~nobody-of-this-name/absent",
            "absent.safetensors",
            "/absent/file",
            Path("absent"),
            "absent",
            "not a name",
            "",
            "a\0b",
            "x" * 5000,
            "a/../../b",
        ],
    )
    def test_a_name_that_leads_nowhere_is_one_clear_error(self, tmp_path, name):
        with pytest.raises(BasisNotFound, match=r"no basis.*needed.*loki calibrate"):
            Store(tmp_path).load(name)

    def test_a_store_name_cannot_climb_out_of_the_store(self, tmp_path):
        outside = Store(tmp_path).save(fitted_set())
        store = Store(tmp_path / "store" / "inner")
        store.save(fitted_set("pca"))
        with pytest.raises(BasisNotFound):
            store.load(f"x/../../../{outside.name.removesuffix('.safetensors')}")

    def test_by_weights_the_widest_cover_then_the_newest(self, tmp_path):
        store = Store(tmp_path)

        def stored(created, *sites):
            bases = tuple(random_basis(1, 4, seed=0, weights=site) for site in sites)
            created = f"2026-01-{created:02}T00:00:00+00:00"
            store.save(BasisSet(bases, model=f"m{created}", created=created))
            return created

        stored(1, SITE_A, SITE_B)
        older = stored(2, SITE_A, SITE_B, SITE_C)
        narrow = stored(3, SITE_A)
        assert store.find([SITE_A, SITE_B, SITE_B]).created == older
        assert store.find([SITE_A]).created == narrow
        assert store.find([SITE_C, "d" * 32]).created == older
        assert store.find(["d" * 32]) is None
        assert store.find([]) is None

    def test_finding_reads_no_tensors_but_the_chosen(self, tmp_path, monkeypatch):
        store = Store(tmp_path)
        store.save(fitted_set("pca"))
        chosen = store.save(BasisSet((random_basis(1, 4, seed=0, weights=SITE_C),)))
        read = []
        original = basis_header.read_bytes
        monkeypatch.setattr(
            basis_header,
            "read_bytes",
            lambda path, *, whole: (read.append((path, whole)), original(path, whole=whole))[1],
        )
        store.find([SITE_C])
        assert [path for path, whole in read if whole] == [chosen]

    def test_a_damaged_file_is_passed_over_with_a_warning(self, tmp_path, caplog):
        store = Store(tmp_path)
        good = store.save(fitted_set("pca", created="2026-01-01T00:00:00+00:00"))
        bad = store.save(fitted_set("score-optimal", created="2026-01-02T00:00:00+00:00"))
        data = bytearray(bad.read_bytes())
        data[-1] ^= 1
        bad.write_bytes(data)
        (tmp_path / "junk.safetensors").write_bytes(b"junk")
        with caplog.at_level(logging.WARNING, "loki_compile"):
            found = store.find([SITE_A])
        assert found.kind == "pca"
        assert [entry.path for entry in store.list()] == [bad, good]
        assert "junk.safetensors" in caplog.text and "sha256" in caplog.text
        with pytest.raises(BasisFileError, match="sha256"):
            store.load("org/tiny-1.5")

    def test_an_absent_or_odd_store_is_empty(self, tmp_path):
        (tmp_path / "file").write_text("")
        for root in (tmp_path / "absent", tmp_path / "file"):
            assert Store(root).list() == []
            assert Store(root).find([SITE_A]) is None

    def test_where_the_store_is(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LOKI_HOME", str(tmp_path))
        assert default_root() == Store().root == tmp_path / "bases"
        monkeypatch.delenv("LOKI_HOME")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_root() == tmp_path / "loki_compile" / "bases"
        monkeypatch.setenv("HOME", str(tmp_path))
        for unusable in ("", "relative/path"):
            monkeypatch.setenv("XDG_CACHE_HOME", unusable)
            assert default_root() == tmp_path / ".cache" / "loki_compile" / "bases"

    def test_no_home_is_one_clear_error(self, monkeypatch):
        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("LOKI_HOME", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
        with pytest.raises(ValueError, match="set LOKI_HOME"):
            default_root()


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Calls to the hub, answered by `hub.answer`."""

        class Hub:
            calls = ()
            answer = None
            reachable = True
            from_cache: bool

            def ask(self, url):
                if not self.reachable:
                    raise ConnectionError

            def __call__(self, repo, file, *, revision=None, local_files_only=False):
                self.calls = (*self.calls, (repo, file, revision))
                self.from_cache = local_files_only
                if isinstance(self.answer, Exception):
                    raise self.answer
                return str(self.answer)

        hub = Hub()
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub.ask)
        return hub

    @pytest.mark.parametrize("reachable", [True, False])
    def test_without_a_network_only_the_hub_cache_is_read(self, tmp_path, hub, reachable):
        hub.answer, hub.reachable = Store(tmp_path).save(fitted_set()), reachable
        assert Store(tmp_path / "empty").load("org/name").kind == "score-optimal"
        assert len(hub.calls) == 1 and hub.from_cache is not reachable

    def test_a_hub_id_is_downloaded_at_its_revision(self, tmp_path, hub):
        hub.answer = Store(tmp_path).save(fitted_set())
        empty = Store(tmp_path / "empty")
        assert empty.load("org/name").kind == "score-optimal"
        assert empty.load("org/na.me-1@refs/pr/3").kind == "score-optimal"
        assert hub.calls == (
            ("org/name", HUB_FILE, None),
            ("org/na.me-1", HUB_FILE, "refs/pr/3"),
        )

    def test_the_store_comes_before_the_hub_unless_a_revision_is_named(self, tmp_path, hub):
        store = Store(tmp_path)
        hub.answer = Store(tmp_path / "other").save(fitted_set("pca"))
        store.save(fitted_set("score-optimal"))
        assert store.load("org/tiny-1.5").kind == "score-optimal"
        assert hub.calls == ()
        assert store.load("org/tiny-1.5@main").kind == "pca"

    @pytest.mark.parametrize("path", ["org/file.safetensors", "./name", "~/name", "/org/name"])
    def test_what_is_written_as_a_path_is_not_asked_of_the_hub(self, tmp_path, hub, path):
        with pytest.raises(BasisNotFound, match="no basis file at"):
            Store(tmp_path).load(path)
        assert hub.calls == ()

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
            (hub_errors.EntryNotFoundError, "has no loki_basis.safetensors"),
            (hub_errors.RevisionNotFoundError, "no revision 'v1'"),
            (hub_errors.RepositoryNotFoundError, "private or gated"),
            (hub_errors.GatedRepoError, "private or gated"),
            (ConnectionError, "download failed"),
            (RuntimeError, "download failed"),
        ],
    )
    def test_each_failure_is_one_clear_error(self, tmp_path, hub, error, said):
        hub.answer = error.__new__(error)
        with pytest.raises(BasisNotFound, match=rf"org/name@v1.*{said}.*loki calibrate org/name"):
            Store(tmp_path).load("org/name@v1")

    def test_a_bad_file_from_the_hub_is_refused(self, tmp_path, hub):
        hub.answer = tmp_path / HUB_FILE
        hub.answer.write_bytes(b"<html>not found</html>")
        with pytest.raises(BasisFileError):
            Store(tmp_path).load("org/name")


class TestFileNames:
    @many
    @given(st.text(st.characters(blacklist_categories=["C", "Z"]), max_size=300))
    @example("../../etc/passwd")
    @example("/etc/passwd")
    @example("..")
    @example("C:\\Windows\\system32")
    @example("~root/.ssh/id")
    @example(".loki-1.tmp")
    def test_any_model_name_makes_one_plain_file_name(self, model):
        name = file_name(replace(fitted_set_once(), model=model))
        assert name.isascii() and len(name) < 160
        assert Path(name).name == name and not set(name) & set('/\\:*?"<>|~ \0')
        assert name[0] not in ".-_" and name.endswith(".safetensors")

    def test_kinds_calibrations_and_models_do_not_replace_each_other(self, tmp_path):
        store = Store(tmp_path)
        for kind in ("pca", "score-optimal"):
            for calibration in ("pre-rotary", "post-rotary"):
                store.save(fitted_set(kind, calibration=calibration))
        store.save(BasisSet((random_basis(1, 4, seed=0, weights=SITE_C),), model="org/tiny-1.5"))
        assert len(store.list()) == 5
        store.save(fitted_set("pca", calibration="pre-rotary", seed=7))
        assert len(store.list()) == 5


def fitted_set_once(cached=[]):  # noqa: B006
    if not cached:
        cached.append(fitted_set())
    return cached[0]


# ---------------------------------------------------------------- durability

PROGRAM = """
import sys, time
from loki_compile.pca_store import store as module
from loki_compile.pca_store.basis import BasisSet, random_basis

def basis_set(seed):
    basis = random_basis(2, 64, seed=seed, weights="a" * 32)
    return BasisSet((basis,), model="m", source=f"seed {seed}")

root, argument = sys.argv[1:]
"""


def run(root, argument, body):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + body, str(root), argument],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def seeded_set(seed):
    basis = random_basis(2, 64, seed=seed, weights=SITE_A)
    return BasisSet((basis,), model="m", source=f"seed {seed}")


def assert_is_one_of(loaded, *seeds):
    """Whole: the tensors are those of the seed that the metadata names."""
    seed = int(loaded.source.removeprefix("seed "))
    assert seed in seeds
    assert torch.equal(loaded.bases[0].key, seeded_set(seed).bases[0].key)


class TestDurability:
    @pytest.mark.parametrize("point", ["write", "fsync", "replace", "replaced"])
    def test_a_kill_in_the_middle_leaves_the_old_or_the_new_file(self, tmp_path, point):
        store = Store(tmp_path)
        path = store.save(seeded_set(1))
        body = """
def stop(*_):
    print("here", flush=True)
    time.sleep(60)

if argument == "write":
    # Half of the bytes are on disk when the process dies.
    original_open = module.Path.open
    def open_half(self, mode="r", **rest):
        file = original_open(self, mode, **rest)
        if mode != "xb":
            return file
        class Writer:
            def __enter__(self):
                return self
            def __exit__(self, *error):
                file.close()
            def write(self, data):
                file.write(data[: len(data) // 2])
                file.flush()
                stop()
        return Writer()
    module.Path.open = open_half
elif argument == "fsync":
    module.os.fsync = stop
elif argument == "replace":
    module.os.replace = stop
else:
    module._sync_folder = stop
module.Store(root).save(basis_set(2))
"""
        process = run(tmp_path, point, body)
        try:
            assert process.stdout.readline() == "here\n"
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        assert_is_one_of(store.load(path), 2 if point == "replaced" else 1)
        store.verify(path)
        assert [entry.path for entry in store.list()] == [path]
        left = list(tmp_path.glob(".loki-*.tmp"))
        assert len(left) == (0 if point == "replaced" else 1)
        # A later save clears up, but never what may still be written.
        store.save(seeded_set(3))
        assert list(tmp_path.glob(".loki-*.tmp")) == left
        for file in left:
            os.utime(file, (time.time() - 90_000,) * 2)
        store.save(seeded_set(3))
        assert list(tmp_path.iterdir()) == [path]

    def test_two_processes_save_at_once_until_killed_and_a_reader_sees_whole_files(self, tmp_path):
        body = """
saved = basis_set(int(argument))
store = module.Store(root)
store.save(saved)
print("saving", flush=True)
while True:
    store.save(saved)
"""
        store = Store(tmp_path)
        path = store.save(seeded_set(0))
        writers = [run(tmp_path, str(seed), body) for seed in (1, 2)]
        try:
            assert [writer.stdout.readline() for writer in writers] == ["saving\n"] * 2
            seen, reads = set(), 0
            while len(seen) < 2 or reads < 100:
                loaded = store.load(path)
                assert_is_one_of(loaded, 1, 2)
                seen.add(loaded.source)
                reads += 1
            assert all(writer.poll() is None for writer in writers)
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
                writer.stdout.close()
        assert_is_one_of(store.load(path), 1, 2)
        assert [entry.path for entry in store.list()] == [path]
        assert len(list(tmp_path.iterdir())) <= 3

    def assert_refused(self, store, before, reason):
        """One clear error; what was stored is as it was; nothing partial is left."""
        with pytest.raises(BasisSaveError, match=f"not saved.*{reason}.*LOKI_HOME"):
            store.save(seeded_set(2))
        after = {path: path.read_bytes() for path in store.root.iterdir()}
        assert after == before

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
    def test_a_failing_call_is_one_clear_error(self, tmp_path, monkeypatch, call, code):
        store = Store(tmp_path)
        path = store.save(seeded_set(1))

        def fail(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, fail)
        self.assert_refused(store, {path: path.read_bytes()}, os.strerror(code))

    def test_a_write_that_the_system_cuts_short_leaves_nothing(self, tmp_path):
        store = Store(tmp_path)
        path = store.save(seeded_set(1))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
        try:
            self.assert_refused(store, {path: path.read_bytes()}, os.strerror(errno.EFBIG))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @pytest.fixture
    def small_disk(self, tmp_path):
        """A file system of 64 KiB (needs the right to mount one)."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a file system here")
        yield disk
        subprocess.run(["umount", str(disk)], check=True)

    def test_a_full_disk(self, small_disk):
        store = Store(small_disk)
        path = store.save(seeded_set(1))
        self.assert_refused(store, {path: path.read_bytes()}, os.strerror(errno.ENOSPC))
        assert_is_one_of(store.load(path), 1)

    def test_a_read_only_disk(self, small_disk):
        store = Store(small_disk)
        path = store.save(seeded_set(1))
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        self.assert_refused(store, {path: path.read_bytes()}, os.strerror(errno.EROFS))
        assert_is_one_of(store.load(path), 1)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_folder(self, tmp_path):
        store = Store(tmp_path)
        path = store.save(seeded_set(1))
        tmp_path.chmod(0o555)
        try:
            self.assert_refused(store, {path: path.read_bytes()}, os.strerror(errno.EACCES))
        finally:
            tmp_path.chmod(0o755)

    def test_a_store_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        for root in (tmp_path / "file", tmp_path / "file" / "inside"):
            with pytest.raises(BasisSaveError, match="not saved"):
                Store(root).save(seeded_set(1))
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_link_in_the_store_is_replaced_not_followed(self, tmp_path):
        store = Store(tmp_path / "store")
        path = store.save(seeded_set(1))
        (tmp_path / "precious").write_text("mine")
        path.unlink()
        path.symlink_to(tmp_path / "precious")
        store.save(seeded_set(2))
        assert (tmp_path / "precious").read_text() == "mine"
        assert_is_one_of(store.load(path), 2)

    def test_a_saved_file_has_the_permissions_of_any_new_file(self, tmp_path):
        path = Store(tmp_path / "store").save(seeded_set(1))
        (tmp_path / "plain").write_text("")
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_fingerprint_and_the_basis_of_the_cpu():
    keys = low_rank_keys(8).float()
    assert weights_fingerprint(keys.cuda()) == weights_fingerprint(keys)
    torch.testing.assert_close(
        moments(keys.cuda(), keys.cuda())._scatter, moments(keys, keys)._scatter
    )


class TestOrdered:
    """A pair that was fitted elsewhere, with its columns in order."""

    @few
    @given(seeds, st.integers(1, 15))
    def test_gives_the_scores_of_the_pair_it_was_made_of(self, seed, rank):
        torch.manual_seed(seed)
        sums = moments(torch.randn(2, 3, 200, 15), torch.randn(2, 6, 200, 15))
        query, key = torch.randn(2, 3, 15, rank).unbind()
        basis = sums.ordered(query, key, kind="attention", weights="0" * 16, layer="x")
        assert (basis.kind, basis.weights, basis.layer) == ("attention", "0" * 16, "x")
        found = basis.query[..., :rank] @ basis.key[..., :rank].mT
        torch.testing.assert_close(found, query @ key.mT, rtol=1e-4, atol=1e-4)
        assert (basis.spectrum[:, rank:] == 0).all() and (basis.spectrum[:, :rank] > 0).all()
        assert (basis.spectrum.diff() <= 0).all()

    @few
    @given(seeds, st.integers(1, 7))
    def test_its_first_columns_leave_out_what_its_spectrum_says(self, seed, kept):
        torch.manual_seed(seed)
        sums = moments(torch.randn(2, 3, 200, 15), torch.randn(2, 6, 200, 15))
        query, key = torch.randn(2, 3, 15, 8).unbind()
        basis = sums.ordered(query, key, kind="attention")
        first, last = (x[..., :kept].double() for x in (basis.query, basis.key))
        left = query.double() @ key.double().mT - first @ last.mT
        query_root, _, key_root, _ = sums.score_roots()
        error = (query_root @ left @ key_root).square().sum((-2, -1))
        torch.testing.assert_close(
            error.float(), basis.spectrum[:, kept:].sum(-1), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("missing", [1, 4, 8])
def test_a_header_that_reaches_behind_the_end_is_said_to_claim_too_much(missing):
    text = b"{}" + b" " * 6
    claimed = (len(text) + missing).to_bytes(8, "little")
    with pytest.raises(BasisFileError, match="the header claims"):
        decode(claimed + text, "short")
    with pytest.raises(BasisFileError, match="__metadata__"):
        decode(len(text).to_bytes(8, "little") + text, "whole, without contents")


def test_a_decomposition_that_lapack_gives_up_is_made_of_the_transpose(monkeypatch):
    keys, queries = torch.randn(1, 2, 30, 16), torch.randn(1, 4, 30, 16)
    expected = moments(keys, queries).score_optimal()
    plain, tries = torch.linalg.svd, []

    def gives_up_once(x):
        tries.append(x)
        if len(tries) == 1:
            raise torch.linalg.LinAlgError("failed to converge")
        return plain(x)

    monkeypatch.setattr(torch.linalg, "svd", gives_up_once)
    found = moments(keys, queries).score_optimal()
    assert len(tries) == 2
    scores = [basis.query @ basis.key.mT for basis in (found, expected)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.spectrum, expected.spectrum, rtol=1e-4, atol=1e-6)
