"""Slots for the keys that spans read, and for no others: of each KV head its first keys, and a ring
of the last ones as wide as its span, all of a layer in one run of slots.

The key of rank r, counted from 0 over what a row sees, lies in slot r of its head while the head
has room, and then in the ring by its rank modulo the ring's width. What a head reads is always two
ranges of slots: where the ring has wrapped, the first keys and its beginning are one.

Letters: B rows, H KV heads, C slots of all heads of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loki_compile.kernels.spans import Spans


def slots_of_heads(spans: Spans, max_length: int) -> tuple[int, ...]:
    """Slots that each KV head needs so that at no length up to `max_length` a key is missing that
    it reads."""
    # Below min_keys a head reads all; from there on a span never begins before it did.
    whole = min(max(spans.min_keys - 1, 0), max_length)
    return tuple(max(keys, whole) for keys in spans.keys(max_length))


@dataclass(frozen=True)
class Rings:
    """Of one layer; tensors int64.

    size: C. offset, first, ring (H,): where the slots of each head begin, how many of them hold
    first keys, and how many the last ones. head, place (C,): of each slot its head, and its number
    among that head's. alpha, beta (H, L): the lines of its span, beta in 1/65536.
    """

    size: int
    recent: int
    sink: int
    min_keys: int
    offset: Tensor
    first: Tensor
    ring: Tensor
    head: Tensor
    place: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def of(cls, spans: Spans, max_length: int, device: torch.device) -> Rings:
        """spans: of every KV head."""
        slots = slots_of_heads(spans, max_length)
        first = [min(spans.sink, each - 1) for each in slots]
        lines = max(len(span.lines) for span in spans.heads)
        padded = [
            (*span.lines, *[span.lines[0]] * (lines - len(span.lines))) for span in spans.heads
        ]
        numbers = lambda values: torch.tensor(values, device=device, dtype=torch.int64)  # noqa: E731
        return cls(
            sum(slots), spans.recent, spans.sink, spans.min_keys,
            offset=numbers([sum(slots[:head]) for head in range(len(slots))]),
            first=numbers(first),
            ring=numbers([all_ - few for all_, few in zip(slots, first, strict=True)]),
            head=numbers([head for head, each in enumerate(slots) for _ in range(each)]),
            place=numbers([place for each in slots for place in range(each)]),
            alpha=numbers([[alpha for alpha, _ in of_head] for of_head in padded]),
            beta=numbers([[beta for _, beta in of_head] for of_head in padded]),
        )  # fmt: skip

    def ranks(self, count: Tensor) -> Tensor:
        """The rank of the key that each slot holds once rows have seen `count` (B,): int64 (B, C),
        -1 for none."""
        last = count.unsqueeze(-1) - 1
        first, ring = self.first[self.head], self.ring[self.head]
        newest = last - (last - self.place) % ring  # in the slot's turn of the ring
        rank = torch.where(self.place < first, self.place, newest)
        held = (rank <= last) & (rank >= torch.minimum(self.place, first))
        return torch.where(held, rank, -1)

    def newest(self, count: Tensor) -> Tensor:
        """The slot of the key of rank `count` - 1 (B,): int64 (B, H)."""
        last = count.unsqueeze(-1) - 1
        turned = self.first + (last - self.first) % self.ring
        return self.offset + torch.where(last < self.first, last, turned)

    def ranges(self, count: Tensor) -> Tensor:
        """The slots that rows read which see `count` keys (B,), as `loki::attention` takes ranges:
        int32 (B, H, 1, 4)."""
        seen = count.unsqueeze(-1)  # (B, 1)
        longest = ((seen.unsqueeze(-1) * self.beta >> 16) + self.alpha).amax(-1)
        width = longest.clamp(min=max(self.recent, 1))
        whole = (width + self.sink >= seen) | (seen < self.min_keys)
        since = torch.where(whole, 0, seen - width)  # the rank that the last ones begin with
        start = self.first + (since - self.first) % self.ring
        end = self.first + (seen - 1 - self.first) % self.ring + 1
        wrapped = start >= end
        stop = torch.where(wrapped, end, self.first)
        end = torch.where(wrapped, self.first + self.ring, end)
        # All that a row sees lies in the order in which it came.
        stop = torch.where(whole, seen, stop)
        start, end = torch.where(whole, seen, start), torch.where(whole, seen, end)
        ends = torch.stack((stop * 0, stop, start, end), -1) + self.offset.unsqueeze(-1)
        return ends.unsqueeze(2).to(torch.int32)
