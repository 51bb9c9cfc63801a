"""The policies there are, and what a user's options make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from loki_compile.config import LokiConfig
from loki_compile.passes.policy import Candidate, Choice, Policy, Ranking
from loki_compile.policies.exact import EXACT
from loki_compile.policies.kinds import PLANS, Kind
from loki_compile.policies.layers import choices_of
from loki_compile.policies.low_rank import LOW_RANK
from loki_compile.policies.pages import PAGES
from loki_compile.policies.presets import REUSE, chooses_instead, preset
from loki_compile.policies.unified import UNIFIED
from loki_compile.policies.window import WINDOW

RANKINGS: dict[str, Ranking] = {r.name: r for r in (LOW_RANK, EXACT, WINDOW, PAGES, UNIFIED)}


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a stored plan says of the sites of a graph: the kind of each, and the number by which
    sources name its layer."""

    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]


# Given all sites, the plan that is stored for their model; None where there is none.
Stored = Callable[[Sequence[Candidate]], Planned | None]


def policy_of(config: LokiConfig, stored: Stored = lambda candidates: None) -> Policy:
    """The policy that options ask for. `stored` is asked for that of `"tidal"`, or of a file."""
    name = config.policy if isinstance(config.policy, str) else ""
    plan = name in PLANS or bool(config.plan_file)
    reuses = plan or any(kind.reuse for kind in config.kinds)

    def make(ranking: str, dense: bool) -> Choice:
        per_head = config.share == "head" or name == "tidal-published"
        by_probability = config.group_choice == "probability" or name == "kascade"
        budget = config.budget
        if budget.recent == 0 and reuses:
            budget = dataclasses.replace(budget, recent=1)  # a reader's newest key is no other's
        found = RANKINGS[ranking] if ranking else None
        return Choice(found, budget, per_head, by_probability, dense_result=dense)

    def choose(candidates: Sequence[Candidate]) -> list[Choice]:
        layers = [candidate.site.layer(number) for number, candidate in enumerate(candidates)]
        if plan:
            found = stored(candidates) if name == "tidal" or config.plan_file else None
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
        # The first that is named, for a layer that would reuse and has nobody to reuse from.
        instead = next((kind.ranking for kind in config.kinds if kind.ranking), "loki")
        return choices_of(candidates, of_sites, layers, make, instead)

    return choose
