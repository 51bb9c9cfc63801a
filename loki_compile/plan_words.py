"""The words of a stored plan as what layers do, each checked against its plan; and the options that
a plan was judged under, against those in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loki_compile.config import LokiConfig
from loki_compile.pca_store.layer_plan import LayerPlan, damaged
from loki_compile.policies.head_budgets import HeadBudget
from loki_compile.policies.kinds import SPANS, Kind, kind_of

# What has a say in which keys a head chooses, and how well its budget serves.
_CHOOSING = ("rank", "basis", "share", "group_choice", "index_dtype", "sink", "recent")
# By the policy that a plan is stored for: the options that what was measured of it depends on.
JUDGED_BY = {"loki": _CHOOSING, "tidal": ("top_k", *_CHOOSING), SPANS: ("recent",)}


def judged_under(config: LokiConfig, policy: str) -> dict[str, Any]:
    """The options that a plan for a policy is judged under, as it is stored with them."""
    return {name: _plain(getattr(config, name)) for name in JUDGED_BY[policy]}


def differing(plan: LayerPlan, config: LokiConfig) -> str:
    """What differs between the options that a plan was judged under and those in use, in words; ""
    where nothing does."""
    if not plan.under:
        return "it does not say under which options it was judged"
    here = {name: _plain(getattr(config, name, None)) for name in plan.under}
    # By how they are written: 1 dim is not a share of 1.0.
    other = [name for name in here if repr(here[name]) != repr(plan.under[name])]
    if not other:
        return ""
    return f"it was judged under {_listed(other, plan.under)}, and here is {_listed(other, here)}"


def _listed(names: list[str], values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={values[name]!r}" for name in names)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, float):
        return float(value)
    return value if isinstance(value, (int, str, type(None))) else str(value)


def kinds_of(plan: LayerPlan) -> tuple[Kind, ...]:
    """What the layers of a plan do.

    Raises:
      PlanFileError: a word that is none, that is for other heads than its layer has, or that names
        what no earlier layer chose; the message names the file.
    """
    kinds: list[Kind] = []
    for number, layer in enumerate(plan.layers):
        try:
            kind = kind_of(layer.word)
            _check_heads(kind, layer.kv_heads)
            for each in kind.budgets:
                if each.span is None:
                    _check_source(plan, kinds, each.source, each.head)
                    _check_lent(kinds[each.source], each)
            if kind.source is not None:
                _check_source(plan, kinds, kind.source, max(kind.heads, default=0))
        except ValueError as error:
            why = f"layer {number} ({layer.path:.80}) has the word {layer.word!r:.80}: {error}"
            why = f"{why.rstrip('.')}; mend that word, or make the plan anew"
            raise damaged(plan.path or "a plan", why) from None
        kinds.append(kind)
    return tuple(kinds)


def _check_heads(kind: Kind, kv_heads: int) -> None:
    """
    Raises:
      ValueError: spans, budgets or a map of another number of heads.
    """
    for what, given in (("spans", kind.spans), ("budgets", kind.budgets), ("heads", kind.heads)):
        alike = len(given) == 1 and what != "heads"  # one for all
        if given and not alike and len(given) != kv_heads:
            raise ValueError(f"it has {kv_heads} KV heads, and {len(given)} {what}; needed as many")


def _check_source(plan: LayerPlan, before: list[Kind], source: int, head: int) -> None:
    """
    Raises:
      ValueError: a layer that does not lie before, or does not choose, or a head that it has not,
        or that reads what another chose.
    """
    if source >= len(before):
        raise ValueError(f"layer {source} does not lie before it; needed an earlier layer")
    kind, kv_heads = before[source], plan.layers[source].kv_heads
    if kind.ranking in ("", SPANS):
        raise ValueError(f'layer {source} is "{kind}" and does not choose; needed one that does')
    if head >= kv_heads:
        raise ValueError(f"layer {source} has {kv_heads} KV heads; needed a head below that")


def _check_lent(source: Kind, reader: HeadBudget) -> None:
    """
    Raises:
      ValueError: a head of the source that reads what another chose.
    """
    if source.budgets and source.budgets[reader.head % len(source.budgets)].span is None:
        raise ValueError(
            f"KV head {reader.head} of layer {reader.source} reads what another chose; needed that "
            "one"
        )
