"""Caches as calls bring them, and the key indexes that belong to them.

Indexes belong to cache tensors, not to graphs: recompilation, a second graph over the same cache,
and interleaved conversations all find theirs. They die with their caches.

Provenance. An index is valid for a cache tensor if that tensor is the very one that the sparse
variant last wrote: same storage, address, shape, strides and version counter. Anything else
rebuilds the index from the cache. (What PyTorch itself does not count escapes: a write through
`.data` or NumPy.) Tensors made under `torch.inference_mode` have no version counter; for them the
number of filled slots must continue where the last step ended, and some cached rows, the newest
among them, must be what they were behind that step, bit for bit (see `Witness`). An edit of a few
old keys between two steps can escape that, so edit caches under `torch.no_grad`. A stale index can
only misrank: attention itself always reads the cache's own keys and values.

Bases. One that was stored for the model serves every cache. Otherwise each sequence of each cache
has its own, fitted from the keys that it sees when the index is built, and again when the index is
built anew from keys that are not those it was fitted from, or when the cache has come to hold twice
as many.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from loki_compile.counts import Tally, hold_bytes
from loki_compile.kernels.fused import project_new_keys, rows_and_heads_first, unit_queries
from loki_compile.passes.attention import AttentionSite, Latent
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import input_of
from loki_compile.passes.mirror import IndexLayout
from loki_compile.passes.shared_caches import Part
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.covariance import KeyCovariance

log = logging.getLogger("loki_compile")

# Tokens projected at a time when an index is rebuilt: bounds the fp32 copy of the keys.
REBUILD_TOKENS = 8192
# Keys that an automatic basis is fitted from, evenly spread: PCA of D dims needs no more.
FIT_TOKENS = 16384
# An automatic basis is fitted again when the cache holds so many times the keys that it was
# fitted from: the first ones of a long generation need not be like those that follow.
FIT_AGAIN = 2
# Rows of each cache that a witness remembers, beside the newest.
WITNESS_ROWS = 16
# Rows compared to tell whether a cache that was written still holds what a basis was fitted from,
# and the share of them that must be as it was.
SAMPLED_ROWS = 64
SAME_SHARE = 0.9

_lock = threading.RLock()
_indexes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_filled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_bound: weakref.WeakKeyDictionary[Basis, dict[Any, BoundBasis]] = weakref.WeakKeyDictionary()
# By the storage of a cache that the last step left behind: a crop is another tensor of the same
# memory, and its keys are those that the basis was fitted from.
_fitted_from: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class BoundBasis:
    """A basis cut to a rank, on a device: what graphs take as input. Each (Hkv, D, R) fp32, or
    (B, Hkv, D, R): one for each sequence."""

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class Fit:
    """An automatic basis of a cache, or one for each of its sequences, and how many tokens it held
    when they were fitted."""

    bases: tuple[Basis, ...]
    tokens: int

    def bound(self, layout: IndexLayout, device: torch.device) -> BoundBasis:
        """What a graph takes for an index of this layout."""
        if not layout.each_row:
            return bind(self.bases[0], layout.rank, device)
        pairs = [basis.truncate(layout.rank) for basis in self.bases]
        query, key = (torch.stack(side).to(device) for side in zip(*pairs, strict=True))
        return BoundBasis(query, key)


class Watch:
    """What became of the indexes that calls of one graph have built.

    `wasted` counts those that served a single step although their sequence went on, in other
    tensors; `ended` has how many tokens there were when one was dropped behind its first step, be
    it that, or a conversation that was over. One that serves a second step makes up for one wasted.
    """

    def __init__(self) -> None:
        self.wasted = 0
        self.ended: deque[int] = deque(maxlen=64)

    def goes_on(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens had an index that was dropped; asked once for it."""
        if tokens not in self.ended:
            return False
        self.ended.remove(tokens)
        self.wasted += 1
        return True


class Build:
    """The indexes that one call built; `tokens` are in the first cache behind it."""

    def __init__(self, watch: Watch, tokens: int) -> None:
        self.watch = watch
        self.tokens = tokens
        self.used = False

    def use(self) -> None:
        """A later call was served."""
        if not self.used:
            self.used = True
            self.watch.wasted = max(0, self.watch.wasted - 1)

    def drop(self) -> None:
        """Nothing will use them any more."""
        if not self.used:
            self.used = True
            self.watch.ended.append(self.tokens)

    def __del__(self) -> None:
        self.drop()


