"""What a decoded token must read, in bytes: from the shapes of weights and caches, and the budget.

Counted once each: every weight that a token goes through (of experts, the share that is chosen),
and of each layer the keys and values of all tokens, or what its policy reads to rank them and those
of the chosen ones. Copies, activations, and what is read twice are not: a way that does more than
it must shows a smaller share of the machine's limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loki_compile.config import LokiConfig
from loki_compile.head_reads import budgets_in
from loki_compile.kernels.spans import Spans
from loki_compile.policies.kinds import BY_KEYS, SPANS, kind_of
from loki_compile.report import SiteReport


@dataclass(frozen=True)
class Layer:
    """Bytes that one layer's cache holds for each token, keys and values of all its KV heads;
    `most` tokens that it shows a query (None: all)."""

    key: int
    value: int
    most: int | None = None

    def shown(self, tokens: int) -> int:
        return tokens if self.most is None else min(tokens, self.most)

    def whole(self, tokens: int) -> int:
        """Bytes of attention over all of so many tokens."""
        return self.shown(tokens) * (self.key + self.value)


def layers_of(cache: Any) -> list[Layer]:
    """The layers of a filled cache of transformers."""
    found = []
    for layer in cache.layers:
        most = None
        if getattr(layer, "is_sliding", False):
            most = getattr(layer, "sliding_window", None) or layer.max_cache_len
        key, value = (x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()
                      for x in (layer.keys, layer.values))  # fmt: skip
        found.append(Layer(key, value, most))
    return found


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that each token goes through."""
    chosen = _share_of_experts(getattr(model, "config", None))
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    looked_up = head is None or head.weight is not table  # of the table itself, one row is read
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter is table and looked_up:
            continue
        share = chosen if ".experts." in name else 1.0
        total += share * parameter.numel() * parameter.element_size()
    return int(total)


def _share_of_experts(config: Any) -> float:
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if chosen and (experts := getattr(config, name, None)):
            return float(chosen / experts)
    return 1.0


def cache_bytes(
    layers: Sequence[Layer],
    tokens: int,
    sites: Sequence[SiteReport] | None = None,
    config: LokiConfig | None = None,
) -> int | None:
    """Bytes that attention reads of the caches for one query behind `tokens` tokens.

    Args:
      sites: of a sparse step, one for each layer, in order; None for dense attention.
      config: the options of that step.

    Returns:
      None where the sites are not those of the layers, one each, or a spectrum decides the rank.
    """
    if sites is None or config is None:
        return sum(layer.whole(tokens) for layer in layers)
    if len(sites) != len(layers):
        return None
    total = 0.0
    for layer, site in zip(layers, sites, strict=True):
        ranking = _ranking_bytes(layer, tokens, site)
        if ranking is None:
            return None
        total += ranking
        if site.outcome != "sparse":
            total += layer.whole(tokens) if site.policy not in BY_KEYS else layer.value * tokens
            continue
        seen = layer.shown(tokens)
        chosen = keys_read(site, config, seen)
        if not site.spans and config.share == "head" and site.query_heads and site.kv_heads:
            chosen = min(seen, chosen * (site.query_heads // site.kv_heads))
        total += chosen * (layer.key + layer.value)
    return int(total)


def keys_read(site: SiteReport, config: LokiConfig, visible: int) -> int:
    """Keys that a row which sees so many reads at a sparse site; where KV heads read spans, or by
    budgets of their own, on average of them."""
    if site.budgets:
        keys = budgets_in(site.budgets, config).keys(visible)
        return round(sum(keys) / len(keys))
    if not site.spans:
        return config.budget.keys(visible)
    kind = kind_of(site.spans)
    spans = Spans(kind.spans, kind.sink, max(config.recent, 1), config.min_context)
    return round(spans.share(visible) * visible)


def _ranking_bytes(layer: Layer, tokens: int, site: SiteReport) -> float | None:
    """What is read to choose: what is kept beside the cache, the keys themselves, or nothing."""
    part = 1.0
    if site.ranking_heads is not None and site.kv_heads:
        part = site.ranking_heads / site.kv_heads
    if site.policy in BY_KEYS:
        return layer.key * layer.shown(tokens) * part
    if not site.policy or site.policy == SPANS or site.policy.startswith("reuse"):
        return 0.0
    if site.index_bytes_per_token is None:
        return None
    return site.index_bytes_per_token * layer.shown(tokens) * part
