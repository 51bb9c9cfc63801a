"""The rows of `loki bench`: what follows from them, the file that they are kept in, the table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

# Slower than the fastest dense way by more than this share is said by name.
ALLOWED = 0.03


@dataclass
class Row:
    """One way of decoding behind `context` tokens of one kind of cache ("static", "dynamic").

    ms, ms_p20, ms_p80: milliseconds per token on the clock, median and percentiles of the rounds;
    cpu_ms: CPU time of the process per token, all threads together. first_token_s: from a prompt to
    its first token, with what that compiled; compile_s: what the first decode steps took longer
    than those behind them. error: the largest distance of logits from eager's as a share of their
    norm; kl: the mean divergence from eager's distribution, nats. bytes: what a token must read,
    weights and caches, of which cache_bytes are the caches'. limit_gb_s: the fastest read of memory
    in the same run. sparse: whether the timed steps were. note: why it was not timed.
    """

    cache: str
    context: int
    way: str
    dense: bool
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    cpu_ms: float | None = None
    first_token_s: float | None = None
    first_token_cpu_s: float | None = None
    compile_s: float | None = None
    compile_cpu_s: float | None = None
    error: float | None = None
    kl: float | None = None
    bytes: int | None = None
    cache_bytes: int | None = None
    limit_gb_s: float | None = None
    sparse: bool = False
    note: str = ""

    @property
    def gb_s(self) -> float | None:
        """Of the bytes that it must read, so many are read per second."""
        if self.bytes is None or not self.ms:
            return None
        return self.bytes / self.ms / 1e6

    @property
    def share_of_limit(self) -> float | None:
        if self.gb_s is None or not self.limit_gb_s:
            return None
        return self.gb_s / self.limit_gb_s


@dataclass(frozen=True)
class Judged:
    """What follows from rows that lie beside each other, by one of their times: "wall", or "cpu",
    which says more where other processes are busy."""

    rows: Sequence[Row]
    clock: str = "wall"

    def ms(self, row: Row) -> float | None:
        """The milliseconds per token that are compared."""
        return row.cpu_ms if self.clock == "cpu" else row.ms

    def fastest_dense(self, row: Row) -> Row | None:
        """The fastest way over all keys behind the same tokens of the same kind of cache."""
        beside = [
            other
            for other in self.rows
            if (other.dense, other.cache, other.context) == (True, row.cache, row.context)
            and self.ms(other) is not None
        ]
        return min(beside, key=lambda other: self.ms(other) or 0.0, default=None)

    def against_dense(self, row: Row) -> float | None:
        """How many times as fast as the fastest dense way it is."""
        dense, own = self.fastest_dense(row), self.ms(row)
        if dense is None or not own:
            return None
        return (self.ms(dense) or 0.0) / own

    def slope(self, row: Row) -> float | None:
        """Microseconds per token of context: from the next shorter context of this way to it."""
        shorter = [
            other
            for other in self.rows
            if (other.cache, other.way) == (row.cache, row.way) and other.context < row.context
        ]
        times = {other.context: self.ms(other) for other in shorter}
        known = {context: ms for context, ms in times.items() if ms is not None}
        own = self.ms(row)
        if own is None or not known:
            return None
        before = max(known)
        return 1e3 * (own - known[before]) / (row.context - before)

    def slower(self, row: Row) -> bool:
        """Whether it is no dense way, and slower than the fastest by more than `ALLOWED`."""
        ratio = self.against_dense(row)
        return not row.dense and ratio is not None and ratio * (1 + ALLOWED) < 1

    def exceptions(self) -> list[str]:
        """In words, each row that is slower."""
        found = []
        for row in filter(self.slower, self.rows):
            dense = self.fastest_dense(row)
            own, best = self.ms(row), dense and self.ms(dense)
            if dense is not None and own is not None and best:
                found.append(
                    f"{row.way} behind {row.context} tokens, {row.cache} cache: {own:.2f} ms where "
                    f"{dense.way} takes {best:.2f} ({own / best - 1:+.0%})"
                )
        return found

    def verdict(self) -> list[str]:
        """In words: what is slower, or that nothing is of what was timed sparse, and what was
        not."""
        slower = self.exceptions()
        lines = [f"slower than the fastest dense way: {line}" for line in slower]
        policies = [row for row in self.rows if not row.dense]
        missing = [row for row in policies if not row.sparse or self.against_dense(row) is None]
        timed = len(policies) - len(missing)
        if timed and not slower:
            lines.append(
                f"no policy is over {ALLOWED:.0%} slower than the fastest dense way: {timed} of "
                f"{len(policies)} rows of policies were timed sparse"
            )
        elif policies and not timed:
            reasons = (f"{row.way} behind {row.context} tokens {_why_not(row)}" for row in missing)
            lines.append(f"no policy was timed sparse: {'; '.join(dict.fromkeys(reasons))}")
        return lines


def _why_not(row: Row) -> str:
    return f"({row.note})" if row.note else "ran dense"


# ---------------------------------------------------------------------------------------- file


@dataclass
class Kept:
    """Rows in a file, with what they were measured with; a run that is stopped goes on from it."""

    path: Path | None
    settings: dict[str, Any]
    clock: str = "wall"
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)

    @property
    def judged(self) -> Judged:
        return Judged(self.rows, self.clock)

    def resume(self) -> None:
        """Takes in the rows of a file that is there.

        Raises:
          ValueError: it is no such file, or one of a run with other settings.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            held = json.loads(self.path.read_text())
            settings = held["settings"]
            names = {field.name for field in dataclasses.fields(Row)}
            rows = [Row(**{k: v for k, v in row.items() if k in names}) for row in held["rows"]]
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            raise ValueError(
                f"--out {self.path}: holds no rows of `loki bench`; needs another name"
            ) from None
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"--out {self.path}: holds rows of a run with {name} {settings.get(name)!r}, "
                    f"and this is {value!r}; needs another name, or delete that file"
                )
        self.rows, self.about = rows, held.get("about", {})

    def has(self, cache: str, context: int) -> bool:
        return any((row.cache, row.context) == (cache, context) for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Adds all rows of one kind of cache and length, and writes the file whole."""
        self.rows += rows
        if self.path is None:
            return
        held = {
            "settings": self.settings,
            "about": self.about,
            "rows": [as_json(self.judged, row) for row in self.rows],
            "clock": self.clock,
            "exceptions": self.judged.exceptions(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(held, indent=1) + "\n")
        beside.replace(self.path)


def as_json(judged: Judged, row: Row) -> dict[str, Any]:
    """All of a row, with what follows from it and from those beside it."""
    return {
        **dataclasses.asdict(row),
        "gb_s": row.gb_s,
        "share_of_limit": row.share_of_limit,
        "slope_us_per_token": judged.slope(row),
        "against_fastest_dense": judged.against_dense(row),
    }


# --------------------------------------------------------------------------------------- table

_COLUMNS = (
    "tokens",
    "way",
    "ms",
    "20-80 %",
    "CPU ms",
    "µs/token of context",
    "MB read",
    "GB/s",
    "of limit",
    "first token s",
    "compile s",
    "from eager",
    "against dense",
)


def table(judged: Judged, kind: str, title: str) -> Table:
    """One kind of cache; a section for each length, and "!" at what is slower than allowed."""
    made = Table(title=title, title_justify="left")
    for column in _COLUMNS:
        made.add_column(column, justify="left" if column == "way" else "right")
    rows = [row for row in judged.rows if row.cache == kind]
    ordered = sorted(rows, key=lambda row: row.context)  # ways stay in their order
    for number, row in enumerate(ordered):
        last = number + 1 == len(ordered) or ordered[number + 1].context != row.context
        made.add_row(*_cells(judged, row), end_section=last)
    return made


def _cells(judged: Judged, row: Row) -> list[str]:
    name = row.way if row.dense or row.sparse or row.note else f"{row.way} (dense here)"
    if row.ms is None:
        return [str(row.context), name, row.note, *[""] * (len(_COLUMNS) - 3)]
    ratio, mark = judged.against_dense(row), " !" if judged.slower(row) else ""
    off = f"{row.error:.1e}" if row.dense else f"KL {row.kl:.1e}"
    return [
        str(row.context),
        name,
        f"{row.ms:.2f}",
        f"{row.ms_p20:.2f}-{row.ms_p80:.2f}",
        f"{row.cpu_ms:.2f}",
        _shown(judged.slope(row), ".2f"),
        "" if row.bytes is None else f"{row.bytes / 1e6:.1f}",
        _shown(row.gb_s, ".1f"),
        _shown(row.share_of_limit, ".0%"),
        _shown(row.first_token_s, ".1f"),
        _shown(row.compile_s, ".1f"),
        "" if row.way == "eager" else off,
        "" if ratio is None else f"{ratio:.2f}x{mark}",
    ]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
