"""Streaming moments of one cache's keys and queries, and the bases fitted from them.

Legend: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, T keys, S queries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loki_compile.pca_store.basis import Basis
from torch import Tensor

# Tokens per step: bounds the fp64 copy (8192 tokens x 8 heads x 128 dims = 64 MiB).
CHUNK_TOKENS = 8192
# Ridge on both covariances of the score-optimal fit, in mean eigenvalues: RIDGE * D / samples, at
# least RIDGE_FLOOR. It keeps both square roots invertible, hence A Bᵀ = I (exact ranking) at rank D
# whatever was seen, and keeps few samples from being believed. Measured on synthetic spectra (D =
# 64, ranks 4 to 32): from 4 D samples on, the error on unseen data is at most 1.11 times that of
# the best fixed ridge; with D / 4 samples 1.4 times, where a fixed 1e-6 reached 23 times PCA's.
RIDGE = 0.02
RIDGE_FLOOR = 1e-6
_STATE = ("count", "mean", "scatter", "query_count", "query_moment")
_LARGEST = torch.finfo(torch.float32).max


class KeyCovariance:
    """Accumulates, per KV head in fp64, what PCA and the score-optimal pair need.

    Keys: count, mean and centred scatter, merged chunk by chunk (Chan, Golub and LeVeque 1979), so
    a large common mean costs no precision. Queries: count and uncentred second moment, summed over
    the query heads of the group. Rows with NaN, infinity or values beyond fp32 are left out.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self._count = _zeros(num_kv_heads, 1, 1)
        self._mean = _zeros(num_kv_heads, 1, head_dim)
        self._scatter = _zeros(num_kv_heads, head_dim, head_dim)
        self._query_count = _zeros(num_kv_heads, 1, 1)
        self._query_moment = _zeros(num_kv_heads, head_dim, head_dim)

    @property
    def tokens(self) -> int:
        """Keys taken in, per head (the most of any head)."""
        return int(self._count.max())

    @property
    def queries(self) -> int:
        """Queries taken in, per KV head, over its G query heads (the most of any head)."""
        return int(self._query_count.max())

    @torch.no_grad()
    def update(
        self, keys: Tensor, queries: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Take in keys, and the queries that were asked of them.

        Args:
            keys: (B, Hkv, T, D), any float dtype, strides and device.
            queries: (B, Hq, S, D) with Hq a multiple of Hkv and S <= T: the queries of the last S
                tokens. Query heads h*G .. h*G+G-1 read KV head h.
            mask: bool (B, T), True for a real token, False for padding.

        Raises:
            ValueError: shapes that do not fit together.
        """
        self._check(keys, queries, mask)
        tokens = keys.shape[2]
        for row, heads in enumerate(keys):
            for start in range(0, tokens, CHUNK_TOKENS):
                window = slice(start, start + CHUNK_TOKENS)
                seen = None if mask is None else mask[row, window]
                self._add_keys(heads[:, window], seen)
        if queries is None:
            return
        first = tokens - queries.shape[2]
        for row, heads in enumerate(queries):
            groups = heads.unflatten(0, (self.num_kv_heads, -1))
            for start in range(0, queries.shape[2], CHUNK_TOKENS):
                window = slice(start, start + CHUNK_TOKENS)
                seen = None if mask is None else mask[row, first:][window]
                for member in range(groups.shape[1]):
                    self._add_queries(groups[:, member, window], seen)

    @torch.no_grad()
    def add_query_moment(self, moment: Tensor, count: Tensor | int) -> None:
        """Take in queries by their sums alone.

        Args:
            moment: (Hkv, D, D), the sum of q qᵀ over rows and the query heads of each group.
            count: how many were summed, per KV head.
        """
        self._query_moment = self._query_moment + moment.to("cpu", torch.float64)
        self._query_count = self._query_count + torch.as_tensor(count, dtype=torch.float64).cpu()

    @torch.no_grad()
    def over_rotations(self, pairs: Sequence[tuple[int, int]], share: float = 1.0) -> KeyCovariance:
        """The moments that the same keys and queries have on average over all rotations of each
        pair of dims, by angles that know nothing of each other: what they come to far away.

        With R = diag of one 2 x 2 rotation per pair, E[R M Rᵀ] of an uncentred second moment M is
        (M_aa + M_bb) / 2 at both places of a pair (a, b) and 0 beside it: E[R] is 0, and so is
        E[R ⊗ R] between two pairs. Keys of a pair have the mean 0 therefore, and their mean square
        becomes variance. Dims in no pair keep their mean and their moments among themselves.

        One prompt does not show that: a pair that turns once in 10000 tokens looks constant in it,
        or like whatever turned beside it, and its mean does not stay what it was.

        Args:
            share: how far, from 0 (what was seen) to 1.
        """
        turned = KeyCovariance(self.num_kv_heads, self.head_dim)
        still = torch.ones(self.head_dim, dtype=torch.float64)
        other = torch.arange(self.head_dim)
        for a, b in pairs:
            still[a] = still[b] = 0
            other[a], other[b] = b, a

        def averaged(moment: Tensor, beside: Tensor) -> Tensor:
            energy = moment.diagonal(dim1=-2, dim2=-1)
            mean = (energy + energy[:, other]) / 2 * (1 - still)
            return beside * still * still[:, None] + torch.diag_embed(mean)

        uncentred = self._scatter + self._count * self._mean.mT @ self._mean
        turned._count, turned._query_count = self._count, self._query_count
        turned._mean = self._mean * still
        turned._scatter = averaged(uncentred, self._scatter)
        turned._query_moment = averaged(self._query_moment, self._query_moment)
        for name in ("_mean", "_scatter", "_query_moment"):
            mixed = torch.lerp(getattr(self, name), getattr(turned, name), share)
            setattr(turned, name, mixed)
        return turned

    def state(self) -> dict[str, Tensor]:
        """Everything that was taken in, by name; fp64 on the CPU."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes the place of what was taken in; the names and shapes of `state()`.

        Raises:
            ValueError: a name is missing, or a shape is another.
        """
        for name in _STATE:
            found, own = state.get(name), getattr(self, f"_{name}")
            if found is None or found.shape != own.shape or found.dtype != own.dtype:
                raise ValueError(f"found no {name} of shape {tuple(own.shape)}")
            setattr(self, f"_{name}", found)

    @torch.no_grad()
    def merge(self, other: KeyCovariance) -> None:
        """Take in what another accumulator of the same dims has seen; `other` is left as it is.

        Raises:
            ValueError: the dims differ.
        """
        mine, theirs = (self.num_kv_heads, self.head_dim), (other.num_kv_heads, other.head_dim)
        if mine != theirs:
            raise ValueError(
                f"found moments of {theirs[0]} KV heads x {theirs[1]} dims; needed {mine[0]} x "
                f"{mine[1]}: merge accumulators of one site only"
            )
        self._merge_keys(other._count, other._mean, other._scatter)
        self._query_count = self._query_count + other._query_count
        self._query_moment = self._query_moment + other._query_moment

    @torch.no_grad()
    def pca(self, *, weights: str = "", layer: str = "") -> Basis:
        """Principal components of the keys (Loki, section 4), most variance first.

        Centred, as the paper's code; the means themselves shift every score of a query alike and
        are not kept. Directions that were never seen complete the basis, with zero variance.

        Raises:
            ValueError: no keys seen yet.
        """
        variances, vectors = torch.linalg.eigh(self._key_covariance())
        key = _signed(vectors.flip(-1)).float()
        spectrum = _fp32(variances.flip(-1))
        return Basis(key, key, spectrum, "pca", weights, layer, self.tokens)

    @torch.no_grad()
    def score_optimal(self, *, weights: str = "", layer: str = "") -> Basis:
        """The pair that minimises E (q.k - Aq.Bk)^2 over calibration queries and centred keys.

        With Cq = E[q qᵀ], Ck = Cov(k) and the SVD U S Vᵀ of Cq^½ Ck^½ (Eckart and Young), the
        columns are Cq^-½ U S^½ for queries and Ck^-½ V S^½ for keys, by descending S, so the first
        R are the optimum for every R. The spectrum is S², the score variance of each column.

        Raises:
            ValueError: no keys or no queries seen yet.
        """
        query_root, query_inverse, key_root, key_inverse = self.score_roots()
        left, singular, right = _svd(query_root @ key_root)
        weight = singular.sqrt().unsqueeze(-2)
        sign = _signs(left)
        query = query_inverse @ left * sign * weight
        key = key_inverse @ right.mT * sign * weight
        spectrum = _fp32(singular.square())
        return Basis(
            query.float(), key.float(), spectrum, "score-optimal", weights, layer, self.tokens
        )

    @torch.no_grad()
    def ordered(
        self, query: Tensor, key: Tensor, *, kind: str, weights: str = "", layer: str = ""
    ) -> Basis:
        """A pair (Hkv, D, R) that gives the same scores, its columns in `score_optimal`'s order.

        The columns are the singular vectors of Cq^½ A Bᵀ Ck^½, so the first r of them are the best
        r of this pair's scores; the spectrum is zero from R on.

        Raises:
            ValueError: no keys or no queries seen yet.
        """
        query_root, query_inverse, key_root, key_inverse = self.score_roots()
        rank = query.shape[-1]
        product = query_root @ query.double() @ key.double().mT @ key_root
        left, singular, right = _svd(product)
        left, right, singular = left[..., :rank], right.mT[..., :rank], singular[..., :rank]
        weight = singular.sqrt().unsqueeze(-2)
        sign = _signs(left)
        spectrum = torch.zeros(query.shape[:2], dtype=torch.float32, device="cpu")
        spectrum[:, :rank] = _fp32(singular.square())
        return Basis(
            (query_inverse @ left * sign * weight).float(),
            (key_inverse @ right * sign * weight).float(),
            spectrum, kind, weights, layer, self.tokens,
        )  # fmt: skip

    @torch.no_grad()
    def score_roots(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cq^½, Cq^-½, Ck^½ and Ck^-½, each (Hkv, D, D) fp64, ridged.

        Raises:
            ValueError: no keys or no queries seen yet.
        """
        if self.queries == 0:
            raise ValueError(
                "found no queries in these moments; a score-optimal basis needs them: pass queries "
                "to update(), or fit pca()"
            )
        moment = self._query_moment / self._query_count.clamp_min(1)
        return (
            *_roots(moment, self._query_count),
            *_roots(self._key_covariance(), self._count),
        )

    def _check(self, keys: Tensor, queries: Tensor | None, mask: Tensor | None) -> None:
        heads, dim = self.num_kv_heads, self.head_dim
        if keys.dim() != 4 or keys.shape[1] != heads or keys.shape[3] != dim:
            raise ValueError(
                f"found keys of shape {tuple(keys.shape)}; needed (batch, {heads}, tokens, {dim})"
            )
        batch, tokens = keys.shape[0], keys.shape[2]
        if queries is not None and (
            queries.dim() != 4
            or queries.shape[0] != batch
            or queries.shape[1] % heads
            or queries.shape[2] > tokens
            or queries.shape[3] != dim
        ):
            raise ValueError(
                f"found queries of shape {tuple(queries.shape)}; needed ({batch}, a multiple of "
                f"{heads}, at most {tokens}, {dim})"
            )
        if mask is not None and (tuple(mask.shape) != (batch, tokens) or mask.dtype != torch.bool):
            raise ValueError(
                f"found a mask of shape {tuple(mask.shape)} and dtype {mask.dtype}; needed "
                f"({batch}, {tokens}) and torch.bool, True for real tokens"
            )

    def _add_keys(self, keys: Tensor, seen: Tensor | None) -> None:
        rows, valid = _clean(keys, seen)
        count = valid.sum(1, keepdim=True)
        mean = rows.sum(1, keepdim=True) / count.clamp_min(1)
        centred = (rows - mean) * valid
        self._merge_keys(count.cpu(), mean.cpu(), (centred.mT @ centred).cpu())

    def _add_queries(self, queries: Tensor, seen: Tensor | None) -> None:
        rows, valid = _clean(queries, seen)
        self._query_count = self._query_count + valid.sum(1, keepdim=True).cpu()
        self._query_moment = self._query_moment + (rows.mT @ rows).cpu()

    def _merge_keys(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        total = (self._count + count).clamp_min(1)
        shift = mean - self._mean
        # Not in place: what inference mode made must not be written to outside of it.
        between = shift.mT @ shift * (self._count * count / total)
        self._scatter = self._scatter + scatter + between
        self._mean = self._mean + shift * (count / total)
        self._count = self._count + count

    def _key_covariance(self) -> Tensor:
        """(Hkv, D, D) fp64, unbiased; zero for a head that saw fewer than two keys."""
        if self.tokens == 0:
            raise ValueError(
                "found no keys in these moments; a basis needs some: call update() with keys first"
            )
        return self._scatter / (self._count - 1).clamp_min(1)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def _clean(rows: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (Hkv, N, D) in fp64 with the invalid ones zero, and (Hkv, N, 1) fp64: 1 where valid."""
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device
    rows = rows.to(device, torch.float64)
    valid = (rows.abs() <= _LARGEST).all(-1, keepdim=True)
    if seen is not None:
        valid = valid & seen.to(device).unsqueeze(-1)
    return rows.masked_fill(~valid, 0), valid.double()


def _svd(product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ. LAPACK's divide and conquer now and then fails on large matrices of low rank, as a
    few keys of many dims give them; the transpose is another problem to it."""
    try:
        left, singular, right = torch.linalg.svd(product)
    except torch.linalg.LinAlgError:
        left, singular, right = torch.linalg.svd(product.mT.contiguous())
        left, right = right.mT, left.mT
    return left, singular, right


def _signs(vectors: Tensor) -> Tensor:
    """(Hkv, 1, C) of +1 and -1: makes the largest entry of each column positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def _signed(vectors: Tensor) -> Tensor:
    return vectors * _signs(vectors)


def _fp32(spectrum: Tensor) -> Tensor:
    """Clamped to fp32's range from 0: rounding leaves negative variances, huge keys infinite."""
    return spectrum.clamp(0, _LARGEST).float()


def _roots(covariance: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of the ridged covariance of (Hkv, 1, 1) samples, each
    (Hkv, D, D); the identity for a head whose covariance is zero."""
    values, vectors = torch.linalg.eigh(covariance)
    mean = values.mean(-1, keepdim=True)
    head_dim = covariance.shape[-1]
    ridge = (RIDGE * head_dim / samples.squeeze(-1).clamp_min(1)).clamp_min(RIDGE_FLOOR)
    values = torch.where(mean > 0, values.clamp_min(0) + ridge * mean, 1.0)
    root = values.sqrt().unsqueeze(-2)
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT
