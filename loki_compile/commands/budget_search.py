"""The search behind `loki tune --target`: measure what heads miss, solve, judge against a budget
that is the same for all heads, over as many bytes.

Each stage has passages of its own: prompts (what is missed), some of these again (which ways to
come by keys do best), held-out ones that judge.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from loki_compile.commands.budget_choice import least_cost, least_loss
from loki_compile.commands.budget_options import (
    FROM,
    LAST,
    RANKED,
    Menu,
    Worth,
    fixed_share,
    missed_share,
    of_heads,
    of_plan,
    plain,
)
from loki_compile.commands.evidence import (
    Evidence,
    Outcome,
    Passage,
    bounds,
    needle_passage,
    text_passages,
)
from loki_compile.commands.kept import Kept
from loki_compile.commands.measure import slot_classes
from loki_compile.commands.plan_search import NEEDLES_COUNT
from loki_compile.commands.step_bytes import StepBytes
from loki_compile.config import LokiConfig
from loki_compile.mass_curves import SHARES, CurvedLayer, MassCurves, missed_of, read_curves
from loki_compile.observation import columns_of
from loki_compile.pca_store.fingerprint import weights_fingerprint
from loki_compile.pca_store.layer_plan import USED, LayerPlan, PlannedLayer
from loki_compile.pca_store.store import Store
from loki_compile.plan_words import judged_under
from loki_compile.policies.kinds import Kind, kind_of
from loki_compile.progress import versions
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

# Rows of each prompt of text, evenly spread over its second half.
ROWS = 24
# Passages of text that judge.
TEXTS = 4
# By `--heads`: the ways to come by keys, of which all or some are taken.
HEADS = {
    "ranked": ((RANKED,),),
    "any": ((RANKED,), (RANKED, LAST), (RANKED, FROM), (RANKED, LAST, FROM)),
}


@dataclass(frozen=True)
class Target:
    """bytes: the part of the caches' bytes that a step reads, at most. mass: the mean share of
    attention that heads capture, at least, for the fewest bytes."""

    what: str
    share: float

    @classmethod
    def of(cls, text: str) -> Target:
        """From "bytes:0.2" or "mass:0.97".

        Raises:
          ValueError: neither.
        """
        what, _, share = text.partition(":")
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if what not in ("bytes", "mass") or not 0 < number < 1:
            raise ValueError(
                f"--target {text}: needs bytes:SHARE, of the cache's bytes that a step reads, or "
                "mass:SHARE, of the attention that is captured, between 0 and 1, such as bytes:0.2"
            )
        return cls(what, number)

    def __str__(self) -> str:
        return f"{self.what}:{self.share:g}"


@dataclass(frozen=True)
class BudgetSettings:
    """As `loki tune` takes them. heads: one of `HEADS`. plan: words of the layers whose heads that
    choose get budgets; () where every layer chooses for itself."""

    target: Target
    heads: str
    rank: int | float | str
    steps: int
    plan: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """What a plan made of the passages that judge. bytes: of the caches' that a step reads. missed:
    attention, as measured. kl: to dense logits, of text; answers: of needles' answers."""

    kinds: tuple[Kind, ...]
    bytes: float
    missed: float
    kl: float
    same: float
    needles: int
    asked: int
    answers: float
    each: Tensor

    def cells(self, name: str) -> list[str]:
        return [
            name,
            f"{self.bytes:.1%}",
            f"{self.missed:.3f}",
            f"{self.kl:.4f}",
            f"{self.same:.1%}",
            f"{self.needles} of {self.asked}",
            f"{self.answers:.4f}",
        ]


