"""What is said once of a graph: that options name no layer of it, what a plan of all layers is for
its model, why nothing of it is sparse."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from loki_compile.config import LokiConfig
from loki_compile.counts import Tally, attention_noted, say_once
from loki_compile.head_reads import mean_share
from loki_compile.passes.attention import PREFILLS, Reason
from loki_compile.passes.plan import Plan
from loki_compile.planned import PlanOfModel
from loki_compile.policies.kinds import PLANS, SPANS, Kind
from loki_compile.policies.table import SHARE_AT
from loki_compile.report import shown_ranges


def remark_on(plan: Plan, config: LokiConfig, tally: Tally, of_model: PlanOfModel) -> None:
    """Says what users should know of a plan that was made with these options."""
    _say_what_stays_dense(plan, tally)
    _say_which_layers_there_are(plan, config, tally)
    if len(plan.sites) > 1 and plan.sparse:
        _say_what_spans_are_read(plan, config, tally, of_model)
        _say_whose_budgets_are_read(plan, config, tally, of_model)
        _say_who_chooses(plan, config, tally, of_model)


def remarking_on_no_attention(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A graph without attention, which says so once where it runs again and no graph had any.

    Its first run tells nothing: where a model falls into several graphs, most of them have none.
    """
    calls = 0

    def run(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and not attention_noted():
            say_once(
                "no attention",
                "nothing is sparse: no graph so far holds attention that is recognised. "
                "docs/coverage.md has the spellings that are.",
            )
        return compiled(*args)

    return run


def _say_what_stays_dense(plan: Plan, tally: Tally) -> None:
    """Says once where options or the model leave nothing of a decode step to be sparse."""
    why = {skip.reason for skip in plan.dense}
    if plan.sparse:
        return
    if Reason.SHORT_CACHE in why:
        skip = next(skip for skip in plan.dense if skip.reason is Reason.SHORT_CACHE)
        say_once(
            (tally.model, "short"),
            f"{tally.model}: nothing is sparse: {skip.sentence()}. Lower min_context, or decode "
            "with a longer cache.",
        )
    elif why.isdisjoint(PREFILLS) and not all(skip.by_plan for skip in plan.dense):
        skip = next(skip for skip in plan.dense if not skip.by_plan)
        say_once(
            (tally.model, "dense"),
            f"{tally.model}: no attention site of a graph with {len(plan.dense)} became sparse, "
            f"the first since {skip.sentence()}. loki_compile.reports() lists all.",
        )


def _say_which_layers_there_are(plan: Plan, config: LokiConfig, tally: Tally) -> None:
    """Says once which layers the options name in vain. One layer's fragment tells nothing."""
    left_out = any(skip.reason is Reason.LAYER_OFF for skip in plan.dense)
    if len(plan.sites) < 2 or not (plan.sparse or left_out):
        return
    sites = list(enumerate(plan.sites))
    for option, words, picks in config.layers_named():
        if not any(site.is_among(picks, number) for number, site in sites):
            paths = [site.path or str(number) for number, site in sites]
            near = difflib.get_close_matches(str(words), paths, n=1, cutoff=0.0)
            say_once(
                (tally.model, option, words),
                f"{tally.model}: {option} names {words!r}, and none of the {len(paths)} attention "
                f"sites is that; the nearest is {near[0]!r}. loki_compile.reports() lists all.",
            )


def _say_what_spans_are_read(
    plan: Plan, config: LokiConfig, tally: Tally, of_model: PlanOfModel
) -> None:
    spans = [sparse.choice.spans for sparse in plan.sparse if sparse.choice.spans is not None]
    if spans and (config.plan_file or Kind(SPANS) in config.kinds or config.policy == SPANS):
        share = sum(each.share(SHARE_AT) for each in spans) / len(spans)
        guess = (
            "which is a guess, as long for every head as top_k: no plan of `loki tune --policy "
            "moa` is stored for this model"
        )
        say_once(
            (tally.model, "spans", str(config.policy)),
            f"{tally.model}: policy={config.policy!r}: {len(spans)} layers read their first keys "
            f"and spans of the last ones, {share:.1%} of {SHARE_AT} keys, "
            f"{of_model.origin or guess}.",
        )


def _say_whose_budgets_are_read(
    plan: Plan, config: LokiConfig, tally: Tally, of_model: PlanOfModel
) -> None:
    """Says once that a stored plan, and not `top_k`, says how many keys each KV head reads; or why
    one that is stored does not."""
    if of_model.set_aside:
        say_once(
            (tally.model, "budgets", of_model.set_aside),
            f"{tally.model}: the plan of budgets that is stored for this model is not used: "
            f"{of_model.set_aside}. One budget for all heads, top_k=0.125, is in its place: set "
            "what it was judged under, or run `loki tune --target` again; a top_k silences this.",
        )
    if not of_model.origin or all(sparse.choice.budgets is None for sparse in plan.sparse):
        return
    sites = [sparse for sparse in plan.sparse if sparse.choice.spans is None]
    other = "; top_k=0.125 is one budget for all" if config.open_budget else ""
    say_once(
        (tally.model, "budgets", str(config.policy)),
        f"{tally.model}: policy={config.policy!r}: KV heads of {len(sites)} layers read "
        f"{mean_share(plan, sites):.1%} of {SHARE_AT} keys, each as many {of_model.origin}{other}.",
    )


def _say_who_chooses(plan: Plan, config: LokiConfig, tally: Tally, of_model: PlanOfModel) -> None:
    """Says once what a plan of all layers is for this model."""
    if config.policy not in PLANS:
        return
    numbers = {site.node: site.layer(number) for number, site in enumerate(plan.sites)}
    chooses = [numbers[s.site.node] for s in plan.sparse if s.source is None]
    why = of_model.origin or (
        "which do is a guess: no plan of `loki tune` is stored for this model"
    )
    if config.policy != "tidal":
        why = "as published, scaled to its depth"
    say_once(
        (tally.model, "plan", config.policy),
        f"{tally.model}: policy={config.policy!r}: layers {shown_ranges(chooses)} choose keys, "
        f"{len(plan.sparse) - len(chooses)} others read what these chose, {len(plan.dense)} are "
        f"dense; {why}.",
    )
