"""The vocabulary: the cache behind a site's keys, and the writes into it.

Two kinds of cache exist. One is *replaced*: each step builds a new tensor from the old one
(`torch.cat([past, new])`) and the graph returns it. The other is *mutated*: a placeholder that the
graph writes into (`index_copy_`, slice assignment, ...).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loki_compile.passes.calls import concrete, op_name, shape_of
from torch import fx


@dataclass(frozen=True)
class CacheWrite:
    """One write of new keys. `views` lead from the cache to the tensor that is written into.

    `source` holds the new keys; `head_axis` is its dimension of KV heads (-1: one head, no such
    dimension); its last dimension is head_dim, or heads and head_dim in one (then it is `head_axis`
    too). `fill` = (what, plus) tells how far the cache is
    filled behind the write: the largest entry of `what` (a tensor node, an integer or an integer
    node) plus `plus`; None where the write does not say.

    A full window moves all its rows before it takes new ones (`roll`, a write into the result, a
    copy back): then `moved` has those calls in order, new keys come in by the writes among them,
    and `node` copies the result back. `batch_axis` is the source's dimension of sequences, as many
    as the cache has; -1 where there is none, or none is seen.
    """

    node: fx.Node
    source: fx.Node
    head_axis: int
    views: tuple[fx.Node, ...] = ()
    fill: tuple[Any, int] | None = None
    moved: tuple[fx.Node | CacheWrite, ...] = ()
    batch_axis: int = -1


@dataclass(frozen=True)
class KeyCache:
    """The cache behind a site's keys.

    `past` is the placeholder that brings it in. `root` holds the keys that the site reads: the
    same placeholder where the cache is mutated, the node that builds the new cache where it is
    replaced (then `output` is its place among the graph's outputs, after the views `leaves`: a
    sliding window keeps a slice). `views` lead from `root` to the site's `key.base`. `head_axis`
    and `token_axis` are dimensions of `root`; head_dim is last, or heads and head_dim in one, where
    `heads_are_folded`; `batch_axis` is that of sequences (-1: none is seen). `k_pe` is a second
    cache of the same tokens, written by the same calls, whose rows continue these: both have one
    index.
    """

    past: fx.Node
    root: fx.Node
    views: tuple[fx.Node, ...] = field(compare=False)
    writes: tuple[CacheWrite, ...]
    head_axis: int
    token_axis: int
    source: str
    output: int | None = None
    leaves: tuple[fx.Node, ...] = ()
    k_pe: KeyCache | None = None
    batch_axis: int = -1

    @property
    def batched(self) -> bool:
        """Whether sequences lie along a dimension of the cache and of all that is written into it,
        and there may be several."""
        if self.batch_axis < 0 or concrete((shape_of(self.past) or ())[self.batch_axis]) == 1:
            return False
        inner = [step for write in self.writes for step in (*write.moved, write)]
        steps = [step for step in inner if isinstance(step, CacheWrite) and not step.moved]
        together = self.k_pe is None or self.k_pe.batched
        return together and all(step.batch_axis >= 0 for step in steps)

    @property
    def replaced(self) -> bool:
        return self.output is not None

    @property
    def heads_are_folded(self) -> bool:
        """Whether the last dimension is heads and head_dim in one."""
        return self.head_axis == len(shape_of(self.root) or ()) - 1

    @property
    def grows(self) -> bool:
        """Whether each step makes it longer, instead of storing into slots that it has."""
        return self.replaced and op_name(self.root) == "cat"

    @property
    def serves_one_length(self) -> bool:
        """Whether the graph is of a fixed length of a cache that each step makes longer."""
        tokens = (shape_of(self.root) or (None,) * 4)[self.token_axis]
        return self.grows and concrete(tokens) is not None

    @property
    def new_keys(self) -> list[fx.Node]:
        """The tensors of new keys that the graph writes into the cache."""
        inner = [step for write in self.writes for step in (*write.moved, write)]
        return [step.source for step in inner if isinstance(step, CacheWrite) and not step.moved]
