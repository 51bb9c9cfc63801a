"""Counts of generated cases by clause of the numerical contract, and how many there shall be.

`make soak` prints the counts as one table (`pytest_terminal_summary` in conftest.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from hypothesis import settings

counts: Counter[str] = Counter()


def count(clause: str, amount: int = 1) -> None:
    """One more generated case for a clause."""
    counts[clause] += amount


def cases(share: float = 1.0) -> settings:
    """The profile's settings with a share of its examples, for tests that cost more or less."""
    return settings(max_examples=max(1, round(settings.default.max_examples * share)))


def recorded(results: Path) -> Counter[str]:
    """What other runs have left in `benchmarks/results`: architectures, and others' test suites."""
    found: Counter[str] = Counter()
    zoo, peers = results / "zoo.md", results / "peers.jsonl"
    if zoo.exists() and (covered := re.search(r"covers (\d+)\s+of", zoo.read_text())):
        found["record: architectures of transformers (zoo.md)"] = int(covered[1])
    for line in peers.read_text().splitlines() if peers.exists() else ():
        part = json.loads(line)
        for outcome, number in part.items():
            if ": " in outcome and ("passed" in outcome or "failed" in outcome):
                found[f"record: tests of {part['suite']}, {outcome} (peers.md)"] += number
    return found
