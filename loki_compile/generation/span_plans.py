"""The spans that each layer of a model reads, by a plan, without a graph of it: for caches that are
made before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from loki_compile.config import LokiConfig
from loki_compile.kernels.spans import Span, Spans
from loki_compile.pca_store.fingerprint import weights_fingerprint
from loki_compile.pca_store.layer_plan import SPANS_SUFFIX, LayerPlan, read_plan, stored_plans
from loki_compile.plan_words import kinds_of
from loki_compile.policies.kinds import SPANS, Kind
from loki_compile.policies.table import spans_of
from loki_compile.published import published_spans

_WHOLE = Span.of((0, 1.0))


def spans_of_layers(
    model: Any, config: LokiConfig, layers: int, query_heads: int, kv_heads: int
) -> tuple[Spans, ...]:
    """What the heads of each layer read under `config.policy`, a span for every KV head.

    Raises:
      ValueError: a layer that may read any key, no stored plan, or one of another model.
    """
    found = []
    for layer, kind in enumerate(_kinds(model, config, layers, query_heads, kv_heads)):
        if kind == Kind(dense=True):
            spans = Spans((_WHOLE,), config.sink)
        elif kind.ranking == SPANS and kind.spans:
            spans = spans_of(kind, kv_heads, f"layer {layer}", config)
        else:
            raise ValueError(
                f"plan={config.policy!r}: layer {layer} is to do {str(kind)!r}, which may read any "
                'key: needs layers of spans, such as "moa:64:1024,0.25N", or "dense".'
            )
        heads = spans.heads * (kv_heads // len(spans.heads))
        found.append(dataclasses.replace(spans, heads=heads))
    return tuple(found)


def _kinds(
    model: Any, config: LokiConfig, layers: int, query_heads: int, kv_heads: int
) -> Sequence[Kind]:
    if config.plan_file:
        published = published_spans(config.plan_file)
        if published is None:
            return _of_plan(read_plan(config.plan_file), model, config)
        try:
            if len(published.layers) != layers:
                raise ValueError(f"it has {len(published.layers)} layers, and the model {layers}")
            return [published.kind(layer, query_heads, kv_heads) for layer in range(layers)]
        except ValueError as error:
            raise ValueError(
                f"plan={config.policy!r}: {error}: needs a plan of this very model"
            ) from None
    kinds = [config.kind_of_layer(layer) for layer in range(layers)]
    if Kind(SPANS) in kinds:
        weights = _weights(model)
        for plan in stored_plans(suffix=SPANS_SUFFIX):
            if len(plan.layers) == layers and _knows(plan, weights):
                planned = kinds_of(plan)
                break
        else:
            raise ValueError(
                f"plan={config.policy!r}: found no plan of spans that is stored for this model: "
                'needs `loki tune --policy moa`, or spans by hand, such as "moa:64:1024".'
            )
        kinds = [
            of_plan if kind == Kind(SPANS) else kind
            for kind, of_plan in zip(kinds, planned, strict=True)
        ]
    return kinds


def _of_plan(plan: LayerPlan, model: Any, config: LokiConfig) -> Sequence[Kind]:
    if not _knows(plan, _weights(model)):
        raise ValueError(
            f"plan={config.policy!r}: that plan is of {plan.model or 'another model'}: needs one "
            "of this very model, by `loki tune --policy moa`."
        )
    return kinds_of(plan)


def _weights(model: Any) -> set[str]:
    return {weights_fingerprint(p) for p in model.parameters() if p.ndim == 2}


def _knows(plan: LayerPlan, weights: set[str]) -> bool:
    return all(layer.weights in weights for layer in plan.layers)
