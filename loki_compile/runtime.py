"""What runs at each call: checks that indexes still belong to their caches, picks the variant.

A `DecodeGraph` stands where Dynamo expects the compiled function. It owns two variants of one
graph, each compiled when it is first needed: the dense one, and the sparse one whose extra inputs
are the key indexes and bases. Which of the two runs is a matter of speed alone: a row that sees
fewer than `min_context` keys reads all of them in either. Where exact steps are asked for (`exact`)
and there are true indexes, a third one runs: dense attention, with the sparse one's extra inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loki_compile import indexes, lengths, prompts
from loki_compile.buffers import UNLIMITED, Growing
from loki_compile.builds import Watch
from loki_compile.caches import reading_waits, version_of
from loki_compile.config import LokiConfig
from loki_compile.counts import Because, say_once, warn_of_left_out
from loki_compile.deferred import Deferred
from loki_compile.engines import Variant, in_turn
from loki_compile.exact_steps import Asked, asked_now
from loki_compile.fast_path import FastPath
from loki_compile.index_record import IndexRecord
from loki_compile.kernels.kept import Layout
from loki_compile.passes.attention import MAX_QUERY_TOKENS
from loki_compile.passes.shared_caches import Part, with_parts
from loki_compile.readings import Reading, Told
from loki_compile.recovery import Rollback, Saved, is_shortage, ordinary_tensors
from loki_compile.setbacks import Setbacks
from loki_compile.step_indexes import StepIndexes
from loki_compile.steps import Served, Step
from loki_compile.trails import Trail, settle_all
from loki_compile.variants import Variants
from loki_compile.witness import Witness


class DecodeGraph:
    """The compiled function of a graph with at least one sparse site."""

    def __init__(
        self,
        variants: Variants,
        config: LokiConfig,
        parts: Sequence[Part],
        served: Served,
        serve: Callable[[Sequence[Any]], Served],
        growing: Growing | None = None,
    ) -> None:
        """
        Args:
          served: for the model that the graph was traced with.
          serve: the same for another one, given the arguments of its call.
          growing: what grows in place, as the variants have it.
        """
        self.variants = variants
        self.config = config
        self.parts = parts
        self.served = served
        self.serve = serve
        self.token_counts = variants.token_counts
        self.outputs = variants.outputs
        self.rollback = Rollback(variants.undo)
        self.fill_graph = variants.fill
        self.growing = growing
        self.copying: Variant | None = None
        # A weight that tells models apart; its version tells whether it is what it was.
        self.owner = next((b.weight for b in served.bindings if b.weight is not None), None)
        self.known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.dense: Variant | None = None
        # By what is kept of each cache, and whether attention is dense all the same.
        self.sparse: dict[tuple[tuple[Layout | None, ...], bool], Variant] = {}
        self.sparse_ran = False
        self.interpreted = 0
        self.turn = 0
        self.watch = Watch()
        self.own = StepIndexes(variants, config, self.watch)
        most = config.watch_mass
        tell = None if most is None else functools.partial(warn_of_left_out, most)
        self.told = Told([s.site.path for s in variants.plan.sparse if s.weighed], tell)
        self.setbacks = Setbacks(self.watch, self.sparse)
        self.fast = FastPath(served, variants, self.growing, self.own.layouts, config.min_context)

    def __call__(self, *args: Any) -> Any:
        holders = () if self.growing is None else self.growing.holders(args)
        served = self.served_to(args)
        if self.parts:
            args = with_parts(args, self.parts)
        step = self.fast.step(args, served, holders)
        if step is None:
            settle_all()
            grown = None if self.growing is None else self.growing.take(args, holders)
            step = Step(args, served, [], grown)
            step.filled = lengths.filled_after(self.fill_graph, args, served.bindings, step.caches)
            if grown is None and self.growing is not None:
                return self.run_copying(step)
        why = self.why_dense(step)
        if why is not None:
            return self.run_dense(step, why)
        asked = asked_now()
        if asked is Asked.NOTHING:
            return self.run_sparse(step)
        return self.run_resting(step) if asked is Asked.RESTING else self.run_exact(step)

    def remember(self, args: Sequence[Any]) -> None:
        """`served` is for the model whose call this is."""
        if self.owner is not None:
            weight = args[self.owner]
            self.known[weight] = (version_of(weight), self.served)

    def served_to(self, args: Sequence[Any]) -> Served:
        """What there is for the model whose call this is.

        Raises:
          ValueError: the basis that the options name does not belong to it.
        """
        if self.owner is None:
            return self.served
        weight = args[self.owner]
        version, served = self.known.get(weight, (None, None))
        if served is None or version != version_of(weight):
            served = self.serve(args)
            self.known[weight] = (version_of(weight), served)
        return served

    @property
    def gave_up(self) -> str | None:
        """Why it is dense from now on; None while it is not."""
        return self.setbacks.gave_up

    def state(self) -> str:
        """What differs now from the plan, in words: "" if nothing does."""
        if self.setbacks.gave_up is not None:
            return f"{Because.GAVE_UP.value}: {self.setbacks.gave_up}"
        if self.setbacks.short_of_memory:
            return f"no memory for an index: tried again in {self.setbacks.short_of_memory} steps"
        if self.interpreted:
            return f"interpreted in {self.interpreted} calls: sizes that Inductor had fixed changed"
        late = [run.state() for run in self.variants.runs if isinstance(run, Deferred)]
        return self.watch.state() or "; ".join(filter(None, late))

    def fitted_bases(self) -> dict[str, str]:
        """Of each site whose cache has an automatic basis, by its path: what that was fitted from
        last."""
        bindings = self.served.bindings
        return {
            sparse.site.path: bindings[sparse.cache].basis_name()
            for sparse in self.variants.plan.sparse
            if bindings[sparse.cache].fitted
        }

    def readings(self) -> dict[str, Reading]:
        """Of each site whose rows are weighed, by its path: what they read so far. Waits for the
        device."""
        return self.told.of(self.served.tally)

    def _missed(self) -> None:
        self.interpreted += 1
        self.served.tally.add("interpreted_steps")

    # -- which variant

    def why_dense(self, step: Step) -> Because | None:
        """The one decision: sparse from `min_context` visible keys on, unless it would read all.

        `min_context=0` forces the sparse variant at every length, also where the budget covers all.
        """
        if any(count.of(step.args) > MAX_QUERY_TOKENS for count in self.token_counts):
            return Because.PREFILL
        if self.setbacks.gave_up is not None:
            return Because.GAVE_UP
        if self.config.min_context:
            if step.visible < self.config.min_context:
                return Because.SHORT
            if all(rule.covers(step.visible) for rule in self.variants.rules):
                return Because.COVERED
        if self.setbacks.short_of_memory:
            self.setbacks.short_of_memory -= 1
            return Because.SHORTAGE
        return None

    # -- the dense variant

    def run_dense(self, step: Step, why: Because) -> Any:
        if why in (Because.GAVE_UP, Because.SHORTAGE):
            self._come_off(step)
            indexes.forget(step.served.bindings, step.caches)
        asked = []
        if prompts.any_known():
            asked = self._asked(step) if step.trail is None else step.trail.asked
        outputs = self._dense_outputs(step)
        step.served.tally.dense(why)
        if self.fast.trails is None:
            self._remember_filled(step, outputs)
            for cache, place, said in asked:
                left = step.served.bindings[cache].left_by(outputs, step.caches[cache])
                prompts.keep(left.past, place, said)
        else:
            self.fast.leave(step, asked=asked)
        return outputs

    def _dense_outputs(self, step: Step) -> Any:
        if self.dense is None:
            with in_turn():
                if self.dense is None:
                    self.dense = self.variants.dense(self._missed)
        return self._with_rooms(self.dense(*step.inputs), step)

    def run_resting(self, step: Step) -> Any:
        """Dense, and its trail remembers which rows its indexes have fallen behind of; where these
        are not known, indexes are kept true."""
        trail = step.trail
        if trail is None or (trail.records is not None and step.held is None):
            return self.run_exact(step)
        if trail.records is None:
            return self.run_dense(step, Because.RESTING)
        written = self.fast.written(step, trail)
        if written is None:
            return self.run_exact(step)
        trail.fall_behind(written)
        outputs = self._dense_outputs(step)
        trail.go_on(step, self.fast.watched(step))
        trail.unsettle()
        step.served.tally.dense(Because.RESTING)
        return outputs

    def _asked(self, step: Step) -> list[tuple[int, tuple[int, ...], prompts.Asked]]:
        """What prompts have asked of the caches that are still to get a basis."""
        return [
            (number, prompts.place_of(binding, cached), said)
            for number, (binding, cached) in enumerate(
                zip(step.served.bindings, step.caches, strict=True)
            )
            if binding.needs_basis and (said := prompts.asked_of(binding, cached)) is not None
        ]

    def run_copying(self, step: Step) -> Any:
        """Dense, and what grows is copied: there is no memory with room for it."""
        say_once(
            (step.served.tally.model, "no room"),
            f"{step.served.tally.model}: there is no memory for caches with room to grow in; they "
            "are copied at each step, as the model says, and decoding is dense until there is.",
        )
        if self.copying is None:
            with in_turn():
                if self.copying is None:
                    self.copying = self.variants.dense(self._missed, copying=True)
        outputs = self.copying(*step.args, UNLIMITED)
        step.served.tally.dense(Because.SHORTAGE)
        return outputs

    def _with_rooms(self, outputs: Any, step: Step) -> Any:
        if self.growing is None or step.grown is None:
            return outputs
        return self.growing.put(outputs, step.grown)

    # -- the sparse variant, and the one that is exact and keeps indexes true

    def run_exact(self, step: Step) -> Any:
        """Dense, as it was asked for: true indexes stay true, and none is built."""
        if not step.served.kept:
            return self.run_dense(step, Because.EXACT)
        if step.held is None:
            self._come_off(step)
            layouts, held = self.own.layouts(step), self.own.true_ones(step)
            if layouts is None or None in held:
                return self.run_dense(step, Because.EXACT)
        return self.run_sparse(step, exact=True)

    def run_sparse(self, step: Step, *, exact: bool = False) -> Any:
        if step.trail is not None:
            if step.held is not None:
                return self._run_on(step, step.trail, step.held, exact)
            self._come_off(step)
        layouts = self.own.layouts(step)  # what an index is found by
        held = self.own.true_ones(step)
        if self.own.lacks_keys(step, held):
            return self.run_dense(step, Because.EMPTY)
        if self.own.hold_back(step, held):
            return self.run_dense(step, Because.HELD_BACK)
        # Compiled first where that is possible: no keys are read for an index that nothing uses.
        if layouts is not None and self._variant(layouts, exact) is None:
            return self.run_dense(step, Because.GAVE_UP)
        whole = self.rollback.saves_all(step.args, self.sparse_ran)
        try:
            with ordinary_tensors():
                saved = self.rollback.save(step.args, whole)
                records = self.own.build_missing(step, held)
        except Exception as error:  # out of memory, most likely; nothing is written yet
            return self._after(error, step, "a key index could not be built")
        variant = self._variant(tuple(b.layout for b in step.served.bindings), exact)
        if variant is None:
            return self.run_dense(step, Because.GAVE_UP)
        extra: list[Tensor] = []
        for place, record in zip(step.served.kept, records, strict=True):
            binding = step.served.bindings[place]
            extra += record.inputs(step.filled[place])
            if not binding.form.replaced:
                record.as_it_was = False  # until the step has ended well
        try:
            outputs = list(self._with_rooms(variant(*step.inputs, *extra), step))
        except Exception as error:
            if not whole:
                raise  # what the first attempt has written cannot be taken back
            saved.put_back()
            return self._after(error, step, "the sparse variant failed", saved)
        if not exact:
            self._say_it_ran(step, records)
            self.told.take(step.served.tally, outputs)
        try:
            self._adopt(step, outputs, records)
        except Exception as error:  # out of memory: the step is right, its index is built anew
            if not self.config.strict:
                self.setbacks.set_back("a key index could not be kept", error)
        self._count(step, exact)
        del outputs[self.outputs :]
        return outputs

    def _come_off(self, step: Step) -> None:
        """A step on a trail takes each cache by itself after all."""
        if step.trail is None:
            return
        settle_all()
        step.trail = None
        if step.grown is not None and self.growing is not None:
            self.growing.find_memory(step.grown, step.args)

    def _count(self, step: Step, exact: bool) -> None:
        """A step that ended well and left its indexes true."""
        self.setbacks.shortages = 0
        if exact:
            step.served.tally.dense(Because.EXACT)
        else:
            step.served.tally.add("sparse_steps")

    def _run_on(self, step: Step, trail: Trail, held: list[IndexRecord], exact: bool) -> Any:
        """A sparse step whose indexes are all true."""
        if not trail.used:
            trail.used = True
            for build in {id(record.build): record.build for record in held}.values():
                build.use()
        assert trail.layouts is not None
        variant = self._variant(trail.layouts, exact)
        if variant is None:
            return self.run_dense(step, Because.GAVE_UP)
        whole = self.rollback.saves_all(step.args, self.sparse_ran)
        try:
            with ordinary_tensors():
                if trail.behind is not None:
                    self.own.catch_up(step, held, trail.behind)
                    trail.behind = None
                saved = self.rollback.save(step.args, whole)
                extra: list[Tensor] = []
                for cache, record in zip(step.served.kept, held, strict=True):
                    extra += record.inputs(step.filled[cache])
        except Exception as error:
            return self._after(error, step, "a key index could not be read")
        try:
            outputs = self._with_rooms(variant(*step.inputs, *extra), step)
        except BaseException as error:
            for record in held:
                record.trail, record.as_it_was = None, False
            if not whole or not isinstance(error, Exception):
                raise  # what the first attempt has written cannot be taken back
            saved.put_back()
            return self._after(error, step, "the sparse variant failed", saved)
        trail.go_on(step, self.fast.watched(step))
        trail.unsettle()
        if self.told.names and not exact:
            outputs = list(outputs)
            self.told.take(step.served.tally, outputs)
        self._count(step, exact)
        return outputs

    def _variant(self, layouts: tuple[Layout | None, ...], exact: bool) -> Variant | None:
        """The variant that takes these indexes, compiled at its first use. None: stay dense."""
        key = layouts, exact
        if key in self.sparse:
            return self.sparse[key]
        make = self.variants.exact if exact else self.variants.sparse
        with in_turn():
            if self.setbacks.gave_up is None and key not in self.sparse:
                try:
                    # What is made here outlives the call, and the mode it came in.
                    with ordinary_tensors():
                        self.sparse[key] = make(layouts, self._missed)
                except Exception as error:
                    if self.config.strict:
                        raise
                    self.setbacks.give_up("the sparse variant could not be built", error)
            return self.sparse.get(key)

    def _say_it_ran(self, step: Step, records: Sequence[IndexRecord]) -> None:
        if self.sparse_ran:
            return
        self.sparse_ran = True
        for place, record in zip(step.served.kept, records, strict=True):
            if record.fit is not None:  # by this graph, or by one that found the cache before
                step.served.bindings[place].fitted = record.fit.origin
        visible, model = step.visible, step.served.tally.model
        most = max(rule.most(visible) for rule in self.variants.rules)
        say_once(
            (model, "sparse"),
            lambda: (
                f"{model}: first sparse step done: {self.variants.sparse_sites} of "
                f"{self.variants.sites} attention sites read at most "
                f"{most} of {visible} keys. loki_compile.stats() "
                "counts steps, loki_compile.reports() says what became of each site."
            ),
        )

    # -- when something fails

    def _after(self, error: Exception, step: Step, what: str, saved: Saved | None = None) -> Any:
        """The step, dense, after its sparse form failed; or the error, where that was asked for."""
        if self.config.strict:
            raise error
        why = Because.SHORTAGE if is_shortage(error) else Because.GAVE_UP
        try:
            outputs = self.run_dense(step, why)
        except Exception:
            if saved is not None:
                saved.put_back()  # the step can be taken again
            raise
        self.setbacks.set_back(what, error)
        return outputs

    # -- behind a step

    def _adopt(self, step: Step, outputs: Sequence[Any], records: Sequence[IndexRecord]) -> None:
        """Ties each index to the cache tensor that the step has left behind."""
        out = self.outputs
        unwatched = []
        for place, record in zip(step.served.kept, records, strict=True):
            binding, filled = step.served.bindings[place], step.filled[place]
            after = binding.left_by(outputs, step.caches[place])
            tensors = []
            if binding.form.replaced and not binding.form.in_place:
                count = record.layout.tensors
                # A full window's index is what is left of a longer one: rows apart in memory, where
                # the compiled graph takes them to be next to each other.
                tensors = [x.contiguous() for x in outputs[out : out + count]]
                out += count
            record = indexes.adopt(binding, after, tensors, record, filled)
            if not after.counts_writes:
                unwatched.append((record, after))
        if unwatched:
            self.turn += 1
            witness = Witness([(cached, record.filled) for record, cached in unwatched], self.turn)
            for record, _ in unwatched:
                record.witness = witness
        if self.fast.trails is None:
            self._remember_filled(step, outputs)
        else:
            self.fast.leave(step, records)

    def _remember_filled(self, step: Step, outputs: Sequence[Any]) -> None:
        for place, binding in enumerate(step.served.bindings):
            before = step.caches[place]
            if not binding.form.grows and reading_waits(before.base):
                lengths.remember_filled(binding.left_by(outputs, before), step.filled[place])
