"""Masks as the ops take them: several as one, tiles of heads as blocks, rules asked."""

import pytest
import torch
from loki_compile.kernels.fused import SCORES
from loki_compile.kernels.masks import blind_rows, joint_mask, mask_bounds, plain_mask, visible_by
from torch import nn

pytestmark = pytest.mark.covers

BATCH, HEADS, NEW, SLOTS = 2, 6, 3, 11
SIZES = (HEADS, 1, NEW)
LOW, HIDDEN = torch.finfo(torch.float32).min, float("-inf")


def boolean(*shape):
    """Some keys are hidden, the first one never."""
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


def added(*shape):
    return torch.randn(shape)


def one_after_the_other(scores, rules, masks):
    for mask, (factor, inverted, fill, floor) in zip(masks, rules, strict=True):
        if mask.dtype == torch.bool:
            scores = torch.where(mask != inverted, scores, fill * factor)
        else:
            scores = scores + mask.clamp(min=floor) * factor
    return scores


TERMS = {
    "one bool": lambda: [(boolean(NEW, SLOTS), (1.0, False, HIDDEN, HIDDEN))],
    "two bools": lambda: [
        (boolean(NEW, SLOTS), (1.0, False, HIDDEN, HIDDEN)),
        (boolean(BATCH, 1, 1, SLOTS), (1.0, False, HIDDEN, HIDDEN)),
    ],
    "two bools, one inverted": lambda: [
        (boolean(BATCH, 1, NEW, SLOTS), (1.0, False, HIDDEN, HIDDEN)),
        (~boolean(HEADS, 1, SLOTS), (0.5, True, HIDDEN, HIDDEN)),
    ],
    "a finite fill": lambda: [(boolean(NEW, SLOTS), (1.0, False, LOW, HIDDEN))],
    "a finite fill, halved and inverted": lambda: [
        (~boolean(NEW, SLOTS), (0.5, True, LOW, HIDDEN))
    ],
    "one added": lambda: [(added(BATCH, HEADS, NEW, SLOTS), (1.0, False, HIDDEN, HIDDEN))],
    "one added, scaled": lambda: [(added(NEW, SLOTS), (0.25, False, HIDDEN, HIDDEN))],
    "two added": lambda: [
        (added(1, HEADS, 1, SLOTS), (1.0, False, HIDDEN, HIDDEN)),
        (added(NEW, SLOTS), (3.0, False, HIDDEN, HIDDEN)),
    ],
    "three added": lambda: [
        (added(NEW, SLOTS), (factor, False, HIDDEN, HIDDEN)) for factor in (1.0, 2.0, 1.0)
    ],
    "added, then hidden": lambda: [
        (added(NEW, SLOTS), (2.0, False, HIDDEN, HIDDEN)),
        (boolean(BATCH, 1, NEW, SLOTS), (1.0, False, LOW, HIDDEN)),
    ],
    "hidden, then added": lambda: [
        (boolean(BATCH, 1, NEW, SLOTS), (1.0, False, HIDDEN, HIDDEN)),
        (added(1, HEADS, NEW, SLOTS), (1.0, False, HIDDEN, HIDDEN)),
    ],
}


@pytest.mark.parametrize("name", TERMS)
def test_one_mask_does_what_several_do_one_after_the_other(name):
    masks, rules = zip(*TERMS[name](), strict=True)
    joint = joint_mask(rules, torch.float32, *masks)
    scores = torch.randn(BATCH, HEADS, NEW, SLOTS)
    hides = all(m.dtype == torch.bool for m in masks) and all(r[2] == HIDDEN for r in rules)
    assert (joint.dtype == torch.uint8) == hides
    found = scores.masked_fill(joint == 0, HIDDEN) if hides else scores + joint
    expected = one_after_the_other(scores, rules, masks)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))
    assert joint.ndim == 4 and joint.is_contiguous() and joint.shape[3] == SLOTS


