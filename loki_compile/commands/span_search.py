"""The search behind `loki tune --policy moa`: profile spans at several lengths, choose, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loki_compile.commands.kept import Kept
from loki_compile.commands.measure import new_cache, prefill
from loki_compile.commands.models import encode
from loki_compile.commands.reference_data import calibration_prompts
from loki_compile.commands.span_choice import apart, balanced_choice, refined, together
from loki_compile.config import LokiConfig
from loki_compile.kernels.spans import Span, Spans
from loki_compile.pca_store.layer_plan import LayerPlan
from loki_compile.plan_words import judged_under
from loki_compile.policies.kinds import SPANS, Kind
from loki_compile.progress import versions
from loki_compile.span_profile import SpanProfiler

# Alphas in eighths of the longest prompt, betas in eighths: MoA's grid, with short windows added.
_ALPHAS = (-2, -1, 0, 0.25, 0.5, 1, 2, 3, 4, 6)
_BETAS = 8
# Rows of a prompt that count: its last ones, which are decoded, or its answer.
ROWS = 256
_LEAST_ANSWER = 16
EFFECTS = ("joint", "entrywise")
# By plan, then by length: the divergence, and the change of the loss.
Compared = dict[str, list[tuple[float, float] | None]]
QUESTION = "\n\nSummarise the text above in detail, from its beginning to its end."


@dataclass(frozen=True)
class SpanSettings:
    """density: of the keys, at every length, at most. sink: first keys that every row reads.
    effects: one of `EFFECTS`."""

    density: float
    sink: int
    effects: str

    @property
    def recent(self) -> int:
        """Newest keys that every row reads under default options."""
        return LokiConfig().recent


@dataclass(frozen=True)
class SpanPrompt:
    """length: tokens with the rows that count. ids (T,); from `start` on they are fed. With
    `asked`, ids end there, and the model's own answer is what counts."""

    length: int
    ids: Tensor
    start: int
    asked: bool = False


