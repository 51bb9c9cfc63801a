"""What an unfinished calibration has seen and fitted: a folder of files that a later run goes on
from.

Each file is a safetensors file that names the run it belongs to and holds a checksum of every
tensor: a damaged or foreign file is refused, never believed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from loki_compile.pca_store.store import default_root
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = 1


class PartialError(ValueError):
    """A file of an unfinished calibration is damaged, incomplete or another run's."""


def default_partial_root() -> Path:
    """Beside the store: $LOKI_HOME/partial, else in the user's cache directory.

    Raises:
        ValueError: there is no home directory to put it in.
    """
    return default_root().parent / "partial"


class Partial:
    """The folder of one run. `key` (hex) names model, texts and settings."""

    def __init__(self, root: str | Path, key: str) -> None:
        self.folder = Path(os.path.expanduser(root)) / key[:32]
        self._key = key

    def has(self, name: str) -> bool:
        """Whether a file of that name is there, whole or not."""
        return self._path(name).exists()

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Writes one file, atomically; `record` is anything that JSON holds.

        Raises:
            OSError: it cannot be written.
        """
        held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        sums = {key: _sum(value) for key, value in held.items()}
        meta = {"format": _FORMAT, "key": self._key, "sums": sums, "record": record}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            try:
                save_file(held, temporary, {"loki_partial": json.dumps(meta)})
            except SafetensorError as error:  # a full disk
                raise OSError(str(error)) from None
            os.replace(temporary, self._path(name))
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def read(
        self, name: str, wanted: Callable[[str], bool] = lambda _: True
    ) -> tuple[dict[str, Tensor], Any]:
        """The tensors whose names are `wanted`, on the CPU, and the record.

        Raises:
            PartialError: no such file, a damaged one, or another run's.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["loki_partial"])
                if (meta["format"], meta["key"]) != (_FORMAT, self._key):
                    raise PartialError(f"{path} belongs to another calibration")
                names = set(meta["sums"])
                if names != set(file.keys()):
                    raise PartialError(f"{path} does not hold what it lists")
                tensors = {key: file.get_tensor(key) for key in sorted(names) if wanted(key)}
                for key, value in tensors.items():
                    if _sum(value) != meta["sums"][key]:
                        raise PartialError(f"{path} is damaged ({key})")
                return tensors, meta["record"]
        except PartialError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise PartialError(f"{path} cannot be read ({reason})") from None

    def remove(self) -> None:
        """Removes the folder, and the one that holds it where that is then empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _sum(value: Tensor) -> int:
    flat = value.reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
