"""The plan of layers that `loki tune` has stored for a model, or that options name, for the sites
of one graph of it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from loki_compile.config import LokiConfig
from loki_compile.kernels.spans import Spans
from loki_compile.passes.graphs import nearest_matrix, parameter_test
from loki_compile.passes.policy import Candidate
from loki_compile.passes.shared_caches import Part, with_parts
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.layer_plan import (
    BUDGETS_SUFFIX,
    SPANS_SUFFIX,
    SUFFIX,
    USED,
    PlannedLayer,
    any_plan,
    find_plan,
    read_plan,
)
from loki_compile.pca_store.metadata import run_of
from loki_compile.plan_words import differing, kinds_of
from loki_compile.policies.head_budgets import HeadBudget
from loki_compile.policies.kinds import BUDGETED, SPANS, Kind, kind_of
from loki_compile.policies.table import SHARE_AT, Planned
from loki_compile.published import PublishedSpans, published_spans

log = logging.getLogger("loki_compile")

# The plans of policies that have one of their own; those of all layers share the other kind.
_SUFFIXES = {SPANS: SPANS_SUFFIX, BUDGETED[0]: BUDGETS_SUFFIX}


class PlanOfModel:
    """Finds the plan once a policy asks for it; `origin` says, in words, which it got, if any, and
    `set_aside` why one that is stored and was better than one budget for all does not serve."""

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        parts: Sequence[Part],
        config: LokiConfig,
    ) -> None:
        self.gm = gm
        self.inputs = with_parts(example_inputs, parts)
        self.config = config
        self.origin = ""
        self.set_aside = ""

    def __call__(self, candidates: Sequence[Candidate], policy: str) -> Planned | None:
        """What the plan of a policy has each site do; None where there is no plan for the model.

        Raises:
          ValueError: the plan that the options name is damaged, or of another model; a word of
            the plan is none.
        """
        if self.config.plan_file:
            published = published_spans(self.config.plan_file)
            if published is not None:
                return self._published(published, candidates)
        chosen, suffix = self.config.plan_file, _SUFFIXES.get(policy, SUFFIX)
        if not chosen and not any_plan(suffix=suffix):
            return None  # before weights are read
        weights, blocks = self._weights(candidates)
        rows = dict(zip(weights, blocks, strict=True))
        known = [each for each in weights if each]
        plan = read_plan(chosen) if chosen else find_plan(known, rows, suffix=suffix)
        if plan is None or (suffix == BUDGETS_SUFFIX and plan.scores.get(USED) is not True):
            return None
        other = differing(plan, self.config)
        if suffix == BUDGETS_SUFFIX and other:
            self.set_aside = other  # one budget for all may be better there
            return None
        kinds_of(plan)  # refuses what a graph of some of its layers would not come across
        kinds: list[Kind] = []
        layers: list[int] = []
        uses: dict[str, int] = {}
        for number, candidate in enumerate(candidates):
            each = weights[number]
            place = plan.layer_of(each, blocks[number], uses.get(each, 0)) if each else None
            uses[each] = uses.get(each, 0) + 1
            if each and place is None:
                raise ValueError(
                    f"policy={chosen!r}: that plan is of {plan.model or 'a model'} with "
                    f"{len(plan.layers)} layers, and none of these has the key weights of "
                    f"{candidate.site.path or f'site {number}'} ({each[:12]}): needs a plan of "
                    'this very model, by `loki tune`, or policy="tidal".'
                )
            if place is None:  # nothing is known of it: it chooses, and nobody names it
                kinds.append(Kind("loki"))
                layers.append(len(plan.layers) + number)
                continue
            kinds.append(of_site(plan.layers[place], candidate.site.kv_heads, blocks[number]))
            layers.append(place)
        self.origin = f"as `loki tune` found {plan.created[:10]}" + (f"; {other}" if other else "")
        return Planned(tuple(kinds), tuple(layers), self.origin)

    def _published(
        self, published: PublishedSpans, candidates: Sequence[Candidate]
    ) -> Planned | None:
        layers = [candidate.site.layer(number) for number, candidate in enumerate(candidates)]
        unnumbered = [each.site.path for each in candidates if each.site.layer(-1) < 0]
        try:
            if unnumbered and len(candidates) != len(published.layers):
                raise ValueError(
                    f"it has {len(published.layers)} layers, and which of them "
                    f"{unnumbered[0] or 'a site'} is cannot be told in a graph of "
                    f"{len(candidates)} (a graph break in a layer?)"
                )
            kinds = tuple(
                published.kind(layer, site.query_heads, site.kv_heads, interleaved=site.interleaved)
                for layer, site in zip(layers, (each.site for each in candidates), strict=True)
            )
        except ValueError as error:
            raise ValueError(
                f"policy={self.config.plan_file!r}: {error}: needs a plan of this very model, or "
                '`loki tune --policy moa` and policy="moa".'
            ) from None
        own = published.share(SHARE_AT, layers)
        folded = [Spans(kind.spans, kind.sink).share(SHARE_AT) for kind in kinds]
        more = math.fsum(folded) / max(len(folded), 1)
        self.origin = f"as published in {published.origin}"
        if len(kinds) > 1 and abs(more - own) > 5e-4:
            self.origin += (
                f", whose heads of their own would read {own:.1%}: KV heads read {more:.1%}"
            )
        return Planned(kinds, tuple(layers))

    def _weights(self, candidates: Sequence[Candidate]) -> tuple[list[str], list[tuple[str, ...]]]:
        """Fingerprints of the weights that make each site's keys, and of their rows; "" where they
        cannot be read."""
        places = {node: i for i, node in enumerate(self.gm.graph.find_nodes(op="placeholder"))}
        is_parameter = parameter_test(self.gm, self.inputs)
        weights, blocks = [], []
        for candidate in candidates:
            cache = candidate.cache
            keys = candidate.keys if cache is None else cache.new_keys
            weight = nearest_matrix(keys, is_parameter) if keys else None
            matrix = None if weight is None else self.inputs[places[weight]]
            weights.append("" if matrix is None else weights_fingerprint(matrix))
            dims = candidate.site.head_dim
            blocks.append(() if matrix is None else block_fingerprints(matrix, dims))
        return weights, blocks


def of_site(layer: PlannedLayer, kv_heads: int, blocks: tuple[str, ...]) -> Kind:
    """What a layer does, for a process that may have some of its heads alone: a head that would
    read what another process' head chose reads what its own number did."""
    kind = kind_of(layer.word)
    place = run_of(blocks, layer.blocks) or 0
    first = place * layer.kv_heads // max(1, len(layer.blocks))
    if len(kind.spans) == layer.kv_heads > kv_heads:
        return dataclasses.replace(kind, spans=kind.spans[first : first + kv_heads])
    if kind.budgets and layer.kv_heads > kv_heads:
        return dataclasses.replace(kind, budgets=_of_process(kind.budgets, first, kv_heads))
    if not kind.heads or len(kind.heads) == kv_heads:
        return kind
    here = [head - first for head in kind.heads[first : first + kv_heads]]
    own = [head if 0 <= head < kv_heads else number for number, head in enumerate(here)]
    return dataclasses.replace(kind, heads=tuple(own))


def _of_process(
    budgets: tuple[HeadBudget, ...], first: int, kv_heads: int
) -> tuple[HeadBudget, ...]:
    """Those of the KV heads from `first` on, by the numbers that heads have in their process."""
    own = []
    for number in range(kv_heads):
        each = budgets[first + number] if len(budgets) > 1 else budgets[0]
        if each.span is None:
            here = each.head - first
            head = here if 0 <= here < kv_heads else number
            each = dataclasses.replace(each, head=head)
        own.append(each)
    return tuple(own)
