"""Ranges of keys shared out to programs: which row and part of it a program of `attend` has.

A part is so many tiles of one row. All programs count from the ranges of all rows, so that the grid
depends on no length. Names as in `triton_attend`.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS_BLOCK = tl.constexpr(256)


@triton.jit
def ranges_at(p, m, T):
    """Keys [first, stop) and [last, end) of rows; all T where both are empty."""
    first = tl.minimum(tl.maximum(tl.load(p, mask=m, other=0), 0), T)
    stop = tl.minimum(tl.maximum(tl.load(p + 1, mask=m, other=0), first), T)
    last = tl.minimum(tl.maximum(tl.load(p + 2, mask=m, other=0), stop), T)
    end = tl.minimum(tl.maximum(tl.load(p + 3, mask=m, other=0), last), T)
    none = (first == stop) & (last == end)
    first, last = tl.where(none, 0, first), tl.where(none, T, last)
    return first, tl.where(none, T, stop), last, tl.where(none, T, end)


@triton.jit
def _tiles_of_rows(p_ranges, o, rows, H, S, T, sb, sh, ss, BLOCK_N: tl.constexpr):
    """Tiles that rows `o` read, 0 where there is no such row."""
    m = o < rows
    at = (o // (S * H)).to(tl.int64) * sb + (o // S % H).to(tl.int64) * sh + (o % S) * ss
    first, stop, last, end = ranges_at(p_ranges + at, m, T)
    return tl.where(m, tl.cdiv(stop - first + end - last, BLOCK_N), 0)


@triton.jit
def tiles_of_part(p_ranges, rows, parts, H, S, T, sb, sh, ss, BLOCK_N: tl.constexpr):
    """Tiles that a part reads, so that about `parts` of them are those of all rows."""
    total = 0
    for i in range(0, rows, ROWS_BLOCK):
        o = i + tl.arange(0, ROWS_BLOCK)
        total += tl.sum(_tiles_of_rows(p_ranges, o, rows, H, S, T, sb, sh, ss, BLOCK_N), 0)
    return tl.maximum(tl.cdiv(total, parts), 1)


@triton.jit
def row_of_part(p_ranges, i_part, each, rows, H, S, T, sb, sh, ss, BLOCK_N: tl.constexpr):
    """The row that part `i_part` is of, and the parts before that row's first; `rows` where there
    are fewer parts."""
    row = 0
    before = 0
    parts = 0
    for i in range(0, rows, ROWS_BLOCK):
        o = i + tl.arange(0, ROWS_BLOCK)
        of_rows = tl.cdiv(_tiles_of_rows(p_ranges, o, rows, H, S, T, sb, sh, ss, BLOCK_N), each)
        ends = parts + tl.cumsum(of_rows, 0)
        behind = (ends <= i_part) & (o < rows)
        row += tl.sum(behind.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(behind, ends, 0), 0))
        parts += tl.sum(of_rows, 0)
    return row, before


@triton.jit
def parts_of_row(p_ranges, i_row, each, rows, H, S, T, sb, sh, ss, BLOCK_N: tl.constexpr):
    """The parts before a row's first, and how many it has."""
    before = 0
    own = 0
    for i in range(0, rows, ROWS_BLOCK):
        o = i + tl.arange(0, ROWS_BLOCK)
        of_rows = tl.cdiv(_tiles_of_rows(p_ranges, o, rows, H, S, T, sb, sh, ss, BLOCK_N), each)
        before += tl.sum(tl.where(o < i_row, of_rows, 0), 0)
        own += tl.sum(tl.where(o == i_row, of_rows, 0), 0)
    return before, own
