"""The kernels of the three launches of `triton_select`: prepare, list, choose. Legend as there."""

from __future__ import annotations

import triton
import triton.language as tl
from loki_compile.kernels.triton_launch import NO_MASK, row_coordinates
from loki_compile.kernels.triton_score import (
    FORCED,
    HIDDEN,
    RUNTIME_SIZES,
    TILES,
    load_digits,
    project,
    tile_keys,
    weight_of,
    window,
)
from loki_compile.kernels.triton_weigh import (
    PART_FIELDS,
    SPLITS_MAX,
    count_from,
    join_parts,
    lightest_keys,
    store_part,
    weigh_tile,
    weight_from,
)
from loki_compile.kernels.triton_window import forced_window, write_always

# Fields of a row's record in scratch.
ROW_START = tl.constexpr(0)  # first position of the window
ROW_END = tl.constexpr(1)  # its last position + 1
ROW_READ = tl.constexpr(2)  # a bool mask is read before this: the end, or the start if no holes
ROW_BUDGET = tl.constexpr(3)  # keys to choose
ROW_RECENT = tl.constexpr(4)  # visible keys from here on are always chosen
ROW_SINK = tl.constexpr(5)  # visible keys before this are always chosen
ROW_FLOOR = tl.constexpr(6)  # list keys at or above this
ROW_UNIT = tl.constexpr(7)  # fp32 bits: what one unit of the scores stands for
ROW_COUNT = tl.constexpr(8)  # visible keys; -1 where they are too few for a budget
ROW_FIELDS = tl.constexpr(9)


