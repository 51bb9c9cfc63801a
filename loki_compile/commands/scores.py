"""Rows of `loki eval`: kept as they come, gone on with after an interruption, and summed up."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loki_compile.commands.trials import DENSE, Row

RECORDS = "records.jsonl"
# Of the normal distribution: 95 % lie within.
_Z = 1.959964


class Records:
    """The rows of one run, in a folder where there is one: a line each in RECORDS, behind a first
    line that says of what run they are."""

    def __init__(self, folder: Path | None, run: dict[str, Any]) -> None:
        """
        Args:
            run: what all rows have in common.

        Raises:
            ValueError: the folder holds another run's, or a file of that name that is none; or it
                cannot be written to.
        """
        self.run = run
        self.rows: list[Row] = []
        self._done: set[tuple[str, str, str, str]] = set()
        self.path = None if folder is None else folder / RECORDS
        if self.path is None:
            return
        if self.path.exists():
            self._go_on(self.path)
        else:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps({"run": run}) + "\n")
            except OSError as error:
                raise ValueError(
                    f"--out {folder}: cannot be written to ({error.strerror}); needs a folder that "
                    "can be"
                ) from None

    def _go_on(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        whole = lines[:-1]  # an interrupted run may have left the beginning of a line
        try:
            before = dict(json.loads(whole[0])["run"])
            for line in whole[1:]:
                self._take(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(
                f"{path} holds no results of `loki eval`; needed an empty --out folder, or one of "
                "an interrupted run"
            ) from None
        differs = [name for name in self.run if before.get(name) != self.run[name]]
        if differs:
            found, asked = before.get(differs[0]), self.run[differs[0]]
            raise ValueError(
                f"{path} holds results with {differs[0]}={found!r}, and this run has {asked!r}: "
                "name another --out folder"
            )
        if lines[-1]:
            path.write_bytes(b"\n".join(whole) + b"\n")

    def _take(self, row: Row) -> None:
        self.rows.append(row)
        self._done.add((row["case"], row["protocol"], row["setting"], row.get("uses", "")))

    def has(self, case: str, protocol: str, setting: str, uses: str = "") -> bool:
        """Whether there is a row; `uses` as `Setting` has it."""
        return (case, protocol, setting, uses) in self._done

    def add(self, row: Row) -> None:
        """Keeps a row, on disk before it returns."""
        self._take(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of `count` scores between 0 and 1, each a prompt's own
    (wide where scores are shares: it takes them for right or wrong)."""
    if not count:
        return 0.0, 1.0
    share = _Z * _Z / count
    middle = (mean + share / 2) / (1 + share)
    half = math.sqrt(mean * (1 - mean) / count + share / (4 * count)) * _Z / (1 + share)
    return max(0.0, middle - half), min(1.0, middle + half)


