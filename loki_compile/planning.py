"""Which layers choose and which reuse: the cheapest loss of attention, by a dynamic program.

A layer reads all keys (D), chooses by a ranking and reads what it chose (S by the index, A by the
keys), chooses by the keys and reads all (X), or reads what the last layer before it that chose has
chosen (R). Each costs time; S and A lose what they do not choose of their own attention, R what its
source did not choose of the reader's. Sums ignore how errors grow from layer to layer: the plans of
several prices of time are to be compared on the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loki_compile.captured import Mass
from loki_compile.policies.kinds import Kind


@dataclass(frozen=True)
class Costs:
    """Seconds of one layer's attention: all keys, choosing by the index or by the keys, reading
    what is chosen."""

    dense: float
    index: float
    keys: float
    read: float

    def of(self, kind: Kind) -> float:
        chooses = {"loki": self.index, "oracle": self.keys}.get(kind.ranking, 0.0)
        return chooses + (self.dense if kind.dense else self.read)


# The layer that chose last, and by what; None at first.
State = tuple[int, str] | None
OWN = (Kind("loki"), Kind("oracle"), Kind("oracle", dense=True), Kind(dense=True))


@dataclass(frozen=True)
class Losses:
    """What layers lose. own: by ranking and layer, choosing for itself. read: by ranking, source
    and reader, reading what the source chose; NaN where that does not lie before it. heads: the
    best map of heads of each."""

    own: dict[str, list[float]]
    read: dict[str, list[list[float]]]
    heads: dict[tuple[str, int, int], tuple[int, ...]]


def losses_of(
    mass: Mass, own: Sequence[float] | None = None, read: Sequence[float] | None = None
) -> Losses:
    """Losses of attention that is missed.

    own, read: of each layer what the model loses where it alone chooses for itself by the index,
    or reads what the layer before it chose so; other choices lose in proportion to what they miss.
    None: a layer loses what it misses.
    """
    count = len(mass.paths)
    missed = {ranking: (1.0 - shares).tolist() for ranking, shares in mass.shares.items()}
    index = missed["loki"]
    per_own, per_read = [1.0] * count, [1.0] * count
    for layer in range(count):
        if own is not None:
            per_own[layer] = own[layer] / max(index[layer][layer], 1e-3)
        if read is not None:
            before = index[layer - 1][layer] if layer else index[0][0]
            per_read[layer] = read[layer] / max(before, 1e-3)
    return Losses(
        {r: [m[n][n] * per_own[n] for n in range(count)] for r, m in missed.items()},
        {r: [[x * per_read[n] for n, x in enumerate(row)] for row in m] for r, m in missed.items()},
        mass.heads,
    )


def best_plan(
    losses: Losses,
    slots: Sequence[int],
    costs: Costs,
    price: float,
    allowed: Sequence[Kind] = OWN,
) -> list[Kind]:
    """The kinds of all layers with the least loss + price * time.

    Args:
      slots: of each layer the class of its slots; layers of one class alone share.
      price: loss that a second is worth.
    """
    plan = [Kind(dense=True)] * len(slots)
    for each in dict.fromkeys(slots):
        layers = [layer for layer, of in enumerate(slots) if of == each]
        kinds = _of_class(losses, layers, costs, price, allowed)
        for layer, kind in zip(layers, kinds, strict=True):
            plan[layer] = kind
    return plan


def _of_class(
    losses: Losses, layers: Sequence[int], costs: Costs, price: float, allowed: Sequence[Kind]
) -> list[Kind]:
    best: dict[State, tuple[float, list[Kind]]] = {None: (0.0, [])}
    for layer in layers:
        step: dict[State, tuple[float, list[Kind]]] = {}
        for state, (loss, kinds) in best.items():
            ways = [(kind, (layer, kind.ranking) if kind.ranking else state) for kind in allowed]
            if state is not None:
                ways.append((_reading(losses, state, layer), state))
            for kind, after in ways:
                total = loss + _lost(losses, kind, layer, state) + price * costs.of(kind)
                if after not in step or total < step[after][0]:
                    step[after] = (total, [*kinds, kind])
        best = step
    return min(best.values(), key=lambda found: found[0])[1]


def _reading(losses: Losses, state: tuple[int, str], layer: int) -> Kind:
    source, ranking = state
    return Kind(reuse=True, source=source, heads=losses.heads[ranking, source, layer])


def _lost(losses: Losses, kind: Kind, layer: int, state: State) -> float:
    if kind.reuse:
        assert state is not None
        return losses.read[state[1]][state[0]][layer]
    return 0.0 if kind.dense else losses.own[kind.ranking][layer]


def loss_of(losses: Losses, kinds: Sequence[Kind]) -> float:
    """The sum over layers, of a plan whose sources are spelled out."""
    total = 0.0
    for layer, kind in enumerate(kinds):
        state = None
        if kind.reuse:
            assert kind.source is not None
            state = (kind.source, kinds[kind.source].ranking)
        total += _lost(losses, kind, layer, state)
    return total


def front(
    losses: Losses, slots: Sequence[int], costs: Costs, most: float, count: int
) -> list[list[Kind]]:
    """Different plans, each with the least loss at some price of time, the cheapest first, that
    take at most `most` seconds: each loses less than all cheaper ones. Of more than `count` some
    that are spread evenly."""
    found: dict[tuple[Kind, ...], tuple[float, float]] = {}
    for allowed in (OWN, OWN[:1], (OWN[0], OWN[3])):
        for step in range(161):
            price = 10 ** (-6 + step / 20) / max(costs.read, 1e-12)
            plan = tuple(best_plan(losses, slots, costs, price, allowed))
            seconds = math.fsum(map(costs.of, plan))
            if seconds <= most:
                found[plan] = seconds, loss_of(losses, plan)
    plans: list[list[Kind]] = []
    least = math.inf
    for plan in sorted(found, key=found.__getitem__):
        if found[plan][1] < least:
            least = found[plan][1]
            plans.append(list(plan))
    if len(plans) <= count:
        return plans
    return [plans[round(n * (len(plans) - 1) / max(1, count - 1))] for n in range(count)]


def moved(losses: Losses, slots: Sequence[int], kinds: Sequence[Kind]) -> list[list[Kind]]:
    """Neighbours of a plan: each layer that does not reuse trades places with one beside it; the
    least loss first."""
    found = []
    for layer, kind in enumerate(kinds):
        for other in (layer - 1, layer + 1):
            if kind.reuse or not 0 <= other < len(kinds) or not kinds[other].reuse:
                continue
            trial = [*kinds]
            trial[layer], trial[other] = Kind(reuse=True), kind
            known = with_sources(losses.heads, slots, trial)
            if known is not None:
                found.append(known)
    return sorted(found, key=lambda plan: loss_of(losses, plan))


def dropped(losses: Losses, slots: Sequence[int], kinds: Sequence[Kind]) -> list[list[Kind]]:
    """Cheaper neighbours of a plan: each layer that does not reuse does, the least loss first."""
    found = []
    for layer, kind in enumerate(kinds):
        if not kind.reuse:
            trial = [*kinds]
            trial[layer] = Kind(reuse=True)
            known = with_sources(losses.heads, slots, trial)
            if known is not None:
                found.append(known)
    return sorted(found, key=lambda plan: loss_of(losses, plan))


def restored(losses: Losses, slots: Sequence[int], kinds: Sequence[Kind], count: int) -> list[Kind]:
    """A dearer plan: of the layers that reuse, the `count` that lose the most by it choose by the
    index."""
    lost = {
        layer: losses.read[kinds[kind.source].ranking][kind.source][layer]
        - losses.own["loki"][layer]
        for layer, kind in enumerate(kinds)
        if kind.source is not None
    }
    worst = sorted(lost, key=lost.__getitem__, reverse=True)[:count]
    trial = [Kind("loki") if layer in worst else kind for layer, kind in enumerate(kinds)]
    plan = with_sources(losses.heads, slots, trial)
    assert plan is not None  # each still has the source that it had, or one behind that
    return plan


def with_sources(
    heads: Mapping[tuple[str, int, int], tuple[int, ...]],
    slots: Sequence[int],
    kinds: Sequence[Kind],
) -> list[Kind] | None:
    """The plan with each reader's source spelled out, the last of its class that chose, and its map
    of `heads` (by ranking, source and reader); None where a reader has no source."""
    latest: dict[int, tuple[int, str]] = {}
    plan = []
    for layer, kind in enumerate(kinds):
        if kind.reuse:
            if slots[layer] not in latest:
                return None
            source, ranking = latest[slots[layer]]
            kind = Kind(reuse=True, source=source, heads=heads[ranking, source, layer])
        elif kind.ranking:
            latest[slots[layer]] = (layer, kind.ranking)
        plan.append(kind)
    return plan


def unread_are_dense(kinds: Sequence[Kind]) -> list[Kind]:
    """The same plan; a layer that reads all keys does not choose where nobody reads its choice."""
    read = {kind.source for kind in kinds if kind.reuse}
    return [
        Kind(dense=True) if kind.dense and layer not in read else kind
        for layer, kind in enumerate(kinds)
    ]
