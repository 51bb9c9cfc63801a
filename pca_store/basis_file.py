"""The bytes of a basis file: safetensors with JSON metadata, checked before anything is believed.

The layout is described in the package's docstring. A file comes from anywhere (a hub, a colleague,
a disk that failed), so reading it allocates nothing that its size does not cover and runs no code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from loki_compile.pca_store import basis_header
from loki_compile.pca_store.basis import Basis, BasisSet
from loki_compile.pca_store.basis_header import (
    CHECKSUM_KEY,
    HEADER_FIELDS,
    META_KEY,
    BasisHeader,
    SiteRecord,
)
from loki_compile.pca_store.metadata import ORTHONORMAL_KINDS
from torch import Tensor

# fp32 sums over head_dim terms: what is this far from orthonormal was not written by a fit.
ORTHONORMAL_TOLERANCE = 1e-4


def encode(basis_set: BasisSet) -> bytes:
    """The file of a basis set.

    Raises:
        ValueError: dims beyond what a reader accepts.
    """
    header = header_of(basis_set)
    record = {name: getattr(header, name) for name in HEADER_FIELDS}
    record["rope"], record["versions"] = dict(header.rope), dict(header.versions)
    record["sites"] = [
        {n: getattr(site, n) for n in basis_header.SITE_FIELDS} for site in header.sites
    ]
    record |= {"format": basis_header.FORMAT_VERSION, "model_fingerprint": header.fingerprint}
    meta = json.dumps(record, allow_nan=False)
    tensors = _tensors_of(basis_set)
    data = safetensors.torch.save(
        tensors, metadata={META_KEY: meta, CHECKSUM_KEY: _checksum(meta, tensors)}
    )
    basis_header.check_sizes(len(data), int.from_bytes(data[:8], "little"))
    return data


def decode(data: bytes, source: str) -> BasisSet:
    """The basis set in a file's bytes; `source` names the file in errors.

    Raises:
        BasisFileError: anything but a whole, unaltered basis file of this format version.
    """
    try:
        meta, checksum, header = basis_header.parse_header(data, len(data))
        with torch.device("cpu"):
            tensors = safetensors.torch.load(data)
        basis_header.check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, header)
        found = _checksum(meta, tensors)
        if found != checksum:
            raise ValueError(
                f"found contents with sha256 {found[:16]}; needed {checksum[:16]}, as recorded "
                "when saved"
            )
        return _basis_set(header, tensors)
    except (ValueError, safetensors.SafetensorError) as error:
        raise basis_header.file_error(source, error) from None


def read_file(path: Path) -> BasisSet:
    """The basis set in a file.

    Raises:
        BasisFileError: as decode; or the file cannot be read.
    """
    data, _ = basis_header.read_bytes(path, whole=True)
    return decode(data, str(path))


def verify_file(path: Path) -> BasisHeader:
    """Reads a file with every check there is: those of read_file, and orthonormality.

    Raises:
        BasisFileError: a check failed.
    """
    basis_set = read_file(path)
    for basis in basis_set.bases:
        error = _orthonormality_error(basis)
        if basis.kind in ORTHONORMAL_KINDS and not error <= ORTHONORMAL_TOLERANCE:
            raise basis_header.file_error(
                str(path),
                f"found columns of {basis.layer or basis.weights} that are {error:.2g} from "
                f"orthonormal; needed at most {ORTHONORMAL_TOLERANCE} in a {basis.kind!r} basis",
            )
    return header_of(basis_set)


def header_of(basis_set: BasisSet) -> BasisHeader:
    """The header that a basis set is stored under."""
    sites = tuple(
        SiteRecord(
            b.layer,
            b.weights,
            b.num_kv_heads,
            b.head_dim,
            b.columns,
            b.tokens,
            b.blocks,
            dict(b.measured),
        )
        for b in basis_set.bases
    )
    fields = {name: getattr(basis_set, name) for name in HEADER_FIELDS[:-1]}
    return BasisHeader(**fields, sites=sites)


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
                measured=site.measured,
            )
        )
    fields = {name: getattr(header, name) for name in HEADER_FIELDS[1:-1]}
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
