"""The public door of the kernels: the ops, and what feeds them.

`loki::select` chooses keys, `loki::attend` reads them, `loki::update_pages` and
`loki::extend_pages` keep the bounds of pages of keys. All are opaque to the
compiler, and functional but for `update_pages`, which writes the pages it is given; `mask_bounds`
and `index_rows` are plain torch, so that Inductor fuses them with the graph around them.
`loki_compile.kernels` has the algorithm and the legend of the letters; `checks` what is refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels import cpu, cpu_build
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.checks import (
    KEEP_ALL_Q16,
    check_attend,
    check_pages,
    check_select,
    hidden_below,
    keys_ranked,
)
from torch import Tensor

__all__ = [
    "BACKENDS",
    "KEEP_ALL_Q16",
    "Backend",
    "Budget",
    "attend",
    "check_attend",
    "check_pages",
    "check_select",
    "extend_pages",
    "hidden_below",
    "index_rows",
    "mask_bounds",
    "select",
    "unserved",
    "update_pages",
    "without_autocast",
]

_INT8_MAX = 127


@dataclass(frozen=True)
class Backend:
    """What runs the ops on one type of device.

    `available` says why it cannot run here, "" where it can; `note` says what a user may want to
    know where it does run, "" where there is nothing. Neither builds a kernel.
    """

    available: Callable[[], str]
    note: Callable[[], str] = lambda: ""


def _plain_ops() -> str:
    obstacle = cpu_build.obstacle()
    return obstacle and f"plain PyTorch ops, slower than compiled kernels: {obstacle}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return ""


# By `torch.device.type`; ROCm's devices are called "cuda" too.
BACKENDS = {
    "cpu": Backend(available=lambda: "", note=_plain_ops),
    "cuda": Backend(available=_triton),
}


def unserved(device_type: str) -> str:
    """Why the ops cannot run on devices of a type, "" where they can."""
    if device_type not in BACKENDS:
        return f"the kernels serve {' and '.join(BACKENDS)}"
    return BACKENDS[device_type].available()


def without_autocast(device_type: str) -> torch.autocast | contextlib.nullcontext[None]:
    """A region in which products are computed in the dtype of their operands."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def mask_bounds(mask: Tensor) -> Tensor:
    """Where the visible keys of each mask row lie.

    mask (Bm, Hm, Sm, T), bool or uint8 (True or 1 = visible), or floating (visible above
    `hidden_below(dtype)`).
    Returns int32 (Bm, Hm, Sm, 3): first visible position, last visible position + 1, number of
    visible keys; (0, 0, 0) for a row that sees nothing.
    """
    if mask.is_floating_point():
        visible = mask > hidden_below(mask.dtype)
    else:
        visible = mask if mask.dtype == torch.bool else mask.to(torch.int32) != 0
    t = mask.shape[-1]
    position = torch.arange(t, device=mask.device, dtype=torch.int32)
    end = torch.where(visible, position + 1, 0).amax(-1)
    start = torch.minimum(torch.where(visible, position, t).amin(-1), end)
    count = visible.sum(-1, dtype=torch.int32)
    return torch.stack((start, end, count), -1).to(torch.int32)


