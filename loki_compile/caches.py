"""Caches as calls bring them: what the runtime knows of each, and each one in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from loki_compile.kernels.fused import keys_by_head
from loki_compile.kernels.kept import IndexLayout, Keeps, Layout
from loki_compile.passes.shared_caches import Part
from loki_compile.pca_store.basis import AUTO, AUTO_SHARE, Basis, dims_of

if TYPE_CHECKING:
    from loki_compile.buffers import Buffer, Grown


@dataclass(frozen=True)
class GivenSize:
    """A size that each call brings as an argument."""

    argument: int

    def of(self, args: Sequence[Any]) -> int:
        return int(args[self.argument])


@dataclass(frozen=True)
class CacheForm:
    """How a cache lies in memory, and how each step changes it.

    `token_axis`, `head_axis` and `batch_axis` are its dimensions (-1: none such); head_dim is last,
    or heads and head_dim in one, where `folded`. `batched`: sequences lie along `batch_axis`,
    and there may be several. `replaced`: each step returns a new tensor, at `output`, and at
    `k_pe_output` the one whose rows continue its rows; it `grows` if that is longer. `written`:
    steps store into it. `in_place`: it grows in its memory (see `buffers`). `item_bytes`: of one
    number.
    """

    token_axis: int
    head_axis: int
    batch_axis: int
    folded: bool
    batched: bool
    grows: bool
    written: bool
    item_bytes: int
    output: int | None = None
    k_pe_output: int | None = None
    in_place: bool = False

    @property
    def replaced(self) -> bool:
        return self.output is not None

    def heads_first(self, keys: Tensor, kv_heads: int) -> Tensor:
        """Rows of the cache as (B, Hkv, N, D); B is 1 where no dimension of sequences is seen."""
        if self.batch_axis >= 0:
            return keys_by_head(keys, self.head_axis, self.batch_axis, kv_heads)
        if self.folded:
            keys = keys.unflatten(-1, (kv_heads, -1))
        heads = keys.unsqueeze(0) if self.head_axis < 0 else keys.movedim(self.head_axis, 0)
        return heads.reshape(1, heads.shape[0], -1, heads.shape[-1])


class Stamp:
    """A tensor as it was: another tensor, another place in memory or a write makes it differ.

    `version` is None where nothing counts writes.
    """

    __slots__ = ("address", "shape", "storage", "strides", "version")

    def __init__(self, tensor: Tensor) -> None:
        # `x.data = y` counts as no write, and a new storage may lie where one before it lay: while
        # a weak reference to that is held, the two are not taken for one.
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.address = tensor.data_ptr()
        self.shape = tensor.shape
        self.strides = tensor.stride()
        self.version = version_of(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether the tensor is the same one, whatever was written since."""
        return (
            self.address == tensor.data_ptr()
            and self.shape == tensor.shape
            and self.strides == tensor.stride()
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is the same one, not written since, as far as that is counted."""
        return self.version == version_of(tensor) and self.is_of(tensor)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written; None where nothing counts."""
    return None if tensor.is_inference() else tensor._version


def reading_waits(tensor: Tensor) -> bool:
    """Whether who reads its numbers waits for a device, which then waits for the next step."""
    return tensor.device.type != "cpu"


@dataclass(eq=False)
class Cached:
    """One cache as one call brings it: everything below is looked up once.

    `past` holds its rows, `k_pe` those that continue them, if there are any; `base` is the tensor
    that the caller keeps, `past` itself or one that it is a part of. `stored`: new tokens that the
    call stores; `queries`: what the rows meet, where that is known before any query. Of a cache
    that grows in place, `before` is the memory that each of its tensors lies in, None for one that
    is not ours, and `after` that of the longer ones.
    """

    past: Tensor
    k_pe: Tensor | None
    token_axis: int
    base: Tensor
    stored: int = 0
    queries: Callable[[], Tensor | None] = lambda: None
    before: tuple[Buffer | None, ...] = ()
    after: tuple[Buffer, ...] = ()

    def versions(self) -> tuple[int | None, ...]:
        """How often each of its tensors was written."""
        if self.k_pe is None:
            return (version_of(self.past),)
        return version_of(self.past), version_of(self.k_pe)

    def stamps(self) -> tuple[Stamp, ...]:
        """Of its tensors as they are now."""
        return tuple(Stamp(x) for x in (self.past, self.k_pe) if x is not None)

    def is_as(self, stamps: tuple[Stamp, ...]) -> bool:
        """Whether its tensors are those of then, not written since as far as that is counted."""
        tensors = [x for x in (self.past, self.k_pe) if x is not None]
        return len(tensors) == len(stamps) and all(
            stamp.holds(tensor) for stamp, tensor in zip(stamps, tensors, strict=True)
        )

    @property
    def slots(self) -> int:
        return self.past.shape[self.token_axis]

    @cached_property
    def counts_writes(self) -> bool:
        """Whether its tensors have version counters."""
        return not self.past.is_inference() and (self.k_pe is None or not self.k_pe.is_inference())

    def narrow(self, start: int, length: int) -> Tensor:
        """So many whole rows; a copy where they lie in two tensors."""
        return self._both(lambda x: x.narrow(self.token_axis, start, length))

    def at(self, tokens: Tensor) -> Tensor:
        """The whole rows of these tokens (N,)."""
        return self._both(lambda x: x.index_select(self.token_axis, tokens))

    def every(self, rows: slice) -> list[Tensor]:
        """Views of these rows, of each tensor."""
        index = (*[slice(None)] * self.token_axis, rows)
        return [x[index] for x in (self.past, self.k_pe) if x is not None]

    def _both(self, take: Callable[[Tensor], Tensor]) -> Tensor:
        if self.k_pe is None:
            return take(self.past)
        return torch.cat((take(self.past), take(self.k_pe)), -1)


@dataclass(eq=False)
class CacheBinding:
    """What the runtime knows of one cache of the plan, and what is kept beside it.

    `argument` is the position of its past tensor among the graph's arguments; `k_pe` that of the
    tensor whose rows continue its rows, if there is one; `weights` the fingerprint of the weights
    that make its keys ("" if none was found), which come in at position `weight`; each call stores
    `new_tokens`. `part` says where the past tensor was cut out, if it is a part of another one.
    `basis` is a stored one; None: each cache has its own. `layout` of what is kept is None until
    the rank is known, and where nothing is. `latent`: its rows are expanded to
    keys; a set of bases need not hold one for such rows, which `calibrate` may not have seen: it is
    fitted then. `unit_queries` gives, for a call's arguments, what the rows meet, where that is
    known before any query. `pairs` are the dims of its rows that turn together with the position;
    `fitted` says what the last automatic basis was fitted from, "" before the first. `grown` are
    the numbers, among what grows in the graph, of its tensors.
    """

    form: CacheForm
    keeps: Keeps
    argument: int
    weights: str
    layer: str
    kv_heads: int
    head_dim: int
    new_tokens: int | GivenSize
    weight: int | None = None
    k_pe: int | None = None
    part: Part | None = None
    latent: bool = False
    unit_queries: Callable[[Sequence[Any]], Tensor | None] | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    fitted: str = ""
    basis: Basis | None = None
    layout: Layout | None = None
    grown: tuple[int, ...] = ()

    def at(self, args: Sequence[Any], grown: Grown | None = None) -> Cached:
        """The cache, given the graph's arguments, and what grows in this call."""
        count, asks = self.new_tokens, self.unit_queries
        more: dict[str, Any] = {} if asks is None else {"queries": lambda: asks(args)}
        if grown is not None and self.grown:
            more["before"] = tuple(grown.before[number] for number in self.grown)
            more["after"] = tuple(grown.after[number] for number in self.grown)
        return Cached(
            past=args[self.argument],
            k_pe=None if self.k_pe is None else args[self.k_pe],
            token_axis=self.form.token_axis,
            base=args[self.argument if self.part is None else self.part.base],
            stored=count if isinstance(count, int) else count.of(args),
            **more,
        )

    def left_by(self, outputs: Sequence[Any], before: Cached) -> Cached:
        """The cache as a step has left it behind."""
        form = self.form
        if form.output is None:
            return before
        k_pe = None if form.k_pe_output is None else outputs[form.k_pe_output]
        tensor = outputs[form.output]
        return Cached(tensor, k_pe, before.token_axis, tensor, before=before.after)

    @cached_property
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
    def needs_basis(self) -> bool:
        """Whether what is kept is fitted from the cache's own keys."""
        return self.keeps is Keeps.INDEX and self.basis is None

    def rank(self, spec: int | float | str) -> int | None:
        """Dims of the index, or None where they depend on a basis that is not fitted yet."""
        if self.basis is not None:
            return self.basis.rank_for(spec)
        if spec == AUTO:
            return dims_of(AUTO_SHARE, self.head_dim)
        if isinstance(spec, str):
            return self.layout.rank if isinstance(self.layout, IndexLayout) else None
        return spec if isinstance(spec, int) else dims_of(spec, self.head_dim)

    def basis_name(self) -> str:
        """Where the basis comes from, for reports; "" where none is needed."""
        if self.keeps is not Keeps.INDEX:
            return ""
        if self.basis is None:
            return f"auto (fitted to each sequence{', from ' * bool(self.fitted)}{self.fitted})"
        return f"{self.basis.kind}, {self.basis.tokens} tokens"


def tokens_before(cached: Cached, filled: int) -> int:
    """Tokens that a cache holds before the step behind which `filled` are there."""
    return min(filled - cached.stored, cached.slots)
