"""What ran, counted per model and by reason: `stats()`; and what is said once, aloud.

Notices go to the logger `loki_compile.notices` as warnings, so that they are seen where nobody has
configured logging: `logging.getLogger("loki_compile.notices").setLevel("ERROR")` silences them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils.weak import WeakTensorKeyDictionary

from loki_compile.kernels import span_prefill
from loki_compile.readings import Reading, Readings, joined
from loki_compile.report import given_up

log = logging.getLogger("loki_compile")
_notices = logging.getLogger("loki_compile.notices")


class Because(str, Enum):
    """Why a step of a graph that can be sparse ran dense."""

    SHORT = "short"  # fewer visible keys than min_context
    COVERED = "covered"  # the budget reads all of them
    PREFILL = "prefill"  # more new tokens than are decoded sparsely
    EXACT = "exact"  # asked for, by `exact`
    RESTING = "resting"  # drafts do not pay: without the writes into indexes
    EMPTY = "empty"  # no key yet to fit a basis from
    HELD_BACK = "held back"  # indexes were built again and again, and not used twice
    SHORTAGE = "shortage"  # no memory for an index; tried again later
    GAVE_UP = "gave up"  # the sparse variant cannot be built or has failed


_OF_SPAN_CACHES = ("span_cache_prompts", "span_cache_steps")
_STEPS = ("sparse_steps", "dense_steps", "interpreted_steps", "rebuilds", "fitted_bases")

_lock = threading.RLock()
_tallies: dict[str, Tally] = {}
_owners: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_said: set[Any] = set()
_bytes_now = _bytes_most = 0
_attention = False


class Tally:
    """The counts of one model."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.counts: Counter[str] = Counter()
        self.dense_because: Counter[str] = Counter()
        self.readings: dict[tuple[str, ...], Readings] = {}
        self.span_cache: Tensor | None = None

    def of_span_caches(self, device: torch.device) -> Tensor:
        """int64 (2,): prompts and steps that caches of spans served. It lies on the device of the
        model, is added to there, and is one for all caches of the model."""
        with _lock, torch.inference_mode(False):
            if self.span_cache is None:
                self.span_cache = torch.zeros(2, dtype=torch.int64, device=device)
            return self.span_cache

    def served_by_spans(self) -> dict[str, int]:
        """What `of_span_caches` holds, by the names of `stats`."""
        held = [0, 0] if self.span_cache is None else self.span_cache.tolist()
        return dict(zip(_OF_SPAN_CACHES, held, strict=True))

    def readings_of(self, paths: tuple[str, ...]) -> Readings:
        """What the sites of these paths read: one for all graphs that have the same."""
        found = self.readings.get(paths)
        return self.readings.setdefault(paths, Readings(paths)) if found is None else found

    def add(self, name: str, amount: int = 1) -> None:
        """Adds to one of the counts of `stats`."""
        with _lock:
            self.counts[name] += amount
            counters["loki"][name] += amount

    def dense(self, why: Because) -> None:
        """Counts a dense step."""
        with _lock:
            self.dense_because[why.value] += 1
            self.add("dense_steps")

    def clear(self) -> None:
        """Sets the counts back to zero."""
        self.counts.clear()
        self.dense_because.clear()
        if self.span_cache is not None:
            self.span_cache.zero_()
        for readings in self.readings.values():
            readings.clear()


def tally_of(gm: fx.GraphModule, inputs: Sequence[Any]) -> Tally:
    """The counts of the model that a graph was traced from.

    Graphs that take in the same parameter are of one model. It is named after the class whose
    forward was traced, with a number where another model of that class was there before.
    """
    parameters = [value for value in inputs if isinstance(value, nn.Parameter)]
    with _lock:
        known = next((_owners[p] for p in parameters if p in _owners), None)
        tally = known or _new_tally(_root_class(gm))
        for parameter in parameters:
            _owners.setdefault(parameter, tally)
    return tally


def tally_for(parameters: Iterable[nn.Parameter]) -> Tally | None:
    """The counts of the model that these are of; None where no graph of it was compiled."""
    with _lock:
        return next((_owners[p] for p in parameters if p in _owners), None)


def tally_of_model(model: nn.Module) -> Tally:
    """The counts of a model, of which no graph may have been compiled yet."""
    parameters = list(model.parameters())
    with _lock:
        tally = tally_for(parameters) or _new_tally(type(model).__name__)
        for parameter in parameters:
            _owners.setdefault(parameter, tally)
    return tally


def _new_tally(name: str) -> Tally:
    label, number = name, 2
    while label in _tallies:
        label, number = f"{name} ({number})", number + 1
    return _tallies.setdefault(label, Tally(label))


def _root_class(gm: fx.GraphModule) -> str:
    """The class of the outermost module that Dynamo's notes on the graph's calls name."""
    for node in gm.graph.nodes:
        for _, kind in node.meta.get("nn_module_stack", {}).values():
            return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]
    return "a function"


def steps_taken() -> int:
    """Sparse and dense steps of all models since import or `reset_stats`."""
    with _lock:
        steps = (t.counts[name] for t in _tallies.values() for name in _STEPS[:2])
        return sum(steps)


