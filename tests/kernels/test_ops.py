"""The ops' door: schemas, fakes, what feeds them, what they refuse, and how Inductor calls them.

Legend: B batch, Hq query heads, Hkv KV heads, S new tokens, T cached tokens, D head dims, R index
dims, K slots.
"""

import math
import re
import zlib

import pytest
import torch
import torch.nn.functional as F
from loki_compile.kernels import cpu, cpu_torch, reference
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.masks import mask_bounds
from loki_compile.kernels.ops import (
    KEEP_ALL_Q16,
    SCHEMAS,
    Budget,
    attend,
    attention,
    extend_pages,
    hidden_below,
    select,
    select_weighed,
    update_pages,
)
from toy_capture import recorded

B, HQ, HKV, S, T, D, DV, R, K = 2, 6, 2, 3, 37, 24, 16, 8, 11
SELECT = {
    "scale": 0.3,
    "top_k": K,
    "keep_q16": KEEP_ALL_Q16,
    "sink": 1,
    "recent": 2,
    "min_keys": 0,
    "per_head": False,
}


def select_args(**changes):
    args = {
        "q": torch.randn(B, HQ, S, D),
        "basis": torch.randn(HKV, D, R),
        "index": torch.randn(B, HKV, T, R),
        "index_scale": None,
        "mask": None,
        "bounds": None,
        **SELECT,
    }
    args.update(changes)
    return args


def attend_args(**changes):
    args = {
        "q": torch.randn(B, HQ, S, D),
        "k": torch.randn(B, HKV, T, D),
        "v": torch.randn(B, HKV, T, DV),
        "positions": torch.arange(K, dtype=torch.int32).expand(B, HKV, S, K).contiguous(),
        "mask": None,
        "scale": 0.3,
    }
    args.update(changes)
    return args


def call(op, args):
    return op(**args)


def opcheck(op, args):
    positional = [a for a in ("q", "basis", "index", "index_scale") if a in args]
    positional += [a for a in ("k", "v", "positions", "mask", "bounds") if a in args]
    keywords = {name: value for name, value in args.items() if name not in positional}
    torch.library.opcheck(op, tuple(args[name] for name in positional), keywords)


# ---- masks and index rows -------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16, torch.float16]
)
def test_mask_bounds_are_first_last_and_count(dtype):
    rows = ["0001111", "1010010", "0000000", "1111111", "0000001"]
    visible = torch.tensor([[c == "1" for c in row] for row in rows])
    mask = additive(visible, dtype) if dtype.is_floating_point else visible.to(dtype)
    expected = torch.tensor([[3, 7, 4], [0, 6, 3], [0, 0, 0], [0, 7, 7], [6, 7, 1]])
    found = mask_bounds(mask.view(1, 1, 5, 7))
    assert found.dtype == torch.int32
    assert torch.equal(found, expected.int().view(1, 1, 5, 3))


def additive(visible, dtype, filler=None):
    filler = torch.finfo(dtype).min if filler is None else filler
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, filler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_is_hidden_by_half_of_the_lowest_value_and_below(dtype):
    least = hidden_below(dtype)
    above = torch.nextafter(torch.tensor(least, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    mask = torch.tensor([least, above, -torch.inf, 3.0], dtype=dtype).view(1, 1, 1, 4)
    assert mask_bounds(mask).flatten().tolist() == [1, 4, 2]


def test_mask_bounds_keeps_broadcast_sizes():
    assert mask_bounds(torch.ones(2, 1, 3, 5, dtype=torch.bool)).shape == (2, 1, 3, 3)


def test_a_mask_of_bytes_is_a_mask_of_bools():
    k, v = torch.randn(B, HKV, T, D), torch.randn(B, HKV, T, DV)
    q, basis, index = (select_args()[name] for name in ("q", "basis", "index"))

    def both(mask):
        bounds = None if mask is None else mask_bounds(mask)
        positions = select(q, basis, index, None, mask, bounds, **SELECT)
        return positions, attend(q, k, v, positions, mask, scale=0.3)

    visible = torch.rand(B, 1, 1, T) > 0.5
    for as_bool, as_bytes in zip(both(visible), both(visible.to(torch.uint8)), strict=True):
        assert torch.equal(as_bool, as_bytes)
    assert not torch.equal(both(visible)[0], both(None)[0])


def test_index_rows_are_the_projection_in_fp32():
    keys, basis = torch.randn(B, HKV, S, D).bfloat16(), torch.randn(HKV, D, R)
    rows, scale = index_rows(keys, basis, torch.float32)
    truth = torch.einsum("bhsd,hdr->bhsr", keys.double(), basis.double())
    assert scale is None
    torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-5)
    assert index_rows(keys, basis, torch.bfloat16)[0].dtype == torch.bfloat16


def test_int8_rows_are_within_half_a_step():
    keys, basis = torch.randn(B, HKV, S, D), torch.randn(HKV, D, R)
    exact, _ = index_rows(keys, basis, torch.float32)
    rows, scale = index_rows(keys, basis, torch.int8)
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32
    assert scale.shape == (B, HKV, S, 1)
    torch.testing.assert_close(scale, exact.abs().amax(-1, keepdim=True) / 127)
    assert ((rows * scale - exact).abs() <= scale * 0.5001).all()
    assert (rows.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e38])
