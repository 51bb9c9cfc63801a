"""The Triton kernels against `reference`, in Triton's interpreter or, where there is one, on a GPU.

Without a GPU the interpreter needs TRITON_INTERPRET=1 before Triton is imported, and would then
rule the whole process. So an ordinary run starts this file again in a process of its own
(`test_this_file_passes_in_the_interpreter`), and skips the tests it runs there.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
here = pytest.mark.skipif(
    not (INTERPRETED or ON_GPU), reason="run by test_this_file_passes_in_the_interpreter"
)
gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU")]

from loki_compile.kernels import (  # noqa: E402
    fused,
    masks,
    ops,
    reference,
    triton_attend,
    triton_pages,
    triton_ranges,
    triton_select,
)
from loki_compile.kernels.checks import hidden_below  # noqa: E402
from loki_compile.kernels.triton_launch import SelectLaunch  # noqa: E402

SEED = 20261121
INDEX_DTYPES = [torch.int8, torch.bfloat16, torch.float16, torch.float32]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# The interpreter takes seconds a case: there each case has one dtype, in turn, and the others with
# `-m slow`.
_SLOW_HERE = [pytest.mark.slow] if INTERPRETED else []


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="runs here already")
def test_this_file_passes_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN or the largest integer: an element never written shows."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------- select


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one `select`; integers throughout, so that every backend's scores are exact."""

    b: int = 1
    hq: int = 4
    hkv: int = 2
    s: int = 1
    t: int = 301
    d: int = 24
    r: int = 12
    index_dtype: torch.dtype = torch.int8
    q_dtype: torch.dtype = torch.float32
    top_k: int | None = 20
    keep_q16: int = ops.KEEP_ALL_Q16
    sink: int = 2
    recent: int = 3
    min_keys: int = 0
    per_head: bool = False

    @property
    def options(self) -> dict:
        return dict(
            scale=0.25, top_k=self.top_k, keep_q16=self.keep_q16, sink=self.sink,
            recent=self.recent, min_keys=self.min_keys, per_head=self.per_head,
        )  # fmt: skip

    def tensors(self, values: int = 3) -> list[torch.Tensor | None]:
        """q, basis, index, index_scale with entries that each digit split represents exactly."""
        top = 127 if self.index_dtype == torch.int8 else 4
        q = torch.randint(-top, top + 1, (self.b, self.hq, self.s, self.d))
        q[..., 0] = top
        basis = torch.eye(self.d, self.r).expand(self.hkv, -1, -1).contiguous()
        shape = (self.b, self.hkv, self.t, self.r)
        index = torch.randint(-values, values + 1, shape).to(self.index_dtype)
        scale = None
        if self.index_dtype == torch.int8:
            scale = torch.randint(1, 3, (*shape[:3], 1)).float()
        return [q.to(self.q_dtype), basis, index, scale]


