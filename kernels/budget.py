"""How many keys a row reads: the one formula, of which `cpu_select.cpp`, `cpu_torch` and
`triton_select` hold the same for the rows of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from loki_compile.kernels.checks import KEEP_ALL_Q16

_ROUND_UP = KEEP_ALL_Q16 - 1


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
