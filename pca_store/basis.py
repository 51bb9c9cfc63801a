"""Bases: the pair of projections that ranks the keys of one cache, and the set of them for a model.

Legend: Hkv KV heads, D head_dim of q and k, C columns held (C <= D), R rank used (R <= C).

The approximate score of a key is (q @ query) . (k @ key) over R columns. Columns are ordered by
what they explain, so the first R are the best R for every R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from loki_compile.pca_store.metadata import (
    KINDS,
    ORTHONORMAL_KINDS,
    calibrate_command,
    check_choice,
    check_fingerprint,
    check_measured,
    check_metadata,
    check_text,
    combine_fingerprints,
    run_of,
)
from torch import Tensor

# A rank that nobody has chosen: this share of head_dim, or all columns of a basis that holds fewer.
# An int8 index of so many dims takes the bytes of one of half as many in 16 bits, and ranks better.
AUTO, AUTO_SHARE = "auto", 0.5


class BasisMismatch(ValueError):
    """A basis does not belong to the attention site it was given for."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The projections of one key cache.

    Attributes:
        query: (Hkv, D, C) fp32, applied as q @ query to every query head of the group.
        key: (Hkv, D, C) fp32, applied as k @ key. The same tensor as `query` for orthonormal kinds.
        spectrum: (Hkv, D) fp32, descending: what each dim explains. For "pca" and "random" the
            variance of the keys along it; for "score-optimal" and "attention" the
            variance of the scores q.k, which for "attention" is zero from column C on.
        kind: one of KINDS.
        weights: hex fingerprint of the weights that produce these keys; "" where there are none.
        layer: display path of the attention module; may be "".
        tokens: keys seen per head when fitted.
        blocks: fingerprints of the rows of these weights, head_dim at a time; () where they have
            none. A process that holds some of the rows finds its heads by them.
        cut_from: the basis of all KV heads, where this is one of some of them.
        measured: what was measured of it when it was fitted, by name; {} where nothing was.

    Raises:
        ValueError: shapes, dtypes or values that cannot be a basis.
    """

    query: Tensor
    key: Tensor
    spectrum: Tensor
    kind: str = "pca"
    weights: str = ""
    layer: str = ""
    tokens: int = 0
    blocks: tuple[str, ...] = ()
    cut_from: Basis | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_measured(self.measured)
        for name in ("query", "key", "spectrum"):
            object.__setattr__(self, name, _ordinary(getattr(self, name)))
        check_choice("kind", self.kind, KINDS)
        shape = tuple(self.key.shape)
        if len(shape) != 3 or not 1 <= shape[2] <= shape[1] or shape[0] < 1:
            raise ValueError(
                f"{self._where}found projections of shape {shape}; needed (KV heads, head_dim, "
                "columns) with 1 <= columns <= head_dim"
            )
        expected = {"query": shape, "key": shape, "spectrum": shape[:2]}
        for name, needed in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != needed or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{self._where}found {name} of shape {tuple(tensor.shape)} and dtype "
                    f"{tensor.dtype}; needed {needed} and torch.float32"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{self._where}found NaN or infinity in {name}; needed finite values: "
                    "calibrate again"
                )
        if (self.spectrum < 0).any() or (self.spectrum.diff(dim=-1) > 0).any():
            raise ValueError(
                f"{self._where}found a spectrum with negative or ascending values; "
                "needed variances, largest first"
            )
        if self.kind in ORTHONORMAL_KINDS and self.query is not self.key:
            if not torch.equal(self.query, self.key):
                raise ValueError(
                    f"{self._where}found different query and key projections in a {self.kind!r} "
                    "basis; needed the same one, or kind='score-optimal'"
                )
            object.__setattr__(self, "query", self.key)

    @property
    def _where(self) -> str:
        return f"basis of {self.layer}: " if self.layer else "basis: "

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[0]

    @property
    def head_dim(self) -> int:
        return self.key.shape[1]

    @property
    def columns(self) -> int:
        """C, the largest rank this basis can be truncated to."""
        return self.key.shape[2]

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best `rank` columns: (query, key), each (Hkv, D, rank) fp32 contiguous.

        One tensor returned twice where query and key share their projection.

        Raises:
            ValueError: rank is not in 1..columns.
        """
        self._check_rank(rank)
        with torch.inference_mode(False):
            key = self.key[..., :rank].contiguous()
            query = key if self.query is self.key else self.query[..., :rank].contiguous()
        return query, key

    def heads(self, first: int, count: int, *, weights: str, blocks: tuple[str, ...]) -> Basis:
        """The basis of `count` KV heads from `first` on: it ranks their keys as this one does.

        Args:
            weights: fingerprint of the rows that make these heads' keys.
            blocks: theirs, block by block.

        Raises:
            ValueError: there are no such heads.
        """
        if first < 0 or count < 1 or first + count > self.num_kv_heads:
            raise ValueError(
                f"{self._where}found KV heads {first} to {first + count - 1} asked for; needed "
                f"some of 0 to {self.num_kv_heads - 1}"
            )
        key = self.key[first : first + count]
        query = key if self.query is self.key else self.query[first : first + count]
        spectrum = self.spectrum[first : first + count]
        return Basis(
            query, key, spectrum, self.kind, weights, self.layer, self.tokens, blocks, self
        )

    def rank_for(self, spec: int | float | str) -> int:
        """The rank, in dims, that a setting asks for.

        Args:
            spec: an int is a count; a float a fraction of head_dim in (0, 1], rounded up;
                "variance:0.9" the smallest count at which every KV head's spectrum reaches that
                share. The published code keeps `(cumsum < share).sum(-1).max()` dims, which is one
                fewer: the last count that is still short of the share. "auto" is half of head_dim,
                or all columns where they are fewer.

        Raises:
            ValueError: the setting is none of these, or asks for more dims than there are.
        """
        if spec == AUTO:
            rank = min(dims_of(AUTO_SHARE, self.head_dim), self.columns)
        elif isinstance(spec, str):
            rank = self._rank_for_variance(_variance_share(spec))
        elif isinstance(spec, float) and 0 < spec <= 1:
            rank = dims_of(spec, self.head_dim)
        elif isinstance(spec, int) and not isinstance(spec, bool):
            rank = spec
        else:
            raise ValueError(f"found rank={spec!r}; {_RANK_FORMS}")
        self._check_rank(rank)
        return rank

    def _rank_for_variance(self, share: float) -> int:
        if self.cut_from is not None:  # processes that share a layer's heads keep as many dims
            return self.cut_from._rank_for_variance(share)
        running = self.spectrum.double().cumsum(-1)
        # A head whose keys never vary reaches every share with its first dim.
        short = (running < share * running[:, -1:]).sum(-1)
        return min(int(short.max()) + 1, self.head_dim)

    def _check_rank(self, rank: int) -> None:
        if rank < 1 or rank > self.head_dim:
            raise ValueError(
                f"{self._where}found rank {rank} for a head_dim of {self.head_dim}; needed 1 to "
                f"{self.head_dim}, or a fraction in (0, 1]: set rank accordingly"
            )
        if rank > self.columns:
            raise ValueError(
                f"{self._where}found rank {rank}, but the basis holds {self.columns} of "
                f"{self.head_dim} dims; set rank to at most {self.columns}, or calibrate again "
                f"(loki calibrate --rank {rank})"
            )