def test_int8_rows_of_any_size_are_finite(size):
    keys = torch.full((1, 1, 1, 4), size)
    rows, scale = index_rows(keys, torch.eye(4)[None], torch.int8)
    assert scale.isfinite().all() and (rows >= -127).all()
    assert (rows * scale - keys).abs().max() <= max(size / 127, 1e-44)


def test_entries_that_are_not_finite_count_as_zero_in_int8():
    keys = torch.tensor([[3e38, 2e38], [torch.nan, 1], [-torch.inf, 1], [4, 2]]).view(1, 1, 4, 2)
    basis = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])  # 3e38 + 2e38 is infinite, 3e38 - 2e38 is not
    rows, scale = index_rows(keys, basis, torch.int8)
    assert rows[0, 0].tolist() == [[0, 127], [0, 0], [0, 0], [127, 42]]
    assert scale[0, 0, 1:3].flatten().tolist() == [0, 0] and scale.isfinite().all()


# ---- the definition, on rows small enough to check by hand ------------------------------------


def choose(scores, **changes):
    """Positions for one query whose scores are given: D = R = 1, q = 1, index = scores."""
    scores = torch.tensor(scores, dtype=torch.float32)
    args = {**SELECT, "scale": 1.0, "sink": 0, "recent": 0, **changes}
    mask = args.pop("mask", None)
    found = []
    for implementation in (reference, cpu):
        positions = implementation.select(
            torch.ones(1, 1, 1, 1),
            torch.ones(1, 1, 1),
            scores.view(1, 1, -1, 1),
            None,
            mask,
            None if mask is None else mask_bounds(mask),
            **args,
        )
        found.append(positions.flatten().tolist())
    assert found[0] == found[1]
    return [p for p in found[0] if p >= 0]


def test_the_best_are_chosen_in_order_of_position():
    assert choose([1, 5, 2, 9, 3], top_k=2) == [1, 3]


def test_ties_go_to_the_lower_position():
    assert choose([2, 1, 2, 2, 7, 2], top_k=3) == [0, 2, 4]


def test_zeros_of_either_sign_are_equal():
    assert choose([-0.0, 0.0, -0.0, 0.0], top_k=2) == [0, 1]


def test_nan_ranks_with_minus_infinity():
    nan, inf = float("nan"), float("inf")
    assert choose([nan, -1e38, -inf, 4, inf], top_k=3) == [1, 3, 4]
    assert choose([nan, -inf, 4, nan], top_k=3) == [0, 1, 2]


def test_recent_and_sink_are_kept_and_count():
    assert choose([0, 0, 9, 8, 7, 0, 0], top_k=4, sink=1, recent=2) == [0, 2, 5, 6]
    assert choose([0, 0, 9, 8, 7, 0, 0], top_k=5, sink=2, recent=2) == [0, 1, 2, 5, 6]


def test_recent_and_sink_are_kept_where_the_budget_is_less_than_they_are():
    assert choose([0, 0, 9, 8, 7, 0, 0], top_k=1, sink=2, recent=2) == [0, 1, 5, 6]
    assert choose([0, 0, 9, 8, 7, 0, 0], top_k=None, keep_q16=1, sink=1, recent=2) == [0, 5, 6]
    assert choose([0, 9, 0], top_k=1, sink=2, recent=2) == [0, 1, 2]
    assert choose([0, 9, 0], top_k=1, sink=1, recent=1) == [0, 2]


def test_a_row_that_sees_fewer_than_min_keys_chooses_all_of_them():
    scores, few = list(range(9)), {"top_k": 2, "sink": 1, "recent": 0}
    assert choose(scores, **few, min_keys=9) == [0, 8], "as many are not fewer"
    assert choose(scores, **few, min_keys=10) == scores
    seen = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool).view(1, 1, 1, 9)
    assert choose(scores, mask=seen, **few, min_keys=5) == [1, 8]
    assert choose(scores, mask=seen, **few, min_keys=6) == [1, 2, 4, 7, 8]
    assert choose(scores, mask=torch.zeros_like(seen), **few, min_keys=6) == []


