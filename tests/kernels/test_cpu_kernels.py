"""The CPU kernels against the reference in fp64: compiled for this processor, compiled for one
without AVX-512, made of PyTorch ops; and, where tests are slow, compiled for the first processors
with AVX-512 (neither bf16 nor int8 products), for the oldest ones, and for 64-bit ARM, which an
emulator runs (`make aarch64`).

Legend: B batch, Hq query heads, Hkv KV heads, S new tokens, T cached tokens, D dims of q and k, Dv
dims of v, R index dims, K slots.
"""

import functools
import itertools
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loki_compile.kernels import cpu, cpu_build, reference
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.kept import page_bounds
from loki_compile.kernels.masks import mask_bounds
from loki_compile.kernels.ops import KEEP_ALL_Q16
from toy_emulator import PROCESSORS, emulated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN_ISA = {"x86_64": "-march=x86-64-v3", "aarch64": "-march=armv8-a"}
OTHER_ISA = {"avx512": "-march=x86-64-v4", "oldest": "-march=x86-64"}
ARM = {f"aarch64-{name}": features for name, features in PROCESSORS.items()}

#        B, Hq, Hkv, S, T, D, Dv, R, K
SHAPES = [
    (1, 1, 1, 1, 1, 64, 64, 16, 1),
    (2, 3, 1, 2, 7, 80, 48, 20, 9),
    (3, 4, 4, 1, 63, 96, 96, 24, 16),
    (1, 6, 2, 8, 1000, 128, 64, 32, 100),
    (2, 8, 1, 3, 257, 192, 128, 48, 33),
    (1, 8, 2, 1, 4097, 256, 256, 64, 600),
    (1, 20, 2, 2, 333, 72, 40, 5, 333),
]
SHAPE_NAMES = [f"T{shape[4]}-D{shape[5]}-G{shape[1] // shape[2]}" for shape in SHAPES]


def runs(level):
    return level != "avx512" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def library_for(isa):
    """The kernels, compiled for another instruction set than this processor's."""
    flags = tuple(isa if f.startswith("-march") else f for f in cpu_build._FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "_FLAGS", flags)
        return cpu.declare(cpu_build.load())


@pytest.fixture(scope="session")
def plain_library():
    machine = platform.machine()
    if machine not in PLAIN_ISA:
        pytest.skip(f"no plain instruction set is named for {machine}")
    return library_for(PLAIN_ISA[machine])


@pytest.fixture(scope="session")
def other_libraries():
    return functools.cache(library_for)


@pytest.fixture(
    params=[
        "native",
        "plain",
        "torch",
        *(pytest.param(x, marks=pytest.mark.slow) for x in (*OTHER_ISA, *ARM)),
    ]
)
def implementation(request, monkeypatch):
    """loki_compile.kernels.cpu, with the kernels that the parameter names."""
    if request.param == "native":
        assert all(cpu._kernels(only) for only in (None, *cpu_build.CODES))
    if request.param == "plain":
        library = request.getfixturevalue("plain_library")
        monkeypatch.setattr(cpu, "_kernels", lambda _: library)
    if request.param in OTHER_ISA:
        if platform.machine() != "x86_64" or not runs(request.param):
            pytest.skip(f"this processor does not run {OTHER_ISA[request.param]}")
        library = request.getfixturevalue("other_libraries")(OTHER_ISA[request.param])
        monkeypatch.setattr(cpu, "_kernels", lambda _: library)
    if request.param in ARM:
        library = emulated(ARM[request.param])
        monkeypatch.setattr(cpu, "_kernels", lambda _: library)
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_kernels", lambda _: None)
    return cpu


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, or the largest integer: what an op forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---- inputs ------------------------------------------------------------------------------------


def cache(b, heads, t, d, dtype):
    """(B, H, T, D) with the strides of a (B, T, H, D) cache."""
    return torch.randn(b, t, heads, d).to(dtype).transpose(1, 2)


def masks(kind, b, s, t):
    """A mask with a row that sees nothing, unless there is no mask."""
    if kind == "none":
        return None
    position = torch.arange(t)
    if kind == "left-padded":
        visible = (position >= t // 3).expand(b, 1, s, t).clone()
    elif kind == "window":
        newest = t - s + torch.arange(s).view(s, 1)
        visible = (position <= newest) & (position > newest - max(t // 2, 1))
        visible = visible.view(1, 1, s, t).expand(b, 1, s, t).clone()
    elif kind == "static cache":
        return (position < (t + 1) // 2).expand(b, 1, s, t)  # strides 0
    else:
        visible = torch.rand(b, 1, s, t) > 0.4
    visible[0, 0, 0] = False
    if kind in ("additive", "additive half"):
        dtype = torch.float32 if kind == "additive" else torch.float16
        filler = torch.where(torch.rand(b, 1, s, t) < 0.5, -torch.inf, torch.finfo(dtype).min)
        return torch.where(visible, torch.randn(b, 1, s, t), filler).to(dtype)
    return visible


MASKS = ["none", "random", "left-padded", "window", "static cache", "additive", "additive half"]


def select_inputs(shape, dtype, index_dtype, mask_kind="none"):
    b, hq, hkv, s, t, d, _, r, _ = shape
    q = torch.randn(b, s, hq, d).to(dtype).transpose(1, 2)
    basis = torch.randn(hkv, d, r) / d**0.5
    index, index_scale = index_rows(cache(b, hkv, t, d, dtype), basis, index_dtype)
    mask = masks(mask_kind, b, s, t)
    return q, basis, index, index_scale, mask, None if mask is None else mask_bounds(mask)


# ---- select ------------------------------------------------------------------------------------


def settings(k, **changes):
    return {
        "scale": 0.125,
        "top_k": k,
        "keep_q16": KEEP_ALL_Q16,
        "sink": 2,
        "recent": 5,
        "min_keys": 0,
        "per_head": False,
        **changes,
    }


def assert_chosen_as_defined(positions, inputs, options):
    """The reference's choice, up to scores within rounding of the threshold."""
    expected = reference.select(*inputs, **options)
    assert positions.dtype == torch.int32 and positions.shape == expected.shape
    assert positions.is_contiguous()
    kept = positions >= 0
    assert torch.equal(kept, expected >= 0), "not the budget, or -1 before a position"
    assert (positions[~kept] == -1).all()
    pairs = kept[..., 1:]
    assert (positions[..., 1:] > positions[..., :-1])[pairs].all(), "not ascending"
    ranked_by = ("scale", "per_head", "page", "keys", "by_probability")
    score = reference.scores(*inputs[:5], **{n: options[n] for n in ranked_by if n in options})
    slack = rounding(*inputs[:4], options)
    if options.get("by_probability"):
        slack = 2 * slack + 2.0**-18  # of the score and of the sum; their logarithms
    for row in (positions != expected).any(-1).nonzero():
        row = tuple(row.tolist())
        found = set(positions[row].tolist())
        wanted = set(expected[row].tolist())
        gained = score[row][sorted(found - wanted)]
        lost = score[row][sorted(wanted - found)]
        assert (gained >= lost.max() - slack).all(), f"row {row}: {found ^ wanted}"


def rounding(q, basis, index, index_scale, options):
    """A bound on the error of any score. An int8 index meets q in 16 bits, the rest is fp32."""
    packed = q.double().unflatten(1, (index.shape[1], -1)).abs()
    if basis is None:
        packed, rows = packed.nan_to_num(0, 0).flatten(2, 3), index.double().nan_to_num(0, 0).abs()
        if options.get("page", 1) > 1:
            rows = torch.maximum(*rows.chunk(2, -1))
        return 2.0**-20 * options["scale"] * (packed @ rows.transpose(-1, -2)).max()
    low = torch.einsum("bhgsd,hdr->bhgsr", packed, basis.double().abs()) * options["scale"]
    rows = index.double().abs()
    if index_scale is None:
        return 2.0**-20 * torch.einsum("bhgsr,bhtr->bhgst", low, rows).nan_to_num(0, 0).max()
    return 2.0**-16 * (low.amax(-1).max() * (rows * index_scale).sum(-1).max())


@pytest.mark.parametrize("index_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_select_chooses_as_defined(implementation, shape, index_dtype):
    dtype = torch.bfloat16 if index_dtype == torch.int8 else index_dtype
    inputs = select_inputs(shape, dtype, index_dtype)
    some, half = settings(shape[-1], keep_q16=20000, per_head=True), settings(None, keep_q16=30000)
    # Every row reads all, or as above: at a count of exactly `min_keys` the budget holds.
    whole = [{**some, "min_keys": shape[4] + more} for more in (0, 1)]
    for options in (settings(shape[-1]), some, half, *whole):
        assert_chosen_as_defined(implementation.select(*inputs, **options), inputs, options)


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4]], ids=str)
def test_select_sees_what_the_mask_shows(implementation, shape, mask_kind):
    inputs = select_inputs(shape, torch.float32, torch.int8, mask_kind)
    some = settings(shape[-1], keep_q16=30000)
    mixed = {**some, "min_keys": shape[4] // 2, "top_k": None}  # on either side of some rows
    for options in (some, settings(shape[-1], per_head=True), mixed):
        positions = implementation.select(*inputs, **options)
        assert_chosen_as_defined(positions, inputs, options)
        if mask_kind not in ("none", "static cache"):
            assert (positions[0, :, 0] == -1).all()


@pytest.mark.parametrize("index_dtype", [*DTYPES, torch.int8], ids=str)
def test_ties_go_to_the_lower_position(implementation, index_dtype):
    # Small integers: every score is exact in fp32, and most are equal to many others.
    b, hq, hkv, s, t, d, r = 1, 4, 2, 2, 3001, 16, 8
    q = torch.randint(-1, 2, (b, hq, s, d)).float()
    basis = torch.zeros(hkv, d, r)
    basis[:, :r] = torch.eye(r)
    index = torch.randint(-2, 3, (b, hkv, t, r)).to(index_dtype)
    index_scale = torch.ones(b, hkv, t, 1) if index_dtype == torch.int8 else None
    for k, per_head in ((1, False), (17, False), (400, True), (1500, False), (2999, True)):
        options = settings(k, scale=0.5, sink=1, recent=3, per_head=per_head)
        inputs = (q, basis, index, index_scale, None, None)
        found = implementation.select(*inputs, **options)
        assert torch.equal(found, reference.select(*inputs, **options)), (k, per_head)


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_keys_that_are_nearly_all_equal(implementation, distinct):
    t = 70001
    index = (torch.arange(t) % 997 < distinct - 1).float() * (torch.arange(t) % 2 + 1)
    inputs = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), index.view(1, 1, t, 1), None, None, None)
    for k in (1, 60, 69, 70, 71, 140, 5000):
        options = settings(k, sink=0, recent=0)
        found = implementation.select(*inputs, **options)
        assert torch.equal(found, reference.select(*inputs, **options)), k


@pytest.mark.parametrize("order", ["ascending", "descending", "periodic"])
@pytest.mark.parametrize("k", [1, 512, 16384, 99999])
def test_a_long_row_in_any_order(implementation, order, k):
    t = 100001
    score = torch.randn(t)
    if order != "periodic":
        score = score.sort(descending=order == "descending").values
    else:
        score[::98] += 10
    inputs = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), score.view(1, 1, t, 1), None, None, None)
    options = settings(k, scale=1.0)
    found = implementation.select(*inputs, **options)
    assert torch.equal(found, reference.select(*inputs, **options))


