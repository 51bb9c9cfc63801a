"""`loki::select` on a GPU: three launches, no sort, no host synchronisation.

    prepare   one program per row: projects the group's queries, finds the row's window, budget and
              forced keys, and from a stratified sample of scores a floor that the wanted keys are
              expected to reach: a first, coarse radix digit at the cost of reading 2048 rows.
    list      streams the index once, split over `splits` programs per row: scores on the tensor
              cores, maximum over the group, mask; keys at or above the floor are listed in
              ascending order. Scores of the other keys are never written anywhere.
    choose    one program per row: bisects the ordered bits of the listed keys for the exact
              threshold, then writes the chosen positions in ascending order.

Scores of pages, and those of groups that choose by probability, are written to memory first, by
launches of their own (`triton_score`); the three then read them there.

A row is one list of positions: (b, h, s) with h a KV head (a group chooses together) or a query
head. The result is exact whatever the sample says: fewer listed keys than the budget, and `choose`
lists the row again without a floor (slower, for that row alone); more, and it reads more.

Precision: a query is split into two digits of the index's own dtype, so that the index goes to the
tensor cores as it is stored: two bytes with integer accumulation, or head and tail in bf16 or fp16.
Both are relative to the row's largest entry, and their rounding is about 2**-15 of it.

Bytes: rows * T * (R * index_bytes, + 4 for an int8 scale), and 8 for each listed key, about two
budgets at T = 131072 and a budget of 2048. Grids, scratch shapes and specialisation do not depend
on how many keys are visible; programs beyond the window exit at once.

Where rows choose by a mass, or what they leave out is asked for, `list` adds up what keys weigh as
it scores them, for each part of a row, and `choose` bisects by weights as well as by numbers.

`index_scale` must not be negative (`index_rows` makes none): the maximum over a group is taken
before the scale.

Legend as in `loki_compile.kernels`; p_ pointer, i_ program's coordinate, o_ offsets, strides in
elements (`index_st` is the stride of T in the index, and so on).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.checks import check_select, hidden_below
from loki_compile.kernels.triton_choose import (
    ROW_FIELDS,
    choose_kernel,
    list_kernel,
    prepare_kernel,
)
from loki_compile.kernels.triton_launch import (
    ADDITIVE_MASK,
    BOOL_MASK,
    NO_MASK,
    SelectLaunch,
    Stage,
    alignment,
    broadcast_strides,
    device_of,
    interpreted,
    programs_per_row,
    select_launch,
)
from loki_compile.kernels.triton_score import (
    BEST,
    INT8_RANK_MAX,
    PROBABILITIES,
    TILES,
    mass_kernel,
    score_kernel,
    sum_kernel,
)
from loki_compile.kernels.triton_weigh import PART_FIELDS, SPLITS_MAX
from torch import Tensor


def select(q: Tensor, *tensors: Any, **options: Any) -> Tensor:
    """`loki::select`; see `loki_compile.kernels.ops`. `launch` replaces the table's choice."""
    positions, _, stages = select_stages(q, *tensors, **options)
    with torch.cuda.device_of(q):
        for stage in stages:
            stage.run()
    return positions