def test_each_row_decides_by_what_it_sees():
    """One batch: rows on both sides of `min_keys`, two query tokens each, heads with own masks."""
    lengths = torch.tensor([[[5, 6], [40, 41]], [[12, 13], [60, 11]]])  # (B, Hq, S)
    visible = torch.arange(64) >= 64 - lengths[..., None]
    q, index = torch.randn(2, 2, 2, 4), torch.randn(2, 1, 64, 4)
    args = {**SELECT, "top_k": None, "keep_q16": KEEP_ALL_Q16 // 8, "min_keys": 13}
    inputs = (q, torch.eye(4)[None], index, None, visible, mask_bounds(visible))
    for op in (reference.select, cpu.select, cpu_torch.select):
        positions = op(*inputs, **{**args, "per_head": True})
        read = (positions >= 0).sum(-1)
        assert read.tolist() == [[[5, 6], [5, 6]], [[12, 3], [8, 11]]]
        whole = lengths < 13
        for row in whole.nonzero().tolist():
            row = tuple(row)
            assert positions[row][: lengths[row]].tolist() == list(range(64 - lengths[row], 64))


@pytest.mark.parametrize(
    "budget, cached, slots",
    [
        (Budget(None, 1 << 13, 4, 32, 1024), 2000, 1023),
        (Budget(None, 1 << 13, 4, 32, 1024), 24, 36),
        (Budget(None, 1 << 13, 4, 32, 1024), 300, 300),
        (Budget(None, 1 << 13, 4, 32, 1024), 16000, 2000),
        (Budget(None, 1 << 13, 4, 32, 0), 100, 36),
        (Budget(None, 1, 0, 0, 0), 100, 1),
        (Budget(128, 1 << 16, 4, 32, 1024), 5000, 1023),
        (Budget(2048, 1 << 16, 4, 32, 1024), 5000, 2048),
        (Budget(128, 1 << 16, 4, 32, 0), 50, 128),
    ],
)
def test_slots_hold_the_choice_of_any_row(budget, cached, slots):
    assert budget.slots(cached) == slots >= max(budget.keys(n) for n in range(1, cached + 1))


BACKENDS = [reference, cpu, cpu_torch]
by_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda x: x.__name__.split(".")[-1])


def weigh(backend, scores, mask=None, **changes):
    """Positions that one row chooses by these scores, and what it is told of them."""
    index = torch.tensor(scores, dtype=torch.float32).view(1, 1, -1, 1)
    bounds = None if mask is None else mask_bounds(mask)
    options = {**SELECT, "scale": 1.0, "sink": 0, "recent": 0, "top_k": 100, **changes}
    inputs = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), index, None, mask, bounds)
    positions, weighed = backend.select_weighed(*inputs, **options)
    count, left_out = weighed.flatten().tolist()
    chosen = positions.flatten().tolist()
    assert chosen[int(count) :] == [-1] * (len(chosen) - int(count))
    return chosen[: int(count)], left_out


LOGS = [math.log(x) for x in (10, 40, 5, 25, 20)]  # per cent


@by_backend
@pytest.mark.parametrize(
    "mass, chosen, left_out",
    [
        (0.01, [1], 0.6),
        (0.39, [1], 0.6),
        (0.41, [1, 3], 0.35),
        (0.84, [1, 3, 4], 0.15),
        (0.86, [0, 1, 3, 4], 0.05),
        (0.96, [0, 1, 2, 3, 4], 0.0),
    ],
)
def test_a_mass_is_the_fewest_of_the_best_that_hold_it(backend, mass, chosen, left_out):
    assert weigh(backend, LOGS, mass=mass) == (chosen, pytest.approx(left_out, abs=1e-6))


@by_backend
def test_what_is_always_kept_counts_towards_the_mass(backend):
    assert weigh(backend, LOGS, mass=0.29, sink=1, recent=1)[0] == [0, 4]
    assert weigh(backend, LOGS, mass=0.31, sink=1, recent=1)[0] == [0, 1, 4]


@by_backend
def test_a_mass_never_goes_over_its_ceiling_nor_below_what_is_kept(backend):
    assert weigh(backend, LOGS, mass=0.999, top_k=2) == ([1, 3], pytest.approx(0.35, abs=1e-6))
    assert weigh(backend, LOGS, mass=0.01, sink=2, recent=1)[0] == [0, 1, 4]
    assert weigh(backend, LOGS, mass=0.01, min_keys=6) == ([0, 1, 2, 3, 4], 0.0)


@by_backend
def test_hidden_keys_weigh_nothing(backend):
    mask = torch.tensor([True, False, True, True, True]).view(1, 1, 1, 5)
    chosen, left_out = weigh(backend, LOGS, mask, mass=0.7)
    assert (chosen, left_out) == ([3, 4], pytest.approx(15 / 60, abs=1e-6))
    nothing = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert weigh(backend, LOGS, nothing, mass=0.7) == ([], 0.0)


@by_backend
def test_scores_that_are_not_finite_weigh_nothing(backend):
    scores = [*LOGS, math.inf, -math.inf, math.nan]
    assert weigh(backend, scores, mass=0.39) == ([1, 5], pytest.approx(0.6, abs=1e-6))
    none = [-math.inf, math.nan, math.inf]
    assert weigh(backend, none, mass=0.5, top_k=2) == ([0, 2], 0.0), "not the ceiling"


