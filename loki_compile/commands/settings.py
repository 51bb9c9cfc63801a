"""The settings that `loki eval` compares: options, labels, and what they use that is stored."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loki_compile.commands.options import NUMBER, check_basis, loki_options

if TYPE_CHECKING:
    from loki_compile.commands.stored import Held
    from loki_compile.commands.trials import Setting
    from loki_compile.config import LokiConfig


def settings_of(
    policies: Sequence[str],
    budgets: Sequence[Any],
    ranks: Sequence[Any],
    bases: Sequence[str],
    named: Sequence[str],
    others: dict[str, Any],
) -> list[Setting]:
    """Each combination, once (what keeps no index has no basis, and what ranks in no dims of a
    number that is chosen no rank), and those named.

    Raises:
        ValueError: an option that cannot be, a basis that is not there.
    """
    from loki_compile.commands.trials import Setting
    from loki_compile.config import LokiConfig

    every = {policy: LokiConfig(policy=policy) for policy in policies or ("loki",)}
    combined = [
        {"policy": policy, "top_k": top_k, "rank": rank, "basis": basis}
        for policy, config in every.items()
        for top_k in budgets or (None,)
        for rank in (ranks if _has_rank(config) else ()) or (None,)
        for basis in (bases if _keeps_index(config) else ()) or (None,)
    ]
    alone = named and not (policies or budgets or ranks or bases)
    made: list[LokiConfig] = []
    for given in [*([] if alone else combined), *map(options_of, named)]:
        config = LokiConfig.from_options(loki_options(**{**others, **given}))
        check_basis(str(config.basis))
        config = _what_counts(config)
        if config.to_options() not in [other.to_options() for other in made]:
            made.append(config)
    short = Counter(label_of(config.to_options()) for config in made)
    labels = [label_of(config.to_options()) for config in made]
    return [
        Setting(
            label if short[label] == 1 else label_of(config.to_options(), whole=True),
            config.to_options(),
        )
        for label, config in zip(labels, made, strict=True)
    ]


def with_what_is_stored(settings: Sequence[Setting], held: Held) -> list[Setting]:
    """The settings with fingerprints of the bases and plans that they use; `held` loads the model,
    and is asked where something is stored. Under a plan of spans, or of budgets, no budget counts.

    Raises:
        ValueError: a basis or a plan that is there no more.
    """
    from loki_compile.commands.stored import used_basis, used_plan
    from loki_compile.config import LokiConfig
    from loki_compile.policies.kinds import SPANS

    made: dict[str, Setting] = {}
    for setting in settings:
        config = LokiConfig.from_options(setting.options)
        plan = used_plan(config, held)
        label, options = setting.label, setting.options
        if plan and (config.policy == SPANS or config.open_budget):
            options = {name: value for name, value in options.items() if name != "top_k"}
            label = label_of(options, planned=True)
        uses = {"basis": used_basis(config, held), "plan": plan}
        words = ", ".join(f"{name} {digest}" for name, digest in uses.items() if digest)
        made.setdefault(label, dataclasses.replace(setting, label=label, uses=words))
    return list(made.values())


def options_of(words: str) -> dict[str, Any]:
    """The options that "NAME=VALUE,..." names.

    Raises:
        ValueError: a word without a value.
    """
    options: dict[str, Any] = {}
    for word in re.split(r",(?=\s*[a-z_]+\s*(?:=|$))", words):  # spans of a policy hold commas
        option, given, value = word.partition("=")
        if not given:
            raise ValueError(f"--setting {words}: {word!r} needs a value, as in top_k=128.")
        options[option.strip()] = NUMBER.convert(value.strip(), None, None)
    return options


def label_of(options: dict[str, Any], *, whole: bool = False, planned: bool = False) -> str:
    """What a setting is called: its policy, its budget and its rank where these count and, where it
    keeps an index, its basis; then whatever else differs from the defaults.

    Args:
        whole: with all digits, and a basis by all of its path.
        planned: a plan of spans, or of budgets, is stored for the model, and used.
    """
    from loki_compile.config import LokiConfig

    config = LokiConfig.from_options(options)
    shown = str if whole else _shown
    parts = [str(config.policy)]
    if planned and config.open_budget:
        parts.append("stored budgets")
    if not (planned or _has_spans(config)):
        parts.append(shown(config.top_k))
    if _has_rank(config):
        parts.append(f"R {shown(config.rank)}")
    if _keeps_index(config):
        name = str(config.basis)
        parts.append(name if whole else Path(name).stem)
    usual = {"policy", "top_k", "rank", "basis"}
    parts += [f"{n}={shown(v)}" for n, v in config.to_options().items() if n not in usual]
    return ", ".join(parts)


def _what_counts(config: LokiConfig) -> LokiConfig:
    """The same without what its policy does not ask for.

    Raises:
        ValueError: a policy that is a file without a plan.
    """
    usual = type(config)()
    if not _has_rank(config):
        config = dataclasses.replace(config, rank=usual.rank)
    if not _keeps_index(config):
        config = dataclasses.replace(config, basis=usual.basis)
    if _has_spans(config):
        config = dataclasses.replace(config, top_k=usual.top_k)
    return config


def _keeps_index(config: LokiConfig) -> bool:
    from loki_compile.commands.stored import rankings_of

    return "loki" in rankings_of(config)


def _has_rank(config: LokiConfig) -> bool:
    from loki_compile.commands.stored import rankings_of
    from loki_compile.policies.kinds import IN_DIMS

    return not rankings_of(config).isdisjoint(IN_DIMS)


def _has_spans(config: LokiConfig) -> bool:
    """Whether its own words or its file say how many keys each layer reads that chooses."""
    from loki_compile.commands.stored import rankings_of
    from loki_compile.policies.kinds import SPANS

    return config.policy != SPANS and rankings_of(config) == {SPANS}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
