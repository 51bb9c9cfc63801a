"""Cases decoded by each setting behind one prefill: what is measured of it, a row at a time."""

from __future__ import annotations

import copy
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loki_compile import engines, prompts
from loki_compile.backend import loki
from loki_compile.commands.measure import WARM_UP_STEPS, new_cache
from loki_compile.commands.missed import Seen, Watch
from loki_compile.commands.tasks import CHUNK, Case, score
from loki_compile.counts import reset_stats, stats

DENSE = "dense"
ENGINES = ("inductor", "nodes")
# What the question of a generated task is read by.
QUESTIONS = ("sparse", "dense")

Row = dict[str, Any]
Step = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """One way to decode: its label, the options of the backend, and fingerprints of what is stored
    that these use."""

    label: str
    options: dict[str, Any]
    uses: str = ""


class Ways:
    """A model under many settings, traced once for all of them: `now` names the one that runs."""

    def __init__(self, model: Any, settings: Sequence[Setting], engine: engines.Engine) -> None:
        self.settings = settings
        self.engine = engine
        self.now = settings[0].label if settings else ""
        self.step: Step = torch.compile(model, backend=self._backend)

    def _backend(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        runs = {
            setting.label: loki(gm, inputs, options=setting.options, engine=self.engine)
            for setting in self.settings
        }
        return lambda *args: runs[self.now](*args)


class Trials:
    """Decodes cases of one model.

    A case's context is read once, by the model compiled with the default options and run node by
    node: dense attention, and what its queries ask is noted as in a compiled prefill. Each setting
    decodes behind a copy of that cache.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Sequence[Setting],
        *,
        engine: str,
        cache: str,
        mass_steps: int,
    ) -> None:
        """
        Args:
            engine: one of ENGINES, what runs the graphs of decode steps.
            cache: "static" or "dynamic".
            mass_steps: of each text, steps of which it is noted what they read and miss.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.settings = {setting.label: setting for setting in settings}
        self.cache_kind = cache
        self.mass_steps = mass_steps
        self.watch = Watch()
        nodes = engine == "nodes"
        watched = Ways(model, settings, self.watch.engine)
        self.watched = watched
        self.ways = watched if nodes else Ways(model, settings, engines.default())
        backend = functools.partial(loki, engine=engines.interpreter)
        self.read: Step = torch.compile(model, backend=backend)
        last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.last = {"logits_to_keep": 1} if last else {}
        self.stops = _stops(model, tokenizer)
        self.before: tuple[tuple[int, ...], int, Any] = ((), 0, None)

    @torch.no_grad()
    def rows(self, case: Case, missing: dict[str, list[str]]) -> Iterator[Row]:
        """A row for each setting that is missing, by protocol: "text", or one of QUESTIONS."""
        cache = self._read(case)
        for protocol, labels in missing.items():
            if protocol == "text":
                yield from self._follow_all(case, cache, labels)
            else:
                yield from self._reply_all(case, cache, protocol, labels)

    def _read(self, case: Case) -> Any:
        """A cache that holds the context; that of the last case where it is the same."""
        context, length, cache = self.before
        if cache is None or (context, length) != (case.context, case.length):
            cache, self.before = None, ((), 0, None)  # memory that the next one may need
            cache = new_cache(self.model, self.cache_kind, case.length + CHUNK)
            if self.cache_kind == "static":  # its tensors are laid out outside compiled calls
                self.model(self._ids([0]), past_key_values=cache)
                cache.reset()
            if case.context:
                ids = self._ids(case.context)
                self.read(ids, past_key_values=cache, use_cache=True, **self.last)
            self.before = case.context, case.length, cache
        return cache

    # -- text

    def _follow_all(self, case: Case, cache: Any, labels: Sequence[str]) -> Iterator[Row]:
        dense, milliseconds = self._follow(case, copied(cache), self.model)
        if DENSE in labels:
            yield self._text_row(case, DENSE, dense, dense, milliseconds)
        for label in labels:
            if label == DENSE:
                continue
            self.ways.now = self.watched.now = label
            seen: list[Seen] = []
            if self.ways is not self.watched:
                self._follow(case, copied(cache), self.watched.step, seen, self.mass_steps)
            reset_stats()
            watched = seen if self.ways is self.watched else None
            logs, milliseconds = self._follow(case, copied(cache), self.ways.step, watched)
            row = self._text_row(case, label, logs, dense, milliseconds)
            yield {**row, **_ran(), **self._read_row(seen)}

    def _follow(
        self,
        case: Case,
        cache: Any,
        step: Step,
        seen: list[Seen] | None = None,
        steps: int | None = None,
    ) -> tuple[Tensor, list[float]]:
        """Log-probabilities (steps, vocabulary) behind each token of `rest` but the last, and the
        milliseconds of each step; the first steps fill `seen`."""
        logs, times = [], []
        for at in range(min(len(case.rest) - 1, steps or len(case.rest))):
            if seen is not None and at < self.mass_steps:
                self.watch.seen = Seen()
                seen.append(self.watch.seen)
            begin = _now(self.model.device)
            try:
                out = step(self._ids(case.rest[at : at + 1]), past_key_values=cache, use_cache=True)
                logits = out.logits[0, -1].float()
                int(logits.argmax())  # waits for the device
            finally:
                self.watch.seen = None
            if seen is None or at >= self.mass_steps:
                times.append((_now(self.model.device) - begin) * 1e3)
            logs.append(logits.log_softmax(-1))
        return torch.stack(logs), times

    def _text_row(
        self, case: Case, label: str, logs: Tensor, dense: Tensor, milliseconds: list[float]
    ) -> Row:
        truth = torch.tensor(case.rest[1:], device=logs.device)
        predicted = logs.argmax(-1)
        row = self._row(case, "text", label) | {
            "tokens": len(truth),
            "nats": float(-logs.gather(1, truth[:, None]).mean()),
            "kl": float((dense.exp() * (dense - logs)).sum(-1).mean()),
            "same": float((predicted == dense.argmax(-1)).float().mean()),
            "step_ms": _usual(milliseconds),
        }
        if case.queries:
            right = [int(predicted[at]) == token for at, token in case.queries]
            row["score"] = statistics.fmean(right)
            row["asked"] = len(right)
        return row

    def _read_row(self, seen: Sequence[Seen]) -> Row:
        """What the noted steps read and missed. Of steps and sites that no engine was given (the
        first step of a cache that grows, what stays as the model has it) nothing is known."""
        seen = [step for step in seen if step.missed]
        if not seen:
            return {}
        chosen = len(seen[0].missed)
        each = [statistics.fmean(step.missed[n] for step in seen) for n in range(chosen)]
        return {
            "missed": sum(each) / (chosen + seen[0].dense),
            "missed_by_site": [round(share, 5) for share in each],
            "keys": statistics.fmean(statistics.fmean(step.keys) for step in seen),
            "bytes": statistics.fmean(step.bytes for step in seen),
            "dense_bytes": statistics.fmean(step.dense_bytes for step in seen),
        }

    # -- questions

    def _reply_all(
        self, case: Case, cache: Any, protocol: str, labels: Sequence[str]
    ) -> Iterator[Row]:
        asked = case.rest[: len(case.rest) - case.weighed]
        if protocol == "dense" and len(asked) > 1:
            cache = copied(cache)
            ids = self._ids(asked[:-1])
            self.read(ids, past_key_values=cache, use_cache=True, **self.last)
            asked = asked[-1:]
        reply = self._weigh if case.weighed else self._answer
        dense, milliseconds = reply(case, copied(cache), self.model, asked)
        if DENSE in labels:
            yield self._reply_row(case, protocol, DENSE, dense, dense, milliseconds)
        for label in labels:
            if label == DENSE:
                continue
            self.ways.now = label
            reset_stats()
            mine, milliseconds = reply(case, copied(cache), self.ways.step, asked)
            yield self._reply_row(case, protocol, label, mine, dense, milliseconds) | _ran()

    def _asked(self, cache: Any, step: Step, asked: Sequence[int]) -> Tensor:
        """Logits (vocabulary,) behind what is asked, read in pieces."""
        for at in range(0, len(asked), CHUNK):
            out = step(self._ids(asked[at : at + CHUNK]), past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits[0, -1]
        return logits

    def _answer(
        self, case: Case, cache: Any, step: Step, asked: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Greedy tokens up to one that ends or words that do, without the former, and the
        milliseconds of each step."""
        logits = self._asked(cache, step, asked)
        tokens: list[int] = []
        times: list[float] = []
        while True:
            token = int(logits.argmax())
            if token in self.stops:
                break
            tokens.append(token)
            if len(tokens) == case.new_tokens or (case.until and self._ended(case, tokens)):
                break
            begin = _now(self.model.device)
            out = step(self._ids([token]), past_key_values=cache, use_cache=True)
            logits = out.logits[0, -1]
            logits[0].item()
            times.append((_now(self.model.device) - begin) * 1e3)
        return tokens, times

    def _ended(self, case: Case, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(words in text for words in case.until)

    def _weigh(
        self, case: Case, cache: Any, step: Step, asked: Sequence[int]
    ) -> tuple[list[tuple[float, bool]], list[float]]:
        """Of each token of the answer its negative log-likelihood and whether it is the likeliest,
        and the milliseconds of each step."""
        logits = self._asked(cache, step, asked)
        told: list[tuple[float, bool]] = []
        times: list[float] = []
        answer = case.rest[len(case.rest) - case.weighed :]
        for at, token in enumerate(answer):
            if at:
                begin = _now(self.model.device)
                out = step(self._ids(answer[at - 1 : at]), past_key_values=cache, use_cache=True)
                logits = out.logits[0, -1]
                logits[0].item()
                times.append((_now(self.model.device) - begin) * 1e3)
            nats = -float(logits.float().log_softmax(-1)[token])
            told.append((nats, int(logits.argmax()) == token))
        return told, times

    def _reply_row(
        self,
        case: Case,
        protocol: str,
        label: str,
        mine: list[Any],
        dense: list[Any],
        milliseconds: list[float],
    ) -> Row:
        row = self._row(case, protocol, label) | {"step_ms": _usual(milliseconds)}
        if case.weighed:
            nats, greedy = zip(*mine, strict=True)
            return row | {"nats": sum(nats), "greedy": all(greedy), "tokens": len(nats)}
        text = self.tokenizer.decode(mine, skip_special_tokens=True)
        equal = sum(a == b for a, b in zip(mine, dense, strict=False))
        return row | {
            "score": score(case, text) if case.answers else None,
            "same": equal / max(len(mine), len(dense), 1),
            "generated": len(mine),
            "answer": text,
            "wanted": list(case.answers),
        }

    # -- both

    def _row(self, case: Case, protocol: str, label: str) -> Row:
        row: Row = {"case": case.key, "task": case.task, "length": case.length, "seed": case.seed}
        return row | {"depth": case.depth, "protocol": protocol, "setting": label}

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.long, device=self.model.device)


def copied(cache: Any) -> Any:
    """A copy of a transformers cache; what prompts have asked of it is known of the copy too."""
    twin = copy.deepcopy(cache)
    for layer, other in zip(cache.layers, twin.layers, strict=True):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.dim() > 1:
                prompts.carry(value, getattr(other, name))
    return twin


def _stops(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer."""
    stops = {getattr(tokenizer, "eos_token_id", None)}
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops |= set(more) if isinstance(more, (list, tuple)) else {more}
    return {token for token in stops if token is not None}


def _now(device: torch.device) -> float:
    """Seconds of CPU time where that is what computes: another's work does not count."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def _usual(milliseconds: Sequence[float]) -> float | None:
    """The median, the first steps left out."""
    counted = milliseconds[WARM_UP_STEPS:]
    return statistics.median(counted) if counted else None


def _ran() -> Row:
    counts = stats()
    row: Row = {"sparse_steps": counts["sparse_steps"], "dense_steps": counts["dense_steps"]}
    layers = [m["layers"] for m in counts["models"].values() if "layers" in m]
    told = [layer["left_out"] for each in layers for layer in each.values()]
    return row | ({"left_out": statistics.fmean(told)} if told else {})