@by_backend
def test_a_fixed_budget_is_told_what_it_leaves_out(backend):
    assert weigh(backend, LOGS, top_k=2) == ([1, 3], pytest.approx(0.35, abs=1e-6))
    assert weigh(backend, LOGS, top_k=2, sink=1, recent=1) == ([0, 4], pytest.approx(0.7))
    assert weigh(backend, LOGS, top_k=5) == ([0, 1, 2, 3, 4], 0.0)


@pytest.mark.parametrize("op", [select, select_weighed])
@pytest.mark.parametrize("mass", [-0.1, 1.0, math.nan])
def test_a_mass_that_cannot_be_is_refused(op, mass):
    with pytest.raises(ValueError, match=r"mass is .* allowed: 0 \(none\) or a share in"):
        op(**select_args(mass=mass))


def test_pages_weigh_no_keys():
    with pytest.raises(ValueError, match="bounds of pages are no scores of keys"):
        select(**select_args(**PAGED, mass=0.9))
    with pytest.raises(ValueError, match="bounds of pages are no scores of keys"):
        select_weighed(**select_args(**PAGED))


def test_recent_and_sink_count_visible_keys_alone():
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 0], dtype=torch.bool).view(1, 1, 1, 9)
    assert choose([9] * 3 + [1, 5, 2, 9, 0, 9], mask=mask, top_k=3, sink=1, recent=1) == [1, 4, 7]


def test_the_fraction_is_of_the_visible_keys_and_rounds_up():
    mask = torch.tensor([1] * 7 + [0] * 9, dtype=torch.bool).view(1, 1, 1, 16)
    quarter = KEEP_ALL_Q16 // 4
    assert choose(list(range(16)), mask=mask, top_k=9, keep_q16=quarter) == [5, 6]
    assert choose(list(range(16)), top_k=9, keep_q16=quarter) == [12, 13, 14, 15]
    assert choose([1, 2], top_k=9, keep_q16=1) == [1]


def test_an_additive_mask_is_added_to_the_score():
    mask = torch.tensor([0.0, 5.0, -torch.inf, -1.0]).view(1, 1, 1, 4)
    assert choose([3, 1, 9, 3], mask=mask, top_k=2) == [0, 1]


def test_a_row_that_sees_nothing_gets_nothing():
    assert choose([1, 2, 3], mask=torch.zeros(1, 1, 1, 3, dtype=torch.bool), top_k=2) == []


def test_a_group_chooses_by_its_best_head():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    index = torch.tensor([[9.0, 0], [0, 0], [1, 1], [0, 5]]).view(1, 1, 4, 2)
    args = {**SELECT, "scale": 1.0, "sink": 0, "recent": 0, "top_k": 2}
    basis = torch.eye(2)[None]
    for op in (reference.select, cpu.select):
        shared = op(q, basis, index, None, None, None, **args)
        own = op(q, basis, index, None, None, None, **{**args, "per_head": True})
        assert shared.tolist() == [[[[0, 3]]]]
        assert own.tolist() == [[[[0, 2]], [[2, 3]]]]


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_attending_to_every_key_is_pytorch_attention(kind):
    args = attend_args(positions=torch.full((B, HKV, S, K), -1, dtype=torch.int32))
    if kind != "none":
        visible = torch.rand(B, 1, S, T) > 0.4
        args["mask"] = visible if kind == "bool" else torch.randn(B, 1, S, T).where(
            visible, torch.tensor(-torch.inf)
        )  # fmt: skip
    for name in ("q", "k", "v"):
        args[name] = args[name].double()
    mask = args["mask"] if kind != "additive" else args["mask"].double()
    expected = F.scaled_dot_product_attention(
        args["q"], args["k"], args["v"], mask, scale=args["scale"], enable_gqa=True
    )
    torch.testing.assert_close(reference.attend(**args), expected)


# ---- as seen by the compiler -------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["plain", "int8", "bool mask", "additive mask", "per head", "short rows"]
)
def test_opcheck_of_select(case):
    args = select_args()
    if case == "int8":
        args["index"], args["index_scale"] = index_rows(
            torch.randn(B, HKV, T, D), args["basis"], torch.int8
        )
    if "mask" in case:
        visible = torch.rand(B, 1, S, T) > 0.3
        args["mask"] = visible if case == "bool mask" else additive(visible, torch.float32)
        args["bounds"] = mask_bounds(args["mask"])
    args["per_head"] = case == "per head"
    if case == "short rows":
        args.update(top_k=None, keep_q16=8192, min_keys=30)
    opcheck(select, args)


PAGE = 8
EXACT = {"basis": None, "index": torch.randn(B, HKV, T, D)}
PAGED = {"basis": None, "index": torch.randn(B, HKV, 5, 2 * D), "page": PAGE, "keys": T}


