"""What is kept beside caches: low-rank indexes and page bounds, which belong to cache tensors.

They belong to tensors, not to graphs: recompilation, a second graph over the same cache, and
interleaved conversations all find theirs. They die with their caches.

Provenance. An index is valid for a cache tensor if that tensor is the very one that the sparse
variant last wrote: same storage, address, shape, strides and version counter. Anything else
rebuilds the index from the cache. (What PyTorch itself does not count escapes: a write through
`.data` or NumPy.) Tensors made under `torch.inference_mode` have no version counter; for them the
number of filled slots must continue where the last step ended, and some cached rows, the newest
among them, must be what they were behind that step, bit for bit (see `Witness`). An edit of a few
old keys between two steps can escape that, so edit caches under `torch.no_grad`. A stale index can
only misrank: attention itself always reads the cache's own keys and values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loki_compile import fits
from loki_compile.buffers import Buffer, all_buffers, buffer_of
from loki_compile.builds import Build, Watch
from loki_compile.caches import CacheBinding, Cached, CacheForm, tokens_before, version_of
from loki_compile.counts import Tally
from loki_compile.fits import BoundBasis, Fit
from loki_compile.index_record import IndexRecord
from loki_compile.kernels.fused import project_new_keys
from loki_compile.kernels.kept import IndexLayout, Layout, PageLayout, page_bounds
from loki_compile.pca_store.basis import AUTO
from loki_compile.trails import settle_all

# Tokens projected at a time when an index is rebuilt: bounds the fp32 copy of the keys.
REBUILD_TOKENS = 8192

_lock = threading.RLock()
_indexes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True, eq=False)
class TensorIndex:
    """What is kept beside a cache tensor.

    `tensors` are rows like the tensor's, R dims wide (per head where heads are folded), and their
    fp32 scales where the rows are int8; or bounds of pages (`PageLayout`). `valid` says that
    they belong to the tensor as it is now, as far as versions tell. `basis` is what keys were
    projected by; `fitted`: whether it was fitted for this cache. The index may serve a part of
    it: `numbers`, () for the whole.
    """

    tensors: tuple[Tensor, ...]
    valid: bool
    basis: BoundBasis | None
    fitted: bool
    layout: Layout
    numbers: tuple[tuple[int, int], ...]
    filled: int


def indexes_of(tensor: Tensor, beside: Tensor | None = None) -> list[TensorIndex]:
    """What is kept of a cache tensor, once for each basis, layout and part that it was read by.

    Args:
      tensor: what the caller keeps: the cache's keys, or what they are a part of.
      beside: the tensor whose rows continue those of `tensor` (cached latents), if there is one.
    """
    settle_all()
    now = Cached(tensor, beside, 0, tensor)
    buffer = buffer_of(tensor)
    if buffer is not None and buffer.kept:
        return [_in_place(record, now, buffer) for record in buffer.kept.values()]
    with _lock:
        records = dict(_indexes.get(tensor, {}))
    found = []
    for (*_, (*_, numbers)), record in records.items():
        valid = record.as_it_was
        if numbers:  # the stamp of a view: same storage, same version
            ((own, whole),) = zip(record.stamps[:1], now.stamps()[:1], strict=True)
            valid &= (own.storage, own.version) == (whole.storage, whole.version)
        else:
            valid &= now.is_as(record.stamps)
        found.append(
            TensorIndex(
                tuple(record.tensors), valid, record.bound, record.fit is not None,
                record.layout, numbers, record.filled,
            )
        )  # fmt: skip
    return found


def _in_place(record: IndexRecord, now: Cached, buffer: Buffer) -> TensorIndex:
    tokens = now.past.shape[buffer.axis]
    valid = record.as_it_was and record.filled >= tokens and now.versions() == record.versions
    return TensorIndex(
        tuple(record.rows_of(tokens)), valid, record.bound, record.fit is not None,
        record.layout, (), min(record.filled, tokens),
    )  # fmt: skip


# --- whether an index still belongs to its cache


def find(binding: CacheBinding, cached: Cached) -> IndexRecord | None:
    """The index that was kept for a cache, whether or not it is still true.

    A binding that does not know its layout yet takes that of an index which another graph made.
    """
    with _lock:
        held = _held(binding, cached)
        if binding.layout is None:
            binding.layout = next(_fitted_layouts(binding, held), None)
        return held.get(binding.identity)


def _held(binding: CacheBinding, cached: Cached) -> dict[Any, IndexRecord]:
    """What is kept of a cache, by what tells one index from another."""
    if not binding.form.in_place:
        held: dict[Any, IndexRecord] = _indexes.get(cached.base, {})
        return held
    memory = cached.before[0] if cached.before else None
    return {} if memory is None else memory.kept


def _fitted_layouts(binding: CacheBinding, held: Iterable[Any]) -> Iterator[IndexLayout]:
    for basis, layout, kin in held:
        if isinstance(layout, IndexLayout) and (basis, kin) == (None, binding.kin):
            yield layout


def take_highest_rank(binding: CacheBinding, cached: Cached) -> None:
    """Where a spectrum decides the rank, graphs that share a cache agree on the highest."""
    with _lock:
        layouts = list(_fitted_layouts(binding, _held(binding, cached)))
    now = binding.layout
    assert now is None or isinstance(now, IndexLayout)
    for layout in layouts:
        if now is None or (layout.dtype == now.dtype and layout.rank > now.rank):
            now = layout
    binding.layout = now


def is_true(binding: CacheBinding, cached: Cached, record: IndexRecord, filled: int) -> bool:
    """Whether an index mirrors its cache, as far as stamps and lengths tell (not `Witness`es).

    `filled` tokens will be there behind this step.
    """
    if binding.form.in_place:
        return (
            record.as_it_was
            and record.filled >= cached.slots
            and record.beside == cached.before[1:]
            and record.versions == cached.versions()
        )
    if not record.as_it_was or not cached.is_as(record.stamps):
        return False
    form = binding.form
    if not form.written or form.replaced or cached.counts_writes:
        return True
    return filled == min(cached.slots, record.filled + cached.stored)


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
    """Makes what is kept from all of a cache's keys; an index by a basis that is fitted from them
    where none is stored.

    Args:
      old: what the cache had, whose memory is used again.
      filled: tokens that will be there behind this step.
      rank: as in `LokiConfig`; what the spectrum asks for may raise the layout's rank.
      dtype: of an index; None: the cache's.
      seen: which tokens each sequence sees behind this step, bool (B, T); None: all.
    """
    form = binding.form
    if old is not None and not form.in_place:
        old.as_it_was = False  # its memory is written over, and that may fail half way
    fit = bound = None
    if isinstance(binding.layout, PageLayout):
        tensors = [_bounds(binding, cached, binding.layout, filled)]
    else:
        layout, bound, fit = _basis(binding, cached, old, filled, rank, dtype, seen, tally)
        binding.layout = layout
        tensors = _project(binding, cached, bound, layout, old)
    if form.in_place:
        page = binding.layout.page if isinstance(binding.layout, PageLayout) else 0
        record = IndexRecord(
            tensors, (), cached.slots, binding.layout, made, bound, fit,
            axis=2 if page else form.token_axis, every=page or 1,
        )  # fmt: skip
    else:
        record = IndexRecord(tensors, cached.stamps(), filled, binding.layout, made, bound, fit)
    _keep(binding, cached, record, by_spectrum=isinstance(rank, str) and rank != AUTO)
    tally.add("rebuilds")
    return record


def _keep(binding: CacheBinding, cached: Cached, record: IndexRecord, *, by_spectrum: bool) -> None:
    """Has a record found by its cache. `by_spectrum`: what the spectrum asks for sets its rank."""
    with _lock:
        in_place = binding.form.in_place
        held = cached.after[0].kept if in_place else _indexes.setdefault(cached.base, {})
        if by_spectrum and isinstance(binding.layout, IndexLayout):
            # Those of lower rank than this one, and never looked for again.
            for identity in [key for key in held if key[::2] == binding.identity[::2]]:
                other = identity[1]
                if isinstance(other, IndexLayout) and other.dtype == binding.layout.dtype:
                    del held[identity]
        held[binding.identity] = record


def _basis(
    binding: CacheBinding,
    cached: Cached,
    old: IndexRecord | None,
    filled: int,
    rank: int | float | str,
    dtype: torch.dtype | None,
    seen: Callable[[], Tensor | None],
    tally: Tally,
) -> tuple[IndexLayout, BoundBasis, Fit | None]:
    """What the keys of a cache are projected by, and the layout of the result."""
    dtype = dtype or cached.past.dtype
    if binding.basis is not None:
        layout = IndexLayout(binding.basis.rank_for(rank), dtype)
        return layout, fits.bind(binding.basis, layout.rank, cached.past.device), None
    fit = fits.basis_for(binding, cached, old, filled, seen, tally)
    # One graph serves caches whose spectra ask for different ranks: the most of them.
    least = binding.layout.rank if isinstance(binding.layout, IndexLayout) else 1
    dims = max(least, *(basis.rank_for(rank) for basis in fit.bases))
    layout = IndexLayout(dims, dtype, binding.form.batched)
    return layout, fit.bound(layout, cached.past.device), fit


def _bounds(binding: CacheBinding, cached: Cached, layout: PageLayout, filled: int) -> Tensor:
    """Of the pages of all slots; those that hold no token are 0.

    Slots that a shorter sequence has not filled count here as well: the step makes the page that it
    stores in anew, and no row sees those behind it.
    """
    form, tokens = binding.form, max(0, tokens_before(cached, filled))
    bounds = page_bounds(form.heads_first(cached.narrow(0, tokens), binding.kv_heads), layout.page)
    slots = cached.after[0].capacity if form.in_place else cached.slots
    pages = -(-slots // layout.page)
    if bounds.shape[2] < pages:
        missing = pages - bounds.shape[2]
        bounds = torch.nn.functional.pad(bounds, (0, 0, 0, missing))
    return bounds


def _project(
    binding: CacheBinding,
    cached: Cached,
    bound: BoundBasis,
    layout: IndexLayout,
    old: IndexRecord | None,
) -> list[Tensor]:
    """Index tensors for all slots of a cache; the old ones where they fit."""
    form, past = binding.form, cached.past
    dtypes = [layout.dtype, torch.float32][: layout.tensors]
    each = binding.kv_heads if form.folded else 1
    sizes = list(past.shape[:-1])
    if form.in_place:
        sizes[form.token_axis] = cached.after[0].capacity
    shapes = [[*sizes, width] for width in (each * layout.rank, each)][: layout.tensors]
    again = old is not None and not form.replaced
    if again and [list(x.shape) for x in old.tensors] == shapes and old.layout == layout:  # type: ignore[union-attr]
        tensors = old.tensors  # type: ignore[union-attr]
    else:
        tensors = [
            torch.empty(shape, dtype=dtype, device=past.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
    _project_into(tensors, form, cached, bound, layout.dtype, 0, cached.slots)
    return tensors


def project(
    binding: CacheBinding, cached: Cached, record: IndexRecord, first: int, end: int
) -> None:
    """Makes an index mirror the rows [first, end) of its cache."""
    assert record.bound is not None
    _project_into(
        record.tensors, binding.form, cached, record.bound, record.layout.dtype, first, end
    )


def _project_into(
    tensors: Sequence[Tensor],
    form: CacheForm,
    cached: Cached,
    bound: BoundBasis,
    dtype: torch.dtype,
    first: int,
    end: int,
) -> None:
    for start in range(first, end, REBUILD_TOKENS):
        length = min(REBUILD_TOKENS, end - start)
        keys = cached.narrow(start, length)
        rows = project_new_keys(keys, bound.key, form.head_axis, dtype, form.batch_axis)
        for tensor, new in zip(tensors, rows, strict=False):
            tensor.narrow(cached.token_axis, start, length).copy_(new)  # type: ignore[arg-type]


def carry_over(binding: CacheBinding, cached: Cached, record: IndexRecord) -> IndexRecord:
    """An index that is true, for the memory that its cache grows in: the same, or what it says of
    the cache's tokens, copied."""
    before, after = cached.before[0], cached.after[0]
    if before is after:
        return record
    record = record.moved(after.capacity, cached.slots)
    with _lock:
        after.kept[binding.identity] = record
    return record


