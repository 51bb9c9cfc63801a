"""Moments of a prompt's queries, and which of its rows are of real tokens."""

from __future__ import annotations

import pytest
import torch
from loki_compile.kernels.moments import MOMENT_ROWS, query_moment, real_rows

LOWEST = torch.finfo(torch.float32).min


def rows_of(tokens):
    return [(i * tokens + MOMENT_ROWS - 1) // MOMENT_ROWS - 1 for i in range(1, MOMENT_ROWS + 1)]


def queries(tokens, batch=2, heads=6, dims=5):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, heads, tokens, dims, generator=generator)


@pytest.mark.parametrize("tokens", [9, 255, 256, 257, 1003])
def test_rows_are_spread_over_the_prompt_and_the_last_is_among_them(tokens):
    rows = rows_of(tokens)
    assert rows == sorted(rows) and rows[0] >= 0 and rows[-1] == tokens - 1
    assert len(set(rows)) == min(tokens, MOMENT_ROWS)
    query = queries(tokens)
    moment, count = query_moment(query, 2, None)
    picked = query[:, :, rows].double().unflatten(1, (2, 3)).flatten(2, 3)
    wrong = MOMENT_ROWS * 3 * 2**-24 * float((picked.mT @ picked).amax())  # of a sum in fp32
    torch.testing.assert_close(moment.double(), picked.mT @ picked, rtol=0, atol=wrong)
    assert moment.dtype == torch.float32 and count.tolist() == [MOMENT_ROWS * 3]


def test_rows_that_do_not_count_may_hold_anything():
    query = queries(300)
    real = torch.zeros(2, MOMENT_ROWS, dtype=torch.bool)
    real[0, 200:], real[1, 5] = True, True
    rows = torch.tensor(rows_of(300))
    query[0, :, rows[:200]] = torch.nan
    moment, count = query_moment(query, 3, real)
    assert count.tolist() == [56 * 2, 2]
    for row in range(2):
        picked = query[row][:, rows[real[row]]].double().unflatten(0, (3, 2)).flatten(1, 2)
        torch.testing.assert_close(moment[row].double(), picked.mT @ picked, rtol=1e-5, atol=1e-4)


def causal(tokens, slots, past=0):
    return torch.arange(slots) <= torch.arange(tokens)[:, None] + past


@pytest.mark.parametrize("blind", [True, False], ids=["blind", "seeing itself"])
@pytest.mark.parametrize("slots", [301, 340], ids=["growing", "static"])
@pytest.mark.parametrize(
    "mask_of, rule",
    [
        (lambda seen: seen, (1.0, False)),
        (lambda seen: ~seen, (1.0, True)),
        (lambda seen: torch.where(seen, 0.0, -torch.inf), (1.0, False)),
        (lambda seen: torch.where(seen, 0.0, LOWEST), (1.0, False)),
        (lambda seen: (~seen).float(), (LOWEST, False)),
    ],
    ids=["bool", "inverted", "-inf", "lowest", "scaled"],
)
def test_padding_on_the_left_is_told_from_the_mask(mask_of, rule, slots, blind):
    tokens, padded = 301, torch.tensor([120, 0])
    real = torch.arange(slots) >= padded[:, None]
    seen = (causal(tokens, slots) & real[:, None])[:, None]
    if not blind:
        seen = seen | (torch.arange(slots) == torch.arange(tokens)[:, None])
    found = real_rows(queries(tokens), [rule], mask_of(seen))
    rows = torch.tensor(rows_of(tokens))
    assert torch.equal(found, rows >= padded[:, None])


def test_masks_of_several_terms_are_seen_together():
    tokens, real = 301, torch.arange(301) >= 40
    found = real_rows(
        queries(tokens), [(1.0, False)] * 2, causal(tokens, tokens), real[None, None, None]
    )
    assert torch.equal(found, torch.tensor(rows_of(tokens))[None] >= 40)


def test_a_mask_that_lets_everything_be_seen_leaves_every_row():
    ones = torch.ones(1, 1, 1, 301, dtype=torch.bool)
    assert real_rows(queries(301), [(1.0, False)], ones).all()
