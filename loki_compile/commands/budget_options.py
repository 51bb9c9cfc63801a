"""What KV heads may do, as options of a program: how many keys each reads, and who chooses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from loki_compile.commands.budget_choice import Chosen, Option
from loki_compile.commands.step_bytes import StepBytes
from loki_compile.kernels.spans import Span
from loki_compile.mass_curves import SHARES, Missed
from loki_compile.policies.head_budgets import HeadBudget
from loki_compile.policies.kinds import SPANS, Kind

# The ways to come by keys: by a head's own index, the last ones, or as an earlier head has chosen.
RANKED, LAST, FROM = "ranked", "last", "from"
# What a head of a layer is taken to lose that misses so much.
Worth = Callable[[int, float], float]

# Heads of earlier layers that each head may read the choice of: those that serve it best.
SOURCES = 3


def plain(layer: int, missed: float) -> float:
    """It is what it misses that a head loses."""
    return missed


@dataclass(frozen=True)
class Menu:
    """Options of all heads. budgets: the word of each option. places: of each head in the plan, its
    layer and its number there. plan: what layers do whose heads are none of these."""

    options: tuple[Option, ...]
    budgets: tuple[HeadBudget, ...]
    places: tuple[tuple[int, int], ...]
    plan: tuple[Kind, ...]

    def kinds(self, chosen: Chosen) -> list[Kind]:
        """The plan that a choice makes."""
        heads: dict[int, dict[int, HeadBudget]] = {}
        for (layer, head), option in zip(self.places, chosen.options, strict=True):
            heads.setdefault(layer, {})[head] = self.budgets[option]
        made = [*self.plan]
        for layer, own in heads.items():
            budgets = tuple(own[head] for head in sorted(own))
            made[layer] = replace(made[layer], budgets=budgets)
            if all(_whole(each) for each in budgets):
                made[layer] = Kind(dense=True)
        return made


def of_heads(
    missed: Missed,
    costs: StepBytes,
    slots: Sequence[int],
    ways: Iterable[str],
    worth: Worth,
) -> Menu:
    """Every head of every layer does any of `ways`; losses and costs are parts of all heads'.

    slots: of each layer the class of its slots; heads read what layers of their own class chose.
    """
    heads, keys, index = len(missed.layers), _keys(costs), costs.index
    of = _parts(costs, missed)
    options: list[Option] = []
    budgets: list[HeadBudget] = []
    ranked: dict[tuple[int, int], int] = {}

    def offer(
        head: int, loss: Tensor, cost: float, budget: HeadBudget, needs: int | None = None
    ) -> None:
        lost = worth(int(missed.layers[head]), float(loss)) / heads
        options.append(Option(head, lost, cost * of[head], needs))
        budgets.append(budget)

    ways = {*ways}
    for head in range(heads):
        for k, share in enumerate(SHARES):
            read, span = keys[k] / costs.tokens, Span.of((0, share))
            if RANKED in ways:
                ranked[head, k] = len(options)
                offer(head, missed.ranked[head, k], index + read, HeadBudget(span))
            if LAST in ways:
                offer(head, missed.last[head, k], read, HeadBudget(span, last=True))
    if FROM in ways:
        for head in range(heads):
            for source in _sources(missed, head, slots):
                layer, number = int(missed.layers[source]), int(missed.heads[source])
                budget = HeadBudget(None, source=layer, head=number)
                for k in range(len(SHARES)):
                    loss = missed.read[head, source, k]
                    if LAST not in ways or loss < missed.last[head, k]:
                        needs = ranked[source, k]
                        offer(head, loss, keys[k] / costs.tokens, budget, needs)
    places = tuple(zip(missed.layers.tolist(), missed.heads.tolist(), strict=True))
    return Menu(tuple(options), tuple(budgets), places, (Kind("loki"),) * len(costs.layers))


def of_plan(missed: Missed, costs: StepBytes, plan: Sequence[Kind], worth: Worth) -> Menu:
    """Heads of the layers of a plan that choose get budgets; those that read what they chose read
    as many, and lose by it too."""
    number = _numbers(missed)
    readers: dict[int, list[int]] = {}
    for layer, kind in enumerate(plan):
        for head in range(costs.layers[layer].kv_heads):
            if kind.reuse and kind.source is not None:
                source = number[kind.source, kind.heads[head] if kind.heads else head]
                readers.setdefault(source, []).append(number[layer, head])
    of, keys = _parts(costs, missed), _keys(costs)
    places = [place for place in number if plan[place[0]].ranking]
    options: list[Option] = []
    budgets: list[HeadBudget] = []
    for item, place in enumerate(places):
        own, kind = number[place], plan[place[0]]
        index = costs.index if kind.ranking == "loki" else 0.5 * (not kind.dense)
        for k, share in enumerate(SHARES):
            reads = [] if kind.dense else [(place[0], missed.ranked[own, k])]
            for each in readers.get(own, []):
                reads.append((int(missed.layers[each]), missed.read[each, own, k]))
            count = (not kind.dense) * of[own] + sum(of[each] for each in readers.get(own, []))
            cost = index * of[own] + keys[k] / costs.tokens * count
            loss = math.fsum(worth(layer, float(x)) for layer, x in reads) / len(number)
            options.append(Option(item, loss, cost))
            budgets.append(HeadBudget(Span.of((0, share))))
    return Menu(tuple(options), tuple(budgets), tuple(places), tuple(plan))


def fixed_share(costs: StepBytes, plan: Sequence[Kind]) -> float:
    """Of all bytes, what layers of a plan read that no budget decides: those that read all keys."""
    every = sum(layer.kv_heads * layer.head_dim for layer in costs.layers)
    whole = [
        layer.kv_heads * layer.head_dim
        for layer, kind in zip(costs.layers, plan, strict=True)
        if kind.dense
    ]
    return sum(whole) / every


def missed_share(missed: Missed, costs: StepBytes, plan: Sequence[Kind]) -> float:
    """The mean share of attention that heads miss under a plan, between measured points in a
    straight line."""
    number, grid, total = _numbers(missed), _keys(costs), 0.0
    read = costs.keys(plan)
    for (layer, head), own in number.items():
        kind, source = plan[layer], None
        way = missed.last if kind.ranking == SPANS else missed.ranked
        if kind.dense:
            continue
        if kind.reuse and kind.source is not None:
            source = number[kind.source, kind.heads[head] if kind.heads else head]
        elif kind.budgets:
            budget = kind.budgets[head if len(kind.budgets) > 1 else 0]
            if budget.span is None:
                source = number[budget.source, budget.head]
            way = missed.last if budget.last else way
        curve = way[own] if source is None else missed.read[own, source]
        total += float(np.interp(read[layer][head], grid, curve.numpy()))
    return total / len(number)


def _sources(missed: Missed, head: int, slots: Sequence[int]) -> list[int]:
    own = slots[int(missed.layers[head])]
    mean = missed.read[head].mean(1)
    able = [
        source
        for source in mean.argsort().tolist()
        if mean[source] < math.inf and slots[int(missed.layers[source])] == own
    ]
    return able[:SOURCES]


def _keys(costs: StepBytes) -> list[int]:
    return [costs.keys_of(Span.of((0, share))) for share in SHARES]


def _numbers(missed: Missed) -> Mapping[tuple[int, int], int]:
    places = zip(missed.layers.tolist(), missed.heads.tolist(), strict=True)
    return {place: number for number, place in enumerate(places)}


def _parts(costs: StepBytes, missed: Missed) -> list[float]:
    """Of each head, its part of all bytes of the caches."""
    every = sum(layer.kv_heads * layer.head_dim for layer in costs.layers)
    return [costs.layers[layer].head_dim / every for layer in missed.layers.tolist()]


def _whole(budget: HeadBudget) -> bool:
    return budget.last and budget.span is not None and budget.span.whole
