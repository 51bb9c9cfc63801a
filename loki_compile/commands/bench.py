"""`loki bench`: what a token costs by context, for every way of decoding, in one run."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loki_compile.commands.bench_rows import Kept, table
from loki_compile.commands.options import (
    CHOICE_OPTIONS,
    MODEL_HELP,
    MODEL_OPTIONS,
    AskedModel,
    loki_options,
    say_if_dense,
    text_of,
    with_options,
)
from loki_compile.commands.output import announcing, out, progress, say, show

if TYPE_CHECKING:
    from torch import Tensor

USUAL = (1024, 4096, 16384)
EVERY = tuple(2**n for n in range(4, 18))
KINDS = {"static": ("static",), "dynamic": ("dynamic",), "both": ("static", "dynamic")}
STOPPED = 130  # the exit code of what Ctrl-C ends
# One of the spans behind "moa:SINK:", such as 0.25N or 64|-1024+1N.
SPAN = re.compile(r"[-+|.\dN]+")
# The names of `ways.DENSE`, which is not imported for `--help`.
DENSE = "eager,inductor,packed,packed-inductor,exact"


@click.command(
    epilog=f"{MODEL_HELP} random:LAYERS has 8 query and 2 KV heads x 128, and random weights."
)
@click.argument("name", metavar="MODEL")
@click.option("--context", "contexts", type=click.IntRange(1), multiple=True,
              help="May be repeated. [1024, 4096, 16384 where the model allows]")  # fmt: skip
@click.option("--all-lengths", is_flag=True,
              help="Contexts 16, 32, ... 131072, as far as the model allows.")  # fmt: skip
@click.option("--cache", type=click.Choice(list(KINDS)), default="both", show_default=True,
              help="static, or dynamic: one that grows.")  # fmt: skip
@click.option("--policies", multiple=True, default=("loki",), show_default=True,
              help="With commas or semicolons, or repeated; NAME@1024 or NAME@0.25 for a top_k of "
              "its own. The spans of moa:4:64,128 stay together.")  # fmt: skip
@click.option("--dense", default=DENSE, show_default=True,
              help="Ways over all keys to time beside them; eager is always there.")  # fmt: skip
@click.option("--text", "files", multiple=True, help="Text file. [held-out Python library]")
@click.option("--prompt", type=click.IntRange(0), default=4096, show_default=True,
              help="Contexts up to this are read as text by each way, which tells its first "
              "token; longer ones are caches of noise.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=120.0,
              show_default=True, help="Ends the rounds of one length early.")  # fmt: skip
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True,
              help="Of slopes, ratios and the picture: cpu on a busy machine.")  # fmt: skip
@click.option("--out", "file", type=click.Path(path_type=Path),
              help="JSON of all rows; a run that was stopped goes on from it.")  # fmt: skip
@click.option("--picture", type=click.Path(path_type=Path), help="PNG. [beside --out]")
@with_options(CHOICE_OPTIONS)
@with_options(MODEL_OPTIONS)
def command(
    contexts: tuple[int, ...],
    all_lengths: bool,
    cache: str,
    policies: tuple[str, ...],
    dense: str,
    files: tuple[str, ...],
    prompt: int,
    rounds: int,
    seconds: float,
    clock: str,
    file: Path | None,
    picture: Path | None,
    **given: Any,
) -> None:
    """What a token of MODEL costs by context, for each way of decoding, in one run.

    Milliseconds per token and their slope, bytes that must be read and the share of this machine's
    read limit, time to the first token and of compilation: eager, Inductor, matmuls over packed
    query groups, our own attention over all keys, and each policy; static and growing caches. Each
    way is checked against eager's logits before it is timed; all are timed in turn.
    """
    from loki_compile.commands.models import RANDOM, load_config
    from loki_compile.commands.rounds import room_for

    asked = AskedModel.taken(given)
    options = loki_options(**given)
    chosen, beside = _ways_asked(policies, dense, options)
    asked.check()
    picture = _checked_picture(file, picture)
    if files and RANDOM.fullmatch(asked.name):
        raise ValueError(f"--text: {asked.name} has no tokenizer; needs no text: leave out --text.")
    lengths = _lengths(contexts, all_lengths, load_config(asked.name), rounds)
    settings = _settings(asked, list(chosen), beside, options, files, prompt, rounds)
    kept = Kept(file, settings, clock)
    kept.resume()
    read = [length for length in lengths if length <= prompt]
    ids = _token_ids(asked.name, files, max(read) + room_for(rounds)) if read else None
    for each in chosen.values():
        say_if_dense(each, max(lengths))
    groups = [(kind, length) for length in lengths for kind in KINDS[cache]]
    _run_left(asked, kept, groups, beside, chosen, ids, prompt, rounds, seconds)
    show_all(asked.name, kept, KINDS[cache], picture)


def _ways_asked(
    policies: Sequence[str], dense: str, options: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The options of each policy that is named, and the ways over all keys.

    Raises:
        ValueError: there is no such policy or way.
    """
    from loki_compile.commands.ways import DENSE as KNOWN
    from loki_compile.commands.ways import policy_options

    words = [word for each in policies for word in policy_words(each)]
    chosen = {word: policy_options(word, options) for word in words}
    beside = _words("--dense", dense.split(","))
    if unknown := [word for word in beside if word not in KNOWN]:
        raise ValueError(f"--dense {unknown[0]}: needs some of {', '.join(KNOWN)}.")
    return chosen, beside


