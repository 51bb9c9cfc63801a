"""The ops on the CPU: the compiled kernels, or PyTorch ops where they cannot be built."""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Callable

import torch
from loki_compile.kernels import cpu_build, cpu_torch
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.checks import check_attend, check_pages, check_select
from torch import Tensor

_LOGGER = logging.getLogger("loki_compile")

# Both as in cpu_common.h: the codes of the dtypes, and a tensor of rank 4 as the kernels take it
# (address, dtype, sizes, strides).
_CODES = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.int8: 3,
    torch.bool: 4,
    torch.uint8: 4,  # 0 or 1
    torch.int32: 2,  # positions and bounds: only their size counts
}
_VIEW = 10
_NO_TENSOR = (0, 5, 1, 1, 1, 1, 0, 0, 0, 0)
_pack_select = struct.Struct(f"@{6 * _VIEW}q12qd").pack
_pack_attend = struct.Struct(f"@{8 * _VIEW}q2q2d").pack
_pack_pages = struct.Struct(f"@{3 * _VIEW}qq").pack


def select(
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
) -> Tensor:
    """`loki::select`; see `loki_compile.kernels.ops`."""
    kernels = _kernels()
    if kernels is None:
        return cpu_torch.select(
            q, basis, index, index_scale, mask, bounds, scale=scale, top_k=top_k,
            keep_q16=keep_q16, sink=sink, recent=recent, min_keys=min_keys, per_head=per_head,
            page=page, keys=keys, by_probability=by_probability,
        )  # fmt: skip
    b, heads, s, t = check_select(
        q, basis, index, index_scale, mask, bounds,
        top_k=top_k, keep_q16=keep_q16, sink=sink, recent=recent, min_keys=min_keys,
        per_head=per_head, page=page, keys=keys, by_probability=by_probability,
    )  # fmt: skip
    budget = Budget(top_k, keep_q16, sink, recent, min_keys)
    slots = budget.slots(t)
    positions = torch.empty((b, heads, s, slots), dtype=torch.int32)
    block = _pack_select(
        *_views(q, basis, index, index_scale, mask, bounds),
        positions.data_ptr(),
        slots,
        *_numbers(budget, t),
        per_head,
        torch.get_num_threads(),
        t,
        page,
        by_probability,
        scale,
    )
    _run("loki::select", kernels.loki_select, block)
    return positions


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
) -> Tensor:
    """`loki::attend`, and `loki::attention` without positions; see `loki_compile.kernels.ops`."""
    kernels = _kernels()
    if kernels is None:
        return cpu_torch.attend(
            q,
            k,
            v,
            positions,
            mask,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            k_pe=k_pe,
            ranges=ranges,
        )
    shape = check_attend(
        q, k, v, positions, mask, softcap=softcap, sink_logits=sink_logits, k_pe=k_pe,
        ranges=ranges,
    )  # fmt: skip
    out = torch.empty(shape, dtype=q.dtype)
    block = _pack_attend(
        *_views(q, k, k_pe, v, positions, ranges, mask, sink_logits),
        out.data_ptr(),
        torch.get_num_threads(),
        scale,
        softcap,
    )
    _run("loki::attention" if positions is None else "loki::attend", kernels.loki_attend, block)
    return out


def update_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> None:
    """`loki::update_pages`; see `loki_compile.kernels.ops`."""
    kernels = _kernels()
    if kernels is None:
        cpu_torch.update_pages(pages, keys, written, page=page)
        return
    check_pages(pages, keys, written, page=page, grows=False)
    kernels.loki_update_pages(_pack_pages(*_views(pages, keys, written), page))


def extend_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> Tensor:
    """`loki::extend_pages`; see `loki_compile.kernels.ops`."""
    check_pages(pages, keys, written, page=page, grows=True)
    grown = cpu_torch.longer_pages(pages, keys, page)
    update_pages(grown, keys, written, page=page)
    return grown


def _numbers(budget: Budget, t: int) -> tuple[int, ...]:
    """The budget of rows over so many keys, as the kernels take it."""
    top_k, *others = budget.numbers
    return t if top_k is None else top_k, *others


def _views(*tensors: Tensor | None) -> list[int]:
    """Tensors as the kernels take them, one after the other; sizes that one lacks come first, and
    are 1."""
    block: list[int] = []
    for tensor in tensors:
        if tensor is None:
            block += _NO_TENSOR
            continue
        shape, strides = tensor.shape, tensor.stride()
        if lacks := 4 - len(shape):
            shape, strides = (1,) * lacks + shape, (0,) * lacks + strides
        block += (tensor.data_ptr(), _CODES[tensor.dtype], *shape, *strides)
    return block


def _run(op: str, kernel: Callable[[bytes], int], block: bytes) -> None:
    """
    Raises:
      MemoryError: how much scratch memory could not be had.
    """
    missing = kernel(block)
    if missing:
        raise MemoryError(
            f"{op}: {missing} bytes of scratch memory could not be allocated; free memory, or "
            "decode fewer rows or tokens at a time."
        )


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    """The compiled kernels, or None, said once, where there are none."""
    try:
        return declare(cpu_build.load())
    except cpu_build.KernelsUnavailable as error:
        _LOGGER.warning("CPU kernels: %s. PyTorch ops are used instead, slower.", error)
        return None


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tells ctypes what the library's functions take, one block of parameters, and return: the
    bytes of scratch memory that could not be had, 0 where all is done."""
    for function in (library.loki_select, library.loki_attend, library.loki_update_pages):
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int64
    return library
