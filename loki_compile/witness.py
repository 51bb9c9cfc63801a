"""Whether caches that count no writes are as the last step left them: see `Witness`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loki_compile.caches import Cached, reading_waits

# Rows of each cache that a witness remembers, beside the newest.
WITNESS_ROWS = 16


class Witness:
    """Some rows of caches that have no version counter, as a step has left them: of each the newest
    and WITNESS_ROWS evenly spread over the others, which move on from step to step.

    Rows of all caches are compared at once. On a CPU the answer is there at once; elsewhere waiting
    for it would stop the device at every step, so it is asked for at the next step, and a foreign
    write is noticed one step late.
    """

    def __init__(self, caches: Sequence[tuple[Cached, int]], turn: int) -> None:
        """caches: each with how many tokens it holds; turn: changes from step to step."""
        self.rows: list[tuple[slice, slice]] = []
        for cached, filled in caches:
            last = max(0, min(filled, cached.slots) - 1)
            step = max(1, last // WITNESS_ROWS)
            first = turn * 40503 % step  # of Knuth's multiplicative hash: no period of a text
            self.rows.append((slice(first, last, step), slice(last, last + 1)))
        self.held = self._gather([cached for cached, _ in caches])
        self.late: list[tuple[Tensor, Any]] = []

    def agrees(self, caches: Sequence[Cached], moved: Tensor | None = None) -> bool:
        """Whether the rows are what they were; where that is known later, whether nothing known by
        now speaks against it.

        moved (0-d, bool, on the device of the caches): something else that speaks against it.
        """
        now = self._gather(caches)
        if [x.shape for x in now] != [x.shape for x in self.held]:
            return False
        if not reading_waits(caches[0].past):
            return all(torch.equal(a, b) for a, b in zip(now, self.held, strict=True))
        differ = [(a != b).any() for a, b in zip(now, self.held, strict=True)]
        if moved is not None:
            differ.append(moved)
        self.late.append(without_waiting(torch.stack(differ).any()))
        return True

    def was_wrong(self) -> bool:
        """Whether an answer that has come in since says that the rows had changed."""
        known = [answer for answer, event in self.late if event is None or event.query()]
        return any(bool(answer) for answer in known)

    def _gather(self, caches: Sequence[Cached]) -> list[Tensor]:
        """The rows as integers, those of one shape and dtype in one tensor."""
        alike: dict[Any, list[Tensor]] = {}
        for cached, rows in zip(caches, self.rows, strict=True):
            for piece in (piece for part in rows for piece in cached.every(part)):
                alike.setdefault((piece.shape, piece.dtype), []).append(piece)
        return [
            torch.stack(pieces).view(_INTEGERS[dtype.itemsize])
            for (_, dtype), pieces in alike.items()
        ]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def without_waiting(answer: Tensor) -> tuple[Tensor, Any]:
    """A copy of `answer` on the host, and the event behind which it holds."""
    host = torch.empty((), dtype=answer.dtype, pin_memory=True)
    host.copy_(answer, non_blocking=True)
    event = torch.Event(answer.device)
    event.record()
    return host, event
