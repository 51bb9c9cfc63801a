"""The search behind `loki tune`: measure attention and times, propose plans, judge them.

Each stage has text of its own: prompts (head maps, captured attention), passages to search on
(which layers bear reuse, which plans are worth judging), passages to judge by.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from loki_compile.captured import CapturedMass, captured_mass, summed_up
from loki_compile.commands.evidence import (
    Evidence,
    Outcome,
    bounds,
    needle_passage,
    text_passages,
)
from loki_compile.commands.kept import Kept
from loki_compile.commands.layer_costs import measured_costs
from loki_compile.commands.measure import slot_classes
from loki_compile.config import LokiConfig
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.layer_plan import LayerPlan, PlannedLayer
from loki_compile.pca_store.store import Store
from loki_compile.plan_words import judged_under
from loki_compile.planning import (
    Costs,
    Losses,
    dropped,
    front,
    loss_of,
    losses_of,
    moved,
    restored,
    unread_are_dense,
)
from loki_compile.policies.kinds import Kind
from loki_compile.report import shown_ranges
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

# Passages of text: the first is searched on, the others judge.
TEXTS = 4
# Needle answers are few, and dense attention is sure of them: what their divergence counts beside
# that of text while plans are searched.
NEEDLES_COUNT = 0.25
# Neighbours of plans that are tried, so many of each kind at a time, and plans that are judged.
MOVES, AT_ONCE, JUDGED = 40, 3, 5


@dataclass(frozen=True)
class Settings:
    """As `loki tune` takes them. tolerance: nats of KL more than where every layer chooses."""

    top_k: int | float
    rank: int | float | str
    tolerance: float
    cost_context: int
    plans: int
    steps: int
    group_choice: str


@dataclass(frozen=True)
class Tried:
    """What a plan made of the passages that judge. kinds: of its layers. missed: attention, as
    measured, per layer. choosing: time, of what that takes where every layer chooses. kl: to dense
    logits. more: 95 % bounds of how much of it is more than where every layer chooses, from below
    and above. needles: found, of `asked`; answers: KL of their tokens; of what was run before the
    plan was refused. holds: it may be taken."""

    kinds: tuple[Kind, ...]
    missed: float
    choosing: float
    kl: float
    more: tuple[float, float]
    same: float
    needles: int
    asked: int
    answers: float
    holds: bool

    def cells(self) -> list[str]:
        chooses = [n for n, kind in enumerate(self.kinds) if kind.ranking]
        dense = [n for n, kind in enumerate(self.kinds) if kind.dense]
        return [
            shown_ranges(chooses),
            shown_ranges(dense),
            f"{self.missed:.3f}",
            f"{self.choosing:.2f}",
            f"{self.kl:.4f}",
            f"{self.more[0]:+.4f} to {self.more[1]:+.4f}",
            f"{self.same:.1%}",
            f"{self.needles} of {self.asked}",
            f"{self.answers:.4f}",
            "yes" if self.holds else "no",
        ]


class Search:
    """One search: `read`, then `compare`, then `plan_of` what was best."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Settings,
        prompts: Sequence[Tensor],
        held_out: Tensor,
    ) -> None:
        """prompts: ids (1, T) each; held_out (T',): T and TEXTS times `settings.steps`, or more."""
        self.model, self.settings, self.prompts = model, settings, prompts
        self.options = {
            "top_k": settings.top_k,
            "rank": settings.rank,
            "group_choice": settings.group_choice,
            "min_context": 0,
        }
        self.config = LokiConfig.from_options(self.options)
        length, steps = prompts[0].shape[1], settings.steps
        before, behind = held_out[:length], held_out[-length:]
        hays = (before, length), (behind, length), (behind, length // 2)
        asked = [
            needle_passage(tokenizer, hay, size, steps, seed)
            for seed, (hay, size) in enumerate(hays)
        ]
        first, *texts = text_passages(held_out, length, steps, TEXTS)
        # What is searched on, then what judges: needles second, so that a refusal is cheap.
        self.passages = [first, asked[0], texts[0], asked[1], *texts[1:], asked[2]]
        self.searching, self.judging = range(2), range(2, len(self.passages))
        key = {**asdict(settings), "search": 2}
        self.kept = Kept(model, key, [*prompts, held_out[None]])
        self.seen: CapturedMass | None = None
        self.searched: dict[tuple[Kind, ...], float] = {}  # what plans lose

    @property
    def runs(self) -> int:
        """How often the model will run over a passage, at most."""
        assert self.seen is not None
        searched = 1 + len(self.seen.paths) + self.settings.plans + MOVES
        return len(self.searching) * searched + len(self.judging) * 2 * JUDGED

    def read(self, progress: Callable[[int], None]) -> None:
        """Measures what each layer's choice captures of every later layer's attention.

        Raises:
          ValueError: attention that cannot be observed.
        """
        stored = Store().list()
        weights = {site.weights for entry in stored for site in entry.header.sites}
        bases = Store().find(weights & self._fingerprints()) if stored else None
        summed = self.settings.group_choice == "probability"
        self.simulation = Simulation(
            self.config.budget, self.settings.rank, {}, by_probability=summed
        )
        known = self.kept.recall("mass")
        self.seen = captured_mass(
            self.model,
            self.prompts[:1] if known is not None else self.prompts,
            self.config.budget,
            self.settings.rank,
            bases,
            progress,
            by_probability=summed,
        )
        if known is not None:
            self.seen.rows = known[1]["rows"]
            self.seen.captured = {
                (ranking, int(source), int(reader)): total
                for place, total in known[0].items()
                for ranking, source, reader in [place.split(".")]
            }
            progress(sum(prompt.numel() for prompt in self.prompts[1:]))
            return
        sums = {".".join(map(str, place)): x for place, x in self.seen.captured.items()}
        self.kept.keep("mass", sums, {"rows": self.seen.rows})

    def compare(self, progress: Callable[[int], None]) -> list[Tried]:
        """The plans that were judged: first the one to take, the cheapest that holds, and last
        that every layer chooses.

        Raises:
          ValueError: nothing to choose from.
        """
        assert self.seen is not None
        self.mass, self.slots = summed_up(self.seen), self._slots()
        self.costs, alone = self._costs()
        self.choosing = len(self.slots) * (alone - self.costs.read)
        self.everyone = (Kind("loki"),) * len(self.slots)
        self.tell = progress
        with watched(self.model, self.simulation.look) as run:
            self.evidence = Evidence(
                self.model, self.simulation, run, self.paths, self.passages, self._stored()
            )
            self._loss(self.everyone)
            losses = losses_of(self.mass, *self._effects())
            most = len(self.slots) * alone
            for kinds in front(losses, self.slots, self.costs, most, self.settings.plans):
                self._loss(kinds)
            self._polish(losses)
            for number in self.searching:
                self.evidence.forget(number)
            return self._judge(losses)

    def plan_of(self, best: Tried, name: str, source: str, tried: Sequence[Tried]) -> LayerPlan:
        """What is stored."""
        shares = self.mass.shares["loki"]
        rows = [[None if x != x else round(x, 4) for x in row] for row in shares.tolist()]
        return LayerPlan(
            layers=self._layers(best.kinds),
            model=name,
            top_k=self.settings.top_k,
            source=source,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            mass=tuple(map(tuple, rows)),
            scores={
                "kl": best.kl,
                "more than where every layer chooses": best.more,
                "tolerance": self.settings.tolerance,
                "needles": best.needles,
                "needles asked": best.asked,
                "kl of answers": best.answers,
                "missed": best.missed,
                "choosing": best.choosing,
                "kl where every layer chooses": tried[-1].kl,
                "needles where every layer chooses": tried[-1].needles,
                "needles decide": tried[-1].needles > 0,
            },
            under=judged_under(self.config, "tidal"),
        )

    def forget(self) -> None:
        """What was kept for a run that is stopped."""
        self.kept.forget()

    # -- of the model

    def _fingerprints(self) -> set[str]:
        from loki_compile.pca_store.fingerprint import weights_fingerprint

        return {weights_fingerprint(parameter) for parameter in self.model.parameters()}

    def _slots(self) -> list[int]:
        """Of each layer that was seen, its class of slots in a decode step.

        Raises:
          ValueError: layers in graphs of their own, where nobody can read what another chose.
        """
        slots = slot_classes(self.model, self.paths, self.options)
        if len({*slots}) == len(slots):
            raise ValueError(
                f"none of {len(slots)} layers can read what another chose (each in a graph of its "
                "own, or none with the slots of another): nothing to tune"
            )
        return slots

    def _costs(self) -> tuple[Costs, float]:
        """As `measured_costs` has it, of this model's heads."""
        assert self.seen is not None
        text = self.model.config.get_text_config()
        kv_heads = next(iter(self.seen.captured.values())).shape[0]
        heads = (text.num_attention_heads, kv_heads, next(iter(self.seen.head_dims.values())))
        kind = next(self.model.parameters()).dtype, self.model.device
        return measured_costs(
            heads,
            *kind,
            tokens=self.settings.cost_context,
            rank=self.settings.rank,
            budget=self.config.budget,
            by_probability=self.settings.group_choice == "probability",
        )

    def _stored(self) -> dict[str, Basis]:
        """The stored bases of all layers, or none."""
        assert self.seen is not None
        if self.seen.bases is None:
            return {}
        found = {}
        for (weights, use), path in self.seen.layers.items():
            basis = self.seen.bases.find(weights, occurrence=use)
            if basis is None:
                return {}
            found[path] = basis
        return found

    @property
    def paths(self) -> list[str]:
        assert self.seen is not None
        return self.seen.paths

    # -- what a plan makes of text

    def _time(self, kinds: Sequence[Kind]) -> float:
        """For choosing and dense layers, of what it takes where every layer chooses."""
        if tuple(kinds) == self.everyone:
            return 1.0
        read = len(kinds) * self.costs.read
        return (math.fsum(map(self.costs.of, kinds)) - read) / self.choosing

    def _outcome(self, kinds: Sequence[Kind], number: int) -> Outcome:
        words = " ".join(map(str, kinds))
        name = f"{number}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"
        known = self.kept.recall(name)
        if known is None:
            outcome = self.evidence.of(kinds, number)
            self.kept.keep(name, asdict(outcome), None)
        else:
            outcome = Outcome(**known[0])
        self.tell(1)
        return outcome

    def _loss(self, kinds: Sequence[Kind]) -> float:
        """What is searched for the least of; infinite for a plan that text alone refuses."""
        kinds = tuple(kinds)
        if kinds not in self.searched:
            text = self._outcome(kinds, 0).kl
            more = text - self._outcome(self.everyone, 0).kl
            loss = math.inf
            if bounds(more)[0] <= self.settings.tolerance:
                loss = float(text.mean() + NEEDLES_COUNT * self._outcome(kinds, 1).kl.mean())
            self.searched[kinds] = loss
        return self.searched[kinds]

    def _effects(self) -> tuple[list[float], list[float]]:
        """Of each layer what the model loses where it chooses for itself, as all do: a share of
        that, by what it misses; and where it alone reads what the layer before it chose."""
        base = self._loss(self.everyone)
        missed = losses_of(self.mass).own["loki"]
        own = [base * each / max(sum(missed), 1e-9) for each in missed]
        read = []
        for layer, alone in enumerate(own):
            heads = self.mass.heads.get(("loki", layer - 1, layer))
            if heads is None or self.slots[layer] != self.slots[layer - 1]:
                read.append(alone)
                continue
            kinds = [*self.everyone]
            kinds[layer] = Kind(reuse=True, source=layer - 1, heads=heads)
            text, needles = (self._outcome(kinds, number).kl.mean() for number in self.searching)
            lost = float(text + NEEDLES_COUNT * needles) - base
            read.append(alone + max(lost, 0.0))
        return own, read

    def _within(self) -> list[tuple[Kind, ...]]:
        """The plans that hold on what is searched on, the cheapest first."""
        most = self._loss(self.everyone) + self.settings.tolerance
        plans = [kinds for kinds, loss in self.searched.items() if loss <= most]
        return sorted(plans, key=lambda kinds: (self._time(kinds), self.searched[kinds]))

    def _polish(self, losses: Losses) -> None:
        """Tries neighbours of the cheapest plan that holds, as long as that finds a better one."""
        left = MOVES
        while left > 0:
            best = self._within()[0]
            ways = (dropped, moved)
            near = [each for way in ways for each in way(losses, self.slots, best)[:AT_ONCE]]
            for kinds in [each for each in near if tuple(each) not in self.searched][:left]:
                self._loss(kinds)
                left -= 1
            if self._within()[0] == best:
                return

    def _judge(self, losses: Losses) -> list[Tried]:
        """The first plan that holds on what judges, those refused before it, and that every layer
        chooses: of the plans that hold so far the cheapest first, each losing less than all
        cheaper ones; then the last of these with ever fewer layers that reuse."""
        plans: list[tuple[Kind, ...]] = []
        for kinds in self._within():
            if not plans or self.searched[kinds] < self.searched[plans[-1]]:
                plans.append(kinds)
        plans = [kinds for kinds in plans if self._time(kinds) < 1.0]
        if len(plans) > JUDGED:
            plans = [plans[round(n * (len(plans) - 1) / (JUDGED - 1))] for n in range(JUDGED)]
        everyone = self._tried(self.everyone)
        refused: list[Tried] = []
        while plans:
            trial = self._tried(plans.pop(0))
            if trial.holds:
                return [trial, *refused[::-1], everyone]
            refused.append(trial)
            reuses = sum(kind.reuse for kind in trial.kinds)
            if not plans and reuses > 1:
                fewer = restored(losses, self.slots, trial.kinds, max(1, reuses // 3))
                plans = [tuple(fewer)] if self._time(fewer) < 1.0 else []
        return [everyone, *refused[::-1], everyone]

    def _tried(self, kinds: tuple[Kind, ...]) -> Tried:
        text: list[tuple[Outcome, Outcome]] = []
        needles: list[tuple[Outcome, Outcome]] = []
        for number in self.judging:
            pair = self._outcome(kinds, number), self._outcome(self.everyone, number)
            (needles if self.passages[number].answers else text).append(pair)
            kl, base = (torch.cat([side.kl for side in sides]) for sides in zip(*text, strict=True))
            if bounds(kl - base)[0] > self.settings.tolerance:
                break
        ours, theirs = ([pair[side] for pair in needles] for side in (0, 1))
        found, wanted = (sum(int(each.found.sum()) for each in side) for side in (ours, theirs))
        answers, certain = _kl_of(ours), _kl_of(theirs)
        more, most = bounds(kl - base), self.settings.tolerance
        holds = len(text) + len(needles) == len(self.judging) and more[1] <= most
        holds &= found >= wanted and NEEDLES_COUNT * (answers - certain) <= most
        return Tried(
            kinds=kinds,
            missed=loss_of(losses_of(self.mass), kinds) / len(kinds),
            choosing=self._time(kinds),
            kl=float(kl.mean()),
            more=more,
            same=float(torch.cat([each.same for each, _ in text]).float().mean()),
            needles=found,
            asked=sum(len(each.found) for each in ours),
            answers=answers,
            holds=holds or kinds == self.everyone,
        )

    # -- what is kept

    def _layers(self, kinds: Sequence[Kind]) -> tuple[PlannedLayer, ...]:
        assert self.seen is not None
        return tuple(
            PlannedLayer(
                path,
                weights,
                self.seen.blocks[weights],
                self.seen.captured["loki", number, number].shape[0],
                str(kind),
            )
            for number, ((weights, _), path, kind) in enumerate(
                zip(self.seen.layers, self.seen.paths, unread_are_dense(kinds), strict=True)
            )
        )


def _kl_of(outcomes: Sequence[Outcome]) -> float:
    return float(torch.cat([each.kl for each in outcomes]).mean()) if outcomes else math.nan
