"""The header of a basis file: safetensors' own, with JSON metadata, checked before it is believed.

The layout is described in the package's docstring. Reading a header needs no PyTorch, allocates
nothing that the file's size does not cover and runs no code.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loki_compile.pca_store.metadata import (
    KINDS,
    MAX_BLOCKS,
    ORTHONORMAL_KINDS,
    calibrate_command,
    check_choice,
    check_fingerprint,
    check_measured,
    check_metadata,
    check_text,
    combine_fingerprints,
)

FORMAT_VERSION = 3
# Version 1 knows no blocks, versions 1 and 2 nothing that was measured.
_READ_VERSIONS = (1, 2, 3)
META_KEY = "loki_compile.basis"
CHECKSUM_KEY = "loki_compile.sha256"

# Bounds on what is read: far above any model (126 layers x 8 heads x 128 dims take 66 MB), far
# below what would hurt a machine.
MAX_FILE_BYTES = 4 << 30
MAX_HEADER_BYTES = 16 << 20
MAX_SITES = 4096
MAX_KV_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_TOKENS = 1 << 60


class BasisFileError(ValueError):
    """A basis file that is damaged, tampered with, or not a basis file."""


@dataclass(frozen=True)
class SiteRecord:
    """What the header says of one basis: its site, and its dims."""

    layer: str
    weights: str
    num_kv_heads: int
    head_dim: int
    columns: int
    tokens: int
    blocks: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text("layer", self.layer)
        check_fingerprint("weights", self.weights)
        if not isinstance(self.blocks, (list, tuple)) or len(self.blocks) > MAX_BLOCKS:
            raise ValueError(f"found blocks that are not a list of at most {MAX_BLOCKS} entries")
        for block in self.blocks:
            check_fingerprint("block", block)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        check_measured(self.measured)
        _check_count("num_kv_heads", self.num_kv_heads, 1, MAX_KV_HEADS)
        _check_count("head_dim", self.head_dim, 1, MAX_HEAD_DIM)
        _check_count("columns", self.columns, 1, self.head_dim)
        _check_count("tokens", self.tokens, 0, MAX_TOKENS)


@dataclass(frozen=True)
class BasisHeader:
    """All of a basis file but its tensors. Fields as in BasisSet."""

    kind: str
    model: str
    calibration: str
    dtype: str
    rope: Mapping[str, Any]
    source: str
    versions: Mapping[str, str]
    created: str
    sites: tuple[SiteRecord, ...]

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_metadata(self)
        _check_count("number of sites", len(self.sites), 1, MAX_SITES)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model, as BasisSet.fingerprint."""
        return combine_fingerprints(site.weights for site in self.sites)

    @property
    def tokens(self) -> int:
        """Keys seen per head, the most of any site."""
        return max(site.tokens for site in self.sites)


HEADER_FIELDS = (
    "kind",
    "model",
    "calibration",
    "dtype",
    "rope",
    "source",
    "versions",
    "created",
    "sites",
)
SITE_FIELDS = (
    "layer",
    "weights",
    "num_kv_heads",
    "head_dim",
    "columns",
    "tokens",
    "blocks",
    "measured",
)


def read_header(path: Path) -> BasisHeader:
    """The header alone, with every check that needs no tensor: cheap, however large the file.

    Raises:
        BasisFileError: as decode, but for the checksum; or the file cannot be read.
    """
    data, size = read_bytes(path, whole=False)
    try:
        return parse_header(data, size)[2]
    except ValueError as error:
        raise file_error(str(path), error) from None