def lengths_of(longest: int, settings: SpanSettings) -> tuple[int, ...]:
    """The lengths that are profiled.

    Raises:
      ValueError: prompts that sinks and the newest keys fill, or of which these are more than the
        density.
    """
    lengths = (longest // 4, longest // 2, longest)
    least = 2 * (settings.sink + settings.recent)
    if lengths[0] <= least:
        raise ValueError(
            f"--length {longest}: a quarter of it is profiled too, of which {settings.sink} first "
            f"and {settings.recent} newest keys are always read; needs {4 * least + 4} or more, or "
            "a smaller --sink"
        )
    share = (settings.sink + settings.recent) / lengths[0]
    if settings.density < share:
        raise ValueError(
            f"--density {settings.density:g}: {settings.sink} first and {settings.recent} newest "
            f"keys are always read, {share:.3f} of the {lengths[0]} tokens of the shortest "
            "prompts; needs a larger --density or --length, or a smaller --sink"
        )
    return lengths


def text_prompts(ids: Tensor, lengths: Sequence[int], count: int) -> list[list[SpanPrompt]]:
    """Pieces of a text (T,), by length; the last of each is held out where there are several.

    Raises:
      ValueError: a text shorter than the longest length.
    """
    if len(ids) < max(lengths):
        raise ValueError(
            f"the text holds {len(ids)} tokens; needs {max(lengths)}, the longest length that is "
            "profiled: pass more text, or a smaller --length"
        )
    made = []
    for length in lengths:
        rows = min(ROWS, length // 4)
        pieces = [piece for piece in ids.split(length) if len(piece) == length][: count + 1]
        made.append([SpanPrompt(length, piece, length - rows) for piece in pieces])
    return made


def recall_prompts(tokenizer: Any, lengths: Sequence[int], count: int) -> list[list[SpanPrompt]]:
    """As `calibration_prompts`, for a model whose own text is known."""
    made = []
    for length in lengths:
        # Every second prompt asks for what it has shown; the one that is held out does.
        pieces, _ = calibration_prompts(tokenizer, length, length * (count + 2))
        pieces = [*pieces[:count], pieces[count + (count % 2 == 0)]]
        start = length - min(ROWS, length // 4)
        made.append([SpanPrompt(length, torch.tensor(piece), start) for piece in pieces])
    return made


def asked_prompts(
    tokenizer: Any, ids: Tensor, lengths: Sequence[int], count: int
) -> list[list[SpanPrompt]]:
    """As `text_prompts`, where each piece is shown in the tokenizer's chat template, with a
    question about all of it: the model's own answer counts.

    Raises:
      ValueError: as there, or prompts that the template fills.
    """
    made = []
    for pieces in text_prompts(ids, lengths, count):
        asked = []
        for piece in pieces:
            room, found = piece.start, piece.ids
            shown: list[int] = []
            while len(found) and (not shown or len(shown) > room):
                found = found[: len(found) - max(16, len(shown) - room if shown else 64)]
                text = tokenizer.decode(found) + QUESTION
                shown = tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
            if not 0 < len(shown) <= room:
                raise ValueError(
                    f"the chat template and the question leave no room for text in {room} tokens: "
                    "needs a larger --length"
                )
            asked.append(SpanPrompt(piece.length, torch.tensor(shown), len(shown), asked=True))
        made.append(asked)
    return made


class SpanSearch:
    """One search; for use in a `with`: `read`, then `choose`, then `compare` and `plan_of`."""

    def __init__(
        self,
        model: Any,
        settings: SpanSettings,
        prompts: Sequence[Sequence[SpanPrompt]],
    ) -> None:
        """prompts: by length, shortest first; the last of each is held out where there are several.

        Raises:
          ValueError: a model that cannot be profiled.
        """
        self.model, self.settings = model, settings
        self.read_from = [each[:-1] if len(each) > 1 else each for each in prompts]
        self.held_out = [each[-1:] if len(each) > 1 else each[:0] for each in prompts]
        self.lengths = tuple(each[0].length for each in prompts)
        spans = candidates(self.lengths, settings)
        self.spans = Spans(tuple(spans), settings.sink, settings.recent)
        key = {**asdict(settings), "spans": list(map(str, spans)), "search": 1}
        every = [prompt.ids[None] for each in prompts for prompt in each]
        self.kept = Kept(model, key, every)
        self.profiler = SpanProfiler(model)
        self.rows: list[np.ndarray] = []

    def __enter__(self) -> SpanSearch:
        self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profiler.__exit__(*error)

    @property
    def tokens(self) -> int:
        """Of all prompts that are profiled."""
        return sum(prompt.length for each in self.read_from for prompt in each)

    def read(self, progress: Callable[[int], None]) -> None:
        """Profiles every prompt; what an earlier run has kept is not read again.

        Raises:
          ValueError: attention that cannot be profiled.
        """
        rows, losses, shares = [], [], []
        for length, each in zip(self.lengths, self.read_from, strict=True):
            of_length = []
            for number, prompt in enumerate(each):
                of_length.append(self._profiled(f"effects-{length}-{number}", prompt))
                progress(length)
            rows.append(np.concatenate([found["rows"] for found in of_length]))
            losses.append(np.mean([found["losses"] for found in of_length], 0))
            shares.append(self._shares(length, of_length[0]))
        self.rows, self.shares = rows, np.stack(shares)
        self.losses = np.stack(losses)

    def choose(self) -> None:
        """Picks a span for each KV head.

        Raises:
          ValueError: a density that nothing keeps within.
        """
        found = balanced_choice(self.losses, self.shares, self.settings.density)
        picked = found.options
        if self.settings.effects == "joint":
            picked = refined(picked, self.rows, self.shares, self.settings.density)
        self.gap, self.picked = found.gap, picked

    def compare(self, progress: Callable[[int], None]) -> Compared:
        """By length, of a held-out prompt, the divergence from dense logits and the change of the
        loss, under the plan and where every head reads the same share: None of a length without
        one, and empty where no length has one."""
        found: Compared = {"plan": [], "one span for all": []}
        for each in self.held_out:
            if not each:
                for of_plan in found.values():
                    of_plan.append(None)
            for prompt in each:
                ids, start, again = self.ready(prompt, 3)
                fed, labels = ids[start:-1], ids[start + 1 :]
                dense, logs = self.profiler.loss(self.inputs(fed, next(again)), labels, {})
                for name, plan in (("plan", self.plan), ("one span for all", self.uniform)):
                    loss, other = self.profiler.loss(self.inputs(fed, next(again)), labels, plan)
                    divergence = (logs.exp() * (logs - other)).sum(-1).mean()
                    found[name].append((float(divergence), loss - dense))
                progress(1)
        return found if any(self.held_out) else {}

    @property
    def plan(self) -> dict[str, Spans]:
        """By the path of the layer."""
        return self.plan_with(self.picked)

    def plan_with(self, picked: np.ndarray) -> dict[str, Spans]:
        """The plan in which KV heads, layer by layer, get these of `spans`."""
        heads = [self.spans.heads[option] for option in picked]
        made, at = {}, 0
        for layer in self.profiler.layers:
            own = tuple(heads[at : at + layer.kv_heads])
            made[layer.path] = Spans(own, self.settings.sink, self.settings.recent)
            at += layer.kv_heads
        return made

    @property
    def uniform(self) -> dict[str, Spans]:
        """Every head reads the density that is asked for."""
        span = Span.of((-self.settings.sink, self.settings.density))
        one = Spans((span,), self.settings.sink, self.settings.recent)
        return {layer.path: one for layer in self.profiler.layers}

    def densities(self) -> dict[str, float]:
        """By length, of the keys that the layers of the plan see."""
        own = self.shares[:, np.arange(len(self.picked)), self.picked].sum(1)
        return {str(m): round(float(x), 4) for m, x in zip(self.lengths, own, strict=True)}

    def plan_of(self, name: str, source: str, compared: dict[str, Any]) -> LayerPlan:
        """What is stored."""
        layers = tuple(
            replace(layer, word=str(Kind(SPANS, spans=own.heads, sink=own.sink)))
            for layer, own in zip(self.profiler.layers, self.plan.values(), strict=True)
        )
        predicted = [together(each, self.picked) for each in self.rows]
        return LayerPlan(
            layers=layers,
            model=name,
            top_k=self.settings.density,
            source=source,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            scores={
                "density": self.densities(),
                "lengths": list(self.lengths),
                "prompts": [len(each) for each in self.read_from],
                "effects": self.settings.effects,
                "predicted": [round(each, 6) for each in predicted],
                "gap": round(self.gap, 6),
                "held out, divergence and change of loss": compared,
                "dense": self.profiler.refused,
                "versions": versions(),
            },
            under=judged_under(LokiConfig(), SPANS),
        )

    def lacking(self, asked: int) -> list[str]:
        """Sentences on what the text was too short for, of so many prompts of each length."""
        said = []
        fewer = [(m, len(x)) for m, x in zip(self.lengths, self.read_from, strict=True)]
        if few := [f"{count} of {m} tokens" for m, count in fewer if count < asked]:
            said.append(f"the text holds {', '.join(few)}, of the {asked} prompts asked for")
        without = [str(m) for m, x in zip(self.lengths, self.held_out, strict=True) if not x]
        if without:
            said.append(f"no prompt of {', '.join(without)} tokens is left to compare plans on")
        return said

    def forget(self) -> None:
        """What was kept for a run that is stopped."""
        self.kept.forget()

    # -- of one prompt

    def _profiled(self, name: str, prompt: SpanPrompt) -> dict[str, Any]:
        known = self.kept.recall(name)
        if known is None:
            ids, start, caches = self.ready(prompt, 1)
            inputs, labels = self.inputs(ids[start:-1], next(caches)), ids[start + 1 :]
            published = self.settings.effects == "entrywise"
            found = self.profiler.effects(inputs, labels, self.spans, published=published)
            of_layers = list(found.effects.items())
            tensors = {"rows": torch.cat([e.rows for _, e in of_layers]).transpose(0, 1)}
            single = [e.entrywise for _, e in of_layers if e.entrywise is not None]
            if published:
                tensors["entrywise"] = torch.cat(single)
            record: dict[str, Any] = {
                "paths": [path for path, _ in of_layers],
                "visible": [effects.visible for _, effects in of_layers],
                "numbers": [found.numbers[path] for path, _ in of_layers],
                "fed": len(ids) - 1,
                "refused": self.profiler.refused,
            }
            known = tensors, record
            self.kept.keep(name, *known)
        tensors, record = known
        self.profiler.keep_to(record["paths"], record["refused"])
        rows = tensors["rows"].float().cpu().numpy()
        entries = tensors.get("entrywise")
        losses = apart(rows) if entries is None else entries.double().cpu().numpy()
        return {"rows": rows, "losses": losses, **record}

    def _shares(self, length: int, record: dict[str, Any]) -> np.ndarray:
        """(G, R): the part of all bytes that each head reads, by span, at a length."""
        made, whole = [], 0.0
        layers = zip(self.profiler.layers, record["visible"], record["numbers"], strict=True)
        for layer, visible, numbers in layers:
            keys = length if visible >= record["fed"] else visible  # a window of the model's own
            read = np.array(self.spans.keys(keys), dtype=float) * numbers
            made += [read] * layer.kv_heads
            whole += keys * numbers * layer.kv_heads
        return np.stack(made) / whole

    @torch.no_grad()
    def ready(self, prompt: SpanPrompt, calls: int) -> tuple[Tensor, int, Iterator[Any]]:
        """All ids, from where they are fed, and so many caches that are filled up to there: each is
        good for one call."""
        ids = prompt.ids.to(self.model.device)
        cache = new_cache(self.model, "dynamic", 0)
        logits = prefill(self.model, ids[None, : prompt.start], cache)
        slides = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
        held = [] if slides else [(layer.keys, layer.values) for layer in cache.layers]
        if prompt.asked:
            answer = self._answer(logits, cache, prompt.length - prompt.start)
            ids = torch.cat((ids, answer))
        return ids, prompt.start, self._caches(ids[: prompt.start], held, calls)

    def _caches(self, ids: Tensor, held: list[Any], calls: int) -> Iterator[Any]:
        """What is held is given up with the last one. Windows that have moved cannot be put back:
        nothing is held of them, and the model reads the ids again."""
        for call in range(calls):
            cache = new_cache(self.model, "dynamic", 0)
            if not held:
                prefill(self.model, ids[None], cache)
            for number, (keys, values) in enumerate(held):
                cache.update(keys, values, number)
                if call == calls - 1:
                    held[number] = ()
            yield cache

    def _answer(self, logits: Tensor, cache: Any, tokens: int) -> Tensor:
        """What the model says, greedily, until it ends or `tokens` are said."""
        ends = ends_of(self.model)
        said: list[int] = []
        while len(said) < tokens:
            logits = logits.clone()
            if len(said) < _LEAST_ANSWER:
                logits[ends] = -torch.inf
            token = int(logits.argmax())
            said.append(token)
            if token in ends:
                break
            fed = torch.tensor([[token]], device=logits.device)
            logits = self.model(fed, past_key_values=cache, use_cache=True).logits[0, -1]
        return torch.tensor(said, device=logits.device)

    def inputs(self, fed: Tensor, cache: Any) -> dict[str, Any]:
        return {"input_ids": fed[None], "past_key_values": cache, "use_cache": True}

    # -- what is kept


def candidates(lengths: Sequence[int], settings: SpanSettings) -> list[Span]:
    """Spans alpha + beta N that hold a key at every length and at most all, narrow first, without
    those that are alike at every length."""
    unit = max(lengths) / 8
    lines = [(round(a * unit), b / _BETAS) for a in _ALPHAS for b in range(_BETAS + 1)]
    made: dict[tuple[int, ...], Span] = {}
    for line in lines:
        widths = [line[0] + line[1] * length for length in lengths]
        if min(widths) > 0 and widths[-1] <= lengths[-1]:
            one = Spans((Span.of(line),), settings.sink, settings.recent)
            made.setdefault(tuple(one.keys(m)[0] for m in lengths), one.heads[0])
    least = Spans((Span.of((settings.recent, 0.0)),), settings.sink, settings.recent)
    made.setdefault(tuple(least.keys(m)[0] for m in lengths), least.heads[0])
    return [span for _, span in sorted(made.items(), key=lambda each: each[0][::-1])]


def ends_of(model: Any) -> list[int]:
    """Tokens that end an answer."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(stated) if isinstance(stated, (list, tuple)) else [] if stated is None else [stated]


def span_prompts(
    tokenizer: Any, text: str, lengths: Sequence[int], count: int, *, given: bool
) -> tuple[list[list[SpanPrompt]], str]:
    """Prompts by length, and what they are, in words. given: the text is what a user chose.

    Raises:
      ValueError: a text shorter than the longest length.
    """
    if not given:
        try:
            return recall_prompts(tokenizer, lengths, count), "recall lines among code"
        except ValueError:
            pass
    ids = encode(tokenizer, text[: 16 * (count + 1) * max(lengths)])
    if getattr(tokenizer, "chat_template", None):
        return asked_prompts(tokenizer, ids, lengths, count), "the model's own answers about it"
    return text_prompts(ids, lengths, count), "the text itself"
