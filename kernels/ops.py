"""The public door of the kernels: the ops.

`loki::select` chooses keys, `loki::select_weighed` says what they weigh as well, `loki::attend`
reads them, `loki::attention` reads all keys, or two ranges of them for each row; `loki::prefill`
reads spans of a prompt; `loki::update_pages` and `loki::extend_pages` keep the bounds of pages of
keys. All are opaque to the compiler, and functional but for `update_pages`, which writes the pages
it is given; `fused` has the plain torch around them. `loki_compile.kernels` has the algorithm and
the legend of the letters; `checks` has what is refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels import cpu, cpu_build, span_prefill
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
    "SCHEMAS",
    "Backend",
    "Budget",
    "attend",
    "attention",
    "attention_pays",
    "begin_building",
    "check_attend",
    "check_pages",
    "check_select",
    "extend_pages",
    "hidden_below",
    "prefill",
    "select",
    "select_weighed",
    "unserved",
    "update_pages",
    "without_autocast",
]


@dataclass(frozen=True)
class Backend:
    """What runs the ops on one type of device.

    `available` says why it cannot run here, "" where it can; `note` says what a user may want to
    know where it does run, "" where there is nothing; `attention_pays`: `loki::attention` is
    measured to be faster than PyTorch's attention. None of them builds a kernel; `begin` has that
    done in the background, where it takes long, before an op is called: for a float type, or any.
    """

    available: Callable[[], str]
    note: Callable[[], str] = lambda: ""
    attention_pays: Callable[[], bool] = lambda: False
    begin: Callable[[torch.dtype | None], None] = lambda _: None


def _plain_ops() -> str:
    obstacle = cpu_build.obstacle()
    return obstacle and f"plain PyTorch ops, slower than compiled kernels: {obstacle}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return ""


# By `torch.device.type`; ROCm's devices are called "cuda" too.
BACKENDS = {
    "cpu": Backend(
        available=lambda: "",
        note=_plain_ops,
        attention_pays=lambda: not cpu_build.obstacle(),
        begin=cpu_build.begin,
    ),
    "cuda": Backend(available=_triton),
}


def unserved(device_type: str) -> str:
    """Why the ops cannot run on devices of a type, "" where they can."""
    if device_type not in BACKENDS:
        return f"the kernels serve {' and '.join(BACKENDS)}"
    return BACKENDS[device_type].available()


def begin_building(device_type: str, only: torch.dtype | None = None) -> None:
    """Has what the ops need on devices of a type built in the background, where that takes long.

    `only`: the float type of all that they will be given; None: they have several.
    """
    if not unserved(device_type):
        BACKENDS[device_type].begin(only)


def attention_pays(device_type: str) -> bool:
    """Whether few query tokens over all keys are faster by `loki::attention` than by PyTorch's own:
    on a CPU with a C++ compiler, at any length and in every dtype (docs/measured.md)."""
    backend = BACKENDS.get(device_type)
    return backend is not None and not backend.available() and backend.attention_pays()


def without_autocast(device_type: str) -> torch.autocast | contextlib.nullcontext[None]:
    """A region in which products are computed in the dtype of their operands."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


_LIBRARY = torch.library.Library("loki", "DEF")

# needs_exact_strides: Inductor hands every tensor over with the strides it has in the traced graph.
# A cache view therefore arrives as it is, uncopied, and the strides that `checks` asks for hold.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_SELECT = (
    "(Tensor q, Tensor? basis, Tensor index, Tensor? index_scale, Tensor? mask,"
    " Tensor? bounds, *, float scale, int? top_k, int keep_q16, int sink, int recent,"
    " int min_keys, bool per_head, int page=1, SymInt? keys=None, bool by_probability=False,"
    " float mass=0.0, Tensor? budgets=None, SymInt? slots=None) -> "
)
SCHEMAS = (
    f"select{_SELECT}Tensor",
    f"select_weighed{_SELECT}(Tensor, Tensor)",
    "update_pages(Tensor(a!) pages, Tensor keys, Tensor written, *, int page) -> ()",
    "extend_pages(Tensor pages, Tensor keys, Tensor written, *, int page) -> Tensor",
    "attend(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor? mask,"
    " *, float scale, float softcap=0.0, Tensor? sink_logits=None, Tensor? k_pe=None) -> Tensor",
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask,"
    " *, float scale, float softcap=0.0, Tensor? sink_logits=None, Tensor? k_pe=None,"
    " Tensor? ranges=None) -> Tensor",
    "prefill(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? plain, *, float scale,"
    " int[] lines, int sink, int recent, int min_keys) -> Tensor",
)
for _schema in SCHEMAS:
    _LIBRARY.define(_schema, tags=_TAGS)