def test_a_sample_that_misleads(implementation):
    # The compiled kernels bound the threshold by a sample, drawn as below: here it sees the best
    # keys alone, and the bound is too high for the budget.
    n, size, state = 40007, 1024, 12345
    score = torch.rand(n)
    for i in range(size):
        state = (state * 1664525 + 1013904223) % 2**32
        score[i * (n // size) + state * (n // size) // 2**32] += 10
    inputs = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), score.view(1, 1, n, 1), None, None, None)
    for k in (900, 1024, 1030, 20000):
        options = settings(k, scale=1.0, sink=0, recent=0)
        found = implementation.select(*inputs, **options)
        assert torch.equal(found, reference.select(*inputs, **options)), k


@pytest.mark.parametrize("index_dtype", DTYPES, ids=str)
def test_keys_that_are_not_finite_rank_last_and_spoil_no_others(implementation, index_dtype):
    inputs = list(select_inputs((2, 4, 2, 2, 501, 64, 64, 16, 50), torch.float32, index_dtype))
    index = inputs[2]
    broken = torch.tensor([0, 3, 77, 99, 500])
    index[:, :, broken[:3]] = torch.nan
    index[:, 1, broken[3:], 0] = torch.inf
    options = settings(50, sink=0, recent=0)
    positions = implementation.select(*inputs, **options)
    assert_chosen_as_defined(positions, inputs, options)
    assert not torch.isin(positions, broken[:3]).any()
    every = implementation.select(*inputs, **settings(501))
    assert torch.equal(every, torch.arange(501, dtype=torch.int32).expand_as(every))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, 1e-42, 0.0])
def test_a_query_of_any_size_meets_an_int8_index(implementation, value):
    inputs = list(select_inputs((1, 4, 2, 2, 301, 64, 64, 16, 40), torch.float32, torch.int8))
    inputs[0][0, 1, 0] = value
    inputs[0][0, 2:, 1] = value
    options = settings(40)
    found = implementation.select(*inputs, **options)
    assert (found >= 0).all()
    if value != 1e-42:  # subnormal sums round away most of their bits
        assert_chosen_as_defined(found, inputs, options)


def test_the_tail_behind_the_last_visible_key_is_not_read(implementation):
    shape = (1, 4, 2, 1, 4000, 64, 64, 16, 30)
    q, basis, index, _, _, _ = select_inputs(shape, torch.float32, torch.float32)
    mask = (torch.arange(4000) < 1234).expand(1, 1, 1, 4000)
    inputs = (q, basis, index, None, mask, mask_bounds(mask))
    before = implementation.select(*inputs, **settings(30))
    index[:, :, 1234:] = 1e30
    assert torch.equal(implementation.select(*inputs, **settings(30)), before)


def test_an_index_in_the_layout_of_a_cache(implementation):
    inputs = list(select_inputs(SHAPES[3], torch.bfloat16, torch.int8))
    expected = implementation.select(*inputs, **settings(100))
    inputs[2] = inputs[2].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[3] = inputs[3].transpose(1, 2).contiguous().transpose(1, 2)
    assert inputs[2].stride(2) == 2 * 32
    assert torch.equal(implementation.select(*inputs, **settings(100)), expected)


# ---- the other scorers, and a group that chooses by probability --------------------------------

PAGE = 7
SCORERS = ["low rank", "low rank int8", "exact", "pages"]
SCORED_SHAPES = [
    (1, 1, 1, 1, 1, 64, 64, 16, 1),
    (2, 3, 1, 2, 7, 80, 48, 20, 9),
    (2, 8, 2, 3, 321, 40, 64, 24, 50),
    (1, 14, 2, 1, 1500, 128, 64, 32, 300),
    (1, 12, 1, 2, 530, 33, 40, 5, 70),
]