def _checked_picture(file: Path | None, picture: Path | None) -> Path | None:
    """Where the picture goes: beside the rows, if nowhere else.

    Raises:
        ValueError: one of both cannot be written or drawn.
    """
    from loki_compile.commands.models import check_writable
    from loki_compile.commands.picture import check_picture

    if picture is None and file is not None:
        picture = file.with_suffix(".png")
    for option, path in (("--out", file), ("--picture", picture)):
        if path is not None:
            check_writable(option, path)
    if picture is not None:
        check_picture("--picture", picture)
    return picture


def _settings(
    asked: AskedModel,
    policies: list[str],
    dense: list[str],
    options: dict[str, Any],
    files: Sequence[str],
    prompt: int,
    rounds: int,
) -> dict[str, Any]:
    """What rows of one file have in common."""
    return {
        "model": asked.name,
        "device": asked.device or "auto",
        "dtype": asked.dtype,
        "random_weights": asked.random_weights,
        "policies": policies,
        "dense": dense,
        "options": options,
        "text": list(files),
        "prompt": prompt,
        "rounds": rounds,
    }


def _run_left(
    asked: AskedModel, kept: Kept, groups: Sequence[tuple[str, int]], *of_run: Any
) -> None:
    """`run_all` over the kinds of cache and lengths that are not kept yet."""
    left = [group for group in groups if not kept.has(*group)]
    if len(left) < len(groups):
        say(f"{kept.path} holds {len(groups) - len(left)} of {len(groups)} lengths already")
    if not left:
        return
    try:
        say(f"loading {asked.name}")
        run_all(asked.name, asked.load(), kept, left, *of_run)
    except KeyboardInterrupt:
        say(_stopped(kept, groups))
        raise click.exceptions.Exit(STOPPED) from None


def policy_words(text: str) -> list[str]:
    """The policies that one `--policies` names: a comma between the spans of "moa:SINK:SPAN,SPAN"
    belongs to the word, a semicolon never does.

    Raises:
        ValueError: it names nothing.
    """
    words: list[str] = []
    for group in text.split(";"):
        parts = [part.strip() for part in group.split(",") if part.strip()]
        for number, part in enumerate(parts):
            if number and words[-1].startswith("moa:") and SPAN.fullmatch(part):
                words[-1] += f",{part}"
            else:
                words.append(part)
    return _words("--policies", words or [text])


def _words(option: str, parts: Sequence[str]) -> list[str]:
    """What is between commas, each once.

    Raises:
        ValueError: nothing is.
    """
    words = [word for part in parts if (word := part.strip(" ,;"))]
    if not words:
        raise ValueError(
            f"{option} {','.join(parts)!r}: names nothing; needs a name, or several with commas."
        )
    return list(dict.fromkeys(words))


def _stopped(kept: Kept, groups: Sequence[tuple[str, int]]) -> str:
    """What an interrupted run leaves behind."""
    if kept.path is None:
        return "stopped: nothing is kept without --out"
    whole = sum(kept.has(*group) for group in groups)
    if not whole:
        return f"stopped: no length was done, nothing new is in {kept.path}"
    return f"stopped: {kept.path} holds {whole} of {len(groups)} lengths; the same command goes on"


