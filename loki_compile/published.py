"""Plans of spans as others publish them: MoA's JSON and DuoAttention's tables of gates.

They name layers and heads by number alone, so that nothing binds them to a model but how many there
are. MoA's are of query heads: a KV head reads what the widest of its query heads would.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loki_compile.kernels.spans import MOST_KEYS, Span, Spans
from loki_compile.pca_store.layer_plan import PlanFileError
from loki_compile.policies.kinds import SPANS, Kind

TABLE = ".tsv"
# MoA's cache holds its first block of keys and at least one more.
_MOA_SINK, _MOA_LEAST = 64, 64
# What DuoAttention's streaming heads read where the file beside a table does not say: as evaluated
# (arXiv 2410.10819, section 3.1).
_DUO_SINK, _DUO_RECENT = 64, 256
_DUO_FULL = 0.5
_MAX_BYTES = 64 << 20
_WHOLE = Span.of((0, 1.0))


@dataclass(frozen=True)
class PublishedSpans:
    """Of each layer the span of each query head, or KV head where `of_kv_heads`, behind the `sink`
    first keys."""

    origin: str
    layers: tuple[tuple[Span, ...], ...]
    sink: int
    of_kv_heads: bool = False

    def kind(
        self, layer: int, query_heads: int, kv_heads: int, *, interleaved: bool = False
    ) -> Kind:
        """What a layer does, for its KV heads; `interleaved` as `AttentionSite` has it.

        Raises:
          ValueError: fewer layers, or another number of heads. A process that has some of a
            model's heads cannot tell which: a file that counts them all is none for it.
        """
        if layer >= len(self.layers):
            raise ValueError(f"it has {len(self.layers)} layers, and the model a layer {layer}")
        heads = self.layers[layer]
        here, what = (kv_heads, "KV heads") if self.of_kv_heads else (query_heads, "query heads")
        if len(heads) != here:
            raise ValueError(
                f"it has {len(heads)} {what} in layer {layer}, the model {here} in this process"
            )
        group = len(heads) // kv_heads
        if interleaved:
            groups = [heads[first::kv_heads] for first in range(kv_heads)]
        else:
            groups = [heads[first : first + group] for first in range(0, len(heads), group)]
        return Kind(SPANS, spans=tuple(map(_widest, groups)), sink=self.sink)

    def share(self, visible: int, layers: Sequence[int]) -> float:
        """Of so many keys the share that its own heads would read in these layers on average."""
        read = [Spans(self.layers[layer], self.sink).share(visible) for layer in layers]
        return math.fsum(read) / max(len(read), 1)


def _widest(heads: Sequence[Span]) -> Span:
    return Span.of(*((alpha, beta / 65536) for head in heads for alpha, beta in head.lines))


def published_spans(path: str) -> PublishedSpans | None:
    """What a file holds that others published; None where it is a plan of ours, or nothing that
    names spans, which is `read_plan`'s to tell.

    path: of MoA's JSON, or of DuoAttention's `full_attention_heads.tsv`: half of its heads read all
    keys, or, with "FILE.tsv@0.25", a quarter.

    Raises:
      PlanFileError: it is damaged, or there is no such table.
    """
    name, _, share = path.partition(f"{TABLE}@")
    try:
        if share or path.endswith(TABLE):
            return _duo(_path(name + TABLE if share else path), float(share or _DUO_FULL))
        given = _json(_path(path))
        return _moa(_path(path), given) if isinstance(given, dict) and "alphas" in given else None
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise PlanFileError(
            f"{path} is no plan of spans ({reason}): needs MoA's JSON with alphas and betas, "
            "DuoAttention's full_attention_heads.tsv, or a plan by `loki tune --policy moa`"
        ) from None


def _json(file: Path) -> Any:
    """What it holds; None where it cannot be read, or is too large."""
    try:
        return None if file.stat().st_size > _MAX_BYTES else json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _path(path: str) -> Path:
    return Path(os.path.expanduser(path))


def _moa(file: Path, given: dict[str, Any]) -> PublishedSpans:
    if given.keys() != {"alphas", "betas"}:
        raise ValueError(f"it has {sorted(given)}; needed ['alphas', 'betas']")
    alphas, betas = given["alphas"], given["betas"]
    if [len(row) for row in alphas] != [len(row) for row in betas] or not all(alphas):
        raise ValueError("its alphas and betas are not of the same layers and heads")
    layers = tuple(
        tuple(Span.of((alpha, beta), (_MOA_LEAST, 0.0)) for alpha, beta in zip(*row, strict=True))
        for row in zip(alphas, betas, strict=True)
    )
    if not layers:
        raise ValueError("it has no layers")
    return PublishedSpans(file.name, layers, _MOA_SINK)


def _duo(file: Path, full: float) -> PublishedSpans:
    if not 0.0 <= full <= 1.0:
        raise ValueError(f"found a share {full} of heads that read all; needed 0 to 1")
    rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
    gates = [[float(gate) for gate in row] for row in rows]
    if not gates or any(len(row) != len(gates[0]) for row in gates):
        raise ValueError("its rows are not all as long, a gate for each KV head")
    if not all(math.isfinite(gate) for row in gates for gate in row):
        raise ValueError("a gate of it is no number")
    sizes: Any = {}
    beside = file.with_name("config.json")
    if beside.exists():
        sizes = json.loads(beside.read_bytes())
    if not isinstance(sizes, dict):
        raise ValueError(f"config.json beside it holds a {type(sizes).__name__}; needed an object")
    sink = _size(sizes, "deploy_sink_size", _DUO_SINK)
    recent = _size(sizes, "deploy_recent_size", _DUO_RECENT)
    order = sorted((gate, -layer, -head) for layer, row in enumerate(gates)
                   for head, gate in enumerate(row))  # fmt: skip
    whole = {(-layer, -head) for _, layer, head in order[len(order) - round(full * len(order)) :]}
    streaming = Span.of((recent, 0.0))
    layers = tuple(
        tuple(_WHOLE if (layer, head) in whole else streaming for head in range(len(row)))
        for layer, row in enumerate(gates)
    )
    return PublishedSpans(f"{file.parent.name}/{file.name}", layers, sink, of_kv_heads=True)


def _size(sizes: dict[str, Any], name: str, unsaid: int) -> int:
    size = sizes.get(name)
    if size is None:
        return unsaid
    if type(size) is not int or not 0 <= size <= MOST_KEYS:
        raise ValueError(f"config.json beside it has {name} {size!r:.40}; needed a count of keys")
    return size
