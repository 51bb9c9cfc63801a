"""What a plan of layers makes of held-out passages: divergence from dense tokens, needles found.

A passage is a context that is prefilled densely once, and tokens behind it that are decoded, given
what truly stands there: all in one call, which computes what single steps would. Plans are compared
over the same tokens, so that what is hard about a passage is no part of their difference.
"""

from __future__ import annotations

import inspect
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loki_compile.commands.measure import Step
from loki_compile.commands.models import encode
from loki_compile.pca_store.basis import Basis
from loki_compile.policies.kinds import Kind
from loki_compile.simulation import Simulation

# Tokens whose mean is one sample: tokens in a row fare alike.
BLOCK = 16
# How sure each of the two bounds of a mean is.
_SURE = 0.95
PLACES = (
    *("Oslo", "Cairo", "Lima", "Paris", "Tokyo", "Rome", "Berlin", "Madrid"),
    *("London", "Sydney", "Boston", "Dublin", "Vienna", "Prague", "Athens", "Warsaw"),
)
_NEEDLE = " The magic number of {} is"


@dataclass(frozen=True)
class Passage:
    """ids (T,): before `start` the context. answers: places in `ids` (from, to) of what is to be
    found; () of plain text, where every token counts."""

    ids: Tensor
    start: int
    answers: tuple[tuple[int, int], ...] = ()

    @property
    def rows(self) -> Tensor:
        """Those of the decoded tokens whose prediction counts."""
        if not self.answers:
            return torch.arange(len(self.ids) - self.start)
        return torch.cat([torch.arange(a, b) for a, b in self.answers]) - self.start - 1


@dataclass(frozen=True)
class Outcome:
    """Of each token that counts the divergence from dense, in nats, and whether the greedy token is
    dense's; and which needles were found."""

    kl: Tensor
    same: Tensor
    found: Tensor


def text_passages(ids: Tensor, length: int, steps: int, count: int) -> list[Passage]:
    """`count` passages of `length` tokens and `steps` decoded ones, spread evenly over ids (T,);
    what is decoded overlaps nowhere.

    Raises:
      ValueError: too few tokens.
    """
    whole = length + steps
    if len(ids) < whole + (count - 1) * steps:
        raise ValueError(f"{len(ids)} tokens; needs {whole + (count - 1) * steps}")
    starts = [round(n * (len(ids) - whole) / max(1, count - 1)) for n in range(count)]
    return [Passage(ids[at : at + whole], length) for at in starts]


def needle_passage(
    tokenizer: Any, hay: Tensor, length: int, steps: int, seed: int, most: int = 8
) -> Passage:
    """Numbers hidden in `hay` (T,) at even depths and asked for, in another order, in the last
    `steps` tokens: as many as there is room for."""
    drawn = random.Random(seed)
    needles: list[tuple[Tensor, int, int]] = []  # and where in it the number lies
    room = steps - 1
    for place in drawn.sample(PLACES, most):
        words = (_NEEDLE.format(place), f" {drawn.randrange(10000, 100000)}", ".")
        encoded = [encode(tokenizer, word) for word in words]
        room -= sum(map(len, encoded))
        if room < 0 and needles:
            break
        first = len(encoded[0])
        needles.append((torch.cat(encoded), first, first + len(encoded[1])))
    order = drawn.sample(needles, len(needles))
    asked = torch.cat([tokens for tokens, _, _ in order])
    hay = hay[: max(0, length + steps - 2 * len(asked))]
    parts: list[Tensor] = []
    at = 0
    for number, (tokens, _, _) in enumerate(needles):
        until = round((number + 0.5) / len(needles) * len(hay))
        parts += [hay[at:until], tokens]
        at = until
    ids = torch.cat([*parts, hay[at:], asked])
    answers: list[tuple[int, int]] = []
    here = len(ids) - len(asked)
    for tokens, begin, end in order:
        answers.append((here + begin, here + end))
        here += len(tokens)
    start = len(ids) - max(steps, len(asked))
    return Passage(ids, max(1, start), tuple(answers))