def _lengths(contexts: Sequence[int], every: bool, config: Any, rounds: int) -> list[int]:
    """The contexts to take, ascending: what was asked for, or what of the usual ones fits.

    Raises:
        ValueError: one is longer than the model allows, or no length leaves room for the rounds.
    """
    from loki_compile.commands.models import fitting_context, longest_context
    from loki_compile.commands.rounds import room_for

    room = room_for(rounds)
    longest = longest_context(config) - room
    if longest < 1:
        raise ValueError(
            f"--rounds {rounds}: needs {room} tokens behind each context, this model has "
            f"{longest_context(config)} positions; needs fewer rounds."
        )
    for context in contexts:
        fitting_context("--context", context, context, config, room)
    usual = EVERY if every else () if contexts else USUAL
    fitting = {context for context in usual if context <= longest} | set(contexts)
    return sorted(fitting) or [longest]


def _token_ids(name: str, files: Sequence[str], count: int) -> Tensor | None:
    """So many tokens of text (count,) int64; None for a model without a tokenizer.

    Raises:
        ValueError: files were named, and hold fewer, or nothing can be made of them.
    """
    from loki_compile.commands.models import RANDOM, encode, load_tokenizer

    if RANDOM.fullmatch(name):
        return None
    try:
        tokenizer = load_tokenizer(name)
    except ValueError:
        if files:
            raise
        return None
    text, _ = text_of(files, "held_out")
    ids = encode(tokenizer, text[: 16 * count])
    if len(ids) < count:
        raise ValueError(f"--text: holds {len(ids)} tokens; needs {count}: pass more text")
    return ids[:count]


def run_all(
    name: str,
    model: Any,
    kept: Kept,
    left: Sequence[tuple[str, int]],
    dense: Sequence[str],
    policies: dict[str, dict[str, Any]],
    ids: Tensor | None,
    prompt: int,
    rounds: int,
    seconds: float,
) -> None:
    """Measures each kind of cache and length that is left, and keeps its rows."""
    import torch

    from loki_compile.commands.clock import Reader
    from loki_compile.commands.measure import many_variants
    from loki_compile.commands.rounds import measured, room_for
    from loki_compile.commands.ways import ways_of

    kept.about = _about(model)
    ways = ways_of(model, dense, policies)
    reader = Reader(model.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    drawn = torch.Generator().manual_seed(0)
    room = room_for(rounds)
    with many_variants(), _notices_kept_back(), progress() as bar:
        task = bar.add_task(f"timing {name}", total=len(left) * (len(ways) + 1))
        for kind, context in left:
            say_what = announcing(f"{kind} cache, {context} tokens")
            tokens = ids
            if tokens is None or len(tokens) < context + room:
                tokens = torch.randint(vocabulary, (context + room,), generator=drawn)

            def begin(what: str, say_what: Callable[[str], None] = say_what) -> None:
                say_what(what)
                bar.advance(task)

            rows = measured(
                model,
                ways,
                kind,
                tokens[: context + room].to(model.device),
                reads=context <= prompt,
                rounds=rounds,
                most_seconds=seconds,
                reader=reader,
                begin=begin,
            )
            kept.add(rows)


@contextmanager
def _notices_kept_back() -> Iterator[None]:
    """What begins is said here, and advice to lower min_context is not for a dense way."""
    notices = logging.getLogger("loki_compile.notices")
    before = notices.level
    notices.setLevel(logging.ERROR)
    try:
        yield
    finally:
        notices.setLevel(before)


def _about(model: Any) -> dict[str, Any]:
    """Where and with what it was measured."""
    import torch

    cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cores": os.cpu_count(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **{package: metadata.version(package) for package in ("torch", "transformers")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def show_all(name: str, kept: Kept, kinds: Sequence[str], picture: Path | None) -> None:
    """The tables, what is slower than it may be, the picture."""
    by = {"wall": "on the clock", "cpu": "in CPU time"}[kept.clock]
    for kind in kinds:
        out.print(table(kept.judged, kind, f"{name}, {kind} cache; slope and ratio {by}"))
    for line in kept.judged.verdict():
        show(line)
    if kept.path is not None:
        show(f"wrote {kept.path}")
    if picture is not None:
        from loki_compile.commands.picture import plot_ways

        about = kept.about
        title = f"{name}, {about['dtype']}, {about['device']}, {by}"
        plot_ways(kept.judged, title, picture)
        show(f"wrote {picture}")
