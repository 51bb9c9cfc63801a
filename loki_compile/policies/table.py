"""The policies there are, and what a user's options make of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from loki_compile.config import LokiConfig
from loki_compile.kernels.budget import HeadBudgets
from loki_compile.kernels.spans import ONE_Q16, Span, Spans
from loki_compile.passes.policy import Candidate, Choice, Policy, Ranking
from loki_compile.policies.exact import EXACT
from loki_compile.policies.kinds import PLANS, SPANS, Kind, why_no_mass
from loki_compile.policies.layers import choices_of
from loki_compile.policies.low_rank import LOW_RANK
from loki_compile.policies.moa import MOA
from loki_compile.policies.pages import PAGES
from loki_compile.policies.presets import REUSE, chooses_instead, preset
from loki_compile.policies.sparq import SPARQ
from loki_compile.policies.unified import UNIFIED
from loki_compile.policies.window import WINDOW

RANKINGS: dict[str, Ranking] = {
    r.name: r for r in (LOW_RANK, EXACT, WINDOW, PAGES, UNIFIED, SPARQ, MOA)
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a stored plan says of the sites of a graph: the kind of each, and the number by which
    sources name its layer; and, in words, where it is from."""

    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]
    origin: str = ""


# Given all sites and the policy whose plan is wanted, the one that is stored for their model, or
# that the options name; None where there is none.
Stored = Callable[[Sequence[Candidate], str], Planned | None]
# Cached tokens at which the share that spans read is told.
SHARE_AT = 8192


def policy_of(config: LokiConfig, stored: Stored = lambda candidates, policy: None) -> Policy:
    """The policy that options ask for. `stored` is asked for the plan of `"tidal"` and of `"moa"`,
    or for that of a file; for that of `"loki"` where options leave its budget open."""
    name = config.policy if isinstance(config.policy, str) else ""
    plan = name in PLANS or bool(config.plan_file)
    reuses = plan or any(kind.reuse or kind.borrows for kind in config.kinds)

    make = functools.partial(_choice, config, name, reuses)

    def choose(candidates: Sequence[Candidate]) -> list[Choice]:
        layers = [candidate.site.layer(number) for number, candidate in enumerate(candidates)]
        if config.open_budget and (found := stored(candidates, name)) is not None:
            mixed = any(kind.reuse or kind.borrows for kind in found.kinds)
            by_plan = functools.partial(_choice, config, name, mixed)
            choices = choices_of(candidates, found.kinds, found.layers, by_plan, "loki")
            return [_from(choice, found.origin) for choice in choices]
        if plan:
            found = stored(candidates, name) if name == "tidal" or config.plan_file else None
            if found is not None:
                return choices_of(candidates, found.kinds, found.layers, make, "loki")
            # Alone in its graph, nobody knows what layer it is of how many, and nobody reads of it.
            of_sites = [REUSE] * len(candidates)
            if len(candidates) > 1:
                of_layers = preset(name, max(layers) + 1)
                of_sites = [of_layers[layer] for layer in layers]
            return choices_of(candidates, of_sites, layers, make, chooses_instead(name))
        sites = enumerate(candidates)
        of_sites = [config.kind_for(candidate.site, number) for number, candidate in sites]
        if Kind(SPANS) in of_sites and (found := stored(candidates, SPANS)) is not None:
            if name == SPANS:
                return choices_of(candidates, found.kinds, found.layers, make, "loki")
            of_sites = [
                planned if kind == Kind(SPANS) and planned.ranking in ("", SPANS) else kind
                for kind, planned in zip(of_sites, found.kinds, strict=True)
            ]
        # The first that is named, for a layer that would reuse and has nobody to reuse from.
        chooses = (kind.ranking for kind in config.kinds if kind.ranking not in ("", SPANS))
        return choices_of(candidates, of_sites, layers, make, next(chooses, "loki"))

    return choose


