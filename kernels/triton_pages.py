"""`loki::update_pages` and `loki::extend_pages` on a GPU: one launch, one program per page.

A program reads what was written of its page, and the page's keys only where something was. The grid
grows with the cache, as nothing else here does: a captured graph holds a cache of fixed size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from loki_compile.kernels.checks import check_pages
from loki_compile.kernels.cpu_torch import longer_pages
from loki_compile.kernels.triton_launch import broadcast_strides
from torch import Tensor

_RUNTIME_SIZES = [
    "H", "T", "pages_sb", "pages_sh", "pages_sp", "keys_sb", "keys_sh", "keys_st",
    "written_sb", "written_sh", "written_st",
]  # fmt: skip
_UNALIGNED = ["p_pages", "p_keys", "p_written"]


@triton.jit(do_not_specialize=_RUNTIME_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def pages_kernel(
    p_pages, p_keys, p_written,
    pages_sb, pages_sh, pages_sp, keys_sb, keys_sh, keys_st, written_sb, written_sh, written_st,
    H, T, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, PAGE_PAD: tl.constexpr,
):  # fmt: skip
    """Bounds of one page, if a token of it was written; grid (pages, B * H)."""
    i_page = tl.program_id(0).to(tl.int64)
    i_b = (tl.program_id(1) // H).to(tl.int64)
    i_h = (tl.program_id(1) % H).to(tl.int64)
    first = i_page * PAGE
    o_j = tl.arange(0, PAGE_PAD)
    inside = (o_j < PAGE) & (first + o_j < T)
    written = tl.load(
        p_written + i_b * written_sb + i_h * written_sh + (first + o_j) * written_st,
        mask=inside, other=0,
    )  # fmt: skip
    count = tl.max(tl.where(written != 0, o_j + 1, 0), 0)
    if count > 0:
        p_keys += i_b * keys_sb + i_h * keys_sh + first * keys_st
        p_pages += i_b * pages_sb + i_h * pages_sh + i_page * pages_sp
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            low = tl.full((BLOCK_D,), float("inf"), tl.float32)
            high = tl.full((BLOCK_D,), float("-inf"), tl.float32)
            for j in range(count):
                key = tl.load(p_keys + j * keys_st + o_d, mask=o_d < D, other=0.0).to(tl.float32)
                # A NaN bounds nothing.
                low = tl.minimum(low, tl.where(key == key, key, float("inf")))
                high = tl.maximum(high, tl.where(key == key, key, float("-inf")))
            none = low > high
            low = tl.where(none, float("nan"), low)
            high = tl.where(none, float("nan"), high)
            tl.store(p_pages + o_d, low.to(p_pages.dtype.element_ty), mask=o_d < D)
            tl.store(p_pages + D + o_d, high.to(p_pages.dtype.element_ty), mask=o_d < D)


def update_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> None:
    """`loki::update_pages`; see `loki_compile.kernels.ops`."""
    check_pages(pages, keys, written, page=page, grows=False)
    b, hkv, t, d = keys.shape
    with torch.cuda.device_of(keys):
        pages_kernel[(triton.cdiv(t, page), b * hkv)](
            pages, keys, written.view(torch.uint8),
            *broadcast_strides(pages, 3), *broadcast_strides(keys, 3),
            *broadcast_strides(written, 3), hkv, t,
            D=d, BLOCK_D=min(128, triton.next_power_of_2(d)), PAGE=page,
            PAGE_PAD=triton.next_power_of_2(page), num_warps=4,
        )  # fmt: skip


def extend_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> Tensor:
    """`loki::extend_pages`; see `loki_compile.kernels.ops`."""
    check_pages(pages, keys, written, page=page, grows=True)
    grown = longer_pages(pages, keys, page)
    update_pages(grown, keys, written, page=page)
    return grown
