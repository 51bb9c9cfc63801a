"""What is kept of one cache tensor: the tensors that mirror it, and what tells whether they do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from loki_compile import fits
from loki_compile.buffers import Buffer
from loki_compile.builds import Build
from loki_compile.caches import Stamp
from loki_compile.counts import hold_bytes
from loki_compile.fits import BoundBasis, Fit, Origin
from loki_compile.kernels.kept import Layout
from loki_compile.trails import Trail
from loki_compile.witness import Witness


@dataclass(eq=False)
class IndexRecord:
    """What is kept of one cache tensor: `tensors` mirror it while it is as `stamps` say, and
    `as_it_was`: no step is writing it.

    `filled` tokens were there behind the last step. `fit` is the automatic basis, None where a
    stored one serves or none is needed; `bound` what the rows were projected by. `witness`
    remembers some rows of a cache without a version counter.
    """

    tensors: list[Tensor]
    stamps: tuple[Stamp, ...]
    filled: int
    layout: Layout
    build: Build
    bound: BoundBasis | None = None
    fit: Fit | None = None
    as_it_was: bool = True
    witness: Witness | None = None
    origin: Origin | None = None
    # Of a cache that grows in place, whose index does so too: its tensors have room, `axis` is that
    # of their rows, one for `every` so many tokens. They belong to the memory of the cache, at
    # these versions, and to that of the tensor `beside` it, as far as `filled`.
    axis: int = -1
    every: int = 1
    versions: tuple[int | None, ...] = ()
    beside: tuple[Buffer | None, ...] = ()
    trail: Trail | None = None  # what knows more of it than is written here
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(tensor.nbytes for tensor in self.tensors)
        hold_bytes(self.bytes)

    def __del__(self) -> None:
        hold_bytes(-self.bytes)

    def inputs(self, tokens: int) -> list[Tensor]:
        """What a graph takes for it: its tensors, those with room as long as it is behind a step
        that leaves so many `tokens`, and the basis that new keys are projected by."""
        tensors = self.tensors if self.axis < 0 else self.rows_of(tokens)
        if self.bound is None:
            return tensors
        return [*tensors, self.bound.key, self.bound.query]

    def rows_of(self, tokens: int) -> list[Tensor]:
        """The rows of the first tokens, of each tensor that has room."""
        rows = -(-tokens // self.every)
        views = []
        for tensor in self.tensors:
            sizes = list(tensor.shape)
            sizes[self.axis] = rows
            views.append(tensor.as_strided(sizes, tensor.stride()))
        return views

    @property
    def again_at(self) -> float:
        """Tokens in its cache from which on its basis is fitted again."""
        return math.inf if self.fit is None else fits.FIT_AGAIN * self.fit.tokens

    def settle(self, versions: tuple[int | None, ...], filled: int) -> None:
        """Takes note of steps that have left its tensors at these versions."""
        self.filled = filled
        if self.axis >= 0:
            self.versions = versions
        else:
            for stamp, version in zip(self.stamps, versions, strict=True):
                stamp.version = version
        if self.origin is not None:
            self.origin.version = versions[0]

    def settle_behind(self, versions: tuple[int | None, ...], first: int) -> None:
        """The same of steps that wrote rows from the `first` on, and did not mirror them."""
        if self.axis < 0:
            for stamp in self.stamps:
                stamp.version = None  # no version of a tensor that counts them
        else:
            self.versions, self.filled = versions, first

    def cut(self, tokens: int) -> None:
        """No rows behind so many tokens are true any more: others will be written there."""
        self.filled = min(self.filled, tokens)

    def moved(self, capacity: int, tokens: int) -> IndexRecord:
        """The same of the first tokens, in memory of its own."""
        rows = -(-tokens // self.every)
        tensors = []
        for tensor in self.tensors:
            sizes = list(tensor.shape)
            sizes[self.axis] = -(-capacity // self.every)
            new = tensor.new_empty(sizes)
            new.narrow(self.axis, 0, rows).copy_(tensor.narrow(self.axis, 0, rows))
            tensors.append(new)
        return IndexRecord(
            tensors, (), tokens, self.layout, self.build, self.bound, self.fit,
            axis=self.axis, every=self.every,
        )  # fmt: skip