def spread(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean over pieces, by Student's t; None below three,
    of which it says nothing."""
    if len(values) < 3:
        return None
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    of = t[len(values) - 2] if len(values) - 2 < len(t) else 2.1
    return of * statistics.stdev(values) / math.sqrt(len(values))


def summary(rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """One row for each setting that has any, `DENSE` first, over the cases that all of these have.

    Of text: perplexity and its change (with `spread` over pieces), KL divergence in nats and the
    share of equal tokens, the attention missed (`missed_by_site`: by each site that chooses), keys
    read by a row, bytes read against dense.
    Of tasks, by question: the mean score with its interval, each task's, prompts better and worse
    than dense, equal greedy tokens, tokens generated. `cases`: how many were compared, of how many
    that some setting has.
    """
    by: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        by.setdefault(row["setting"], {})[row["case"], row["protocol"]] = row
    known = [label for label in (DENSE, *labels) if label in by]
    if DENSE not in by:
        return []
    every = set().union(*by.values())
    common = set.intersection(*(set(by[label]) for label in known))
    return [
        {"setting": label, "cases": f"{len(common)} of {len(every)}"}
        | _of_text([(by[label][at], by[DENSE][at]) for at in sorted(common) if _is_text(at, by)])
        | _of_tasks([(by[label][at], by[DENSE][at]) for at in sorted(common)])
        for label in known
    ]


def _is_text(at: tuple[str, str], by: dict[str, dict[tuple[str, str], Row]]) -> bool:
    """Recall prompts are followed as text is, and are none."""
    return at[1] == "text" and "asked" not in by[DENSE][at]


def _of_text(pairs: Sequence[tuple[Row, Row]]) -> Row:
    if not pairs:
        return {}
    tokens = sum(row["tokens"] for row, _ in pairs)

    def mean(name: str) -> float:
        return sum(row[name] * row["tokens"] for row, _ in pairs) / tokens

    dense = sum(of["nats"] * of["tokens"] for _, of in pairs) / tokens
    changes = [row["nats"] - of["nats"] for row, of in pairs]
    found: Row = {
        "tokens": tokens,
        "perplexity": math.exp(mean("nats")),
        "change": math.expm1(mean("nats") - dense),
        "change_spread": spread(changes),
        "kl": mean("kl"),
        "same": mean("same"),
    }
    for name in ("missed", "keys", "bytes", "dense_bytes"):
        values = [row[name] for row, _ in pairs if name in row]
        if values:
            found[name] = statistics.fmean(values)
    each = [row["missed_by_site"] for row, _ in pairs if "missed_by_site" in row]
    if each:
        found["missed_by_site"] = [statistics.fmean(site) for site in zip(*each, strict=True)]
    if "bytes" in found:
        found["bytes_share"] = found["bytes"] / found["dense_bytes"]
    times = [row["step_ms"] for row, _ in pairs if row.get("step_ms") is not None]
    if times:
        found["step_ms"] = statistics.median(times)
    return found


def _of_tasks(pairs: Sequence[tuple[Row, Row]]) -> Row:
    found: Row = {}
    for protocol in ("text", "sparse", "dense"):
        of = [(r, d) for r, d in pairs if r["protocol"] == protocol and r.get("score") is not None]
        if not of:
            continue
        scores = [row["score"] for row, _ in of]
        by_task: dict[str, list[float]] = {}
        for row, _ in of:
            by_task.setdefault(row["task"], []).append(row["score"])
        found[protocol] = {
            "score": statistics.fmean(scores),
            "interval": interval(
                statistics.fmean(scores), sum(row.get("asked", 1) for row, _ in of)
            ),
            "prompts": len(scores),
            "better": sum(row["score"] > d["score"] for row, d in of),
            "worse": sum(row["score"] < d["score"] for row, d in of),
            "tasks": {task: statistics.fmean(each) for task, each in by_task.items()},
            "same": statistics.fmean(row["same"] for row, _ in of),
            "generated": statistics.fmean(row.get("generated", 0) for row, _ in of),
        }
    return found


# ----------------------------------------------------------------------------------- one table


def columns(found: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """The columns of the table that this summary fills: a title, and what a row shows."""
    shown: list[tuple[str, Callable[[Row], str]]] = [("setting", lambda row: row["setting"])]

    def add(title: str, name: str, how: Callable[[Row], str]) -> None:
        if any(row.get(name) is not None for row in found):
            shown.append((title, lambda row: how(row) if row.get(name) is not None else ""))

    add("perplexity", "perplexity", lambda row: f"{row['perplexity']:.4f}")
    add("against dense", "change", _change)
    add("KL", "kl", lambda row: f"{row['kl']:.4f}")
    add("same token", "same", lambda row: f"{row['same']:.2%}")
    add("missed", "missed", lambda row: f"{row['missed']:.3f}")
    add("recall", "text", partial(_score, "text"))
    for protocol, title in (("sparse", "tasks"), ("dense", "tasks, question dense")):
        add(title, protocol, partial(_score, protocol))
        names = {task for row in found for task in row.get(protocol, {}).get("tasks", ())}
        for task in sorted(names, key=_order):
            add(task, protocol, partial(_task, protocol, task))
        add("same greedy", protocol, partial(_same, protocol))
        add("length", protocol, partial(_length, protocol))
    add("keys", "keys", lambda row: f"{row['keys']:.0f}")
    add("bytes", "bytes_share", lambda row: f"{row['bytes_share']:.1%}")
    add("ms", "step_ms", lambda row: f"{row['step_ms']:.1f}")
    return shown


def _order(task: str) -> int:
    from loki_compile.commands.tasks import TASKS

    return TASKS.index(task) if task in TASKS else len(TASKS)


def _change(row: Row) -> str:
    spread_of = row.get("change_spread")
    about = "" if spread_of is None or row["setting"] == DENSE else f" ± {spread_of:.2%}"
    return f"{row['change']:+.2%}{about}"


def _score(protocol: str, row: Row) -> str:
    of = row[protocol]
    low, high = of["interval"]
    return f"{of['score']:.1%} ({low:.0%} to {high:.0%}), +{of['better']} -{of['worse']}"


def _task(protocol: str, task: str, row: Row) -> str:
    return f"{row[protocol]['tasks'][task]:.0%}"


def _same(protocol: str, row: Row) -> str:
    return f"{row[protocol]['same']:.0%}"


def _length(protocol: str, row: Row) -> str:
    return f"{row[protocol]['generated']:.1f}"


def markdown(found: Sequence[Row]) -> str:
    """The table as Markdown; "" where there are no rows."""
    if not found:
        return ""
    shown = columns(found)
    lines = [[title for title, _ in shown], ["---"] * len(shown)]
    lines += [[cell(row) for _, cell in shown] for row in found]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_results(folder: Path, run: dict[str, Any], rows: Sequence[Row], found: list[Row]) -> None:
    """results.json (the run, the summary), results.csv (a line for each row), results.md."""
    document = {"run": run, "settings": found, "rows": len(rows)}
    (folder / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "results.md").write_text(markdown(found))