def test_a_row_that_sees_nothing_keeps_what_its_fill_says():
    nothing = torch.zeros(1, SLOTS, dtype=torch.bool)
    filled = joint_mask([(1.0, False, LOW, HIDDEN)], torch.float32, nothing)
    assert filled.isfinite().all() and (filled <= -1e37).all()
    assert (joint_mask([(1.0, False, HIDDEN, HIDDEN)], torch.float32, nothing) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_numbers_is_in_the_queries_dtype_unless_one_comes_in_another(dtype):
    keep = boolean(NEW, SLOTS)
    assert joint_mask([(1.0, False, -1e38, HIDDEN)], dtype, keep).dtype == dtype
    rules = [(1.0, False, HIDDEN, HIDDEN)] * 2
    assert joint_mask(rules[:1], dtype, added(NEW, SLOTS).double()).dtype == torch.float64
    assert joint_mask(rules, dtype, keep, keep).dtype == torch.uint8


def test_what_was_expanded_is_stored_once():
    wide = boolean(1, 1, NEW, SLOTS).expand(BATCH, HEADS, NEW, SLOTS)
    joint = joint_mask([(1.0, False, HIDDEN, HIDDEN)], torch.float32, wide)
    assert torch.equal(joint.bool().expand_as(wide), wide)
    rows = added(BATCH, 1, 1, SLOTS).expand(BATCH, HEADS, NEW, SLOTS)
    joint = joint_mask([(1.0, False, HIDDEN, HIDDEN)], torch.float32, rows)
    assert joint.shape == (BATCH, 1, 1, SLOTS) and torch.equal(joint.expand_as(rows), rows)


def test_heads_are_taken_out_of_the_batch():
    mask = added(BATCH * HEADS, NEW, SLOTS)
    apart = plain_mask(mask, ("bh", "s", "t"), (HEADS, 1, NEW), 0)
    assert torch.equal(apart, mask.view(BATCH, HEADS, NEW, SLOTS))


@pytest.mark.parametrize("shape", [(BATCH, HEADS, NEW, SLOTS), (HEADS, 1, SLOTS)])
def test_tiles_of_heads_become_blocks(shape):
    """Query head h reads KV head h % 2: heads 0 2 4 come first, then 1 3 5."""
    mask = added(*shape)
    heads = torch.tensor([0, 2, 4, 1, 3, 5])
    assert torch.equal(plain_mask(mask, SCORES, SIZES, 2), mask.index_select(-3, heads))
    alike = added(BATCH, 1, NEW, SLOTS)
    assert plain_mask(alike, SCORES, SIZES, 2) is alike
    both = added(BATCH * HEADS, NEW, SLOTS)
    expected = both.view(BATCH, HEADS, NEW, SLOTS).index_select(1, heads)
    assert torch.equal(plain_mask(both, ("bh", "s", "t"), SIZES, 2), expected)


def test_what_is_added_goes_no_lower_than_the_floor_nor_does_a_sum():
    mask = torch.tensor([[0.5, -2.0, HIDDEN]])
    once = joint_mask([(1.0, False, HIDDEN, -1.5)], torch.float32, mask)
    assert once.flatten().tolist() == [0.5, -1.5, -1.5]
    halved = joint_mask([(0.5, False, HIDDEN, -1.5)], torch.float32, mask)
    assert halved.flatten().tolist() == [0.25, -0.75, -0.75]
    twice = joint_mask([(1.0, False, HIDDEN, LOW)] * 2, torch.float32, mask, mask)
    assert twice.flatten().tolist() == [1.0, -4.0, LOW]


def test_a_fill_that_a_half_precision_mask_cannot_hold_widens_it():
    keep = boolean(NEW, SLOTS)
    wide = joint_mask([(1.0, False, LOW, HIDDEN)], torch.float16, keep)
    assert wide.dtype == torch.float32 and wide.isfinite().all()


def test_rows_without_any_key_are_told_from_rows_with_very_low_ones():
    seen = torch.tensor([[True, False], [False, False]])
    hard = joint_mask([(1.0, False, HIDDEN, HIDDEN)], torch.float32, seen)
    soft = joint_mask([(1.0, False, LOW, HIDDEN)], torch.float32, seen)
    added_ = joint_mask([(1.0, False, HIDDEN, HIDDEN)], torch.float32, torch.where(seen, 1, HIDDEN))
    blind = [
        blind_rows(mask, mask_bounds(mask)).flatten().tolist() for mask in (hard, soft, added_)
    ]
    assert blind == [[False, True], [False, False], [False, True]]


class Rule(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *numbers):
        return self.function(*numbers)


@pytest.mark.parametrize(
    "function, shape",
    [
        (lambda b, h, q, k, at: k <= q + at[b], (BATCH, 1, NEW, SLOTS)),
        (lambda b, h, q, k, at: (k + h) % 3 > 0, (1, HEADS, 1, SLOTS)),
        (lambda b, h, q, k, at: k > 4, (1, 1, 1, SLOTS)),
        (lambda b, h, q, k, at: at[b] > 3, (BATCH, 1, 1, SLOTS)),
    ],
    ids=["causal", "heads", "keys", "rows"],
)
@pytest.mark.parametrize("token_axis", [2, 1])
def test_a_rule_is_asked_about_every_key(function, shape, token_axis):
    at = torch.tensor([2, 5])
    key = torch.empty(BATCH, 2, 2, 8)
    key = torch.empty([SLOTS if d == token_axis else n for d, n in enumerate(key.shape)])
    found = visible_by(Rule(function), torch.empty(BATCH, HEADS, NEW, 8), key, token_axis, at)
    assert found.shape == shape and found.dtype == torch.bool
    found = found.expand(BATCH, HEADS, NEW, SLOTS)
    numbers = torch.cartesian_prod(*(torch.arange(n) for n in (BATCH, HEADS, NEW, SLOTS)))
    for entry in numbers.tolist():
        assert found[tuple(entry)] == function(*map(torch.tensor, entry), at)
