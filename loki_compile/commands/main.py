"""The command `loki`, and how mistakes are shown: one line on stderr, exit code 2."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import click

from loki_compile.commands.output import UserError, err

# Each module has the command as `command`; they are imported when they are asked for.
COMMANDS = {
    "demo": "demo",
    "calibrate": "calibrate",
    "tune": "tune",
    "bases": "bases",
    "explain": "explain",
    "eval": "evaluate",
    "bench": "bench",
}


class _Commands(click.Group):
    """Shows what a user can mend as one line; `--traceback` shows where it came from."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = import_module(f"loki_compile.commands.{COMMANDS[cmd_name]}").command
        return found

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
        from rich.logging import RichHandler

        logger = logging.getLogger("loki_compile")
        logger.addHandler(RichHandler(console=err, show_path=False))
        logger.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