def stats() -> dict[str, Any]:
    """Counts since import or `reset_stats`, as in `torch._dynamo.utils.counters["loki"]`.

    sparse_steps, dense_steps: calls by variant, of graphs that can be sparse (a prefill that was
    traced as such is none); dense_because: the dense ones by reason, the values of `Because`;
    interpreted_steps: calls, of either variant, that ran node by node, since the sizes were not
    those that Inductor had compiled for; rebuilds: indexes projected anew from a cache;
    fitted_bases: bases fitted because none was stored; index_bytes, peak_index_bytes: memory of the
    indexes alive now, and the most since `reset_stats`; given_up: what Dynamo runs eagerly, counted
    nowhere, and what to set (see `given_up`); models: the same counts for each model, and, by a
    budget of mass or with `watch_mass`, layers: of each site by its path the means over rows and
    sparse steps, keys that a row reads, and left_out, the share of attention on others as the
    scores that rank keys estimate it. These lie on the device, and are read by this call, as are
    span_cache_prompts and span_cache_steps: calls that a `SpanCache` served, compiled or not.

    span_prefills: attention of prompts, a layer each, that read spans under `prefill="spans"`;
    span_prefills_dense_because: that read all keys in spite of it, by reason: "mask" (it hides more
    than later tokens), "wide" (spans read too much for it to pay), "not compiled". A graph whose
    plan says that it is dense (`reports()`) is in neither.
    """
    with _lock:
        layers = {tally.model: _layers(tally) for tally in _tallies.values()}
        served = {tally.model: tally.served_by_spans() for tally in _tallies.values()}
        each: dict[str, dict[str, Any]] = {
            tally.model: {
                **{name: tally.counts[name] for name in _STEPS},
                **served[tally.model],
                "dense_because": dict(tally.dense_because),
                **({"layers": layers[tally.model]} if layers[tally.model] else {}),
            }
            for tally in _tallies.values()
            if tally.counts or any(served[tally.model].values())
        }
        because = sum((tally.dense_because for tally in _tallies.values()), Counter())
        return {
            **{
                name: sum(counts[name] for counts in each.values())
                for name in (*_STEPS, *_OF_SPAN_CACHES)
            },
            "dense_because": dict(because),
            "span_prefills": span_prefill.ran[""],
            "span_prefills_dense_because": {why: n for why, n in span_prefill.ran.items() if why},
            "index_bytes": _bytes_now,
            "peak_index_bytes": _bytes_most,
            "given_up": given_up(),
            "models": each,
        }


def _layers(tally: Tally) -> dict[str, dict[str, float]]:
    found = joined([readings.read() for readings in tally.readings.values()])
    return {path: {"keys": each.keys, "left_out": each.left_out} for path, each in found.items()}


def reset_stats() -> None:
    """Sets the counts of `stats` back to zero; indexes and bases stay."""
    global _bytes_most
    with _lock:
        for tally in _tallies.values():
            tally.clear()
        counters["loki"].clear()
        span_prefill.ran.clear()
        _bytes_most = _bytes_now


def hold_bytes(change: int) -> None:
    """Takes note of memory that indexes have taken (> 0) or given back (< 0), in bytes."""
    global _bytes_now, _bytes_most
    with _lock:
        _bytes_now += change
        _bytes_most = max(_bytes_most, _bytes_now)


def say_once(key: Any, sentence: str | Callable[[], str]) -> None:
    """Says a sentence aloud the first time it comes with this key; afterwards at level INFO."""
    with _lock:
        first = key not in _said
        _said.add(key)
    if first or log.isEnabledFor(logging.INFO):
        text = sentence if isinstance(sentence, str) else sentence()
        _notices.log(logging.WARNING if first else logging.INFO, "loki_compile: %s", text)


def warn_of_left_out(most: float, tally: Tally, layers: dict[str, Reading]) -> None:
    """Warns, once of each layer, of those that leave out more than `most` of their attention."""
    worst: list[tuple[float, str]] = []
    for path, reading in layers.items():
        key = (tally.model, "left out", path)
        with _lock:
            if reading.left_out > most and key not in _said:
                _said.add(key)
                worst.append((reading.left_out, path))
    if not worst:
        return
    share, path = max(worst)
    others = f" and {len(worst) - 1} other layers" if len(worst) > 1 else ""
    _notices.warning(
        "loki_compile: %s: %s%s leave out %.1f %% of attention or less, more than watch_mass=%g "
        "(means so far, as the scores that rank keys estimate it): raise top_k, or its ceiling, "
        "or rank. loki_compile.stats() has every layer.",
        tally.model, path, others, 100 * share, most,
    )  # fmt: skip


def forget_notices() -> None:
    """What was said may be said again."""
    global _attention
    with _lock:
        _said.clear()
        _attention = False


def note_attention() -> None:
    """Some graph of the process holds attention, sparse or not."""
    global _attention
    _attention = True


def attention_noted() -> bool:
    return _attention


def say_compiling(tally: Tally, what: str, sites: int) -> None:
    """Each time where that takes minutes, else once."""
    again = time.monotonic() if sites >= _LONG else None
    say_once(
        (tally.model, what, sites, again),
        f"{tally.model}: compiling {what} ({sites} attention sites). A large model takes minutes; "
        "later calls of these sizes reuse it.",
    )


_LONG = 8  # attention sites of a graph from which on a compilation is long