def dims_of(share: float, head_dim: int) -> int:
    """So many dims are a share of head_dim in (0, 1], rounded up."""
    # Rounded first, so that 0.07 * 100 dims = 7.000000000000001 asks for 7.
    return max(1, math.ceil(round(share * head_dim, 6)))


def _ordinary(tensor: Tensor) -> Tensor:
    """Detached, and not an inference tensor: a basis outlives the mode it was fitted in."""
    if not tensor.is_inference():
        return tensor.detach() if tensor.requires_grad else tensor
    with torch.inference_mode(False):
        return tensor.clone()


_RANK_FORMS = (
    "needed a count (int), a fraction of head_dim in (0, 1] (float), 'auto' "
    "or 'variance:S' with S in (0, 1]"
)


def _variance_share(spec: str) -> float:
    name, _, share = spec.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if name != "variance" or not 0 < value <= 1:
        raise ValueError(f"found rank={spec!r}; {_RANK_FORMS}, for example 'variance:0.9'")
    return value


def random_basis(
    num_kv_heads: int, head_dim: int, *, seed: int, weights: str = "", layer: str = ""
) -> Basis:
    """A random orthonormal basis with a flat spectrum: the control to compare a fitted one with."""
    shape = (num_kv_heads, head_dim, head_dim)
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    key = torch.linalg.qr(noise).Q.float()
    spectrum = torch.ones(shape[:2], dtype=torch.float32, device="cpu")
    return Basis(key, key, spectrum, kind="random", weights=weights, layer=layer)


def library_versions() -> dict[str, str]:
    """Versions a basis set records: torch and loki_compile. Callers add what else they used."""
    try:
        own = metadata.version("loki-compile")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return {"torch": str(torch.__version__), "loki_compile": own}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False)
