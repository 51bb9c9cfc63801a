"""The ops on the CPU: the compiled kernels, or PyTorch ops where they cannot be built."""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels import cpu_build, cpu_torch
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.checks import check_attend, check_pages, check_select
from torch import Tensor

_LOGGER = logging.getLogger("loki_compile")

# Both as in cpu_common.h: the codes of the dtypes, and a tensor of rank 4 as the kernels take it
# (address, dtype, sizes, strides).
_CODES = {
    **cpu_build.CODES,
    torch.int8: 3,
    torch.bool: 4,
    torch.uint8: 4,  # 0 or 1
    torch.int32: 2,  # positions and bounds: only their size counts
}
_VIEW = 10
_NO_TENSOR = (0, 5, 1, 1, 1, 1, 0, 0, 0, 0)
_pack_select = struct.Struct(f"@{7 * _VIEW}q13q2d").pack
_pack_attend = struct.Struct(f"@{8 * _VIEW}q2q2d").pack
_pack_pages = struct.Struct(f"@{3 * _VIEW}qq").pack


def select(
    q: Tensor,
    basis: Tensor | None,
    index: Tensor,
    index_scale: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    **options: Any,
) -> Tensor:
    """`loki::select`; see `loki_compile.kernels.ops`."""
    kernels = _kernels(_only(q, index))
    if kernels is None:
        mask = _bool_mask(mask)
        return cpu_torch.select(q, basis, index, index_scale, mask, bounds, **options)
    return _select(kernels, False, q, basis, index, index_scale, mask, bounds, **options)[0]


