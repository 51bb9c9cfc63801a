"""`loki::attend` on a GPU: split-K exact attention over gathered rows, then a combine.

    attend    one program per (row, split, block of heads): gathers tiles of K and V rows once for
              the query heads that share them, online softmax in fp32, products on tensor cores
    combine   one program per (row, head, block of Dv): joins the splits by their log-sum-exp

Products are in the dtype of q, to which tiles of the others are brought once they are loaded.

Keys may lie in two tensors, the first dims of each in `k` and the others in `k_pe`; where v is k
itself (attention over cached latents), its rows are loaded once.

A row is one list of positions: (b, h, s) with h a KV head (then its G query heads share each row
read) or a query head. Positions must be ascending and then -1, as `loki::select` writes them: a
tile is skipped when its first entry is no position, so what is beyond a row's budget costs nothing.
Tiles go to the splits in turn, so all programs have work however short the list is. A row without
any position runs over all T keys instead.

Without lists (`loki::attention`, TOKENS > 0) a row is a KV head, whose keys are read in order, once
for all query heads and all TOKENS query tokens: "heads" are pairs of both, tokens side by side.

With two ranges of keys for each row (RANGES) a row is a KV head and token, and rows are of any
length: a program is a part of one row, and all parts read as many tiles, so that the longest row
does not decide the time. Which row and part a program is, it counts from the ranges of all rows:
the grid depends on no length.

Bytes: rows * K * (D + Dv) * bytes, and for each split G * (Dv + 2) * 4 written and read again.

Legend as in `loki_compile.kernels`; p_ pointer, i_ program's coordinate, o_ offsets, m_ mask,
strides in elements (`k_st` is the stride of T in k, and so on).
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from loki_compile.kernels.checks import check_attend
from loki_compile.kernels.triton_launch import (
    ADDITIVE_MASK,
    BOOL_MASK,
    NO_MASK,
    AttendLaunch,
    Stage,
    alignment,
    attend_launch,
    block_of,
    broadcast_strides,
    device_of,
    interpreted,
    programs_per_row,
)
from loki_compile.kernels.triton_splits import (
    COMBINE_DV,
    SPLITS_MAX,
    attend_kernel,
    combine_kernel,
)
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    k_pe: Tensor | None = None,
    ranges: Tensor | None = None,
    launch: AttendLaunch | None = None,
) -> Tensor:
    """`loki::attend`, and `loki::attention` without positions; see `loki_compile.kernels.ops`.
    `launch` replaces the table's choice."""
    out, stages = attend_stages(
        q, k, v, positions, mask, scale=scale, softcap=softcap, sink_logits=sink_logits,
        k_pe=k_pe, ranges=ranges, launch=launch,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        for stage in stages:
            stage.run()
    return out


def attend_stages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    k_pe: Tensor | None = None,
    ranges: Tensor | None = None,
    launch: AttendLaunch | None = None,
) -> tuple[Tensor, tuple[Stage, ...]]:
    """The output of `attend`, unwritten, and the launches that write it, in order."""
    shape = check_attend(
        q, k, v, positions, mask, softcap=softcap, sink_logits=sink_logits, k_pe=k_pe,
        ranges=ranges,
    )  # fmt: skip
    out = q.new_empty(shape)
    if shape[1] == 0:
        return out, ()
    call = _Call(
        out, q, k, v, k_pe, positions, ranges, mask, sink_logits,
        scale=scale, softcap=softcap, launch=launch,
    )  # fmt: skip
    return out, call.stages()