@dataclass(eq=False)
class IndexRecord:
    """The index of one cache tensor: `tensors` mirror it while `stamp` is the tensor's stamp.

    `filled` tokens were there behind the last step. `fit` is the automatic basis, None where a
    stored one serves; `bound` what the rows were projected by. `witness` remembers some rows of a
    cache without a version counter.
    """

    tensors: list[Tensor]
    stamp: tuple[Any, ...] | None
    filled: int
    bound: BoundBasis
    layout: IndexLayout
    build: Build
    fit: Fit | None = None
    witness: Witness | None = None
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(tensor.nbytes for tensor in self.tensors)
        hold_bytes(self.bytes)

    def __del__(self) -> None:
        hold_bytes(-self.bytes)


@dataclass(frozen=True)
class GivenSize:
    """A size that each call brings as an argument."""

    argument: int

    def of(self, args: Sequence[Any]) -> int:
        return int(args[self.argument])


def token_count(graph: fx.Graph, site: AttentionSite) -> int | GivenSize:
    """The site's new tokens, or where each call brings their number."""
    if site.query_tokens > 0:
        return site.query_tokens
    place = input_of(graph, site.tokens)
    assert place is not None  # the plan has looked
    return GivenSize(place)


@dataclass(frozen=True)
class Cached:
    """One cache as one call brings it: everything below is looked up once.

    `past` holds its rows, `rest` those that continue them, if there are any; `holder` is the tensor
    that the caller keeps, `past` itself or one that it is a part of. `stored`: new tokens that the
    call stores; `queries`: what the rows meet, where that is known before any query.
    """

    past: Tensor
    rest: Tensor | None
    token_axis: int
    holder: Tensor
    stored: int = 0
    queries: Callable[[], Tensor | None] = lambda: None

    @cached_property
    def stamp(self) -> tuple[Any, ...]:
        """Equal while neither tensor is another, nor written; None last where that is not known."""
        if self.rest is None:
            return stamp_of(self.past)
        own, more = stamp_of(self.past), stamp_of(self.rest)
        return (*own[:-1], more, None if None in (own[-1], more[-1]) else own[-1])

    @property
    def slots(self) -> int:
        return self.past.shape[self.token_axis]

    @property
    def counts_writes(self) -> bool:
        """Whether its tensors have version counters."""
        return self.stamp[-1] is not None

    def narrow(self, start: int, length: int) -> Tensor:
        """So many whole rows; a copy where they lie in two tensors."""
        return self._both(lambda x: x.narrow(self.token_axis, start, length))

    def at(self, tokens: Tensor) -> Tensor:
        """The whole rows of these tokens (N,)."""
        return self._both(lambda x: x.index_select(self.token_axis, tokens))

    def every(self, rows: slice) -> list[Tensor]:
        """Views of these rows, of each tensor."""
        index = (*[slice(None)] * self.token_axis, rows)
        return [x[index] for x in (self.past, self.rest) if x is not None]

    def _both(self, take: Callable[[Tensor], Tensor]) -> Tensor:
        if self.rest is None:
            return take(self.past)
        return torch.cat((take(self.past), take(self.rest)), -1)