def select_weighed(
    q: Tensor,
    basis: Tensor | None,
    index: Tensor,
    index_scale: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`loki::select_weighed`; see `loki_compile.kernels.ops`."""
    kernels = _kernels(_only(q, index))
    if kernels is None:
        mask = _bool_mask(mask)
        return cpu_torch.select_weighed(q, basis, index, index_scale, mask, bounds, **options)
    positions, weighed = _select(
        kernels, True, q, basis, index, index_scale, mask, bounds, **options
    )
    return positions, weighed


def _select(
    kernels: ctypes.CDLL,
    weigh: bool,
    *operands: Any,
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
) -> list[Tensor]:
    """Positions, and what they weigh where `weigh`."""
    threads, tensors = torch.get_num_threads(), (*operands, budgets)
    options = (top_k, keep_q16, sink, recent, min_keys, per_head, page, keys, by_probability, slots)
    signature = (kernels, _layouts(tensors), options, scale, mass, weigh, threads)
    call = _calls.get(signature)
    if call is None:
        b, heads, s, t = check_select(
            *operands,
            top_k=top_k, keep_q16=keep_q16, sink=sink, recent=recent, min_keys=min_keys,
            per_head=per_head, page=page, keys=keys, by_probability=by_probability, mass=mass,
            budgets=budgets, slots=slots, weighed=weigh,
        )  # fmt: skip
        budget = Budget(top_k, keep_q16, sink, recent, min_keys)
        slots = int(budget.slots(t)) if slots is None else slots
        given = (slots, *_numbers(budget, t), per_head, threads, t, page, by_probability)
        block = _pack_select(*_views(*tensors), 0, *given, 0, scale, mass)
        at = len(tensors) * _VIEW
        results = [_Result(at, (b, heads, s, slots), torch.int32)]
        if weigh:
            results.append(_Result(at + 1 + len(given), (b, heads, s, 2), torch.float32))
        op = "loki::select_weighed" if weigh else "loki::select"
        call = _Call(op, kernels.loki_select, array("q", block), results)
        _remember(signature, call)
    return call(tensors)


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
    kernels = _kernels(_only(q, k, k_pe, v))
    if kernels is None:
        return cpu_torch.attend(
            q,
            k,
            v,
            positions,
            _bool_mask(mask),
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            k_pe=k_pe,
            ranges=ranges,
        )
    tensors = (q, k, k_pe, v, positions, ranges, mask, sink_logits)
    threads = torch.get_num_threads()
    signature = (kernels, _layouts(tensors), scale, softcap, threads)
    call = _calls.get(signature)
    if call is None:
        shape = check_attend(
            q, k, v, positions, mask, softcap=softcap, sink_logits=sink_logits, k_pe=k_pe,
            ranges=ranges,
        )  # fmt: skip
        op = "loki::attention" if positions is None else "loki::attend"
        block = _pack_attend(*_views(*tensors), 0, threads, scale, softcap)
        results = [_Result(len(tensors) * _VIEW, shape, q.dtype)]
        call = _Call(op, kernels.loki_attend, array("q", block), results)
        _remember(signature, call)
    return call(tensors)[0]


def update_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int) -> None:
    """`loki::update_pages`; see `loki_compile.kernels.ops`."""
    kernels = _kernels(_only(keys))
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


def _bool_mask(mask: Tensor | None) -> Tensor | None:
    """Masks of bytes, 0 or 1, are bool to PyTorch ops; the compiled kernels read both alike."""
    return mask.view(torch.bool) if mask is not None and mask.dtype == torch.uint8 else mask


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


@dataclass(frozen=True)
class _Result:
    """A tensor that a kernel fills: which of its parameters is the address, shape and dtype."""

    word: int
    shape: Sequence[int | torch.SymInt]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Call:
    """A kernel's call that was checked, for tensors laid out as those it was checked with.

    Attributes:
      op, kernel: what it is to its callers, and in the library.
      words: its parameters: for each tensor the `_VIEW` words of a view, then the address of the
        first result, and more; addresses are filled in at each call.
    """

    op: str
    kernel: Callable[[bytes], int]
    words: array[int]
    results: Sequence[_Result]

    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """
        Raises:
          MemoryError: how much scratch memory could not be had.
        """
        words, at = self.words[:], 0
        for tensor in tensors:
            if tensor is not None:
                words[at] = tensor.data_ptr()
            at += _VIEW
        results = []
        for result in self.results:
            results.append(torch.empty(result.shape, dtype=result.dtype))
            words[result.word] = results[-1].data_ptr()
        missing = self.kernel(words.tobytes())
        if missing:
            raise MemoryError(
                f"{self.op}: {missing} bytes of scratch memory could not be allocated; free "
                "memory, or decode fewer rows or tokens at a time."
            )
        return results


# Checks and packing cost several times what a kernel does over few keys, and all layers of a step
# call alike. Few are kept: caches that grow never call alike again.
_calls: dict[Hashable, _Call] = {}
_MOST_CALLS = 256


def _remember(signature: Hashable, call: _Call) -> None:
    if len(_calls) >= _MOST_CALLS:
        _calls.clear()
    _calls[signature] = call


def _layouts(tensors: Sequence[Tensor | None]) -> Hashable:
    """All of tensors that is checked, or that a kernel is told, but for their addresses."""
    return tuple([x if x is None else (x.dtype, x.shape, x.stride(), x.is_cpu) for x in tensors])


def _only(*tensors: Tensor | None) -> torch.dtype | None:
    """The one float type of tensors, of which an int8 index has none; None where they differ, as
    under autocast, or have one that `checks` refuses."""
    found: torch.dtype | None = None
    for tensor in tensors:
        if tensor is None or (dtype := tensor.dtype) is found or dtype is torch.int8:
            continue
        if found is not None:
            return None
        found = dtype
    return found if found in cpu_build.CODES else None


@functools.cache
def _kernels(only: torch.dtype | None) -> ctypes.CDLL | None:
    """The compiled kernels for a float type, or any, or None where there are none: said once."""
    try:
        return declare(cpu_build.load(only))
    except cpu_build.KernelsUnavailable as error:
        _say_once(str(error))
        return None


@functools.cache
def _say_once(error: str) -> None:
    _LOGGER.warning("CPU kernels: %s. PyTorch ops are used instead, slower.", error)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tells ctypes what the library's functions take, one block of parameters, and return: the
    bytes of scratch memory that could not be had, 0 where all is done."""
    for function in (library.loki_select, library.loki_attend, library.loki_update_pages):
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int64
    return library
