"""Launch choices of the Triton kernels: one small table each, and why.

All choices are functions of the architecture and of sizes that a model fixes (head_dim, rank,
dtypes, group), or, for the number of programs, of the batch: never of T. So a growing cache neither
recompiles a kernel nor changes a captured grid.

Each entry is cross-compiled for every architecture in `tests/test_cross_compile.py`, which asserts
that nothing spills and that shared memory fits. `python benchmarks/bench_kernels.py --autotune`
times the neighbours of an entry on the device at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Device:
    """arch: "sm90", "gfx942", or "interpreter"; processors: multiprocessors or compute units."""

    arch: str
    processors: int


@dataclass(frozen=True)
class Stage:
    """One launch of an op: its name, and how to run it (again)."""

    name: str
    run: Callable[[], None]


@dataclass(frozen=True)
class SelectLaunch:
    """How `triton_select` is launched.

    block_t    keys per tile of the index
    warps      warps of the tile kernels; stages: depth of their load pipeline
    programs   programs of the list kernel per processor
    heads      query heads per tensor-core tile (more are looped over)
    pack       keys per row of that tile
    block      listed keys per step of `choose`; choose_warps: its warps
    sample     scores sampled to find the floor
    list_all   rows that see at most this many keys list them all, without a sample
    """

    block_t: int
    warps: int
    stages: int
    programs: int
    heads: int
    pack: int
    block: int
    choose_warps: int
    sample: int = 2048
    list_all: int = 4096


@dataclass(frozen=True)
class AttendLaunch:
    """How `triton_attend` is launched.

    block_n    gathered keys per tile; warps and stages of the tile loop
    programs   programs per processor
    heads      query heads per program (more become further programs)
    """

    block_n: int
    warps: int
    stages: int
    programs: int
    heads: int


def select_launch(
    device: Device, *, group: int, block_r: int, index_bytes: int, top_k: int
) -> SelectLaunch:
    """The table of `select`. block_r: rank padded to a power of two; index_bytes: per element.

    A tile is 8 KB: 4 programs per processor with 4 stages keep 96 KB in flight, three times what
    H200 needs at 4.8 TB/s and 800 ns (29 KB per multiprocessor). A tile of more than 256 keys only
    makes the epilogue longer; wide groups halve it, since their accumulator is (keys, heads).
    """
    amd = device.arch.startswith("gfx")
    # The matrix units take at least this many columns: 8 on NVIDIA (m16n8, wgmma n8), 16 on AMD.
    columns = 16 if amd else 8
    heads = min(64, triton.next_power_of_2(group))
    # An int8 row of the tile holds as many keys as fill the columns, so that none is padding and
    # the epilogue shrinks with them. Not for floats: a NaN would reach its neighbour (0 * NaN).
    pack = max(1, columns // heads) if index_bytes == 1 else 1
    heads = max(heads, columns // pack)
    block_t = 16384 // (block_r * index_bytes) * 8 // max(heads, 8)
    # fp32 has no tensor-core path at full precision: small tiles, which unroll.
    block_t = 32 if index_bytes == 4 else max(64, min(512, block_t))
    # AMD copies through registers: a deep pipeline spills there, and 64-wide wavefronts need fewer.
    stages = 2 if amd or index_bytes == 4 else 4
    wide = top_k > 8192
    return SelectLaunch(
        block_t=block_t,
        warps=4,
        stages=stages,
        programs=4,
        heads=heads,
        pack=pack,
        block=8192 if wide else 4096,
        choose_warps=8,
    )


def attend_launch(device: Device, *, group: int, block_d: int, bytes_each: int) -> AttendLaunch:
    """The table of `attend`. block_d: the larger of D and Dv, padded; bytes_each: per element.

    A K tile and its V tile take 32 KB together (64 keys of 128 dims in 16 bits); 3 programs per
    processor with one pair in use and one in flight fit the 164 KB of sm80 and the 228 KB of sm90.
    """
    amd = device.arch.startswith("gfx")
    heads = max(16, min(64, triton.next_power_of_2(group)))
    block_n = max(16, min(64, 16384 // (block_d * bytes_each)))
    return AttendLaunch(
        block_n=block_n,
        warps=4,
        stages=1 if amd or bytes_each == 4 else 2,
        programs=4,
        heads=heads,
    )


def device_of(tensor: Tensor) -> Device:
    """The device a kernel on `tensor` runs on; the interpreter counts as a small one."""
    if tensor.device.type == "cpu":
        return Device("interpreter", 4)
    return _cuda_device(tensor.device.index or 0)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
    else:
        arch = f"sm{properties.major}{properties.minor}"
    return Device(arch, properties.multi_processor_count)


def interpreted(kernel: object) -> bool:
    """True where TRITON_INTERPRET=1 was set when the kernels were defined."""
    return isinstance(kernel, InterpretedFunction)


def programs_per_row(device: Device, rows: int, per_processor: int, most: int) -> int:
    """Programs that share a row, so that all rows together fill the device once."""
    return max(1, min(most, device.processors * per_processor // max(rows, 1)))


def broadcast_strides(tensor: Tensor | None, dims: int = 4) -> tuple[int, ...]:
    """Strides of the first `dims` dims with 0 where the size is 1 (or where there is no tensor)."""
    if tensor is None:
        return (0,) * dims
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape[:dims], tensor.stride()[:dims], strict=True)
    )


def alignment(row: int, strides: Sequence[int]) -> int:
    """A power of two up to 16 that divides `row` and every stride, for aligned vector loads.

    The row's own factor decides for a contiguous cache, so it does not change as T grows.
    """
    align = 16
    while align > 1 and any(n % align for n in (row, *strides)):
        align //= 2
    return align
