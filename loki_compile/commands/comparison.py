"""What `loki demo` runs: one model, dense against sparse decoding, over the same text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from loki_compile.calibration import calibrate
from loki_compile.commands.explain import site_table, summary
from loki_compile.commands.measure import (
    Step,
    Trace,
    decode_reports,
    follow,
    generate,
    latencies,
    many_variants,
    new_cache,
    recall_of,
    variants,
)
from loki_compile.commands.models import BUNDLED, encode, longest_context
from loki_compile.commands.output import announcing, duration, foretelling, out, phase, say, show
from loki_compile.commands.picture import draw
from loki_compile.commands.reference_data import (
    calibration_prompts,
    recall_prompt,
    recall_token_ids,
    stdlib_text,
)
from loki_compile.config import LokiConfig
from loki_compile.pca_store.basis import AUTO, AUTO_SHARE, BasisSet
from loki_compile.pca_store.basis_header import BasisFileError
from loki_compile.pca_store.fingerprint import weights_fingerprint
from loki_compile.pca_store.store import HUB_FILE, Store, StoredBasis, entry_of
from loki_compile.report import GraphReport

NEW_TOKENS = 96
TEXT_TOKENS = 256
QUESTIONS = 32
CALIBRATION_TOKENS = 32768
# Of fitting a basis for a model that has none; what would take longer is replaced by what does not.
FIT_SECONDS = 120.0
# Fitted once to the bundled model by `loki calibrate reference`.
BUNDLED_BASIS = BUNDLED / HUB_FILE
SEED = 4096


@dataclass(frozen=True)
class Outcome:
    """What one variant did: with the text, with the questions, and on its own."""

    text: Trace
    recall: tuple[bool, ...]
    generated: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """Token ids: `text` to read on, `start` where reading begins, and a recall prompt."""

    text: Tensor
    start: int
    questions: Tensor | None
    queries: Sequence[tuple[int, list[int]]]


def run_demo(
    model: Any,
    tokenizer: Any,
    name: str,
    context: int,
    options: dict[str, Any],
    picture: Path | None,
    *,
    anew: bool = False,
) -> None:
    """Runs every part and prints it; progress goes to stderr.

    Args:
        model, tokenizer: any causal LM of transformers.
        context: tokens of each prompt.
        options: `torch.compile` options for loki; the basis is chosen here.
        picture: where to write the picture of latencies; None for none.
        anew: calibrate, also where a stored basis fits.

    Raises:
        ValueError: a context that the model or the text cannot fill.
    """
    prompts = make_prompts(model, tokenizer, context)
    out.print(_headline(model, name, context), highlight=False)
    slots = context + NEW_TOKENS
    with many_variants():
        stored = None if anew else stored_basis(model, options, slots)
        if stored is not None:
            entry, config, found = stored
            say(_where_from(entry))
        else:
            basis = fitted_basis(model, tokenizer, name, context, options)
            config = LokiConfig.from_options({**options, "basis": basis})
            found = decode_reports(model, "static", slots, config.to_options())
        out.print(site_table(found, config, context))
        out.print(summary(found, config, context), highlight=False)
        steps = variants(model, {"loki": config.to_options()})
        outcomes = _outcomes(model, steps, prompts, context)
        begin = announcing("timing")
        ms = latencies(model, steps, context, room=NEW_TOKENS, begin=begin)
        dense = min("eager", "inductor", key=ms.__getitem__)
        out.print(_outcome_table(outcomes, ms, dense, context))
        for line in _findings(outcomes, ms, dense, tokenizer, context):
            show(line)
        if picture is not None:
            torch._dynamo.reset()
            say("picture: compiles and measures at several contexts; --quick leaves it out")
            draw(model, name, config, picture)
            show(f"wrote {picture}")


def stored_basis(
    model: Any, options: dict[str, Any], slots: int
) -> tuple[StoredBasis, LokiConfig, Sequence[GraphReport]] | None:
    """The newest stored basis that serves every sparse site of a model with these options; for the
    bundled model, else the one that lies beside it.

    Returns:
        It, the configuration with it, and the reports of a decode step; None where there is none.
    """
    held = {weights_fingerprint(parameter) for parameter in model.parameters()}
    bundled = [entry_of(BUNDLED_BASIS)] if BUNDLED_BASIS.exists() else []
    for entry in [*Store().list(), *bundled]:
        if not any(site.weights in held for site in entry.header.sites):
            continue
        try:
            config = LokiConfig.from_options({**options, "basis": Store().load(entry.path)})
            return entry, config, decode_reports(model, "static", slots, config.to_options())
        except BasisFileError as error:
            say(f"passed over: {error}")
        except ValueError as error:  # fewer columns than the rank asks for, or not of every layer
            say(f"passed over: {entry.name}: {error}")
    return None


def _where_from(entry: StoredBasis) -> str:
    name = "bundled with the model" if entry.path == BUNDLED_BASIS else entry.name
    return (
        f"basis: {name}, stored {entry.header.created[:10]} from "
        f"{entry.header.tokens} tokens of {entry.header.source or 'unknown text'}; "
        "--calibrate fits one anew"
    )


class _TooLong(Exception):
    """A fit that would take so many seconds."""


class _Foretold:
    """Told what a fit will still take: says it once, if that is not too long.

    Raises:
        _TooLong: it is.
    """

    def __init__(self) -> None:
        self.said = False

    def __call__(self, seconds: float) -> None:
        if not self.said and seconds > FIT_SECONDS:
            raise _TooLong(seconds)
        if not self.said:
            say(f"  about {duration(seconds)} to go")
        self.said = True


def fitted_basis(
    model: Any, tokenizer: Any, name: str, context: int, options: dict[str, Any]
) -> BasisSet:
    """A basis of a model that has none, in about `FIT_SECONDS` at most once a prompt is read.

    A fit to attention that would take longer gives way to a score-optimal one, of as many prompts
    as can be read meanwhile; that is said, and what fits the better one.
    """
    rank = options.get("rank", LokiConfig().rank)
    length = min(max(context, 64), longest_context(model))
    prompts, source = calibration_prompts(tokenizer, length, CALIBRATION_TOKENS)
    rank = AUTO_SHARE if rank == AUTO else rank
    every = isinstance(rank, str)  # "variance:0.9" needs all columns
    begin = time.perf_counter()

    def fitted(kind: str, prompts: Sequence[list[int]], **more: Any) -> BasisSet:
        return calibrate(
            model,
            [torch.tensor([prompt]) for prompt in prompts],
            kind=kind,
            rank=AUTO_SHARE if every else rank,
            name=name,
            source=source,
            **more,
        )

    kind = "pca" if every else "attention"
    total = sum(map(len, prompts))
    with phase(f"basis: one is fitted for {name}: reads {total} tokens eagerly, then fits"):
        try:
            basis = fitted(kind, prompts, expect=_Foretold())
        except _TooLong as found:
            each = time.perf_counter() - begin
            prompts = prompts[: max(1, int(FIT_SECONDS / each))]
            kind = "pca" if every else "score-optimal"
            say(
                f"  the whole fit would take {duration(found.args[0])}; in its place a {kind} one "
                f"of {sum(map(len, prompts))} tokens, which ranks worse: about "
                f"{duration(each * len(prompts))} to go"
            )
            basis = fitted(kind, prompts)
    say(f"  it is not kept; `loki calibrate {name}` fits and stores one")
    return basis


def check_context(context: int, model: Any) -> None:
    """Refuses a context that a model, or its configuration, has no positions for.

    Raises:
        ValueError: as said.
    """
    longest = longest_context(model) - NEW_TOKENS
    if not 2 * TEXT_TOKENS <= context <= longest:
        raise ValueError(
            f"--context {context}: needs {2 * TEXT_TOKENS} to {longest} tokens for this model."
        )


def make_prompts(model: Any, tokenizer: Any, context: int) -> Prompts:
    """Held-out code to read, and recall questions where the tokenizer has the words for them.

    Raises:
        ValueError: a context that the model or the text cannot fill.
    """
    check_context(context, model)
    # The end of the text: code as every other, where the start is a licence.
    ids = encode(tokenizer, stdlib_text("held_out")[-16 * context :])[-context:]
    if len(ids) < context:
        raise ValueError(
            f"--context {context}: the text holds {len(ids)} tokens; needs a shorter context."
        )
    try:
        recall_token_ids(tokenizer)
    except ValueError:
        return Prompts(ids.to(model.device), context - TEXT_TOKENS, None, ())
    questions, queries = recall_prompt(tokenizer, context, QUESTIONS, SEED)
    device = model.device
    asked = torch.tensor(questions, device=device)
    return Prompts(ids.to(device), context - TEXT_TOKENS, asked, queries)


def try_out(model: Any, step: Step, prompts: Prompts) -> Outcome:
    """Reads the text, answers the questions and generates, all behind a static cache."""
    slots = len(prompts.text) + NEW_TOKENS
    first = prompts.queries[0][0] - 2 if prompts.queries else 0
    asked = 0 if prompts.questions is None else len(prompts.questions) - first - 1
    told = foretelling(len(prompts.text) - prompts.start - 1 + asked + NEW_TOKENS)
    cache = new_cache(model, "static", slots)
    text = follow(model, step, prompts.text, prompts.start, cache, told)
    right: list[bool] = []
    if prompts.questions is not None:
        cache = new_cache(model, "static", slots)
        trace = follow(model, step, prompts.questions, first, cache, told)
        right = recall_of(trace, first, prompts.queries)
    cache = new_cache(model, "static", slots)
    return Outcome(
        text, tuple(right), tuple(generate(model, step, prompts.text, NEW_TOKENS, cache))
    )


def _outcomes(
    model: Any, steps: dict[str, Step], prompts: Prompts, context: int
) -> dict[str, Outcome]:
    """What each variant did; which is at work is said."""
    outcomes = {}
    for number, (label, step) in enumerate(steps.items(), 1):
        how = "decodes" if label == "eager" else "Inductor compiles at the first steps, decodes"
        with phase(f"{label} ({number} of {len(steps)}): {how} behind {context} tokens"):
            outcomes[label] = try_out(model, step, prompts)
    return outcomes


def _headline(model: Any, name: str, context: int) -> str:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    return (
        f"{name}: {size:.1f} M parameters, {kind}, {model.device}, "
        f"{torch.get_num_threads()} threads, prompts of {context} tokens"
    )


def _outcome_table(
    outcomes: dict[str, Outcome], ms: dict[str, float], dense: str, context: int
) -> Table:
    base = outcomes[dense]
    title = f"decoding behind {context} tokens (dense is {dense}, the faster of the two)"
    table = Table(title=title, title_justify="left")
    asked = len(base.recall)
    columns = ["variant", "tokens/s", "speed", "perplexity", "against dense", "same token"]
    for column in [*columns, *(["recall"] if asked else [])]:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for label, outcome in outcomes.items():
        row = [
            label,
            f"{1e3 / ms[label]:.0f}",
            f"{ms[dense] / ms[label]:.2f}x",
            f"{outcome.text.perplexity:.4f}",
            f"{outcome.text.perplexity / base.text.perplexity - 1:+.2%}",
            f"{outcome.text.agreement(base.text):.1%}",
        ]
        table.add_row(*row, *([f"{sum(outcome.recall)}/{asked}"] if asked else []))
    return table


def _findings(
    outcomes: dict[str, Outcome],
    ms: dict[str, float],
    dense: str,
    tokenizer: Any,
    context: int,
) -> list[str]:
    base, loki = outcomes[dense], outcomes["loki"]
    same = next(
        (i for i, (a, b) in enumerate(zip(base.generated, loki.generated, strict=True)) if a != b),
        len(base.generated),
    )
    lines = [
        f"Generating {NEW_TOKENS} tokens greedily, dense and loki agree on the first {same}.",
        f"  dense: {_shown(tokenizer, base.generated)}",
        f"  loki:  {_shown(tokenizer, loki.generated)}",
    ]
    ratio = ms[dense] / ms["loki"]
    if ratio < 1.05:
        lines.append(
            f"Sparse decoding is not faster here ({ratio:.2f}x): reading {context} cached tokens "
            "is a small part of this model's step. The picture shows where it pays off."
        )
    return lines


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    text = repr(tokenizer.decode(ids))
    return text if len(text) <= 100 else text[:97] + "..."
