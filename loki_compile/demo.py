"""`loki demo`: one model, dense against sparse decoding, and a picture of where sparse pays off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loki_compile.calibration import calibrate
from loki_compile.config import LokiConfig
from loki_compile.evaluation import (
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
from loki_compile.explanation import site_table, summary
from loki_compile.models import encode, longest_context
from loki_compile.pca_store.basis import BasisSet
from loki_compile.reference_data import (
    calibration_prompts,
    recall_prompt,
    recall_token_ids,
    stdlib_text,
)

NEW_TOKENS = 96
TEXT_TOKENS = 256
QUESTIONS = 32
CALIBRATION_TOKENS = 32768
SEED = 4096
# An attention-heavy shape for the picture: what long contexts cost when little else is computed.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 1 << 20,
}
SHAPE_CONTEXTS = (1024, 4096, 16384, 65536, 131072)
SHAPE_TOP_K = 1024


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
    out: Console,
    err: Console,
) -> None:
    """Runs every part and prints it to `out`; progress goes to `err`.

    Args:
        model, tokenizer: any causal LM of transformers.
        context: tokens of each prompt.
        options: `torch.compile` options for loki; the basis is calibrated here.
        picture: where to write the picture of latencies; None for none.

    Raises:
        ValueError: a context that the model or the text cannot fill.
    """
    prompts = make_prompts(model, tokenizer, context)
    out.print(_headline(model, name, context), highlight=False)
    with many_variants():
        _say(err, f"calibrating a basis: reading {CALIBRATION_TOKENS} tokens eagerly, then a fit")
        with err.status("calibrating a basis on Python's standard library"):
            basis = _calibrated(model, tokenizer, name, context, options)
        config = LokiConfig.from_options({**options, "basis": basis})
        found = decode_reports(model, "static", context + NEW_TOKENS, config.to_options())
        out.print(site_table(found, config, context))
        out.print(summary(found, config, context), highlight=False)
        outcomes = {}
        steps = variants(model, {"loki": config.to_options()})
        for number, (label, step) in enumerate(steps.items(), 1):
            how = "decoding" if label == "eager" else "Inductor compiles, then decoding"
            _say(err, f"{label}: {how} behind {context} tokens")
            with err.status(f"{label} ({number} of {len(steps)})"):
                outcomes[label] = try_out(model, step, prompts)
        _say(err, "measuring all three, in turns")
        with err.status("timing all three, in turns"):
            ms = latencies(model, steps, context, room=NEW_TOKENS)
        dense = min("eager", "inductor", key=ms.__getitem__)
        out.print(_outcome_table(outcomes, ms, dense, context))
        for line in _findings(outcomes, ms, dense, tokenizer, context):
            out.print(line, highlight=False, markup=False)
        if picture is not None:
            torch._dynamo.reset()
            _say(err, "picture: compiling and measuring at several contexts; --quick leaves it out")
            _draw(model, name, config, picture, err)
            out.print(f"wrote {picture}", soft_wrap=True, highlight=False)


def _say(err: Console, line: str) -> None:
    """What begins now, also where no terminal shows a status."""
    err.print(line, soft_wrap=True, highlight=False, markup=False)


def _calibrated(
    model: Any, tokenizer: Any, name: str, context: int, options: dict[str, Any]
) -> BasisSet:
    rank = options.get("rank", LokiConfig().rank)
    length = min(max(context, 64), longest_context(model))
    prompts, source = calibration_prompts(tokenizer, length, CALIBRATION_TOKENS)
    return calibrate(
        model,
        [torch.tensor([prompt]) for prompt in prompts],
        kind="pca" if isinstance(rank, str) else "attention",  # "variance:0.9" needs all columns
        rank=0.25 if isinstance(rank, str) else rank,
        name=name,
        source=source,
    )


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
    text = follow(model, step, prompts.text, prompts.start, new_cache(model, "static", slots))
    right: list[bool] = []
    if prompts.questions is not None:
        first = prompts.queries[0][0] - 2
        trace = follow(model, step, prompts.questions, first, new_cache(model, "static", slots))
        right = recall_of(trace, first, prompts.queries)
    cache = new_cache(model, "static", slots)
    return Outcome(
        text, tuple(right), tuple(generate(model, step, prompts.text, NEW_TOKENS, cache))
    )


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


def _draw(model: Any, name: str, config: LokiConfig, picture: Path, err: Console) -> None:
    """Milliseconds per token against cached tokens; for the bundled model, of a larger shape."""
    options = config.to_options()
    if name == "reference":
        title = "random weights, 4 layers, 8 query and 2 KV heads x 128 dims"
        subject, contexts = _shape(model), list(SHAPE_CONTEXTS)
        options.pop("basis")
        named = {f"loki, top_k={config.top_k}": options}
        named[f"loki, top_k={SHAPE_TOP_K}"] = {**options, "top_k": SHAPE_TOP_K}
    else:
        title = f"{name}, a cache of noise"
        subject = model
        longest = longest_context(model) - 64
        contexts = [2**n for n in range(6, 18) if 2**n <= longest][-6:]
        named = {f"loki, top_k={config.top_k}": options}
    steps = variants(subject, named, dynamic=True)
    rows: dict[int, dict[str, float]] = {}
    for context in contexts:
        with err.status(f"picture: latency behind {context} cached tokens"):
            rows[context] = latencies(
                subject, steps, context, rounds=3, steps_per_round=2, most_seconds=4
            )
    plot_latencies(rows, title, f"{model.device}, {model.dtype}".replace("torch.", ""), picture)


def _shape(model: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(model.device, model.dtype).eval()


def plot_latencies(
    rows: dict[int, dict[str, float]], title: str, device: str, picture: Path
) -> None:
    """Writes one picture: rows[context][variant] in milliseconds per token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    contexts = list(rows)
    for number, label in enumerate(next(iter(rows.values()))):
        style = "--" if label in ("eager", "inductor") else "-"
        times = [rows[context][label] for context in contexts]
        axes.plot(contexts, times, style, marker="o", color=f"C{number}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("milliseconds per token")
    axes.set_title(f"{title}\n{device}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="dense dashed, sparse solid")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
