"""What `loki::select` ranks by, on a GPU.

Either tiles of scores on the tensor cores, which the launches of `triton_select` make where they
need them and never write: the best of a group against a low-rank index or against the keys. Or
scores written to memory first (`score_kernel`): those of pages, few as they are; and those of each
head where a group chooses by probability, which `mass_kernel` and `sum_kernel` make one of.

Legend as in `triton_select`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from loki_compile.kernels.triton_launch import (
    ADDITIVE_MASK,
    BOOL_MASK,
    NO_MASK,
    row_coordinates,
)

# Where the launches of `triton_select` find scores: in tiles that they make; in memory, the best of
# a group; in memory, the logarithms of its probabilities.
TILES = tl.constexpr(0)
BEST = tl.constexpr(1)
PROBABILITIES = tl.constexpr(2)

# Ordered keys: int32 that sort as the scores do. No score at all maps to these two.
FORCED = tl.constexpr(0x7FFFFFFF)
HIDDEN = tl.constexpr(-0x80000000)

INT8_DIGIT = tl.constexpr(256)
INT8_LEVELS = tl.constexpr(127 * 256)
INT8_RANK_MAX = 512  # INT8_LEVELS * 127 * 512 < 2**31

RUNTIME_SIZES = [
    "S", "T", "H", "splits", "slots", "top_k", "keep_q16", "sink", "recent", "min_keys",
    "q_sb", "q_sh", "q_ss", "basis_sb", "basis_sh", "basis_sd",
    "index_sb", "index_sh", "index_st", "index_scale_sb", "index_scale_sh", "index_scale_st",
    "mask_sb", "mask_sh", "mask_ss", "mask_st", "bounds_sb", "bounds_sh", "bounds_ss",
    "budgets_sb", "budgets_sh", "budgets_ss",
]  # fmt: skip


@triton.jit
def ordered(score):
    """int32 that orders as the fp32 score does; NaN as -inf, -0 as 0."""
    score = tl.where(score == score, score + 0.0, float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(key):
    """The fp32 score of an ordered key; NaN of HIDDEN and of FORCED."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(key, most):
    """exp(score - most) of ordered keys; 0 where that is hidden, forced or infinite, or `most` is
    -inf."""
    score = score_of(key)
    counts = (score < float("inf")) & (score > float("-inf"))
    return tl.where(counts, tl.exp(tl.where(counts, score - most, float("-inf"))), 0.0)