@pytest.mark.parametrize("form", [EXACT, PAGED], ids=["exact", "pages"])
@pytest.mark.parametrize("by_probability", [False, True])
def test_opcheck_of_the_other_scorers(form, by_probability):
    opcheck(select, select_args(**form, by_probability=by_probability))


@pytest.mark.parametrize("mass", [0.0, 0.8])
@pytest.mark.parametrize("more", [{}, EXACT, {"by_probability": True}, {"per_head": True}])
def test_opcheck_of_what_weighs_keys(mass, more):
    opcheck(select_weighed, select_args(**more, mass=mass))


def page_args(rows=5):
    written = torch.zeros(B, 1, T, 1, dtype=torch.bool)
    written[:, :, 7:10] = True
    return torch.zeros(B, HKV, rows, 2 * D), torch.randn(B, HKV, T, D), written


def test_opcheck_of_the_page_ops():
    torch.library.opcheck(update_pages, page_args(), {"page": PAGE})
    torch.library.opcheck(extend_pages, page_args(4), {"page": PAGE})


def test_a_growing_cache_of_pages_compiles_once():
    def step(q, keys, pages, new, written):
        keys = torch.cat((keys, new), 2)
        pages = extend_pages(pages, keys, written, page=PAGE)
        options = {**SELECT, "page": PAGE, "keys": keys.shape[2]}
        return select(q, None, pages, None, None, None, **options), keys, pages

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="inductor", dynamic=True, fullgraph=True)
    q, keys = torch.randn(B, HQ, 1, D), torch.randn(B, HKV, 21, D)
    pages = torch.zeros(B, HKV, 3, 2 * D)
    reference.update_pages(pages, keys, torch.ones(1, 1, 1, 1, dtype=torch.bool), page=PAGE)
    for n in range(6):
        written = (torch.arange(22 + n) == 21 + n).view(1, 1, -1, 1)
        new = torch.randn(B, HKV, 1, D)
        with torch.compiler.set_stance("fail_on_recompile" if n > 1 else "default"):
            positions, grown, bounds = compiled(q, keys, pages, new, written)
        for found, expected in zip(
            (positions, grown, bounds), step(q, keys, pages, new, written), strict=True
        ):
            assert torch.equal(found, expected)
        keys, pages = grown, bounds


@pytest.mark.parametrize("case", ["plain", "mask", "sink_logits"])
def test_opcheck_of_attend(case):
    args = attend_args()
    if case == "mask":
        args["mask"] = torch.rand(B, 1, S, T) > 0.3
    if case == "sink_logits":
        args.update(sink_logits=torch.randn(HQ), softcap=20.0)
    opcheck(attend, args)


RANGES = torch.tensor([0, 2, T - 4, T], dtype=torch.int32).expand(1, HKV, 1, 4)


@pytest.mark.parametrize("case", ["plain", "mask", "bytes", "sink_logits", "ranges"])
def test_opcheck_of_attention(case):
    args = attend_args()
    del args["positions"]
    if case == "mask":
        args["mask"] = torch.rand(B, 1, S, T) > 0.3
    if case == "bytes":
        args["mask"] = (torch.rand(B, 1, S, T) > 0.3).byte()
    if case == "sink_logits":
        args.update(sink_logits=torch.randn(HQ), softcap=20.0)
    if case == "ranges":
        args["ranges"] = RANGES
    opcheck(attention, args)
    truth = reference.attention(
        **{n: x.double() if n in "qkv" else x for n, x in args.items()}
        | ({"mask": args["mask"].bool()} if case == "bytes" else {})
    )
    torch.testing.assert_close(attention(**args).double(), truth, rtol=0, atol=1e-5)


def test_fakes_have_the_shapes_and_strides_of_the_results():
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in select_args().items()
        }
        positions = select(**fake)
    real = select(**select_args())
    assert positions.shape == real.shape == (B, HKV, S, K)
    assert positions.stride() == real.stride() and positions.dtype == torch.int32


def static_cache_step(x, k_cache, v_cache, index, new, basis, mask):
    """A decode step over a (B, T, Hkv, D) cache, written in place; the mask is longer."""
    k_cache[:, 5:6] = new
    q = (x * 2).view(B, 1, HQ, D).transpose(1, 2)
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    seen = mask[:, :, :, : k.shape[2]].expand(B, 1, 1, k.shape[2])
    return sparse(q, k, v, index, basis, seen)


def growing_cache_step(x, k_cache, v_cache, index, new, basis, mask):
    """A decode step over a (B, Hkv, T, D) cache that grows by concatenation."""
    q = (x * 2).view(B, 1, HQ, D).transpose(1, 2)
    k, v = torch.cat((k_cache, new), 2), torch.cat((v_cache, new + 1), 2)
    rows, scale = index
    new_rows, new_scale = index_rows(new, basis, torch.int8)
    rows, scale = torch.cat((rows, new_rows), 2), torch.cat((scale, new_scale), 2)
    seen = mask[:, :, :, : k.shape[2]].expand(B, HQ, 1, k.shape[2])
    return *sparse(q, k, v, (rows, scale), basis, seen), k, v, rows


