"""Which indexes a step finds true, and the building of those that it misses.

Each cache is taken by itself (`indexes`): what `trails` spares a step that finds all as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from loki_compile import fits, indexes
from loki_compile.builds import Build, Watch
from loki_compile.caches import Cached, reading_waits, tokens_before
from loki_compile.config import LokiConfig
from loki_compile.index_record import IndexRecord
from loki_compile.kernels.kept import IndexLayout, Keeps, Layout
from loki_compile.steps import Step
from loki_compile.variants import FillGraph, Variants


class StepIndexes:
    """Of the steps of one graph. Lists are in the order of `Served.kept`."""

    def __init__(self, variants: Variants, config: LokiConfig, watch: Watch) -> None:
        self.variants = variants
        self.config = config
        self.watch = watch

    def true_ones(self, step: Step) -> list[IndexRecord | None]:
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
        if self.variants.fill is not None and reading_waits(unwatched[0][1].past):
            moved = self._has_moved(step, self.variants.fill)
        return indexes.agree_all(unwatched, moved)

    def _has_moved(self, step: Step, graph: FillGraph) -> Tensor | None:
        """Whether positions on a device are not those that were counted, 0-d, without waiting."""
        cached, counted = step.caches[graph.place], step.filled[graph.place]
        filled = graph.read(step.args)
        if not isinstance(filled, Tensor):
            return None  # the host has read it
        return (filled > 0) & (filled.clamp(max=cached.slots) != counted)

    def lacks_keys(self, step: Step, held: Sequence[IndexRecord | None]) -> bool:
        """Whether a basis is to be fitted where nothing is cached yet."""
        return any(
            record is None
            and step.served.bindings[place].needs_basis
            and tokens_before(step.caches[place], step.filled[place]) < 1
            for place, record in zip(step.served.kept, held, strict=True)
        )

    def hold_back(self, step: Step, held: Sequence[IndexRecord | None]) -> bool:
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

    def layouts(self, step: Step) -> tuple[Layout | None, ...] | None:
        """Of what is kept of each cache; None where a spectrum decides that is not known yet."""
        by_spectrum = self.config.rank_by_spectrum
        for binding, cached in zip(step.served.bindings, step.caches, strict=True):
            if binding.keeps is not Keeps.INDEX:
                continue
            if by_spectrum and binding.basis is None:
                indexes.take_highest_rank(binding, cached)
            if binding.layout is None:
                rank = binding.rank(self.config.rank)
                if rank is None:
                    return None
                dtype, own = self._index_dtype or cached.past.dtype, binding.basis is None
                binding.layout = IndexLayout(rank, dtype, own and binding.form.batched)
        return tuple(binding.layout for binding in step.served.bindings)

    def catch_up(
        self, step: Step, held: Sequence[IndexRecord], behind: Sequence[tuple[int, int]]
    ) -> None:
        """Projects the rows [first, end) of each index, which dense steps have written since."""
        for cache, record, (first, end) in zip(step.served.kept, held, behind, strict=True):
            binding = step.served.bindings[cache]
            indexes.project(binding, binding.at(step.args), record, first, end)

    @property
    def _index_dtype(self) -> torch.dtype | None:
        return None if self.config.index_dtype == "cache" else torch.int8

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
                    dtype=self._index_dtype,
                    seen=functools.partial(self.variants.seen, step.args, place, step.seen),
                    tally=step.served.tally,
                )
            elif binding.form.in_place:
                record = indexes.carry_over(binding, cached, record)
            records.append(record)
        return records