class BasisSet:
    """The bases of one model, one per distinct key cache, in the model's order.

    Attributes:
        bases: at least one, all of one kind, each with a weights fingerprint.
        model: name of the model, for display and for `loki calibrate`; may be "".
        calibration: one of CALIBRATIONS.
        dtype: dtype of the model when calibrated, such as "bfloat16"; may be "".
        rope: RoPE parameters as the model states them (JSON values).
        source: text the keys came from, for display; at most 4096 printable characters.
        versions: library versions.
        created: ISO 8601 date and time with offset.

    Raises:
        ValueError: no bases, mixed kinds, missing fingerprints, or metadata that cannot be stored.
    """

    bases: tuple[Basis, ...]
    model: str = ""
    calibration: str = "post-rotary"
    dtype: str = ""
    rope: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    versions: Mapping[str, str] = field(default_factory=library_versions)
    created: str = field(default_factory=_now)
    # An index belongs to a basis: who asks again for the same heads must get the same one.
    _cuts: dict[tuple[int, str], Basis] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", tuple(self.bases))
        kinds = sorted({basis.kind for basis in self.bases})
        if len(kinds) != 1:
            raise ValueError(
                f"found {len(self.bases)} bases of kinds {kinds}; needed at least one basis, all "
                "of one kind"
            )
        for basis in self.bases:
            check_fingerprint(f"weights of the basis of {basis.layer or 'a site'}", basis.weights)
            for block in basis.blocks:
                check_fingerprint(f"rows of the basis of {basis.layer or 'a site'}", block)
            check_text("layer", basis.layer)
        check_metadata(self)

    @property
    def kind(self) -> str:
        return self.bases[0].kind

    @property
    def tokens(self) -> int:
        """Keys seen per head, the most of any site."""
        return max(basis.tokens for basis in self.bases)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model: of the weights of all its sites."""
        return combine_fingerprints(basis.weights for basis in self.bases)

    def find(
        self,
        weights: str,
        *,
        occurrence: int = 0,
        blocks: tuple[str, ...] = (),
        num_kv_heads: int = 0,
    ) -> Basis | None:
        """The basis for keys made by these weights, or None.

        A block used several times has one cache per use and one set of weights: `occurrence` counts
        the uses. Where the set holds fewer uses, the last of them serves.

        Args:
            blocks: fingerprints of the weights' rows. Where the set knows no such weights, but
                weights of which these are some rows, the basis is cut to the heads they make.
            num_kv_heads: KV heads of these weights' cache; only needed to cut.
        """
        matches = [basis for basis in self.bases if basis.weights == weights]
        if not matches and blocks:
            cuts = (
                self._cut(number, weights, blocks, num_kv_heads)
                for number in range(len(self.bases))
            )
            matches = [basis for basis in cuts if basis is not None]
        return matches[min(occurrence, len(matches) - 1)] if matches else None

    def _cut(
        self, number: int, weights: str, blocks: tuple[str, ...], num_kv_heads: int
    ) -> Basis | None:
        basis = self.bases[number]
        place, heads, total = run_of(blocks, basis.blocks), basis.num_kv_heads, len(basis.blocks)
        if place is None:
            return None
        if num_kv_heads == heads:  # its rows are elsewhere too, but what they make comes together
            return basis
        first, between = divmod(place * heads, total)
        if between or num_kv_heads * total != len(blocks) * heads:
            return None  # blocks that make no whole heads
        key = (number, weights)
        if key not in self._cuts:
            self._cuts[key] = basis.heads(first, num_kv_heads, weights=weights, blocks=blocks)
        return self._cuts[key]

    def match(
        self,
        weights: str,
        *,
        layer: str,
        num_kv_heads: int,
        head_dim: int,
        occurrence: int = 0,
        blocks: tuple[str, ...] = (),
    ) -> Basis:
        """The basis for one site of a model; `blocks` as for `find`.

        Raises:
            BasisMismatch: the set has none for these weights, or one of other dims.
        """
        site = f"{layer} ({num_kv_heads} KV heads x {head_dim} dims, key weights {weights})"
        basis = self.find(weights, occurrence=occurrence, blocks=blocks, num_kv_heads=num_kv_heads)
        if basis is None:
            same_name = [b for b in self.bases if b.layer == layer]
            held = f"key weights {same_name[0].weights} there" if same_name else "no such layer"
            raise BasisMismatch(
                f"{site}: the basis set of {self.model or 'an unnamed model'!r} has {held} "
                f"(model fingerprint {self.fingerprint}, {len(self.bases)} bases), so it belongs "
                f"to other weights; needed a basis of this very model: run {calibrate_command()}"
            )
        if (basis.num_kv_heads, basis.head_dim) != (num_kv_heads, head_dim):
            raise BasisMismatch(
                f"{site}: found a basis of {basis.num_kv_heads} KV heads x {basis.head_dim} dims "
                f"for these weights; needed the site's own dims: run {calibrate_command()}"
            )
        return basis
