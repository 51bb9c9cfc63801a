"""What a decode step reads of the caches under a plan: keys, values, and what ranks keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loki_compile.kernels.budget import Budget
from loki_compile.kernels.spans import Span, Spans
from loki_compile.mass_curves import CurvedLayer
from loki_compile.policies.head_budgets import HeadBudget
from loki_compile.policies.kinds import SPANS, Kind

# Beside the dims of an int8 index row.
_SCALE_BYTES = 4
# Of 1, until a share of keys is told to a part in 65536.
_HALVINGS = 17


@dataclass(frozen=True)
class StepBytes:
    """Of a step behind `tokens` cached ones. itemsize: bytes of a cached number. rank: dims of the
    index (int8). budget: what a layer chooses whose word says nothing of it, and what is always
    kept."""

    layers: tuple[CurvedLayer, ...]
    itemsize: int
    rank: int
    tokens: int
    budget: Budget

    @property
    def index(self) -> float:
        """The index of a head, as a part of the bytes of its keys and values."""
        return (self.rank + _SCALE_BYTES) / (2 * self.layers[0].head_dim * self.itemsize)

    def keys_of(self, span: Span) -> int:
        """Keys that a head reads whose budget is that span."""
        least = max(self.budget.sink + self.budget.recent, 1)
        return min(self.tokens, max(span.keys(self.tokens), least))

    def keys(self, kinds: Sequence[Kind]) -> list[list[int]]:
        """Keys that each KV head of each layer reads; of a layer that only chooses for others,
        those that it chooses."""
        read: list[list[int]] = []
        for layer, kind in zip(self.layers, kinds, strict=True):
            heads = range(layer.kv_heads)
            if kind.reuse:
                assert kind.source is not None
                of = kind.heads or heads
                read.append([read[kind.source][of[head]] for head in heads])
            elif kind.ranking == SPANS:
                spans = Spans(kind.spans, kind.sink, self.budget.recent)
                of_spans = [*spans.keys(self.tokens)]
                read.append(of_spans * layer.kv_heads if len(of_spans) == 1 else of_spans)
            elif kind.budgets:
                own = [
                    self.keys_of(each.span) if each.span else read[each.source][each.head]
                    for each in _each(kind, layer.kv_heads)
                ]
                read.append(own)
            else:
                whole = kind.dense and not kind.ranking
                chosen = self.tokens if whole else self.budget.keys(self.tokens)
                read.append([chosen for _ in heads])
        return read

    def share(self, kinds: Sequence[Kind]) -> float:
        """Of all bytes of the caches, the part that a step reads, indexes counted in."""
        read = whole = 0.0
        for layer, kind, keys in zip(self.layers, kinds, self.keys(kinds), strict=True):
            of_key = 2 * layer.head_dim * self.itemsize
            whole += layer.kv_heads * self.tokens * of_key
            if kind.dense:
                keys = [self.tokens] * layer.kv_heads
            read += sum(keys) * of_key
            ranks = [each.ranks for each in _each(kind, layer.kv_heads)] if kind.budgets else None
            count = layer.kv_heads * bool(kind.ranking) if ranks is None else sum(ranks)
            if kind.ranking == "loki":
                read += count * self.tokens * (self.rank + _SCALE_BYTES)
            elif kind.ranking == "oracle" and not kind.dense:
                read += count * self.tokens * layer.head_dim * self.itemsize
        return read / whole

    def uniform(self, share: float, plan: Sequence[Kind] = ()) -> list[Kind]:
        """Every head of a plan's layers that choose (no plan: of all layers) ranks, and chooses the
        same part of its keys: as many as a step may read in that part of the bytes; the least that
        heads can read where that is more."""
        plan = plan or [Kind("loki")] * len(self.layers)
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._alike(plan, middle)[1] <= share else (low, middle)
        return self._alike(plan, low)[0]

    def _alike(self, plan: Sequence[Kind], keys: float) -> tuple[list[Kind], float]:
        budgets = (HeadBudget(Span.of((0, keys))),)
        kinds = [replace(kind, budgets=budgets) if kind.ranking else kind for kind in plan]
        return kinds, self.share(kinds)


def _each(kind: Kind, kv_heads: int) -> tuple[HeadBudget, ...]:
    return kind.budgets * kv_heads if len(kind.budgets) == 1 else kind.budgets