def read_bytes(path: Path, *, whole: bool) -> tuple[bytes, int]:
    """The bytes of a regular file (all, or as far as its header goes) and its size."""
    try:
        # Asked before opening, which would block on a named pipe.
        if not stat.S_ISREG(path.stat().st_mode):
            raise file_error(str(path), "found something that is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            check_sizes(size, length)
            return prefix + file.read(size - 8 if whole else length), size
    except OSError as error:
        raise file_error(
            str(path), f"cannot be read ({error.strerror or error}); needed a readable file"
        ) from None
    except ValueError as error:
        raise file_error(str(path), error) from None


def file_error(source: str, problem: object) -> BasisFileError:
    if isinstance(problem, BasisFileError):
        return problem
    return BasisFileError(
        f"basis file {source}: {problem}; fetch the file again, or make a new one: run "
        f"{calibrate_command()}"
    )


def check_sizes(file_bytes: int, header_bytes: int) -> None:
    if file_bytes > MAX_FILE_BYTES:
        raise ValueError(f"found {file_bytes} bytes; needed at most {MAX_FILE_BYTES}")
    if file_bytes < 8 or header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
        raise ValueError(
            f"found {file_bytes} bytes, of which the header claims {header_bytes}; needed a whole "
            f"safetensors file with a header of at most {MAX_HEADER_BYTES} bytes"
        )


def parse_header(data: bytes, file_bytes: int) -> tuple[str, str, BasisHeader]:
    """(metadata text, checksum, header) of a file of `file_bytes` that starts with `data`."""
    header_bytes = int.from_bytes(data[:8], "little")
    check_sizes(file_bytes, header_bytes)
    entries = _json_object("safetensors header", data[8 : 8 + header_bytes])
    texts = entries.pop("__metadata__", None)
    _check_keys("__metadata__", texts, (META_KEY, CHECKSUM_KEY))
    meta, checksum = texts[META_KEY], texts[CHECKSUM_KEY]
    check_text(CHECKSUM_KEY, checksum)
    if not isinstance(meta, str):
        raise ValueError(f"found {META_KEY} of type {type(meta).__name__}; needed text")
    header = _basis_header(_json_object(META_KEY, meta.encode("utf-8", "replace")))
    shapes = {name: _entry_shape(name, entry) for name, entry in entries.items()}
    check_shapes(shapes, header)
    implied = 8 + header_bytes + 4 * sum(map(math.prod, shapes.values()))
    if implied != file_bytes:
        raise ValueError(f"found {file_bytes} bytes; needed {implied}, as the header implies")
    return meta, checksum, header


def _json_object(name: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found a {name} that is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"found a {name} that is a {type(value).__name__}; needed a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("repeated names")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _basis_header(record: dict[str, Any]) -> BasisHeader:
    version = record.pop("format", None)
    if type(version) is not int or version not in _READ_VERSIONS:
        raise ValueError(
            f"found format version {version!r:.80}; needed {FORMAT_VERSION}: another release of "
            "loki_compile reads it"
        )
    model_fingerprint = record.pop("model_fingerprint", None)
    _check_keys(META_KEY, record, HEADER_FIELDS)
    sites = record.pop("sites")
    if not isinstance(sites, list) or len(sites) > MAX_SITES:
        raise ValueError(f"found sites that are not a list of at most {MAX_SITES} entries")
    for site in sites:
        _check_keys("site", site, SITE_FIELDS[: len(SITE_FIELDS) + version - FORMAT_VERSION])
    header = BasisHeader(**record, sites=tuple(SiteRecord(**site) for site in sites))
    if header.fingerprint != model_fingerprint:
        raise ValueError(
            f"found model fingerprint {model_fingerprint!r:.80}; needed {header.fingerprint}, as "
            "its sites imply"
        )
    return header


def _check_keys(name: str, record: Any, expected: tuple[str, ...]) -> None:
    if not isinstance(record, dict) or set(record) != set(expected):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"found {name} {found!s:.200}; needed the fields {sorted(expected)}")


def _check_count(name: str, value: Any, lowest: int, highest: int) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"found {name} {value!r:.80}; needed an integer {lowest} to {highest}")


def _entry_shape(name: str, entry: Any) -> tuple[int, ...]:
    """The shape of one tensor as the safetensors header gives it."""
    _check_keys(f"entry of tensor {name!r:.80}", entry, ("dtype", "shape", "data_offsets"))
    shape = entry["shape"]
    if entry["dtype"] != "F32":
        raise ValueError(f"found tensor {name!r:.80} of dtype {entry['dtype']!r:.80}; needed 'F32'")
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise ValueError(f"found tensor {name!r:.80} of shape {shape!r:.80}; needed integers")
    return tuple(shape)


def _expected_shapes(header: BasisHeader) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, site in enumerate(header.sites):
        projection = (site.num_kv_heads, site.head_dim, site.columns)
        shapes[f"key.{i}"] = projection
        shapes[f"spectrum.{i}"] = (site.num_kv_heads, site.head_dim)
        if header.kind not in ORTHONORMAL_KINDS:
            shapes[f"query.{i}"] = projection
    return shapes


def check_shapes(shapes: dict[str, tuple[int, ...]], header: BasisHeader) -> None:
    expected = _expected_shapes(header)
    for name in sorted(shapes.keys() | expected.keys()):
        found, needed = shapes.get(name), expected.get(name)
        if found != needed:
            raise ValueError(
                f"found tensor {name!r:.80} of shape {found or 'none'}; needed {needed or 'none'}, "
                "as the metadata says"
            )