# --- behind a step


def adopt(
    binding: CacheBinding, left: Cached, tensors: list[Tensor], used: IndexRecord, filled: int
) -> IndexRecord:
    """Ties an index to the cache tensor that a step has left behind."""
    if binding.form.in_place:
        used.filled = filled
        used.versions = left.versions()
        used.beside = left.before[1:]
        if used.fit is not None:
            if used.origin is None:
                used.origin = fits.remember(binding, left, used.fit)
            used.origin.version = used.versions[0]
        used.as_it_was = True
        return used
    if not binding.form.replaced:
        used.filled = filled
        for stamp, tensor in zip(used.stamps, (left.past, left.k_pe), strict=False):
            assert tensor is not None
            stamp.version = version_of(tensor)
        if used.fit is not None:
            if used.origin is None:
                used.origin = fits.remember(binding, left, used.fit)
            used.origin.version = used.stamps[0].version
        used.as_it_was = True
        return used
    record = IndexRecord(
        tensors, left.stamps(), filled, used.layout, used.build, used.bound, used.fit
    )
    if record.fit is not None:
        fits.remember(binding, left, record.fit)
    with _lock:
        held = _indexes.get(left.base)
        if held is None:
            _indexes[left.base] = {binding.identity: record}
        else:
            held[binding.identity] = record
    return record


def forget(bindings: Iterable[CacheBinding], caches: Iterable[Cached]) -> None:
    """Gives back the memory of the indexes that these bindings would find for these caches."""
    with _lock:
        for binding, cached in zip(bindings, caches, strict=True):
            _held(binding, cached).pop(binding.identity, None)


def forget_all(watch: Watch) -> None:
    """Gives back the memory of all indexes that calls of one graph have built."""
    with _lock:
        for held in [*_indexes.values(), *(buffer.kept for buffer in all_buffers())]:
            for identity in [key for key, record in held.items() if record.build.watch is watch]:
                del held[identity]
