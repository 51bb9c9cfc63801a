"""Options that several commands share, and what is asked of them before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loki_compile.commands.output import say

if TYPE_CHECKING:
    from loki_compile.config import LokiConfig

MODEL_HELP = 'MODEL is a hub id, a local folder, or "reference" for the bundled model.'


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

# Of commands that read text with a model and store what they found: `text_of` takes the files.
READING_OPTIONS = [
    click.argument("name", metavar="MODEL"),
    click.argument("more_text", metavar="[FILES]...", nargs=-1),
    click.option("--text", "first_text", multiple=True, help="Text files. [Python's own library]"),
]
OUT_OPTION = click.option(
    "--out", "folder", type=click.Path(path_type=Path), help="Folder. [the store]"
)
# Those of which a command that compares settings takes one value for all of them.
EACH_OPTIONS = [
    click.option("--min-context", type=int, help="Fewer visible keys than this run dense."),
    click.option("--index-dtype", help='"auto" (int8), "int8" or "cache".'),
    click.option("--share", help='"group" or "head".'),
]
# All but which policy, for a command that runs several.
CHOICE_OPTIONS = [
    click.option("--top-k", type=NUMBER, help="Keys each query reads: 0.125 or 1024."),
    click.option("--rank", type=NUMBER, help="Dims of the index: 0.5, 32 or variance:0.9."),
    *EACH_OPTIONS,
]
LOKI_OPTIONS = [
    *CHOICE_OPTIONS,
    click.option("--policy", help='How keys are chosen: "loki", "tidal", "oracle", ...'),
]
MODEL_OPTIONS = [
    click.option("--device", help="cpu, cuda, ...; CUDA where there is a device."),
    click.option("--dtype", default="auto", help="float32, bfloat16, float16; the checkpoint's."),
    click.option("--random-weights", is_flag=True, help="The architecture alone, no checkpoint."),
]


def with_options(options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """A decorator that adds options to a command, in their order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@dataclass(frozen=True)
class AskedModel:
    """MODEL, and the options of how it is loaded."""

    name: str
    device: str | None
    dtype: str
    random_weights: bool

    @classmethod
    def taken(cls, given: dict[str, Any]) -> AskedModel:
        """Out of all that a command was given."""
        return cls(**{field.name: given.pop(field.name) for field in fields(cls)})

    def check(self) -> None:
        """Refuses a device or a dtype that there is not, before anything is loaded.

        Raises:
            ValueError: as said.
        """
        from loki_compile.commands.models import check_placement

        check_placement(self.device, self.dtype)

    def load(self) -> Any:
        from loki_compile.commands.models import load_model

        return load_model(
            self.name, device=self.device, dtype=self.dtype, random_weights=self.random_weights
        )


def loki_options(**given: Any) -> dict[str, Any]:
    """The options that were given, checked; the names are `LokiConfig`'s.

    Raises:
        ValueError: an impossible value, a policy that is a file without a plan.
    """
    from loki_compile.config import LokiConfig

    options = {name: value for name, value in given.items() if value is not None}
    config = LokiConfig.from_options(options)
    if config.plan_file:
        from loki_compile.commands.stored import plan_in

        plan_in(config.plan_file)
    return options


def check_basis(choice: str) -> None:
    """Refuses a basis that does not exist.

    Raises:
        ValueError: as said.
    """
    from loki_compile.backend import load_basis

    if choice != "auto":
        load_basis(choice)


def check_picture(picture: Path | None) -> None:
    """Refuses a picture that could not be drawn or written, before what it is to show is measured.

    Raises:
        ValueError: as said.
    """
    from loki_compile.commands import picture as drawing
    from loki_compile.commands.models import check_writable

    if picture is not None:
        check_writable("--picture", picture)
        drawing.check_picture("--picture", picture)


def check_installed(name: str) -> None:
    """Refuses to begin without a package that is needed later.

    Raises:
        ImportError: as said.
    """
    if find_spec(name) is None:
        raise ImportError(f"{name} is not installed", name=name)


def runs_sparse(config: LokiConfig, context: int) -> bool:
    """As the runtime decides: `min_context=0` forces the sparse variant."""
    if config.min_context == 0:
        return True
    covered = config.budget.covers(context) and not config.reads_spans
    return context >= config.min_context and not covered


def dense_because(config: LokiConfig, context: int) -> str:
    """Why nothing runs sparse at `context` visible keys; "" where it does."""
    if runs_sparse(config, context):
        return ""
    if context < config.min_context:
        return f"min_context={config.min_context}"
    return f"top_k={config.top_k} covers them"


def say_if_dense(options: dict[str, Any], context: int) -> None:
    """A note where nothing would be sparse."""
    from loki_compile.config import LokiConfig

    if why := dense_because(LokiConfig.from_options(options), context):
        say(f"note: behind {context} tokens every step of loki runs dense ({why})")


def text_of(files: Sequence[str], split: str) -> tuple[str, str]:
    """Text and what it is: the files', or the standard library's sources of a split."""
    from loki_compile.commands.models import read_text
    from loki_compile.commands.reference_data import stdlib_text

    if not files:
        return stdlib_text(split), f"Python's standard library ({split})"
    shown = ", ".join(Path(file).name for file in files[:8])
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return read_text(files), "".join(c for c in shown + more if c.isprintable())[:4096]


def check_harness(given: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: options of --tasks without it, a file of tasks that is not there, or no harness.
    """
    if not given["harness"]:
        for name in ("limit", "num_fewshot", "apply_chat_template"):
            if given[name] not in (None, False):
                raise ValueError(
                    f"--{name.replace('_', '-')}: needs --tasks, whose documents it is of."
                )
        return
    for task in given["harness"]:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise ValueError(f"--tasks {task}: no such file; needs a task's name or its file.")
    if find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks: needs lm-evaluation-harness: pip install 'loki-compile[harness]'"
        )
