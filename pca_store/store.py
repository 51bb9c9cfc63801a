"""The store: a folder of basis files, found by name or by the weights they were fitted for.

Headers are read without PyTorch, which is imported with the first file that is read or written
whole: `loki bases list` needs none.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from loki_compile.pca_store.basis_header import BasisFileError, BasisHeader, read_header
from loki_compile.pca_store.metadata import BasisNotFound, calibrate_command, run_of

if TYPE_CHECKING:
    from loki_compile.pca_store.basis import BasisSet

SUFFIX = ".safetensors"
HUB_FILE = "loki_basis.safetensors"
_TEMPORARY = ".loki-"
_STALE_SECONDS = 24 * 3600
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<rev>\S+))?")

logger = logging.getLogger("loki_compile")


class BasisSaveError(OSError):
    """A basis set could not be written; what was stored before is untouched."""


@dataclass(frozen=True)
class StoredBasis:
    """A basis file in the store: where it is, and what its header says."""

    path: Path
    header: BasisHeader
    size_bytes: int
    modified_ns: int

    @property
    def name(self) -> str:
        """The store name, which `Store.load` takes."""
        return self.path.name.removesuffix(SUFFIX)

    @property
    def _age_key(self) -> tuple[datetime, int]:
        return datetime.fromisoformat(self.header.created), self.modified_ns


def default_root() -> Path:
    """$LOKI_HOME/bases, else the user's cache directory / loki_compile / bases.

    Raises:
        ValueError: there is no home directory to put it in.
    """
    try:
        if home := os.environ.get("LOKI_HOME"):
            return Path(home).expanduser() / "bases"
        variable, fallback = "XDG_CACHE_HOME", ".cache"
        if os.name == "nt":
            variable, fallback = "LOCALAPPDATA", "AppData/Local"
        # The XDG specification has relative paths ignored.
        set_by_user = Path(os.environ.get(variable, ""))
        cache = set_by_user if set_by_user.is_absolute() else Path.home() / fallback
    except RuntimeError as error:
        raise ValueError(
            f"found no home directory for the basis store ({error}); needed a folder: set LOKI_HOME"
        ) from None
    return cache / "loki_compile" / "bases"


class Store:
    """Basis sets in one folder, one file each.

    Args:
        root: the folder; made on the first save. None for default_root().
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = default_root() if root is None else Path(os.path.expanduser(root))

    def save(self, basis_set: BasisSet) -> Path:
        """Writes a basis set, in place of an older one of the same model, kind and calibration.

        Atomic: readers, other writers and a crash see the old file or the new one, both whole.

        Returns:
            The path of the file.

        Raises:
            BasisSaveError: the folder cannot be written (full, read-only, not a folder).
            ValueError: dims beyond what a file may hold.
        """
        from loki_compile.pca_store.basis_file import encode

        data = encode(basis_set)
        path = self.root / file_name(basis_set)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            write_atomically(path, data)
        except OSError as error:
            raise BasisSaveError(
                f"basis set not saved to {path}: {error.strerror or error}; needed "
                f"{len(data)} bytes in a writable folder: free some space, or set LOKI_HOME to "
                "another folder"
            ) from error
        return path

    def load(self, name: str | Path) -> BasisSet:
        """A basis set by path, store name, model name or hub id, looked for in this order.

        1. A file that exists; or a folder that exists and holds `loki_basis.safetensors`.
        2. The name of a file in the store (as `list` shows it).
        3. A model's name: the newest set in the store made for it.
        4. A hub id `org/name` or `org/name@revision`: its `loki_basis.safetensors`, downloaded.

        What is written as a path (absolute, starting with `.` or `~`, or ending in `.safetensors`)
        is only ever taken as one.

        Raises:
            BasisNotFound: none of these exists, or the hub could not be reached.
            BasisFileError: there is a file, and it is not a whole basis file.
        """
        text = str(name)
        if path := _existing_file(Path(os.path.expanduser(text))):
            return _whole(path)
        if isinstance(name, Path) or _is_written_as_path(text):
            raise BasisNotFound(
                f"no basis file at {text}; needed a file, or a folder with {HUB_FILE}: correct the "
                f"path, or run {calibrate_command()}"
            )
        stored = self.list()
        for matching in (
            [entry for entry in stored if entry.name == text],
            [entry for entry in stored if entry.header.model == text],
        ):
            if matching:
                return _whole(matching[0].path)
        if hub_id := _HUB_ID.fullmatch(text):
            return _whole(_download(hub_id["repo"], hub_id["rev"]))
        raise BasisNotFound(
            f"no basis {text!r:.200} in {self.root} ({len(stored)} stored), and it is neither an "
            "existing path nor a hub id (org/name); needed one of these: see `loki bases list`, or "
            f"run {calibrate_command()}"
        )

    def list(self) -> list[StoredBasis]:
        """Every readable basis file, newest first; reads headers only.

        A file that cannot be read is left out, with a warning on the "loki_compile" logger.
        """
        entries = []
        for path in _files(self.root):
            try:
                entries.append(entry_of(path))
            except (BasisFileError, OSError) as error:
                warn_once(f"left out of the store: {error}")
        return sorted(entries, key=lambda entry: entry._age_key, reverse=True)

    def find(
        self,
        site_fingerprints: Iterable[str],
        blocks: Mapping[str, tuple[str, ...]] | None = None,
    ) -> BasisSet | None:
        """The stored set that covers most of these weights fingerprints, the newest of equals.

        None where no stored set covers any. Loads the tensors of the set returned alone; a set
        that proves damaged is passed over with a warning.

        Args:
            blocks: fingerprints of the rows of weights, by their fingerprint: what is some of the
                rows of stored weights counts as covered by them.
        """
        wanted, rows = set(site_fingerprints), blocks or {}

        def covered(entry: StoredBasis) -> int:
            sites = entry.header.sites
            held = {site.weights for site in sites}
            return sum(
                weights in held
                or any(run_of(rows.get(weights, ()), site.blocks) is not None for site in sites)
                for weights in wanted
            )

        # Stable: newest first among equals.
        for entry in sorted(self.list(), key=covered, reverse=True):
            if not covered(entry):
                return None
            try:
                return _whole(entry.path)
            except BasisFileError as error:
                warn_once(f"passed over: {error}")
        return None

    def verify(self, path: str | Path) -> BasisHeader:
        """Reads a file with every check: header, sizes, checksum, finite values, orthonormality.

        Raises:
            BasisFileError: a check failed, or the file cannot be read.
        """
        from loki_compile.pca_store.basis_file import verify_file

        return verify_file(Path(os.path.expanduser(path)))

    def _remove_stale(self) -> None:
        """Removes what a killed save left behind, a day later: no save takes that long."""
        for path in self.root.glob(f"{_TEMPORARY}*.tmp"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def entry_of(path: Path) -> StoredBasis:
    """What a basis file's header says; reads nothing else.

    Raises:
        BasisFileError: it is not a basis file.
        OSError: it cannot be read.
    """
    status = path.stat()
    return StoredBasis(path, read_header(path), status.st_size, status.st_mtime_ns)


def _whole(path: Path) -> BasisSet:
    from loki_compile.pca_store.basis_file import read_file

    return read_file(path)


def file_name(basis_set: BasisSet) -> str:
    """The store's file name of a set: model, kind, calibration and model fingerprint.

    Only letters, digits and ``._-`` survive of the model's name, so it cannot leave the folder.
    """
    model = re.sub(r"[^A-Za-z0-9._-]", "_", basis_set.model.replace("/", "--")).strip("._-")[:80]
    kind, calibration = basis_set.kind, basis_set.calibration
    return f"{model or 'model'}-{kind}-{calibration}-{basis_set.fingerprint[:12]}{SUFFIX}"


@functools.lru_cache(maxsize=256)
def warn_once(sentence: str) -> None:
    """What is wrong with a store: it is looked into at every graph."""
    logger.warning("%s", sentence)


def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power cut, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    # The file is whole and in place already: a file system without this must not fail the save.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _files(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.glob(f"*{SUFFIX}") if not path.name.startswith("."))
    except OSError as error:
        warn_once(f"the basis store {root} cannot be read: {error}")
        return []


def _existing_file(path: Path) -> Path | None:
    """The basis file that a path names, itself or in a folder, if it exists."""
    for candidate in (path, path / HUB_FILE):
        # OSError: a name that no file can have (too long), or a folder that may not be entered.
        with suppress(OSError, ValueError):
            if candidate.exists() and not candidate.is_dir():
                return candidate
    return None


def _is_written_as_path(text: str) -> bool:
    separators = [sep for sep in (os.sep, os.altsep) if sep and sep != "/"]
    return (
        os.path.isabs(text)
        or text.startswith((".", "~"))
        or text.endswith(SUFFIX)
        or any(sep in text for sep in separators)
    )


def _download(repo: str, revision: str | None) -> Path:
    """The basis file of a hub repository, from the hub's cache where it is already.

    Raises:
        BasisNotFound: no such repository, revision or file, or no way to reach the hub.
    """
    # Imported here: only hub ids need it, and it takes a good part of a second.
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    at = f"{repo}@{revision}" if revision else repo
    # Asked once here: a download asks again for half a minute where there is no network.
    unreachable = False
    try:
        get_hf_file_metadata(hf_hub_url(repo, HUB_FILE, revision=revision))
    except errors.HfHubHTTPError:
        pass  # an answer, which the download gives again
    except Exception:
        unreachable = True
    try:
        return Path(
            hf_hub_download(repo, HUB_FILE, revision=revision, local_files_only=unreachable)
        )
    except errors.LocalEntryNotFoundError:
        problem = (
            "the hub cannot be reached and the file is not in its cache; needed a connection (or "
            "HF_HUB_OFFLINE unset)"
        )
    except errors.EntryNotFoundError:
        problem = f"the repository has no {HUB_FILE}; needed one"
    except errors.RevisionNotFoundError:
        problem = f"the repository has no revision {revision!r}; needed one that exists"
    except errors.RepositoryNotFoundError:
        problem = "no such repository, or it is private or gated; needed one you can read"
    except Exception as error:  # Of the hub's HTTP library, whichever that is.
        cause = f"{type(error).__name__}: {error!s:.200}"
        problem = f"the download failed ({cause}); needed the file"
    raise BasisNotFound(
        f"no basis from hub id {at}: {problem}: check the id and the connection, pass a path, or "
        f"run {calibrate_command(repo)}"
    )
