"""What a policy may say: how each site chooses the keys that it reads, and what that needs.

A policy decides and a ranking makes positions. Both are data plus one function; the policies there
are, and how to add one, are `loki_compile.policies`' to tell. Nothing here knows any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loki_compile.kernels.budget import Budget, HeadBudgets
from loki_compile.kernels.kept import Keeps
from loki_compile.kernels.spans import Spans
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.caches import KeyCache
from torch import fx


@dataclass(frozen=True)
class Ranking:
    """A way to choose keys.

    `positions` adds to a graph the node that chooses: int32 (B, Hkv or Hq, S, K), ascending, -1
    behind them, as `kernels` has it; or, with `ranges`, two ranges of keys for each row, as
    `loki::attention` takes them, which no other site can read. `weighs`: the softmax of what it
    ranks by says what keys weigh, as `kernels.ops.select_weighed` does. `keeps` is what it needs
    beside each cache that it ranks. `refuses` says why it cannot serve a site over a cache, ""
    where it can.
    """

    name: str
    positions: Callable[[Asked], fx.Node]
    keeps: Keeps = Keeps.NOTHING
    refuses: Callable[[AttentionSite, KeyCache], str] = lambda site, cache: ""
    ranges: bool = False
    weighs: bool = False


@dataclass(frozen=True)
class Candidate:
    """A site as a policy sees it. `slots` is the number of its class of slots (`passes.slots`): of
    the sites of one class each may read what another chose. `cache` is None where the site cannot
    be sparse, `slots` then too, and where its keys move. `keys` are those of a prompt, which has no
    cache yet."""

    site: AttentionSite
    cache: KeyCache | None
    slots: int | None
    keys: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Choice:
    """How one site chooses: by which ranking, how many keys, and who agrees with whom.

    `per_head`: each query head for itself. Else a KV head's query heads choose together: by the
    greatest of their scores, or, with `by_probability`, by the sum of what attention each would
    give a key.

    Without a ranking the site reads all keys. With a `source`, the number of an earlier site of the
    same slots, it reads the positions that one has chosen: KV head i those of the source's KV head
    `heads[i]`, or of the same one; it chooses itself where the source has become dense. With
    `dense_result` it reads all keys and chooses for others. `spans` say how many keys each KV head
    reads where the ranking reads ranges. `rank`: in how many dims a ranking without an index ranks,
    a fraction of theirs or a count. `note` is what one should know of it. `weighed`: what its rows
    choose and leave out is noted, where its ranking weighs keys.

    `budgets` say how many keys each KV head chooses, where these and not `budget` do. A KV head
    without one reads what a head of an earlier site of the same slots has chosen: `borrowed` has
    that site's number and the KV head of it, None for a head that chooses. Where that site has
    become dense the head chooses itself, as many keys as that one would.
    """

    ranking: Ranking | None
    budget: Budget
    per_head: bool = False
    by_probability: bool = False
    source: int | None = None
    heads: tuple[int, ...] = ()
    dense_result: bool = False
    note: str = ""
    spans: Spans | None = None
    weighed: bool = False
    rank: int | float = 1.0
    budgets: HeadBudgets | None = None
    borrowed: tuple[tuple[int, int] | None, ...] = ()

    def dims(self, most: int) -> int:
        """How many of `most` dims are ranked in."""
        share = self.rank
        return min(share if isinstance(share, int) else math.ceil(round(share * most, 6)), most)

    @property
    def rule(self) -> Budget | Spans | HeadBudgets:
        """How many keys a row chooses, or reads in ranges, of those that it sees."""
        return self.spans or self.budgets or self.budget

    @property
    def ranks(self) -> bool:
        """Whether any of its heads ranks keys, unless it reads another site's choice."""
        return self.budgets is None or self.budgets.ranks


# For all sites of a graph, which are numbered in its order, the choice of each.
Policy = Callable[[Sequence[Candidate]], Sequence[Choice]]


@dataclass(frozen=True)
class Asked:
    """What a ranking is given when it is to make positions, in the graph that is being rewritten.

    `query` (B, Hq, S, D), heads in blocks; `key` (B, Hkv, T, D or, where a row goes on in another
    tensor, less); `kept`: what is kept of the cache behind this step, its rows as (B, Hkv, rows,
    width); `query_basis` (Hkv, D, R) or (B, Hkv, D, R) where that is an index. `mask` and `bounds`
    as `kernels.ops.select` takes them. `shared` is of the whole graph: what sites have in common is
    made once. A ranking that weighs keys appends to `weighed`, if the choice asks for it, what
    `kernels.ops.select_weighed` says of the rows.
    """

    graph: fx.Graph
    site: AttentionSite
    choice: Choice
    query: fx.Node
    key: fx.Node
    kept: tuple[fx.Node, ...] = ()
    query_basis: fx.Node | None = None
    mask: fx.Node | None = None
    bounds: fx.Node | None = None
    shared: dict[Any, fx.Node] = field(default_factory=dict)
    weighed: list[fx.Node] = field(default_factory=list)