# What Inductor stored on disk calls our ops as they were then, and its own keys do not tell: of
# whatever graph calls them, ours or a user's, each set of schemas has its own entries.
_ours = f"loki-{zlib.crc32(''.join(SCHEMAS).encode()):08x}"
torch.compiler.config.cache_key_tag += _ours  # type: ignore[attr-defined]


@torch.library.register_fake("loki::select", lib=_LIBRARY)
def _select_fake(
    q, basis, index, index_scale, mask, bounds, *, top_k, keep_q16, sink, recent, min_keys,
    per_head, page=1, keys=None, slots=None, **_,
):  # fmt: skip
    heads = q.shape[1] if per_head else index.shape[1]
    if slots is None:
        budget = Budget(top_k, keep_q16, sink, recent, min_keys)
        slots = budget.slots(keys_ranked(index, page, keys))
    return q.new_empty((q.shape[0], heads, q.shape[2], slots), dtype=torch.int32)


@torch.library.register_fake("loki::select_weighed", lib=_LIBRARY)
def _select_weighed_fake(q, *args, **options):
    positions = _select_fake(q, *args, **options)
    return positions, q.new_empty((*positions.shape[:3], 2), dtype=torch.float32)


@torch.library.register_fake("loki::attend", lib=_LIBRARY)
def _attend_fake(q, k, v, positions, mask, **_):
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


@torch.library.register_fake("loki::attention", lib=_LIBRARY)
def _attention_fake(q, k, v, mask, **_):
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


@torch.library.register_fake("loki::prefill", lib=_LIBRARY)
def _prefill_fake(q, k, v, mask, plain, **_):
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


@torch.library.register_fake("loki::update_pages", lib=_LIBRARY)
def _update_pages_fake(pages, keys, written, *, page):
    return None


@torch.library.register_fake("loki::extend_pages", lib=_LIBRARY)
def _extend_pages_fake(pages, keys, written, *, page):
    b, hkv, t, d = keys.shape
    return keys.new_empty((b, hkv, (t + page - 1) // page, 2 * d))


def with_bool_mask(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of `select`, `select_weighed` or `attend`, for masks of bytes as well: 0 or 1, one
    byte as in bool."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        mask = args[4]  # in all of these schemas
        if mask is not None and mask.dtype == torch.uint8:
            args = (*args[:4], mask.view(torch.bool), *args[5:])
        return kernel(*args, **kwargs)

    return run


def _select_cuda(*args, **kwargs):
    # Here and not above: a machine without Triton can still run the CPU path.
    from loki_compile.kernels import triton_select

    return triton_select.select(*args, **kwargs)


def _select_weighed_cuda(*args, **kwargs):
    from loki_compile.kernels import triton_select

    return triton_select.select_weighed(*args, **kwargs)


def _attend_cuda(*args, **kwargs):
    from loki_compile.kernels import triton_attend

    return triton_attend.attend(*args, **kwargs)


def over_all_keys(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of `attention`, made of one of `attend`, which no positions mean all keys to."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        return attend(q, k, v, None, mask, **options)

    return attention


def _update_pages_cuda(*args, **kwargs):
    from loki_compile.kernels import triton_pages

    triton_pages.update_pages(*args, **kwargs)


def _extend_pages_cuda(*args, **kwargs):
    from loki_compile.kernels import triton_pages

    return triton_pages.extend_pages(*args, **kwargs)


# What the ops are on CPUs and on CUDA devices.
CPU_KERNELS: dict[str, Callable[..., Any]] = {
    "select": cpu.select,
    "select_weighed": cpu.select_weighed,
    "attend": cpu.attend,
    "attention": over_all_keys(cpu.attend),
    "prefill": span_prefill.prefill,
    "update_pages": cpu.update_pages,
    "extend_pages": cpu.extend_pages,
}
CUDA_KERNELS: dict[str, Callable[..., Any]] = {
    "select": with_bool_mask(_select_cuda),
    "select_weighed": with_bool_mask(_select_weighed_cuda),
    "attend": with_bool_mask(_attend_cuda),
    "attention": over_all_keys(with_bool_mask(_attend_cuda)),
    "prefill": span_prefill.prefill,
    "update_pages": _update_pages_cuda,
    "extend_pages": _extend_pages_cuda,
}
for _key, _kernels in (("CPU", CPU_KERNELS), ("CUDA", CUDA_KERNELS)):
    for _name, _kernel in _kernels.items():
        _LIBRARY.impl(_name, _kernel, _key)

select = torch.ops.loki.select.default
select_weighed = torch.ops.loki.select_weighed.default
attend = torch.ops.loki.attend.default
attention = torch.ops.loki.attention.default
prefill = torch.ops.loki.prefill.default
update_pages = torch.ops.loki.update_pages.default
extend_pages = torch.ops.loki.extend_pages.default
