"""`loki::attend` on a GPU: split-K exact attention over gathered rows, then a combine.

    attend    one program per (row, split, block of heads): gathers tiles of K and V rows once for
              the query heads that share them, online softmax in fp32, products on tensor cores
    combine   one program per (row, head, block of Dv): joins the splits by their log-sum-exp

Products are in the dtype of q, to which tiles of the others are brought once they are loaded.

Keys may lie in two tensors, the first dims of each in `k` and the others in `k_pe`; where v is k
itself (attention over cached latents), its rows are loaded once.

A row is one list of positions: (b, h, s) with h a KV head (then its G query heads share each row
read) or a query head. Positions must be ascending and then -1, as `loki::select` writes them: a
tile is skipped when its first entry is no position, so what is beyond a row's budget costs nothing.
Tiles go to the splits in turn, so all programs have work however short the list is. A row without
any position runs over all T keys instead.

Without lists (`loki::attention`, TOKENS > 0) a row is a KV head, whose keys are read in order, once
for all query heads and all TOKENS query tokens: "heads" are pairs of both, tokens side by side.

With two ranges of keys for each row (RANGES) a row is a KV head and token, and rows are of any
length: a program is a part of one row, and all parts read as many tiles, so that the longest row
does not decide the time. Which row and part a program is, it counts from the ranges of all rows:
the grid depends on no length.

Bytes: rows * K * (D + Dv) * bytes, and for each split G * (Dv + 2) * 4 written and read again.

Legend as in `loki_compile.kernels`; p_ pointer, i_ program's coordinate, o_ offsets, m_ mask,
strides in elements (`k_st` is the stride of T in k, and so on).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from loki_compile.kernels.checks import check_attend
from loki_compile.kernels.triton_launch import (
    ADDITIVE_MASK,
    BOOL_MASK,
    NO_MASK,
    AttendLaunch,
    Stage,
    alignment,
    attend_launch,
    broadcast_strides,
    device_of,
    interpreted,
    programs_per_row,
    row_coordinates,
)
from loki_compile.kernels.triton_ranges import parts_of_row, ranges_at, row_of_part, tiles_of_part
from torch import Tensor

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
    HIDDEN: tl.constexpr = 0 if MASK == BOOL_MASK else float("-inf")
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
            if HEAD_MASK:
                o_mask = (o_h * mask_sh + o_s * mask_ss)[:, None] + at[None, :] * mask_st
                added = tl.load(p_mask + o_mask, mask=seen & m_g[:, None], other=HIDDEN)
            else:
                o_mask = i_h * GROUP * mask_sh + i_s * mask_ss + at * mask_st
                added = tl.load(p_mask + o_mask, mask=inside, other=HIDDEN)[None, :]
            if MASK == BOOL_MASK:
                seen = added != 0
                added = 0.0
            else:
                added = added.to(tl.float32)
                seen = added != float("-inf")
            # A key that no head sees is not read: in the product, 0 * NaN would be NaN.
            inside = tl.max(seen.to(tl.int32), 0) != 0
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
        tl.store(p_largest + o, largest, mask=m_g)
        tl.store(p_total + o, total, mask=m_g)
        if first_tile < tiles:
            m_acc = m_g[:, None] & (o_dv < DV)[None, :]
            tl.store(p_acc + o[:, None] * DV + o_dv[None, :], acc, mask=m_acc)
    else:
        sink = tl.full((HEADS,), float("-inf"), tl.float32)
        if SINK_LOGITS:
            sink = tl.load(p_sink_logits + o_h, mask=m_g, other=float("-inf")).to(tl.float32)
        out = _finish(acc, largest, total, sink)
        p_out += (((i_b * H * GROUP + o_h) * S + o_s) * DV)[:, None] + o_dv[None, :]
        m_out = m_g[:, None] & (o_dv < DV)[None, :]
        tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_out)


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
    if RANGES:
        each = tiles_of_part(p_ranges, rows, parts, H, S, T, pos_sb, pos_sh, pos_ss, BLOCK_N)
        before, count = parts_of_row(
            p_ranges, i // GROUP, each, rows, H, S, T, pos_sb, pos_sh, pos_ss, BLOCK_N
        )
        start, step = before.to(tl.int64) * GROUP + i % GROUP, GROUP
    else:
        start, step, count = i.to(tl.int64) * splits, 1, splits
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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    k_pe: Tensor | None = None,
    ranges: Tensor | None = None,
    launch: AttendLaunch | None = None,
) -> Tensor:
    """`loki::attend`, and `loki::attention` without positions; see `loki_compile.kernels.ops`.
    `launch` replaces the table's choice."""
    out, stages = attend_stages(
        q, k, v, positions, mask, scale=scale, softcap=softcap, sink_logits=sink_logits,
        k_pe=k_pe, ranges=ranges, launch=launch,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        for stage in stages:
            stage.run()
    return out


def attend_stages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    k_pe: Tensor | None = None,
    ranges: Tensor | None = None,
    launch: AttendLaunch | None = None,
) -> tuple[Tensor, tuple[Stage, ...]]:
    """The output of `attend`, unwritten, and the launches that write it, in order."""
    check_attend(
        q, k, v, positions, mask, softcap=softcap, sink_logits=sink_logits, k_pe=k_pe,
        ranges=ranges,
    )  # fmt: skip
    b, hq, s, _ = q.shape
    d, (hkv, t, dv) = k.shape[3], v.shape[1:]
    rest = 0 if k_pe is None else k_pe.shape[3]
    all_keys = positions is None and ranges is None
    heads_out = hkv if positions is None else positions.shape[1]
    slots = 0 if positions is None else positions.shape[3]
    group = hq // heads_out
    # Without lists a row is a KV head, of which each token is as another head.
    rows, each = (b * hkv, group * s) if all_keys else (b * heads_out * s, group)
    out = q.new_empty((b, hq, s, dv))
    if rows == 0:
        return out, ()

    device = device_of(q)
    block_d, block_rest, block_dv = (max(16, triton.next_power_of_2(n)) for n in (d, rest, dv))
    if launch is None:
        given = (q, k, v) if k_pe is None else (q, k, v, k_pe)
        widest = max(tensor.element_size() for tensor in given)
        launch = attend_launch(
            device, group=each, block_d=max(block_d, block_dv), bytes_each=widest
        )
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    head_blocks = triton.cdiv(each, launch.heads)
    most = (
        SPLITS_MAX.value if all_keys else min(SPLITS_MAX.value, triton.cdiv(slots, launch.block_n))
    )
    splits, parts = programs_per_row(device, rows * head_blocks, launch.programs, most), 0
    partial: tuple[int, ...] = (rows, each, splits)
    grid = (rows * head_blocks, splits)
    if ranges is not None:  # as many parts as fill the device once, and what rows round up
        splits, parts = 1, max(1, device.processors * launch.programs // head_blocks)
        partial, grid = (parts + rows, each), ((parts + rows) * head_blocks, 1)
        positions = ranges
    split = splits > 1 or parts > 0
    empty = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    acc = largest = total = None
    if split:
        acc = empty((*partial, dv))
        largest, total = empty((2, *partial))
    position_strides = broadcast_strides(positions, 3)

    k_strides, v_strides = broadcast_strides(k, 3), broadcast_strides(v, 3)
    k_align, v_align = alignment(d, k_strides), alignment(dv, v_strides)
    rest_strides = broadcast_strides(k_pe, 3)
    rest_align = alignment(rest, rest_strides)
    v_is_k = (
        d == dv and k.dtype == v.dtype and k.data_ptr() == v.data_ptr() and k_strides == v_strides
    )
    mask_kind, head_mask = NO_MASK.value, False
    mask_strides = broadcast_strides(mask)
    if mask is not None:
        head_mask = (mask_strides[1] != 0 and group > 1) or (all_keys and mask_strides[2] != 0)
        mask_kind = BOOL_MASK.value if mask.dtype == torch.bool else ADDITIVE_MASK.value
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    dot = getattr(tl, str(q.dtype).removeprefix("torch."))
    if interpreted(attend_kernel) and dot == tl.bfloat16:
        dot = tl.float32  # numpy has no bfloat16

    def run_attend() -> None:
        attend_kernel[grid](
            q, k, k_pe, v, positions, mask, sink_logits, out, acc, largest, total,
            *broadcast_strides(q, 3), *(n // k_align for n in k_strides),
            *(n // rest_align for n in rest_strides), *(n // v_align for n in v_strides),
            *position_strides, *mask_strides,
            heads_out, s, t, slots, splits, parts, rows, scale, softcap,
            D=d, REST=rest, DV=dv, BLOCK_D=block_d, BLOCK_REST=block_rest, BLOCK_DV=block_dv,
            REST_ALIGN=rest_align, V_IS_K=v_is_k, GROUP=group, HEADS=launch.heads,
            ROWS_PER_KV=heads_out // hkv, K_ALIGN=k_align, V_ALIGN=v_align,
            MASK=mask_kind, HEAD_MASK=head_mask, CAPPED=softcap > 0,
            SINK_LOGITS=sink_logits is not None, SPLIT=split, DOT=dot,
            BLOCK_N=launch.block_n, STAGES=launch.stages, TOKENS=s if all_keys else 0,
            RANGES=ranges is not None,
            num_warps=launch.warps,
        )  # fmt: skip

    def run_combine() -> None:
        combine_kernel[(rows * each, triton.cdiv(dv, COMBINE_DV.value))](
            acc, largest, total, sink_logits, out, positions, *position_strides,
            heads_out, s, t, splits, parts, rows,
            DV=dv, GROUP=group, SINK_LOGITS=sink_logits is not None,
            TOKENS=s if all_keys else 0, RANGES=ranges is not None, BLOCK_N=launch.block_n,
            num_warps=4,
        )  # fmt: skip

    attend_stage = Stage("attend", run_attend)
    return out, (attend_stage, Stage("combine", run_combine)) if split else (attend_stage,)