def _choice(
    config: LokiConfig, name: str, reuses: bool, kind: Kind, candidate: Candidate
) -> Choice:
    """What a site does that is of a kind, under the policy `name`; whether any site reuses."""
    per_head = config.share == "head" or name == "tidal-published"
    by_probability = config.group_choice == "probability" or name == "kascade"
    budget = config.budget
    if budget.recent == 0 and reuses:
        budget = dataclasses.replace(budget, recent=1)  # a reader's newest key is no other's
    ranking = RANKINGS[kind.ranking] if kind.ranking else None
    if config.mass and (why := why_no_mass(str(kind)) if ranking else ""):
        raise ValueError(
            f"top_k={config.top_k!r}: {candidate.site.path or 'a site'} {why}, by the plan of "
            f'policy={config.policy!r}: needs layers of "loki" and "oracle", or a fixed top_k.'
        )
    site, spans, budgets = candidate.site, None, None
    if kind.budgets:
        budgets = budgets_of(kind, site.kv_heads, site.path or "a site", config, budget.recent)
    if kind.ranking == SPANS:
        spans = spans_of(kind, site.kv_heads, site.path or "a site", config)
    if spans is not None and kind.spans and spans.whole:
        ranking = spans = None
    note = "" if spans is None else f"{spans.share(SHARE_AT):.0%} of {SHARE_AT} keys"
    if config.mass and ranking is not None:
        note = f"{config.mass:g} of what keys weigh, {_most_text(config.ceiling)} of them"
    return Choice(
        ranking, budget, per_head, by_probability, dense_result=kind.dense, note=note,
        spans=spans, weighed=ranking is not None and ranking.weighs and config.weighs,
        rank=config.plain_rank,
        budgets=budgets,
    )  # fmt: skip


def _from(choice: Choice, origin: str) -> Choice:
    return dataclasses.replace(choice, note="; ".join(filter(None, (choice.note, origin))))


def budgets_of(
    kind: Kind, kv_heads: int, where: str, config: LokiConfig, recent: int
) -> HeadBudgets:
    """The budgets of a kind for so many KV heads, of the site `where`, whose `recent` last keys are
    always kept; none for a head that reads what another layer's chose. `sink` and `min_context` of
    the options hold as for every policy.

    Raises:
      ValueError: budgets of another number of heads.
    """
    if len(kind.budgets) not in (1, kv_heads):
        raise ValueError(
            f"policy: {where} has {kv_heads} KV heads, and {str(kind)!r:.80} has budgets for "
            f"{len(kind.budgets)}: needs one for each of its KV heads, or one for all."
        )
    spans = tuple(each.span for each in kind.budgets)
    last = tuple(each.last for each in kind.budgets)
    own = HeadBudgets(spans, last, config.sink, recent, config.min_context)
    return own.of_each(kv_heads)


def _most_text(ceiling: int | float) -> str:
    return f"at most {ceiling if isinstance(ceiling, int) else f'{ceiling:.4g}'}"


def spans_of(kind: Kind, kv_heads: int, where: str, config: LokiConfig) -> Spans:
    """The spans of a kind for so many KV heads, of the site `where`; of all heads one as long as
    `top_k` where the kind has none. `sink`, `recent` and `min_context` of the options hold as for
    every policy.

    Raises:
      ValueError: spans of another number of heads.
    """
    budget = config.budget
    heads, sink = kind.spans, max(kind.sink, budget.sink)
    if not heads:
        lines = [(1 - sink, budget.keep_q16 / ONE_Q16)]
        if budget.top_k is not None:
            lines = [(budget.top_k - sink, 0.0)]
        heads = (Span.of(*lines),)
    if len(heads) not in (1, kv_heads):
        raise ValueError(
            f"policy: {where} has {kv_heads} KV heads, and is to read "
            f"{len(heads)} spans: needs one for each of its KV heads, or one for all."
        )
    return Spans(heads, sink, max(budget.recent, 1), budget.min_keys)