def sparse(q, k, v, index, basis, mask):
    positions = select(q, basis, *index, mask, mask_bounds(mask), **SELECT)
    return attend(q, k, v, positions, mask, scale=0.3), positions


@pytest.mark.parametrize("step", [static_cache_step, growing_cache_step])
def test_inductor_hands_caches_over_as_they_are(step):
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="inductor", dynamic=True, fullgraph=True)
    basis = torch.randn(HKV, D, R)
    for t in (40, 53):
        heads_last = step is static_cache_step
        shape = (B, t, HKV, D) if heads_last else (B, HKV, t, D)
        k_cache, v_cache = torch.randn(shape), torch.randn(shape)
        new = torch.randn(B, 1, HKV, D) if heads_last else torch.randn(B, HKV, 1, D)
        index = index_rows(torch.randn(B, HKV, t, D), basis, torch.int8)
        args = (torch.randn(B, 1, HQ * D), k_cache, v_cache, index, new, basis)
        mask = torch.rand(B, 1, 1, 100) > 0.3
        expected = step(*(a.clone() if a is k_cache else a for a in args), mask)
        selects, attends = [], []
        with recorded("select", selects), recorded("attend", attends):
            found = compiled(*args, mask)
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0])
        (_, _, rows, *_), (q, k, v, _, seen) = selects[0][0], attends[0][0]
        if heads_last:
            assert k.data_ptr() == k_cache.data_ptr() and v.data_ptr() == v_cache.data_ptr()
            assert rows.data_ptr() == index[0].data_ptr()
            assert k.stride() == k_cache.transpose(1, 2).stride()
            assert seen.data_ptr() == mask.data_ptr()
        else:
            assert [k.data_ptr(), v.data_ptr(), rows.data_ptr()] == [
                tensor.data_ptr() for tensor in found[2:]
            ]
        assert q.stride(-1) == 1


def test_code_that_inductor_stored_for_other_schemas_is_not_found_again():
    gm = torch.fx.symbolic_trace(lambda q: q + 1)
    key = torch._inductor.codecache.FxGraphHashDetails(gm, [], {}, []).cache_key_tag
    assert f"loki-{zlib.crc32(''.join(SCHEMAS).encode()):08x}" in key


# ---- what is refused ---------------------------------------------------------------------------

