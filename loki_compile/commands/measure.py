"""Quality and speed of decoding, measured on the decode path itself: one token at a time.

A *step* is what `model(...)` is: the model, or what `torch.compile` made of it. Every function here
prefills eagerly and then calls the step with one token and a cache, as `generate` does.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loki_compile.explanation import explain
from loki_compile.report import GraphReport

Step = Callable[..., Any]

# The first steps of a variant compile, fit a basis or build an index.
WARM_UP_STEPS = 3
# One model, several backends and cache lengths: Dynamo must not give up on the code they share.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Trace:
    """What one variant made of a given text, for each token that was fed to it.

    nats: -log of the probability of the token that truly follows. predicted: the token with the
    highest logit. seconds: time of the step.
    """

    nats: tuple[float, ...]
    predicted: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.nats))

    @property
    def tokens_per_second(self) -> float:
        """Of the median step, warm-up left out."""
        return 1 / statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)

    def agreement(self, other: Trace) -> float:
        """Share of positions where both predict the same token."""
        same = [a == b for a, b in zip(self.predicted, other.predicted, strict=True)]
        return statistics.fmean(same)

    def joined(self, other: Trace) -> Trace:
        return Trace(
            self.nats + other.nats, self.predicted + other.predicted, self.seconds + other.seconds
        )


@contextmanager
def many_variants() -> Iterator[None]:
    """Lets several backends and cache lengths compile one model's code."""
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield


def variants(
    model: Any, options: dict[str, dict[str, Any]], *, dynamic: bool | None = None
) -> dict[str, Step]:
    """Eager, Inductor, and loki under each name of `options`; `dynamic` as in torch.compile."""
    steps: dict[str, Step] = {"eager": model, "inductor": torch.compile(model, dynamic=dynamic)}
    for name, chosen in options.items():
        steps[name] = torch.compile(model, backend="loki", options=chosen, dynamic=dynamic)
    return steps


def new_cache(model: Any, kind: str, slots: int) -> Any:
    """An empty transformers cache; `slots` tokens fit a "static" one."""
    from transformers import DynamicCache, StaticCache

    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=slots)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Fills the cache with ids (1, T), eagerly; returns the last token's logits (vocabulary,)."""
    out = model(ids, past_key_values=cache, use_cache=True, **_last_logits(model))
    return out.logits[0, -1]


def _last_logits(model: Any) -> dict[str, int]:
    """What has a model make the last token's logits alone, where it can."""
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if keep else {}


def decode_reports(
    model: Any, cache_kind: str, slots: int, options: dict[str, Any]
) -> list[GraphReport]:
    """The reports of one decode step behind a short prompt, in a cache of `slots` slots."""
    cache = new_cache(model, cache_kind, slots)
    ids = torch.zeros(1, 9, dtype=torch.long, device=model.device)
    prefill(model, ids, cache)
    step = ids[:, :1]
    return explain(model, step, past_key_values=cache, use_cache=True, options=options)


def prompt_reports(
    model: Any, cache_kind: str, tokens: int, options: dict[str, Any]
) -> list[GraphReport]:
    """The reports of a prompt of so many tokens, into an empty cache, under the mask that
    `generate` gives; the model reads it, once."""
    cache = new_cache(model, cache_kind, tokens + 1)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    asked = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "use_cache": True}
    asked.update(_last_logits(model))
    return explain(model, ids, **asked, options=options)


def slot_classes(model: Any, paths: Sequence[str], options: dict[str, Any]) -> list[int]:
    """Of each layer by its path, its class of slots in a decode step: layers of one class can read
    what another of it chose."""
    reports = decode_reports(model, "dynamic", 64, {**options, "policy": {"*": "reuse"}})
    of: dict[str, str] = {}
    for site in (site for report in reports for site in report.sites):
        if site.outcome == "sparse":
            of[site.path] = site.reads or site.path
    names = list(dict.fromkeys(of.get(path, path) for path in paths))
    return [names.index(of.get(path, path)) for path in paths]