def small_launch(case: Case, **changes) -> SelectLaunch:
    """A launch that makes many tiles, parts and steps of a small problem."""
    group = 1 if case.per_head else case.hq // case.hkv
    int8 = case.index_dtype == torch.int8
    columns = 16 if torch.version.hip else 8
    heads = min(16, 1 << (group - 1).bit_length())
    pack = max(1, columns // heads) if int8 else 1
    launch = SelectLaunch(
        block_t=32, warps=4, stages=2, programs=4, heads=max(heads, columns // pack), pack=pack,
        block=64, row_warps=4, sample=64, list_all=48,
    )  # fmt: skip
    return dataclasses.replace(launch, **changes)


def select_both(case, tensors, mask=None, launch=None):
    """Positions of the kernels, and of the reference."""
    bounds = None if mask is None else masks.mask_bounds(mask)
    moved = [None if x is None else x.to(DEVICE) for x in (*tensors, mask, bounds)]
    got = triton_select.select(*moved, **case.options, launch=launch or small_launch(case))
    want = reference.select(*tensors, mask, bounds, **case.options)
    return got.cpu(), want


def assert_equal_choice(case, tensors=None, mask=None, launch=None):
    tensors = case.tensors() if tensors is None else tensors
    got, want = select_both(case, tensors, mask, launch)
    assert got.dtype == torch.int32 and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


CHANGES = [
    dict(),
    dict(b=2, s=3, q_dtype=torch.bfloat16),
    dict(per_head=True, s=2),
    dict(hq=3, hkv=1, r=9, q_dtype=torch.float16),
    dict(hq=2, hkv=2, d=40, r=40, top_k=100),
    dict(hq=19, hkv=1, t=130),
    dict(keep_q16=8192, top_k=64),
    dict(keep_q16=8192, top_k=None),
    dict(min_keys=301),
    dict(min_keys=302, per_head=True),
]


@here
@pytest.mark.parametrize(
    ("index_dtype", "changes"),
    [
        pytest.param(
            dtype, changes, marks=_SLOW_HERE * (number % 4 != place), id=f"{dtype}-{changes}"
        )
        for number, changes in enumerate(CHANGES)
        for place, dtype in enumerate(INDEX_DTYPES)
    ],
)
def test_choice_is_the_references_with_ties_to_the_lower_position(index_dtype, changes):
    assert_equal_choice(Case(index_dtype=index_dtype, **changes))


@here
@pytest.mark.parametrize("t", [1, 2, 31, 32, 33, 47, 48, 49, 64, 97, 200])
def test_choice_at_the_edges_of_tiles(t):
    assert_equal_choice(Case(t=t))


@here
def test_the_tables_own_launch_gives_the_same_choice():
    case = Case(t=700, top_k=50)
    assert_equal_choice(
        case,
        launch=triton_select.select_launch(
            triton_select.device_of(torch.empty(0, device=DEVICE)),
            group=2, block_r=32, index_bytes=1, slots=case.top_k,
        ),
    )  # fmt: skip


@here
@pytest.mark.parametrize("index_dtype", [torch.int8, torch.bfloat16, torch.float16])
def test_random_keys_are_chosen_up_to_rounding(index_dtype):
    """No key is chosen whose true score is below that of a key left out, but for rounding."""
    case = Case(
        b=4, hq=8, s=3, t=500, d=64, r=16, top_k=100, index_dtype=index_dtype, sink=0, recent=0
    )
    q = torch.randn(4, 8, 3, 64).bfloat16()
    basis = torch.randn(2, 64, 16) / 8
    index, scale = fused.index_rows(torch.randn(4, 2, 500, 64), basis, index_dtype)
    launch = small_launch(case, block_t=128, block=256)
    got, _ = select_both(case, [q, basis, index, scale], launch=launch)
    score = reference.scores(q, basis, index, scale, None, scale=0.25, per_head=False)
    for row, at in zip(score.flatten(0, 2), got.flatten(0, 2).long(), strict=True):
        chosen = torch.zeros(500, dtype=torch.bool).index_fill_(0, at, True)
        assert int(chosen.sum()) == 100
        slack = 2**-14 * float(row.abs().max())
        assert float(row[chosen].min()) >= float(row[~chosen].max()) - slack


@here
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_equal_scores_go_to_the_lowest_positions(index_dtype):
    case = Case(index_dtype=index_dtype, sink=0, recent=0)
    q, basis, index, scale = case.tensors()
    got, _ = select_both(case, [q, basis, torch.zeros_like(index), scale])
    assert torch.equal(got, torch.arange(20, dtype=torch.int32).expand_as(got))


@here
def test_zero_and_minus_zero_are_equal():
    case = Case(sink=0, recent=0)
    q, basis, index, scale = case.tensors()
    assert_equal_choice(case, [q, basis, index, torch.zeros_like(scale)])


@here
def test_fewer_keys_than_slots_are_all_chosen():
    case = Case(t=7, top_k=20)
    got, _ = select_both(case, case.tensors())
    want = torch.full((20,), -1, dtype=torch.int32)
    want[:7] = torch.arange(7)
    assert torch.equal(got, want.expand_as(got))


@here
@pytest.mark.parametrize("budget", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("holes", [False, True])
def test_sinks_and_recent_keys_are_kept_however_short_the_budget(budget, holes):
    mask = torch.rand(1, 1, 1, 301) > 0.4 if holes else None
    case = Case(top_k=budget, sink=2, recent=3)
    assert_equal_choice(case, mask=mask)


@here
def test_a_sample_that_misleads_costs_time_and_no_key():
    """Every sampled key scores high and no other does: the floor it gives is far too high."""
    case = Case(hq=2, hkv=1, top_k=100, sink=0, recent=0, t=400)
    q, basis, index, scale = case.tensors()
    launch = small_launch(case)
    o = torch.arange(launch.sample)
    narrow, wider = divmod(case.t, launch.sample)
    noise = ((o * 0x9E3779B1) >> 8) & 0xFFFFFF
    sampled = o * narrow + o.clamp(max=wider) + (noise * (narrow + (o < wider).long()) >> 24)
    index[:], scale[:] = -1, 1
    index[:, :, sampled] = 1
    index[..., 1:] = 0
    assert len(set(sampled.tolist())) < case.top_k
    assert_equal_choice(case, [q, basis, index, scale], launch=launch)


# --------------------------------------------- the other scorers, and choices by probability

PAGE = 5
CHOICES = {"maximum": {}, "probability": {"by_probability": True}, "heads": {"per_head": True}}


def bounds_of_pages(keys, page):
    b, h, t, d = keys.shape
    pages = torch.full((b, h, -(-t // page) + 1, 2 * d), torch.nan, dtype=keys.dtype)
    reference.update_pages(pages, keys, torch.ones(1, 1, 1, 1, dtype=torch.bool), page=page)
    return pages


@here
@pytest.mark.parametrize("masked", [False, True])
def test_rows_with_budgets_of_their_own_choose_as_defined(masked):
    """Few of the best, most of them, the last ones in several blocks, none, and all: in rows long
    enough for a sample."""
    case = Case(b=2, hq=10, hkv=5, t=301, top_k=None)
    tensors, mask = case.tensors(), None
    if masked:
        mask = torch.rand(2, 1, 1, case.t) > 0.3
    counts = torch.full((2,), case.t) if mask is None else mask.sum(-1)[:, 0, 0]
    own = torch.tensor([[9, 3], [140, 3], [150, 148], [0, 0], [case.t, case.t]])
    budgets = torch.minimum(own[None, :, None], counts.view(-1, 1, 1, 1)).int()
    bounds = None if mask is None else masks.mask_bounds(mask)
    options = {**case.options, "slots": case.t}
    moved = [None if x is None else x.to(DEVICE) for x in (*tensors, mask, bounds)]
    launch, on_device = small_launch(case), budgets.to(DEVICE)
    got = triton_select.select(*moved, **options, budgets=on_device, launch=launch)
    want, told = reference.select_weighed(*tensors, mask, bounds, **options, budgets=budgets)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)
    again, weighed = triton_select.select_weighed(
        *moved, **options, budgets=on_device, launch=launch
    )
    torch.testing.assert_close(again.cpu(), want, rtol=0, atol=0)
    torch.testing.assert_close(weighed.cpu().double(), told, rtol=1e-4, atol=1e-5)


def assert_scored_as_defined(inputs, options, launch=None):
    """The reference's choice, but for scores within rounding of the threshold."""
    moved = [None if x is None else x.to(DEVICE) for x in inputs]
    got = triton_select.select(*moved, **options, launch=launch).cpu()
    want = reference.select(*inputs, **options)
    assert torch.equal(got >= 0, want >= 0)
    ranked_by = ("scale", "per_head", "page", "keys", "by_probability")
    score = reference.scores(*inputs[:5], **{n: options[n] for n in ranked_by if n in options})
    slack = 2**-14 * float(score[score.isfinite()].abs().max())
    for row in (got != want).any(-1).nonzero().tolist():
        row = tuple(row)
        found, wanted = set(got[row].tolist()), set(want[row].tolist())
        gained, lost = score[row][sorted(found - wanted)], score[row][sorted(wanted - found)]
        assert (gained >= lost.max() - slack).all(), (row, found ^ wanted)


def scored(scorer, dtype, case, mask=None):
    """Inputs of select, and the options that the scorer needs; the cache as (B, T, H, D)."""
    keys = torch.randn(case.b, case.t, case.hkv, case.d).to(dtype).transpose(1, 2)
    q = torch.randn(case.b, case.hq, case.s, case.d).to(case.q_dtype)
    bounds = None if mask is None else masks.mask_bounds(mask)
    if scorer == "exact":
        return [q, None, keys, None, mask, bounds], {}
    if scorer == "pages":
        pages = bounds_of_pages(keys, PAGE)
        return [q, None, pages, None, mask, bounds], {"page": PAGE, "keys": case.t}
    basis = torch.randn(case.hkv, case.d, case.r) / 4
    index, scale = fused.index_rows(keys, basis, torch.int8 if scorer == "int8" else dtype)
    return [q, basis, index, scale, mask, bounds], {}


@here
@pytest.mark.parametrize(
    ("scorer", "dtype", "choice"),  # every pair of two values meets; all three where it is fast
    [
        pytest.param(scorer, dtype, choice, marks=_SLOW_HERE * ((row + column) % 3 != place))
        for row, scorer in enumerate(["low rank", "int8", "exact", "pages"])
        for column, choice in enumerate(CHOICES)
        for place, dtype in enumerate(FLOATS)
    ],
)
def test_every_scorer_chooses_as_defined(scorer, dtype, choice):
    for mask in (None, mask_of("holes", 131, 2), torch.randn(1, 1, 2, 131)):
        case = Case(hq=6, s=2, t=131, top_k=30, q_dtype=dtype)
        inputs, more = scored(scorer, dtype, case, mask)
        assert_scored_as_defined(inputs, {**case.options, **more, **CHOICES[choice]})


@here
@pytest.mark.parametrize("scorer", ["low rank", "exact", "pages"])
def test_a_sample_and_parts_of_scores_in_memory(scorer):
    """Many tiles, parts and a sample, of rows with a window each."""
    case = Case(b=2, hq=14, s=2, t=300, top_k=40)
    visible = mask_of("window", 300, 2, 2)
    for choice in ({}, {"by_probability": True}):
        inputs, more = scored(scorer, torch.float32, case, visible)
        launch = small_launch(dataclasses.replace(case, index_dtype=torch.float32), pack=1)
        assert_scored_as_defined(inputs, {**case.options, **more, **choice}, launch)


@here
@pytest.mark.parametrize("choice", ["maximum", "probability"])
@pytest.mark.parametrize("scorer", ["exact", "pages"])
def test_keys_that_are_not_finite_rank_as_defined(scorer, choice):
    case = Case(t=120, sink=0, recent=0)
    inputs, more = scored("exact", torch.float32, case)
    keys = inputs[2]
    keys[:, :, 20:25] = torch.nan
    keys[:, 0, 50, 3] = torch.inf
    keys[:, 1, 90, 3] = -torch.inf
    if scorer == "pages":
        inputs[2], more = bounds_of_pages(keys, PAGE), {"page": PAGE, "keys": 120}
    assert_scored_as_defined(inputs, {**case.options, **more, **CHOICES[choice]})


@here
def test_improbable_keys_are_ranked_not_tied():
    score = -torch.arange(200.0).flip(0).view(1, 1, 200, 1) * 10
    q = torch.tensor([1.0, 0.5, 0.1]).view(1, 3, 1, 1)
    options = {**Case(top_k=50, sink=0, recent=0).options, "scale": 1.0, "by_probability": True}
    found = triton_select.select(q.to(DEVICE), None, score.to(DEVICE), None, None, None, **options)
    assert found.flatten().tolist() == list(range(150, 200))


@here
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("t, page", [(1, 2), (33, 16), (40, 7)])
def test_pages_are_updated_and_extended_as_defined(t, page, dtype):
    keys = torch.randn(2, t, 2, 20).to(dtype).transpose(1, 2)
    keys[0, 1, t // 2, 3] = torch.nan
    keys[1, 0, : t // 2] = torch.nan  # whole pages too
    for written in (torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.rand(2, 1, t, 1) < 0.1):
        pages = torch.randn(2, 2, -(-t // page), 40).to(dtype)
        for stored in (written, written.to(torch.uint8)):
            got, want = pages.to(DEVICE, copy=True), pages.clone()
            triton_pages.update_pages(got, keys.to(DEVICE), stored.to(DEVICE), page=page)
            reference.update_pages(want, keys, stored, page=page)
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)
        old = pages[:, :, :-1]
        if old.shape[2]:
            got = triton_pages.extend_pages(
                old.to(DEVICE), keys.to(DEVICE), written.to(DEVICE), page=page
            )
            want = reference.extend_pages(old, keys, written, page=page)
            torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------- masks of select


def mask_of(kind: str, t: int, s: int = 1, b: int = 1) -> torch.Tensor:
    seen = torch.zeros(b, 1, s, t, dtype=torch.bool)
    for j in range(s):
        if kind == "window":
            seen[..., j, 11 + j : t - 40 + j] = True
        elif kind == "holes":
            seen[..., j, :] = torch.rand(b, 1, t) > 0.3
        elif kind == "last row blind":
            seen[..., j, :] = j < s - 1
        elif kind == "one key":
            seen[..., j, t // 3] = True
    return seen


@here
@pytest.mark.parametrize("kind", ["window", "holes", "last row blind", "one key"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
def test_hidden_keys_are_never_chosen(kind, dtype):
    case = Case(s=2, b=2, index_dtype=torch.bfloat16)
    mask = mask_of(kind, case.t, case.s, case.b)
    if dtype != torch.bool:
        filler = torch.finfo(dtype).min if kind == "holes" else -torch.inf
        bias = torch.randint(-3, 4, mask.shape).to(dtype) * 4
        mask = bias.masked_fill(~mask, filler)
    assert_equal_choice(case, mask=mask)


@here
def test_a_filler_just_below_half_of_the_lowest_value_hides():
    mask = torch.zeros(1, 1, 1, 301)
    mask[..., ::2] = hidden_below(torch.float32)
    got, want = select_both(Case(sink=0, recent=0), Case().tensors(), mask)
    assert torch.equal(got, want)
    assert bool((got % 2 == 1).all())


@here
def test_masks_that_differ_between_heads():
    case = Case(per_head=True, s=2, t=201)
    assert_equal_choice(case, mask=torch.rand(1, 4, 2, 201) > 0.5)


@here
def test_expanded_and_strided_masks_are_read_as_they_are():
    case = Case(b=2, s=2)
    mask = (torch.rand(2, 1, 1, 602) > 0.3)[..., ::2].expand(2, 4, 2, 301)
    assert mask.stride()[1:3] == (0, 0) and mask.stride(3) == 2
    assert_equal_choice(case, mask=mask)


@here
def test_what_lies_behind_the_window_is_not_read():
    """A static cache is mostly unwritten: NaN there must not matter, and is not even scored."""
    case = Case(index_dtype=torch.bfloat16)
    tensors = case.tensors()
    mask = mask_of("window", case.t)
    before, _ = select_both(case, tensors, mask)
    tensors[2][:, :, 261:] = torch.nan
    after, want = select_both(case, tensors, mask)
    assert torch.equal(after, want) and torch.equal(after, before)


# --------------------------------------------------------------------- bad numbers and strides


@here
@pytest.mark.parametrize("index_dtype", FLOATS)
def test_nan_and_infinite_keys_are_ranked_and_do_not_spread(index_dtype):
    case = Case(b=2, index_dtype=index_dtype, sink=0, recent=0)
    tensors = case.tensors()
    clean, _ = select_both(case, tensors)
    index = tensors[2]
    index[0, 0, 5] = torch.nan
    index[0, 0, 9, 1] = torch.nan
    index[0, 0, 17] = torch.inf
    index[0, 0, 30] = -torch.inf
    index[0, 0, 40, 0] = torch.inf
    index[0, 0, 41, 0] = -torch.inf
    got, want = select_both(case, tensors)
    assert torch.equal(got, want)
    assert torch.equal(got[1], clean[1]) and torch.equal(got[0, 1], clean[0, 1])
    assert 40 in got[0, 0] and 5 not in got[0, 0] and 41 not in got[0, 0]


@here
def test_nothing_but_nan_keys_gives_the_lowest_positions():
    case = Case(index_dtype=torch.float32, sink=0, recent=0)
    q, basis, index, _ = case.tensors()
    got, want = select_both(case, [q, basis, torch.full_like(index, torch.nan), None])
    assert torch.equal(got, want)


@here
@pytest.mark.parametrize("index_dtype", [torch.int8, torch.bfloat16])
def test_a_query_head_that_is_not_finite_leaves_the_choice_to_the_others(index_dtype):
    case = Case(index_dtype=index_dtype, top_k=270)
    tensors = case.tensors()
    tensors[0][0, 0] = torch.nan
    tensors[0][0, 3] = torch.inf
    assert_equal_choice(case, tensors)
    tensors[0][0, :2] = torch.nan
    assert_equal_choice(case, tensors)


@here
@pytest.mark.parametrize("index_dtype", [torch.int8, torch.float16])
def test_views_into_larger_buffers_are_read_in_place(index_dtype):
    case = Case(b=2, s=2, index_dtype=index_dtype)
    q, basis, index, scale = case.tensors()
    wide = torch.full((2, 500, 2, 20), 100).to(index_dtype)
    wide[:, 7:308, :, :12] = index.transpose(1, 2)
    view = wide[:, 7:308, :, :12].transpose(1, 2)
    assert not view.is_contiguous() and view.stride(-1) == 1
    if scale is not None:
        scale = torch.cat((scale, -scale), 3)[..., :1]
    assert_equal_choice(case, [q.transpose(1, 2).contiguous().transpose(1, 2), basis, view, scale])


@here
def test_int8_refuses_a_rank_whose_integer_scores_could_overflow():
    case = Case(d=600, r=600, t=20)
    with pytest.raises(ValueError, match="rank is 600"):
        select_both(case, case.tensors())


# ------------------------------------------------------------------------------------- attend


def attention_inputs(b, hq, hkv, s, t, d, dv, dtype):
    shapes = ((b, hq, s, d), (b, hkv, t, d), (b, hkv, t, dv))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def random_positions(b, heads, s, t, slots, used):
    rows = [torch.randperm(t)[:used].sort().values for _ in range(b * heads * s)]
    positions = torch.full((b * heads * s, slots), -1, dtype=torch.int32)
    positions[:, :used] = torch.stack(rows).int()
    return positions.view(b, heads, s, slots)


def pytorchs_error(q, k, v, positions, mask, truth, scale):
    """Error of PyTorch's own attention, same dtype, over the same keys (one dense masked call)."""
    b, hq, s, _ = q.shape
    t = k.shape[2]
    if positions is None:
        positions = torch.arange(t, dtype=torch.int32).expand(b, k.shape[1], s, t)
    chosen = torch.zeros(b, positions.shape[1], s, t + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(positions < 0, t, positions).long(), True)
    chosen = chosen[..., :t].repeat_interleave(hq // chosen.shape[1], 1)
    bias = torch.zeros(chosen.shape, dtype=q.dtype).masked_fill(~chosen, -torch.inf)
    if mask is not None:
        bias = bias + (mask if mask.dtype != torch.bool else torch.where(mask, 0.0, -torch.inf))
    group = hq // k.shape[1]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), bias.to(q.dtype),
        scale=scale,
    )  # fmt: skip
    return float((theirs.double() - truth).abs().nan_to_num().max())


def attend_error(tensors, positions, mask=None, launch=None, **options):
    """(largest error, truth) of the kernels against the reference in fp64."""
    q, k, v = tensors
    truth = reference.attend(q.double(), k.double(), v.double(), positions, mask, **options)
    moved = [None if x is None else x.to(DEVICE) for x in (*tensors, positions, mask)]
    options = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in options.items()}
    got = triton_attend.attend(*moved, **options, launch=launch)
    assert got.dtype == q.dtype and got.shape == truth.shape and got.is_contiguous()
    assert bool(got.isfinite().all()), "an element was not written, or a NaN came in"
    return float((got.cpu().double() - truth).abs().max()), truth


def small_tiles(tensors, programs=4, block_n=16):
    """The table's launch with small tiles, so that rows have several; programs=0: no split."""
    q, _, v = tensors
    launch = triton_attend.attend_launch(
        triton_attend.device_of(q), group=1, block_d=max(q.shape[-1], v.shape[-1]),
        bytes_each=q.element_size(),
    )  # fmt: skip
    return dataclasses.replace(launch, programs=programs, block_n=block_n)


def assert_as_exact_as_pytorch(tensors, positions, mask=None, launch=None, **options):
    error, truth = attend_error(tensors, positions, mask, launch, **options)
    floor = torch.finfo(tensors[0].dtype).eps * float(truth.abs().max())
    theirs = pytorchs_error(*tensors, positions, mask, truth, options["scale"])
    assert error <= 2 * theirs + floor, (error, theirs, floor)


@here
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("b", "hq", "hkv", "s", "d", "dv"),
    [(1, 4, 2, 1, 64, 64), (2, 2, 2, 2, 80, 80), (1, 8, 1, 1, 96, 40), (1, 3, 3, 1, 17, 33)],
)
@pytest.mark.parametrize("programs", [0, 4])
def test_attention_over_the_chosen_keys(dtype, b, hq, hkv, s, d, dv, programs):
    tensors = attention_inputs(b, hq, hkv, s, 150, d, dv, dtype)
    positions = random_positions(b, hkv, s, 150, 61, 43)
    launch = small_tiles(tensors, programs)
    assert_as_exact_as_pytorch(tensors, positions, launch=launch, scale=d**-0.5)


@here
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("b", "hq", "hkv", "s", "d", "dv"),
    [(1, 4, 2, 1, 64, 64), (2, 2, 2, 3, 80, 80), (1, 20, 1, 2, 17, 33)],
)
@pytest.mark.parametrize("programs", [0, 4])
def test_attention_over_all_keys(dtype, b, hq, hkv, s, d, dv, programs):
    tensors = attention_inputs(b, hq, hkv, s, 150, d, dv, dtype)
    assert_as_exact_as_pytorch(tensors, None, launch=small_tiles(tensors, programs), scale=d**-0.5)


# Two ranges, one, none (all keys), all keys; more rows than are counted at a time.
RANGES = torch.tensor(
    [[0, 5, 90, 150], [0, 0, 17, 150], [9, 9, 9, 9], [0, 150, 150, 150], [3, 40, 40, 41]],
    dtype=torch.int32,
)


@here
@pytest.mark.parametrize(
    ("dtype", "b", "hq", "hkv", "s", "d", "dv", "programs"),
    [
        (torch.bfloat16, 1, 10, 5, 1, 64, 64, 40),
        (torch.float16, 2, 10, 5, 1, 80, 40, 1),
        (torch.float32, 1, 20, 1, 5, 17, 33, 3),
    ],
)
def test_attention_in_ranges_of_keys(dtype, b, hq, hkv, s, d, dv, programs):
    tensors = attention_inputs(b, hq, hkv, s, 150, d, dv, dtype)
    ranges = RANGES[torch.arange(hkv * s) % 5].view(1, hkv, s, 4)
    launch = small_tiles(tensors, programs)
    for mask in (None, torch.rand(b, 1, s, 150) > 0.3):
        error, truth = attend_error(tensors, None, mask, launch, scale=d**-0.5, ranges=ranges)
        assert error <= 8 * torch.finfo(dtype).eps * float(truth.abs().max() + 1)


@here
def test_heads_may_share_one_run_of_slots_and_have_ranges_of_their_own_there():
    q, k, v = attention_inputs(2, 10, 1, 1, 150, 32, 24, torch.float32)
    tensors = [q, k.expand(-1, 5, -1, -1), v.expand(-1, 5, -1, -1)]
    ranges, launch = RANGES.view(1, 5, 1, 4), small_tiles(tensors, 3)
    error, _ = attend_error(tensors, None, None, launch, scale=0.2, ranges=ranges)
    assert error < 1e-5


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels keep what they were compiled with")
def test_ranges_of_more_rows_than_are_counted_at_a_time(monkeypatch):
    monkeypatch.setattr(triton_ranges, "ROWS_BLOCK", triton_ranges.tl.constexpr(4))
    tensors = attention_inputs(2, 5, 5, 1, 150, 16, 16, torch.float32)
    ranges = RANGES[torch.arange(10) % 5].view(2, 5, 1, 4).contiguous()
    error, _ = attend_error(tensors, None, None, small_tiles(tensors, 2), scale=0.2, ranges=ranges)
    assert error < 1e-5


@here
@pytest.mark.parametrize("programs", [0, 4])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("heads", [1, 4])
def test_masks_of_all_keys_are_of_each_head_and_token(heads, tokens, programs):
    """The last row sees nothing, and what no row sees is not read."""
    tensors = attention_inputs(2, 4, 2, tokens, 70, 32, 32, torch.float32)
    launch = small_tiles(tensors, programs)
    visible = torch.rand(2, heads, tokens, 70) > 0.4
    visible[..., 48:64] = False
    visible[1, -1, -1] = False
    for x in tensors[1:]:
        x[:, :, 48:64] = torch.nan
    added = torch.randn(visible.shape).masked_fill(~visible, -torch.inf)
    for mask in (visible, added):
        for options in ({}, dict(softcap=3.0, sink_logits=torch.randn(4))):
            error, _ = attend_error(tensors, None, mask, launch, scale=0.2, **options)
            assert error < 1e-5


@here
def test_all_keys_in_two_tensors_and_values_that_are_keys():
    q, k, _ = attention_inputs(1, 6, 1, 2, 90, 48, 48, torch.float32)
    latent, rest = k[..., :32].contiguous(), k[..., 32:].contiguous()
    error, _ = attend_error((q, latent, latent), None, scale=0.2, k_pe=rest)
    assert error < 1e-5


@here
@pytest.mark.parametrize("programs", [0, 4])
@pytest.mark.parametrize(
    ("dtype", "k_dtype", "v_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.float16),
    ],
)
def test_keys_and_values_of_other_dtypes_are_brought_to_that_of_queries(
    dtype, k_dtype, v_dtype, programs
):
    q, k, v = attention_inputs(1, 4, 2, 2, 150, 64, 40, torch.float32)
    q, k, v = q.to(dtype), k.to(k_dtype), v.to(v_dtype)
    positions = random_positions(1, 2, 2, 150, 61, 43)
    launch = small_tiles((q, k, v), programs)
    error, truth = attend_error((q, k, v), positions, None, launch, scale=0.125)
    alike = (q, k.to(dtype), v.to(dtype))  # what PyTorch asks for
    theirs = pytorchs_error(*alike, positions, None, truth, 0.125)
    floor = torch.finfo(dtype).eps * float(truth.abs().max())
    assert error <= 2 * theirs + floor, (error, theirs, floor)


@here
@pytest.mark.parametrize(("d", "dv"), [(128, 128), (192, 128), (256, 256), (64, 128)])
def test_every_head_dim_with_the_tables_launch(d, dv):
    tensors = attention_inputs(1, 4, 2, 1, 200, d, dv, torch.bfloat16)
    positions = random_positions(1, 2, 1, 200, 130, 130)
    assert_as_exact_as_pytorch(tensors, positions, scale=d**-0.5)


@here
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("programs", [0, 4])
@pytest.mark.parametrize("own_values", [True, False])
def test_keys_in_two_tensors_are_one_key(dtype, programs, own_values):
    q, keys, v = attention_inputs(2, 5, 1, 2, 150, 33 + 20, 33, dtype)
    k, rest = (x.contiguous() for x in keys.split((33, 20), -1))
    v = v if own_values else k
    positions = random_positions(2, 1, 2, 150, 61, 43)
    launch = small_tiles((q, keys, v), programs)
    truth = reference.attend(q.double(), keys.double(), v.double(), positions, None, scale=0.1)
    got = triton_attend.attend(
        *[x.to(DEVICE) for x in (q, k, v, positions)], None, scale=0.1, k_pe=rest.to(DEVICE),
        launch=launch,
    )  # fmt: skip
    error = float((got.cpu().double() - truth).abs().max())
    floor = torch.finfo(dtype).eps * float(truth.abs().max())
    theirs = pytorchs_error(q, keys, v, positions, None, truth, 0.1)
    assert error <= 2 * theirs + floor, (error, theirs, floor)


@here
def test_groups_wider_than_a_program_and_positions_per_head():
    tensors = attention_inputs(1, 37, 1, 1, 90, 32, 32, torch.float32)
    assert_as_exact_as_pytorch(tensors, random_positions(1, 1, 1, 90, 40, 33), scale=0.2)
    tensors = attention_inputs(1, 4, 2, 2, 90, 32, 32, torch.float32)
    assert_as_exact_as_pytorch(tensors, random_positions(1, 4, 2, 90, 40, 33), scale=0.2)


@here
@pytest.mark.parametrize("used", [0, 1, 15, 16, 17, 61])
def test_lists_of_any_length(used):
    """None at all: dense over every key."""
    tensors = attention_inputs(1, 4, 2, 1, 70, 32, 32, torch.float32)
    positions = random_positions(1, 2, 1, 70, 61, used)
    error, _ = attend_error(tensors, positions, scale=0.2, launch=small_tiles(tensors))
    assert error < 1e-5


@here
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [0, 33])
def test_masks_apply_at_the_chosen_positions(heads, dtype, used):
    tensors = attention_inputs(2, 4, 2, 2, 70, 32, 32, torch.float32)
    mask = torch.rand(2, heads, 2, 70) > 0.4
    if dtype != torch.bool:
        mask = torch.randn(mask.shape).to(dtype).masked_fill(~mask, -torch.inf)
    positions = random_positions(2, 2, 2, 70, 61, used)
    error, _ = attend_error(tensors, positions, mask, scale=0.2, launch=small_tiles(tensors))
    assert error < 1e-5


@here
@pytest.mark.parametrize("programs", [0, 4])
def test_soft_cap_and_attention_sinks(programs):
    tensors = attention_inputs(1, 4, 2, 1, 70, 32, 32, torch.float32)
    positions = random_positions(1, 2, 1, 70, 61, 50)
    for softcap, sink_logits in (
        (2.0, None),
        (0.0, torch.randn(4)),
        (30.0, torch.tensor([60.0, 1, -9, 1, 0, 1, 5, 1])[::2]),
    ):
        error, _ = attend_error(
            tensors, positions, scale=1.0, softcap=softcap, sink_logits=sink_logits,
            launch=small_tiles(tensors, programs),
        )  # fmt: skip
        assert error < 1e-5


@here
@pytest.mark.parametrize("programs", [0, 4])
def test_rows_that_see_nothing_get_what_dense_attention_gives(programs):
    tensors = attention_inputs(1, 4, 2, 1, 70, 32, 32, torch.float32)
    nowhere = torch.full((1, 2, 1, 61), -1, dtype=torch.int32)
    launch = small_tiles(tensors, programs)
    for mask in (torch.zeros(1, 1, 1, 70, dtype=torch.bool), torch.full((1, 1, 1, 70), -torch.inf)):
        for sink_logits in (None, torch.zeros(4)):
            error, truth = attend_error(
                tensors, nowhere, mask, launch, scale=0.2, sink_logits=sink_logits
            )
            assert error == 0 and not truth.any()
    lowest = torch.full((1, 1, 1, 70), torch.finfo(torch.float32).min)
    error, truth = attend_error(tensors, nowhere, lowest, launch, scale=0.2)
    assert error < 1e-6
    mean = tensors[2][0, 0].double().mean(0)
    torch.testing.assert_close(truth[0, 0, 0], mean, rtol=0, atol=1e-12)


@here
def test_positions_out_of_range_contribute_nothing():
    tensors = attention_inputs(1, 4, 2, 1, 70, 32, 32, torch.float32)
    positions = random_positions(1, 2, 1, 70, 61, 40)
    positions[..., 36:40] = torch.tensor([70, 1000, 2**30, 2**31 - 1], dtype=torch.int32)
    error, _ = attend_error(tensors, positions, scale=0.2, launch=small_tiles(tensors))
    assert error < 1e-5


@here
@pytest.mark.parametrize("masked", [False, True])
def test_nan_rows_that_are_not_chosen_or_hidden_do_not_matter(masked):
    tensors = attention_inputs(1, 4, 2, 1, 70, 32, 32, torch.float32)
    positions = random_positions(1, 2, 1, 35, 61, 30)
    mask = None
    if masked:
        mask = torch.ones(1, 1, 1, 70, dtype=torch.bool)
        mask[..., int(positions[0, 0, 0, 7])] = False
        mask[..., int(positions[0, 1, 0, 9])] = False
    clean, _ = attend_error(tensors, positions, mask, scale=0.2, launch=small_tiles(tensors))
    for x in tensors[1:]:
        x[:, :, 35:] = torch.nan
        if masked:
            x[:, :, ~mask[0, 0, 0]] = torch.nan
    error, _ = attend_error(tensors, positions, mask, scale=0.2, launch=small_tiles(tensors))
    assert error == clean < 1e-5


@here
@pytest.mark.parametrize("programs", [0, 4])
def test_a_nan_key_spoils_its_own_rows_alone(programs):
    tensors = attention_inputs(2, 4, 2, 1, 70, 32, 32, torch.float32)
    k = tensors[1]
    positions = random_positions(2, 2, 1, 70, 61, 50)
    k[0, 0, int(positions[0, 0, 0, 3])] = torch.nan
    k[1, 1, int(positions[1, 1, 0, 3])] = torch.inf
    launch = small_tiles(tensors, programs)
    moved = [x.to(DEVICE) for x in (*tensors, positions)]
    got = triton_attend.attend(*moved, None, scale=0.2, launch=launch).cpu()
    want = reference.attend(*[x.double() for x in tensors], positions, None, scale=0.2)
    assert bool(got[0, :2].isnan().all())
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=0, atol=1e-5)


@here
def test_caches_with_any_strides_are_read_in_place():
    q, k, v = attention_inputs(2, 4, 2, 2, 70, 32, 24, torch.float32)
    wide = torch.full((2, 100, 2, 56), torch.nan)
    wide[:, 5:75, :, :32], wide[:, 5:75, :, 32:] = k.transpose(1, 2), v.transpose(1, 2)
    views = [wide[:, 5:75, :, :32].transpose(1, 2), wide[:, 5:75, :, 32:].transpose(1, 2)]
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    positions = random_positions(2, 2, 2, 70, 80, 33)[..., 3:64]
    error, _ = attend_error([q, *views], positions, scale=0.2)
    assert error < 1e-5


@here
@pytest.mark.parametrize("op", ["select", "attend"])
def test_what_the_kernels_do_not_take_is_refused_before_any_launch(op):
    if op == "select":
        case = Case()
        q, basis, index, scale = (x.to(DEVICE) for x in case.tensors())
        with pytest.raises(ValueError, match="basis"):
            triton_select.select(q, basis.half(), index, scale, None, None, **case.options)
    else:
        q, k, v = (x.to(DEVICE) for x in attention_inputs(1, 4, 2, 1, 9, 16, 16, torch.float32))
        with pytest.raises(ValueError, match="positions dtype"):
            triton_attend.attend(q, k, v, torch.zeros(1, 2, 1, 3, device=DEVICE), None, scale=1.0)


# ---------------------------------------------------------------------------- only on a device


def device_inputs(t: int, index_dtype=torch.int8):
    case = Case(t=t, d=64, r=32, hq=8, top_k=256, index_dtype=index_dtype)
    q = torch.randn(1, 8, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, t, 64, device=DEVICE, dtype=torch.bfloat16)
    basis = torch.randn(2, 64, 32, device=DEVICE) / 8
    return case, q, k, v, basis, *fused.index_rows(k, basis, index_dtype)


@here
@pytest.mark.parametrize(
    "scorer, choice, mass",
    [
        ("int8", "maximum", 0.6),
        ("int8", "maximum", 0.0),
        ("exact", "probability", 0.9),
        pytest.param("int8", "heads", 0.97, marks=_SLOW_HERE),
        pytest.param("exact", "maximum", 0.6, marks=_SLOW_HERE),
        pytest.param("int8", "probability", 0.6, marks=_SLOW_HERE),
    ],
)
def test_keys_are_weighed_over_many_tiles_and_parts(scorer, choice, mass):
    """A row of few keys, which reads all of them; rows with a window, and with holes in it."""
    case = Case(b=2, hq=4, t=200, top_k=40, min_keys=90)
    visible = mask_of("window", 200, 1, 2)
    visible[1, ..., 5::7] = False
    visible[0, ..., :120] = False
    inputs, more = scored(scorer, torch.float32, case, visible)
    options = {**case.options, **more, **CHOICES[choice], "mass": mass, "scale": 0.6}
    if scorer != "int8":
        case = dataclasses.replace(case, index_dtype=torch.float32)
    launch = small_launch(dataclasses.replace(case, per_head=choice == "heads"))
    moved = [None if x is None else x.to(DEVICE) for x in inputs]
    got, weighed = triton_select.select_weighed(*moved, **options, launch=launch)
    want, truth = reference.select_weighed(*inputs, **options)
    assert torch.equal(weighed[..., 0].cpu(), (got.cpu() >= 0).sum(-1).float())
    torch.testing.assert_close(weighed.cpu(), truth.float(), rtol=0, atol=2e-4)
    assert torch.equal(got.cpu() >= 0, want >= 0)


@here
def test_a_tail_of_no_positions_is_not_read():
    """What is behind the positions of a row costs no tile: keys that would spoil it are not met."""
    q, k, v = (torch.randn(1, heads, n, 16) for heads, n in ((4, 1), (2, 500), (2, 500)))
    positions = torch.full((1, 2, 1, 400), -1, dtype=torch.int32)
    positions[..., :70] = torch.arange(3, 73)
    k[:, :, 100:], v[:, :, 100:] = torch.nan, torch.nan
    moved = [x.to(DEVICE) for x in (q, k, v, positions)]
    out = triton_attend.attend(*moved, None, scale=0.25).cpu()
    short = reference.attend(q, k, v, positions[..., :70], None, scale=0.25)
    torch.testing.assert_close(out, short)


def decode(case, q, k, v, basis, index, scale):
    positions = ops.select(q, basis, index, scale, None, None, **case.options)
    return ops.attend(q, k, v, positions, None, scale=0.25)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
class TestOnADevice:
    pytestmark = gpu_only

    def test_large_lists_are_the_references(self, index_dtype):
        case = Case(t=70_001, top_k=3000, hq=8, index_dtype=index_dtype)
        tensors = case.tensors()
        moved = [None if x is None else x.to(DEVICE) for x in tensors]
        got = triton_select.select(*moved, None, None, **case.options)
        want = reference.select(*tensors, None, None, **case.options)
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)

    def test_ops_pass_opcheck(self, index_dtype):
        case, q, k, v, basis, index, scale = device_inputs(700, index_dtype)
        torch.library.opcheck(ops.select, (q, basis, index, scale, None, None), kwargs=case.options)
        positions = ops.select(q, basis, index, scale, None, None, **case.options)
        torch.library.opcheck(ops.attend, (q, k, v, positions, None), kwargs=dict(scale=0.25))

    def test_a_captured_graph_replays_with_new_contents(self, index_dtype):
        case, *tensors = device_inputs(5000, index_dtype)
        decode(case, *tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode(case, *tensors)
        _, *fresh = device_inputs(5000, index_dtype)
        for old, new in zip(tensors, fresh, strict=True):
            if old is not None:
                old.copy_(new)
        graph.replay()
        torch.testing.assert_close(out, decode(case, *tensors), rtol=0, atol=0)

    def test_a_growing_cache_compiles_nothing_new(self, index_dtype):
        kernels = (
            triton_select.prepare_kernel, triton_select.list_kernel, triton_select.choose_kernel,
            triton_attend.attend_kernel, triton_attend.combine_kernel,
        )  # fmt: skip
        compiled = lambda: [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]  # noqa: E731
        case, *tensors = device_inputs(5000, index_dtype)
        decode(case, *tensors)
        before = compiled()
        for t in (5001, 5002, 5003, 5008, 6400, 20_000):
            case, *tensors = device_inputs(t, index_dtype)
            decode(case, *tensors)
        assert compiled() == before

    def test_reduce_overhead_skips_no_cuda_graph(self, index_dtype):
        case, *tensors = device_inputs(5000, index_dtype)
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        compiled = torch.compile(lambda *x: decode(case, *x) * 2, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(*tensors).clone()
        assert counters["inductor"]["cudagraph_skips"] == 0
        torch.testing.assert_close(out, decode(case, *tensors) * 2, rtol=0, atol=0)