def bounds_of_pages(keys, page, more=1):
    """(B, Hkv, P, 2 D) from the definition, and `more` pages that no key is in: NaN."""
    b, hkv, t, d = keys.shape
    pages = torch.full((b, hkv, -(-t // page) + more, 2 * d), torch.nan, dtype=keys.dtype)
    reference.update_pages(pages, keys, torch.ones(1, 1, 1, 1, dtype=torch.bool), page=page)
    return pages


def scored_inputs(scorer, shape, dtype, mask_kind="none"):
    """Inputs of select for a scorer, and the options that it needs."""
    b, _, hkv, _, t, d, *_ = shape
    index_dtype = torch.int8 if scorer == "low rank int8" else dtype
    q, basis, index, scale, mask, bounds = select_inputs(shape, dtype, index_dtype, mask_kind)
    if scorer.startswith("low rank"):
        return [q, basis, index, scale, mask, bounds], {}
    keys = cache(b, hkv, t, d, dtype)
    if scorer == "exact":
        return [q, None, keys, None, mask, bounds], {}
    return [q, None, bounds_of_pages(keys, PAGE), None, mask, bounds], {"page": PAGE, "keys": t}


GROUP_CHOICES = {
    "maximum": {},
    "probability": {"by_probability": True},
    "heads": {"per_head": True},
}


@pytest.mark.parametrize("choice", GROUP_CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_chooses_as_defined(implementation, scorer, dtype, choice):
    for shape in SCORED_SHAPES:
        inputs, more = scored_inputs(scorer, shape, dtype)
        k, t = shape[-1], shape[4]
        for budget in (settings(k), settings(None, keep_q16=20000), settings(k, min_keys=t + 1)):
            options = {**budget, **more, **GROUP_CHOICES[choice]}
            assert_chosen_as_defined(implementation.select(*inputs, **options), inputs, options)


@pytest.mark.parametrize("choice", GROUP_CHOICES)
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_sees_what_the_mask_shows(implementation, scorer, mask_kind, choice):
    shape = SCORED_SHAPES[2]
    inputs, more = scored_inputs(scorer, shape, torch.float32, mask_kind)
    for budget in (settings(50, keep_q16=30000), settings(None, keep_q16=9000, min_keys=200)):
        options = {**budget, **more, **GROUP_CHOICES[choice]}
        positions = implementation.select(*inputs, **options)
        assert_chosen_as_defined(positions, inputs, options)
        if mask_kind not in ("none", "static cache"):
            assert (positions[0, :, 0] == -1).all()


@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dtype", DTYPES, ids=str)
def test_queries_meet_keys_of_another_dtype(implementation, q_dtype, key_dtype):
    for scorer in ("exact", "pages"):
        inputs, more = scored_inputs(scorer, SCORED_SHAPES[2], key_dtype)
        inputs[0] = inputs[0].to(q_dtype)
        options = {**settings(50), **more}
        assert_chosen_as_defined(implementation.select(*inputs, **options), inputs, options)


def test_improbable_keys_are_ranked_not_tied(implementation):
    # Probabilities down to e ** -4000, and one head that takes almost all of a group's.
    score = -torch.arange(400.0).flip(0).view(1, 1, 400, 1) * 10
    q = torch.tensor([1.0, 0.5, 0.1]).view(1, 3, 1, 1)
    options = settings(100, scale=1.0, sink=0, recent=0, by_probability=True)
    found = implementation.select(q, None, score, None, None, None, **options)
    assert found.flatten().tolist() == list(range(300, 400))


def test_a_head_weighs_by_its_probabilities_not_by_its_scores(implementation):
    # The first head's scores are all high and nearly equal; the second wants one key.
    keys = torch.zeros(1, 1, 64, 2)
    keys[..., 0] = 50 + torch.arange(64) * 1e-3
    keys[0, 0, 5, 1] = 20
    q = torch.eye(2).view(1, 2, 1, 2)
    options = settings(1, scale=1.0, sink=0, recent=0)
    by_score = implementation.select(q, None, keys, None, None, None, **options)
    options["by_probability"] = True
    by_probability = implementation.select(q, None, keys, None, None, None, **options)
    assert by_score.item() == 63 and by_probability.item() == 5


@pytest.mark.parametrize("by_probability", [False, True])
def test_a_lone_head_ranks_alike_by_scores_and_by_probability(implementation, by_probability):
    inputs, _ = scored_inputs("exact", (2, 2, 2, 2, 333, 24, 24, 8, 40), torch.float32)
    inputs[2][:, :, 7, 0] = torch.inf
    inputs[2][:, :, 9] = torch.nan
    options = settings(40)
    expected = reference.select(*inputs, **options)
    options["by_probability"] = by_probability
    assert torch.equal(reference.select(*inputs, **options), expected)
    assert_chosen_as_defined(implementation.select(*inputs, **options), inputs, options)


@pytest.mark.parametrize("choice", ["maximum", "probability"])
@pytest.mark.parametrize("scorer", ["exact", "pages"])
def test_equal_keys_go_to_the_lower_position(implementation, scorer, choice):
    q = torch.randn(1, 4, 1, 16).expand(1, 4, 2, 16)
    keys = torch.randn(1, 2, 1, 16).expand(1, 2, 301, 16).contiguous()
    options = {**settings(40, sink=0, recent=0), **GROUP_CHOICES[choice]}
    if scorer == "pages":
        keys = bounds_of_pages(keys, PAGE)
        options.update(page=PAGE, keys=301)
    found = implementation.select(q, None, keys, None, None, None, **options)
    assert torch.equal(found, torch.arange(40, dtype=torch.int32).expand_as(found))


@pytest.mark.parametrize("choice", ["maximum", "probability"])
@pytest.mark.parametrize("scorer", ["exact", "pages"])
def test_numbers_that_are_not_finite_rank_as_defined(implementation, scorer, choice):
    keys = torch.randn(1, 2, 301, 16)
    keys[:, :, 20:25] = torch.nan
    keys[:, 0, 50, 3] = torch.inf
    keys[:, 1, 90, 3] = -torch.inf
    q = torch.randn(1, 8, 2, 16)
    q[0, 1] = torch.nan
    options = {**settings(60, sink=0, recent=0), **GROUP_CHOICES[choice]}
    if scorer == "pages":
        keys = bounds_of_pages(keys, PAGE)
        options.update(page=PAGE, keys=301)
    inputs = (q, None, keys, None, None, None)
    assert_chosen_as_defined(implementation.select(*inputs, **options), inputs, options)


# ---- bounds of pages ---------------------------------------------------------------------------


def written_of(kind, b, hkv, t):
    if kind == "all":
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if kind == "none":
        return torch.zeros(b, 1, t, 1, dtype=torch.uint8)
    if kind == "one":
        written = torch.zeros(1, 1, t, 1, dtype=torch.bool)
        written[:, :, t // 2] = True
        return written
    if kind == "strided":
        return (torch.rand(b, hkv, t, 2) < 0.1)[..., :1]
    return (torch.rand(b, 1, t, 1) < 0.05).to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all", "none", "one", "strided", "some"])
@pytest.mark.parametrize("t, page", [(1, 2), (7, 16), (96, 16), (301, 7), (130, 129)])
def test_pages_are_updated_as_defined(implementation, t, page, kind, dtype):
    keys = cache(2, 3, t, 70, dtype)
    keys[0, 1, t // 2, 3] = torch.nan
    keys[0, 2, t // 3] = torch.nan
    keys[1, 0, : t // 2] = torch.nan  # whole pages
    written = written_of(kind, 2, 3, t)
    pages = torch.randn(2, 3, -(-t // page) + 1, 140).to(dtype)
    expected = pages.clone()
    reference.update_pages(expected, keys, written, page=page)
    implementation.update_pages(pages, keys, written, page=page)
    torch.testing.assert_close(pages, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_that_is_nan_bounds_nothing(implementation, dtype):
    """Behind rows that see nothing, padding holds NaN: a page that it shares ranks by the rest."""
    keys = cache(1, 2, 40, 70, dtype)
    without = bounds_of_pages(keys[:, :, 3:32], 32, more=0)
    keys[:, :, :3] = torch.nan
    pages = torch.zeros(1, 2, 2, 140, dtype=dtype)
    every = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    implementation.update_pages(pages, keys, every, page=32)
    assert torch.equal(pages[:, :, :1], without)
    assert torch.equal(page_bounds(keys, 32), pages)
    keys[:, :, 32:] = torch.nan
    implementation.update_pages(pages, keys, every, page=32)
    assert pages[:, :, 1].isnan().all() and torch.equal(pages[:, :, :1], without)
    torch.testing.assert_close(page_bounds(keys, 32), pages, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before, t", [(0, 33), (31, 32), (32, 33), (40, 90)])
def test_pages_grow_with_their_cache(implementation, before, t, dtype):
    keys = cache(2, 3, t, 20, dtype)
    written = (torch.arange(t) >= before).view(1, 1, t, 1)
    old = bounds_of_pages(keys[:, :, :before], 16, more=0)
    grown = implementation.extend_pages(old, keys, written, page=16)
    assert torch.equal(grown, reference.extend_pages(old, keys, written, page=16))
    assert torch.equal(grown, bounds_of_pages(keys, 16, more=0))


# ---- attend ------------------------------------------------------------------------------------


def attend_inputs(shape, dtype, per_head=False):
    b, hq, hkv, s, t, d, dv, _, k = shape
    q = torch.randn(b, s, hq, d).to(dtype).transpose(1, 2)
    heads = hq if per_head else hkv
    positions = torch.rand(b, heads, s, t).topk(min(k, t)).indices.sort().values.int()
    used = torch.randint(1, positions.shape[-1] + 1, (b, heads, s, 1))
    positions[torch.arange(positions.shape[-1]) >= used] = -1
    return q, cache(b, hkv, t, d, dtype), cache(b, hkv, t, dv, dtype), positions


def pytorch_attention(q, k, v, positions, mask, *, scale, softcap=0.0, sink_logits=None):
    """PyTorch's own attention over the chosen keys, in the dtype of q."""
    b, hq, s, _ = q.shape
    hkv, t = k.shape[1:3]
    out = torch.empty(b, hq, s, v.shape[3], dtype=q.dtype)
    for i, h, j in itertools.product(range(b), range(hq), range(s)):
        kv = h // (hq // hkv)
        at = torch.arange(t)
        if positions is not None:
            row = positions[i, h if positions.shape[1] == hq else kv, j]
            at = row[row >= 0].long() if (row >= 0).any() else at
        added = None if mask is None else mask.expand(b, hq, s, t)[i, h, j, at][None]
        if added is not None and added.dtype != torch.bool:
            added = added.to(q.dtype)
        args = (q[i, h, j][None], k[i, kv, at], v[i, kv, at], added, scale)
        if softcap or sink_logits is not None:
            out[i, h, j] = eager_attention(
                *args, softcap, None if sink_logits is None else sink_logits[h]
            )[0]
        else:
            query, keys, values, added, scale = args
            out[i, h, j] = F.scaled_dot_product_attention(
                query[None], keys[None], values[None], added, scale=scale
            )[0, 0]
    return out


def eager_attention(query, keys, values, added, scale, softcap, sink):
    """What models with a softcap or a sink logit compute: matmul, softmax in fp32, matmul."""
    logits = query @ keys.T * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if added is not None:
        logits = logits.masked_fill(~added, -torch.inf)
    if sink is not None:
        logits = torch.cat((logits, sink.to(logits.dtype).view(1, 1)), -1)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[:, : len(keys)] @ values


def assert_attends_as_defined(implementation, inputs, mask, **options):
    q, k, v, positions = inputs
    truth = reference.attend(q.double(), k.double(), v.double(), positions, mask, **options)
    found = implementation.attend(*inputs, mask, **options)
    assert found.dtype == q.dtype and found.is_contiguous() and found.isfinite().all()
    error = (found.double() - truth).abs().max()
    theirs = (pytorch_attention(*inputs, mask, **options).double() - truth).abs().max()
    floor = torch.finfo(q.dtype).eps * truth.abs().max()
    assert error <= 2 * theirs + floor, f"error {error:.2e}, PyTorch's {theirs:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_attend_is_exact_over_the_positions(implementation, shape, dtype):
    inputs = attend_inputs(shape, dtype)
    assert_attends_as_defined(implementation, inputs, None, scale=shape[5] ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 32), (40, 33), (7, 1), (512, 64)], ids=str)
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_keys_in_two_tensors_are_one_key(implementation, dims, heads, dtype):
    """Cached latents are the values as well, and a rotated part lies beside them."""
    shape = (2, heads, 1, 2, 257, sum(dims), dims[0], 16, 100)
    q, keys, _, positions = attend_inputs(shape, dtype)
    k, rest = (x.contiguous() for x in keys.split(dims, -1))
    mask = masks("left-padded", 2, 2, 257)
    options = {"scale": 0.1, "softcap": 0.0}
    truth = reference.attend(q.double(), keys.double(), k.double(), positions, mask, scale=0.1)
    by_parts = reference.attend(
        q.double(), k.double(), k.double(), positions, mask, scale=0.1, k_pe=rest.double()
    )
    torch.testing.assert_close(by_parts, truth, rtol=0, atol=0)
    found = implementation.attend(q, k, k, positions, mask, k_pe=rest, **options)
    error = (found.double() - truth).abs().max()
    theirs = pytorch_attention(q, keys, k, positions, mask, scale=0.1).double()
    theirs = (theirs - truth).abs().nan_to_num().max()
    floor = torch.finfo(dtype).eps * truth.abs().max()
    assert error <= 2 * theirs + floor, f"error {error:.2e}, PyTorch's {theirs:.2e}"


MIXED = [d for d in itertools.product(DTYPES, DTYPES, DTYPES) if len(set(d)) > 1]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(str(x)[6:] for x in d))
def test_queries_keys_and_values_may_each_have_their_dtype(implementation, dtypes):
    """As autocast leaves them. PyTorch's own attention brings all to the dtype of queries."""
    shape = (2, 6, 2, 2, 157, 72, 40, 16, 61)
    q, k, v, positions = attend_inputs(shape, torch.float32)
    q, k, v = (x.to(dtype) for x, dtype in zip((q, k, v), dtypes, strict=True))
    mask = masks("additive", 2, 2, 157)
    mask[0, 0, 0] = 0
    found = implementation.attend(q, k, v, positions, mask, scale=0.1)
    truth = reference.attend(q.double(), k.double(), v.double(), positions, mask, scale=0.1)
    assert found.dtype == q.dtype
    theirs = pytorch_attention(q, k.to(q.dtype), v.to(q.dtype), positions, mask, scale=0.1)
    error, theirs = ((x.double() - truth).abs().max() for x in (found, theirs))
    floor = torch.finfo(q.dtype).eps * truth.abs().max()
    assert error <= 2 * theirs + floor, f"error {error:.2e}, PyTorch's {theirs:.2e}"
    parts = [x.contiguous() for x in k.split((40, 32), -1)]
    for rest in (parts[1], parts[1].to(torch.float16)):
        whole = torch.cat((parts[0].float(), rest.float()), -1)
        expected = implementation.attend(q, whole, v, positions, mask, scale=0.1)
        found = implementation.attend(q, parts[0], v, positions, mask, scale=0.1, k_pe=rest)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=float(2 * theirs + floor))


def test_values_may_be_part_of_the_keys(implementation):
    """One cache row holds latent and rotated part: the values are a slice of it."""
    q, keys, _, positions = attend_inputs((1, 5, 1, 1, 99, 36, 36, 16, 40), torch.float32)
    values = keys[..., 4:]
    found = implementation.attend(q, keys, values, positions, None, scale=0.2)
    expected = implementation.attend(q, keys, values.contiguous(), positions, None, scale=0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_takes_positions_of_each_head(implementation, dtype):
    inputs = attend_inputs(SHAPES[3], dtype, per_head=True)
    assert_attends_as_defined(implementation, inputs, None, scale=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_attend_with_softcap_and_sinks(implementation, dtype, softcap):
    inputs = attend_inputs(SHAPES[4], dtype)
    for sink_logits in (torch.randn(8), torch.full((8,), 30.0, dtype=dtype)):
        assert_attends_as_defined(
            implementation, inputs, None, scale=0.3, softcap=softcap, sink_logits=sink_logits
        )


@pytest.mark.parametrize("mask_kind", ["random", "window", "static cache", "additive"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_attend_adds_the_mask(implementation, shape, mask_kind):
    mask = masks(mask_kind, shape[0], shape[3], shape[4])
    inputs = attend_inputs(shape, torch.float32)
    assert_attends_as_defined(implementation, inputs, mask, scale=0.2)
    mask_of_each_head = mask.repeat(1, shape[1], 1, 1)
    mask_of_each_head[:, ::2] = mask.flip(-1)
    assert_attends_as_defined(implementation, inputs, mask_of_each_head, scale=0.2)


@pytest.mark.parametrize("filler", [False, -torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("t", [5, 1003])
def test_a_row_without_positions_is_what_sdpa_makes_of_it(implementation, t, filler):
    q, k, v, positions = attend_inputs((2, 6, 2, 2, t, 64, 48, 16, 4), torch.float32)
    positions[0, :, 0] = -1
    blind = torch.full((2, 1, 2, t), filler)
    sighted = torch.ones(2, 1, 2, t, dtype=torch.bool)
    mask = torch.where(sighted, True if filler is False else 0.0, blind)
    mask[0, 0, 0] = filler
    found = implementation.attend(q, k, v, positions, mask, scale=0.1)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.1, enable_gqa=True)
    torch.testing.assert_close(found[0, :, 0], expected[0, :, 0])
    if filler == torch.finfo(torch.float32).min:
        mean = v[0].mean(1).repeat_interleave(3, 0)
        torch.testing.assert_close(found[0, :, 0], mean)
    else:
        assert not found[0, :, 0].any()
    assert_attends_as_defined(implementation, (q, k, v, positions), mask, scale=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_attention_over_all_keys_is_exact(implementation, shape, dtype):
    q, k, v, _ = attend_inputs(shape, dtype)
    assert_attends_as_defined(implementation, (q, k, v, None), None, scale=shape[5] ** -0.5)


@pytest.mark.parametrize("mask_kind", MASKS[1:])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_attention_over_all_keys_sees_what_the_mask_shows(implementation, shape, mask_kind):
    mask = masks(mask_kind, shape[0], shape[3], shape[4])
    q, k, v, _ = attend_inputs(shape, torch.float32)
    assert_attends_as_defined(implementation, (q, k, v, None), mask, scale=0.2)
    mask_of_each_head = mask.repeat(1, shape[1], 1, 1)
    mask_of_each_head[:, ::2] = mask.flip(-1)
    assert_attends_as_defined(implementation, (q, k, v, None), mask_of_each_head, scale=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_over_all_keys_with_softcap_and_sinks(implementation, dtype):
    q, k, v, _ = attend_inputs((2, 6, 2, 3, 201, 80, 72, 16, 9), dtype)
    mask = masks("window", 2, 3, 201)
    options = dict(scale=0.3, softcap=5.0, sink_logits=torch.randn(6))
    assert_attends_as_defined(implementation, (q, k, v, None), mask, **options)


# Two ranges, one, none (all keys), all keys, ranges that touch.
RANGES = torch.tensor(
    [[0, 5, 900, 1000], [0, 0, 17, 977], [9, 9, 9, 9], [0, 1000, 1000, 1000], [3, 400, 400, 401]],
    dtype=torch.int32,
)


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_in_ranges_of_keys_is_as_defined(implementation, mask_kind, tokens):
    q, k, v, _ = attend_inputs((2, 10, 5, tokens, 1000, 72, 40, 16, 9), torch.bfloat16)
    mask = masks(mask_kind, 2, tokens, 1000)
    for ranges in (
        RANGES.view(1, 5, 1, 4),
        RANGES[torch.arange(10 * tokens) % 5].view(2, 5, tokens, 4).flip(0, 1),
    ):
        options = dict(scale=0.2, softcap=5.0, sink_logits=torch.randn(10), ranges=ranges)
        truth = reference.attend(q.double(), k.double(), v.double(), None, mask, **options)
        found = implementation.attend(q, k, v, None, mask, **options)
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-2)


def test_heads_may_share_one_run_of_slots_and_have_ranges_of_their_own_there(implementation):
    q, k, v, _ = attend_inputs((2, 10, 1, 1, 1000, 72, 40, 16, 9), torch.float32)
    k, v = (x.expand(-1, 5, -1, -1) for x in (k, v))
    options = dict(scale=0.2, ranges=RANGES.view(1, 5, 1, 4))
    truth = reference.attend(q.double(), k.double(), v.double(), None, None, **options)
    found = implementation.attend(q, k, v, None, None, **options)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_between_ranges_nothing_is_read(implementation, tokens):
    q, k, v, _ = attend_inputs((1, 4, 2, tokens, 4000, 64, 64, 16, 9), torch.float32)
    ranges = torch.tensor([[0, 65, 3900, 4000], [0, 64, 2000, 3999]], dtype=torch.int32)
    ranges = ranges.view(1, 2, 1, 4)
    found = implementation.attend(q, k, v, None, None, scale=0.1, ranges=ranges)
    for x in (k, v):
        x[:, 0, 65:3900] = x[:, 1, 64:2000] = x[:, 1, 3999:] = torch.nan
    after = implementation.attend(q, k, v, None, None, scale=0.1, ranges=ranges)
    assert found.isfinite().all() and torch.equal(found, after)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads_attends_in_ranges_alike(implementation, count):
    q, k, v, _ = attend_inputs((2, 10, 5, 3, 1000, 64, 64, 16, 9), torch.float32)
    options = dict(scale=0.1, ranges=RANGES.view(1, 5, 1, 4))
    expected = implementation.attend(q, k, v, None, None, **options)
    torch.set_num_threads(count)
    found = implementation.attend(q, k, v, None, None, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_attention_over_all_keys_takes_keys_in_two_tensors(implementation):
    q, k, v, _ = attend_inputs((2, 6, 1, 2, 150, 96, 64, 16, 9), torch.float32)
    whole = implementation.attend(q, k, v, None, None, scale=0.3)
    parts = k[..., :64].contiguous(), k[..., 64:].contiguous()
    found = implementation.attend(q, parts[0], v, None, None, scale=0.3, k_pe=parts[1])
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("first, behind", [(0, 40), (1900, 2600), (3990, 4000), (700, 700)])
def test_slots_that_nothing_sees_are_not_read(implementation, tokens, first, behind):
    """A static cache that is mostly empty, shared among threads; a row may see nothing at all."""
    q, k, v, _ = attend_inputs((1, 6, 2, tokens, 4000, 64, 64, 16, 9), torch.float32)
    position = torch.arange(4000)
    mask = ((position >= first) & (position < behind)).expand(1, 1, tokens, 4000)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.1, enable_gqa=True)
    k[:, :, ~mask[0, 0, 0]] = torch.nan
    v[:, :, ~mask[0, 0, 0]] = torch.nan
    for seen in (mask, mask.to(torch.float32).log()):
        found = implementation.attend(q, k, v, None, seen, scale=0.1)
        torch.testing.assert_close(found, expected.nan_to_num(0.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_only_later_tokens_see_may_hold_anything(implementation, groups, dtype):
    """Tokens share the blocks that they are computed in, and none of them another's last keys."""
    tokens, t = 11, 500
    q, k, v, _ = attend_inputs((1, 2 * groups, 2, tokens, t, 80, 72, 16, 9), dtype)
    seen = torch.arange(t) <= torch.arange(t - tokens, t)[:, None]
    stops = torch.arange(t - tokens + 1, t + 1, dtype=torch.int32)
    ranges = torch.stack((0 * stops, 0 * stops + 70, stops - 100, stops), -1)[None, None]
    ways = [({"mask": m[None, None]}, {}) for m in (seen, seen.to(torch.float32).log())]
    for given, options in [*ways, ({"mask": None}, {"ranges": ranges})]:

        def attended(values, given=given, options=options):
            return implementation.attend(q, *values, None, **given, scale=0.1, **options)

        truth = reference.attend(
            q.double(), k.double(), v.double(), None, given["mask"], scale=0.1, **options
        )
        clean = attended((k, v))
        torch.testing.assert_close(
            clean.double(), truth, rtol=0, atol=2e-2 if dtype != torch.float32 else 2e-6
        )
        for at in (1, 4, tokens):
            broken = [x.clone() for x in (k, v)]
            for x in broken:
                x[:, :, t - at] = torch.nan
            found = attended(broken)
            assert torch.equal(found[:, :, :-at], clean[:, :, :-at])
            assert found[:, :, tokens - at :].isnan().all()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads_attends_to_all_keys_alike(implementation, count):
    q, k, v, _ = attend_inputs((2, 6, 2, 3, 3000, 64, 64, 16, 9), torch.float32)
    expected = implementation.attend(q, k, v, None, None, scale=0.1)
    torch.set_num_threads(count)
    found = implementation.attend(q, k, v, None, None, scale=0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_positions_outside_the_cache_add_nothing(implementation):
    q, k, v, positions = attend_inputs((1, 4, 2, 1, 50, 64, 64, 16, 20), torch.float32)
    positions[..., 8:] = -1
    padded = torch.full((1, 2, 1, 40), -1, dtype=torch.int32)
    padded[..., 7:15] = positions[..., :8]
    padded[..., 0], padded[..., 20], padded[..., 39] = 50, 2**31 - 1, -(2**31)
    expected = implementation.attend(q, k, v, positions, None, scale=0.1)
    torch.testing.assert_close(implementation.attend(q, k, v, padded, None, scale=0.1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_not_finite_spoil_no_other_row(implementation, dtype, value):
    q, k, v, positions = attend_inputs((2, 8, 2, 2, 300, 64, 64, 16, 80), dtype)
    clean = implementation.attend(q, k, v, positions, None, scale=0.1)
    broken = int(positions[0, 1, 1, 0])
    k[0, 1, broken] = value
    v[0, 1, broken] = value
    found = implementation.attend(q, k, v, positions, None, scale=0.1)
    reads = (positions[0, 1] == broken).any(-1)
    spoilt = torch.zeros(2, 8, 2, dtype=torch.bool)
    spoilt[0, 4:] = reads
    assert torch.equal(found[~spoilt], clean[~spoilt])
    visible = torch.ones(2, 1, 2, 300, dtype=torch.bool)
    visible[..., broken] = False
    assert implementation.attend(q, k, v, positions, visible, scale=0.1).isfinite().all()


def test_an_infinite_value_without_weight_is_what_sdpa_makes_of_it(implementation):
    q = torch.ones(1, 1, 1, 1)
    positions = torch.arange(2, dtype=torch.int32).view(1, 1, 1, 2)
    for keys in ([-torch.inf, -torch.inf], [-torch.inf, 0.0]):
        for values in ([-torch.inf, 1.0], [2.0, 1.0]):
            k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in (keys, values))
            expected = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            found = implementation.attend(q, k, v, positions, None, scale=1.0)
            assert torch.equal(found.isnan(), expected.isnan()), (keys, values)


@pytest.mark.parametrize("mask_kind", ["none", "additive"])
def test_what_is_left_out_bounds_the_error(implementation, mask_kind):
    shape = (2, 4, 2, 2, 700, 64, 32, 16, 90)
    mask = masks(mask_kind, 2, 2, 700)
    q, k, v, positions = attend_inputs(shape, torch.float32)
    dense = reference.attend(
        q.double(), k.double(), v.double(), torch.full_like(positions, -1), mask, scale=0.2
    )
    found = implementation.attend(q, k, v, positions, mask, scale=0.2).double()
    logits = 0.2 * torch.einsum(
        "bhgsd,bhtd->bhgst", q.double().unflatten(1, (2, 2)), k.double()
    ).flatten(1, 2)
    weights = (logits if mask is None else logits + mask.double()).softmax(-1)
    chosen = torch.zeros(2, 2, 2, 701).scatter_(3, positions.long() % 701, 1)[..., :700]
    mass = (weights * chosen.repeat_interleave(2, 1)).sum(-1)
    mass = torch.where((positions < 0).all(-1).repeat_interleave(2, 1), 1.0, mass)
    spread = (v.amax(2) - v.amin(2)).amax(-1).repeat_interleave(2, 1)[:, :, None]
    sees = torch.ones(2, 1, 2) if mask is None else (mask > -1e30).any(-1)
    off = (found - dense).abs().amax(-1)
    assert ((off <= (1 - mass) * spread + 1e-5) | (sees == 0)).all()


# ---- together ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 8])
def test_any_number_of_threads_gives_the_same(implementation, count):
    shape = (1, 8, 2, 2, 6001, 128, 128, 32, 700)
    inputs = select_inputs(shape, torch.bfloat16, torch.int8)
    k, v = cache(1, 2, 6001, 128, torch.bfloat16), cache(1, 2, 6001, 128, torch.bfloat16)
    expected = implementation.select(*inputs, **settings(700))
    torch.set_num_threads(count)
    positions = implementation.select(*inputs, **settings(700))
    assert torch.equal(positions, expected)
    assert_attends_as_defined(implementation, (inputs[0], k, v, positions), None, scale=0.1)


def test_the_same_call_gives_the_same_bits_however_busy_the_machine_is(implementation):
    """Beside busy processes the kernels work with fewer threads than they were given."""
    shape = (1, 8, 2, 1, 9001, 64, 64, 16, 900)
    q, basis, index, _, _, _ = select_inputs(shape, torch.float32, torch.float32)
    k, v = cache(1, 2, 9001, 64, torch.float32), cache(1, 2, 9001, 64, torch.float32)
    options = settings(900, by_probability=True)
    chosen = implementation.select(q, basis, index, None, None, None, **options)
    read = implementation.attend(q, k, v, chosen, None, scale=0.1)
    whole = implementation.attend(q, k, v, None, None, scale=0.1)
    for _ in range(20):
        again = implementation.select(q, basis, index, None, None, None, **options)
        assert torch.equal(again, chosen)
        assert torch.equal(implementation.attend(q, k, v, chosen, None, scale=0.1), read)
        assert torch.equal(implementation.attend(q, k, v, None, None, scale=0.1), whole)


def test_python_threads_do_not_share_scratch():
    cases = []
    for t in (1500, 3001, 4097, 700):
        shape = (1, 4, 2, 1, t, 64, 64, 16, t // 5)
        inputs = select_inputs(shape, torch.float32, torch.float32)
        k, v = cache(1, 2, t, 64, torch.float32), cache(1, 2, t, 64, torch.float32)
        cases.append((inputs, k, v, settings(t // 5)))

    def run(case):
        inputs, k, v, options = case
        positions = cpu.select(*inputs, **options)
        return positions, cpu.attend(inputs[0], k, v, positions, None, scale=0.1)

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for (positions, out), expected in zip(pool.map(run, cases), alone, strict=True):
                assert torch.equal(positions, expected[0])
                torch.testing.assert_close(out, expected[1])


_IN_LITTLE_MEMORY = """
import resource, torch
from loki_compile.kernels import cpu

def limited(op, *args, **options):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (12 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        return op(*args, **options)
    except MemoryError as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

torch.set_num_threads(1)
b, h, s, t = 32, 32, 8, 40
q, k = torch.randn(b, h, s, 8), torch.randn(b, h, t, 8)
few = torch.arange(3, dtype=torch.int32).expand(b, h, s, 3).contiguous()
expected = cpu.attend(q[:1], k[:1], k[:1], few[:1], None, scale=0.1)
assert limited(cpu.attend, q, k, k, few, None, scale=0.1) is None
again = cpu.attend(q, k, k, few, None, scale=0.1)[:1]
assert torch.equal(again, expected), "not as before, once there is memory"
index, basis = torch.randn(1, 1, 1 << 22, 1), torch.ones(1, 8, 1)
options = dict(
    scale=1.0, top_k=5, keep_q16=65536, sink=0, recent=0, min_keys=0, per_head=False
)
args = (q[:1, :1], basis, index, None, None, None)
assert limited(cpu.select, *args, **options) is None
assert cpu.select(*args, **options).shape == (1, 1, 8, 5)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_scratch_that_cannot_be_had_is_a_memory_error_and_not_the_end_of_the_process():
    assert cpu._kernels(torch.float32) is not None  # built
    code = [sys.executable, "-c", _IN_LITTLE_MEMORY]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    attend, select = done.stdout.splitlines()
    assert attend.startswith("loki::attend: ") and "bytes of scratch memory" in attend
    assert select.startswith("loki::select: ") and "decode fewer rows" in select


# ---- calls that are alike ----------------------------------------------------------------------


@pytest.mark.parametrize("mask_kind", ["none", "random"])
def test_a_call_like_one_before_reads_its_own_tensors(implementation, mask_kind):
    """What is checked and laid out once for a signature holds none of its addresses."""
    shape = SHAPES[1]
    b, _, hkv, _, t, d, dv, *_ = shape
    for _ in range(3):
        inputs = select_inputs(shape, torch.bfloat16, torch.int8, mask_kind)
        positions = cpu.select(*inputs, **settings(9))
        assert_chosen_as_defined(positions, inputs, settings(9))
        if mask_kind == "random":  # bytes mean what bool does
            as_bytes = (*inputs[:4], inputs[4].to(torch.uint8), inputs[5])
            assert torch.equal(cpu.select(*as_bytes, **settings(9)), positions)
        k, v = cache(b, hkv, t, d, torch.bfloat16), cache(b, hkv, t, dv, torch.bfloat16)
        got = cpu.attend(inputs[0], k, v, positions, inputs[4], scale=0.1)
        wide = (x.double() for x in (inputs[0], k, v))
        expected = reference.attend(*wide, positions, inputs[4], scale=0.1)
        torch.testing.assert_close(got.double(), expected, atol=0.02, rtol=0.02)


def test_what_differs_from_a_call_before_is_checked_again():
    assert cpu._kernels(torch.float32) is not None
    inputs = select_inputs(SHAPES[1], torch.float32, torch.int8)
    q, basis, index, scale, *_ = inputs
    cpu.select(*inputs, **settings(9))
    wrong = [
        ((q.double(), *inputs[1:]), {}, "q dtype"),
        ((q, basis.double(), *inputs[2:]), {}, "basis"),
        ((q, basis, index, scale.double(), None, None), {}, "index_scale"),
        ((q, basis, index.mT.contiguous().mT, *inputs[3:]), {}, "strides of index"),
        (inputs, {"keep_q16": 0}, "keep_q16"),
        (inputs, {"sink": -1}, "sink"),
    ]
    for args, changes, said in wrong:
        with pytest.raises(ValueError, match=said):
            cpu.select(*args, **settings(9, **changes))
    more = settings(9, sink=3, recent=4)
    assert_chosen_as_defined(cpu.select(*inputs, **more), inputs, more)


# ---- the build ---------------------------------------------------------------------------------


def test_without_a_compiler_pytorch_ops_serve_and_it_is_said_once(monkeypatch, caplog):
    def none_found():
        raise cpu_build.KernelsUnavailable("no C++ compiler: install g++ or clang++, or set CXX")

    inputs = select_inputs(SHAPES[1], torch.float32, torch.float32)
    expected = cpu.select(*inputs, **settings(9))
    monkeypatch.setattr(cpu_build, "_compiler", none_found)
    cpu._kernels.cache_clear()
    with caplog.at_level(logging.WARNING, "loki_compile"):
        found = [cpu.select(*inputs, **settings(9)) for _ in range(3)]
    cpu._kernels.cache_clear()
    assert all(torch.equal(each, expected) for each in found)
    assert [record.getMessage() for record in caplog.records] == [
        "CPU kernels: no C++ compiler: install g++ or clang++, or set CXX. "
        "PyTorch ops are used instead, slower."
    ]


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho cannot allocate registers >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpu_build, "_compiler", lambda: str(broken))
    monkeypatch.setattr(cpu_build, "_cache_folder", lambda: tmp_path / "cache")
    with pytest.raises(cpu_build.KernelsUnavailable, match="cannot allocate registers"):
        cpu_build.load()
    assert list((tmp_path / "cache").iterdir()) == []


def write_stubs(folder):
    """Sources of so little that they are compiled at once."""
    for name in cpu_build._SOURCES:
        exported = 'extern "C" __attribute__((visibility("default"))) void'
        text = f"{exported} {Path(name).stem}_stub() {{}}\n" if name.endswith("cpp") else ""
        (folder / name).write_text(text)


def test_two_processes_may_build_at_once(tmp_path):
    write_stubs(tmp_path)
    code = (
        "from pathlib import Path; from loki_compile.kernels import cpu_build\n"
        f"cpu_build.FOLDER = Path({str(tmp_path)!r})\n"
        "assert cpu_build.load().cpu_select_stub"
    )
    cache = tmp_path / "cache"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    builds = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [build.wait() for build in builds] == [0, 0]
    assert len(list((cache / "loki_compile").iterdir())) == 1


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch):
    """Stubs, and a compiler that waits for a file named "go" and counts its calls."""
    write_stubs(tmp_path)
    calls, go = tmp_path / "calls", tmp_path / "go"
    slow = tmp_path / "g++"
    wait = f"while [ ! -e {go} ]; do sleep 0.02; done"
    script = f'#!/bin/sh\nif [ "$1" != --version ]; then echo x >> {calls}; {wait}; fi\n'
    slow.write_text(f'{script}exec g++ "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(cpu_build, "FOLDER", tmp_path)
    monkeypatch.setattr(cpu_build, "_compiler", lambda: str(slow))
    monkeypatch.setattr(cpu_build, "_cache_folder", lambda: tmp_path / "cache")
    cpu_build.begin.cache_clear()
    yield calls, go
    cpu_build.begin.cache_clear()


def test_what_was_begun_is_built_once_and_waited_for(slow_compiler, tmp_path):
    calls, go = slow_compiler
    cpu_build.begin()  # returns while the compiler waits
    cpu_build.begin()
    assert not go.exists()
    threading.Timer(0.3, go.touch).start()
    assert cpu_build.load().cpu_pages_stub
    units = sum(name.endswith(".cpp") for name in cpu_build._SOURCES)
    assert len(calls.read_text().splitlines()) == units + 1  # and the link
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cpu_build.begin.cache_clear()
    cpu_build.begin()  # it is there
    assert len(calls.read_text().splitlines()) == units + 1


def test_kernels_for_one_float_type_are_built_and_no_others(slow_compiler, tmp_path):
    calls, go = slow_compiler
    go.touch()
    cpu_build.begin(torch.bfloat16)
    one = cpu_build.load(torch.bfloat16)
    builds = len(calls.read_text().splitlines())
    assert cpu_build.load(torch.bfloat16)._name == one._name
    assert len(calls.read_text().splitlines()) == builds
    assert len({cpu_build.load(x)._name for x in (None, *cpu_build.CODES)}) == 4
    assert len(calls.read_text().splitlines()) == 4 * builds
    assert len(list((tmp_path / "cache").iterdir())) == 4
    # A model of another type, which stays dense, may be what a build is begun for.
    cpu_build.begin(torch.float64)
    assert cpu_build.load(torch.float64)._name == cpu_build.load()._name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_calls_of_one_float_type_take_the_kernels_for_it(dtype, monkeypatch):
    """Those of several, as under autocast, take the ones for any."""
    taken = []
    monkeypatch.setattr(cpu, "_kernels", taken.append)
    other = torch.float32 if dtype != torch.float32 else torch.float16
    for index_dtype in (torch.int8, dtype, other):
        cpu.select(*select_inputs(SHAPES[1], dtype, index_dtype), **settings(9))
    q, k, v = (torch.randn(1, heads, 3, 8).to(dtype) for heads in (4, 2, 2))
    for keys, values in ((k, v), (k.to(other), v), (k, v.to(other))):
        cpu.attend(q, keys, values, None, None, scale=0.1)
    pages = torch.zeros(1, 2, 1, 16).to(dtype)
    cpu.update_pages(pages, k, torch.ones(1, 1, 3, 1, dtype=torch.bool), page=4)
    assert taken == [dtype, dtype, None, dtype, None, None, dtype]


def test_a_process_that_ends_takes_its_compilers_with_it(tmp_path):
    write_stubs(tmp_path)
    slow = tmp_path / "g++"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || exec sleep 1000\n')
    slow.chmod(0o755)
    code = (
        "import time; from pathlib import Path; from loki_compile.kernels import cpu_build\n"
        f"cpu_build.FOLDER = Path({str(tmp_path)!r})\n"
        f"cpu_build._compiler = lambda: {str(slow)!r}\n"
        "cpu_build.begin()\n"
        "while not cpu_build._compilers: time.sleep(0.01)\n"
        "print(*[process.pid for process in cpu_build._compilers])"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for pid in done.stdout.split():
        assert not Path(f"/proc/{pid}/cmdline").exists()
    assert list((tmp_path / "cache" / "loki_compile").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_that_forks_while_it_builds_has_children_that_build_for_themselves(tmp_path):
    """One child ends at once, and leaves the parent's build alone. The other needs the kernels
    while the parent's compilers wait, and has a compiler of its own."""
    write_stubs(tmp_path)
    go, slow = tmp_path / "go", tmp_path / "g++"
    wait = f'[ "$1" = --version ] || while [ ! -e {go} ]; do sleep 0.02; done'
    slow.write_text(f'#!/bin/sh\n{wait}\nexec g++ "$@"\n')
    slow.chmod(0o755)
    cache = tmp_path / "cache" / "loki_compile"
    code = f"""
import os, signal, sys, time
from pathlib import Path
from loki_compile.kernels import cpu_build
def child(run):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        run()
        sys.exit(0)  # with what is to be done at exit
    return os.waitpid(pid, 0)[1]
def ends():
    assert not cpu_build._compilers
def builds():
    cpu_build._compiler = lambda: "g++"
    cpu_build.begin()
    assert cpu_build.load().cpu_pages_stub
cpu_build.FOLDER = Path({str(tmp_path)!r})
cpu_build._compiler = lambda: {str(slow)!r}
cpu_build.begin()
units = sum(name.endswith(".cpp") for name in cpu_build._SOURCES)
while len(cpu_build._compilers) < units: time.sleep(0.01)
before = set(cpu_build._compilers)
for run in (ends, builds):
    status = child(run)
    if status: os._exit(status % 255 or 1)
assert cpu_build._compilers == before and all(each.poll() is None for each in before)
folders = [each for each in Path({str(cache)!r}).iterdir() if each.is_dir()]
assert len(folders) == 1, folders
Path({str(go)!r}).touch()
assert cpu_build.load().cpu_select_stub
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(each.suffix for each in cache.iterdir()) == [".so", ".so"]


def test_a_compiler_that_starts_while_the_process_ends_is_ended_too(tmp_path):
    write_stubs(tmp_path)
    slow = tmp_path / "g++"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || exec sleep 1000\n')
    slow.chmod(0o755)
    code = f"""
import subprocess, threading, time
from pathlib import Path
from loki_compile.kernels import cpu_build
class Late(subprocess.Popen):
    def __init__(self, command, **more):
        if "-c" in command and started.is_set():  # the second unit
            second.set()
            time.sleep(1)
        super().__init__(command, **more)
        if "-c" in command:
            started.set()
            print(self.pid, flush=True)
started, second = threading.Event(), threading.Event()
subprocess.Popen = Late
cpu_build.FOLDER = Path({str(tmp_path)!r})
cpu_build._compiler = lambda: {str(slow)!r}
cpu_build.begin()
second.wait()
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    with (tmp_path / "pids").open("w+") as pids:  # no pipe, which those that are left would hold
        done = subprocess.run(command, env=environment, stdout=pids, timeout=120, check=False)
        pids.seek(0)
        started = pids.read().split()
    left = [pid for pid in started if Path(f"/proc/{pid}/cmdline").exists()]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert done.returncode == 0 and len(started) == 2 and not left
    assert list((tmp_path / "cache" / "loki_compile").iterdir()) == []


def test_compilers_are_ended_where_a_later_one_cannot_be_started(slow_compiler, monkeypatch):
    started = []

    class Last(subprocess.Popen):
        def __init__(self, command, **more):
            if "-c" in command and started:
                raise OSError(12, "Cannot allocate memory")
            super().__init__(command, **more)
            if "-c" in command:
                started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Last)
    with pytest.raises(cpu_build.KernelsUnavailable, match="Cannot allocate memory"):
        cpu_build.load()
    assert [each.returncode for each in started] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    "lines, quoted",
    [
        (
            ["a.cpp: In function f:", "a.cpp:3:5: error: no such name", "   3 | f()"],
            "a.cpp:3:5: error: no such name",
        ),
        (["note: the first", "cc1plus: out of memory"], "cc1plus: out of memory"),
        ([], "exit status 3"),
    ],
)
def test_of_what_a_compiler_says_one_line_is_quoted(lines, quoted, monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    said = "".join(f"echo '{line}' >&2\n" for line in lines)
    broken.write_text(f"#!/bin/sh\n{said}exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpu_build, "_compiler", lambda: str(broken))
    monkeypatch.setattr(cpu_build, "_cache_folder", lambda: tmp_path / "cache")
    with pytest.raises(cpu_build.KernelsUnavailable) as caught:
        cpu_build.load()
    assert str(caught.value) == f"{broken} failed: {quoted}"


def test_a_build_that_fails_in_the_background_is_told_when_it_is_needed(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho cannot allocate registers >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cpu_build, "_compiler", lambda: str(broken))
    monkeypatch.setattr(cpu_build, "_cache_folder", lambda: tmp_path / "cache")
    cpu_build.begin.cache_clear()
    cpu_build.begin()
    cpu_build.begin.cache_clear()
    with pytest.raises(cpu_build.KernelsUnavailable, match="cannot allocate registers"):
        cpu_build.load()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="g++ 11 lacks it there")
def test_a_compiler_without_float16_makes_the_same_kernels(monkeypatch):
    q, k, v = (torch.randn(2, heads, 3, 72).half() for heads in (8, 2, 2))
    options = {"positions": None, "mask": torch.randn(2, 1, 3, 3).half(), "scale": 0.1}
    expected = cpu.attend(q, k, v, **options)
    flags = (*cpu_build._FLAGS, "-U__FLT16_MANT_DIG__")
    monkeypatch.setattr(cpu_build, "_FLAGS", flags)
    library = cpu.declare(cpu_build.load())
    monkeypatch.setattr(cpu, "_kernels", lambda _: library)
    assert torch.equal(cpu.attend(q, k, v, **options), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_process_has_one_openmp():
    assert cpu._kernels(torch.float32) is not None
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([path for path in mapped if "libgomp" in path or "libomp" in path]) == 1
