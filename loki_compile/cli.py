"""The command `loki`: demo, calibrate, bases, explain, eval, bench."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

if TYPE_CHECKING:
    from loki_compile.evaluation import Trace
    from loki_compile.pca_store.basis import BasisSet
    from loki_compile.pca_store.basis_file import BasisHeader

# Tables go to stdout, progress and logs to stderr. A pipe has no width of its own.
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)

MODEL_HELP = 'MODEL is a hub id, a local folder, or "reference" for the bundled model.'


class UserError(click.ClickException):
    """One line on stderr and exit code 2."""

    exit_code = 2


class _Commands(click.Group):
    """Shows what a user can mend as one line; `--traceback` shows where it came from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
            if ctx.params.get("traceback"):
                raise
            message = _user_message(error)
            if message is None:
                raise
            raise UserError(message) from error


def _user_message(error: Exception) -> str | None:
    """What to tell the user, or None for an error that is not of their making."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}; needed for this command: pip install 'loki-compile[eval]'"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = str(error).partition("\n")[0]
        return f"out of memory ({first}); needed a shorter context, or a smaller --dtype"
    return None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Say what the compiler does.")
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
@click.version_option(package_name="loki-compile")
def main(verbose: bool, traceback: bool) -> None:
    """Sparse attention for long-context decoding: model.compile(backend="loki")."""
    if verbose:
        handler = RichHandler(console=err, show_path=False)
        logger = logging.getLogger("loki_compile")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


# ------------------------------------------------------------------------------ shared options


class _FractionOrCount(click.ParamType):
    """0.125 is a fraction, 1024 a count, anything else is left for `LokiConfig` to judge."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        return value


NUMBER = _FractionOrCount()

_LOKI_OPTIONS = [
    click.option("--top-k", type=NUMBER, help="Keys each query reads: 0.125 or 1024."),
    click.option("--rank", type=NUMBER, help="Dims of the index: 0.25, 32 or variance:0.9."),
    click.option("--min-context", type=int, help="Fewer visible keys than this run dense."),
    click.option("--index-dtype", help='"auto" or "int8".'),
    click.option("--share", help='"group" or "head".'),
]
_MODEL_OPTIONS = [
    click.option("--device", help="cpu, cuda, ...; CUDA where there is a device."),
    click.option("--dtype", default="auto", help="float32, bfloat16, float16; the checkpoint's."),
    click.option("--random-weights", is_flag=True, help="The architecture alone, no checkpoint."),
]


