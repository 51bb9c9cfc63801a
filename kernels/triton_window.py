"""What a row of `triton_select` chooses of its window whatever it scores. Legend as there."""

from __future__ import annotations

import triton
import triton.language as tl
from loki_compile.kernels.triton_launch import BOOL_MASK, NO_MASK

SCAN_BLOCK = tl.constexpr(1024)


@triton.jit
def _visible(o, inside, p_mask, mask_st, hidden_below, MASK: tl.constexpr):
    """1 where position o is inside and visible, else 0."""
    if MASK == BOOL_MASK:
        seen = tl.load(p_mask + o.to(tl.int64) * mask_st, mask=inside, other=0) != 0
    else:
        bias = tl.load(p_mask + o.to(tl.int64) * mask_st, mask=inside, other=float("-inf"))
        seen = bias.to(tl.float32) > hidden_below
    return (seen & inside).to(tl.int32)


@triton.jit
def forced_window(
    start, end, read_until, n_sink, n_recent, p_mask, mask_st, hidden_below, MASK: tl.constexpr
):
    """(recent_from, sink_until): positions that bound the forced visible keys."""
    recent_from = end - n_recent
    sink_until = start + n_sink
    if MASK != NO_MASK:  # noqa: SIM102, a test at compile time
        if read_until > start:  # the n-th visible key from either side: look for it block by block
            recent_from = end
            sink_until = start
            left = n_recent
            stop = end
            while (left > 0) & (stop > start):
                o = stop - SCAN_BLOCK + tl.arange(0, SCAN_BLOCK)
                seen = _visible(o, o >= start, p_mask, mask_st, hidden_below, MASK)
                found = tl.sum(seen, 0)
                pick = (seen != 0) & (found - tl.cumsum(seen, 0) < left)
                recent_from = tl.minimum(recent_from, tl.min(tl.where(pick, o, end), 0))
                left -= found
                stop -= SCAN_BLOCK
            left = n_sink
            begin = start
            while (left > 0) & (begin < end):
                o = begin + tl.arange(0, SCAN_BLOCK)
                seen = _visible(o, o < end, p_mask, mask_st, hidden_below, MASK)
                pick = (seen != 0) & (tl.cumsum(seen, 0) - seen < left)
                sink_until = tl.maximum(sink_until, tl.max(tl.where(pick, o + 1, start), 0))
                left -= tl.sum(seen, 0)
                begin += SCAN_BLOCK
    return recent_from, sink_until


@triton.jit
def write_always(
    start, end, read_until, sink_until, recent_from, p_positions,
    p_mask, mask_st, hidden_below, slots, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Positions of a row that ranks nothing: what is always chosen of its window."""
    n = 0
    for piece in tl.static_range(2):
        if piece == 0:
            begin = start
            stop = sink_until
        else:
            begin = recent_from
            stop = end
        for first in range(begin, stop, BLOCK):
            o = first + tl.arange(0, BLOCK)
            seen = (o < stop).to(tl.int32)
            if MASK != NO_MASK:  # noqa: SIM102, a test at compile time
                if read_until > start:
                    seen = _visible(o, o < stop, p_mask, mask_st, hidden_below, MASK)
            slot = n + tl.cumsum(seen, 0) - 1
            tl.store(p_positions + slot, o, mask=(seen != 0) & (slot < slots))
            n += tl.sum(seen, 0)
    for first in range(n // BLOCK * BLOCK, slots, BLOCK):
        o = first + tl.arange(0, BLOCK)
        tl.store(p_positions + o, tl.full((BLOCK,), -1, tl.int32), mask=(o >= n) & (o < slots))