class BudgetSearch:
    """One search: `read`, then `choose`, then `judge` and `plan_of`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: BudgetSettings,
        prompts: Sequence[Tensor],
        held_out: Tensor,
    ) -> None:
        """prompts: ids (T,) each; held_out (T',): T and TEXTS times `settings.steps`, or more."""
        self.model, self.settings, self.prompts = model, settings, prompts
        self.options = {"rank": settings.rank, "min_context": 0}
        self.config = LokiConfig.from_options(self.options)
        length, steps = len(prompts[0]), settings.steps
        texts = [*prompts, prompts[0][: length // 2]]
        asked = [
            needle_passage(tokenizer, text, len(text) - steps, steps, 50 + seed)
            for seed, text in enumerate(texts)
        ]
        self.texts = [(text, _rows(len(text))) for text in texts]
        self.asked = [(each.ids[:-1], each.rows + each.start) for each in asked]
        behind = held_out[-length:]
        hays = ((held_out[:length], length), (behind, length), (behind, length // 2))
        needles = [
            needle_passage(tokenizer, hay, size, steps, seed)
            for seed, (hay, size) in enumerate(hays)
        ]
        last = Passage(prompts[-1], length - steps)
        self.searching = [last, needle_passage(tokenizer, prompts[-1], length - steps, steps, 99)]
        self.passages = [*text_passages(held_out, length, steps, TEXTS), *needles]
        key = {**asdict(settings), "shares": SHARES, "rows": ROWS, "budgets": 1}
        self.kept = Kept(model, key, [*prompts, held_out])
        self.layers: tuple[CurvedLayer, ...] = ()
        self.blocks: dict[str, tuple[str, ...]] = {}
        self.slots: list[int] = []
        self.base = [kind_of(word) for word in settings.plan]

    @property
    def tokens(self) -> int:
        """Of all prompts that are read."""
        return sum(len(ids) for ids, _ in (*self.texts, *self.asked))

    @property
    def trials(self) -> int:
        """How often the model runs over a passage that is searched on, at most."""
        ways = HEADS[self.settings.heads]
        searched = self.settings.target.what == "bytes" and len(ways) > 1
        return len(ways) * len(self.searching) * searched

    @property
    def runs(self) -> int:
        """How often the model runs over a passage that judges."""
        return 2 * len(self.passages)

    def read(self, progress: Callable[[int], None]) -> None:
        """Measures what every head misses; what an earlier run has kept is not read again.

        Raises:
          ValueError: attention that cannot be observed, a rank of more dims than heads have.
        """
        self.bases = self._bases()
        every = [*self.texts, *self.asked]
        found = self._curves(every, progress)
        record = found[0][1]
        self.layers = tuple(CurvedLayer(*layer) for layer in record["layers"])
        self.blocks = {weights: tuple(blocks) for weights, blocks in record["blocks"].items()}
        sums, rows = [each for each, _ in found], [len(each) for _, each in every]
        at = len(self.texts)
        text = missed_of(self.layers, sums[:at], rows[:at])
        needles = missed_of(self.layers, sums[at:], rows[at:])
        self.missed = text.mean(needles)
        rank, dims = self.settings.rank, self.layers[0].head_dim
        if isinstance(rank, int) and rank > dims:
            raise ValueError(f"--rank {rank}: heads have {dims} dims; needs at most as many")
        rank = columns_of(rank, dims)
        itemsize = next(self.model.parameters()).element_size()
        tokens = len(self.prompts[0])
        self.costs = StepBytes(self.layers, itemsize, rank, tokens, self.config.budget)

    def choose(self, progress: Callable[[int], None]) -> None:
        """Solves for the target. Heads that may come by keys in any way are tried without some of
        them too: the fewest bytes are taken, or what diverges least of passages that do not judge.

        Raises:
          ValueError: a target that nothing keeps, attention that cannot be simulated.
        """
        target, refused, solved = self.settings.target, "", {}
        for ways in HEADS[self.settings.heads]:
            try:
                solved[ways] = self.solved(target, ways)
            except ValueError as error:
                refused = str(error)
        if not solved:
            raise ValueError(refused)
        found, plans = list(solved), [kinds for kinds, _ in solved.values()]
        if target.what == "mass":
            worth = [self.costs.share(kinds) for kinds in plans]
        elif len(plans) == 1:
            worth = [0.0]
        else:
            outcomes = self.outcomes("searched", self.searching, plans, progress)
            means = [[float(each.kl.mean()) for each in own] for own in outcomes]
            worth = [text + NEEDLES_COUNT * needles for text, needles in means]
        self.ways = found[worth.index(min(worth))]
        self.kinds, self.gap = solved[self.ways]

    def solved(
        self, target: Target, ways: Sequence[str], worth: Worth = plain
    ) -> tuple[list[Kind], float]:
        """The plan for a target whose heads come by keys in these ways, and the gap of the program.

        Raises:
          ValueError: a target that nothing keeps.
        """
        fixed = fixed_share(self.costs, self.base) if self.base else 0.0
        menu = self._menu(ways, worth)
        if target.what == "bytes":
            chosen = least_loss(menu.options, target.share - fixed)
        else:
            chosen = least_cost(menu.options, 1 - target.share)
        if chosen is None:
            raise ValueError(self._infeasible(target, menu, fixed))
        return menu.kinds(chosen), chosen.gap

    def judge(self, progress: Callable[[int], None]) -> tuple[Judged, Judged, tuple[float, float]]:
        """What the plan makes of held-out passages, what one budget for all heads does that reads
        as many bytes, and the 95 % bounds of how much more KL the plan has.

        Raises:
          ValueError: attention that cannot be simulated.
        """
        share = self.costs.share(self.kinds)
        plans = [tuple(self.kinds), tuple(self.costs.uniform(share, self.base))]
        outcomes = self.outcomes("judged", self.passages, plans, progress)
        ours, uniform = (self._judged(*each) for each in zip(plans, outcomes, strict=True))
        return ours, uniform, bounds(ours.each - uniform.each)

    def plan_of(
        self, ours: Judged, uniform: Judged, more: tuple[float, float], name: str, source: str
    ) -> LayerPlan:
        """What is stored."""
        keys = [count for layer in self.costs.keys(self.kinds) for count in layer]
        return LayerPlan(
            layers=tuple(
                PlannedLayer(
                    layer.path,
                    layer.weights,
                    self.blocks.get(layer.weights, ()),
                    layer.kv_heads,
                    str(kind),
                )
                for layer, kind in zip(self.layers, self.kinds, strict=True)
            ),
            model=name,
            top_k=round(sum(keys) / len(keys) / self.costs.tokens, 6),
            source=source,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            scores={
                USED: beats(ours, uniform, more),
                "target": str(self.settings.target),
                "heads": list(self.ways),
                "tokens": self.costs.tokens,
                "bytes": round(ours.bytes, 6),
                "missed": round(ours.missed, 6),
                "kl": ours.kl,
                "more than one budget for all": list(more),
                "needles": ours.needles,
                "needles asked": ours.asked,
                "kl of answers": ours.answers,
                "bytes of one budget for all": round(uniform.bytes, 6),
                "missed by one budget for all": round(uniform.missed, 6),
                "kl of one budget for all": uniform.kl,
                "kl of answers by one budget for all": uniform.answers,
                "needles of one budget for all": uniform.needles,
                "needles decide": needles_decide(ours, uniform),
                "gap": round(self.gap, 6),
                "versions": versions(),
            },
            under=judged_under(self.config, "loki"),
        )

    def forget(self) -> None:
        """What was kept for a run that is stopped."""
        self.kept.forget()

    # -- of the model

    def _curves(
        self, prompts: Sequence[tuple[Tensor, Tensor]], progress: Callable[[int], None]
    ) -> list[tuple[dict[str, Tensor], Any]]:
        """Of each prompt the sums of `MassCurves`, and the layers."""
        budget = self.config.budget
        seen = MassCurves(False, "pca", self.settings.rank, sink=budget.sink, recent=budget.recent)
        seen.bases = self.bases
        names = [f"curves-{number}" for number in range(len(prompts))]
        found = {name: known for name in names if (known := self.kept.recall(name)) is not None}
        left = [number for number, name in enumerate(names) if name not in found]
        progress(sum(len(prompts[number][0]) for number in range(len(names)) if number not in left))
        at = iter(left)

        def done() -> None:
            number = next(at)
            layers = [list(astuple(layer)) for layer in seen.of_layers.values()]
            found[names[number]] = {**seen.sums}, {"layers": layers, "blocks": seen.blocks}
            self.kept.keep(names[number], *found[names[number]])
            progress(len(prompts[number][0]))

        if left:
            read_curves(self.model, seen, (prompts[number] for number in left), done)
        return [found[name] for name in names]

    def _menu(self, ways: Sequence[str], worth: Worth) -> Menu:
        if self.base:
            return of_plan(self.missed, self.costs, self.base, worth)
        if FROM in ways and not self.slots:
            paths = [layer.path for layer in self.layers]
            self.slots = slot_classes(self.model, paths, self.options)
        return of_heads(self.missed, self.costs, self.slots, ways, worth)

    def _infeasible(self, target: Target, menu: Menu, fixed: float) -> str:
        least = [math.inf] * len(menu.places)
        for option in menu.options:
            least[option.head] = min(least[option.head], option.cost)
        lowest = fixed + math.fsum(least)
        if target.what == "mass" or lowest <= target.share:
            return f"--target {target}: the solver found no plan in its time; needs another target"
        other = "" if self.base or self.settings.heads == "any" else ", or --heads any"
        return (
            f"--target {target}: the least that a step can read is {lowest:.3f} of the cache's "
            f"bytes ({self.costs.index:.3f} for each index); needs more{other}, or a smaller --rank"
        )

    def _bases(self) -> Any:
        stored = Store().list()
        weights = {site.weights for entry in stored for site in entry.header.sites}
        own = set(map(weights_fingerprint, self.model.parameters())) if stored else set()
        return Store().find(weights & own) if stored else None

    def _stored(self) -> dict[str, Any]:
        """The stored bases of all layers, or none."""
        found = {}
        for layer in self.layers if self.bases is not None else ():
            basis = self.bases.find(layer.weights, occurrence=layer.occurrence)
            if basis is None:
                return {}
            found[layer.path] = basis
        return found

    # -- what a plan makes of text

    def outcomes(
        self,
        stage: str,
        passages: Sequence[Passage],
        plans: Sequence[Sequence[Kind]],
        progress: Callable[[int], None],
    ) -> list[list[Outcome]]:
        """Of each plan what it makes of each passage; what an earlier run has kept is not run."""
        simulation = Simulation(self.config.budget, self.settings.rank, {})
        paths = [layer.path for layer in self.layers]
        made: list[list[Outcome]] = [[] for _ in plans]
        with watched(self.model, simulation.look) as run:
            evidence = Evidence(self.model, simulation, run, paths, passages, self._stored())
            for number in range(len(passages)):
                for own, kinds in zip(made, plans, strict=True):
                    words = " ".join(map(str, kinds))
                    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
                    name = f"{stage}-{number}-{digest}"
                    known = self.kept.recall(name)
                    outcome = Outcome(**known[0]) if known else evidence.of(kinds, number)
                    if known is None:
                        self.kept.keep(name, asdict(outcome), None)
                    own.append(outcome)
                    progress(1)
                evidence.forget(number)
        return made

    def _judged(self, kinds: tuple[Kind, ...], outcomes: Sequence[Outcome]) -> Judged:
        text, needles = outcomes[:TEXTS], outcomes[TEXTS:]
        kl = torch.cat([each.kl for each in text])
        return Judged(
            kinds=kinds,
            bytes=self.costs.share(kinds),
            missed=missed_share(self.missed, self.costs, kinds),
            kl=float(kl.mean()),
            same=float(torch.cat([each.same for each in text]).float().mean()),
            needles=sum(int(each.found.sum()) for each in needles),
            asked=sum(len(each.found) for each in needles),
            answers=float(torch.cat([each.kl for each in needles]).mean()),
            each=kl,
        )


def beats(ours: Judged, uniform: Judged, more: tuple[float, float]) -> bool:
    """Whether a plan is surely better than one budget for all heads, and finds no needle less;
    where neither finds any, its answers diverge no more."""
    if needles_decide(ours, uniform):
        return more[1] < 0 and ours.needles >= uniform.needles
    return more[1] < 0 and ours.answers <= uniform.answers


def needles_decide(ours: Judged, uniform: Judged) -> bool:
    """Whether either finds a needle: else that none is lost says nothing."""
    return max(ours.needles, uniform.needles) > 0


def _rows(tokens: int) -> Tensor:
    return torch.linspace(tokens // 2, tokens - 1, ROWS).long()