SEEN = torch.ones(B, 1, S, T, dtype=torch.bool)
PER_HEAD_MASK = torch.ones(B, HQ, S, T, dtype=torch.bool)
BAD_SELECT = {
    "rank of q is 3 (shape (6, 3, 24)); allowed: 4": {"q": torch.ones(HQ, S, D)},
    "q dtype is torch.float64; allowed: bfloat16": {"q": torch.ones(B, HQ, S, D).double()},
    "strides of q is (432, 72, 1, 3); allowed: 1 in the last dim": {
        "q": torch.ones(B, HQ, D, S).transpose(2, 3)
    },
    "batch of index is 1; allowed: batch of q, 2": {"index": torch.ones(1, HKV, T, R)},
    "KV heads of index is 4; allowed: a divisor of the 6": {"index": torch.ones(B, 4, T, R)},
    "sizes (B, S, T, R) is (2, 3, 0, 8); allowed: 1": {"index": torch.ones(B, HKV, 0, R)},
    "index dtype is torch.int16; allowed": {"index": torch.ones(B, HKV, T, R).short()},
    "basis is ((2, 24, 7), torch.float32); allowed: shape (Hkv, D, R) = (2, 24, 8)": {
        "basis": torch.ones(HKV, D, R - 1)
    },
    "basis is ((2, 24, 8), torch.float64)": {"basis": torch.ones(HKV, D, R).double()},
    "strides of index is (592, 296, 1, 37)": {"index": torch.ones(B, HKV, R, T).mT},
    "index_scale is None; allowed: a tensor, since index is int8": {
        "index": torch.ones(B, HKV, T, R).char()
    },
    "index_scale is a tensor; allowed: None": {"index_scale": torch.ones(B, HKV, T, 1)},
    "index_scale is ((2, 2, 36, 1), torch.float32); allowed: shape (B, Hkv, T, 1)": {
        "index": torch.ones(B, HKV, T, R).char(),
        "index_scale": torch.ones(B, HKV, T - 1, 1),
    },
    "(mask, bounds) is ('a mask', 'None'); allowed: both or neither": {"mask": SEEN},
    "rank of mask is 2; allowed: 4": {"mask": SEEN[0, 0], "bounds": mask_bounds(SEEN)},
    "shape of mask is (2, 1, 3, 36); allowed: (B, Hq, S, T) = (2, 6, 3, 37)": {
        "mask": SEEN[..., 1:],
        "bounds": mask_bounds(SEEN),
    },
    "mask dtype is torch.int64; allowed: bool": {
        "mask": SEEN.long(),
        "bounds": mask_bounds(SEEN),
    },
    "heads of mask is 6; allowed: 1 unless per_head=True": {
        "mask": PER_HEAD_MASK,
        "bounds": mask_bounds(PER_HEAD_MASK),
    },
    "bounds is ((2, 1, 1, 3), torch.int32); allowed: shape (2, 1, 3, 3), int32: mask_bounds": {
        "mask": SEEN,
        "bounds": mask_bounds(SEEN[:, :, :1]),
    },
    "top_k is 0; allowed: None, or at least 1": {"top_k": 0},
    "(budgets, slots) is ('a tensor', None); allowed: both or neither": {
        "budgets": torch.ones(B, HKV, S, 2).int()
    },
    "shape of budgets is (2, 2, 3, 3); allowed: (B, heads, S, 2) = (2, 2, 3, 2)": {
        "budgets": torch.ones(B, HKV, S, 3).int(), "slots": 9
    },
    "budgets dtype is torch.int64; allowed: int32": {
        "budgets": torch.ones(B, HKV, S, 2).long(), "slots": 9
    },
    "slots is 0; allowed: at least 1": {"budgets": torch.ones(B, 1, 1, 2).int(), "slots": 0},
    "mass is 0.5; allowed: 0 where rows have budgets": {
        "budgets": torch.ones(1, 1, 1, 2).int(), "slots": 9, "mass": 0.5
    },
    "keep_q16 is 65537; allowed: 1 to 65536": {"keep_q16": 65537},
    "(sink, recent, min_keys) is (-1, 2, 0); allowed: 0 or more": {"sink": -1},
    "(sink, recent, min_keys) is (1, 2, -5); allowed: 0 or more": {"min_keys": -5},
    "page is 0; allowed: the keys of a page, or 1": {"page": 0},
    "keys is None with page=8; allowed: the number of keys where page > 1": {**PAGED, "keys": None},
    "keys is 37 with page=1; allowed: the number of keys where page > 1": {"keys": T},
    "basis is a tensor with page=8; allowed: None: pages hold": {
        **PAGED, "basis": torch.ones(HKV, D, R),
    },
    "index_scale is a tensor; allowed: None, since there is no basis": {
        **EXACT, "index_scale": torch.ones(B, HKV, T, 1),
    },
    "index is ((2, 2, 37, 8), torch.float32); allowed: (B, Hkv, T, D), D = 24": {"basis": None},
    "index is ((2, 2, 37, 24), torch.int8); allowed: (B, Hkv, T, D), D = 24, bfloat16": {
        "basis": None, "index": torch.ones(B, HKV, T, D, dtype=torch.int8),
    },
    "index is ((2, 2, 4, 48), torch.float32); allowed: (B, Hkv, P >= 5, 2 D), D = 24": {
        **PAGED, "index": torch.ones(B, HKV, 4, 2 * D),
    },
    "index is ((2, 2, 5, 24), torch.float32); allowed: (B, Hkv, P >= 5, 2 D), D = 24": {
        **PAGED, "index": torch.ones(B, HKV, 5, D),
    },
    "shape of mask is (2, 1, 3, 5); allowed: (B, Hq, S, T) = (2, 6, 3, 37)": {
        **PAGED, "mask": SEEN[..., :5], "bounds": mask_bounds(SEEN[..., :5]),
    },
    "by_probability is True; allowed: False with per_head=True": {
        "per_head": True, "by_probability": True,
    },
}  # fmt: skip
BAD_PAGES = {
    "page is 1; allowed: 2 or more": (page_args(), 1),
    "keys dtype is torch.float64; allowed: bfloat16": (
        (page_args()[0], page_args()[1].double(), page_args()[2]), PAGE,
    ),
    "pages is ((2, 2, 4, 48), torch.float32); allowed: (2, 2, at least 5, 48)": (
        page_args(4), PAGE,
    ),
    "pages is ((2, 2, 5, 48), torch.bfloat16); allowed: (2, 2, at least 5, 48), torch.float32": (
        (page_args()[0].bfloat16(), *page_args()[1:]), PAGE,
    ),
    "shape of written is (2, 1, 36, 1); allowed: broadcastable to (B, Hkv, T, 1)": (
        (*page_args()[:2], page_args()[2][:, :, 1:]), PAGE,
    ),
    "written dtype is torch.int64; allowed: bool or uint8": (
        (*page_args()[:2], page_args()[2].long()), PAGE,
    ),
}  # fmt: skip
BAD_ATTEND = {
    "rank of k is 3": {"k": torch.ones(HKV, T, D)},
    "q dtype is torch.float64": {"q": torch.ones(B, HQ, S, D).double()},
    "dtypes of (k, v) is (torch.float64, torch.float32); allowed: each bfloat16": {
        "k": torch.ones(B, HKV, T, D).double()
    },
    "shape of k is (2, 4, 37, 24); allowed: (B, Hkv, T, D) with B = 2, D = 24": {
        "k": torch.ones(B, 4, T, D),
        "v": torch.ones(B, 4, T, DV),
        "positions": torch.zeros(B, 4, S, K, dtype=torch.int32),
    },
    "k_pe is ((2, 2, 36, 8), torch.float32); allowed: (B, Hkv, T, dims) with (2, 2, 37)": {
        "k": torch.ones(B, HKV, T, D - 8),
        "k_pe": torch.ones(B, HKV, T - 1, 8),
    },
    "shape of k is (2, 2, 37, 24); allowed: (B, Hkv, T, D) with B = 2, D = 16": {
        "k_pe": torch.ones(B, HKV, T, 8),
    },
    "strides of k_pe is": {
        "k": torch.ones(B, HKV, T, D - 8),
        "k_pe": torch.ones(B, HKV, 8, T).mT,
    },
    "shape of v is (2, 2, 36, 16); allowed: (2, 2, 37) and Dv": {"v": torch.ones(B, HKV, 36, DV)},
    "sizes (B, S, T, D, Dv) is (2, 3, 37, 24, 0)": {"v": torch.ones(B, HKV, T, 0)},
    "strides of v is (1184, 592, 1, 37)": {"v": torch.ones(B, HKV, DV, T).mT},
    "positions dtype is torch.int64; allowed: int32": {
        "positions": torch.zeros(B, HKV, S, K, dtype=torch.int64)
    },
    "shape of positions is (2, 3, 3, 11); allowed: (B, Hkv or Hq, S, K) = (2, 2 or 6, 3": {
        "positions": torch.zeros(B, 3, S, K, dtype=torch.int32)
    },
    "shape of mask is (2, 1, 3, 36)": {"mask": SEEN[..., 1:]},
    "softcap is -1.0; allowed: 0 (none) or a positive number": {"softcap": -1.0},
    "sink_logits is ((2,), torch.float32); allowed: shape (Hq,) = (6,)": {
        "sink_logits": torch.ones(HKV)
    },
}


