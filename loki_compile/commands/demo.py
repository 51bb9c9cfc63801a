"""`loki demo`: dense against sparse decoding on one model, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loki_compile.commands.options import (
    LOKI_OPTIONS,
    MODEL_HELP,
    MODEL_OPTIONS,
    loki_options,
    say_if_dense,
    with_options,
)
from loki_compile.commands.output import say


@click.command()
@click.option("--model", "name", default="reference", show_default=True, help=MODEL_HELP)
@click.option("--context", type=int, help="Tokens of the prompt. [4096, or what the model allows]")
@click.option("--out", "picture", type=click.Path(path_type=Path), default=Path("loki_demo.png"))
@click.option("--quick", is_flag=True, help="Leave out the picture of latency against context.")
@click.option("--calibrate", "anew", is_flag=True,
              help="Fit a basis, also where a stored one fits the model.")  # fmt: skip
@with_options(LOKI_OPTIONS)
@with_options(MODEL_OPTIONS)
def command(
    name: str,
    context: int | None,
    picture: Path,
    quick: bool,
    anew: bool,
    device: str | None,
    dtype: str,
    random_weights: bool,
    **loki: Any,
) -> None:
    """Dense against sparse decoding on one model: speed, tokens, recall, perplexity, a picture.

    A stored basis of the model is used where there is one; else one is fitted, which takes a while.
    """
    import importlib.util

    from loki_compile.commands.comparison import NEW_TOKENS, check_context, run_demo
    from loki_compile.commands.models import (
        check_placement,
        check_writable,
        fitting_context,
        load_config,
        load_model,
        load_tokenizer,
    )

    options = loki_options(**loki)
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
    say_if_dense(options, context)
    say(f"loading {name}; then it decodes by eager, Inductor and loki in turn")
    model = load_model(name, device=device, dtype=dtype, random_weights=random_weights)
    shown = None if quick else picture
    run_demo(model, tokenizer, name, context, options, shown, anew=anew)
