"""How many keys a row reads: the one formula, of which `cpu_select.cpp`, `cpu_torch` and
`triton_select` hold the same for the rows of a tensor; and, where the KV heads of a layer have
budgets of their own, the one formula for these, which the kernels are handed the results of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from loki_compile.kernels.checks import KEEP_ALL_Q16
from loki_compile.kernels.spans import Span

_ROUND_UP = KEEP_ALL_Q16 - 1
# Of each head those of its span: alpha in keys, beta in 1/65536.
Lines = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Budget:
    """How many of the keys that it sees a row (batch row, head, query token) chooses.

    All of them where it sees fewer than `min_keys`. Else ceil(`keep_q16` / 65536 of them), at most
    `top_k` (None: no such cap), but never fewer than the `sink` first and the `recent` last ones,
    which are always kept and count towards the budget.

    With a `mass` in (0, 1) that is a ceiling: the row chooses the fewest keys, the best of them
    behind those that are always kept, whose softmax weights by the scores that it ranks by add up
    to that share of all it sees, and as many as the ceiling says where these do not.
    """

    top_k: int | None
    keep_q16: int
    sink: int
    recent: int
    min_keys: int
    mass: float = 0.0

    @property
    def numbers(self) -> tuple[int | None, int, int, int, int]:
        """All of it but `mass`, as a graph can hold it."""
        return self.top_k, self.keep_q16, self.sink, self.recent, self.min_keys

    def keys(self, visible: int) -> int:
        """Keys that a row chooses when it sees `visible` keys; with a `mass`, at most."""
        if visible < self.min_keys:
            return visible
        share = (visible * self.keep_q16 + _ROUND_UP) // KEEP_ALL_Q16
        if self.top_k is not None:
            share = min(share, self.top_k)
        return min(visible, max(share, self.sink + self.recent))

    def keys_of(self, visible: torch.Tensor) -> torch.Tensor:
        """`keys` of each row, from int tensors of any shape."""
        share = (visible.long() * self.keep_q16 + _ROUND_UP) // KEEP_ALL_Q16
        if self.top_k is not None:
            share = share.clamp(max=self.top_k)
        share = torch.minimum(share.clamp(min=self.sink + self.recent), visible)
        return torch.where(visible < self.min_keys, visible, share)

    def most(self, visible: int) -> int:
        """As `keys`: every head reads as many."""
        return self.keys(visible)

    def least(self, visible: int) -> int:
        """Keys that a row chooses at least when it sees `visible` keys."""
        if self.mass and visible >= self.min_keys:
            return min(visible, max(1, self.sink + self.recent))
        return self.keys(visible)

    @property
    def span(self) -> Span:
        """The span that a KV head reads by a budget of its own which is as wide."""
        if self.top_k is not None:
            return Span.of((self.top_k, 0.0))
        return Span.of((self.keep_q16 < KEEP_ALL_Q16, self.keep_q16 / KEEP_ALL_Q16))

    def covers(self, visible: int) -> bool:
        """Whether every row that sees so many keys chooses all of them, whatever its scores."""
        return self.least(visible) >= visible

    def slots(self, cached: int | torch.SymInt) -> int | torch.SymInt:
        """Slots that hold the choice of any row over `cached` keys, however many of them it sees.

        A number where `top_k` is one that no short row exceeds, whatever `cached` is; a symbolic
        result is compared with nothing, so that it guards no graph.
        """
        least = max(self.sink + self.recent, self.top_k or 1)
        slots: int | torch.SymInt = least
        if self.top_k is None:
            share = (cached * self.keep_q16 + _ROUND_UP) // KEEP_ALL_Q16
            slots = torch.sym_max(share, least)
        if self.min_keys - 1 > least:
            slots = torch.sym_max(slots, torch.sym_min(self.min_keys - 1, cached))
        return slots


@dataclass(frozen=True)
class HeadBudgets:
    """How many of the keys that it sees a row of each KV head chooses, where heads differ.

    All of them where it sees fewer than `min_keys`. Else as many as the head's span says, but never
    fewer than the `sink` first and the `recent` last ones, which are always kept and count towards
    it. A head that is `last` ranks no key: behind the sinks it keeps the last ones.

    heads: of each KV head; one alone is that of all. None: it reads what another layer's head
    chose, and chooses nothing. last: as many.
    """

    heads: tuple[Span | None, ...]
    last: tuple[bool, ...]
    sink: int
    recent: int
    min_keys: int

    def __post_init__(self) -> None:
        if not self.heads or len(self.last) != len(self.heads):
            raise ValueError("found no budget of a KV head; needed one of each, or one for all")

    @property
    def numbers(self) -> tuple[Lines, tuple[bool, ...], int, int, int]:
        """All of it, as a graph can hold it; a head without a span has no lines."""
        lines = tuple(() if span is None else span.lines for span in self.heads)
        return lines, self.last, self.sink, self.recent, self.min_keys

    def of_each(self, kv_heads: int) -> HeadBudgets:
        """The same, said of each of so many KV heads."""
        times = kv_heads // len(self.heads)
        heads, last = self.heads * times, self.last * times
        return HeadBudgets(heads, last, self.sink, self.recent, self.min_keys)

    def mapped(self, heads: Sequence[int], instead: Span) -> HeadBudgets:
        """Those of other heads, number i that of `heads[i]`; `instead` where that chooses
        nothing."""
        spans = tuple(self.heads[head] or instead for head in heads)
        last = tuple(self.last[head] for head in heads)
        return HeadBudgets(spans, last, self.sink, self.recent, self.min_keys)

    @property
    def own(self) -> tuple[int, ...]:
        """Numbers of the heads that choose."""
        return tuple(number for number, span in enumerate(self.heads) if span is not None)

    @property
    def ranks(self) -> bool:
        """Whether any head ranks keys."""
        pairs = zip(self.heads, self.last, strict=True)
        return any(span is not None and not last for span, last in pairs)

    def keys(self, visible: int) -> tuple[int, ...]:
        """Keys that a row of each head chooses which sees so many; 0 where another chose."""
        return tuple(0 if span is None else self._keys(span, visible) for span in self.heads)

    def _keys(self, span: Span, visible: int) -> int:
        if visible < self.min_keys:
            return visible
        return min(visible, max(span.keys(visible), self.sink + self.recent))

    def most(self, visible: int) -> int:
        """Keys that the head chooses which chooses the most."""
        return max(self.keys(visible))

    def covers(self, visible: int) -> bool:
        """Whether every head that chooses chooses all of so many keys."""
        return all(self._keys(span, visible) >= visible for span in self.heads if span is not None)

    def slots(self, cached: int | torch.SymInt) -> int | torch.SymInt:
        """As `Budget.slots`, for the widest head."""
        slots: int | torch.SymInt = max(self.sink + self.recent, 1)
        lines = {line for span in self.heads if span is not None for line in span.lines}
        constants = [alpha for alpha, beta in lines if beta == 0]
        slots = least = max(slots, *constants) if constants else slots
        for alpha, beta in sorted(lines):
            if beta:
                slots = torch.sym_max(slots, alpha + cached * beta // KEEP_ALL_Q16)
        if self.min_keys - 1 > least:
            slots = torch.sym_max(slots, torch.sym_min(self.min_keys - 1, cached))
        return slots


def budgets_from(
    heads: Lines,
    last: Sequence[bool],
    sink: int,
    recent: int,
    min_keys: int,
) -> HeadBudgets:
    """The budgets of which these are the `numbers`."""
    spans = tuple(Span(lines) if lines else None for lines in heads)
    return HeadBudgets(spans, tuple(last), sink, recent, min_keys)


def budgets_of_rows(
    count: torch.Tensor, heads: int, kv_heads: int, budgets: HeadBudgets
) -> torch.Tensor:
    """What rows choose that see so many keys, as `loki::select` takes it: int32 (B, heads, S, 2),
    of which the first is the keys and the second how many of them are the last ones that are seen.

    count: int (B, 1 or heads, S); heads: the KV heads, or query heads in blocks of these.
    """
    count = count.to(torch.int64)
    of_rows = torch.arange(heads, device=count.device) // (heads // kv_heads)
    of_rows = of_rows.view(1, -1, 1)
    count = count + of_rows * 0
    keys, last = torch.zeros_like(count), torch.zeros_like(count)
    pairs = list(zip(budgets.heads, budgets.last, strict=True))
    for span, ranks_none in dict.fromkeys(pairs):
        if span is None:
            continue
        lines = [(count * beta >> 16) + alpha for alpha, beta in span.lines]
        longest = functools.reduce(torch.maximum, lines).clamp(min=budgets.sink + budgets.recent)
        wanted = torch.where(count < budgets.min_keys, count, torch.minimum(longest, count))
        ending = (wanted - budgets.sink).clamp(min=0) if ranks_none else wanted * 0
        ending = torch.maximum(ending, count.clamp(max=budgets.recent))
        # Of a row that reads all it sees nothing is to be ranked.
        ending = torch.where(wanted >= count, count, ending)
        own = [number for number, pair in enumerate(pairs) if pair == (span, ranks_none)]
        if len(own) == len(pairs):
            keys, last = wanted, ending
            continue
        mine = functools.reduce(torch.logical_or, [of_rows == number for number in own])
        keys, last = torch.where(mine, wanted, keys), torch.where(mine, ending, last)
    return torch.stack((keys, last), -1).to(torch.int32)