@triton.jit
def _bisect(p_keys, n, low, high, n_low, n_high, want, slack, BLOCK: tl.constexpr):
    """The largest key that `want` to `want + slack` keys reach, or that is as far as keys go.

    n_low >= want keys are >= low and n_high < want are >= high. Returns (low, n_high) once n_low
    is at most want + slack, or once high = low + 1, where n_high keys lie above low.
    """
    while (low + 1 < high) & (n_low > want + slack):
        middle = (low & high) + ((low ^ high) >> 1)  # mean without overflow
        n_middle = count_from(p_keys, n, middle, BLOCK)
        enough = n_middle >= want
        low = tl.where(enough, middle, low)
        n_low = tl.where(enough, n_middle, n_low)
        high = tl.where(enough, high, middle)
        n_high = tl.where(enough, n_high, n_middle)
    return low, n_low, n_high


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=["p_mask", "p_bounds"])
def prepare_kernel(
    p_q, p_basis, p_index, p_index_scale, p_mask, p_bounds,
    p_high, p_low, p_source, p_score, p_rows, p_sample,
    q_sb, q_sh, q_ss, basis_sb, basis_sh, basis_sd, index_sb, index_sh, index_st,
    index_scale_sb, index_scale_sh, index_scale_st,
    mask_sb, mask_sh, mask_ss, mask_st, bounds_sb, bounds_sh, bounds_ss,
    H, S, T, scale, hidden_below, top_k, keep_q16, sink, recent, min_keys,
    p_budgets, budgets_sb, budgets_sh, budgets_ss, slots,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, PACK: tl.constexpr, ROWS_PER_KV: tl.constexpr,
    ALIGN: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr, INT8: tl.constexpr,
    DOT: tl.constexpr, BLOCK_T: tl.constexpr, SCORED: tl.constexpr, SAMPLE: tl.constexpr,
    LIST_ALL: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Digits and record of one row; grid (rows,). OWN: rows have budgets of their own."""
    i_row, i_b, i_h, i_s, i_kv = row_coordinates(tl.program_id(0), H, S, ROWS_PER_KV)
    COLUMNS: tl.constexpr = HEADS * PACK
    GROUP_PAD: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS * COLUMNS
    p_high += i_row * GROUP_PAD * BLOCK_R
    p_low += i_row * GROUP_PAD * BLOCK_R
    p_source += i_row * GROUP_PAD
    p_rows += i_row * ROW_FIELDS
    p_sample += i_row * SAMPLE
    unit = tl.full((), 1.0, tl.float32)
    if SCORED == TILES:
        unit = project(
            p_q + i_b * q_sb + i_h * GROUP * q_sh + i_s * q_ss,
            p_basis + i_b * basis_sb + i_kv * basis_sh,
            p_high, p_low, p_source, q_sh, basis_sd, scale,
            D, R, BLOCK_D, BLOCK_R, GROUP, GROUP_PAD, 8, LOW, INT8,
        )  # fmt: skip
    else:
        p_score += i_row * (tl.cdiv(T, 16) * 16)
    if MASK != NO_MASK:
        p_mask += i_b * mask_sb + i_h * GROUP * mask_sh + i_s * mask_ss
        p_bounds += i_b * bounds_sb + i_h * GROUP * bounds_sh + i_s * bounds_ss
    start, end, count = window(p_bounds, T, MASK)
    read_until = tl.where(count != end - start, end, start)
    n_recent = tl.minimum(recent, count)
    n_sink = tl.minimum(sink, count - n_recent)
    share = ((count.to(tl.int64) * keep_q16 + 65535) >> 16).to(tl.int32)
    budget = tl.maximum(tl.minimum(share, top_k), n_sink + n_recent)
    budget = tl.where(count < min_keys, count, budget)
    if OWN:
        p_budgets += i_b * budgets_sb + i_h * budgets_sh + i_s * budgets_ss
        budget = tl.minimum(tl.minimum(tl.maximum(tl.load(p_budgets), 0), count), slots)
        n_recent = tl.minimum(tl.maximum(tl.load(p_budgets + 1), 0), budget)
        n_sink = tl.minimum(sink, budget - n_recent)
    recent_from, sink_until = forced_window(
        start, end, read_until, n_sink, n_recent, p_mask, mask_st, hidden_below, MASK
    )

    floor = tl.full((), HIDDEN + 1, tl.int32)
    ranks = count > LIST_ALL
    if OWN:
        ranks = ranks & (budget > n_sink + n_recent)
    if ranks:
        tl.debug_barrier()  # the digits were stored by other threads of this program
        high = 0
        low = 0
        if SCORED == TILES:
            high, low = load_digits(p_high, p_low, p_source, 0, BLOCK_R, COLUMNS, 1, LOW, DOT)
        if INT8:
            p_index_scale += i_b * index_scale_sb + i_kv * index_scale_sh
        narrow = (end - start) // SAMPLE
        wider = (end - start) % SAMPLE
        for first in range(0, SAMPLE, BLOCK_T):
            # One position per stratum, at a scrambled offset: a period in the keys cannot hide.
            o = first + tl.arange(0, BLOCK_T)
            width = narrow + (o < wider).to(tl.int32)
            noise = ((o.to(tl.int64) * 0x9E3779B1) >> 8) & 0xFFFFFF
            at = start + o * narrow + tl.minimum(o, wider) + ((noise * width) >> 24).to(tl.int32)
            key = tile_keys(
                at, start, end, read_until, unit, high, low,
                p_index + i_b * (index_sb * ALIGN) + i_kv * (index_sh * ALIGN), p_index_scale,
                p_mask, p_high, p_low, p_source, p_score,
                index_st * ALIGN, index_scale_st, mask_st, hidden_below,
                R, BLOCK_R, GROUP, COLUMNS, 1, MASK, LOW, INT8, DOT, BLOCK_T, SCORED,
            )  # fmt: skip
            tl.store(p_sample + o, key, mask=o < SAMPLE)
        tl.debug_barrier()
        n_seen = count_from(p_sample, SAMPLE, HIDDEN + 1, SAMPLE)
        # Four standard deviations of the count above the true threshold, and four keys.
        expected = budget.to(tl.float32) / count.to(tl.float32) * n_seen.to(tl.float32)
        want = (expected + 4.0 * tl.sqrt(expected) + 4.0).to(tl.int32)
        top = tl.full((), FORCED, tl.int32)
        if want < n_seen:
            floor, _, _ = _bisect(
                p_sample, SAMPLE, floor, top, n_seen, top * 0, want, want // 8, SAMPLE
            )
    if OWN:  # what is always chosen is all that is listed
        floor = tl.where(budget == n_sink + n_recent, FORCED, floor)
    tl.store(p_rows + ROW_START, start)
    tl.store(p_rows + ROW_END, end)
    tl.store(p_rows + ROW_READ, read_until)
    tl.store(p_rows + ROW_BUDGET, budget)
    tl.store(p_rows + ROW_RECENT, recent_from)
    tl.store(p_rows + ROW_SINK, sink_until)
    tl.store(p_rows + ROW_FLOOR, floor)
    tl.store(p_rows + ROW_UNIT, unit.to(tl.int32, bitcast=True))
    tl.store(p_rows + ROW_COUNT, tl.where(count < min_keys, -1, count))


@triton.jit
def _list_span(
    begin, stop, floor, p_rows, p_list_key, p_list_at,
    p_index, p_index_scale, p_mask, p_high, p_low, p_source, p_score,
    index_st, index_scale_st, mask_st, hidden_below,
    R: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    PACK: tl.constexpr, MASK: tl.constexpr, LOW: tl.constexpr, INT8: tl.constexpr,
    DOT: tl.constexpr, BLOCK_T: tl.constexpr, SCORED: tl.constexpr, STAGES: tl.constexpr,
    WEIGH: tl.constexpr,
):  # fmt: skip
    """List the visible keys of [begin, stop) that reach the floor, ascending; returns how many, and
    with WEIGH what all visible ones weigh: the fields of a part."""
    recent_from = tl.load(p_rows + ROW_RECENT)
    sink_until = tl.load(p_rows + ROW_SINK)
    read_until = tl.load(p_rows + ROW_READ)
    unit = tl.load(p_rows + ROW_UNIT).to(tl.float32, bitcast=True)
    high = 0
    low = 0
    if SCORED == TILES:
        high, low = load_digits(p_high, p_low, p_source, 0, BLOCK_R, HEADS, PACK, LOW, DOT)
    n = 0
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    always = tl.full((), 0.0, tl.float32)
    for t in tl.range(begin, stop, BLOCK_T, num_stages=STAGES):
        at = t + tl.arange(0, BLOCK_T)
        key = tile_keys(
            at, t, stop, read_until, unit, high, low,
            p_index, p_index_scale, p_mask, p_high, p_low, p_source, p_score,
            index_st, index_scale_st, mask_st, hidden_below,
            R, BLOCK_R, GROUP, HEADS, PACK, MASK, LOW, INT8, DOT, BLOCK_T, SCORED,
        )  # fmt: skip
        if WEIGH:
            kept = (at >= recent_from) | (at < sink_until)
            most, total, always = weigh_tile(key, at < stop, kept, most, total, always)
        if (t < sink_until) | (t + BLOCK_T > tl.minimum(recent_from, stop)):
            forced = (key != HIDDEN) & ((at >= recent_from) | (at < sink_until))
            key = tl.where(at < stop, tl.where(forced, FORCED, key), HIDDEN)
        keep = (key >= floor).to(tl.int32)
        slot = n + tl.cumsum(keep, 0) - 1
        tl.store(p_list_key + slot, key, mask=keep != 0)
        tl.store(p_list_at + slot, at, mask=keep != 0)
        n += tl.sum(keep, 0)
    return n, most, total, always


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=["p_mask"])
def list_kernel(
    p_index, p_index_scale, p_mask, p_high, p_low, p_source, p_score, p_rows,
    p_list_key, p_list_at, p_counts, p_parts,
    index_sb, index_sh, index_st, index_scale_sb, index_scale_sh, index_scale_st,
    mask_sb, mask_sh, mask_ss, mask_st, H, S, T, hidden_below, splits,
    R: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    PACK: tl.constexpr, ROWS_PER_KV: tl.constexpr, ALIGN: tl.constexpr,
    MASK: tl.constexpr, LOW: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, SCORED: tl.constexpr, STAGES: tl.constexpr, WEIGH: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """List one part of one row's window; grid (rows, splits). OWN: as in `prepare_kernel`; a row
    that ranks nothing lists nothing then, unless keys are weighed.

    The rows of one KV head are neighbours in the grid: they share its index through the cache.
    """
    i_row, i_b, i_h, i_s, i_kv = row_coordinates(tl.program_id(0), H, S, ROWS_PER_KV)
    i_part = tl.program_id(1)
    if SCORED != TILES:
        p_score += i_row * (tl.cdiv(T, 16) * 16)
    COLUMNS: tl.constexpr = HEADS * PACK
    GROUP_PAD: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS * COLUMNS
    p_rows += i_row * ROW_FIELDS
    start = tl.load(p_rows + ROW_START)
    end = tl.load(p_rows + ROW_END)
    chunk = tl.cdiv(tl.cdiv(end - start, splits), BLOCK_T) * BLOCK_T
    begin = start + tl.minimum(i_part * chunk, end - start)
    stop = tl.minimum(begin + chunk, end)
    list_from = i_row * tl.cdiv(T, 16) * 16 + begin - start
    if MASK != NO_MASK:
        p_mask += i_b * mask_sb + i_h * GROUP * mask_sh + i_s * mask_ss
    if INT8:
        p_index_scale += i_b * index_scale_sb + i_kv * index_scale_sh
    n = 0
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    always = tl.full((), 0.0, tl.float32)
    wanted = begin < stop
    if OWN and not WEIGH:
        wanted = wanted & (tl.load(p_rows + ROW_FLOOR) != FORCED)
    if wanted:
        n, most, total, always = _list_span(
            begin, stop, tl.load(p_rows + ROW_FLOOR), p_rows,
            p_list_key + list_from, p_list_at + list_from,
            p_index + i_b * (index_sb * ALIGN) + i_kv * (index_sh * ALIGN), p_index_scale, p_mask,
            p_high + i_row * GROUP_PAD * BLOCK_R, p_low + i_row * GROUP_PAD * BLOCK_R,
            p_source + i_row * GROUP_PAD, p_score,
            index_st * ALIGN, index_scale_st, mask_st, hidden_below,
            R, BLOCK_R, GROUP, HEADS, PACK, MASK, LOW, INT8, DOT, BLOCK_T, SCORED, STAGES, WEIGH,
        )  # fmt: skip
    tl.store(p_counts + i_row * splits + i_part, n)
    if WEIGH:
        store_part(p_parts, i_row * splits + i_part, most, total, always)


@triton.jit
def _flatten(p_list_key, p_list_at, p_counts, p_before, splits, chunk, BLOCK: tl.constexpr):
    """Move the lists of the splits together, in place and in order; returns how many keys.

    A key only ever moves to a lower slot, so no slot is written before it has been read.
    """
    o_part = tl.arange(0, SPLITS_MAX)
    counts = tl.load(p_counts + o_part, mask=o_part < splits, other=0)
    total = tl.sum(counts, 0)
    tl.store(p_before + o_part, tl.cumsum(counts, 0) - counts, mask=o_part < splits)
    tl.debug_barrier()
    for first in range(0, total, BLOCK):
        o = first + tl.arange(0, BLOCK)
        inside = o < total
        part = tl.zeros((BLOCK,), tl.int32)
        for bit in tl.static_range(1, 9):  # the last part that begins at or before slot o
            beyond = part + (SPLITS_MAX >> bit)
            before = tl.load(p_before + beyond, mask=beyond < splits, other=0x7FFFFFFF)
            part = tl.where(before <= o, beyond, part)
        source = part * chunk + o - tl.load(p_before + part)
        key = tl.load(p_list_key + source, mask=inside)
        at = tl.load(p_list_at + source, mask=inside)
        tl.debug_barrier()
        tl.store(p_list_key + o, key, mask=inside)
        tl.store(p_list_at + o, at, mask=inside)
    tl.debug_barrier()
    return total


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=["p_mask"])
def choose_kernel(
    p_index, p_index_scale, p_mask, p_high, p_low, p_source, p_score, p_rows,
    p_list_key, p_list_at, p_counts, p_parts, p_before, p_positions, p_weighed,
    index_sb, index_sh, index_st, index_scale_sb, index_scale_sh, index_scale_st,
    mask_sb, mask_sh, mask_ss, mask_st, H, S, T, hidden_below, splits, slots, mass,
    R: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    PACK: tl.constexpr, ROWS_PER_KV: tl.constexpr, ALIGN: tl.constexpr,
    MASK: tl.constexpr, LOW: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr, WEIGH: tl.constexpr,
    TELL: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Positions (slots) of one row from its lists; grid (rows,). WEIGH: by a mass > 0 they may be
    fewer than its budget. TELL: how many they are, and the share of the weights left out. OWN: as
    in `prepare_kernel`."""
    i_row, i_b, i_h, i_s, i_kv = row_coordinates(tl.program_id(0), H, S, ROWS_PER_KV)
    p_rows += i_row * ROW_FIELDS
    p_list_key += i_row * tl.cdiv(T, 16) * 16  # whole vectors
    p_list_at += i_row * tl.cdiv(T, 16) * 16
    p_positions += i_row * slots
    if SCORED != TILES:
        p_score += i_row * (tl.cdiv(T, 16) * 16)
    start = tl.load(p_rows + ROW_START)
    end = tl.load(p_rows + ROW_END)
    budget = tl.load(p_rows + ROW_BUDGET)
    floor = tl.load(p_rows + ROW_FLOOR)
    if OWN and not WEIGH:  # noqa: SIM102, a test at compile time
        if floor == FORCED:
            if MASK != NO_MASK:
                p_mask += i_b * mask_sb + i_h * GROUP * mask_sh + i_s * mask_ss
            write_always(
                start, end, tl.load(p_rows + ROW_READ), tl.load(p_rows + ROW_SINK),
                tl.load(p_rows + ROW_RECENT), p_positions, p_mask, mask_st, hidden_below, slots,
                MASK, BLOCK,
            )  # fmt: skip
            return
    chunk = tl.cdiv(tl.cdiv(end - start, splits), BLOCK_T) * BLOCK_T
    total = _flatten(
        p_list_key, p_list_at, p_counts + i_row * splits, p_before + i_row * splits, splits, chunk,
        BLOCK,
    )  # fmt: skip
    if total < budget:  # the sample misled: list every visible key of this row
        COLUMNS: tl.constexpr = HEADS * PACK
        GROUP_PAD: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS * COLUMNS
        if MASK != NO_MASK:
            p_mask += i_b * mask_sb + i_h * GROUP * mask_sh + i_s * mask_ss
        if INT8:
            p_index_scale += i_b * index_scale_sb + i_kv * index_scale_sh
        floor = tl.full((), HIDDEN + 1, tl.int32)
        total, _, _, _ = _list_span(
            start, end, floor, p_rows, p_list_key, p_list_at,
            p_index + i_b * (index_sb * ALIGN) + i_kv * (index_sh * ALIGN), p_index_scale, p_mask,
            p_high + i_row * GROUP_PAD * BLOCK_R, p_low + i_row * GROUP_PAD * BLOCK_R,
            p_source + i_row * GROUP_PAD, p_score,
            index_st * ALIGN, index_scale_st, mask_st, hidden_below,
            R, BLOCK_R, GROUP, HEADS, PACK, MASK, LOW, INT8, DOT, BLOCK_T, SCORED, 1, False,
        )  # fmt: skip
        tl.debug_barrier()
        budget = tl.minimum(budget, total)

    best = tl.full((BLOCK,), HIDDEN, tl.int32)
    forced = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, total, BLOCK):
        o = first + tl.arange(0, BLOCK)
        key = tl.load(p_list_key + o, mask=o < total, other=HIDDEN)
        best = tl.maximum(best, tl.where(key == FORCED, HIDDEN, key))
        forced += (key == FORCED).to(tl.int32)
    n_forced = tl.sum(forced, 0)
    top = tl.max(best, 0) + 1
    threshold, n_reach, n_above = _bisect(
        p_list_key, total, floor, top, total, n_forced, budget, 0, BLOCK
    )
    # Keys above the threshold, and as many equal to it, from the left, as the budget has left.
    from_ties = tl.where(n_reach == budget, budget, budget - n_above)
    threshold = tl.where(n_forced >= budget, FORCED, threshold)
    from_ties = tl.where(n_forced >= budget, budget, from_ties)
    most = 0.0
    weight_of_all = 0.0
    always = 0.0
    held = tl.zeros((BLOCK,), tl.float32)
    count = tl.load(p_rows + ROW_COUNT)
    if WEIGH:
        most, weight_of_all, always = join_parts(p_parts + i_row * splits * PART_FIELDS, splits)
        need = mass * weight_of_all - always
        if (mass > 0.0) & (count >= 0) & (weight_of_all > 0.0) & (n_forced < budget):
            if need <= 0.0:
                threshold = tl.full((), FORCED, tl.int32)
                from_ties = n_forced
            elif weight_from(p_list_key, total, floor, most, BLOCK) >= need:
                lightest, ties, fewest = lightest_keys(
                    p_list_key, total, floor, top, need, most, BLOCK
                )
                threshold = tl.where(fewest <= budget, lightest, threshold)
                from_ties = tl.where(fewest <= budget, ties, from_ties)
    n = 0
    n_ties = 0
    for first in range(0, total, BLOCK):
        o = first + tl.arange(0, BLOCK)
        key = tl.load(p_list_key + o, mask=o < total, other=HIDDEN)
        at = tl.load(p_list_at + o, mask=o < total, other=-1)
        tie = ((key == threshold) & (o < total)).to(tl.int32)
        tie_rank = n_ties + tl.cumsum(tie, 0)
        chosen = (key > threshold) | ((tie != 0) & (tie_rank <= from_ties))
        slot = n + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(p_positions + slot, at, mask=chosen & (slot < slots))
        if TELL:
            held += tl.where(chosen, weight_of(key, most), 0.0)
        n += tl.sum(chosen.to(tl.int32), 0)
        n_ties += tl.sum(tie, 0)
    for first in range(n // BLOCK * BLOCK, slots, BLOCK):
        o = first + tl.arange(0, BLOCK)
        tl.store(p_positions + o, tl.full((BLOCK,), -1, tl.int32), mask=(o >= n) & (o < slots))
    if TELL:
        left_out = 1.0 - (always + tl.sum(held, 0)) / tl.where(
            weight_of_all > 0.0, weight_of_all, 1.0
        )
        # A row that reads all it sees, one that sees nothing finite, one that chooses nothing.
        whole = (count < 0) | (n == count) | (n == 0) | (weight_of_all == 0.0)
        tl.store(p_weighed + i_row * 2, n + 0.0)
        tl.store(p_weighed + i_row * 2 + 1, tl.where(whole, 0.0, tl.maximum(left_out, 0.0)))
