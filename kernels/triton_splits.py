"""The kernels of the two launches of `triton_attend`: attend, combine. Legend as there."""

from __future__ import annotations

import triton
import triton.language as tl
from loki_compile.kernels.triton_launch import BOOL_MASK, NO_MASK, row_coordinates
from loki_compile.kernels.triton_ranges import parts_of_row, ranges_at, row_of_part, tiles_of_part

LOG2_E = tl.constexpr(1.4426950408889634)
SPLITS_MAX = tl.constexpr(64)
FIRSTS_BLOCK = tl.constexpr(128)
COMBINE_DV = tl.constexpr(64)


@triton.jit
def _weight(logit, largest):
    """exp(logit - largest), 0 where logit is -inf, whatever `largest` is."""
    # The difference before the factor: finfo.min * log2(e) would overflow.
    return tl.exp2((logit - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)


@triton.jit
def _soft_cap(logit, softcap):
    """softcap * tanh(logit / softcap)."""
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(logit * (2.0 * LOG2_E) / softcap)))


@triton.jit
def _used_tiles(p_positions, K, T, BLOCK_N: tl.constexpr):
    """Tiles up to the last one that begins with a position."""
    tiles = tl.cdiv(K, BLOCK_N)
    used = 0
    for first in range(0, tiles, FIRSTS_BLOCK):
        o = first + tl.arange(0, FIRSTS_BLOCK)
        at = tl.load(p_positions + o.to(tl.int64) * BLOCK_N, mask=o < tiles, other=-1)
        used = tl.maximum(used, tl.max(tl.where((at >= 0) & (at < T), o + 1, 0), 0))
    return used


@triton.jit
def _finish(acc, largest, total, sink):
    """Output rows from their accumulator, largest logit, sum of weights and sink logit."""
    top = tl.maximum(largest, sink)
    total = total * _weight(largest, top) + _weight(sink, top)
    scale = _weight(largest, top) / tl.where(total == 0.0, 1.0, total)
    return acc * scale[:, None]


@triton.jit
def _visible(
    p_mask, at, inside, o_h, o_s, m_g, head, token, mask_sh, mask_ss, mask_st,
    MASK: tl.constexpr, HEAD_MASK: tl.constexpr,
):  # fmt: skip
    """(seen, added, inside) of keys `at`: which of them the heads see, what is added to their
    logits, which are read. By each head and token, or by `head` and `token` for all of them."""
    HIDDEN: tl.constexpr = 0 if MASK == BOOL_MASK else float("-inf")
    if HEAD_MASK:
        o_mask = (o_h * mask_sh + o_s * mask_ss)[:, None] + at[None, :] * mask_st
        added = tl.load(p_mask + o_mask, mask=inside[None, :] & m_g[:, None], other=HIDDEN)
    else:
        o_mask = head * mask_sh + token * mask_ss + at * mask_st
        added = tl.load(p_mask + o_mask, mask=inside, other=HIDDEN)[None, :]
    if MASK == BOOL_MASK:
        seen = added != 0
        added = 0.0
    else:
        added = added.to(tl.float32)
        seen = added != float("-inf")
    # A key that no head sees is not read: in the product, 0 * NaN would be NaN.
    return seen, added, tl.max(seen.to(tl.int32), 0) != 0


@triton.jit
def _store_partial(
    p_largest, p_total, p_acc, o, largest, total, acc, m_g, o_dv, any_tile, DV: tl.constexpr
):
    """What the heads `o` have of a split or a part; no accumulator where it has no tile."""
    tl.store(p_largest + o, largest, mask=m_g)
    tl.store(p_total + o, total, mask=m_g)
    if any_tile:
        m_acc = m_g[:, None] & (o_dv < DV)[None, :]
        tl.store(p_acc + o[:, None] * DV + o_dv[None, :], acc, mask=m_acc)


