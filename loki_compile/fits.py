"""The basis of an index: one that was stored for the model, or one fitted from the cache itself.

A stored one serves every cache. Otherwise each sequence of each cache has its own, fitted from the
keys that it sees when the index is built, and again when the index is built anew from keys that are
not those it was fitted from, or when the cache has come to hold twice as many.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from loki_compile.caches import CacheBinding, Cached, tokens_before, version_of
from loki_compile.counts import Tally
from loki_compile.kernels.fused import project_new_keys
from loki_compile.kernels.kept import IndexLayout
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.prompts import Asked, asked_of

if TYPE_CHECKING:
    from loki_compile.index_record import IndexRecord

# Keys that an automatic basis is fitted from, evenly spread: PCA of D dims needs no more.
FIT_TOKENS = 16384
# An automatic basis is fitted again when the cache holds so many times the keys that it was
# fitted from: the first ones of a long generation need not be like those that follow.
FIT_AGAIN = 2
# Rows compared to tell whether a cache that was written still holds what a basis was fitted from,
# and the share of them that must be as it was.
SAMPLED_ROWS = 64
SAME_SHARE = 0.9

_lock = threading.RLock()
_bound: weakref.WeakKeyDictionary[Basis, dict[Any, BoundBasis]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Origin:
    """The automatic bases of the caches in one storage, as a step left it: at this version."""

    version: int | None
    fits: dict[tuple[Any, ...], Fit] = field(default_factory=dict)


# By the storage of a cache that the last step left behind: a crop is another tensor of the same
# memory, and its keys are those that the basis was fitted from.
_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class BoundBasis:
    """A basis cut to a rank, on a device: what graphs take as input. Each (Hkv, D, R) fp32, or
    (B, Hkv, D, R): one for each sequence."""

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class Fit:
    """An automatic basis of a cache, or one for each of its sequences, how many tokens it held when
    they were fitted, what its prompt had asked, where that was seen; and in words from what."""

    bases: tuple[Basis, ...]
    tokens: int
    asked: Asked | None = None
    origin: str = ""

    def bound(self, layout: IndexLayout, device: torch.device) -> BoundBasis:
        """What a graph takes for an index of this layout."""
        if not layout.each_row:
            return bind(self.bases[0], layout.rank, device)
        pairs = [basis.truncate(layout.rank) for basis in self.bases]
        query, key = (torch.stack(side).to(device) for side in zip(*pairs, strict=True))
        return BoundBasis(query, key)


def bind(basis: Basis, rank: int, device: torch.device) -> BoundBasis:
    """The basis' first `rank` columns on `device`, the same tensors at every call."""
    with _lock:
        held = _bound.setdefault(basis, {})
        key = (rank, device)
        if key not in held:
            query, key_side = basis.truncate(rank)
            held[key] = BoundBasis(query.to(device), key_side.to(device))
        return held[key]


def basis_for(
    binding: CacheBinding,
    cached: Cached,
    old: IndexRecord | None,
    filled: int,
    seen: Callable[[], Tensor | None],
    tally: Tally,
) -> Fit:
    """The basis that was fitted from these very keys, if there is one, else one fitted now.

    Args:
      old: the index that the cache had, by an automatic basis.
      filled: tokens that will be there behind this step.
      seen: which tokens each sequence sees behind this step, bool (B, T); None: all.
    """
    tokens = tokens_before(cached, filled)
    with _lock:
        origin = _origins.get(cached.past.untyped_storage())
    known: Fit | None = None
    # A cache that counts no writes may have been filled with another prompt: if it still has an
    # index, rows are compared below.
    trusted = cached.counts_writes or old is None
    if origin is not None and trusted and origin.version == version_of(cached.past):
        known = origin.fits.get(_place(binding, cached))
    if known is None and old is not None and old.fit is not None:
        known = old.fit if _mirrors_still(binding, cached, old, tokens) else None
    if known is not None and tokens < FIT_AGAIN * known.tokens:
        return known
    asked = asked_of(binding, cached)
    if asked is not None:
        asked = asked.at_rest()
    elif known is not None:
        asked = known.asked
    bases = _fit(binding, cached, tokens, seen(), asked)
    tally.add("fitted_bases")
    binding.fitted = _origin(binding, asked)
    return Fit(bases, tokens, asked, binding.fitted)


def _origin(binding: CacheBinding, asked: Asked | None) -> str:
    """What an automatic basis was fitted from, for reports."""
    if binding.latent:
        return "the keys, for all queries there can be"
    queries = "the prompt's queries and the keys" if asked is not None else "the keys alone"
    return f"{queries}, over rotations" if binding.pairs else queries


def remember(binding: CacheBinding, left: Cached, fit: Fit) -> Origin:
    """What a step has left behind was fitted so; the caller keeps its version up to date."""
    storage = left.past.untyped_storage()
    with _lock:
        origin = _origins.get(storage)
        if origin is None:
            origin = _origins[storage] = Origin(None)
        origin.version = version_of(left.past)
        origin.fits[_place(binding, left)] = fit
    return origin


