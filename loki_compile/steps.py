"""One call of a decode graph, and the model whose call it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loki_compile.buffers import Grown
from loki_compile.caches import CacheBinding, Cached
from loki_compile.counts import Tally
from loki_compile.kernels.kept import Keeps
from loki_compile.passes.attention import MaskTerm

if TYPE_CHECKING:
    from loki_compile.index_record import IndexRecord
    from loki_compile.trails import Trail


@dataclass(frozen=True, eq=False)
class Served:
    """What a graph has for one model: the bases that were stored for its weights, its counts.

    Dynamo runs one graph for all models of a class whose sizes agree.
    """

    bindings: list[CacheBinding]
    tally: Tally
    kept: list[int] = field(init=False)  # the caches beside which something is kept

    def __post_init__(self) -> None:
        kept = [i for i, b in enumerate(self.bindings) if b.keeps is not Keeps.NOTHING]
        object.__setattr__(self, "kept", kept)


class Step:
    """One call: its arguments, whose model's it is, how many tokens each cache holds behind it,
    what grows in place, the trail that it is on, the indexes that are known to be true, and, once
    it is asked for, what masks let see of the caches."""

    def __init__(
        self,
        args: Sequence[Any],
        served: Served,
        filled: list[int],
        grown: Grown | None = None,
        trail: Trail | None = None,
        held: list[IndexRecord] | None = None,
    ) -> None:
        self.args = args
        self.served = served
        self.filled = filled
        self.grown = grown
        self.trail = trail
        self.held = held
        self.seen: dict[tuple[MaskTerm, ...], Tensor | None] = {}

    @cached_property
    def caches(self) -> list[Cached]:
        """In the plan's order."""
        return [binding.at(self.args, self.grown) for binding in self.served.bindings]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of a variant that takes no indexes."""
        if self.grown is None:
            return tuple(self.args)
        return (*self.args, self.grown.capacity, *self.grown.rooms)

    @property
    def visible(self) -> int:
        """Keys that can be seen behind the call, the most of any cache."""
        return max(self.filled)
