"""What runs at each call: checks that indexes still belong to their caches, picks the variant.

A `DecodeGraph` stands where Dynamo expects the compiled function. It owns two variants of one
graph, each compiled when it is first needed: the dense one, and the sparse one whose extra inputs
are the key indexes and bases. Indexes belong to cache tensors, not to graphs: recompilation, a
second graph over the same cache, and interleaved conversations all find theirs.

Provenance. An index is valid for a cache tensor if that tensor is the very one that the sparse
variant last wrote: same storage, address, shape, strides and version counter. Anything else
rebuilds the index from the cache. (What PyTorch itself does not count escapes: a write through
`.data` or NumPy.) Tensors made under `torch.inference_mode` have no version counter; for them the
number of filled slots must continue where the last step ended, and a sample of rows is compared
with its projection at every step (an edit of a few old keys between two steps can escape that, so
edit caches under `torch.no_grad`). A stale index can only misrank: attention itself always reads
the cache's own keys and values.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from loki_compile.config import LokiConfig
from loki_compile.passes.cache_writes import KeyCache
from loki_compile.passes.fx_tools import copy_of, extract, fake_value, input_of
from loki_compile.passes.parts import Part, with_parts
from loki_compile.passes.plan import Plan
from loki_compile.passes.rewrite import (
    IndexLayout,
    pack_groups,
    project_new_keys,
    rewrite_sparse,
    unit_queries,
)
from loki_compile.passes.sites import MAX_QUERY_TOKENS, AttentionSite, Latent
from loki_compile.passes.undo import what_to_save
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.covariance import KeyCovariance

log = logging.getLogger("loki_compile")

# Tokens projected at a time when an index is rebuilt: bounds the fp32 copy of the keys.
REBUILD_TOKENS = 8192
# Keys that an automatic basis is fitted from, evenly spread: PCA of D dims needs no more.
FIT_TOKENS = 16384
# Rows compared per step where a cache tensor has no version counter.
SPOT_ROWS = 16
# A cache that is a new tensor at every step (beam search) is rebuilt at every step. After this
# many rebuilds in a row dense is tried for the steps that follow, since a rebuild reads all keys.
MAX_REBUILDS_IN_A_ROW = 8
DENSE_STEPS_AFTER = 64
# What a step may save of tensors that it does not only append to (windows that move, recurrent
# states): so many bytes in the first sparse step of a graph, which is where most breaks; in each
# one behind it so few, or one part in so many of all that the graph is given.
SAVED_BYTES = 1 << 30
SAVED_EACH_STEP = 1 << 18
SAVED_PART = 128

_stats: Counter[str] = Counter()


def stats() -> dict[str, int]:
    """Counts since import or `reset_stats`, as in `torch._dynamo.utils.counters["loki"]`.

    sparse_steps, dense_steps: calls of rewritten graphs by variant; rebuilds: indexes projected
    anew from a cache; fitted_bases: bases fitted because none was stored; index_bytes: memory of
    the indexes alive now.
    """
    names = ("sparse_steps", "dense_steps", "rebuilds", "fitted_bases")
    return {**{name: _stats[name] for name in names}, "index_bytes": index_bytes()}


def reset_stats() -> None:
    """Sets the counts of `stats` back to zero; indexes and bases stay."""
    _stats.clear()
    counters["loki"].clear()


def index_bytes() -> int:
    """Bytes of all key indexes that are alive."""
    with _lock:
        records = [record for held in _indexes.values() for record in held.values()]
    return sum(part.nbytes for record in records for part in record.parts)


@dataclass(frozen=True, eq=False)
class TensorIndex:
    """An index that a cache tensor has.

    `tensors` are rows like the tensor's, R dims wide (per head where heads are folded), and their
    fp32 scales where the rows are int8. `valid` says that they belong to the tensor as it is now,
    as far as versions tell. The index may serve a part of it: `numbers`, () for the whole.
    """

    tensors: tuple[Tensor, ...]
    valid: bool
    basis: BoundBasis
    layout: IndexLayout
    numbers: tuple[tuple[int, int], ...]
    filled: int


def indexes_of(tensor: Tensor, beside: Tensor | None = None) -> list[TensorIndex]:
    """The indexes of a cache tensor, one for each basis, layout and part that it was read by.

    Args:
      tensor: what the caller keeps: the cache's keys, or what they are a part of.
      beside: the tensor whose rows continue those of `tensor` (cached latents), if there is one.
    """
    now = Rows(tensor, beside, 0, tensor).stamp
    found = []
    with _lock:
        for (basis, layout, numbers), record in _indexes.get(tensor, {}).items():
            then = record.stamp
            if numbers and then is not None:  # the stamp of a view: same storage, same version
                valid = (then[0], then[-1]) == (now[0], now[-1])
            else:
                valid = then == now
            parts = tuple(record.parts)
            found.append(TensorIndex(parts, valid, basis, layout, numbers, record.filled))
    return found


def forget_bases() -> None:
    """Drops the bases that were fitted in this process; graphs that took one keep it."""
    with _lock:
        _fitted.clear()
        _fitted_here.clear()


def _count(name: str, amount: int = 1) -> None:
    with _lock:
        _stats[name] += amount
        counters["loki"][name] += amount


@dataclass(frozen=True, eq=False)
class BoundBasis:
    """A basis cut to a rank, on a device: what graphs take as input. Each (Hkv, D, R) fp32."""

    query: Tensor
    key: Tensor


@dataclass
class IndexRecord:
    """The index of one cache tensor: `parts` mirror it while `stamp` is the tensor's stamp."""

    parts: list[Tensor]
    stamp: tuple[Any, ...] | None
    filled: int