@torch.no_grad()
def follow(
    model: Any,
    step: Step,
    ids: Tensor,
    start: int,
    cache: Any,
    told: Callable[[int], None] | None = None,
) -> Trace:
    """Prefills ids[:start], then feeds the rest token by token whatever is predicted.

    Args:
        ids: (T,) int64.
        start: 1 <= start < T - 1. The token at `start` is the first that is fed; the prediction
            for the token at `start + 1` is the first that counts.
        told: called with 1 behind each step.
    """
    prefill(model, ids[None, :start], cache)
    nats, predicted, seconds = [], [], []
    for position in range(start, len(ids) - 1):
        begin = time.perf_counter()
        out = step(ids[None, position : position + 1], past_key_values=cache, use_cache=True)
        logits = out.logits[0, -1].float()
        predicted.append(int(logits.argmax()))  # waits for the device
        seconds.append(time.perf_counter() - begin)
        nats.append(-float(logits.log_softmax(-1)[ids[position + 1]]))
        if told is not None:
            told(1)
    return Trace(tuple(nats), tuple(predicted), tuple(seconds))


@torch.no_grad()
def generate(model: Any, step: Step, ids: Tensor, new_tokens: int, cache: Any) -> list[int]:
    """Greedy decoding behind ids (T,): the new tokens."""
    token = prefill(model, ids[None], cache).argmax().view(1, 1)
    tokens = [int(token)]
    for _ in range(new_tokens - 1):
        out = step(token, past_key_values=cache, use_cache=True)
        token = out.logits[0, -1].argmax().view(1, 1)
        tokens.append(int(token))
    return tokens


def recall_of(trace: Trace, start: int, queries: Sequence[tuple[int, list[int]]]) -> list[bool]:
    """For each query of a recall prompt that was fed from `start` on: is the answer predicted?"""
    return [trace.predicted[position - start] == answer[0] for position, answer in queries]


@torch.no_grad()
def filled_cache(model: Any, kind: str, context: int, room: int) -> Any:
    """A cache that holds `context` tokens of noise, without running them through the model.

    Raises:
        ValueError: a layer whose cache does not hold one key per token.
    """
    cache = new_cache(model, kind, context + room)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    for number, layer in enumerate(cache.layers):
        known = (
            "DynamicLayer",
            "DynamicSlidingWindowLayer",
            "StaticLayer",
            "StaticSlidingWindowLayer",
        )
        if type(layer).__name__ not in known:
            raise ValueError(
                f"layer {number} caches in a {type(layer).__name__}; a latency needs one of "
                f"{', '.join(known)}: a model whose layers all attend."
            )
        if kind == "dynamic":
            held = context
            if layer.is_sliding:  # it holds what the next token sees beside itself
                held = min(context, layer.sliding_window - 1)
                layer.cumulative_length = context
            shape = (*layer.keys.shape[:2], held, layer.keys.shape[3])
            layer.keys, layer.values = (
                layer.keys.new_empty(shape),
                layer.values.new_empty((*shape[:3], layer.values.shape[3])),
            )
        else:
            layer.cumulative_length.fill_(context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = context
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def room_for(rounds: int, steps_per_round: int = 4) -> int:
    """Tokens that `latencies` decodes behind a context."""
    return WARM_UP_STEPS + rounds * steps_per_round


@torch.no_grad()
def latencies(
    model: Any,
    steps: dict[str, Step],
    context: int,
    *,
    cache: str = "static",
    rounds: int = 5,
    steps_per_round: int = 4,
    room: int = 64,
    most_seconds: float = math.inf,
    begin: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Milliseconds per token of each variant behind `context` cached tokens, in one run.

    Each variant has its own cache of noise, with room for `room` more tokens (at least as many as
    are timed); rounds are interleaved, and the median counts. `most_seconds` ends the rounds early,
    after the first. `begin` is told what begins and, as far as that is known, how long it takes.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    room = max(room, room_for(rounds, steps_per_round))
    caches, a_round = {}, 0.0
    for name, step in steps.items():
        if begin is not None:
            begin(f"{name}: first steps" + (", Inductor compiles" if step is not model else ""))
        caches[name] = filled_cache(model, cache, context, room)
        for _ in range(WARM_UP_STEPS):
            start = time.perf_counter()
            step(token, past_key_values=caches[name], use_cache=True).logits[0, -1, 0].item()
        a_round += (time.perf_counter() - start) * steps_per_round
    if begin is not None:
        seconds = min(a_round * rounds, most_seconds)
        begin(f"measuring {', '.join(steps)} in turn, about {math.ceil(seconds)} s")
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - started > most_seconds:
            break
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(steps_per_round):
                out = step(token, past_key_values=caches[name], use_cache=True)
            out.logits[0, -1, 0].item()  # waits for the device
            times[name].append((time.perf_counter() - start) * 1e3 / steps_per_round)
    return {name: statistics.median(samples) for name, samples in times.items()}
