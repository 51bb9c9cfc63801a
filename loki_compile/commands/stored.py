"""What decoding a model by some options takes from the store or from a file: bases and plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from loki_compile.bind import load_basis
from loki_compile.config import LokiConfig
from loki_compile.pca_store.basis_file import encode
from loki_compile.pca_store.fingerprint import weights_fingerprint
from loki_compile.pca_store.layer_plan import (
    BUDGETS_SUFFIX,
    SPANS_SUFFIX,
    SUFFIX,
    USED,
    LayerPlan,
    read_plan,
    stored_plans,
)
from loki_compile.pca_store.store import Store
from loki_compile.plan_words import differing, kinds_of
from loki_compile.policies.kinds import SPANS
from loki_compile.published import PublishedSpans, published_spans

# Fingerprints of a model's weights; asked for where something is stored that may be of it.
Held = Callable[[], frozenset[str]]

# Plans that are stored, by the policy that uses them.
SUFFIXES = {"tidal": SUFFIX, SPANS: SPANS_SUFFIX, "loki": BUDGETS_SUFFIX}


def weights_of(model: Any) -> frozenset[str]:
    """Fingerprints of all weights of a model."""
    return frozenset(map(weights_fingerprint, model.parameters())) - {""}


def plan_in(path: str) -> PublishedSpans | LayerPlan:
    """The plan that `policy=` names by its file.

    Raises:
        PlanFileError: it holds none.
    """
    return published_spans(path) or read_plan(path)


def stored_plan(policy: str, held: Held) -> LayerPlan | None:
    """The newest plan that is stored for a model, of one of `SUFFIXES`, used or not."""
    weights: frozenset[str] | None = None
    for plan in stored_plans(suffix=SUFFIXES[policy]):
        weights = held() if weights is None else weights
        if weights.issuperset(layer.weights for layer in plan.layers):
            return plan
    return None


def rankings_of(config: LokiConfig) -> set[str]:
    """By what the layers of a policy choose that is one name for all, or a file's.

    Raises:
        PlanFileError: a file that holds no plan.
    """
    if config.plan_file:
        plan = plan_in(config.plan_file)
        if isinstance(plan, PublishedSpans):
            return {SPANS}
        return {kind.ranking for kind in kinds_of(plan)} - {""}
    if config.policy == "tidal":
        return {"loki"}
    return {str(config.policy).partition(":")[0]}


def used_plan(config: LokiConfig, held: Held) -> str:
    """Fingerprint of the plan that options use; "" for none.

    Raises:
        PlanFileError: a file that holds none.
    """
    plan: PublishedSpans | LayerPlan | None = None
    if config.plan_file:
        plan = plan_in(config.plan_file)
    elif config.policy in SUFFIXES and (config.policy != "loki" or config.open_budget):
        plan = stored_plan(str(config.policy), held)
        if config.policy == "loki" and plan is not None and why_not_used(plan, config):
            plan = None
    if plan is None:
        return ""
    record = plan.record() if isinstance(plan, LayerPlan) else asdict(plan)
    return _digest(json.dumps(record, sort_keys=True).encode())


def why_not_used(plan: LayerPlan, config: LokiConfig) -> str:
    """Why a stored plan of budgets does not serve `policy="loki"` by itself; "" where it does."""
    if plan.scores.get(USED) is not True:
        return "it was not surely better than one budget for all heads"
    return differing(plan, config)


def used_basis(config: LokiConfig, held: Held) -> str:
    """Fingerprint of the basis that options use, named or stored; "" for none, and for what each
    sequence is fitted.

    Raises:
        ValueError: a basis that is not there.
    """
    if "loki" not in rankings_of(config):
        return ""
    if config.basis != "auto":
        return _digest(encode(load_basis(config.basis)))
    store = Store()
    found = store.find(held()) if store.list() else None
    return "" if found is None else _digest(encode(found))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