def select_weighed(q: Tensor, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`loki::select_weighed`; see `loki_compile.kernels.ops`. `launch` as for `select`."""
    positions, weighed, stages = select_stages(q, *tensors, **options, weigh=True)
    assert weighed is not None
    with torch.cuda.device_of(q):
        for stage in stages:
            stage.run()
    return positions, weighed


def select_stages(
    q: Tensor,
    basis: Tensor | None,
    index: Tensor,
    index_scale: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    *,
    scale: float,
    top_k: int | None,
    keep_q16: int,
    sink: int,
    recent: int,
    min_keys: int,
    per_head: bool,
    page: int = 1,
    keys: int | None = None,
    by_probability: bool = False,
    mass: float = 0.0,
    budgets: Tensor | None = None,
    slots: int | None = None,
    weigh: bool = False,
    launch: SelectLaunch | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Stage, ...]]:
    """The outputs of `select_weighed`, unwritten, the second None unless keys are weighed, and the
    launches that write them, in order."""
    b, heads_out, s, t = check_select(
        q, basis, index, index_scale, mask, bounds,
        top_k=top_k, keep_q16=keep_q16, sink=sink, recent=recent, min_keys=min_keys,
        per_head=per_head, page=page, keys=keys, by_probability=by_probability, mass=mass,
        budgets=budgets, slots=slots, weighed=weigh,
    )  # fmt: skip
    if slots is None:
        slots = int(Budget(top_k, keep_q16, sink, recent, min_keys).slots(t))
    positions = q.new_empty((b, heads_out, s, slots), dtype=torch.int32)
    weighed = positions.new_empty((b, heads_out, s, 2), dtype=torch.float32) if weigh else None
    if b * heads_out * s == 0:
        return positions, weighed, ()
    scored = TILES.value
    if by_probability and q.shape[1] > heads_out:
        scored = PROBABILITIES.value
    elif page > 1:
        scored = BEST.value
    # No row sees more than t keys: in the kernels every count is an int32.
    budget = (
        t if top_k is None else min(top_k, t),
        keep_q16, min(sink, t), min(recent, t), min(min_keys, t + 1),
    )  # fmt: skip
    call = _Call(
        q, basis, index, index_scale, mask, bounds, positions, weighed,
        scale=scale, budget=budget, budgets=budgets, mass=mass, keys=t, page=page, scored=scored,
        launch=launch,
    )  # fmt: skip
    return positions, weighed, call.stages()


class _Call:
    """One call of the op: what its launches read and write, and the constants they share."""

    def __init__(
        self,
        q: Tensor,
        basis: Tensor | None,
        index: Tensor,
        index_scale: Tensor | None,
        mask: Tensor | None,
        bounds: Tensor | None,
        positions: Tensor,
        weighed: Tensor | None,
        *,
        scale: float,
        budget: tuple[int, int, int, int, int],
        budgets: Tensor | None,
        mass: float,
        keys: int,
        page: int,
        scored: int,
        launch: SelectLaunch | None,
    ) -> None:
        self.q, self.basis, self.index, self.index_scale = q, basis, index, index_scale
        self.bounds, self.positions, self.budget = bounds, positions, budget
        self.weighed, self.mass = weighed, mass
        self.budgets, self.own = budgets, budgets is not None
        self.weighs = mass > 0 or weighed is not None
        self.idle = self.own and not self.weighs  # rows that rank nothing need no scores
        self.scale, self.page, self.scored = scale, page, scored
        self.tiles, self.int8 = scored == TILES.value, index.dtype == torch.int8
        self.heads_out, self.tokens, self.slots = positions.shape[1:]
        self.keys, self.rank, self.head_dim = keys, index.shape[3], q.shape[3]
        self.rows, self.group = positions.shape[:3].numel(), q.shape[1] // self.heads_out
        if self.int8 and self.tiles and self.rank > INT8_RANK_MAX:
            raise ValueError(
                f"loki::select: rank is {self.rank} with an int8 index; allowed: at most"
                f" {INT8_RANK_MAX}, the largest whose integer scores fit in 32 bits."
            )
        smallest = 32 if self.int8 else 16
        self.block_r = max(smallest, triton.next_power_of_2(self.rank)) if self.tiles else 32
        device = device_of(q)
        self.launch = launch or select_launch(
            device, group=self.group, block_r=self.block_r,
            index_bytes=index.element_size() if self.tiles else 1, slots=self.slots,
        )  # fmt: skip
        self.splits = programs_per_row(device, self.rows, self.launch.programs, SPLITS_MAX.value)
        self._set_mask(mask)
        self._set_strides(mask)
        self._allocate()

    def _set_mask(self, mask: Tensor | None) -> None:
        self.mask, self.mask_kind, self.hidden = mask, NO_MASK.value, 0.0
        if mask is not None and mask.dtype == torch.bool:
            self.mask, self.mask_kind = mask.view(torch.uint8), BOOL_MASK.value
        elif mask is not None:
            self.mask_kind, self.hidden = ADDITIVE_MASK.value, hidden_below(mask.dtype)

    def _set_strides(self, mask: Tensor | None) -> None:
        strides = broadcast_strides(self.index, 3)
        self.align = alignment(self.rank if self.page == 1 else self.head_dim, strides)
        self.strides = (
            *(stride // self.align for stride in strides),
            *broadcast_strides(self.index_scale, 3),
            *broadcast_strides(mask),
        )
        self.bounds_strides = broadcast_strides(self.bounds, 3)

    def _allocate(self) -> None:
        """Scratch. Scores in memory need no digits of queries."""
        scratch = functools.partial(torch.empty, device=self.q.device)
        columns = self.launch.heads * self.launch.pack
        group_pad = triton.cdiv(self.group, columns) * columns
        row_size = triton.cdiv(self.keys, 16) * 16
        digits = (self.rows, group_pad, self.block_r) if self.tiles else (1,)
        self.high, self.low = scratch((2, *digits), dtype=self.index.dtype)
        self.source = scratch((self.rows, group_pad), dtype=torch.int32)
        self.records = scratch((self.rows, ROW_FIELDS.value), dtype=torch.int32)
        self.sample = scratch((self.rows, self.launch.sample), dtype=torch.int32)
        self.lists = scratch((2, self.rows, row_size), dtype=torch.int32)
        self.counts, self.before = scratch((2, self.rows, self.splits), dtype=torch.int32)
        self.parts = None
        if self.weighs:
            self.parts = scratch((self.rows, self.splits, PART_FIELDS.value), dtype=torch.float32)
        self.score = self.logits = self.log_mass = None
        if not self.tiles:
            self.score = self.logits = scratch((self.rows, row_size), dtype=torch.float32)
        if self.scored == PROBABILITIES.value:
            each = (self.rows, self.group)
            self.logits = scratch((*each, row_size), dtype=torch.float32)
            self.log_mass = scratch(each, dtype=torch.float32)

    def stages(self) -> tuple[Stage, ...]:
        """The launches, in order."""
        scores = [] if self.tiles else [Stage("score", self._score)]
        if self.scored == PROBABILITIES.value:
            scores += [Stage("mass", self._add_up), Stage("sum", self._add_heads)]
        return (
            *scores,
            Stage("prepare", self._prepare),
            Stage("list", self._list),
            Stage("choose", self._choose),
        )

    @functools.cached_property
    def _budgets(self) -> tuple[Any, ...]:
        """What tells which rows rank nothing."""
        return self.budgets, *broadcast_strides(self.budgets, 3), self.budget[2]

    @functools.cached_property
    def _row(self) -> dict[str, Any]:
        """Constants of every kernel that has a program for a row."""
        per_kv = self.heads_out // self.index.shape[1]
        return dict(GROUP=self.group, ROWS_PER_KV=per_kv, MASK=self.mask_kind)

    @functools.cached_property
    def _tile(self) -> dict[str, Any]:
        """Constants of every kernel that ranks keys."""
        dot = getattr(tl, str(self.index.dtype).removeprefix("torch."))
        if interpreted(list_kernel) and dot == tl.bfloat16:
            dot = tl.float32  # numpy has no bfloat16
        return dict(
            R=self.rank, BLOCK_R=self.block_r, HEADS=self.launch.heads, PACK=self.launch.pack,
            ALIGN=self.align, LOW=self.index.dtype != torch.float32,
            INT8=self.int8 and self.tiles, DOT=dot, BLOCK_T=self.launch.block_t,
            SCORED=self.scored, **self._row,
        )  # fmt: skip

    def _score(self) -> None:
        met = self.q
        if self.basis is not None:
            met = _projected(self.q, self.basis, self.index.shape[1])
        width = self.rank if self.page == 1 else self.head_dim
        block_q, page_pad = triton.next_power_of_2(width), triton.next_power_of_2(self.page)
        bounds_or_row = block_q * (2 if self.page > 1 else 1)
        score_kernel[(self.rows, self.splits)](
            met, self.index, self.index_scale, self.mask, self.bounds, self.logits,
            *broadcast_strides(met, 3), *self.strides, *self.bounds_strides,
            self.heads_out, self.tokens, self.keys, self.scale, self.hidden, self.splits,
            *self._budgets, R=width, BLOCK_R=block_q, ALIGN=self.align, INT8=self.int8,
            EACH=self.scored == PROBABILITIES.value, PAGE=self.page, PAGE_PAD=page_pad,
            BLOCK_P=max(1, 4096 // max(bounds_or_row, page_pad)), IDLE=self.idle, **self._row,
            num_warps=4,
        )  # fmt: skip

    def _add_up(self) -> None:
        mass_kernel[(self.rows, self.group)](
            self.logits, self.bounds, self.log_mass, *self.bounds_strides,
            self.heads_out, self.tokens, self.keys, *self._budgets,
            BLOCK=self.launch.block, IDLE=self.idle, **self._row, num_warps=self.launch.row_warps,
        )  # fmt: skip

    def _add_heads(self) -> None:
        sum_kernel[(self.rows, self.splits)](
            self.logits, self.bounds, self.log_mass, self.score, *self.bounds_strides,
            self.heads_out, self.tokens, self.keys, self.splits, *self._budgets,
            BLOCK=1024, IDLE=self.idle, **self._row, num_warps=4,
        )  # fmt: skip

    def _prepare(self) -> None:
        basis, block_d = self.q, 0
        strides: tuple[int, ...] = (0, 0, 0)
        if self.basis is not None:
            basis, own = self.basis, self.basis.stride()
            strides = own[:3] if basis.dim() == 4 else (0, *own[:2])
            # All dims in one step where that is 16 KB (128 dims of rank 32), else in several.
            block_d = max(16, min(triton.next_power_of_2(self.head_dim), 4096 // self.block_r))
        prepare_kernel[(self.rows,)](
            self.q, basis, self.index, self.index_scale, self.mask, self.bounds,
            self.high, self.low, self.source, self.score, self.records, self.sample,
            *broadcast_strides(self.q, 3), *strides, *self.strides, *self.bounds_strides,
            self.heads_out, self.tokens, self.keys, self.scale, self.hidden, *self.budget,
            self.budgets, *broadcast_strides(self.budgets, 3), self.slots,
            D=self.head_dim, BLOCK_D=block_d, SAMPLE=self.launch.sample, OWN=self.own,
            LIST_ALL=self.launch.list_all, **self._tile, num_warps=self.launch.row_warps,
        )  # fmt: skip

    def _list(self) -> None:
        list_kernel[(self.rows, self.splits)](
            self.index, self.index_scale, self.mask, self.high, self.low, self.source, self.score,
            self.records, *self.lists, self.counts, self.parts, *self.strides,
            self.heads_out, self.tokens, self.keys, self.hidden, self.splits,
            STAGES=self.launch.stages, WEIGH=self.weighs, OWN=self.own, **self._tile,
            num_warps=self.launch.warps,
        )  # fmt: skip

    def _choose(self) -> None:
        choose_kernel[(self.rows,)](
            self.index, self.index_scale, self.mask, self.high, self.low, self.source, self.score,
            self.records, *self.lists, self.counts, self.parts, self.before, self.positions,
            self.weighed, *self.strides,
            self.heads_out, self.tokens, self.keys, self.hidden, self.splits, self.slots, self.mass,
            BLOCK=self.launch.block, WEIGH=self.weighs, TELL=self.weighed is not None,
            OWN=self.own, **self._tile, num_warps=self.launch.row_warps,
        )  # fmt: skip


def _projected(q: Tensor, basis: Tensor, kv_heads: int) -> Tensor:
    """Queries (B, Hq, S, R) fp32 in the space of the index."""
    grouped = q.float().unflatten(1, (kv_heads, -1))[..., None]
    # Added up and not multiplied as matrices, which the precision of matmuls might round.
    return (grouped * basis[..., None, None, :, :]).sum(-2).flatten(1, 2)