_lock = threading.RLock()
_indexes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_filled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_bound: weakref.WeakKeyDictionary[Basis, dict[Any, BoundBasis]] = weakref.WeakKeyDictionary()
_fitted: dict[tuple[Any, ...], Basis] = {}
_fitted_here: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    # `x.data = y` counts as no write, and a new storage may lie where one before it lay: while a
    # weak reference to that is held, the two are not taken for one.
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, tensor.data_ptr(), tensor.shape, tensor.stride(), version


def bind(basis: Basis, rank: int, device: torch.device) -> BoundBasis:
    """The basis' first `rank` columns on `device`, the same tensors at every call."""
    with _lock:
        held = _bound.setdefault(basis, {})
        key = (rank, device)
        if key not in held:
            query, key_side = basis.truncate(rank)
            held[key] = BoundBasis(query.to(device), key_side.to(device))
        return held[key]


@dataclass(frozen=True)
class Rows:
    """The rows of a cache: a tensor, and another whose rows continue those, if there is one.

    `holder` is the tensor that the caller keeps: `past` itself, or one that it is a part of.
    """

    past: Tensor
    rest: Tensor | None
    token_axis: int
    holder: Tensor

    @property
    def stamp(self) -> tuple[Any, ...]:
        """Equal while neither tensor is another, nor written; None last where that is not known."""
        if self.rest is None:
            return _stamp(self.past)
        own, more = _stamp(self.past), _stamp(self.rest)
        return (*own[:-1], more, None if None in (own[-1], more[-1]) else own[-1])

    def narrow(self, start: int, length: int) -> Tensor:
        """So many whole rows; a copy where they lie in two tensors."""
        return self._both(lambda x: x.narrow(self.token_axis, start, length))

    def at(self, tokens: Tensor) -> Tensor:
        """The whole rows of these tokens (N,)."""
        return self._both(lambda x: x.index_select(self.token_axis, tokens))

    def _both(self, take: Callable[[Tensor], Tensor]) -> Tensor:
        if self.rest is None:
            return take(self.past)
        return torch.cat((take(self.past), take(self.rest)), -1)


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


