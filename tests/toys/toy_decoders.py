"""Decoders of one attention layer, each spelled in another way.

A spelling is a way to write the cache and a way to attend. `REWRITTEN` must become sparse,
`UNTOUCHED` must stay as it was for the reason named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.attention import Reason
from torch import Tensor, nn
from toy_attends import (
    causal_flag,
    dims_cut,
    gqa_flag,
    gqa_flag_by_keyword,
    gqa_repeat_interleave,
    gqa_repeat_kv,
    gqa_repeat_kv_bthd,
    heads_flipped,
    interleaved,
    interleaved_by_expand,
    mask_assigned,
    mask_edited_in_place,
    mqa_broadcast,
    mqa_expand,
    own_values_as_keys,
    plain,
    scaled,
    tiles_of_flipped_heads,
    values_of_one_head,
    values_tiled,
)
from toy_masks import (
    alibi,
    causal,
    causal_2d,
    causal_float,
    causal_inf,
    left_padded,
    no_mask,
    nothing_seen_by_first,
)
from toy_options import FILLED, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, SLOTS
from toy_writes import (
    accumulate,
    cast_to_query,
    cat_behind_slice,
    cat_behind_whole_slice,
    cat_bhtd,
    cat_bthd,
    cat_cropped,
    cat_divided,
    cat_folded,
    cat_folded_dims_first,
    cat_not_returned,
    cat_prepended,
    cat_scaled,
    cat_stored_rotated,
    cat_then_edited,
    cat_three,
    cat_turned_around,
    cat_window_read,
    dims_by_halves,
    encoder_states,
    foreach_write,
    fresh,
    head_broadcast_write,
    in_place_operator,
    index_add,
    index_copy_bthd,
    index_copy_folded,
    index_copy_heads,
    index_copy_method,
    index_copy_returned,
    index_copy_through_split,
    index_put_bthd,
    index_put_heads_swapped,
    index_put_method,
    index_put_returned,
    inplace_flag,
    keys_transposed,
    latent,
    latent_pieces,
    llama_reference,
    masked_write,
    namesake_op,
    narrow_copy,
    one_head_3d,
    past_edited_then_cat,
    per_head_write,
    read_only,
    ring,
    roll_window,
    row_assignment,
    scalar_write,
    scatter_added,
    scatter_copied_index,
    scatter_returned,
    scatter_returned_folded,
    select_copy,
    shift_window,
    slice_assignment,
    slice_assignment_read,
    slice_folded,
    snapshot_before_write,
    tensor_assignment,
    through_data,
    through_flat_view,
    through_split,
    unknown_op,
    values_before_write,
    values_transposed,
    write_twice,
    write_two_halves,
    written_with_out,
)


@dataclass(frozen=True)
class Spelling:
    """One way to write a decoder's attention layer.

    `layout` names the caches' dimensions; `position` is what the write takes: "tensor" (S,), "int"
    or "rows" (B,). `growing` caches are returned, others are `slots` long and written in place.
    `reason` says why it must stay dense; None if it must become sparse. `values` is the layout of
    the value cache where it differs.
    """

    write: Callable[..., Any]
    attend: Callable[..., Tensor] = gqa_flag
    mask: Callable[..., Tensor | None] = causal
    reason: Reason | None = None
    layout: str = "bhtd"
    values: str = ""
    position: str = "tensor"
    growing: bool = False
    kv_heads: int = KV_HEADS
    new_tokens: int = 1
    slots: int = SLOTS
    fused: bool = False
    cache_dtype: torch.dtype = torch.float32
    note: str = ""

    @property
    def name(self) -> str:
        parts = [self.write.__name__, self.attend.__name__, self.mask.__name__]
        parts += [f"{self.new_tokens}tokens"] * (self.new_tokens > 1) + [self.note] * bool(
            self.note
        )
        return "-".join(parts)

    def but(self, **changes: Any) -> Spelling:
        return dataclasses.replace(self, **changes)


_cat = Spelling(cat_bhtd, mask=no_mask, growing=True)
_static = Spelling(index_copy_method)

REWRITTEN = [
    # Ways to write the cache.
    _cat,
    _cat.but(write=cat_bthd, layout="bthd"),
    _cat.but(write=cat_behind_whole_slice),
    _cat.but(write=cat_window_read),
    _cat.but(write=cat_cropped),
    _cat.but(write=cat_folded, layout="btf"),
    _static.but(write=index_copy_folded, layout="btf"),
    _static.but(write=slice_folded, layout="btf", mask=no_mask, position="int"),
    _cat.but(write=cat_scaled),
    _cat.but(write=cat_divided, layout="bthd", attend=gqa_repeat_kv_bthd),
    _static,
    _static.but(write=index_copy_bthd, layout="bthd"),
    _static.but(write=slice_assignment, position="int"),
    _static.but(write=slice_assignment_read, mask=no_mask, position="int"),
    _static.but(write=tensor_assignment),
    _static.but(write=row_assignment, position="rows", mask=left_padded),
    _static.but(write=index_put_method),
    _static.but(write=index_put_method, new_tokens=3, mask=left_padded),
    _static.but(write=index_put_bthd, layout="bthd"),
    _static.but(write=narrow_copy, position="int"),
    _static.but(write=select_copy, position="int"),
    _static.but(
        write=llama_reference,
        attend=gqa_repeat_kv_bthd,
        layout="bthd",
        mask=no_mask,
        position="int",
        note="larger_batch",
    ),
    _static.but(write=write_twice),
    _static.but(write=write_two_halves, new_tokens=2),
    _static.but(write=index_copy_returned),
    _static.but(write=index_put_returned, layout="bthd"),
    _static.but(write=scatter_returned),
    _static.but(write=scatter_returned_folded, layout="btf", new_tokens=2, mask=left_padded),
    _static.but(write=read_only, mask=no_mask),
    _static.but(write=one_head_3d, kv_heads=1, layout="btd", attend=mqa_broadcast),
    _static.but(write=roll_window, mask=no_mask, attend=gqa_repeat_kv),
    _static.but(write=ring, mask=no_mask, slots=FILLED + 2),
    _static.but(write=cast_to_query, cache_dtype=torch.bfloat16),
    _static.but(write=cast_to_query, cache_dtype=torch.float16, attend=gqa_repeat_kv),
    # Ways to group heads.
    _cat.but(attend=plain, kv_heads=HEADS),
    _static.but(attend=plain, kv_heads=HEADS),
    _cat.but(attend=gqa_repeat_kv),
    _static.but(attend=gqa_repeat_kv),
    _static.but(attend=gqa_repeat_kv_bthd),
    _static.but(attend=gqa_repeat_interleave),
    _static.but(attend=mqa_broadcast, kv_heads=1),
    _cat.but(attend=mqa_broadcast, kv_heads=1),
    _static.but(attend=mqa_expand, kv_heads=1),
    _static.but(attend=gqa_repeat_kv, kv_heads=1),
    _static.but(attend=gqa_flag_by_keyword),
    _static.but(attend=scaled, kv_heads=HEADS),
    _static.but(fused=True),
    _static.but(attend=interleaved),
    _static.but(attend=interleaved, mask=alibi),
    _static.but(attend=interleaved, new_tokens=3, mask=left_padded),
    _static.but(attend=interleaved_by_expand),
    _cat.but(attend=interleaved),
    _static.but(attend=interleaved, kv_heads=1),
    _static.but(attend=values_of_one_head),
    # Masks.
    _static.but(mask=causal_2d),
    _static.but(mask=causal_float),
    _static.but(mask=causal_inf),
    _static.but(mask=left_padded),
    _static.but(mask=alibi, attend=gqa_repeat_kv),
    _cat.but(mask=alibi, attend=gqa_repeat_kv),
    _static.but(mask=nothing_seen_by_first),
    _static.but(attend=mask_edited_in_place),
    _static.but(attend=mask_assigned, mask=causal_2d),
    # Several new tokens.
    _static.but(new_tokens=3),
    _static.but(new_tokens=4, mask=left_padded, attend=gqa_repeat_kv),
    _cat.but(new_tokens=2, mask=causal_inf),
    _static.but(write=slice_assignment, position="int", new_tokens=5),
    _static.but(mask=alibi, attend=gqa_repeat_kv, new_tokens=2),
]

UNTOUCHED = [
    # The cache.
    _cat.but(write=cat_not_returned, reason=Reason.CACHE_LEAVES),
    _cat.but(write=cat_prepended, reason=Reason.NO_CACHE),
    _cat.but(write=cat_behind_slice, reason=Reason.NO_CACHE),
    _cat.but(write=cat_three, reason=Reason.WRITE),
    _cat.but(write=cat_then_edited, reason=Reason.WRITE),
    _cat.but(write=past_edited_then_cat, reason=Reason.WRITE),
    _cat.but(write=cat_stored_rotated, reason=Reason.NO_CACHE),
    _cat.but(write=cat_turned_around, reason=Reason.NO_CACHE),
    _cat.but(write=cat_folded_dims_first, layout="btf", reason=Reason.OPAQUE_VIEW),
    _static.but(write=index_copy_through_split, layout="btf", reason=Reason.WRITE),
    _static.but(write=index_copy_heads, reason=Reason.WRITE, mask=no_mask),
    _static.but(write=scatter_added, reason=Reason.WRITE),
    _static.but(write=scatter_copied_index, reason=Reason.WRITE),
    _static.but(write=shift_window, mask=no_mask, reason=Reason.WRITE),
    _static.but(write=index_put_heads_swapped, reason=Reason.WRITE),
    _static.but(write=accumulate, layout="bthd", reason=Reason.WRITE),
    _static.but(write=index_add, reason=Reason.WRITE),
    _static.but(write=masked_write, reason=Reason.WRITE),
    _static.but(write=per_head_write, reason=Reason.WRITE),
    _static.but(write=scalar_write, reason=Reason.WRITE),
    _static.but(write=head_broadcast_write, reason=Reason.WRITE),
    _static.but(write=dims_by_halves, reason=Reason.WRITE),
    _static.but(write=through_flat_view, reason=Reason.WRITE),
    _static.but(write=through_data, reason=Reason.WRITE),
    _static.but(write=through_split, reason=Reason.WRITE),
    _static.but(write=written_with_out, reason=Reason.WRITE),
    _static.but(write=inplace_flag, reason=Reason.WRITE),
    _static.but(write=foreach_write, reason=Reason.WRITE),
    _static.but(write=in_place_operator, reason=Reason.WRITE),
    _static.but(write=unknown_op, reason=Reason.WRITE),
    _static.but(write=namesake_op, reason=Reason.WRITE),
    _static.but(write=snapshot_before_write, attend=plain, reason=Reason.OPAQUE_VIEW),
    _static.but(write=values_before_write, attend=plain, reason=Reason.GROUPS),
    _static.but(write=cast_to_query, cache_dtype=torch.float64, reason=Reason.DTYPE),
    _static.but(write=keys_transposed, layout="bhdt", values="bhtd",
                reason=Reason.NON_CONTIGUOUS_HEAD_DIM),
    _static.but(write=values_transposed, values="bhdt", reason=Reason.NON_CONTIGUOUS_HEAD_DIM),
    _static.but(layout="strided", reason=Reason.NON_CONTIGUOUS_HEAD_DIM),
    _static.but(write=fresh, mask=no_mask, reason=Reason.NO_CACHE),
    _static.but(write=encoder_states, reason=Reason.NO_CACHE),
    _static.but(write=latent, reason=Reason.LATENT),
    _cat.but(write=latent_pieces, reason=Reason.LATENT),
    # The core.
    _static.but(attend=tiles_of_flipped_heads, reason=Reason.OPAQUE_VIEW),
    _static.but(attend=values_tiled, reason=Reason.GROUPS),
    _static.but(attend=heads_flipped, reason=Reason.OPAQUE_VIEW),
    _static.but(attend=dims_cut, kv_heads=HEADS, reason=Reason.OPAQUE_VIEW),
    _static.but(attend=causal_flag, kv_heads=HEADS, mask=no_mask, reason=Reason.CAUSAL_FLAG),
    _static.but(attend=causal_flag, kv_heads=HEADS, mask=no_mask, new_tokens=3,
                reason=Reason.PREFILL),
    _static.but(attend=own_values_as_keys, reason=Reason.NO_CACHE),
    _static.but(new_tokens=9, slots=64, reason=Reason.PREFILL),
]  # fmt: skip


class ToyDecoder(nn.Module):
    """One attention layer of a spelling with a residual, (B,S,HIDDEN) -> (B,S,HIDDEN)."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling, self.kv_heads = spelling, spelling.kv_heads
        widths = [HEADS * HEAD_DIM, self.kv_heads * HEAD_DIM, self.kv_heads * HEAD_DIM]
        if spelling.fused:
            self.qkv = nn.Linear(HIDDEN, sum(widths))
        else:
            self.q, self.k, self.v = (nn.Linear(HIDDEN, width) for width in widths)
        self.widths = widths
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(3)  # peaked attention: a key too many or too few shows

    @property
    def key_weight(self) -> Tensor:
        return self.qkv.weight if self.spelling.fused else self.k.weight

    def forward(self, x, ck, cv, pos, mask):
        batch, new, _ = x.shape
        if self.spelling.fused:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.view(batch, new, -1, HEAD_DIM) for y in (q, k, v))
        keys, values, state = self.spelling.write(k, v, ck, cv, pos)
        out = self.spelling.attend(q.transpose(1, 2), keys, values, mask)
        out = x + self.out(out.transpose(1, 2).reshape(batch, new, -1))
        return (out, *state)
