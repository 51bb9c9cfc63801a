"""What is kept beside the caches of one graph, from call to call: which indexes are true, what is
built where one is missing, and what a step has left of each.

`indexes` knows each cache by itself; this file knows the caches of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loki_compile import fits, indexes
from loki_compile.builds import Build, Watch
from loki_compile.caches import CacheBinding, Cached, reading_waits, tokens_before
from loki_compile.config import LokiConfig
from loki_compile.indexes import IndexRecord
from loki_compile.kernels.kept import IndexLayout, Keeps, Layout
from loki_compile.steps import Step
from loki_compile.trails import Trail
from loki_compile.variants import FillGraph, Variants
from loki_compile.witness import Witness


class Mirrors:
    """Of one graph."""

    def __init__(self, variants: Variants, config: LokiConfig) -> None:
        self.config = config
        self.fill_graph = variants.fill
        self.seen = variants.seen
        self.outputs = variants.outputs  # those that the graph had before it was rewritten
        self.index_dtype = torch.int8 if config.index_dtype == "int8" else None
        self.watch = Watch()
        self.turn = 0

    # -- how far caches are filled

    def filled_after(
        self, args: Sequence[Any], bindings: Sequence[CacheBinding], caches: Sequence[Cached]
    ) -> list[int]:
        """Tokens in each cache behind this step; no device sync in steady state."""
        written: list[int] = []  # what the fill graph says, asked once

        def after(binding: CacheBinding, cached: Cached) -> int:
            slots = cached.slots
            if binding.form.grows:
                return slots + cached.stored
            if not binding.form.written:
                return slots
            # Counting costs nothing; reading a position costs a sync where it lies on a device.
            if reading_waits(cached.holder):
                before = indexes.filled_before(cached)
                if before is not None:
                    return min(slots, before + cached.stored)
            if self.fill_graph is None:
                return slots
            if not written:
                written.append(int(self.fill_graph.read(args)))
            # Positions that are counted from the end are no number of tokens.
            return min(slots, written[0]) if written[0] > 0 else slots

        return [after(*pair) for pair in zip(bindings, caches, strict=True)]

    def filled_on(
        self,
        trail: Trail,
        spots: Sequence[tuple[int, ...]],
        args: Sequence[Any],
        bindings: Sequence[CacheBinding],
    ) -> list[int]:
        """As `filled_after`; spots: where a trail has each cache's tensors."""
        written = 0
        if self.fill_graph is not None:
            written = int(self.fill_graph.read(args))
        filled = []
        for binding, (spot, *_) in zip(bindings, spots, strict=True):
            form, slots = binding.form, trail.shapes[spot][binding.form.token_axis]
            if form.grows:
                count = binding.new_tokens
                slots += count if isinstance(count, int) else count.of(args)
            elif form.written and written > 0:
                slots = min(slots, written)
            filled.append(slots)
        return filled

    def remember_filled(self, step: Step, outputs: Sequence[Any]) -> None:
        for place, binding in enumerate(step.served.bindings):
            before = step.caches[place]
            if not binding.form.grows and reading_waits(before.holder):
                indexes.remember_filled(binding.left_by(outputs, before), step.filled[place])

    # -- which are true

    def true_indexes(self, step: Step) -> list[IndexRecord | None]:
        """What is kept of each cache, in order; None where nothing is known to mirror it."""
        held: list[IndexRecord | None] = []
        unwatched = []
        for place in step.served.kept:
            binding, cached, filled = (
                step.served.bindings[place],
                step.caches[place],
                step.filled[place],
            )
            record = indexes.find(binding, cached)
            if record is not None and (
                not indexes.is_true(binding, cached, record, filled)
                or fits.is_outgrown(record.fit, cached, filled, self.config.min_context)
            ):
                record = None
            held.append(record)
            if record is not None and not cached.counts_writes:
                unwatched.append((record, cached))
        if unwatched and not self._agree(step, unwatched):
            wrong = {id(record) for record, _ in unwatched}
            held = [None if id(record) in wrong else record for record in held]
        return held

    def _agree(self, step: Step, unwatched: Sequence[tuple[IndexRecord, Cached]]) -> bool:
        """Whether caches that count no writes are as the last step left them."""
        witness = unwatched[0][0].witness
        if witness is not None and witness.was_wrong():
            return False
        moved = None
        if self.fill_graph is not None and reading_waits(unwatched[0][1].past):
            moved = self._has_moved(step, self.fill_graph)
        return indexes.agree_all(unwatched, moved)

    def _has_moved(self, step: Step, graph: FillGraph) -> Tensor | None:
        """Whether positions on a device are not those that were counted, 0-d, without waiting."""
        cached, counted = step.caches[graph.place], step.filled[graph.place]
        filled = graph.read(step.args)
        if not isinstance(filled, Tensor):
            return None  # the host has read it
        return (filled > 0) & (filled.clamp(max=cached.slots) != counted)

    def lack_keys(self, step: Step, held: Sequence[IndexRecord | None]) -> bool:
        """Whether a basis is to be fitted where nothing is cached yet."""
        return any(
            record is None
            and step.served.bindings[place].needs_basis
            and tokens_before(step.caches[place], step.filled[place]) < 1
            for place, record in zip(step.served.kept, held, strict=True)
        )

    def held_back(self, step: Step, held: Sequence[IndexRecord | None]) -> bool:
        """Whether this call needs a build that is held back; see `builds.Watch`."""
        if None not in held:
            for build in {id(r.build): r.build for r in held if r is not None}.values():
                build.use()
            return False
        dropped = None
        if self.config.min_context:
            bindings, caches = step.served.bindings, step.caches
            records = [indexes.find(bindings[at], caches[at]) for at in step.served.kept]
            dropped = [record.build for record in records if record is not None]
        before = tokens_before(step.caches[0], step.filled[0])
        return self.watch.holds_back(before, step.filled[0], dropped)

    # -- what is made

    def layouts(self, step: Step) -> tuple[Layout | None, ...] | None:
        """Of what is kept of each cache; None where a spectrum decides that is not known yet."""
        by_spectrum = isinstance(self.config.rank, str)
        for binding, cached in zip(step.served.bindings, step.caches, strict=True):
            if binding.keeps is not Keeps.INDEX:
                continue
            if by_spectrum and binding.basis is None:
                indexes.take_highest_rank(binding, cached)
            if binding.layout is None:
                rank = binding.rank(self.config.rank)
                if rank is None:
                    return None
                dtype, own = self.index_dtype or cached.past.dtype, binding.basis is None
                binding.layout = IndexLayout(rank, dtype, own and binding.form.rows_apart)
        return tuple(binding.layout for binding in step.served.bindings)

    def build_missing(self, step: Step, held: Sequence[IndexRecord | None]) -> list[IndexRecord]:
        if None not in held and not step.grown:
            return list(held)  # type: ignore[arg-type]
        made = Build(self.watch, step.filled[0])
        records = []
        for place, record in zip(step.served.kept, held, strict=True):
            binding, cached = step.served.bindings[place], step.caches[place]
            if record is None:
                record = indexes.build(
                    binding,
                    cached,
                    indexes.find(binding, cached),
                    made,
                    filled=step.filled[place],
                    rank=self.config.rank,
                    dtype=self.index_dtype,
                    seen=functools.partial(self.seen, step.args, place, step.seen),
                    tally=step.served.tally,
                )
            elif binding.form.in_place:
                record = indexes.carry_over(binding, cached, record)
            records.append(record)
        return records

    def adopt(self, step: Step, outputs: Sequence[Any], records: Sequence[IndexRecord]) -> None:
        """Ties each index to the cache tensor that the step has left behind."""
        out = self.outputs
        unwatched = []
        for place, record in zip(step.served.kept, records, strict=True):
            binding, filled = step.served.bindings[place], step.filled[place]
            after = binding.left_by(outputs, step.caches[place])
            tensors = []
            if binding.form.replaced and not binding.form.in_place:
                parts = record.layout.parts
                # A full window's index is what is left of a longer one: rows apart in memory, where
                # the compiled graph takes them to be next to each other.
                tensors = [x.contiguous() for x in outputs[out : out + parts]]
                out += parts
            record = indexes.adopt(binding, after, tensors, record, filled)
            if not after.counts_writes:
                unwatched.append((record, after))
        if unwatched:
            self.turn += 1
            witness = Witness([(cached, record.filled) for record, cached in unwatched], self.turn)
            for record, _ in unwatched:
                record.witness = witness