class _Call:
    """One call of the op: what its launches read and write, and the constants they share."""

    def __init__(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_pe: Tensor | None,
        positions: Tensor | None,
        ranges: Tensor | None,
        mask: Tensor | None,
        sink_logits: Tensor | None,
        *,
        scale: float,
        softcap: float,
        launch: AttendLaunch | None,
    ) -> None:
        self.out, self.q, self.k, self.v, self.k_pe = out, q, k, v, k_pe
        self.sink_logits = None if sink_logits is None else sink_logits.contiguous()
        self.scale, self.softcap, self.ranges = scale, softcap, ranges is not None
        self.lists = positions if ranges is None else ranges
        self._set_rows(positions)
        self._set_widths()
        self.device = device_of(q)
        self.launch = launch or self._launch()
        self._set_grid()
        self._set_mask(mask)

    def _set_rows(self, positions: Tensor | None) -> None:
        b, hq, s, _ = self.out.shape
        hkv = self.k.shape[1]
        self.all_keys = self.lists is None
        self.heads_out = hkv if positions is None else positions.shape[1]
        self.slots = 0 if positions is None else positions.shape[3]
        self.tokens, self.keys, self.rows_per_kv = s, self.k.shape[2], self.heads_out // hkv
        self.group = hq // self.heads_out
        # Without lists a row is a KV head, of which each token is as another head.
        self.rows, self.each = b * self.heads_out * s, self.group
        if self.all_keys:
            self.rows, self.each = b * hkv, self.group * s
        self.list_strides = broadcast_strides(self.lists, 3)

    def _set_widths(self) -> None:
        """Dims of the tensors, how they are aligned, and blocks that hold them."""
        k, v = self.k, self.v
        self.d, self.dv = k.shape[3], v.shape[3]
        self.rest = 0 if self.k_pe is None else self.k_pe.shape[3]
        self.block_d, self.block_rest = block_of(self.d), block_of(self.rest)
        self.block_dv = block_of(self.dv)
        k_strides, v_strides = broadcast_strides(k, 3), broadcast_strides(v, 3)
        rest_strides = broadcast_strides(self.k_pe, 3)
        self.k_align, self.v_align = alignment(self.d, k_strides), alignment(self.dv, v_strides)
        self.rest_align = alignment(self.rest, rest_strides)
        self.strides = (
            *broadcast_strides(self.q, 3), *(n // self.k_align for n in k_strides),
            *(n // self.rest_align for n in rest_strides), *(n // self.v_align for n in v_strides),
        )  # fmt: skip
        self.v_is_k = (
            self.d == self.dv
            and k.dtype == v.dtype
            and k.data_ptr() == v.data_ptr()
            and k_strides == v_strides
        )

    def _launch(self) -> AttendLaunch:
        given = [x for x in (self.q, self.k, self.v, self.k_pe) if x is not None]
        return attend_launch(
            self.device,
            group=self.each,
            block_d=max(self.block_d, self.block_dv),
            bytes_each=max(tensor.element_size() for tensor in given),
        )

    def _set_grid(self) -> None:
        """Programs of each row, and scratch where there are several."""
        rows, launch = self.rows, self.launch
        head_blocks = -(-self.each // launch.heads)
        most = SPLITS_MAX.value
        if not self.all_keys:
            most = min(most, -(-self.slots // launch.block_n))
        self.splits = programs_per_row(self.device, rows * head_blocks, launch.programs, most)
        self.parts, self.grid = 0, (rows * head_blocks, self.splits)
        partial: tuple[int, ...] = (rows, self.each, self.splits)
        if self.ranges:  # as many parts as fill the device once, and what rows round up
            self.splits = 1
            self.parts = max(1, self.device.processors * launch.programs // head_blocks)
            self.grid = ((self.parts + rows) * head_blocks, 1)
            partial = (self.parts + rows, self.each)
        self.split = self.splits > 1 or self.parts > 0
        self.acc = self.largest = self.total = None
        if self.split:
            empty = functools.partial(torch.empty, dtype=torch.float32, device=self.q.device)
            self.acc = empty((*partial, self.dv))
            self.largest, self.total = empty((2, *partial))

    def _set_mask(self, mask: Tensor | None) -> None:
        self.mask, self.mask_kind, self.head_mask = mask, NO_MASK.value, False
        self.mask_strides = strides = broadcast_strides(mask)
        if mask is not None:
            self.head_mask = (strides[1] != 0 and self.group > 1) or (
                self.all_keys and strides[2] != 0
            )
            self.mask_kind = ADDITIVE_MASK.value
        if mask is not None and mask.dtype == torch.bool:
            self.mask, self.mask_kind = mask.view(torch.uint8), BOOL_MASK.value

    def stages(self) -> tuple[Stage, ...]:
        """The launches, in order."""
        attend_stage = Stage("attend", self._attend)
        return (attend_stage, Stage("combine", self._combine)) if self.split else (attend_stage,)

    def _attend(self) -> None:
        launch = self.launch
        dot = getattr(tl, str(self.q.dtype).removeprefix("torch."))
        if interpreted(attend_kernel) and dot == tl.bfloat16:
            dot = tl.float32  # numpy has no bfloat16
        attend_kernel[self.grid](
            self.q, self.k, self.k_pe, self.v, self.lists, self.mask, self.sink_logits, self.out,
            self.acc, self.largest, self.total,
            *self.strides, *self.list_strides, *self.mask_strides,
            self.heads_out, self.tokens, self.keys, self.slots, self.splits, self.parts, self.rows,
            self.scale, self.softcap,
            D=self.d, REST=self.rest, DV=self.dv, BLOCK_D=self.block_d, BLOCK_REST=self.block_rest,
            BLOCK_DV=self.block_dv, REST_ALIGN=self.rest_align, V_IS_K=self.v_is_k,
            HEADS=launch.heads, ROWS_PER_KV=self.rows_per_kv, K_ALIGN=self.k_align,
            V_ALIGN=self.v_align, MASK=self.mask_kind, HEAD_MASK=self.head_mask,
            CAPPED=self.softcap > 0, SPLIT=self.split, DOT=dot, STAGES=launch.stages,
            GROUP=self.group, SINK_LOGITS=self.sink_logits is not None, RANGES=self.ranges,
            TOKENS=self.tokens if self.all_keys else 0, BLOCK_N=launch.block_n,
            num_warps=launch.warps,
        )  # fmt: skip

    def _combine(self) -> None:
        combine_kernel[(self.rows * self.each, -(-self.dv // COMBINE_DV.value))](
            self.acc, self.largest, self.total, self.sink_logits, self.out, self.lists,
            *self.list_strides, self.heads_out, self.tokens, self.keys, self.splits, self.parts,
            self.rows, DV=self.dv,
            GROUP=self.group, SINK_LOGITS=self.sink_logits is not None, RANGES=self.ranges,
            TOKENS=self.tokens if self.all_keys else 0, BLOCK_N=self.launch.block_n, num_warps=4,
        )  # fmt: skip