@dataclass
class CacheBinding:
    """What the runtime knows of one cache of the plan.

    `argument` is the position of its past tensor among the graph's arguments; `beside` that of the
    tensor whose rows continue its rows, if there is one; `weights` the fingerprint of the weights
    that make its keys ("" if none was found); each call stores `new_tokens`. `latent` says how rows
    are expanded, if they are, by the weight at position `map` (None where the graph computes it),
    for `query_heads`. A set of bases need not hold one for such rows, which `calibrate` may not
    have seen: it is fitted then.
    `part` says where the past tensor was cut out, if it is a part of another one.
    """

    cache: KeyCache
    argument: int
    weights: str
    layer: str
    kv_heads: int
    head_dim: int
    new_tokens: int | GivenSize
    beside: int | None = None
    latent: Latent | None = None
    map: int | None = None
    part: Part | None = None
    query_heads: int = 0
    basis: Basis | None = None
    bound: BoundBasis | None = None
    layout: IndexLayout | None = None

    def holder(self, args: Sequence[Any]) -> Tensor:
        """The tensor that the caller keeps: the cache's, or the one that it is a part of."""
        holder: Tensor = args[self.argument if self.part is None else self.part.holder]
        return holder

    def stored(self, args: Sequence[Any]) -> int:
        """New tokens that this call stores."""
        count = self.new_tokens
        return count if isinstance(count, int) else count.of(args)

    def rows(self, args: Sequence[Any]) -> Rows:
        """What the cache holds, given the graph's arguments."""
        rest = None if self.beside is None else args[self.beside]
        return Rows(args[self.argument], rest, self.cache.token_axis, self.holder(args))

    def queries(self, args: Sequence[Any]) -> Tensor | None:
        """What the rows meet, where that is known before any query: see `unit_queries`."""
        if self.latent is None or self.map is None:
            return None
        return unit_queries(args[self.map].detach(), self.latent, self.query_heads)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells one index of a tensor from another: its basis, its layout, its part."""
        return self.bound, self.layout, self.numbers

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
            return None
        return spec if isinstance(spec, int) else max(1, math.ceil(round(spec * self.head_dim, 6)))

    def basis_name(self) -> str:
        """Where the basis comes from, for reports."""
        if self.basis is None:
            return "auto (fitted from the first long prompt)"
        return f"{self.basis.kind}, {self.basis.tokens} tokens"


# One compiled form of the graph, made at first use.
Variant = Callable[..., Any]


class DecodeGraph:
    """The compiled function of a graph with at least one sparse site."""

    def __init__(
        self,
        gm: fx.GraphModule,
        plan: Plan,
        config: LokiConfig,
        bindings: list[CacheBinding],
        parts: Sequence[Part],
        compile_graph: Callable[[fx.GraphModule], Variant],
    ) -> None:
        self.gm = gm
        self.plan = plan
        self.config = config
        self.bindings = bindings
        self.parts = parts
        self.compile_graph = compile_graph
        counts = {token_count(gm.graph, sparse.site) for sparse in plan.sparse}
        self.token_counts = [count for count in counts if not isinstance(count, int)]
        self.outputs = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.undo = what_to_save(gm.graph)
        self.fill_graph = _fill_graph(gm, bindings)
        self.dense: Variant | None = None
        self.sparse: Variant | None = None
        self.sparse_failure: str | None = None
        self.sparse_ran = False
        self.given_bytes = 0
        self.rebuilds_in_a_row = 0
        self.dense_steps_left = 0
        self.building = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        args = with_parts(args, self.parts)
        visible = self.visible_keys(args)
        few = all(count.of(args) <= MAX_QUERY_TOKENS for count in self.token_counts)
        if few and self.wants_sparse(visible) and self.prepare_sparse(args, visible):
            assert self.sparse is not None
            return self.run_sparse(self.sparse, args, visible)
        return self.run_dense(args, visible)

    def wants_sparse(self, visible: int) -> bool:
        """The one decision: sparse from `min_context` visible keys on, unless it would read all.

        `min_context=0` forces the sparse variant at every length, also where the budget covers all.
        """
        if self.sparse_failure is not None:
            return False
        if self.config.min_context == 0:
            return True
        if visible < self.config.min_context or self.config.budget.covers(visible):
            return False
        if self.dense_steps_left:
            self.dense_steps_left -= 1
            return False
        return True

    def visible_keys(self, args: Sequence[Any]) -> int:
        """Filled slots after this step, the most of any cache; no device sync in steady state."""
        return max(self._filled_after(binding, args) for binding in self.bindings)

    def _filled_after(self, binding: CacheBinding, args: Sequence[Any]) -> int:
        cache, holder = binding.cache, binding.holder(args)
        slots = args[binding.argument].shape[cache.token_axis]
        if cache.grows:
            return slots + binding.stored(args)
        # Counting costs nothing; reading the position costs a sync where it lies on a device.
        stamp, filled = _filled.get(holder, (None, 0))
        on_device = holder.device.type != "cpu"
        counted = on_device and not holder.is_inference() and stamp == _stamp(holder)
        if counted:
            return min(slots, filled + binding.stored(args))
        if self.fill_graph is None:
            return slots
        if binding is not self.fill_graph.binding:
            return 0
        filled = self.fill_graph.read(args)
        return min(slots, filled) if filled > 0 else slots  # positions counted from the end

    def prepare_sparse(self, args: Sequence[Any], visible: int) -> bool:
        """Builds the sparse variant at its first use. False: stay dense."""
        # Bases outlive a call: a tensor made under inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            return self.build_sparse(args, visible)

    def build_sparse(self, args: Sequence[Any], visible: int) -> bool:
        """Bases, layouts and the compiled sparse variant, at its first use. False: stay dense."""
        if self.sparse is not None:
            return True
        for binding in self.bindings:
            if binding.basis is None and _cached(binding, args, visible) < 1:
                return False  # nothing to fit a basis from yet
        with self.building:
            if self.sparse is not None:
                return True
            if self.sparse_failure is not None:
                return False
            try:
                for binding in self.bindings:
                    self._bind(binding, args, visible)
                layouts = [b.layout for b in self.bindings if b.layout is not None]
                gm, mapping = copy_of(self.gm)
                plan = self.plan.on(mapping)
                sparse_sites = {s.site.node for s in plan.sparse}
                gm = rewrite_sparse(gm, plan, layouts)
                if self.config.pack_gqa:
                    left = [site for site in plan.sites if site.node not in sparse_sites]
                    gm = pack_groups(gm, left)
                self.sparse = self.compile_graph(gm)
            except Exception as error:
                if self.config.strict:
                    raise
                self.give_up("the sparse variant could not be built", error)
                return False
        return True

    def give_up(self, what: str, error: Exception) -> None:
        """Dense from now on, which is said once."""
        if self.sparse_failure is not None:
            return
        self.sparse_failure = f"{type(error).__name__}: {error}"
        log.warning(
            "%s and decoding stays dense: %s. Set strict=True to raise instead.",
            what,
            self.sparse_failure,
            exc_info=log.isEnabledFor(logging.DEBUG),
        )

    def _bind(self, binding: CacheBinding, args: Sequence[Any], visible: int) -> None:
        rows = binding.rows(args)
        if binding.basis is None:
            binding.basis = _fit(
                binding, rows, binding.queries(args), _cached(binding, args, visible)
            )
        rank = binding.basis.rank_for(self.config.rank)
        binding.bound = bind(binding.basis, rank, rows.past.device)
        dtype = torch.int8 if self.config.index_dtype == "int8" else rows.past.dtype
        binding.layout = IndexLayout(rank, dtype)

    def run_dense(self, args: Sequence[Any], visible: int) -> Any:
        if self.dense is None:
            with self.building:
                if self.dense is None:
                    self.dense = self.compile_graph(self._dense_graph())
        outputs = self.dense(*args)
        _count("dense_steps")
        self._remember_filled(args, outputs, visible)
        return outputs

    def _dense_graph(self) -> fx.GraphModule:
        gm, mapping = copy_of(self.gm)
        if self.config.pack_gqa:
            gm = pack_groups(gm, self.plan.on(mapping).sites)
        return gm

    def run_sparse(self, variant: Variant, args: Sequence[Any], visible: int) -> Any:
        records, rebuilt = [], 0
        most = max(_slots_after(binding, args) for binding in self.bindings)
        whole = self._saves_all(args)
        places = self.undo.small + self.undo.large if whole else self.undo.small
        try:
            with torch.inference_mode(False), torch.no_grad():
                saved = Saved([args[place] for place in places])
                for binding in self.bindings:
                    record, fresh = self._index(binding, args, visible, most)
                    records.append(record)
                    rebuilt += fresh
        except Exception as error:  # out of memory, most likely; nothing is written yet
            if self.config.strict:
                raise
            self.give_up("a key index could not be built", error)
            return self.run_dense(args, visible)
        self._watch_rebuilds(rebuilt)
        extra: list[Tensor] = []
        for binding, record in zip(self.bindings, records, strict=True):
            assert binding.bound is not None
            extra += [*record.parts, binding.bound.key, binding.bound.query]
            if not binding.cache.replaced:
                record.stamp = None  # until the step has ended well
        try:
            outputs = list(variant(*args, *extra))
        except Exception as error:
            if not whole:
                raise  # what the first attempt has written cannot be taken back
            saved.put_back()
            if self.config.strict:
                raise
            try:
                outputs = self.run_dense(args, visible)
            except Exception:
                saved.put_back()  # the step can be taken again
                raise
            self.give_up("the sparse variant failed", error)
            return outputs
        self.sparse_ran = True
        try:
            self._adopt(args, outputs, records, visible)
        except Exception as error:  # out of memory: the step is right, its index is built anew
            if not self.config.strict:
                self.give_up("a key index could not be kept", error)
        _count("sparse_steps")
        del outputs[self.outputs :]
        return outputs

    def _saves_all(self, args: Sequence[Any]) -> bool:
        """Whether all that a second run of this step would notice is saved before the first.

        Most of what can break breaks in the first run of a variant. Behind it no step pays much for
        copies of windows.
        """
        large = sum(args[place].nbytes for place in self.undo.large)
        if large <= SAVED_EACH_STEP:
            return True
        if not self.sparse_ran:
            return large <= SAVED_BYTES
        if not self.given_bytes:
            self.given_bytes = sum(arg.nbytes for arg in args if isinstance(arg, Tensor))
        return large * SAVED_PART <= self.given_bytes

    def _adopt(
        self,
        args: Sequence[Any],
        outputs: Sequence[Any],
        records: Sequence[IndexRecord],
        visible: int,
    ) -> None:
        """Ties each index to the cache tensor that the step has left behind."""
        place = self.outputs
        with _lock:
            for binding, record in zip(self.bindings, records, strict=True):
                cache = binding.cache
                if cache.output is None:
                    record.stamp, record.filled = binding.rows(args).stamp, visible
                    continue
                assert binding.layout is not None
                tensor, rest = outputs[cache.output], None
                if cache.beside is not None:
                    assert cache.beside.output is not None
                    rest = outputs[cache.beside.output]
                # A full window's index is what is left of a longer one: rows apart in memory, where
                # the compiled graph takes them to be next to each other.
                parts = [p.contiguous() for p in outputs[place : place + binding.layout.parts]]
                place += binding.layout.parts
                held = _indexes.setdefault(tensor, {})
                stamp = Rows(tensor, rest, cache.token_axis, tensor).stamp
                held[binding.identity] = IndexRecord(parts, stamp, visible)
        self._remember_filled(args, outputs, visible)

    def _remember_filled(self, args: Sequence[Any], outputs: Sequence[Any], visible: int) -> None:
        with _lock:
            for binding in self.bindings:
                cache = binding.cache
                if not cache.grows:
                    tensor = binding.holder(args)
                    if cache.output is not None:
                        tensor = outputs[cache.output]
                    _filled[tensor] = (_stamp(tensor), visible)

    def _index(
        self, binding: CacheBinding, args: Sequence[Any], visible: int, most: int
    ) -> tuple[IndexRecord, bool]:
        """The cache's index, and whether it had to be built from the cache.

        `most` is what `visible` can be at these sizes: windows are full before other caches are.
        """
        rows = binding.rows(args)
        with _lock:
            record = _indexes.get(rows.holder, {}).get(binding.identity)
        if record is not None:
            follows = visible == min(most, record.filled + binding.stored(args))
            if self._belongs(binding, record, rows, follows):
                return record, False
            record.stamp = None  # its memory is written over, and that may fail half way
        record = IndexRecord(self._project(binding, rows, record), rows.stamp, visible)
        with _lock:
            _indexes.setdefault(rows.holder, {})[binding.identity] = record
        _count("rebuilds")
        return record, True

    def _belongs(
        self, binding: CacheBinding, record: IndexRecord, rows: Rows, follows: bool
    ) -> bool:
        stamp = rows.stamp
        if record.stamp != stamp:
            return False
        if stamp[-1] is not None:
            return True
        if binding.cache.writes and not binding.cache.replaced and not follows:
            return False
        return self._spot_check(binding, record, rows)

    def _spot_check(self, binding: CacheBinding, record: IndexRecord, rows: Rows) -> bool:
        """Whether a sample of cached keys, evenly spread and the newest, projects onto its rows."""
        cache, bound, layout = binding.cache, binding.bound, binding.layout
        assert bound is not None and layout is not None
        last = max(0, min(record.filled, rows.past.shape[cache.token_axis]) - 1)
        picked = torch.linspace(0, last, SPOT_ROWS, device=rows.past.device).long()
        now = project_new_keys(rows.at(picked), bound.key, cache.head_axis, layout.dtype)
        held = [part.index_select(cache.token_axis, picked) for part in record.parts]
        return all(
            torch.allclose(a.float(), b.float(), rtol=2e-2, atol=1e-3, equal_nan=True)
            for a, b in zip(now[: layout.parts], held, strict=True)
            if a is not None
        )

    def _project(
        self, binding: CacheBinding, cached: Rows, old: IndexRecord | None
    ) -> list[Tensor]:
        """Index parts of all slots of a cache tensor; reuses an old index's memory."""
        cache, past, bound, layout = binding.cache, cached.past, binding.bound, binding.layout
        assert bound is not None and layout is not None
        shape = list(past.shape)
        dtypes = [layout.dtype, torch.float32][: layout.parts]
        each = binding.kv_heads if cache.heads_are_folded else 1
        widths = [each * layout.rank, each]
        if old is not None and not cache.replaced and old.parts[0].shape[:-1] == past.shape[:-1]:
            parts = old.parts
        else:
            parts = [
                torch.empty([*shape[:-1], width], dtype=dtype, device=past.device)
                for width, dtype in zip(widths, dtypes, strict=False)
            ]
        axis, slots = cache.token_axis, past.shape[cache.token_axis]
        for start in range(0, slots, REBUILD_TOKENS):
            length = min(REBUILD_TOKENS, slots - start)
            rows = project_new_keys(
                cached.narrow(start, length), bound.key, cache.head_axis, layout.dtype
            )
            for part, new in zip(parts, rows, strict=False):
                part.narrow(axis, start, length).copy_(new)  # type: ignore[arg-type]
        return parts

    def _watch_rebuilds(self, rebuilt: int) -> None:
        if rebuilt < len(self.bindings):
            self.rebuilds_in_a_row = 0
            return
        self.rebuilds_in_a_row += 1
        if self.rebuilds_in_a_row == MAX_REBUILDS_IN_A_ROW and self.config.min_context:
            self.rebuilds_in_a_row, self.dense_steps_left = 0, DENSE_STEPS_AFTER
            log.info(
                "every cache was a new tensor for %d steps: dense for the next %d",
                MAX_REBUILDS_IN_A_ROW,
                DENSE_STEPS_AFTER,
            )


