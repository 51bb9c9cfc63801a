"""What keys of a row weigh, for the launches of `triton_select`. Legend as there."""

from __future__ import annotations

import triton
import triton.language as tl
from loki_compile.kernels.triton_score import HIDDEN, score_of, weight_of

SPLITS_MAX = tl.constexpr(256)

# What a part of a row's window weighs, in scratch: its highest finite score; relative to that, all
# visible keys, and those that are always chosen.
PART_MOST = tl.constexpr(0)
PART_TOTAL = tl.constexpr(1)
PART_ALWAYS = tl.constexpr(2)
PART_FIELDS = tl.constexpr(3)


@triton.jit
def weigh_tile(key, inside, kept, most, total, always):
    """The fields of a part and one more tile of keys; `kept` ones always are chosen."""
    score = score_of(key)
    counts = inside & (score < float("inf")) & (score > float("-inf"))
    score = tl.where(counts, score, float("-inf"))
    higher = tl.maximum(most, tl.max(score, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp(score - base)
    decay = tl.exp(most - base)
    total = total * decay + tl.sum(weight, 0)
    always = always * decay + tl.sum(tl.where(kept, weight, 0.0), 0)
    return higher, total, always


@triton.jit
def store_part(p_parts, i, most, total, always):
    p_parts += i * PART_FIELDS
    tl.store(p_parts + PART_MOST, most)
    tl.store(p_parts + PART_TOTAL, total)
    tl.store(p_parts + PART_ALWAYS, always)


@triton.jit
def count_from(p_keys, n, at_least, BLOCK: tl.constexpr):
    """How many of the n keys are >= at_least."""
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        total += (tl.load(p_keys + o, mask=o < n, other=HIDDEN) >= at_least).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def weight_from(p_keys, n, at_least, most, BLOCK: tl.constexpr):
    """What those of the n keys weigh that are >= at_least and not forced, relative to `most`."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        key = tl.load(p_keys + o, mask=o < n, other=HIDDEN)
        total += tl.where(key >= at_least, weight_of(key, most), 0.0)
    return tl.sum(total, 0)


@triton.jit
def lightest_keys(p_keys, n, low, high, need, most, BLOCK: tl.constexpr):
    """The fewest of n keys >= low and < high, the largest, that weigh `need` > 0 as all of them do:
    (threshold, how many of those that equal it, from the left; how many keys with those forced)."""
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        enough = weight_from(p_keys, n, middle, most, BLOCK) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    n_above = count_from(p_keys, n, high, BLOCK)
    n_equal = count_from(p_keys, n, low, BLOCK) - n_above
    above = weight_from(p_keys, n, high, most, BLOCK)
    each = weight_of(low, most)
    ties = tl.ceil((need - above) / tl.where(each > 0.0, each, 1.0))
    ties = tl.minimum(tl.maximum(ties, 1.0), n_equal.to(tl.float32)).to(tl.int32)
    ties = tl.where(each > 0.0, ties, n_equal)
    return low, ties, n_above + ties


@triton.jit
def join_parts(p_parts, splits):
    """(most, total, always) of a row, from those of its parts."""
    o_part = tl.arange(0, SPLITS_MAX)
    m = o_part < splits
    p_parts += o_part * PART_FIELDS
    mosts = tl.load(p_parts + PART_MOST, mask=m, other=float("-inf"))
    most = tl.max(mosts, 0)
    share = tl.where(mosts == float("-inf"), 0.0, tl.exp(mosts - most))
    total = tl.sum(tl.load(p_parts + PART_TOTAL, mask=m, other=0.0) * share, 0)
    always = tl.sum(tl.load(p_parts + PART_ALWAYS, mask=m, other=0.0) * share, 0)
    return most, total, always