@triton.jit
def _store_out(
    p_out, p_sink_logits, o_h, o_out, largest, total, acc, m_g, o_dv,
    DV: tl.constexpr, HEADS: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """The output rows that begin at `o_out`, of query heads `o_h`."""
    sink = tl.full((HEADS,), float("-inf"), tl.float32)
    if SINK_LOGITS:
        sink = tl.load(p_sink_logits + o_h, mask=m_g, other=float("-inf")).to(tl.float32)
    out = _finish(acc, largest, total, sink)
    p_out += o_out[:, None] + o_dv[None, :]
    m_out = m_g[:, None] & (o_dv < DV)[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_out)


_RUNTIME_SIZES = [
    "H", "S", "T", "K", "splits", "hq",
    "q_sb", "q_sh", "q_ss", "k_sb", "k_sh", "k_st", "rest_sb", "rest_sh", "rest_st",
    "v_sb", "v_sh", "v_st", "pos_sb", "pos_sh", "pos_ss",
    "parts", "rows",
    "mask_sb", "mask_sh", "mask_ss", "mask_st",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_SIZES, do_not_specialize_on_alignment=["p_mask"])
def attend_kernel(
    p_q, p_k, p_rest, p_v, p_positions, p_mask, p_sink_logits, p_out, p_acc, p_largest, p_total,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_st, rest_sb, rest_sh, rest_st, v_sb, v_sh, v_st,
    pos_sb, pos_sh, pos_ss, mask_sb, mask_sh, mask_ss, mask_st,
    H, S, T, K, splits, parts, rows, scale, softcap,
    D: tl.constexpr, REST: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr, REST_ALIGN: tl.constexpr,
    V_IS_K: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS_PER_KV: tl.constexpr,
    K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, MASK: tl.constexpr, HEAD_MASK: tl.constexpr,
    CAPPED: tl.constexpr, SINK_LOGITS: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TOKENS: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Partial (SPLIT) or final attention of one row's heads; grid (rows * head blocks, splits), or
    with RANGES, which `p_positions` are then, ((parts + rows) * head blocks, 1).

    The head blocks of one row are neighbours in the grid: they share K and V through the cache.
    """
    EACH: tl.constexpr = GROUP * TOKENS if TOKENS else GROUP
    HEAD_BLOCKS: tl.constexpr = (EACH + HEADS - 1) // HEADS
    i = tl.program_id(0)
    i_split = tl.program_id(1)
    rows_of_head = 1 if TOKENS else S
    i_of_grid = i // HEAD_BLOCKS
    if RANGES:
        i_part = i_of_grid
        tiles_each = tiles_of_part(
            p_positions, rows, parts, H, S, T, pos_sb, pos_sh, pos_ss, BLOCK_N
        )
        i_of_grid, parts_before = row_of_part(
            p_positions, i_part, tiles_each, rows, H, S, T, pos_sb, pos_sh, pos_ss, BLOCK_N
        )
        if i_of_grid >= rows:
            return
    i_row, i_b, i_h, i_s, i_kv = row_coordinates(i_of_grid, H, rows_of_head, ROWS_PER_KV)
    o_g = i % HEAD_BLOCKS * HEADS + tl.arange(0, HEADS)
    if TOKENS:
        o_h, o_s = i_h * GROUP + o_g // TOKENS, o_g % TOKENS
    else:
        o_h, o_s = i_h * GROUP + o_g, i_s + tl.zeros((HEADS,), tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_g = o_g < EACH
    p_k += i_b * (k_sb * K_ALIGN) + i_kv * (k_sh * K_ALIGN)
    p_v += i_b * (v_sb * V_ALIGN) + i_kv * (v_sh * V_ALIGN)
    if REST:
        o_rest = tl.arange(0, BLOCK_REST)
        p_rest += i_b * (rest_sb * REST_ALIGN) + i_kv * (rest_sh * REST_ALIGN)
        q_rest = tl.load(
            p_q + i_b * q_sb + (o_h * q_sh + o_s * q_ss)[:, None] + D + o_rest[None, :],
            mask=m_g[:, None] & (o_rest < REST)[None, :], other=0.0,
        ).to(DOT)  # fmt: skip
    if MASK != NO_MASK:
        p_mask += i_b * mask_sb

    first_tile, tile_step = i_split, splits
    if TOKENS:
        slots = 0
        tiles = tl.cdiv(T, BLOCK_N)
    elif RANGES:
        p_positions += i_b * pos_sb + i_h * pos_sh + i_s * pos_ss
        first, stop, last, end = ranges_at(p_positions, True, T)
        gap_at = stop - first
        slots = gap_at + end - last
        first_tile, tile_step = (i_part - parts_before) * tiles_each, 1
        tiles = tl.minimum(tl.cdiv(slots, BLOCK_N), first_tile + tiles_each)
    else:
        p_positions += i_b * pos_sb + i_h * pos_sh + i_s * pos_ss
        used = _used_tiles(p_positions, K, T, BLOCK_N)
        # No position at all: over every key.
        slots = tl.where(used == 0, 0, K)
        tiles = tl.where(used == 0, tl.cdiv(T, BLOCK_N), used)
    q = tl.load(
        p_q + i_b * q_sb + (o_h * q_sh + o_s * q_ss)[:, None] + o_d[None, :],
        mask=m_g[:, None] & (o_d < D)[None, :], other=0.0,
    ).to(DOT)  # fmt: skip
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK_DV), tl.float32)
    for tile in tl.range(first_tile, tiles, tile_step, num_stages=STAGES):
        slot = tile * BLOCK_N + o_n
        if TOKENS:
            at = slot
        elif RANGES:
            at = tl.where(slot < gap_at, first + slot, last + slot - gap_at)
            at = tl.where(slot < slots, at, -1)
        else:
            at = tl.load(p_positions + slot, mask=slot < slots, other=-1)
            at = tl.where(slots == 0, slot, at)
        inside = (at >= 0) & (at < T)
        at = at.to(tl.int64)
        seen = inside[None, :]
        added = 0.0
        if MASK != NO_MASK:
            seen, added, inside = _visible(
                p_mask, at, inside, o_h, o_s, m_g, i_h * GROUP, i_s, mask_sh, mask_ss, mask_st,
                MASK, HEAD_MASK,
            )  # fmt: skip
        k = tl.load(
            p_k + at[:, None] * (k_st * K_ALIGN) + o_d[None, :],
            mask=inside[:, None] & (o_d < D)[None, :], other=0.0,
        ).to(DOT)  # fmt: skip
        logit = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST:
            rest = tl.load(
                p_rest + at[:, None] * (rest_st * REST_ALIGN) + o_rest[None, :],
                mask=inside[:, None] & (o_rest < REST)[None, :], other=0.0,
            ).to(DOT)  # fmt: skip
            logit = tl.dot(q_rest, tl.trans(rest), acc=logit, input_precision="ieee")
        logit *= scale
        if V_IS_K:
            v = k
        else:
            v = tl.load(
                p_v + at[:, None] * (v_st * V_ALIGN) + o_dv[None, :],
                mask=inside[:, None] & (o_dv < DV)[None, :], other=0.0,
            ).to(DOT)  # fmt: skip
        if CAPPED:
            logit = _soft_cap(logit, softcap)
        logit = tl.where(seen, logit + added, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logit, 1))
        weights = _weight(logit, new_largest[:, None])
        decay = _weight(largest, new_largest)
        largest = new_largest
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), v, acc=acc * decay[:, None], input_precision="ieee")

    if SPLIT:
        o = (i_row * EACH + o_g) * splits + i_split  # heads side by side: (rows, EACH, splits)
        if RANGES:  # (parts, EACH)
            o = i_part.to(tl.int64) * EACH + o_g
        _store_partial(
            p_largest, p_total, p_acc, o, largest, total, acc, m_g, o_dv, first_tile < tiles, DV
        )
    else:
        _store_out(
            p_out, p_sink_logits, o_h, ((i_b * H * GROUP + o_h) * S + o_s) * DV,
            largest, total, acc, m_g, o_dv, DV, HEADS, SINK_LOGITS,
        )  # fmt: skip


@triton.jit
def _partials_of(
    i, p_ranges, pos_sb, pos_sh, pos_ss, H, S, T, splits, parts, rows,
    GROUP: tl.constexpr, RANGES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the first partial result of row and head `i` lies, the step to the next, how many."""
    if RANGES:
        each = tiles_of_part(p_ranges, rows, parts, H, S, T, pos_sb, pos_sh, pos_ss, BLOCK_N)
        before, count = parts_of_row(
            p_ranges, i // GROUP, each, rows, H, S, T, pos_sb, pos_sh, pos_ss, BLOCK_N
        )
        start, step = before.to(tl.int64) * GROUP + i % GROUP, GROUP
    else:
        start, step, count = i.to(tl.int64) * splits, 1, splits
    return start, step, count


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def combine_kernel(
    p_acc, p_largest, p_total, p_sink_logits, p_out, p_ranges, pos_sb, pos_sh, pos_ss,
    H, S, T, splits, parts, rows,
    DV: tl.constexpr, GROUP: tl.constexpr, SINK_LOGITS: tl.constexpr, TOKENS: tl.constexpr,
    RANGES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Join the splits, or the parts, of one row and head; grid (rows * heads of a row, blocks of
    Dv)."""
    i = tl.program_id(0)
    if TOKENS:
        # Query heads and their tokens follow each other as in the output.
        _, i_b, i_head, i_s, _ = row_coordinates(i, H * GROUP, TOKENS, 1)
    else:
        _, i_b, i_h, i_s, _ = row_coordinates(i // GROUP, H, S, 1)
        i_head = i_h * GROUP + i % GROUP
    o_dv = tl.program_id(1) * COMBINE_DV + tl.arange(0, COMBINE_DV)
    start, step, count = _partials_of(
        i, p_ranges, pos_sb, pos_sh, pos_ss, H, S, T, splits, parts, rows, GROUP, RANGES, BLOCK_N
    )
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((COMBINE_DV,), tl.float32)
    for first in range(0, count, SPLITS_MAX):
        o_split = first + tl.arange(0, SPLITS_MAX)
        m_split = o_split < count
        o = start + o_split.to(tl.int64) * step
        largest = tl.load(p_largest + o, mask=m_split, other=float("-inf"))
        totals = tl.load(p_total + o, mask=m_split, other=0.0)
        # A split without tiles wrote no accumulator. One that met a NaN has a sum, NaN.
        wrote = (largest != float("-inf")) | (totals != 0.0)
        accs = tl.load(
            p_acc + o[:, None] * DV + o_dv[None, :],
            mask=wrote[:, None] & (o_dv < DV)[None, :], other=0.0,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(largest, 0))
        decay, share = _weight(top, new_top), _weight(largest, new_top)
        top = new_top
        total = total * decay + tl.sum(totals * share, 0)
        acc = acc * decay + tl.sum(accs * share[:, None], 0)
    if SINK_LOGITS:
        sink = tl.load(p_sink_logits + i_head).to(tl.float32)
        with_sink = tl.maximum(top, sink)
        acc *= _weight(top, with_sink)
        total = total * _weight(top, with_sink) + _weight(sink, with_sink)
    out = acc / tl.where(total == 0.0, 1.0, total)
    p_out += ((i_b * H * GROUP + i_head) * S + i_s) * DV + o_dv
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=o_dv < DV)
