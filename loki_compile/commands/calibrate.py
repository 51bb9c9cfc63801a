"""`loki calibrate`: fit a basis from text, and store it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loki_compile.commands.options import (
    MODEL_HELP,
    MODEL_OPTIONS,
    NUMBER,
    OUT_OPTION,
    READING_OPTIONS,
    AskedModel,
    text_of,
    with_options,
)
from loki_compile.commands.output import duration, going_on, out, progress, say, show

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from loki_compile.pca_store.basis import BasisSet


@click.command(epilog=MODEL_HELP)
@with_options(READING_OPTIONS)
@click.option("--tokens", type=click.IntRange(2),
              help='Tokens to read. [16384; 65536 of kind "attention", "pca"]')  # fmt: skip
@click.option("--length", "--context", "length", type=click.IntRange(2),
              help="Tokens per prompt; as long as you decode, where memory allows. "
              "[4096, or what the model allows]")  # fmt: skip
@click.option("--kind", default="score-optimal", show_default=True,
              help='"score-optimal" (closed form), "pca" (the paper) or "attention".')  # fmt: skip
@click.option("--refine", is_flag=True,
              help='--kind attention: trained to find attended keys, for --minutes.')  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=30.0,
              show_default=True, help="How long --refine may train.")  # fmt: skip
@click.option("--rank", default="0.5", show_default=True,
              help='Dims to measure at, all of "attention": 32, or 0.5 of head_dim.')  # fmt: skip
@click.option("--calibration", default="post-rotary", show_default=True,
              help='"post-rotary" or "pre-rotary".')  # fmt: skip
@OUT_OPTION
@with_options(MODEL_OPTIONS)
def command(**given: Any) -> None:
    """Fit a basis for MODEL from text, and store it.

    How long it takes is said after the first prompt. Ctrl-C loses nothing: the same command goes on
    from there (it is kept beside the store, in `partial`).
    """
    asked = AskedModel.taken(given)
    files = (*given.pop("first_text"), *given.pop("more_text"))
    with going_on():
        _calibrate(asked, files, **given)


def _calibrate(
    asked: AskedModel,
    files: tuple[str, ...],
    tokens: int | None,
    length: int | None,
    kind: str,
    refine: bool,
    minutes: float,
    rank: str,
    calibration: str,
    folder: Path | None,
) -> None:
    from loki_compile.calibration import check_choices, check_lengths
    from loki_compile.commands.models import check_writable, fitting_context, load_config
    from loki_compile.pca_store.partial import default_partial_root
    from loki_compile.pca_store.store import Store

    kind = "attention" if refine else kind
    if tokens is None:
        tokens = 16384 if kind == "score-optimal" else 65536
    columns = NUMBER.convert(rank, None, None)
    check_choices(calibration, kind, columns)
    asked.check()
    store = Store(folder)
    check_writable("--out" if folder else "the store", store.root, folder=True)
    text, source = text_of(files, "train") if files else (None, "")
    length = fitting_context("--length", length, 4096, load_config(asked.name))
    batches, source = _batches(asked.name, text, source, length, tokens)
    check_lengths(batches, kind)
    total = sum(batch.numel() for batch in batches)
    if total < tokens:
        say(f"the text holds {total} tokens of the {tokens} asked for; all are used")
    say(f"loading {asked.name}; then it reads {len(batches)} prompts eagerly, {total} tokens")
    basis_set = _watched_calibration(
        asked.load(),
        batches,
        calibration=calibration,
        kind=kind,
        rank=columns,
        name=asked.name,
        source=source,
        partial=default_partial_root(),
        refine_seconds=60 * minutes if refine else None,
    )
    path = store.save(basis_set)
    out.print(spectra(basis_set))
    if measured := missed(basis_set):
        say(measured)
    show(f"wrote {path}")


def _batches(
    name: str, text: str | None, source: str, length: int, tokens: int
) -> tuple[list[Tensor], str]:
    """Prompts (1, T) of a text, or of what is read where there is none; and what the text is."""
    import torch

    from loki_compile.commands.models import batches_of, encode, load_tokenizer
    from loki_compile.commands.reference_data import calibration_prompts

    tokenizer = load_tokenizer(name)
    if text is not None:
        return batches_of(encode(tokenizer, text[: 16 * tokens]), length, tokens), source
    prompts, source = calibration_prompts(tokenizer, length, tokens)
    return [torch.tensor([prompt]) for prompt in prompts], source


def _watched_calibration(model: Any, batches: list[Tensor], **settings: Any) -> BasisSet:
    """`calibrate` with bars, and the time to go said once."""
    from loki_compile.calibration import calibrate

    total = sum(batch.numel() for batch in batches)
    with progress(left=True) as bar:
        task = bar.add_task(f"reading with {settings['name']}", total=total, left="")
        fits = settings["kind"] == "attention"
        fitting = bar.add_task("fitting", total=None, visible=fits, left="")
        said = False

        def expect(seconds: float) -> None:
            nonlocal said
            if not said:
                say(f"about {duration(seconds)} to go: the rest of the text, and the fit")
            said = True
            current = fitting if bar.tasks[0].finished else task
            bar.update(task, left="")
            bar.update(current, left=f"{duration(seconds)} left")

        return calibrate(
            model,
            batches,
            progress=lambda done: bar.advance(task, done),
            fit_progress=lambda done, steps: bar.update(fitting, completed=done, total=steps),
            expect=expect,
            **settings,
        )


def missed(basis_set: BasisSet) -> str:
    """What was measured of the bases, in words; "" where nothing was."""
    of_layers = [basis.measured for basis in basis_set.bases if basis.measured]
    if not of_layers:
        return ""
    name = ("missed_mass", "missed_by_exact_scores", "share_over_rotations")
    found, exact, share = (sum(m[n] for m in of_layers) / len(of_layers) for n in name)
    return (
        f"on prompts kept apart, at rank {of_layers[0]['rank']:.0f} and "
        f"{of_layers[0]['budget']:.1%} of the keys, {found:.1%} of attention is missed "
        f"({exact:.1%} by exact scores; moments {share:.0%} averaged over rotations)"
    )


def spectra(basis_set: BasisSet) -> Table:
    """The dims that hold 90, 95 and 99 % of each layer's variance."""
    from rich.table import Table

    from loki_compile.pca_store.metadata import ORTHONORMAL_KINDS

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
