"""One call of a decode graph, and the model whose call it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loki_compile.buffers import Grown
from loki_compile.caches import CacheBinding, Cached
from loki_compile.counts import Tally
from loki_compile.kernels.kept import Keeps
from loki_compile.passes.attention import MaskTerm


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


@dataclass
class Step:
    """One call: its arguments, whose model's it is, its caches in the plan's order, how many tokens
    each of them holds behind it, what grows in place, and, once it is asked for, what masks let see
    of the caches."""

    args: Sequence[Any]
    served: Served
    caches: list[Cached]
    filled: list[int]
    grown: Grown | None = None
    seen: dict[tuple[MaskTerm, ...], Tensor | None] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of a variant that takes no indexes."""
        if self.grown is None:
            return tuple(self.args)
        return (*self.args, self.grown.capacity, *self.grown.rooms)

    @property
    def kept(self) -> list[CacheBinding]:
        """Of the caches beside which something is kept."""
        return [self.served.bindings[place] for place in self.served.kept]

    @property
    def visible(self) -> int:
        """Keys that can be seen behind the call, the most of any cache."""
        return max(self.filled)