@pytest.mark.parametrize("found", BAD_SELECT)
def test_select_says_what_it_found_and_what_it_takes(found):
    with pytest.raises(ValueError, match="loki::select: .*" + re.escape(found)):
        select(**select_args(**BAD_SELECT[found]))


@pytest.mark.parametrize("found", BAD_PAGES)
def test_the_page_ops_say_what_they_found_and_what_they_take(found):
    tensors, page = BAD_PAGES[found]
    with pytest.raises(ValueError, match="loki::update_pages: .*" + re.escape(found)):
        update_pages(*tensors, page=page)


def test_pages_do_not_shrink():
    with pytest.raises(ValueError, match=r"loki::extend_pages: pages is .* \(2, 2, up to 5, 48\)"):
        extend_pages(*page_args(6), page=PAGE)


@pytest.mark.parametrize("found", BAD_ATTEND)
def test_attend_says_what_it_found_and_what_it_takes(found):
    with pytest.raises(ValueError, match="loki::attend: .*" + re.escape(found)):
        attend(**attend_args(**BAD_ATTEND[found]))


@pytest.mark.parametrize(
    "found", [f for f, changes in BAD_ATTEND.items() if "positions" not in changes]
)
def test_attention_says_what_it_found_and_what_it_takes(found):
    args = attend_args(**BAD_ATTEND[found])
    del args["positions"]
    with pytest.raises(ValueError, match="loki::attention: .*" + re.escape(found)):
        attention(**args)


@pytest.mark.parametrize(
    "ranges, found",
    [
        (RANGES.long(), "ranges dtype is torch.int64"),
        (RANGES[..., :3], "shape of ranges"),
        (RANGES.expand(3 * B, HKV, 1, 4), "shape of ranges"),
        (RANGES[0], "rank of ranges is 3"),
        (RANGES.repeat(1, 1, 1, 2)[..., ::2], "strides of ranges"),
    ],
)
def test_attention_says_what_is_wrong_with_ranges(ranges, found):
    args = attend_args()
    del args["positions"]
    with pytest.raises(ValueError, match="loki::attention: " + found + ".*allowed"):
        attention(**args, ranges=ranges)


def test_tensors_on_two_devices_are_refused():
    from loki_compile.kernels.checks import check_attend

    args = attend_args(k=torch.ones(B, HKV, T, D, device="meta"))
    args.pop("scale")
    with pytest.raises(ValueError, match="device of k is meta; allowed: that of q, cpu"):
        check_attend(**args, softcap=0.0, sink_logits=None)


def test_a_mask_expanded_over_heads_may_be_shared():
    mask = (torch.rand(B, 1, S, T) > 0.3).expand(B, HQ, S, T)
    args = select_args(mask=mask, bounds=mask_bounds(mask))
    assert torch.equal(select(**args), reference.select(**args))
