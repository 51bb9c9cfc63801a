"""The bytes of a basis file: safetensors with JSON metadata, checked before anything is believed.

The layout is described in the package's docstring. A file comes from anywhere (a hub, a colleague,
a disk that failed), so reading it allocates nothing that its size does not cover and runs no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from loki_compile.pca_store.basis import (
    KINDS,
    ORTHONORMAL_KINDS,
    Basis,
    BasisSet,
    calibrate_command,
    check_choice,
    check_fingerprint,
    check_metadata,
    check_text,
)
from loki_compile.pca_store.fingerprint import MAX_BLOCKS, combine_fingerprints
from torch import Tensor

FORMAT_VERSION = 2
# Version 1 knows no blocks.
_READ_VERSIONS = (1, 2)
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

# fp32 sums over head_dim terms: what is this far from orthonormal was not written by a fit.
ORTHONORMAL_TOLERANCE = 1e-4


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

    def __post_init__(self) -> None:
        check_text("layer", self.layer)
        check_fingerprint("weights", self.weights)
        if not isinstance(self.blocks, (list, tuple)) or len(self.blocks) > MAX_BLOCKS:
            raise ValueError(f"found blocks that are not a list of at most {MAX_BLOCKS} entries")
        for block in self.blocks:
            check_fingerprint("block", block)
        object.__setattr__(self, "blocks", tuple(self.blocks))
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


_HEADER_FIELDS = (
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
_SITE_FIELDS = ("layer", "weights", "num_kv_heads", "head_dim", "columns", "tokens", "blocks")


def encode(basis_set: BasisSet) -> bytes:
    """The file of a basis set.

    Raises:
        ValueError: dims beyond what a reader accepts.
    """
    header = header_of(basis_set)
    record = {name: getattr(header, name) for name in _HEADER_FIELDS}
    record["rope"], record["versions"] = dict(header.rope), dict(header.versions)
    record["sites"] = [{n: getattr(site, n) for n in _SITE_FIELDS} for site in header.sites]
    record |= {"format": FORMAT_VERSION, "model_fingerprint": header.fingerprint}
    meta = json.dumps(record, allow_nan=False)
    tensors = _tensors_of(basis_set)
    data = safetensors.torch.save(
        tensors, metadata={META_KEY: meta, CHECKSUM_KEY: _checksum(meta, tensors)}
    )
    _check_sizes(len(data), int.from_bytes(data[:8], "little"))
    return data


def decode(data: bytes, source: str) -> BasisSet:
    """The basis set in a file's bytes; `source` names the file in errors.

    Raises:
        BasisFileError: anything but a whole, unaltered basis file of this format version.
    """
    try:
        meta, checksum, header = _parse_header(data, len(data))
        with torch.device("cpu"):
            tensors = safetensors.torch.load(data)
        _check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, header)
        found = _checksum(meta, tensors)
        if found != checksum:
            raise ValueError(
                f"found contents with sha256 {found[:16]}; needed {checksum[:16]}, as recorded "
                "when saved"
            )
        return _basis_set(header, tensors)
    except (ValueError, safetensors.SafetensorError) as error:
        raise _file_error(source, error) from None


def read_file(path: Path) -> BasisSet:
    """The basis set in a file.

    Raises:
        BasisFileError: as decode; or the file cannot be read.
    """
    data, _ = _read(path, whole=True)
    return decode(data, str(path))


def read_header(path: Path) -> BasisHeader:
    """The header alone, with every check that needs no tensor: cheap, however large the file.

    Raises:
        BasisFileError: as decode, but for the checksum; or the file cannot be read.
    """
    data, size = _read(path, whole=False)
    try:
        return _parse_header(data, size)[2]
    except ValueError as error:
        raise _file_error(str(path), error) from None


def verify_file(path: Path) -> BasisHeader:
    """Reads a file with every check there is: those of read_file, and orthonormality.

    Raises:
        BasisFileError: a check failed.
    """
    basis_set = read_file(path)
    for basis in basis_set.bases:
        error = _orthonormality_error(basis)
        if basis.kind in ORTHONORMAL_KINDS and not error <= ORTHONORMAL_TOLERANCE:
            raise _file_error(
                str(path),
                f"found columns of {basis.layer or basis.weights} that are {error:.2g} from "
                f"orthonormal; needed at most {ORTHONORMAL_TOLERANCE} in a {basis.kind!r} basis",
            )
    return header_of(basis_set)


def header_of(basis_set: BasisSet) -> BasisHeader:
    """The header that a basis set is stored under."""
    sites = tuple(
        SiteRecord(b.layer, b.weights, b.num_kv_heads, b.head_dim, b.columns, b.tokens, b.blocks)
        for b in basis_set.bases
    )
    fields = {name: getattr(basis_set, name) for name in _HEADER_FIELDS[:-1]}
    return BasisHeader(**fields, sites=sites)


def _read(path: Path, *, whole: bool) -> tuple[bytes, int]:
    """The bytes of a regular file (all, or as far as its header goes) and its size."""
    try:
        # Asked before opening, which would block on a named pipe.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _file_error(str(path), "found something that is not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            _check_sizes(size, length)
            return prefix + file.read(size - 8 if whole else length), size
    except OSError as error:
        raise _file_error(
            str(path), f"cannot be read ({error.strerror or error}); needed a readable file"
        ) from None
    except ValueError as error:
        raise _file_error(str(path), error) from None


def _file_error(source: str, problem: object) -> BasisFileError:
    if isinstance(problem, BasisFileError):
        return problem
    return BasisFileError(
        f"basis file {source}: {problem}; fetch the file again, or make a new one: run "
        f"{calibrate_command()}"
    )


def _check_sizes(file_bytes: int, header_bytes: int) -> None:
    if file_bytes > MAX_FILE_BYTES:
        raise ValueError(f"found {file_bytes} bytes; needed at most {MAX_FILE_BYTES}")
    if file_bytes < 8 or header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
        raise ValueError(
            f"found {file_bytes} bytes, of which the header claims {header_bytes}; needed a whole "
            f"safetensors file with a header of at most {MAX_HEADER_BYTES} bytes"
        )


def _parse_header(data: bytes, file_bytes: int) -> tuple[str, str, BasisHeader]:
    """(metadata text, checksum, header) of a file of `file_bytes` that starts with `data`."""
    header_bytes = int.from_bytes(data[:8], "little")
    _check_sizes(file_bytes, header_bytes)
    entries = _json_object("safetensors header", data[8 : 8 + header_bytes])
    texts = entries.pop("__metadata__", None)
    _check_keys("__metadata__", texts, (META_KEY, CHECKSUM_KEY))
    meta, checksum = texts[META_KEY], texts[CHECKSUM_KEY]
    check_text(CHECKSUM_KEY, checksum)
    if not isinstance(meta, str):
        raise ValueError(f"found {META_KEY} of type {type(meta).__name__}; needed text")
    header = _basis_header(_json_object(META_KEY, meta.encode("utf-8", "replace")))
    shapes = {name: _entry_shape(name, entry) for name, entry in entries.items()}
    _check_shapes(shapes, header)
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
    _check_keys(META_KEY, record, _HEADER_FIELDS)
    sites = record.pop("sites")
    if not isinstance(sites, list) or len(sites) > MAX_SITES:
        raise ValueError(f"found sites that are not a list of at most {MAX_SITES} entries")
    for site in sites:
        _check_keys("site", site, _SITE_FIELDS if version > 1 else _SITE_FIELDS[:-1])
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


def _check_shapes(shapes: dict[str, tuple[int, ...]], header: BasisHeader) -> None:
    expected = _expected_shapes(header)
    for name in sorted(shapes.keys() | expected.keys()):
        found, needed = shapes.get(name), expected.get(name)
        if found != needed:
            raise ValueError(
                f"found tensor {name!r:.80} of shape {found or 'none'}; needed {needed or 'none'}, "
                "as the metadata says"
            )


def _tensors_of(basis_set: BasisSet) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, basis in enumerate(basis_set.bases):
        tensors[f"key.{i}"] = basis.key
        tensors[f"spectrum.{i}"] = basis.spectrum
        if basis.kind not in ORTHONORMAL_KINDS:
            tensors[f"query.{i}"] = basis.query
    # Cloned: safetensors refuses tensors that share storage, as bases may.
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def _basis_set(header: BasisHeader, tensors: dict[str, Tensor]) -> BasisSet:
    bases = []
    for i, site in enumerate(header.sites):
        key = tensors[f"key.{i}"]
        query = tensors.get(f"query.{i}", key)
        spectrum = tensors[f"spectrum.{i}"]
        bases.append(
            Basis(
                query,
                key,
                spectrum,
                header.kind,
                site.weights,
                site.layer,
                site.tokens,
                site.blocks,
            )
        )
    fields = {name: getattr(header, name) for name in _HEADER_FIELDS[1:-1]}
    return BasisSet(tuple(bases), **fields)


def _checksum(meta: str, tensors: dict[str, Tensor]) -> str:
    """sha256 (64 hex digits) over the metadata text and every tensor's bytes, by name.

    Integrity, not authenticity: whoever alters a file on purpose can write a new checksum.
    """
    digest = hashlib.sha256(meta.encode("utf-8", "replace"))
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _orthonormality_error(basis: Basis) -> float:
    """Largest entry of |keyᵀ key - I| over the heads."""
    gram = basis.key.mT @ basis.key
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return float(gram.abs().max())
