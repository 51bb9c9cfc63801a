"""`loki eval`: perplexity, token agreement and recall of decoding, sparse against dense."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from loki_compile.commands.options import (
    LOKI_OPTIONS,
    MODEL_HELP,
    MODEL_OPTIONS,
    check_basis,
    loki_options,
    say_if_dense,
    text_of,
    with_options,
)
from loki_compile.commands.output import foretelling, out, phase, progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from loki_compile.commands.measure import Trace


@click.command(epilog=MODEL_HELP)
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
@with_options(LOKI_OPTIONS)
@with_options(MODEL_OPTIONS)
def command(
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

    from loki_compile.commands.models import (
        check_placement,
        encode,
        fitting_context,
        load_config,
        load_model,
        load_tokenizer,
    )

    options = loki_options(**loki)
    named = {f"loki, basis {b}": {**options, "basis": b} for b in chosen or ("auto",)}
    for each in named.values():
        check_basis(each["basis"])
    check_placement(device, dtype)
    context = fitting_context("--context", context, 4096, load_config(name))
    start = context * 3 // 4 if start is None else start
    if start > context - 2:
        raise ValueError(f"--prefill {start}: needs at most {context - 2} of {context} tokens.")
    text, _ = text_of(files, "held_out")
    tokenizer = load_tokenizer(name)
    ids = encode(tokenizer, text[: 16 * windows * context])
    if len(ids) < context:
        raise ValueError(f"the text holds {len(ids)} tokens; needs {context}: pass more text")
    say_if_dense(options, context)
    say(f"loading {name}")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    pieces = ids[: len(ids) // context * context].view(-1, context)[:windows].to(model.device)
    recall = _recall_prompts(tokenizer, name, context, recall_prompts)
    steps: dict[str, Any] = {"dense": model}
    for label, each in named.items():
        steps[label] = torch.compile(model, backend="loki", options=each)
    traces, answers = _decoded(name, model, steps, pieces, recall, start, cache)
    out.print(_quality_table(traces, answers, context))
    out.print(
        "Log-likelihood tasks (lm-eval) never decode: their score says nothing of this backend.",
        highlight=False,
    )


def _decoded(
    name: str,
    model: Any,
    steps: dict[str, Any],
    pieces: Tensor,
    recall: list[Any],
    start: int,
    cache: str,
) -> tuple[dict[str, Trace], dict[str, list[bool]]]:
    """By each way of decoding: what it made of the pieces (windows, context), and whether each
    answer to `recall` was right."""
    from loki_compile.commands.measure import follow, many_variants, new_cache

    context = pieces.shape[1]
    traces: dict[str, Trace] = {}
    answers: dict[str, list[bool]] = {}
    per_variant = len(pieces) * (context - start - 1)
    per_variant += sum(len(prompt) - first - 1 for prompt, first, _ in recall)
    with many_variants(), progress() as bar:
        task = bar.add_task(f"decoding with {name}", total=per_variant * len(steps))
        for label, step in steps.items():
            how = "eagerly" if label == "dense" else "compiled by Inductor at the first steps"
            told = foretelling(per_variant, lambda done: bar.advance(task, done))
            what = f"{label}: prefills {start} tokens eagerly, decodes one by one {how}"
            with phase(what, spinner=False):
                for piece in pieces:
                    kept = new_cache(model, cache, context)
                    trace = follow(model, step, piece, start, kept, told)
                    traces[label] = traces[label].joined(trace) if label in traces else trace
                for prompt, first, queries in recall:
                    kept = new_cache(model, cache, context)
                    trace = follow(model, step, prompt.to(model.device), first, kept, told)
                    right = [trace.predicted[at - first] == answer[0] for at, answer in queries]
                    answers.setdefault(label, []).extend(right)
    return traces, answers


def _recall_prompts(tokenizer: Any, name: str, context: int, count: int) -> list[Any]:
    """(ids, first fed position, queries) of each; none for a model without recall tokens."""
    import torch

    from loki_compile.commands.models import REFERENCE
    from loki_compile.commands.reference_data import recall_prompt, recall_token_ids

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