def stamp_of(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is another or is written; None last where nothing counts."""
    version = version_of(tensor)
    # `x.data = y` counts as no write, and a new storage may lie where one before it lay: while a
    # weak reference to that is held, the two are not taken for one.
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, tensor.data_ptr(), tensor.shape, tensor.stride(), version


@dataclass(eq=False)
class CacheBinding:
    """What the runtime knows of one cache of the plan.

    `argument` is the position of its past tensor among the graph's arguments; `beside` that of the
    tensor whose rows continue its rows, if there is one; `weights` the fingerprint of the weights
    that make its keys ("" if none was found), which come in at position `weight`; each call stores
    `new_tokens`. `latent` says how rows
    are expanded, if they are, by the weight at position `map` (None where the graph computes it),
    for `query_heads`. A set of bases need not hold one for such rows, which `calibrate` may not
    have seen: it is fitted then.
    `part` says where the past tensor was cut out, if it is a part of another one. `basis` is a
    stored one; None: each cache has its own. `layout` is None until the rank is known.
    """

    cache: KeyCache
    argument: int
    weights: str
    layer: str
    kv_heads: int
    head_dim: int
    new_tokens: int | GivenSize
    weight: int | None = None
    beside: int | None = None
    latent: Latent | None = None
    map: int | None = None
    part: Part | None = None
    query_heads: int = 0
    basis: Basis | None = None
    layout: IndexLayout | None = None

    def __post_init__(self) -> None:
        # What each call asks; a graph's node need not be asked again and again.
        self.grows = self.cache.grows
        self.rows_apart = self.cache.rows_apart

    def at(self, args: Sequence[Any]) -> Cached:
        """The cache, given the graph's arguments."""
        count = self.new_tokens
        return Cached(
            past=args[self.argument],
            rest=None if self.beside is None else args[self.beside],
            token_axis=self.cache.token_axis,
            holder=args[self.argument if self.part is None else self.part.holder],
            stored=count if isinstance(count, int) else count.of(args),
            queries=lambda: self._queries(args),
        )

    def left_by(self, outputs: Sequence[Any], before: Cached) -> Cached:
        """The cache as a step has left it behind."""
        if self.cache.output is None:
            return Cached(before.past, before.rest, before.token_axis, before.holder)
        tensor, rest = outputs[self.cache.output], None
        if self.cache.beside is not None:
            assert self.cache.beside.output is not None
            rest = outputs[self.cache.beside.output]
        return Cached(tensor, rest, before.token_axis, tensor)

    def _queries(self, args: Sequence[Any]) -> Tensor | None:
        """What the rows meet, where that is known before any query: see `unit_queries`."""
        if self.latent is None or self.map is None:
            return None
        weight = args[self.map].detach()
        return unit_queries(weight, *self.latent.absorption, self.query_heads)

    @property
    def kin(self) -> tuple[Any, ...]:
        """Equal for caches of a tensor that one automatic basis serves."""
        return self.kv_heads, self.head_dim, self.numbers

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells one index of a tensor from another: its basis, its layout, its part."""
        return self.basis, self.layout, self.kin

    @property
    def numbers(self) -> tuple[tuple[int, int], ...]:
        """Which part of its holder the cache is: () where it is all of it."""
        return self.part.numbers if self.part is not None else ()

    @property
    def item_bytes(self) -> int:
        """Bytes of one number in the cache."""
        return fake_value(self.cache.past).element_size()

    def rank(self, spec: int | float | str) -> int | None:
        """Dims of the index, or None where they depend on a basis that is not fitted yet."""
        if self.basis is not None:
            return self.basis.rank_for(spec)
        if isinstance(spec, str):
            return None if self.layout is None else self.layout.rank
        return spec if isinstance(spec, int) else max(1, math.ceil(round(spec * self.head_dim, 6)))

    def basis_name(self) -> str:
        """Where the basis comes from, for reports."""
        if self.basis is None:
            return "auto (fitted from the keys of each sequence)"
        return f"{self.basis.kind}, {self.basis.tokens} tokens"


def bind(basis: Basis, rank: int, device: torch.device) -> BoundBasis:
    """The basis' first `rank` columns on `device`, the same tensors at every call."""
    with _lock:
        held = _bound.setdefault(basis, {})
        key = (rank, device)
        if key not in held:
            query, key_side = basis.truncate(rank)
            held[key] = BoundBasis(query.to(device), key_side.to(device))
        return held[key]


@dataclass(frozen=True, eq=False)
class TensorIndex:
    """An index that a cache tensor has.

    `tensors` are rows like the tensor's, R dims wide (per head where heads are folded), and their
    fp32 scales where the rows are int8. `valid` says that they belong to the tensor as it is now,
    as far as versions tell. `basis` is what keys were projected by; `fitted`: whether it was fitted
    for this cache. The index may serve a part of it: `numbers`, () for the whole.
    """

    tensors: tuple[Tensor, ...]
    valid: bool
    basis: BoundBasis
    fitted: bool
    layout: IndexLayout
    numbers: tuple[tuple[int, int], ...]
    filled: int


def indexes_of(tensor: Tensor, beside: Tensor | None = None) -> list[TensorIndex]:
    """The indexes of a cache tensor, one for each basis, layout and part that it was read by.

    Args:
      tensor: what the caller keeps: the cache's keys, or what they are a part of.
      beside: the tensor whose rows continue those of `tensor` (cached latents), if there is one.
    """
    now = Cached(tensor, beside, 0, tensor).stamp
    with _lock:
        records = dict(_indexes.get(tensor, {}))
    found = []
    for (*_, (*_, numbers)), record in records.items():
        then = record.stamp
        valid = then == now
        if numbers and then is not None:  # the stamp of a view: same storage, same version
            valid = (then[0], then[-1]) == (now[0], now[-1])
        found.append(
            TensorIndex(
                tuple(record.tensors), valid, record.bound, record.fit is not None,
                record.layout, numbers, record.filled,
            )
        )  # fmt: skip
    return found


# --- whether an index still belongs to its cache


def find(binding: CacheBinding, cached: Cached) -> IndexRecord | None:
    """The index that was kept for a cache, whether or not it is still true.

    A binding that does not know its layout yet takes that of an index which another graph made.
    """
    with _lock:
        held: dict[Any, IndexRecord] = _indexes.get(cached.holder, {})
        if binding.layout is None:
            kin = (layout for basis, layout, kin in held if (basis, kin) == (None, binding.kin))
            binding.layout = next(kin, None)
        return held.get(binding.identity)


def take_highest_rank(binding: CacheBinding, cached: Cached) -> None:
    """Where a spectrum decides the rank, graphs that share a cache agree on the highest."""
    with _lock:
        layouts = [
            layout
            for basis, layout, kin in _indexes.get(cached.holder, {})
            if (basis, kin) == (None, binding.kin)
        ]
    now = binding.layout
    for layout in layouts:
        if now is None or (layout.dtype == now.dtype and layout.rank > now.rank):
            now = layout
    binding.layout = now


def is_true(binding: CacheBinding, cached: Cached, record: IndexRecord, filled: int) -> bool:
    """Whether an index mirrors its cache, as far as stamps and lengths tell (not `Witness`es).

    `filled` tokens will be there behind this step.
    """
    if record.stamp != cached.stamp:
        return False
    if cached.counts_writes or not binding.cache.writes or binding.cache.replaced:
        return True
    return filled == min(cached.slots, record.filled + cached.stored)


def is_outgrown(record: IndexRecord, cached: Cached, filled: int, least: int) -> bool:
    """Whether the index's automatic basis is to be fitted again; not below `least` tokens, where
    every key is read anyway."""
    if record.fit is None or filled < least:
        return False
    return tokens_before(cached, filled) >= FIT_AGAIN * record.fit.tokens


class Witness:
    """Some rows of caches that have no version counter, as a step has left them: of each the newest
    and WITNESS_ROWS evenly spread over the others, which move on from step to step.

    Rows of all caches are compared at once. On a CPU the answer is there at once; elsewhere waiting
    for it would stop the device at every step, so it is asked for at the next step, and a foreign
    write is noticed one step late.
    """

    def __init__(self, caches: Sequence[tuple[Cached, int]], turn: int) -> None:
        """caches: each with how many tokens it holds; turn: changes from step to step."""
        self.rows: list[tuple[slice, slice]] = []
        for cached, filled in caches:
            last = max(0, min(filled, cached.slots) - 1)
            step = max(1, last // WITNESS_ROWS)
            first = turn * 40503 % step  # of Knuth's multiplicative hash: no period of a text
            self.rows.append((slice(first, last, step), slice(last, last + 1)))
        self.held = self._gather([cached for cached, _ in caches])
        self.late: list[tuple[Tensor, Any]] = []

    def agrees(self, caches: Sequence[Cached], moved: Tensor | None = None) -> bool:
        """Whether the rows are what they were; where that is known later, whether nothing known by
        now speaks against it.

        moved (0-d, bool, on the device of the caches): something else that speaks against it.
        """
        now = self._gather(caches)
        if [x.shape for x in now] != [x.shape for x in self.held]:
            return False
        if caches[0].past.device.type == "cpu":
            return all(torch.equal(a, b) for a, b in zip(now, self.held, strict=True))
        differ = [(a != b).any() for a, b in zip(now, self.held, strict=True)]
        if moved is not None:
            differ.append(moved)
        self.late.append(_without_waiting(torch.stack(differ).any()))
        return True

    def was_wrong(self) -> bool:
        """Whether an answer that has come in since says that the rows had changed."""
        known = [answer for answer, event in self.late if event is None or event.query()]
        return any(bool(answer) for answer in known)

    def _gather(self, caches: Sequence[Cached]) -> list[Tensor]:
        """The rows as integers, those of one shape and dtype in one tensor."""
        alike: dict[Any, list[Tensor]] = {}
        for cached, rows in zip(caches, self.rows, strict=True):
            for piece in (piece for part in rows for piece in cached.every(part)):
                alike.setdefault((piece.shape, piece.dtype), []).append(piece)
        return [
            torch.stack(pieces).view(_INTEGERS[dtype.itemsize])
            for (_, dtype), pieces in alike.items()
        ]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _without_waiting(answer: Tensor) -> tuple[Tensor, Any]:
    """A copy of `answer` on the host, and the event behind which it holds."""
    host = torch.empty((), dtype=answer.dtype, pin_memory=True)
    host.copy_(answer, non_blocking=True)
    event = torch.Event(answer.device)
    event.record()
    return host, event


def agree_all(records: Sequence[tuple[IndexRecord, Cached]], moved: Tensor | None) -> bool:
    """Whether the rows that the records' witness remembers are as they were.

    Records that were not left behind by one call have no witness in common, and do not agree.
    moved: as in `Witness.agrees`.
    """
    witness = records[0][0].witness
    if witness is None or len(witness.rows) != len(records):
        return False
    if any(record.witness is not witness for record, _ in records):
        return False
    return witness.agrees([cached for _, cached in records], moved)


# --- building one


def build(
    binding: CacheBinding,
    cached: Cached,
    old: IndexRecord | None,
    made: Build,
    *,
    filled: int,
    rank: int | float | str,
    dtype: torch.dtype | None,
    seen: Callable[[], Tensor | None],
    tally: Tally,
) -> IndexRecord:
    """Projects all of a cache's keys, by a basis that is fitted from them where none is stored.

    Args:
      old: the index that the cache had, whose memory is used again.
      filled: tokens that will be there behind this step.
      rank: as in `LokiConfig`; what the spectrum asks for may raise the layout's rank.
      dtype: of the index; None: the cache's.
      seen: which tokens each sequence sees behind this step, bool (B, T); None: all.
    """
    if old is not None:
        old.stamp = None  # its memory is written over, and that may fail half way
    fit = None
    dtype = dtype or cached.past.dtype
    if binding.basis is None:
        fit = _basis_for(binding, cached, old, filled, seen, tally)
        # One graph serves caches whose spectra ask for different ranks: the most of them.
        least = 1 if binding.layout is None else binding.layout.rank
        dims = max(least, *(basis.rank_for(rank) for basis in fit.bases))
        layout = IndexLayout(dims, dtype, binding.rows_apart)
        bound = fit.bound(layout, cached.past.device)
    else:
        layout = IndexLayout(binding.basis.rank_for(rank), dtype)
        bound = bind(binding.basis, layout.rank, cached.past.device)
    binding.layout = layout
    tensors = _project(binding, cached, bound, layout, old)
    record = IndexRecord(tensors, cached.stamp, filled, bound, layout, made, fit)
    with _lock:
        held = _indexes.setdefault(cached.holder, {})
        if isinstance(rank, str):  # of lower rank than this one, and never looked for again
            for identity in [key for key in held if key[::2] == binding.identity[::2]]:
                if identity[1].dtype == layout.dtype:
                    del held[identity]
        held[binding.identity] = record
    tally.add("rebuilds")
    return record


def _project(
    binding: CacheBinding,
    cached: Cached,
    bound: BoundBasis,
    layout: IndexLayout,
    old: IndexRecord | None,
) -> list[Tensor]:
    """Index tensors for all slots of a cache; the old ones where they fit."""
    cache, past = binding.cache, cached.past
    dtypes = [layout.dtype, torch.float32][: layout.parts]
    each = binding.kv_heads if cache.heads_are_folded else 1
    shapes = [[*past.shape[:-1], width] for width in (each * layout.rank, each)][: layout.parts]
    again = old is not None and not cache.replaced
    if again and [list(x.shape) for x in old.tensors] == shapes and old.layout == layout:  # type: ignore[union-attr]
        tensors = old.tensors  # type: ignore[union-attr]
    else:
        tensors = [
            torch.empty(shape, dtype=dtype, device=past.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
    for start in range(0, cached.slots, REBUILD_TOKENS):
        length = min(REBUILD_TOKENS, cached.slots - start)
        rows = project_new_keys(
            cached.narrow(start, length),
            bound.key,
            cache.head_axis,
            layout.dtype,
            cache.batch_axis,
        )
        for tensor, new in zip(tensors, rows, strict=False):
            tensor.narrow(cached.token_axis, start, length).copy_(new)  # type: ignore[arg-type]
    return tensors


def tokens_before(cached: Cached, filled: int) -> int:
    """Tokens that a cache holds before the step behind which `filled` are there."""
    return min(filled - cached.stored, cached.slots)


def _basis_for(
    binding: CacheBinding,
    cached: Cached,
    old: IndexRecord | None,
    filled: int,
    seen: Callable[[], Tensor | None],
    tally: Tally,
) -> Fit:
    """The basis that was fitted from these very keys, if there is one, else one fitted now."""
    tokens = tokens_before(cached, filled)
    with _lock:
        origin = _fitted_from.get(cached.past.untyped_storage())
        known: Fit | None = None
        # A cache that counts no writes may have been filled with another prompt: if it still has an
        # index, rows are compared below.
        trusted = cached.counts_writes or old is None
        if origin is not None and trusted and origin[0] == version_of(cached.past):
            known = origin[1].get(_place(binding, cached))
    if known is None and old is not None and old.fit is not None:
        known = old.fit if _mirrors_still(binding, cached, old, tokens) else None
    if known is not None and tokens < FIT_AGAIN * known.tokens:
        return known
    bases = _fit(binding, cached, tokens, seen())
    tally.add("fitted_bases")
    return Fit(bases, tokens)


def _place(binding: CacheBinding, cached: Cached) -> tuple[Any, ...]:
    """Tells caches in one storage apart."""
    return *binding.kin, cached.past.storage_offset()


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written; None where nothing counts."""
    return None if tensor.is_inference() else tensor._version


def _mirrors_still(binding: CacheBinding, cached: Cached, old: IndexRecord, tokens: int) -> bool:
    """Whether most of the rows that the old index knew are in the cache as they were.

    Rows that were projected within a graph may have been rounded otherwise: they are compared in
    the units of the keys' own rounding, where those of another prompt are far apart.
    """
    last = min(tokens, old.filled, cached.slots) - 1
    if last < 0:
        return False
    picked = torch.linspace(0, last, SAMPLED_ROWS, device=cached.past.device).long()
    keys = cached.at(picked)
    axis, cache = cached.token_axis, binding.cache
    if old.layout.each_row and len(old.bound.key) != keys.shape[cache.batch_axis]:
        return False
    now = project_new_keys(keys, old.bound.key, cache.head_axis, torch.float32, cache.batch_axis)[0]
    held = [tensor.index_select(axis, picked).float() for tensor in old.tensors]
    if len(held) == 2 and binding.cache.heads_are_folded:
        now, held[0] = (x.unflatten(-1, (binding.kv_heads, -1)) for x in (now, held[0]))
        held[1] = held[1].unsqueeze(-1)
    before = math.prod(held[1:], start=held[0])
    error = (now - before).abs().amax(-1)
    near = (error <= 0.05 * now.abs().amax(-1)).float()
    if old.layout.each_row:  # no sequence keeps the basis of another that was in its place
        near = near.movedim(cache.batch_axis, 0).flatten(1).mean(1)
        return bool(near.min() >= SAME_SHARE)
    return bool(near.mean() >= SAME_SHARE)


def _fit(
    binding: CacheBinding, cached: Cached, tokens: int, seen: Tensor | None
) -> tuple[Basis, ...]:
    """PCA of the first `tokens` keys in a cache, for each sequence of those that it sees; the new
    keys are not in it yet. One for all sequences where these do not lie along a dimension.

    Rows that are expanded to keys are fitted for the scores of the queries that are known, which is
    PCA of what they expand to: dims of a row count as far as heads read them.
    """
    cache, device = binding.cache, cached.past.device
    if seen is not None:
        seen = seen[:, :tokens] if seen.shape[1] >= tokens else None
    if tokens > FIT_TOKENS:
        picked = torch.linspace(0, tokens - 1, FIT_TOKENS, device=device).long()
        keys = cached.at(picked)
        seen = None if seen is None else seen[:, picked]
    else:
        keys = cached.narrow(0, tokens)
    if cache.heads_are_folded:
        keys = keys.unflatten(-1, (binding.kv_heads, -1))
    if cache.batch_axis >= 0:
        heads = rows_and_heads_first(keys, cache.head_axis, cache.batch_axis).flatten(2, -2)
        seen = None if seen is None else seen.expand(len(heads), -1)
    else:
        heads = keys.unsqueeze(0) if cache.head_axis < 0 else keys.movedim(cache.head_axis, 0)
        heads = heads.reshape(1, heads.shape[0], -1, heads.shape[-1])
        seen = None
    queries = cached.queries()
    if queries is not None and queries.shape[2] > heads.shape[2]:  # no more queries than keys
        queries = queries.flatten(1, 2).unsqueeze(2)
    groups = [slice(row, row + 1) for row in range(len(heads))]
    if not binding.rows_apart:
        groups = [slice(None)]
    return tuple(
        _fit_rows(binding, heads[rows], None if seen is None else seen[rows], queries)
        for rows in groups
    )


def _fit_rows(
    binding: CacheBinding, keys: Tensor, seen: Tensor | None, queries: Tensor | None
) -> Basis:
    """The basis of keys (B, Hkv, N, D), those that are `seen` (B, N)."""
    moments = KeyCovariance(binding.kv_heads, binding.head_dim)
    if queries is None:
        moments.update(keys, None, seen)
    else:  # they are known once, and serve every sequence
        for row in range(len(keys)):
            asks = queries if row == 0 else None
            moments.update(keys[row : row + 1], asks, None if seen is None else seen[row : row + 1])
    if not moments.tokens:  # a sequence that sees nothing ranks nothing
        return _any_basis(binding)
    fitted = moments.pca if queries is None else moments.score_optimal
    return fitted(weights=binding.weights, layer=binding.layer)


def _any_basis(binding: CacheBinding) -> Basis:
    eye = torch.eye(binding.head_dim).expand(binding.kv_heads, -1, -1).contiguous()
    spectrum = torch.ones(binding.kv_heads, binding.head_dim)
    return Basis(eye, eye, spectrum, "pca", binding.weights, binding.layer, 0)


# --- behind a step


def adopt(
    binding: CacheBinding, left: Cached, tensors: list[Tensor], used: IndexRecord, filled: int
) -> IndexRecord:
    """Ties an index to the cache tensor that a step has left behind."""
    with _lock:
        if not binding.cache.replaced:
            used.stamp, used.filled = left.stamp, filled
            record = used
        else:
            record = IndexRecord(
                tensors, left.stamp, filled, used.bound, used.layout, used.build, used.fit
            )
            _indexes.setdefault(left.holder, {})[binding.identity] = record
        if record.fit is not None:
            storage = left.past.untyped_storage()
            _, fits = _fitted_from.get(storage, (None, {}))
            _fitted_from[storage] = (
                version_of(left.past),
                {**fits, _place(binding, left): record.fit},
            )
    return record


def remember_filled(left: Cached, filled: int) -> None:
    """How many of a cache's slots are filled, as long as nothing else writes it."""
    with _lock:
        _filled[left.holder] = (stamp_of(left.holder), filled)


def filled_before(cached: Cached) -> int | None:
    """What `remember_filled` said, if nothing has written the cache since."""
    with _lock:
        stamp, filled = _filled.get(cached.holder, (None, 0))
    return filled if stamp == stamp_of(cached.holder) else None


def forget(bindings: Iterable[CacheBinding], caches: Iterable[Cached]) -> None:
    """Gives back the memory of the indexes that these bindings would find for these caches."""
    with _lock:
        for binding, cached in zip(bindings, caches, strict=True):
            _indexes.get(cached.holder, {}).pop(binding.identity, None)


def forget_all(watch: Watch) -> None:
    """Gives back the memory of all indexes that calls of one graph have built."""
    with _lock:
        for held in list(_indexes.values()):
            for identity in [key for key, record in held.items() if record.build.watch is watch]:
                del held[identity]