def is_outgrown(fit: Fit | None, cached: Cached, filled: int, least: int) -> bool:
    """Whether an automatic basis is to be fitted again; not below `least` tokens, where every key
    is read anyway."""
    if fit is None or filled < least:
        return False
    return tokens_before(cached, filled) >= FIT_AGAIN * fit.tokens


def _place(binding: CacheBinding, cached: Cached) -> tuple[Any, ...]:
    """Tells caches in one storage apart."""
    return *binding.kin, cached.past.storage_offset()


def _mirrors_still(binding: CacheBinding, cached: Cached, old: IndexRecord, tokens: int) -> bool:
    """Whether most of the rows that the old index knew are in the cache as they were.

    Rows that were projected within a graph may have been rounded otherwise: they are compared in
    the units of the keys' own rounding, where those of another prompt are far apart.
    """
    layout, bound = old.layout, old.bound
    assert isinstance(layout, IndexLayout) and bound is not None  # it has a fit
    last = min(tokens, old.filled, cached.slots) - 1
    if last < 0:
        return False
    picked = torch.linspace(0, last, SAMPLED_ROWS, device=cached.past.device).long()
    keys = cached.at(picked)
    axis, form = cached.token_axis, binding.form
    if layout.each_row and len(bound.key) != keys.shape[form.batch_axis]:
        return False
    now = project_new_keys(keys, bound.key, form.head_axis, torch.float32, form.batch_axis)[0]
    held = [tensor.index_select(axis, picked).float() for tensor in old.tensors]
    if len(held) == 2 and form.folded:
        now, held[0] = (x.unflatten(-1, (binding.kv_heads, -1)) for x in (now, held[0]))
        held[1] = held[1].unsqueeze(-1)
    before = math.prod(held[1:], start=held[0])
    error = (now - before).abs().amax(-1)
    near = (error <= 0.05 * now.abs().amax(-1)).float()
    if layout.each_row:  # no sequence keeps the basis of another that was in its place
        near = near.movedim(form.batch_axis, 0).flatten(1).mean(1)
        return bool(near.min() >= SAME_SHARE)
    return bool(near.mean() >= SAME_SHARE)


def _fit(
    binding: CacheBinding, cached: Cached, tokens: int, seen: Tensor | None, asked: Asked | None
) -> tuple[Basis, ...]:
    """From the first `tokens` keys in a cache, for each sequence from those that it sees; the new
    keys are not in it yet. One for all sequences where these do not lie along a dimension.

    It is the score-optimal pair for what the prompt has asked, and PCA of the keys where that was
    not seen; both of moments over all rotations, where the position turns dims. Rows that are
    expanded to keys are fitted for the scores of the queries that are known, which is PCA of what
    they expand to: dims of a row count as far as heads read them.
    """
    form, device = binding.form, cached.past.device
    if seen is not None:
        seen = seen[:, :tokens] if seen.shape[1] >= tokens else None
    if tokens > FIT_TOKENS:
        picked = torch.linspace(0, tokens - 1, FIT_TOKENS, device=device).long()
        keys = cached.at(picked)
        seen = None if seen is None else seen[:, picked]
    else:
        keys = cached.narrow(0, tokens)
    heads = form.heads_first(keys, binding.kv_heads)
    if seen is not None:
        seen = seen.expand(len(heads), -1) if form.batch_axis >= 0 else None
    queries = cached.queries()
    if queries is not None and queries.shape[2] > heads.shape[2]:  # no more queries than keys
        queries = queries.flatten(1, 2).unsqueeze(2)
    groups = [slice(row, row + 1) for row in range(len(heads))]
    if not form.batched:
        groups = [slice(None)]
    return tuple(
        _fit_rows(
            binding,
            heads[rows],
            None if seen is None else seen[rows],
            queries,
            None if asked is None else asked.of(rows, len(heads)),
        )
        for rows in groups
    )


def _fit_rows(
    binding: CacheBinding,
    keys: Tensor,
    seen: Tensor | None,
    queries: Tensor | None,
    asked: tuple[Tensor, Tensor] | None,
) -> Basis:
    """The basis of keys (B, Hkv, N, D), those that are `seen` (B, N), for queries, or for sums of
    them."""
    moments = KeyCovariance(binding.kv_heads, binding.head_dim)
    if queries is None:
        moments.update(keys, None, seen)
    else:  # they are known once, and serve every sequence
        for row in range(len(keys)):
            asks = queries if row == 0 else None
            moments.update(keys[row : row + 1], asks, None if seen is None else seen[row : row + 1])
    if not moments.tokens:  # a sequence that sees nothing ranks nothing
        return _any_basis(binding)
    if asked is not None and queries is None and float(asked[1]) > 0:
        moments.add_query_moment(*asked)
    if binding.pairs:
        moments = moments.over_rotations(binding.pairs)
    fitted = moments.score_optimal if moments.queries else moments.pca
    return fitted(weights=binding.weights, layer=binding.layer)


def _any_basis(binding: CacheBinding) -> Basis:
    eye = torch.eye(binding.head_dim).expand(binding.kv_heads, -1, -1).contiguous()
    spectrum = torch.ones(binding.kv_heads, binding.head_dim)
    return Basis(eye, eye, spectrum, "pca", binding.weights, binding.layer, 0)
