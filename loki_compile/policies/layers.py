"""From kinds of layers to the choices of sites: who reads what whom chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from loki_compile.passes.policy import Candidate, Choice
from loki_compile.policies.kinds import SPANS, Kind


def choices_of(
    candidates: Sequence[Candidate],
    kinds: Sequence[Kind],
    layers: Sequence[int],
    make: Callable[[Kind, Candidate], Choice],
    instead: str,
) -> list[Choice]:
    """The choice of each site of a graph.

    Args:
      kinds, layers: of each site, what it does and the number by which sources name its layer.
      make: the choice of a site by itself, of a kind that does not reuse.
      instead: the ranking of a site that would reuse, in whose graph nobody chose before it.

    Raises:
      ValueError: a source that lies behind its reader or has no choice of its own to give.
    """
    choices: list[Choice] = []
    latest: dict[int, int] = {}  # of each class of slots, the site that chose last
    for number, (candidate, kind) in enumerate(zip(candidates, kinds, strict=True)):
        source = None
        if kind.reuse:
            if kind.source is None:
                source = None if candidate.slots is None else latest.get(candidate.slots)
            else:
                source = _named(candidates, kinds, layers, number)
        itself = kind if kind.ranking or kind.dense else Kind(instead)
        choice = make(itself, candidate)
        if source is not None:
            choice = dataclasses.replace(choice, source=source, heads=kind.heads)
        elif kind.reuse:
            choice = dataclasses.replace(choice, note=_why_alone(candidate, kind))
        choices.append(choice)
        positions = choice.ranking is not None and not choice.ranking.ranges
        if source is None and positions and candidate.slots is not None:
            latest[candidate.slots] = number
    return choices


def _named(
    candidates: Sequence[Candidate], kinds: Sequence[Kind], layers: Sequence[int], number: int
) -> int | None:
    """The site that a reader names as its source; None where its layer is not in this graph."""
    here, source = candidates[number], kinds[number].source
    assert source is not None
    if source >= layers[number]:
        raise ValueError(
            f"policy: layer {layers[number]} is to read what layer {source} chose, which does not "
            "lie before it: name an earlier layer."
        )
    there = [n for n, layer in enumerate(layers[:number]) if layer == source]
    if not there:
        return None
    # A layer may attend twice: to its own keys, and to an encoder's.
    alike = [n for n in there if here.slots is not None and candidates[n].slots == here.slots]
    found = (alike or there)[0]
    if kinds[found].ranking in ("", SPANS):
        raise ValueError(
            f"policy: layer {layers[number]} is to read what layer {source} chose, which is "
            f'"{kinds[found]}" and does not choose: name a layer that does.'
        )
    return found


def _why_alone(candidate: Candidate, kind: Kind) -> str:
    if kind.source is not None:
        return (
            f"chooses itself: layer {kind.source}, whose choice it would read, is not in its graph"
        )
    if candidate.slots is None:
        return "chooses itself: its keys move from slot to slot"
    return "chooses itself: in its graph no layer before it has its slots"