@triton.jit
def load_digits(
    p_high, p_low, p_source, first,
    BLOCK_R: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, LOW: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Digits (PACK * BLOCK_R, PACK * HEADS) of the query heads from `first` on: PACK equal blocks
    on the diagonal, so that one row of the other operand holds PACK keys."""
    o_n = tl.arange(0, PACK * HEADS)
    o_k = tl.arange(0, PACK * BLOCK_R)
    source = tl.load(p_source + first + o_n % HEADS)
    o = source[:, None] * BLOCK_R + (o_k % BLOCK_R)[None, :]
    m = (o_n // HEADS)[:, None] == (o_k // BLOCK_R)[None, :]
    high = tl.trans(tl.load(p_high + o, mask=m, other=0)).to(DOT)
    low = high
    if LOW:
        low = tl.trans(tl.load(p_low + o, mask=m, other=0)).to(DOT)
    return high, low


@triton.jit
def _group_best(
    tile, high, low, BLOCK_T: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr,
    LOW: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Best score of each key over the heads of `high`: (BLOCK_T) fp32, in units of the row."""
    if INT8:
        score = tl.dot(tile, high, out_dtype=tl.int32)
        score = tl.dot(tile, low, acc=score * INT8_DIGIT, out_dtype=tl.int32)
    else:
        score = tl.dot(tile, high, input_precision="ieee")
        if LOW:
            # An infinite key gives inf * 0 in the tail: the head alone has its true sign.
            tail = tl.dot(tile, low, input_precision="ieee")
            score += tl.where(tl.abs(tail) < float("inf"), tail, 0.0)
        score = tl.where(score == score, score, float("-inf"))
    if HEADS > 1:
        score = tl.max(tl.reshape(score, (BLOCK_T // PACK, PACK, HEADS)), 2)
    return tl.reshape(score, (BLOCK_T,)).to(tl.float32)


@triton.jit
def _tile_best(
    at, begin, stop, unit, high, low, p_index, p_index_scale, p_high, p_low, p_source,
    index_st, index_scale_st,
    R: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    PACK: tl.constexpr, LOW: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Best score of each of the positions `at` < stop over the group: (BLOCK_T) fp32.

    Arguments as of `tile_keys`.
    """
    o_k = tl.arange(0, PACK * BLOCK_R)
    if PACK == 1:
        at_tile = at[:, None]
    else:
        o_t = tl.arange(0, BLOCK_T // PACK) * PACK
        at_tile = begin + o_t[:, None] + (o_k // BLOCK_R)[None, :]
    # Read once: the scratch that the next launch needs has more use for the cache.
    tile = tl.load(
        p_index + at_tile.to(tl.int64) * index_st + (o_k % BLOCK_R)[None, :],
        mask=(at_tile < stop) & (o_k % BLOCK_R < R)[None, :],
        other=0, eviction_policy="evict_first",
    ).to(DOT)  # fmt: skip
    best = _group_best(tile, high, low, BLOCK_T, HEADS, PACK, LOW, INT8)
    for first in tl.static_range(HEADS, GROUP, HEADS):
        more_high, more_low = load_digits(
            p_high, p_low, p_source, first, BLOCK_R, HEADS, 1, LOW, DOT
        )
        more = _group_best(tile, more_high, more_low, BLOCK_T, HEADS, 1, LOW, INT8)
        best = tl.maximum(best, more)
    if INT8:
        best *= tl.load(p_index_scale + at.to(tl.int64) * index_scale_st, mask=at < stop, other=0.0)
    best *= unit
    return best


@triton.jit
def tile_keys(
    at, begin, stop, read_until, unit, high, low,
    p_index, p_index_scale, p_mask, p_high, p_low, p_source, p_score,
    index_st, index_scale_st, mask_st, hidden_below,
    R: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    PACK: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr, INT8: tl.constexpr,
    DOT: tl.constexpr, BLOCK_T: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """Ordered keys (HIDDEN where not visible) of the positions `at` < stop of one row.

    With PACK > 1 the positions are begin, begin + 1, ... Pointers are those of the row; high and
    low hold its first HEADS query heads.
    """
    inside = at < stop
    if SCORED == TILES:
        best = _tile_best(
            at, begin, stop, unit, high, low, p_index, p_index_scale, p_high, p_low, p_source,
            index_st, index_scale_st,
            R, BLOCK_R, GROUP, HEADS, PACK, LOW, INT8, DOT, BLOCK_T,
        )  # fmt: skip
    else:
        best = tl.load(p_score + at, mask=inside, other=float("-inf"))
    at = at.to(tl.int64)
    if MASK == ADDITIVE_MASK:
        bias = tl.load(p_mask + at * mask_st, mask=inside, other=float("-inf")).to(tl.float32)
        if SCORED != PROBABILITIES:  # they have it in them
            best += bias
        return tl.where(bias > hidden_below, ordered(best), HIDDEN)
    if MASK == BOOL_MASK:
        # A window without holes is visible throughout: its mask is not read.
        seen = tl.load(p_mask + at * mask_st, mask=inside & (at < read_until), other=1) != 0
        return tl.where(seen, ordered(best), HIDDEN)
    return ordered(best)


@triton.jit
def _low_rank(
    p_q, p_basis, first, q_sh, basis_sd,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """q @ basis of CHUNK query heads from `first` on: (CHUNK, BLOCK_R) fp32.

    q itself where there is no basis: BLOCK_D is 0 then, and p_basis is not read.
    """
    o_h = first + tl.arange(0, CHUNK)
    o_r = tl.arange(0, BLOCK_R)
    if BLOCK_D == 0:
        low_rank = tl.load(
            p_q + o_h.to(tl.int64)[:, None] * q_sh + o_r[None, :],
            mask=(o_h < GROUP)[:, None] & (o_r < R)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    else:
        low_rank = tl.zeros((CHUNK, BLOCK_R), tl.float32)
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            q = tl.load(
                p_q + o_h.to(tl.int64)[:, None] * q_sh + o_d[None, :],
                mask=(o_h < GROUP)[:, None] & (o_d < D)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            basis = tl.load(
                p_basis + o_d[:, None] * basis_sd + o_r[None, :],
                mask=(o_d < D)[:, None] & (o_r < R)[None, :], other=0.0,
            )  # fmt: skip
            low_rank = tl.dot(q, basis, acc=low_rank, input_precision="ieee")
    return low_rank


@triton.jit
def project(
    p_q, p_basis, p_high, p_low, p_source, q_sh, basis_sd, scale,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHUNK: tl.constexpr,
    LOW: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Write the digits of the row's GROUP query heads; returns the unit they are counted in.

    Columns without a head of their own (padding, or a projection that is not finite) point to the
    first finite head, which leaves the maximum over the group as it is. The unit is NaN if there
    is none.
    """
    unit = 0.0
    a_head = GROUP
    low_rank = tl.zeros((CHUNK, BLOCK_R), tl.float32)
    for first in range(0, GROUP, CHUNK):
        low_rank = _low_rank(
            p_q, p_basis, first, q_sh, basis_sd, D, R, BLOCK_D, BLOCK_R, GROUP, CHUNK
        )
        o_h = first + tl.arange(0, CHUNK)
        usable = (tl.sum(low_rank * 0.0, 1) == 0.0) & (o_h < GROUP)
        largest = tl.max(tl.where(usable[:, None], tl.abs(low_rank), 0.0), 1)
        unit = tl.maximum(unit, tl.max(largest, 0))
        a_head = tl.minimum(a_head, tl.min(tl.where(usable, o_h, GROUP), 0))
    divisor = tl.where(unit > 0, unit, 1.0)
    for first in range(0, GROUP_PAD, CHUNK):
        if GROUP_PAD > CHUNK:
            low_rank = _low_rank(
                p_q, p_basis, first, q_sh, basis_sd, D, R, BLOCK_D, BLOCK_R, GROUP, CHUNK
            )
        o_h = first + tl.arange(0, CHUNK)
        usable = (tl.sum(low_rank * 0.0, 1) == 0.0) & (o_h < GROUP)
        tl.store(p_source + o_h, tl.where(usable, o_h, a_head % GROUP))
        share = tl.where(usable[:, None], low_rank, 0.0) / divisor
        o = o_h[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        if INT8:
            level = tl.floor(share * INT8_LEVELS + 0.5)
            high = tl.floor((level + INT8_DIGIT // 2) / INT8_DIGIT)
            tl.store(p_high + o, high.to(tl.int8))
            tl.store(p_low + o, (level - high * INT8_DIGIT).to(tl.int8))
        else:
            high = share.to(p_high.dtype.element_ty)
            tl.store(p_high + o, high)
            if LOW:
                tl.store(p_low + o, (share - high.to(tl.float32)).to(p_low.dtype.element_ty))
    unit *= scale
    if INT8:
        unit /= INT8_LEVELS
    return tl.where(a_head < GROUP, unit, float("nan"))


# ------------------------------------------------------------- scores that are written to memory


@triton.jit
def window(p_bounds, T, MASK: tl.constexpr):
    """(start, end, count): where the visible keys of a row lie, and how many they are."""
    start = 0
    end = T
    count = T
    if MASK != NO_MASK:
        start = tl.maximum(tl.load(p_bounds), 0)
        end = tl.minimum(tl.load(p_bounds + 1), T)
        count = tl.minimum(tl.maximum(tl.load(p_bounds + 2), 0), tl.maximum(end - start, 0))
        start = tl.where(count > 0, start, 0)
        end = tl.where(count > 0, end, 0)
    return start, end, count


@triton.jit
def _part(first, last, i_part, splits, BLOCK: tl.constexpr):
    """[begin, stop) of part i_part of [first, last), whole blocks of it."""
    chunk = tl.cdiv(tl.cdiv(last - first, splits), BLOCK) * BLOCK
    begin = first + tl.minimum(i_part * chunk, last - first)
    return begin, tl.minimum(begin + chunk, last)


@triton.jit
def _score_tile(
    first, start, end, stop, p_q, p_index, p_index_scale, p_mask, p_score,
    q_sh, index_st, index_scale_st, mask_st, stride, scale, hidden_below, o_r, o_j,
    R: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr,
    INT8: tl.constexpr, EACH: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_P rows of the index from `first` on, of keys in [start, end)."""
    o_p = first + tl.arange(0, BLOCK_P)
    p_rows = p_index + o_p.to(tl.int64)[:, None] * (index_st * ALIGN) + o_r[None, :]
    m = (o_p < stop)[:, None] & (o_r < R)[None, :]
    row = tl.load(p_rows, mask=m, other=0).to(tl.float32)
    high = row
    if PAGE > 1:
        high = tl.load(p_rows + R, mask=m, other=0).to(tl.float32)
    at = o_p[:, None] * PAGE + o_j[None, :]
    inside = (at >= start) & (at < end) & (o_j < PAGE)[None, :] & (o_p < stop)[:, None]
    row_scale = tl.full((BLOCK_P,), scale, tl.float32)
    if INT8:
        row_scale *= tl.load(
            p_index_scale + o_p.to(tl.int64) * index_scale_st, mask=o_p < stop, other=0.0
        )
    bias = tl.zeros((BLOCK_P, PAGE_PAD), tl.float32)
    seen = inside
    if EACH:
        if MASK == BOOL_MASK:
            seen = tl.load(p_mask + at.to(tl.int64) * mask_st, mask=inside, other=0) != 0
        if MASK == ADDITIVE_MASK:
            bias = tl.load(p_mask + at.to(tl.int64) * mask_st, mask=inside, other=float("-inf"))
            bias = bias.to(tl.float32)
            seen = bias > hidden_below
    best = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    for g in range(GROUP):
        q = tl.load(p_q + g * q_sh + o_r, mask=o_r < R, other=0.0).to(tl.float32)[None, :]
        product = q * row
        if PAGE > 1:
            product = tl.maximum(product, q * high, propagate_nan=tl.PropagateNan.ALL)
        score = tl.sum(product, 1) * row_scale
        score = tl.where(score == score, score, float("-inf"))
        if EACH:
            logit = score[:, None] + bias
            logit = tl.where(logit == logit, logit, float("-inf"))
            logit = tl.where(seen, logit, float("nan"))
            tl.store(p_score + g * stride + at, logit, mask=inside)
        else:
            best = tl.maximum(best, score)
    if not EACH:
        tl.store(p_score + at, best[:, None] + bias, mask=inside)


@triton.jit
def _ranks_nothing(
    p_budgets, i_b, i_h, i_s, budgets_sb, budgets_sh, budgets_ss, sink, IDLE: tl.constexpr
):  # fmt: skip
    """Whether a row's budget is what it always chooses, where some may be (IDLE)."""
    idle = False
    if IDLE:
        p_budgets += i_b * budgets_sb + i_h * budgets_sh + i_s * budgets_ss
        idle = tl.load(p_budgets) <= tl.load(p_budgets + 1) + sink
    return idle


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=["p_mask", "p_bounds"])
def score_kernel(
    p_q, p_index, p_index_scale, p_mask, p_bounds, p_score,
    q_sb, q_sh, q_ss, index_sb, index_sh, index_st,
    index_scale_sb, index_scale_sh, index_scale_st,
    mask_sb, mask_sh, mask_ss, mask_st, bounds_sb, bounds_sh, bounds_ss,
    H, S, T, scale, hidden_below, splits, p_budgets, budgets_sb, budgets_sh, budgets_ss, sink,
    R: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, ROWS_PER_KV: tl.constexpr,
    ALIGN: tl.constexpr, MASK: tl.constexpr, INT8: tl.constexpr, EACH: tl.constexpr,
    PAGE: tl.constexpr, PAGE_PAD: tl.constexpr, BLOCK_P: tl.constexpr, IDLE: tl.constexpr,
):  # fmt: skip
    """Scores of one part of one row's window, from rows of the index that are PAGE keys each; grid
    (rows, splits).

    EACH: those of each of the GROUP heads, with what an additive mask adds; NaN for a hidden key.
    Else the best over the heads, without it. q has the R dims of the index, or of a page's bounds.
    IDLE: rows that rank nothing by `budgets` have no scores.
    """
    i_row, i_b, i_h, i_s, i_kv = row_coordinates(tl.program_id(0), H, S, ROWS_PER_KV)
    if _ranks_nothing(
        p_budgets, i_b, i_h, i_s, budgets_sb, budgets_sh, budgets_ss, sink, IDLE
    ):  # fmt: skip
        return
    if MASK != NO_MASK:
        p_mask += i_b * mask_sb + i_h * GROUP * mask_sh + i_s * mask_ss
        p_bounds += i_b * bounds_sb + i_h * GROUP * bounds_sh + i_s * bounds_ss
    start, end, _ = window(p_bounds, T, MASK)
    begin, stop = _part(start // PAGE, tl.cdiv(end, PAGE), tl.program_id(1), splits, BLOCK_P)
    stride = tl.cdiv(T, 16) * 16
    p_score += i_row * (GROUP if EACH else 1) * stride
    p_q += i_b * q_sb + i_h * GROUP * q_sh + i_s * q_ss
    p_index += i_b * (index_sb * ALIGN) + i_kv * (index_sh * ALIGN)
    if INT8:
        p_index_scale += i_b * index_scale_sb + i_kv * index_scale_sh
    o_r = tl.arange(0, BLOCK_R)
    o_j = tl.arange(0, PAGE_PAD)
    for first in range(begin, stop, BLOCK_P):
        _score_tile(
            first, start, end, stop, p_q, p_index, p_index_scale, p_mask, p_score,
            q_sh, index_st, index_scale_st, mask_st, stride, scale, hidden_below, o_r, o_j,
            R, ALIGN, GROUP, MASK, INT8, EACH, PAGE, PAGE_PAD, BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=["p_bounds"])
def mass_kernel(
    p_logit, p_bounds, p_mass, bounds_sb, bounds_sh, bounds_ss, H, S, T,
    p_budgets, budgets_sb, budgets_sh, budgets_ss, sink,
    GROUP: tl.constexpr, ROWS_PER_KV: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
    IDLE: tl.constexpr,
):  # fmt: skip
    """log of the sum of exp over the finite logits of one head of one row; grid (rows, GROUP)."""
    i_row, i_b, i_h, i_s, _ = row_coordinates(tl.program_id(0), H, S, ROWS_PER_KV)
    if _ranks_nothing(
        p_budgets, i_b, i_h, i_s, budgets_sb, budgets_sh, budgets_ss, sink, IDLE
    ):  # fmt: skip
        return
    i_g = tl.program_id(1)
    if MASK != NO_MASK:
        p_bounds += i_b * bounds_sb + i_h * GROUP * bounds_sh + i_s * bounds_ss
    start, end, _ = window(p_bounds, T, MASK)
    p_logit += (i_row * GROUP + i_g) * (tl.cdiv(T, 16) * 16)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        o = first + tl.arange(0, BLOCK)
        logit = tl.load(p_logit + o, mask=o < end, other=float("-inf"))
        logit = tl.where(logit < float("inf"), logit, float("-inf"))  # NaN is hidden
        higher = tl.maximum(most, logit)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - base) + tl.exp(logit - base)
        most = higher
    highest = tl.max(most, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.sum(total * tl.exp(most - base), 0)
    # 0 where no logit counts: those that are infinite then rank as they are.
    log_mass = tl.where(highest == float("-inf"), 0.0, base + tl.log(mass))
    tl.store(p_mass + i_row * GROUP + i_g, log_mass)


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=["p_bounds"])
def sum_kernel(
    p_logit, p_bounds, p_mass, p_score, bounds_sb, bounds_sh, bounds_ss, H, S, T, splits,
    p_budgets, budgets_sb, budgets_sh, budgets_ss, sink,
    GROUP: tl.constexpr, ROWS_PER_KV: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
    IDLE: tl.constexpr,
):  # fmt: skip
    """log of the sum of the heads' probabilities, of one part of one row; grid (rows, splits)."""
    i_row, i_b, i_h, i_s, _ = row_coordinates(tl.program_id(0), H, S, ROWS_PER_KV)
    if _ranks_nothing(
        p_budgets, i_b, i_h, i_s, budgets_sb, budgets_sh, budgets_ss, sink, IDLE
    ):  # fmt: skip
        return
    if MASK != NO_MASK:
        p_bounds += i_b * bounds_sb + i_h * GROUP * bounds_sh + i_s * bounds_ss
    start, end, _ = window(p_bounds, T, MASK)
    begin, stop = _part(start, end, tl.program_id(1), splits, BLOCK)
    stride = tl.cdiv(T, 16) * 16
    p_logit += i_row * GROUP * stride
    p_score += i_row * stride
    p_mass += i_row * GROUP
    for first in range(begin, stop, BLOCK):
        o = first + tl.arange(0, BLOCK)
        inside = o < stop
        most = tl.full((BLOCK,), float("-inf"), tl.float32)
        for g in range(GROUP):
            logit = tl.load(p_logit + g * stride + o, mask=inside, other=float("-inf"))
            most = tl.maximum(most, logit - tl.load(p_mass + g))
        finite = tl.abs(most) < float("inf")
        base = tl.where(finite, most, 0.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for g in range(GROUP):
            logit = tl.load(p_logit + g * stride + o, mask=inside, other=float("-inf"))
            total += tl.exp(logit - tl.load(p_mass + g) - base)
        tl.store(p_score + o, tl.where(finite, base + tl.log(total), most), mask=inside)