class Saved:
    """What tensors hold now, to be put back. Those of one dtype and device are saved in one piece:
    the counters of all layers take one kernel at each step, not one each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        groups: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self.groups = [
            (group, torch.cat([tensor.reshape(-1) for tensor in group]))
            for group in groups.values()
        ]

    def put_back(self) -> None:
        with torch.inference_mode():  # the one mode in which every tensor may be written
            for group, before in self.groups:
                parts = before.split([tensor.numel() for tensor in group])
                for tensor, part in zip(group, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))


@dataclass
class FillGraph:
    """Computes, outside the compiled graph, how far one cache will be filled in its slots."""

    gm: fx.GraphModule
    binding: CacheBinding
    plus: list[int]

    def read(self, args: Sequence[Any]) -> int:
        with torch.no_grad():
            values = self.gm(*args)
        ends = [int(v.max()) if isinstance(v, Tensor) else int(v) for v in values]
        return max(end + plus for end, plus in zip(ends, self.plus, strict=True))


def _fill_graph(gm: fx.GraphModule, bindings: Sequence[CacheBinding]) -> FillGraph | None:
    """For the first cache with slots whose writes say where they go: layers advance together."""
    for binding in bindings:
        writes = [write for write in binding.cache.writes if write.fill is not None]
        fills = [write.fill for write in writes if write.fill is not None]
        if binding.cache.grows or not fills:
            continue
        graph = extract(gm, [what for what, _ in fills], [write.node for write in writes])
        if graph is not None:
            return FillGraph(graph, binding, [plus for _, plus in fills])
    return None


def _slots_after(binding: CacheBinding, args: Sequence[Any]) -> int:
    """Slots that a cache has after this step."""
    slots = args[binding.argument].shape[binding.cache.token_axis]
    return slots + binding.stored(args) if binding.cache.grows else slots


def _cached(binding: CacheBinding, args: Sequence[Any], visible: int) -> int:
    """Keys that a cache holds before the step after which `visible` are there."""
    slots = args[binding.argument].shape[binding.cache.token_axis]
    return min(visible - binding.stored(args), slots)


def _fit(binding: CacheBinding, rows: Rows, queries: Tensor | None, filled: int) -> Basis:
    """PCA of the `filled` keys in a cache, once per set of weights; the new keys are not in it yet.

    Where no weights of the graph make the keys (cross-attention), once per cache tensor. Rows that
    are expanded to keys are fitted for the scores of `queries`, which is PCA of what they expand
    to: dims of a row count as far as heads read them.
    """
    identity = (binding.weights, binding.kv_heads, binding.head_dim)
    past = rows.past
    with _lock:
        here = {} if binding.weights else _fitted_here.setdefault(rows.holder, {})
        known = _fitted.get(identity) if binding.weights else here.get(binding.numbers)
    if known is not None:
        return known
    cache = binding.cache
    if filled > FIT_TOKENS:
        keys = rows.at(torch.linspace(0, filled - 1, FIT_TOKENS, device=past.device).long())
    else:
        keys = rows.narrow(0, filled)
    if cache.heads_are_folded:
        keys = keys.unflatten(-1, (binding.kv_heads, -1))
    heads = keys.unsqueeze(0) if cache.head_axis < 0 else keys.movedim(cache.head_axis, 0)
    flat = heads.reshape(1, heads.shape[0], -1, heads.shape[-1])
    moments = KeyCovariance(binding.kv_heads, binding.head_dim)
    if queries is not None and queries.shape[2] > flat.shape[2]:  # no more queries than keys
        queries = queries.flatten(1, 2).unsqueeze(2)
    moments.update(flat, queries)
    fitted = moments.pca if queries is None else moments.score_optimal
    basis = fitted(weights=binding.weights, layer=binding.layer)
    _count("fitted_bases")
    with _lock:
        if binding.weights:
            return _fitted.setdefault(identity, basis)
        return here.setdefault(binding.numbers, basis)
