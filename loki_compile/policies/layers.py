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
                source = _named(candidates, kinds, layers, number, kind.source)
        itself = kind if kind.ranking or kind.dense else Kind(instead)
        choice = make(itself, candidate)
        if source is not None:
            choice = dataclasses.replace(choice, source=source, heads=kind.heads)
        elif kind.reuse:
            choice = dataclasses.replace(choice, note=_why_alone(candidate, kind))
        elif choice.budgets is not None and kind.borrows:
            choice = _borrowing(choice, candidates, kinds, layers, number)
        choices.append(choice)
        positions = choice.ranking is not None and not choice.ranking.ranges
        if source is None and positions and candidate.slots is not None:
            latest[candidate.slots] = number
    return choices


def _borrowing(
    choice: Choice,
    candidates: Sequence[Candidate],
    kinds: Sequence[Kind],
    layers: Sequence[int],
    number: int,
) -> Choice:
    """The choice of a site some of whose KV heads read what a head of another layer chose: of the
    sites that those are. A head whose layer is not in this graph chooses as many keys as `top_k`
    says."""
    assert choice.budgets is not None
    words = kinds[number].budgets * (len(choice.budgets.heads) // len(kinds[number].budgets))
    heads, borrowed, alone = list(choice.budgets.heads), [], []
    for head, word in enumerate(words):
        site = None
        if word.span is None:
            site = _named(candidates, kinds, layers, number, word.source)
            if site is None:
                heads[head] = choice.budget.span
                alone.append(str(word))
        borrowed.append(None if site is None else (site, word.head))
    note = choice.note
    if alone:
        note = f"chooses itself for {', '.join(alone)}, whose layer is not in its graph"
    budgets = dataclasses.replace(choice.budgets, heads=tuple(heads))
    return dataclasses.replace(choice, budgets=budgets, borrowed=tuple(borrowed), note=note)


def _named(
    candidates: Sequence[Candidate],
    kinds: Sequence[Kind],
    layers: Sequence[int],
    number: int,
    source: int,
) -> int | None:
    """The site that a reader names as its source; None where its layer is not in this graph."""
    here = candidates[number]
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
