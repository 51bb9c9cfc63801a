"""The definition of each way to choose keys, in the place of a decoder's attention."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from loki_compile.kernels import reference
from loki_compile.kernels.checks import hidden_below
from loki_compile.kernels.kept import PAGE, page_bounds
from loki_compile.kernels.spans import span_of
from torch import Tensor
from toy_reference import DirectSparse

from loki_compile.config import LokiConfig
from loki_compile.policies.kinds import Kind, kind_of

POLICIES = ("loki", "oracle", "window", "quest", "unified", "sparq")
KEEP_NOTHING = ("oracle", "window", "unified", "sparq")


def visible_keys(mask: Tensor | None, *shape: int) -> Tensor:
    """bool (B, Hq, S, T) of that shape."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    mask = mask[(None,) * (4 - mask.ndim)]
    return (mask if mask.dtype == torch.bool else mask > hidden_below(mask.dtype)).expand(shape)


def filled_tokens(visible: Tensor) -> Tensor:
    """For each sequence, the tokens up to the last that any row of (B, Hq, S, T) sees: (B,)."""
    return (visible.any(1).any(1) * torch.arange(1, visible.shape[3] + 1)).amax(-1)


def bounds_of(keys: Tensor, tokens: Tensor) -> Tensor:
    """Page bounds (B, Hkv, P, 2 D) of keys (B, Hkv, T, D), row b of which holds `tokens[b]`; 0 for
    pages without any."""
    b, kv_heads, cached, dims = keys.shape
    bounds = keys.new_zeros((b, kv_heads, -(-cached // PAGE), 2 * dims))
    for row, count in enumerate(tokens.tolist()):
        held = page_bounds(keys[row : row + 1, :, :count], PAGE)
        bounds[row : row + 1, :, : held.shape[2]] = held
    return bounds


def first_and_last(visible: Tensor, heads: int, config: LokiConfig) -> Tensor:
    """The `sink` first and the last keys that each row of (B, Hq, S, T) sees, by its budget."""
    budget = config.budget
    visible = visible[:, :: visible.shape[1] // heads]
    slots = budget.slots(visible.shape[3])
    chosen = torch.full((*visible.shape[:3], slots), -1, dtype=torch.int32)
    for row, seen in enumerate(visible.flatten(0, 2)):
        at = seen.nonzero().flatten()
        number = budget.keys(len(at))
        first = min(budget.sink, number)
        kept = torch.cat((at[:first], at[len(at) - (number - first) :]))
        chosen.flatten(0, 2)[row, : len(kept)] = kept
    return chosen


def in_turn(
    query: Tensor, keys: Tensor, mask: Tensor | None, scale: float, config: LokiConfig
) -> Tensor:
    """One set of keys for all heads of a row: the first, a quarter for the last, and what query
    heads name in turn of the others, best first."""
    budget = config.budget
    b, hq, s, _ = query.shape
    kv_heads, cached = keys.shape[1:3]
    visible = visible_keys(mask, b, hq, s, cached)[:, 0]
    scores = reference.scores(query, None, keys, None, mask, scale=scale, per_head=True)
    chosen = torch.full((b, 1, s, budget.slots(cached)), -1, dtype=torch.int32)
    for row in range(b):
        for token in range(s):
            at = visible[row, token].nonzero().flatten().tolist()
            number = budget.keys(len(at))
            first = min(budget.sink, number)
            last = min(max(budget.recent, number // 4 - budget.sink), number - first)
            kept = [*at[:first], *at[len(at) - last :]]
            between = at[first : len(at) - last]
            orders = [
                sorted(between, key=lambda k, h=h: -scores[row, h, token, k]) for h in range(hq)
            ]
            for named in zip(*orders, strict=True):
                for key in named:
                    if key not in kept and len(kept) < number:
                        kept.append(key)
            chosen[row, 0, token, : len(kept)] = torch.tensor(sorted(kept))
    return chosen.expand(-1, kv_heads, -1, -1)


def in_largest_dims(query: Tensor, heads: int, rank: int) -> Tensor:
    """Queries (B, Hq, S, D) in fp64 that rank as SparQ's do, of so many heads that choose."""
    ranking = torch.zeros_like(query, dtype=torch.float64)
    group = query.shape[1] // heads
    for row in range(query.shape[0]):
        for head in range(heads):
            mine = slice(head * group, (head + 1) * group)
            for token in range(query.shape[2]):
                asked = query[row, mine, token].double()
                total = asked.abs().sum(0).tolist()
                largest = sorted(range(len(total)), key=lambda d: (-total[d], d))[:rank]
                some, whole = asked[:, largest].abs().sum(-1), asked.abs().sum(-1)
                for place, weight in enumerate((whole / some).sqrt()):
                    at = head * group + place
                    ranking[row, at, token, largest] = asked[place, largest] * weight
    return ranking


def in_spans(visible: Tensor, kv_heads: int, kind: Kind, config: LokiConfig) -> Tensor:
    """The first keys and the span of the last ones that each KV head reads of those that any of its
    query heads sees, of (B, Hq, S, T); `kind` as of "moa:2:3,0.5N"."""
    visible = visible.unflatten(1, (kv_heads, -1)).any(2)
    chosen = torch.full((*visible.shape,), -1, dtype=torch.int32)
    sink = max(kind.sink, config.sink)
    for row in range(visible.shape[0]):
        for head in range(kv_heads):
            lines = kind.spans[head % len(kind.spans)].lines
            for token in range(visible.shape[2]):
                at = visible[row, head, token].nonzero().flatten()
                count = len(at)
                width = max(config.recent, 1, *(a + int(b / 65536 * count) for a, b in lines))
                if sink + width < count and count >= config.min_context:
                    at = torch.cat((at[:sink], at[count - width :]))
                chosen[row, head, token, : len(at)] = at
    return chosen


class DirectPolicy(DirectSparse):
    """As `DirectSparse`, by any policy: what it ranks by is made anew from the keys of the call."""

    def __init__(
        self, policy: str, kv_heads: int, options: dict[str, Any], *, basis=None, interleaved=False
    ) -> None:
        super().__init__(basis, LokiConfig.from_options(options), kv_heads, interleaved=interleaved)
        self.policy = policy

    def positions(self, query, keys, mask, scale, per_head):
        if self.policy == "loki":
            return super().positions(query, keys, mask, scale, per_head)
        visible = visible_keys(mask, *query.shape[:3], keys.shape[2])
        if self.policy == "window":
            heads = query.shape[1] if per_head else keys.shape[1]
            return first_and_last(visible, heads, self.config)
        if self.policy.startswith("moa"):
            return in_spans(visible, keys.shape[1], kind_of(self.policy), self.config)
        if self.policy == "unified":
            return in_turn(query, keys, mask, scale, self.config)
        ranked, more = keys, {}
        if self.policy == "sparq":
            heads = query.shape[1] if per_head else keys.shape[1]
            rank = query.shape[3] // 2 if self.config.rank == "auto" else self.config.rank
            query = in_largest_dims(query, heads, rank)
        if self.policy == "quest":
            ranked = bounds_of(keys, filled_tokens(visible))
            more = {"page": PAGE, "keys": keys.shape[2]}
        return reference.select(
            query, None, ranked, None, mask, None,
            scale=scale, per_head=per_head, **self.choice(per_head), **more,
        )  # fmt: skip


class DirectLayers(DirectPolicy):
    """As `DirectPolicy`, layer by layer: `kinds` has words of `policy=` with sources spelled out,
    such as ["dense", "oracle+dense", "reuse:1", "reuse:1:0,0,2", "oracle:3,last=0.5N,from=1.0"]."""

    def __init__(
        self, kinds: list[str], kv_heads: list[int], options: dict[str, Any], *, basis=None
    ) -> None:
        super().__init__("", 0, options, basis=basis)
        self.kinds, self.heads_of, self.layer = kinds, kv_heads, 0
        self.chosen: dict[int, Tensor] = {}

    def attention(self, query, key, value, *args, **kwargs):
        self.kv_heads = self.heads_of[self.layer]
        out = super().attention(query, key, value, *args, **kwargs)
        self.layer = (self.layer + 1) % len(self.kinds)
        return out

    def positions(self, query, keys, mask, scale, per_head):
        kind = self.kinds[self.layer]
        every = torch.arange(keys.shape[2], dtype=torch.int32)
        every = every.expand(query.shape[0], query.shape[1], query.shape[2], -1)
        if kind == "dense":
            return every
        if kind.startswith("reuse"):
            _, source, *heads = kind.split(":")
            positions, there = self.chosen[int(source)], self.heads_of[int(source)]
            if heads:
                mapped = [int(head) for head in heads[0].split(",")]
            else:
                mapped = [h * there // self.kv_heads for h in range(self.kv_heads)]
            # As of query heads, whoever has chosen.
            each, group = query.shape[1] // self.kv_heads, query.shape[1] // there
            wide = positions.repeat_interleave(query.shape[1] // positions.shape[1], 1)
            rows = [h * group + g * group // each for h in mapped for g in range(each)]
            return wide[:, rows]
        self.policy = kind.removesuffix("+dense")
        if self.policy.startswith("oracle:"):
            words = self.policy.partition(":")[2].split(",")
            words *= self.kv_heads // len(words)
            self.chosen[self.layer] = self.of_heads(words, query, keys, mask, scale, per_head)
        else:
            self.chosen[self.layer] = super().positions(query, keys, mask, scale, per_head)
        return every if kind.endswith("+dense") else self.chosen[self.layer]

    def of_heads(self, words, query, keys, mask, scale, per_head) -> Tensor:
        """Head by head: the best keys by themselves, the last ones, or what another's has chosen.
        Of query heads, whoever chooses: (B, Hq, S, T)."""
        b, hq, s, _ = query.shape
        config, cached, group = self.config, keys.shape[2], hq // self.kv_heads
        visible = visible_keys(mask, b, hq, s, cached)
        by = {"per_head": per_head, "by_probability": self.choice(per_head)["by_probability"]}
        scores = reference.scores(query, None, keys, None, mask, scale=scale, **by)
        chosen = torch.full((b, hq, s, cached), -1, dtype=torch.int32)
        for row, head, token in itertools.product(range(b), range(hq), range(s)):
            kind, _, number = words[head // group].rpartition("=")
            if kind == "from":
                layer, its = map(int, number.split("."))
                there = self.chosen[layer]
                its_group = hq // self.heads_of[layer]
                place = its * its_group + head % group * its_group // group
                read = there[row, place * there.shape[1] // hq, token]
                chosen[row, head, token, : len(read)] = read[:cached]
                continue
            seen = visible[row, head, token].nonzero().flatten()
            count = len(seen)
            width = min(count, max(span_of(number).keys(count), config.sink + config.recent))
            if count < config.min_context:
                width = count
            last = min(config.recent, width) if not kind else width - min(config.sink, width)
            first = min(config.sink, width - last)
            score = scores[row, head if per_head else head // group, token, seen].clone()
            score[:first] = score[count - last :] = torch.inf
            best = score.argsort(descending=True, stable=True)[:width]
            chosen[row, head, token, :width] = seen[best].sort().values
        return chosen
