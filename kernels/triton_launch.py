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
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

# Kinds of mask, known when a kernel is compiled.
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)


@triton.jit
def row_coordinates(i_row, H, S, ROWS_PER_KV: tl.constexpr):
    """(row, b, h, s, KV head) of row number i_row, all int64: they multiply strides."""
    # Divided as int32: a division of int64 is a call.
    i_h = (i_row // S) % H
    i_b = i_row // (S * H)
    i_kv = i_h // ROWS_PER_KV
    return (
        i_row.to(tl.int64), i_b.to(tl.int64), i_h.to(tl.int64), (i_row % S).to(tl.int64),
        i_kv.to(tl.int64),
    )  # fmt: skip


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
    block      listed keys per step of `choose`
    row_warps  warps of the kernels with one program per row, `prepare` and `choose`
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
    row_warps: int
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


# 99 KB of shared memory per multiprocessor, where others have 163 or 227 KB.
_SMALL_SHARED = ("sm86", "sm89", "sm120", "sm121")


def _programs(device: Device) -> int:
    """Programs per processor that the tables' shared memory allows."""
    return 2 if device.arch in _SMALL_SHARED else 4


def select_launch(
    device: Device, *, group: int, block_r: int, index_bytes: int, slots: int
) -> SelectLaunch:
    """The table of `select`. block_r: rank padded to a power of two; index_bytes: per element.

    A tile of the index is 16 KB (512 keys of 32 dims in int8), so that what is done once per tile
    (barriers, prefix sum, addresses) is spread over many keys; the instructions per key then stay
    under two thirds of what sm90 can issue while the tile comes from memory. Wide groups take less,
    since their accumulator is (keys, heads). The tiles in flight, 2 of them for each of 4 programs,
    are 128 KB per multiprocessor; H200 needs 29 KB at 4.8 TB/s and 800 ns.
    """
    amd = device.arch.startswith("gfx")
    # The matrix units take at least this many columns: 8 on NVIDIA (m16n8, wgmma n8), 16 on AMD.
    columns = 16 if amd else 8
    heads = min(64, triton.next_power_of_2(group))
    # An int8 row of the tile holds as many keys as fill the columns, so that none is padding and
    # the epilogue shrinks with them. Not for floats: a NaN would reach its neighbour (0 * NaN).
    pack = max(1, columns // heads) if index_bytes == 1 else 1
    heads = max(heads, columns // pack)
    # AMD: 64 KB of shared memory for the programs of a compute unit.
    block_t = (8192 if amd else 16384) // (block_r * index_bytes) * 8 // max(heads, 8)
    # fp32 has no tensor-core path at full precision: small tiles, which unroll.
    block_t = 32 if index_bytes == 4 else max(32, min(512, block_t))
    # n stages keep n - 1 tiles in flight. sm100 stages the products' operands in shared memory too.
    stages = 2 if amd or index_bytes == 4 or device.arch.startswith("sm10") else 3
    wide = slots > 8192
    return SelectLaunch(
        block_t=block_t,
        warps=4,
        stages=stages,
        programs=_programs(device),
        heads=heads,
        pack=pack,
        block=8192 if wide else 4096,
        row_warps=8,
    )


def attend_launch(device: Device, *, group: int, block_d: int, bytes_each: int) -> AttendLaunch:
    """The table of `attend`. block_d: the larger of D and Dv, padded; bytes_each: per element.

    A K tile and its V tile take 32 KB together (64 keys of 128 dims in 16 bits): the 4 programs of
    a processor have 128 KB in flight, as in `select_launch`, and fit the 163 KB of sm80.
    """
    amd = device.arch.startswith("gfx")
    # fp32 at full precision has no tensor-core path on NVIDIA, and its operands sit in registers:
    # tiles are half as large, and twice as many warps share them.
    fp32 = bytes_each == 4
    heads = 16 if fp32 else max(16, min(32, triton.next_power_of_2(group)))
    return AttendLaunch(
        block_n=max(16, min(64, (8192 if fp32 else 16384) // (block_d * bytes_each))),
        # The accumulator is (heads, Dv) fp32. A warp of AMD is twice as wide.
        warps=8 if (fp32 or heads > 16 or block_d > 256) and not amd else 4,
        stages=1 if amd or fp32 else 2,
        # AMD: K and V tiles wait in registers, 180 per lane, which leaves room for 2 programs.
        programs=2 if amd else _programs(device),
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


@functools.cache
def block_of(dims: int) -> int:
    """The block that holds so many dims: a power of two that products take."""
    return max(16, triton.next_power_of_2(dims))


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
