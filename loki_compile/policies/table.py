"""The policies there are, and what a user's options make of them."""

from __future__ import annotations

from collections.abc import Sequence

from loki_compile.config import LokiConfig
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.policy import Choice, Policy, Ranking
from loki_compile.policies.exact import EXACT
from loki_compile.policies.low_rank import LOW_RANK
from loki_compile.policies.pages import PAGES
from loki_compile.policies.window import WINDOW

RANKINGS: dict[str, Ranking] = {r.name: r for r in (LOW_RANK, EXACT, WINDOW, PAGES)}


def policy_of(config: LokiConfig) -> Policy:
    """The policy that options ask for: every site by itself, each by its layer's ranking."""

    def choose(sites: Sequence[AttentionSite]) -> list[Choice]:
        return [
            Choice(
                RANKINGS[config.policy_for(site, number)],
                config.budget,
                config.share == "head",
                config.group_choice == "probability",
            )
            for number, site in enumerate(sites)
        ]

    return choose