def _with(options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _say(line: str) -> None:
    """What begins now, where it takes long; to stderr."""
    err.print(line, soft_wrap=True, highlight=False, markup=False)


def _say_if_dense(options: dict[str, Any], context: int) -> None:
    from loki_compile.config import LokiConfig
    from loki_compile.explanation import dense_because

    if why := dense_because(LokiConfig.from_options(options), context):
        _say(f"note: behind {context} tokens every step of loki runs dense ({why})")


def _loki_options(**given: Any) -> dict[str, Any]:
    """The options that were given, checked; the names are `LokiConfig`'s.

    Raises:
        ValueError: an impossible value.
    """
    from loki_compile.config import LokiConfig

    options = {name: value for name, value in given.items() if value is not None}
    LokiConfig.from_options(options)
    return options


# ---------------------------------------------------------------------------------------- demo


@main.command()
@click.option("--model", "name", default="reference", show_default=True, help=MODEL_HELP)
@click.option("--context", type=int, help="Tokens of the prompt. [4096, or what the model allows]")
@click.option("--out", "picture", type=click.Path(path_type=Path), default=Path("loki_demo.png"))
@click.option("--quick", is_flag=True, help="Leave out the picture of latency against context.")
@_with(_LOKI_OPTIONS)
@_with(_MODEL_OPTIONS)
def demo(
    name: str,
    context: int | None,
    picture: Path,
    quick: bool,
    device: str | None,
    dtype: str,
    random_weights: bool,
    **loki: Any,
) -> None:
    """Dense against sparse decoding on one model: speed, tokens, recall, perplexity, a picture."""
    import importlib.util

    from loki_compile.demo import NEW_TOKENS, check_context, run_demo
    from loki_compile.models import (
        check_placement,
        check_writable,
        fitting_context,
        load_config,
        load_model,
        load_tokenizer,
    )

    options = _loki_options(**loki)
    check_placement(device, dtype)
    if not quick:
        check_writable("--out", picture)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(
                "matplotlib is not installed; needed for the picture: pip install "
                "'loki-compile[eval]', or pass --quick"
            )
    config = load_config(name)
    context = fitting_context("--context", context, 4096, config, NEW_TOKENS)
    check_context(context, config)
    tokenizer = load_tokenizer(name)
    _say_if_dense(options, context)
    _say(f"loading {name}; then it is calibrated, and decodes by eager, Inductor and loki in turn")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    run_demo(model, tokenizer, name, context, options, None if quick else picture, out, err)


# ----------------------------------------------------------------------------------- calibrate


@main.command(epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.argument("more_text", metavar="[FILES]...", nargs=-1)
@click.option("--text", "first_text", multiple=True, help="Text files. [Python's own library]")
@click.option("--tokens", type=click.IntRange(2), default=65536, show_default=True)
@click.option("--length", "--context", "length", type=click.IntRange(2),
              help="Tokens per prompt; as long as you decode, where memory allows. "
              "[4096, or what the model allows]")  # fmt: skip
@click.option("--kind", default="attention", show_default=True,
              help='"attention", "pca" or "score-optimal".')  # fmt: skip
@click.option("--rank", default="0.25", show_default=True,
              help='Columns of an "attention" basis: 16, or 0.25 of head_dim.')  # fmt: skip
@click.option("--calibration", default="post-rotary", show_default=True,
              help='"post-rotary" or "pre-rotary".')  # fmt: skip
@click.option("--out", "folder", type=click.Path(path_type=Path), help="Folder. [the store]")
@_with(_MODEL_OPTIONS)
def calibrate(
    name: str,
    more_text: tuple[str, ...],
    first_text: tuple[str, ...],
    tokens: int,
    length: int | None,
    kind: str,
    rank: str,
    calibration: str,
    folder: Path | None,
    device: str | None,
    dtype: str,
    random_weights: bool,
) -> None:
    """Fit a basis for MODEL from text, and store it.

    How long it takes is said after the first prompt. Ctrl-C loses nothing: the same command goes on
    from there (it is kept beside the store, in `partial`).
    """
    import torch

    from loki_compile.calibration import calibrate as fit
    from loki_compile.calibration import check_choices, check_lengths
    from loki_compile.models import (
        batches_of,
        check_placement,
        check_writable,
        encode,
        fitting_context,
        load_config,
        load_model,
        load_tokenizer,
    )
    from loki_compile.pca_store.partial import default_partial_root
    from loki_compile.pca_store.store import Store
    from loki_compile.reference_data import calibration_prompts

    columns = NUMBER.convert(rank, None, None)
    check_choices(calibration, kind, columns)
    check_placement(device, dtype)
    store = Store(folder)
    check_writable("--out" if folder else "the store", store.root, folder=True)
    files = (*first_text, *more_text)
    text, source = _text_of(files, "train") if files else ("", "")
    length = fitting_context("--length", length, 4096, load_config(name))
    tokenizer = load_tokenizer(name)
    if files:
        batches = batches_of(encode(tokenizer, text[: 16 * tokens]), length, tokens)
    else:
        prompts, source = calibration_prompts(tokenizer, length, tokens)
        batches = [torch.tensor([prompt]) for prompt in prompts]
    check_lengths(batches, kind)
    total = sum(batch.numel() for batch in batches)
    if total < tokens:
        _say(f"the text holds {total} tokens of the {tokens} asked for; all are used")
    _say(f"loading {name}; then it reads {len(batches)} prompts eagerly, {total} tokens")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    try:
        with _progress(left=True) as bar:
            task = bar.add_task(f"reading with {name}", total=total, left="")
            fitting = bar.add_task("fitting", total=None, visible=kind == "attention", left="")
            said = False

            def expect(seconds: float) -> None:
                nonlocal said
                if not said:
                    _say(f"about {_duration(seconds)} to go: the rest of the text, and the fit")
                said = True
                current = fitting if bar.tasks[0].finished else task
                bar.update(task, left="")
                bar.update(current, left=f"{_duration(seconds)} left")

            basis_set = fit(
                model,
                batches,
                calibration=calibration,
                kind=kind,
                rank=columns,
                name=name,
                source=source,
                progress=lambda done: bar.advance(task, done),
                fit_progress=lambda done, steps: bar.update(fitting, completed=done, total=steps),
                expect=expect,
                partial=default_partial_root(),
            )
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        raise
    path = store.save(basis_set)
    out.print(_spectra(basis_set))
    out.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _text_of(files: Sequence[str], split: str) -> tuple[str, str]:
    """Text and what it is: the files', or the standard library's sources of a split."""
    from loki_compile.models import read_text
    from loki_compile.reference_data import stdlib_text

    if not files:
        return stdlib_text(split), f"Python's standard library ({split})"
    shown = ", ".join(Path(file).name for file in files[:8])
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return read_text(files), "".join(c for c in shown + more if c.isprintable())[:4096]


def _progress(*, left: bool = False) -> Any:
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


# --------------------------------------------------------------------------------------- bases


@main.group()
def bases() -> None:
    """What the store holds (LOKI_HOME, else the user's cache directory)."""


@bases.command("list")
def bases_list() -> None:
    """All stored bases, newest first."""
    from loki_compile.pca_store.store import Store

    store = Store()
    table = Table()
    table.add_column("name", no_wrap=True)
    for column in ("model", "kind", "calibration", "caches", "tokens", "created"):
        table.add_column(column, overflow="fold")
    stored = store.list()
    for entry in stored:
        header = entry.header
        seen = max(site.tokens for site in header.sites)
        table.add_row(
            entry.name,
            header.model,
            header.kind,
            header.calibration,
            str(len(header.sites)),
            str(seen),
            header.created[:16],
        )
    if stored:
        out.print(table)
    out.print(f"{len(stored)} in {store.root}", soft_wrap=True, highlight=False)


@bases.command("show")
@click.argument("name")
def bases_show(name: str) -> None:
    """One basis: its origin, and the dims that hold 90, 95 and 99 % of each layer's variance."""
    from loki_compile.pca_store.basis_file import header_of
    from loki_compile.pca_store.store import Store

    basis_set = Store().load(name)
    for line in _origin(header_of(basis_set)):
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    out.print(_spectra(basis_set))


@bases.command("verify")
@click.argument("names", nargs=-1)
def bases_verify(names: tuple[str, ...]) -> None:
    """Read stored bases (or files) with every check there is; all of them without a NAME."""
    from loki_compile.pca_store.basis_file import BasisFileError
    from loki_compile.pca_store.store import SUFFIX, Store

    store = Store()
    paths = [_stored_path(store.root, name) for name in names]
    if not names:
        paths = sorted(path for path in store.root.glob(f"*{SUFFIX}") if path.is_file())
    broken = []
    for path in paths:
        try:
            store.verify(path)
        except BasisFileError as error:
            broken.append(str(error))
            out.print(f"broken  {path}", soft_wrap=True, highlight=False)
        else:
            out.print(f"intact  {path}", soft_wrap=True, highlight=False)
    if broken:
        raise UserError("\n".join(broken))
    out.print(f"{len(paths)} checked")


def _stored_path(root: Path, name: str) -> Path:
    from loki_compile.pca_store.store import SUFFIX

    inside = root / f"{name}{SUFFIX}"
    return inside if os.sep not in name and inside.exists() else Path(name).expanduser()


def _origin(header: BasisHeader) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    return [
        f"model        {header.model or '(unnamed)'} ({header.dtype})",
        f"kind         {header.kind}, {header.calibration}",
        f"text         {header.source or '(unknown)'}",
        f"rope         {json.dumps(dict(header.rope)) if header.rope else 'none'}",
        f"made         {header.created} with {versions}",
    ]


def _spectra(basis_set: BasisSet) -> Table:
    from loki_compile.pca_store.basis import ORTHONORMAL_KINDS

    shares = (0.9, 0.95, 0.99)
    what = "key variance" if basis_set.kind in ORTHONORMAL_KINDS else "score variance"
    what += "" if basis_set.kind != "attention" else " that the basis holds"
    table = Table(title=f"dims that hold this share of the {what}", title_justify="left")
    for column in ("layer", "KV heads", "head_dim", "tokens", *(f"{s:.0%}" for s in shares)):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for basis in basis_set.bases:
        ranks = [str(basis.rank_for(f"variance:{share}")) for share in shares]
        heads, dims = str(basis.num_kv_heads), str(basis.head_dim)
        table.add_row(basis.layer or basis.weights, heads, dims, str(basis.tokens), *ranks)
    return table


# ------------------------------------------------------------------------------------- explain


@main.command(epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.option("--cache", type=click.Choice(["static", "dynamic"]), default="static")
@click.option("--context", type=click.IntRange(2), help="Cached tokens that budgets and memory are "
              "given for. [4096, or what the model allows]")  # fmt: skip
@click.option("--basis", help="Store name, path or hub id.")
@_with(_LOKI_OPTIONS)
@_with(_MODEL_OPTIONS)
def explain(
    name: str,
    cache: str,
    context: int | None,
    basis: str | None,
    device: str | None,
    dtype: str,
    random_weights: bool,
    **loki: Any,
) -> None:
    """What each attention site of MODEL becomes in a decode step, and why."""
    from loki_compile.config import LokiConfig
    from loki_compile.evaluation import decode_reports
    from loki_compile.explanation import site_table, summary
    from loki_compile.models import check_placement, fitting_context, load_config, load_model
    from loki_compile.report import given_up

    config = LokiConfig.from_options(_loki_options(basis=basis, **loki))
    check_placement(device, dtype)
    _check_basis(basis or "auto")
    context = fitting_context("--context", context, 4096, load_config(name))
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    found = decode_reports(model, cache, context, config.to_options())
    out.print(site_table(found, config, context))
    out.print(summary(found, config, context))
    for sentence in given_up():
        out.print(sentence)


# ---------------------------------------------------------------------------------------- eval


@main.command("eval", epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.option("--text", "files", multiple=True, help="Text file. [held-out Python library]")
@click.option("--context", type=click.IntRange(8),
              help="Tokens of each piece. [4096, or what the model allows]")  # fmt: skip
@click.option("--prefill", "start", type=click.IntRange(1),
              help="Tokens before the ones that count. [3/4 of the context]")  # fmt: skip
@click.option("--windows", type=click.IntRange(1), default=2, show_default=True,
              help="Pieces of text, each of --context tokens.")  # fmt: skip
@click.option("--recall-prompts", type=click.IntRange(0), default=4, show_default=True,
              help="Prompts of 32 questions (reference model only).")  # fmt: skip
@click.option("--basis", "chosen", multiple=True, help="Store name, path, hub id; may be repeated.")
@click.option("--cache", type=click.Choice(["static", "dynamic"]), default="static")
@_with(_LOKI_OPTIONS)
@_with(_MODEL_OPTIONS)
def evaluate(
    name: str,
    files: tuple[str, ...],
    context: int | None,
    start: int | None,
    windows: int,
    recall_prompts: int,
    chosen: tuple[str, ...],
    cache: str,
    device: str | None,
    dtype: str,
    random_weights: bool,
    **loki: Any,
) -> None:
    """Perplexity, token agreement and recall of decoding MODEL, sparse against dense.

    It decodes token by token. Log-likelihood tasks (lm-eval's multiple choice and perplexity) never
    decode: they are prefills, dense by plan, and their score says nothing of this backend.
    """
    import torch

    from loki_compile.evaluation import follow, many_variants, new_cache
    from loki_compile.models import (
        check_placement,
        encode,
        fitting_context,
        load_config,
        load_model,
        load_tokenizer,
    )

    options = _loki_options(**loki)
    named = {f"loki, basis {b}": {**options, "basis": b} for b in chosen or ("auto",)}
    for each in named.values():
        _check_basis(each["basis"])
    check_placement(device, dtype)
    context = fitting_context("--context", context, 4096, load_config(name))
    start = context * 3 // 4 if start is None else start
    if start > context - 2:
        raise ValueError(f"--prefill {start}: needs at most {context - 2} of {context} tokens.")
    text, _ = _text_of(files, "held_out")
    tokenizer = load_tokenizer(name)
    ids = encode(tokenizer, text[: 16 * windows * context])
    if len(ids) < context:
        raise ValueError(f"the text holds {len(ids)} tokens; needs {context}: pass more text")
    _say_if_dense(options, context)
    _say(f"loading {name}")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    pieces = ids[: len(ids) // context * context].view(-1, context)[:windows].to(model.device)
    recall = _recall_prompts(tokenizer, name, context, recall_prompts)
    steps: dict[str, Any] = {"dense": model}
    for label, each in named.items():
        steps[label] = torch.compile(model, backend="loki", options=each)
    traces: dict[str, Trace] = {}
    answers: dict[str, list[bool]] = {}
    per_variant = len(pieces) * (context - start - 1)
    per_variant += sum(len(prompt) - first - 1 for prompt, first, _ in recall)
    with many_variants(), _progress() as bar:
        task = bar.add_task(f"decoding with {name}", total=per_variant * len(steps))
        for label, step in steps.items():
            how = "eagerly" if label == "dense" else "compiled by Inductor at the first steps"
            _say(f"{label}: prefills {start} tokens eagerly, decodes one by one {how}")
            for piece in pieces:
                trace = follow(model, step, piece, start, new_cache(model, cache, context))
                traces[label] = traces[label].joined(trace) if label in traces else trace
                bar.advance(task, len(trace.nats))
            for prompt, first, queries in recall:
                prompt = prompt.to(model.device)
                trace = follow(model, step, prompt, first, new_cache(model, cache, context))
                right = [trace.predicted[at - first] == answer[0] for at, answer in queries]
                answers.setdefault(label, []).extend(right)
                bar.advance(task, len(trace.nats))
    out.print(_quality_table(traces, answers, context))
    out.print(
        "Log-likelihood tasks (lm-eval) never decode: their score says nothing of this backend.",
        highlight=False,
    )


def _check_basis(choice: str) -> None:
    from loki_compile.backend import load_basis

    if choice != "auto":
        load_basis(choice)


def _recall_prompts(tokenizer: Any, name: str, context: int, count: int) -> list[Any]:
    """(ids, first fed position, queries) of each; none for a model without recall tokens."""
    import torch

    from loki_compile.models import REFERENCE
    from loki_compile.reference_data import recall_prompt, recall_token_ids

    try:
        recall_token_ids(tokenizer)
    except ValueError:
        if name == REFERENCE:
            raise
        return []
    made = []
    for seed in range(count):
        ids, queries = recall_prompt(tokenizer, context, 32, 9000 + seed)
        made.append((torch.tensor(ids), queries[0][0] - 2, queries))
    return made


def _quality_table(traces: dict[str, Trace], answers: dict[str, list[bool]], context: int) -> Table:
    dense = traces["dense"]
    table = Table(
        title=f"decoding behind up to {context} tokens; {len(dense.nats)} tokens of text",
        title_justify="left",
    )
    columns = ["variant", "perplexity", "against dense", "same token"]
    for column in columns + (["recall"] if answers else []) + ["tokens/s"]:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for label, trace in traces.items():
        row = [
            label,
            f"{trace.perplexity:.4f}",
            f"{math.expm1(math.log(trace.perplexity / dense.perplexity)):+.2%}",
            f"{trace.agreement(dense):.2%}",
        ]
        if answers:
            row.append(f"{sum(answers[label])}/{len(answers[label])}")
        table.add_row(*row, f"{trace.tokens_per_second:.0f}")
    return table


# --------------------------------------------------------------------------------------- bench


@main.command(epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.option("--context", "contexts", type=click.IntRange(1), multiple=True,
              help="May be repeated. [1024, 4096, 16384 where the model allows]")  # fmt: skip
@click.option("--cache", type=click.Choice(["static", "dynamic"]), default="static")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--out", "file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
@_with(_LOKI_OPTIONS)
@_with(_MODEL_OPTIONS)
def bench(
    name: str,
    contexts: tuple[int, ...],
    cache: str,
    rounds: int,
    file: Path | None,
    device: str | None,
    dtype: str,
    random_weights: bool,
    **loki: Any,
) -> None:
    """Tokens per second of MODEL by context, dense and sparse in one run, over a cache of noise."""
    from loki_compile.evaluation import latencies, many_variants, room_for, variants
    from loki_compile.models import (
        check_placement,
        check_writable,
        fitting_context,
        load_config,
        load_model,
        longest_context,
    )

    options = _loki_options(**loki)
    check_placement(device, dtype)
    if file is not None:
        check_writable("--out", file)
    config, room = load_config(name), room_for(rounds)
    if contexts:
        for context in contexts:
            fitting_context("--context", context, context, config, room)
    else:
        longest = longest_context(config) - room
        contexts = tuple(c for c in (1024, 4096, 16384) if c <= longest) or (max(longest, 1),)
    for context in contexts:
        _say_if_dense(options, context)
    _say(f"loading {name}")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    steps = variants(model, {"loki": options})
    table = Table(title=f"{name}: tokens per second ({cache} cache)", title_justify="left")
    for column in ("cached tokens", *steps, "against the faster dense"):
        table.add_column(column, justify="right")
    rows = []
    with many_variants(), err.status("compiling and timing") as status:
        for context in contexts:
            status.update(f"{context} cached tokens")

            def begin(what: str, context: int = context) -> None:
                _say(f"{context} cached tokens: {what}")

            ms = latencies(model, steps, context, cache=cache, rounds=rounds, begin=begin)
            ratio = min(ms["eager"], ms["inductor"]) / ms["loki"]
            table.add_row(
                str(context), *(f"{1e3 / ms[step]:.1f}" for step in steps), f"{ratio:.2f}x"
            )
            rows.append({"context": context, "ms_per_token": ms, "against_dense": ratio})
    out.print(table)
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n")
        out.print(f"wrote {file}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