def bounds(differences: Tensor) -> tuple[float, float]:
    """One-sided 95 % bounds of a mean, from below and above, by Student's t over blocks."""
    from scipy.stats import t

    blocks = [float(block.mean()) for block in differences.split(BLOCK) if len(block) == BLOCK]
    if len(blocks) < 3:
        return -math.inf, math.inf
    mean = float(differences.mean())
    half = float(t.ppf(_SURE, len(blocks) - 1)) * statistics.stdev(blocks) / math.sqrt(len(blocks))
    return mean - half, mean + half


@dataclass
class _Behind:
    """What is there behind a passage's context: its cache, bases fitted to it, and the dense
    log-probabilities of its rows (rows, vocabulary)."""

    cache: Any
    bases: dict[str, Basis]
    dense: Tensor


class Evidence:
    """Runs plans over passages; `run` is the model, watched by `simulation`. stored: bases by the
    paths of layers; else each passage has its own, fitted to its context."""

    def __init__(
        self,
        model: Any,
        simulation: Simulation,
        run: Step,
        paths: Sequence[str],
        passages: Sequence[Passage],
        stored: dict[str, Basis],
    ) -> None:
        self.model, self.simulation, self.run = model, simulation, run
        self.paths, self.passages, self.stored = paths, passages, stored
        self._behind: dict[int, _Behind] = {}

    @torch.no_grad()
    def of(self, kinds: Sequence[Kind], number: int) -> Outcome:
        """What a plan makes of the passage of that number."""
        passage, dense = self.passages[number], self.behind(number).dense
        here = self.decoded(kinds, number)
        guess = here.argmax(-1).cpu()
        kl = (dense.exp() * (dense - here)).sum(-1).cpu()
        found = torch.zeros(0, dtype=torch.bool)
        if passage.answers:
            right = guess == passage.ids[passage.rows + passage.start + 1]
            sizes = [b - a for a, b in passage.answers]
            found = torch.stack([each.all() for each in right.split(sizes)])
        return Outcome(kl, guess == dense.argmax(-1).cpu(), found)

    def decoded(self, kinds: Sequence[Kind], number: int) -> Tensor:
        """Log-probabilities (rows, vocabulary) of a passage's rows under a plan."""
        return self._decoded(kinds, self.passages[number], self.behind(number))

    def _decoded(self, kinds: Sequence[Kind], passage: Passage, behind: _Behind) -> Tensor:
        self.simulation.under(kinds, self.paths)
        self.simulation.bases = behind.bases
        fed = passage.ids[None, passage.start :].to(self.model.device)
        logits = self.run(fed, past_key_values=self._copied(behind.cache)).logits[0]
        return logits[passage.rows.to(logits.device)].float().log_softmax(-1)

    @torch.no_grad()
    def behind(self, number: int) -> _Behind:
        """The context of a passage, prefilled once.

        Raises:
          ValueError: attention of a layer cannot be simulated.
        """
        if number not in self._behind:
            passage, cache = self.passages[number], self._empty()
            dense = [Kind(dense=True)] * len(self.paths)
            self.simulation.under(dense, self.paths)
            self.simulation.bases, self.simulation.fitting = {}, not self.stored
            context = passage.ids[None, : passage.start].to(self.model.device)
            names = inspect.signature(self.model.forward).parameters
            extra = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
            try:
                self.run(context, past_key_values=cache, use_cache=True, **extra)
            finally:
                self.simulation.fitting = False
            behind = _Behind(cache, self.stored or self.simulation.bases, torch.empty(0))
            behind.dense = self._decoded(dense, passage, behind)
            self._check_simulated()
            self._behind[number] = behind
        return self._behind[number]

    def forget(self, number: int) -> None:
        """Frees the cache of a passage."""
        self._behind.pop(number, None)

    def _check_simulated(self) -> None:
        missing = [path for path in self.paths if path not in self.simulation.served]
        if missing:
            why = self.simulation.refused.get(missing[0], "it was not seen with a cache")
            raise ValueError(
                f"what a plan makes of {missing[0]} cannot be told: {why}. Needs plain attention; "
                "write a plan by hand, as a dict of policy="
            )

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _copied(self, cache: Any) -> Any:
        copy = self._empty()
        for number, layer in enumerate(cache.layers):
            copy.update(layer.keys, layer.values, number)
        return copy
