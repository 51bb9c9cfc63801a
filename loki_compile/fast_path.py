"""Steps that find all as the last one left it: how one is recognised, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from loki_compile import prompts
from loki_compile.buffers import Growing
from loki_compile.caches import CacheBinding
from loki_compile.index_record import IndexRecord
from loki_compile.kernels.kept import IndexLayout, Layout
from loki_compile.steps import Served, Step
from loki_compile.trails import Trail, Trails
from loki_compile.variants import Variants


class FastPath:
    """Of one graph. `trails` is None where each step takes each cache by itself."""

    def __init__(
        self,
        served: Served,
        variants: Variants,
        growing: Growing | None,
        layouts: Callable[[Step], tuple[Layout | None, ...] | None],
        min_context: int,
    ) -> None:
        """
        Args:
          layouts: of what is kept of each of a step's caches, once its indexes are there.
          min_context: as in `LokiConfig`.
        """
        self.fill = variants.fill
        self.counted = variants.counted
        self.growing = growing
        self.layouts = layouts
        self.min_context = min_context
        self.spots, self.trails = _watched_by(served, variants, growing)

    def step(self, args: Sequence[Any], served: Served, holders: Sequence[int]) -> Step | None:
        if self.trails is None:
            return None
        tensors = self.trails.tensors(args)
        trail = self.trails.find(tensors, served)
        if trail is None:
            return None
        grown = None
        if self.growing is not None:
            pasts = tensors[: len(holders)]
            grown = self.growing.take_again(pasts, holders, args, trail.capacity)
            if grown is None:
                return None
        filled = self._filled(trail, args, served.bindings)
        if max(filled) >= max(trail.again_at, self.min_context):
            return None
        return Step(args, served, filled, grown, trail, trail.held() if trail.counts else None)

    def _filled(
        self, trail: Trail, args: Sequence[Any], bindings: Sequence[CacheBinding]
    ) -> list[int]:
        """Tokens in each cache behind this step."""
        written = 0
        if self.fill is not None:
            written = int(self.fill.read(args))
        filled = []
        for binding, (spot, *_) in zip(bindings, self.spots, strict=True):
            form, slots = binding.form, trail.shapes[spot][binding.form.token_axis]
            if form.grows:
                count = binding.new_tokens
                slots += count if isinstance(count, int) else count.of(args)
            elif form.written and written > 0:
                slots = min(slots, written)
            filled.append(slots)
        return filled

    def written(self, step: Step, trail: Trail) -> list[tuple[int, int]] | None:
        """Of each index, the rows [first, end) of its cache that the step writes; None where that
        is not known of all, or where one is no row for each token."""
        assert trail.layouts is not None
        written = []
        for cache in step.served.kept:
            form, counted = step.served.bindings[cache].form, self.counted[cache]
            if not isinstance(trail.layouts[cache], IndexLayout):
                return None
            if form.in_place:
                rows = trail.shapes[self.spots[cache][0]][form.token_axis], step.filled[cache]
            elif counted is not None:
                rows = counted.slots(step.args)
            else:
                return None
            if rows[0] < 0:
                return None  # counted from the end
            written.append(rows)
        return written

    def watched(self, step: Step) -> list[Tensor]:
        """The tensors that a trail tells, as the step leaves them."""
        assert self.trails is not None
        tensors = self.trails.tensors(step.args)
        if step.grown is not None:
            tensors[: len(step.grown.rooms)] = step.grown.rooms
        return tensors

    def leave(
        self,
        step: Step,
        records: Sequence[IndexRecord] | None = None,
        asked: Sequence[tuple[int, tuple[int, ...], prompts.Asked]] = (),
    ) -> None:
        """For the next step."""
        if self.trails is None:
            return
        tensors = self.watched(step)
        for cache, place, said in asked:
            prompts.keep(tensors[self.spots[cache][0]], place, said)
        if step.trail is not None and (records is None) == (step.trail.records is None):
            step.trail.go_on(step, tensors)
            return
        layouts = None if records is None else self.layouts(step)
        trail = Trail(step, tensors, records, layouts, self.trails.spots)
        trail.asked = list(asked)
        self.trails.add(trail)


def _watched_by(
    served: Served, variants: Variants, growing: Growing | None
) -> tuple[list[tuple[int, ...]], Trails | None]:
    """Where a trail has each cache's tensors; None where steps leave others than they found,
    and where a position must not be read from a device at each step."""
    places = [] if growing is None else list(growing.places)
    for binding in served.bindings:
        for place in (binding.argument, binding.k_pe):
            if place is not None and place not in places:
                places.append(place)
    spots = [
        tuple(places.index(p) for p in (b.argument, b.k_pe) if p is not None)
        for b in served.bindings
    ]
    forms = [binding.form for binding in served.bindings]
    if any(form.replaced and not form.in_place for form in forms):
        return spots, None
    if variants.positions_wait:
        return spots, None
    return spots, Trails(places, [spots[cache] for cache in served.kept])
