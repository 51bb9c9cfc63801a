"""The search behind `loki tune`: measure attention and times, propose plans, compare them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from loki_compile.captured import CapturedMass, captured_mass, summed_up
from loki_compile.commands.layer_costs import measured_costs
from loki_compile.commands.measure import Step, decode_reports, prefill
from loki_compile.commands.models import encode
from loki_compile.config import LokiConfig
from loki_compile.pca_store.layer_plan import LayerPlan, PlannedLayer
from loki_compile.pca_store.partial import Partial, PartialError, default_partial_root
from loki_compile.pca_store.store import Store
from loki_compile.planning import (
    Costs,
    candidates,
    loss_of,
    losses_of,
    moved,
    unread_are_dense,
)
from loki_compile.policies.kinds import Kind
from loki_compile.progress import run_key
from loki_compile.report import shown_ranges
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

log = logging.getLogger("loki_compile")

# Layers that may keep an index: a third of what every layer choosing for itself keeps.
INDEXES = 3
# Plans that are asked for needles, the best by divergence; at so many depths of both lengths.
ASKED, DEPTHS = 3, (0.2, 0.7)
# Neighbours of the best plan that are tried.
MOVES = 24
NEEDLE = " The magic number of Oslo is{}."
NUMBERS = (" 48213", " 70956", " 31584", " 92607")
QUESTION = " What is the magic number of Oslo? The magic number of Oslo is"


@dataclass(frozen=True)
class Settings:
    """As `loki tune` takes them."""

    top_k: int | float
    rank: int | float | str
    cost: float
    cost_context: int
    plans: int
    steps: int
    group_choice: str


@dataclass(frozen=True)
class Tried:
    """What a plan made of held-out text. kinds: of its layers, () where each chooses for itself.
    missed: attention, as measured, per layer. choosing: time, of what that takes there. kl: to
    dense logits. needles: found, None where nobody asked."""

    kinds: tuple[Kind, ...]
    missed: float
    choosing: float
    kl: float
    same: float
    needles: int | None = None

    def cells(self) -> list[str]:
        chooses = [n for n, kind in enumerate(self.kinds) if kind.ranking]
        dense = [n for n, kind in enumerate(self.kinds) if kind.dense]
        asked = "" if self.needles is None else f"{self.needles} of {2 * len(DEPTHS)}"
        return [
            shown_ranges(chooses) if self.kinds else "all",
            shown_ranges(dense),
            f"{self.missed:.3f}",
            f"{self.choosing:.2f}",
            f"{self.kl:.4f}",
            f"{self.same:.1%}",
            asked,
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
        """prompts: ids (1, T) each; held_out (T,): before the last `settings.steps`, context."""
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.prompts, self.held_out = prompts, held_out
        self.options = {
            "top_k": settings.top_k,
            "rank": settings.rank,
            "group_choice": settings.group_choice,
            "min_context": 0,
        }
        self.config = LokiConfig.from_options(self.options)
        key = run_key(model, {**asdict(settings), "search": 1}, [*prompts, held_out[None]])
        self.kept = Partial(default_partial_root(), key)
        self.needles = self._needles()
        self.hays: dict[int, Any] = {}  # prefilled caches of these
        self.seen: CapturedMass | None = None

    @property
    def runs(self) -> int:
        """How often the model will run, at most, once it has read."""
        assert self.seen is not None
        needles = len(self.needles) * (ASKED + 1)
        return 1 + 2 * len(self.seen.paths) + self.settings.plans + MOVES + 1 + needles

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
        known = self._recall("mass")
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
        self._keep("mass", sums, {"rows": self.seen.rows})

    def compare(self, progress: Callable[[int], None]) -> list[Tried]:
        """The plans that the program proposes, the best first, and behind them every layer choosing
        for itself.

        Raises:
          ValueError: nothing to choose from.
        """
        assert self.seen is not None
        self.mass, slots = summed_up(self.seen), self._slots()
        costs, alone = self._costs()
        layers = len(slots)
        choosing = layers * (alone - costs.read)
        most = layers * costs.read + self.settings.cost * choosing

        def time_of(kinds: Sequence[Kind]) -> float:
            return (sum(map(costs.of, kinds)) - layers * costs.read) / choosing

        with watched(self.model, self.simulation.look) as run:
            self._prefilled(run)
            losses = losses_of(self.mass, *self._sensitivities(progress))
            found = candidates(
                losses, slots, costs, most, self.settings.plans, indexes=max(1, layers // INDEXES)
            )
            if not found:
                raise ValueError(
                    f"found no plan whose choosing takes at most --cost {self.settings.cost} of "
                    "what it takes where every layer chooses: needs a larger --cost"
                )

            def tried(kinds: Sequence[Kind]) -> Tried:
                kl, same = self._divergence(kinds, progress)
                return Tried(tuple(kinds), self._missed(kinds), time_of(kinds), kl, same)

            plans = sorted(map(tried, found), key=lambda each: each.kl)
            left = MOVES
            while left > 0:
                better = plans[0]
                for kinds in moved(losses, slots, better.kinds)[:left]:
                    left -= 1
                    if (trial := tried(kinds)).kl < better.kl:
                        better = trial
                if better is plans[0]:
                    break
                plans.insert(0, better)
            everyone = tried([Kind("loki")] * layers)
            everyone = replace(everyone, choosing=1.0)
            asked = [self._asked(each, run, progress) for each in (everyone, *plans[:ASKED])]
        base, *best = asked
        best.sort(key=lambda each: (-(each.needles or 0), each.kl))
        return [*best, *plans[ASKED : self.settings.plans], replace(base, kinds=())]

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
                "needles": best.needles,
                "missed": best.missed,
                "choosing": best.choosing,
                "kl where every layer chooses": tried[-1].kl,
                "needles where every layer chooses": tried[-1].needles,
            },
        )

    def forget(self) -> None:
        """What was kept for a run that is stopped."""
        self.kept.remove()

    # -- of the model

    def _fingerprints(self) -> set[str]:
        from loki_compile.pca_store.fingerprint import weights_fingerprint

        return {weights_fingerprint(parameter) for parameter in self.model.parameters()}

    def _slots(self) -> list[int]:
        """Of each layer that was seen, its class of slots in a decode step.

        Raises:
          ValueError: layers in graphs of their own, where nobody can read what another chose.
        """
        assert self.seen is not None
        options = {**self.options, "policy": {"*": "reuse"}}
        reports = decode_reports(self.model, "dynamic", 64, options)
        of: dict[str, str] = {}
        for site in (site for report in reports for site in report.sites):
            if site.outcome == "sparse":
                of[site.path] = site.reads or site.path
        paths = self.seen.paths
        shared = [path for path in paths if of.get(path, path) != path]
        if not shared:
            raise ValueError(
                f"none of {len(paths)} layers can read what another chose (each in a graph of its "
                "own, or none with the slots of another): nothing to tune"
            )
        names = list(dict.fromkeys(of.get(path, path) for path in paths))
        return [names.index(of.get(path, path)) for path in paths]

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

    # -- what a plan makes of text

    @torch.no_grad()
    def _prefilled(self, run: Step) -> None:
        """Fills the cache up to the steps that count, and has dense attention take these."""
        start = len(self.held_out) - self.settings.steps
        self.cache = self._empty()
        ids = self.held_out[None].to(self.model.device)
        prefill(self.model, ids[:, :start], self.cache)
        self.run, self.fed = run, ids[:, start:]
        if self.seen is not None and self.seen.bases is not None:
            for (weights, use), path in self.seen.layers.items():
                basis = self.seen.bases.find(weights, occurrence=use)
                if basis is not None:
                    self.simulation.bases[path] = basis
        self.dense = self.decoded([Kind(dense=True)] * len(self.paths))
        self._check_simulated()

    def _check_simulated(self) -> None:
        """
        Raises:
          ValueError: attention of a layer cannot be simulated.
        """
        missing = [path for path in self.paths if path not in self.simulation.served]
        if missing:
            why = self.simulation.refused.get(missing[0], "it was not seen with a cache")
            raise ValueError(
                f"what a plan makes of {missing[0]} cannot be told: {why}. Needs plain attention; "
                "write a plan by hand, as a dict of policy="
            )

    @property
    def paths(self) -> list[str]:
        assert self.seen is not None
        return self.seen.paths

    @torch.no_grad()
    def decoded(self, kinds: Sequence[Kind]) -> Tensor:
        """Log-probabilities (steps, vocabulary) behind the held-out tokens."""
        self.simulation.under(kinds, self.paths)
        out = self.run(self.fed, past_key_values=self._copied(self.cache))
        return out.logits[0].float().log_softmax(-1)

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _copied(self, cache: Any) -> Any:
        copy = self._empty()
        for number, layer in enumerate(cache.layers):
            copy.update(layer.keys.clone(), layer.values.clone(), number)
        return copy

    def _divergence(
        self, kinds: Sequence[Kind], progress: Callable[[int], None]
    ) -> tuple[float, float]:
        """KL divergence of a plan's tokens from dense ones, and the share of same tokens."""
        name = _name("kl", kinds)
        known = self._recall(name)
        if known is None:
            here = self.decoded(kinds)
            kl = float((self.dense.exp() * (self.dense - here)).sum(-1).mean())
            same = float((self.dense.argmax(-1) == here.argmax(-1)).float().mean())
            known = {}, [kl, same]
            self._keep(name, *known)
        progress(1)
        kl, same = known[1]
        return kl, same

    def _sensitivities(self, progress: Callable[[int], None]) -> tuple[list[float], list[float]]:
        """Of each layer the divergence where it alone chooses for itself, or reads what the layer
        before it chose, and all others are dense."""
        own, read = [], []
        for layer in range(len(self.paths)):
            kinds = [Kind(dense=True)] * len(self.paths)
            kinds[layer] = Kind("loki")
            own.append(self._divergence(kinds, progress)[0])
            heads = self.mass.heads.get(("loki", layer - 1, layer))
            if heads is None:
                read.append(own[-1])
                progress(1)
                continue
            kinds[layer - 1] = Kind("loki", dense=True)
            kinds[layer] = Kind(reuse=True, source=layer - 1, heads=heads)
            read.append(self._divergence(kinds, progress)[0])
        return own, read

    def _missed(self, kinds: Sequence[Kind]) -> float:
        return loss_of(losses_of(self.mass), kinds) / len(kinds)

    def _needles(self) -> list[tuple[Tensor, int, int]]:
        """Prompts at two lengths, each with a number hidden in it and asked for: ids (T,) with the
        answer at their end, where the question begins, and the answer's length."""
        hay = self.held_out[: -self.settings.steps]
        made: list[tuple[Tensor, int, int]] = []
        question = encode(self.tokenizer, QUESTION)
        for length in (len(hay) // 2, len(hay)):
            for place, depth in enumerate(DEPTHS):
                answer = encode(self.tokenizer, NUMBERS[len(made) % len(NUMBERS)])
                needle = encode(self.tokenizer, NEEDLE.format(NUMBERS[len(made) % len(NUMBERS)]))
                room = length - len(needle) - len(question) - len(answer)
                at = int(depth * room) + place
                ids = torch.cat((hay[:at], needle, hay[at:room], question, answer))
                made.append((ids, len(ids) - len(question) - len(answer), len(answer)))
        return made

    @torch.no_grad()
    def _asked(self, tried: Tried, run: Step, progress: Callable[[int], None]) -> Tried:
        """With the needles that were found: each token of a number behind the true ones."""
        name = _name("needles", tried.kinds)
        known = self._recall(name)
        if known is None:
            found = 0
            self.simulation.under(tried.kinds, self.paths)
            for number, (ids, start, answer) in enumerate(self.needles):
                ids = ids[None].to(self.model.device)
                if number not in self.hays:
                    self.hays[number] = self._empty()
                    prefill(self.model, ids[:, :start], self.hays[number])
                cache = self._copied(self.hays[number])
                logits = run(ids[:, start:-1], past_key_values=cache).logits[0, -answer:]
                found += bool((logits.argmax(-1) == ids[0, -answer:]).all())
                progress(1)
            known = {}, found
            self._keep(name, *known)
        return replace(tried, needles=known[1])

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

    def _recall(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        if not self.kept.has(name):
            return None
        try:
            return self.kept.read(name)
        except PartialError as error:
            log.warning("measured again: %s", error)
            return None

    def _keep(self, name: str, tensors: dict[str, Tensor], record: Any) -> None:
        try:
            self.kept.write(name, tensors, record)
        except OSError as error:
            log.warning("cannot keep what was measured (%s): a stop will lose it", error)


def _name(what: str, kinds: Sequence[Kind]) -> str:
    words = " ".join(map(str, kinds))
    return f"{what}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"
