"""What commands say: tables on stdout, what begins and how long it takes on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import click
from rich.console import Console

# Tables go to stdout, progress and logs to stderr. A pipe has no width of its own.
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)

# Steps after which a rest is foretold: the first of a compiled variant take seconds, once.
STEPS_BEFORE = 8


class UserError(click.ClickException):
    """One line on stderr and exit code 2."""

    exit_code = 2


def say(line: str) -> None:
    """What begins now, where it takes long; to stderr, also where no terminal shows a status."""
    err.print(line, soft_wrap=True, highlight=False, markup=False)


def show(line: str) -> None:
    """A finding in words, to stdout."""
    out.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def going_on(
    rest: Callable[[], str] = lambda: "; the same command goes on from here",
) -> Iterator[None]:
    """For a command that keeps what it has done: Ctrl-C ends it with one line and exit code 130.

    Args:
        rest: what is said behind "stopped", asked for then.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped{rest()}")
        raise SystemExit(130) from None


@contextmanager
def phase(what: str, *, spinner: bool = True) -> Iterator[None]:
    """Says what begins, and behind it how long it took; no spinner where a bar is shown."""
    say(what)
    started = time.perf_counter()
    with err.status(what) if spinner else nullcontext():
        yield
    say(f"  took {duration(time.perf_counter() - started)}")


def announcing(where: str) -> Callable[[str], None]:
    """What to call with what begins: it says that, and how long what came before it took."""
    since = 0.0

    def begin(what: str) -> None:
        nonlocal since
        now = time.perf_counter()
        before = f" (what came before took {duration(now - since)})" if since else ""
        since = now
        say(f"{where}: {what}{before}")

    return begin


def foretelling(steps: int, advance: Callable[[int], Any] | None = None) -> Callable[[int], None]:
    """What to call with the number of steps done each time: it says once how long the rest takes.

    Args:
        steps: how many there will be.
        advance: called with the same numbers, such as a bar's.
    """
    done, pace = 0, 0.0
    since = time.perf_counter()

    def step(count: int = 1) -> None:
        nonlocal done, pace, since
        now = time.perf_counter()
        before, done = done, done + count
        if advance is not None:
            advance(count)
        if before < STEPS_BEFORE <= done:
            since = now
        elif before < 2 * STEPS_BEFORE <= done < steps:
            pace = (now - since) / (done - STEPS_BEFORE)
            left = pace * (steps - done)
            if left > 2:
                say(f"  about {duration(left)} to go: {steps} steps at {1e3 * pace:.0f} ms each")

    return step


def duration(seconds: float) -> str:
    """Such as "12 s", "4 min" or "1.5 h"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress(*, left: bool = False) -> Any:
    """Bars on stderr; with `left` each task's field of that name says what time it still takes."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}") if left else TimeRemainingColumn(),
        console=err,
    )
