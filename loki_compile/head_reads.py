"""How many keys each KV head of a site reads, where heads differ: what it chooses itself, or what
another site's head has chosen for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loki_compile.config import LokiConfig
from loki_compile.kernels.budget import HeadBudgets
from loki_compile.kernels.spans import Span
from loki_compile.passes.plan import Plan, SparseSite
from loki_compile.policies.head_budgets import HeadBudget, budgets_from, budgets_text
from loki_compile.policies.table import SHARE_AT


@dataclasses.dataclass(frozen=True)
class HeadReads:
    """Of each KV head of a site: the budget of whoever chooses for it, `rank` heads of these by
    their own layer's ranking; and in words who that is, "" for itself."""

    budgets: HeadBudgets
    rank: int
    whose: tuple[str, ...]

    @property
    def word(self) -> str:
        """The budgets as a word of `policy=` has them."""
        pairs = zip(self.budgets.heads, self.budgets.last, strict=True)
        return budgets_text([HeadBudget(span, last) for span, last in pairs])

    @property
    def shares(self) -> tuple[float, ...]:
        """Of `SHARE_AT` keys, the share that each reads."""
        return tuple(number / SHARE_AT for number in self.budgets.keys(SHARE_AT))

    def __str__(self) -> str:
        told = []
        for share, last, whose in zip(self.shares, self.budgets.last, self.whose, strict=True):
            how = ", ".join(filter(None, ("the last" * last, whose)))
            told.append(f"{share:.1%}" + (f" ({how})" if how else ""))
        return f"KV heads read {', '.join(told)} of {SHARE_AT} keys"


def reads_of(plan: Plan, sparse: SparseSite) -> HeadReads | None:
    """What the KV heads of a site read; None where one budget is that of all."""
    site, choice = sparse.site, sparse.choice
    if sparse.source is not None:
        source = plan.sparse[sparse.source]
        lent = reads_of(plan, source)
        if lent is None:
            return None
        there = source.site.kv_heads
        heads = choice.heads or [n * there // site.kv_heads for n in range(site.kv_heads)]
        budgets = lent.budgets.mapped(heads, source.choice.budget.span)
        return HeadReads(budgets, 0, tuple(lent.whose[head] for head in heads))
    if choice.budgets is None:
        return None
    spans, last = list(choice.budgets.heads), list(choice.budgets.last)
    whose = [""] * len(spans)
    for head, borrowed in enumerate(sparse.borrowed):
        if borrowed is None:
            continue
        place, its = borrowed
        spans[head], last[head] = _budget_of(plan, plan.sparse[place], its)
        whose[head] = f"as head {its} of layer {_layer(plan, place)} chose"
    budgets = dataclasses.replace(choice.budgets, heads=tuple(spans), last=tuple(last))
    own = choice.budgets
    rank = sum(span is not None and not end for span, end in zip(own.heads, own.last, strict=True))
    return HeadReads(budgets, rank, tuple(whose))


def budgets_in(word: str, config: LokiConfig) -> HeadBudgets:
    """The budgets that a `HeadReads.word` says, under these options."""
    heads = budgets_from(word)
    spans, last = tuple(each.span for each in heads), tuple(each.last for each in heads)
    return HeadBudgets(spans, last, config.sink, config.recent, config.min_context)


def mean_share(plan: Plan, sites: Sequence[SparseSite]) -> float:
    """Of `SHARE_AT` keys, the share that KV heads of sites read that rank keys, on average."""
    shares = []
    for sparse in sites:
        own = reads_of(plan, sparse)
        if own is None:
            shares.append(sparse.choice.budget.keys(SHARE_AT) / SHARE_AT)
        else:
            shares.append(sum(own.shares) / len(own.shares))
    return sum(shares) / max(len(shares), 1)


def _budget_of(plan: Plan, source: SparseSite, head: int) -> tuple[Span | None, bool]:
    lent = reads_of(plan, source)
    if lent is None:
        return source.choice.budget.span, False
    return lent.budgets.heads[head], lent.budgets.last[head]


def _layer(plan: Plan, place: int) -> int:
    """The number of the layer of a site of `Plan.sparse`."""
    site = plan.sparse[place].site
    return site.layer(next(n for n, each in enumerate(plan.sites) if each.node is site.node))