def index_rows(keys: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Index rows of new keys: their projection, stored as `dtype`.

    keys (B, Hkv, S, D) floating; basis (Hkv, D, R) or (B, Hkv, D, R) fp32, the key-side projection;
    math in fp32, under autocast too.
    Returns rows (B, Hkv, S, R) and, for int8, their scale (B, Hkv, S, 1) fp32, else None.
    int8 is symmetric per token and head: scale = max |row| / 127, row = round(value / scale).
    Entries that are not finite count as 0; a zero row has scale 0.
    """
    with without_autocast(keys.device.type):
        rows = torch.matmul(keys.float(), basis)
    if dtype != torch.int8:
        return rows.to(dtype), None
    rows = torch.where(rows.isfinite(), rows, 0.0)
    row_scale = rows.abs().amax(-1, keepdim=True) / _INT8_MAX
    quotient = torch.where(row_scale > 0, rows / row_scale, 0.0)
    return quotient.round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), row_scale


_LIBRARY = torch.library.Library("loki", "DEF")

# needs_exact_strides: Inductor hands every tensor over with the strides it has in the traced graph.
# A cache view therefore arrives as it is, uncopied, and the strides that `checks` asks for hold.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_LIBRARY.define(
    "select(Tensor q, Tensor? basis, Tensor index, Tensor? index_scale, Tensor? mask,"
    " Tensor? bounds, *, float scale, int? top_k, int keep_q16, int sink, int recent,"
    " int min_keys, bool per_head, int page=1, SymInt? keys=None, bool by_probability=False)"
    " -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "update_pages(Tensor(a!) pages, Tensor keys, Tensor written, *, int page) -> ()", tags=_TAGS
)
_LIBRARY.define(
    "extend_pages(Tensor pages, Tensor keys, Tensor written, *, int page) -> Tensor", tags=_TAGS
)
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor? mask,"
    " *, float scale, float softcap=0.0, Tensor? sink_logits=None, Tensor? k_rest=None) -> Tensor",
    tags=_TAGS,
)


@torch.library.register_fake("loki::select", lib=_LIBRARY)
def _select_fake(
    q, basis, index, index_scale, mask, bounds, *, top_k, keep_q16, sink, recent, min_keys,
    per_head, page=1, keys=None, **_,
):  # fmt: skip
    heads = q.shape[1] if per_head else index.shape[1]
    slots = Budget(top_k, keep_q16, sink, recent, min_keys).slots(keys_ranked(index, page, keys))
    return q.new_empty((q.shape[0], heads, q.shape[2], slots), dtype=torch.int32)


@torch.library.register_fake("loki::attend", lib=_LIBRARY)
def _attend_fake(q, k, v, positions, mask, **_):
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


@torch.library.register_fake("loki::update_pages", lib=_LIBRARY)
def _update_pages_fake(pages, keys, written, *, page):
    return None


@torch.library.register_fake("loki::extend_pages", lib=_LIBRARY)
def _extend_pages_fake(pages, keys, written, *, page):
    b, hkv, t, d = keys.shape
    return keys.new_empty((b, hkv, (t + page - 1) // page, 2 * d))


def with_bool_mask(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of `select` or `attend`, for masks of bytes as well: 0 or 1, one byte as in bool."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        mask = args[4]  # in both schemas
        if mask is not None and mask.dtype == torch.uint8:
            args = (*args[:4], mask.view(torch.bool), *args[5:])
        return kernel(*args, **kwargs)

    return run


def _select_cuda(*args, **kwargs):
    # Here and not above: a machine without Triton can still run the CPU path.
    from loki_compile.kernels import triton_select

    return triton_select.select(*args, **kwargs)


def _attend_cuda(*args, **kwargs):
    from loki_compile.kernels import triton_attend

    return triton_attend.attend(*args, **kwargs)


def _update_pages_cuda(*args, **kwargs):
    from loki_compile.kernels import triton_pages

    triton_pages.update_pages(*args, **kwargs)


def _extend_pages_cuda(*args, **kwargs):
    from loki_compile.kernels import triton_pages

    return triton_pages.extend_pages(*args, **kwargs)


_LIBRARY.impl("select", with_bool_mask(cpu.select), "CPU")
_LIBRARY.impl("attend", with_bool_mask(cpu.attend), "CPU")
_LIBRARY.impl("select", with_bool_mask(_select_cuda), "CUDA")
_LIBRARY.impl("attend", with_bool_mask(_attend_cuda), "CUDA")
_LIBRARY.impl("update_pages", cpu.update_pages, "CPU")
_LIBRARY.impl("extend_pages", cpu.extend_pages, "CPU")
_LIBRARY.impl("update_pages", _update_pages_cuda, "CUDA")
_LIBRARY.impl("extend_pages", _extend_pages_cuda, "CUDA")

select = torch.ops.loki.select.default
attend = torch.ops.loki.attend.default
update_pages = torch.ops.loki.update_pages.default
extend_pages = torch.ops.loki.extend_pages.default
