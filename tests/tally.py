"""Counts of generated cases by clause of the numerical contract, and how many there shall be.

`make soak` prints the counts as one table (`pytest_terminal_summary` in conftest.py).
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings

counts: Counter[str] = Counter()


def count(clause: str, amount: int = 1) -> None:
    """One more generated case for a clause."""
    counts[clause] += amount


def cases(share: float = 1.0) -> settings:
    """The profile's settings with a share of its examples, for tests that cost more or less."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))
