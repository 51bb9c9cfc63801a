"""`loki bases`: what the store holds, and whether it is intact."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
from rich.table import Table

from loki_compile.commands.output import UserError, out, show
from loki_compile.pca_store.basis_header import BasisFileError, BasisHeader
from loki_compile.pca_store.store import SUFFIX, Store


@click.group("bases")
def command() -> None:
    """What the store holds (LOKI_HOME, else the user's cache directory)."""


@command.command("list")
def list_all() -> None:
    """All stored bases, newest first."""
    store = Store()
    table = Table()
    table.add_column("name", no_wrap=True)
    for column in ("model", "kind", "calibration", "caches", "tokens", "created"):
        table.add_column(column, overflow="fold")
    stored = store.list()
    for entry in stored:
        header = entry.header
        table.add_row(
            entry.name,
            header.model,
            header.kind,
            header.calibration,
            str(len(header.sites)),
            str(header.tokens),
            header.created[:16],
        )
    if stored:
        out.print(table)
    show(f"{len(stored)} in {store.root}")


@command.command("show")
@click.argument("name")
def show_one(name: str) -> None:
    """One basis: its origin, and the dims that hold 90, 95 and 99 % of each layer's variance."""
    from loki_compile.commands.calibrate import spectra
    from loki_compile.pca_store.basis_file import header_of

    basis_set = Store().load(name)
    for line in _origin(header_of(basis_set)):
        show(line)
    out.print(spectra(basis_set))


@command.command("verify")
@click.argument("names", nargs=-1)
def verify(names: tuple[str, ...]) -> None:
    """Read stored bases (or files) with every check there is; all of them without a NAME."""
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
            show(f"broken  {path}")
        else:
            show(f"intact  {path}")
    if broken:
        raise UserError("\n".join(broken))
    show(f"{len(paths)} checked")


def _stored_path(root: Path, name: str) -> Path:
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
