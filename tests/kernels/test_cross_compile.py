"""Every entry of the launch tables compiles for every architecture, and what it then needs.

`triton.compile` with a `GPUTarget` needs no device. The arguments are those that the launchers
pass: a recorder stands in for each kernel. Asserted: no register spills (or a stated bound), shared
memory within the chip's limit and within what the launch table counts on, and that nothing which
a compiled kernel depends on changes as T grows.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="cross-compilation needs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from loki_compile.kernels import triton_attend, triton_pages, triton_select  # noqa: E402
from loki_compile.kernels.triton_launch import (  # noqa: E402
    Device,
    attend_launch,
    select_launch,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SELECT_KERNELS = (
    "prepare_kernel", "list_kernel", "choose_kernel", "score_kernel", "mass_kernel", "sum_kernel",
)  # fmt: skip
ATTEND_KERNELS = ("attend_kernel", "combine_kernel")
# Bytes per thread. On some chips `prepare` parks a few scalars while it samples, outside its loops.
SPILL_BOUNDS = {"prepare_kernel": 16}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """processors: multiprocessors or compute units; shared bytes and registers of each."""

    target: GPUTarget
    processors: int
    shared_bytes: int
    registers: int


CHIPS = {
    "sm80": Chip(GPUTarget("cuda", 80, 32), 108, 163 * 1024, 1 << 16),
    "sm90": Chip(GPUTarget("cuda", 90, 32), 132, 227 * 1024, 1 << 16),
    "sm100": Chip(GPUTarget("cuda", 100, 32), 148, 227 * 1024, 1 << 16),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 304, 64 * 1024, 1 << 17),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict
    options: dict

    def source(self) -> ASTSource:
        """What the just-in-time compiler would be given for these arguments."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                assert parameter.do_not_specialize, f"{parameter.name} would recompile the kernel"
                signature[parameter.name] = "i32"
        return ASTSource(self.kernel, signature, constants, attributes)

    def identity(self) -> tuple:
        """All that decides which compiled kernel runs."""
        source = self.source()
        return self.kernel.__name__, source.signature, source.constants, self.options


@dataclasses.dataclass
class Recorder:
    kernel: triton.JITFunction
    launches: list[Launch]

    def __getitem__(self, grid):
        def launch(*positional, **named):
            names = self.kernel.arg_names
            arguments = dict(zip(names, positional, strict=False))
            arguments |= {n: v for n, v in named.items() if n in names}
            options = {n: v for n, v in named.items() if n not in names}
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return launch


def recorded(module, kernels, chip, call) -> list[Launch]:
    """The launches of `call` on `chip`, none of them made."""
    launches: list[Launch] = []
    stand_ins = {name: Recorder(getattr(module, name), launches) for name in kernels}
    if hasattr(module, "device_of"):
        device = Device(chip, CHIPS[chip].processors)
        stand_ins["device_of"] = lambda _: device
    with mock.patch.multiple(module, **stand_ins):
        call()
    return launches


def mask_tensors(kind, b, hq, s, t):
    if kind is None:
        return None, None
    heads = hq if kind == "per head" else 1
    mask = torch.empty(b, heads, s, t, dtype=torch.bool if kind == "bool" else torch.bfloat16)
    return mask, torch.empty(b, heads, s, 3, dtype=torch.int32)


def select_launches(
    chip, *, b=1, hq=32, hkv=8, s=1, t=300, d=128, r=32, q=torch.bfloat16, index=torch.int8,
    top_k=2048, min_keys=1024, mask=None, per_head=False, scorer="low rank", by_probability=False,
    page=1, mass=0.0, weigh=False, own=False,
):  # fmt: skip
    budgets = torch.empty(b, hkv, 1, 2, dtype=torch.int32) if own else None
    mask, bounds = mask_tensors(mask, b, hq, s, t)
    basis, scale, rows = torch.empty(hkv, d, r), None, torch.empty(b, hkv, t, r, dtype=index)
    if index == torch.int8:
        scale = torch.empty(b, hkv, t, 1)
    if scorer == "exact":
        basis, rows = None, torch.empty(b, t, hkv, d, dtype=index).transpose(1, 2)
    if scorer == "pages":
        basis, rows = None, torch.empty(b, hkv, -(-t // page), 2 * d, dtype=index)
    return recorded(
        triton_select, SELECT_KERNELS, chip,
        lambda: (triton_select.select_weighed if weigh else triton_select.select)(
            torch.empty(b, hq, s, d, dtype=q), basis, rows, scale, mask, bounds,
            scale=0.1, top_k=top_k, keep_q16=65536, sink=4, recent=32,
            min_keys=min_keys, per_head=per_head, page=page, keys=t if page > 1 else None,
            by_probability=by_probability, mass=mass, budgets=budgets, slots=2048 if own else None,
        ),
    )  # fmt: skip


def attend_launches(
    chip, *, b=1, hq=32, hkv=8, s=1, t=300, d=128, dv=None, dtype=torch.bfloat16, slots=2048,
    mask=None, softcap=0.0, sink_logits=False, rest=0, keys=None, values=None, ranges=False,
):  # fmt: skip
    """rest: dims of a second tensor of keys; the values then are the first itself (latents).
    slots=0: all keys, without positions, or two ranges of them."""
    mask, _ = mask_tensors(mask, b, hq, s, t)
    k = torch.empty(b, hkv, t, d, dtype=keys or dtype)
    v = k if rest else torch.empty(b, hkv, t, dv or d, dtype=values or dtype)
    return recorded(
        triton_attend, ATTEND_KERNELS, chip,
        lambda: triton_attend.attend(
            torch.empty(b, hq, s, d + rest, dtype=dtype), k, v,
            torch.empty(b, hkv, s, slots, dtype=torch.int32) if slots else None, mask,
            scale=0.1, softcap=softcap,
            sink_logits=torch.empty(hq) if sink_logits else None,
            k_pe=torch.empty(b, hkv, t, rest, dtype=dtype) if rest else None,
            ranges=torch.empty(b, hkv, s, 4, dtype=torch.int32) if ranges else None,
        ),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Needs:
    """registers per thread; spilled and shared in bytes (per thread, per program)."""

    registers: int
    spilled: int
    shared: int


def compiled_needs(launch: Launch, chip: str) -> Needs:
    target = CHIPS[chip].target
    kernel = triton.compile(launch.source(), target=target, options=launch.options)
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
        spilled = max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size"))
        return Needs(field("vgpr_count"), spilled, kernel.metadata.shared)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    return Needs(int(registers), int(stack) + int(local), kernel.metadata.shared)


def assert_fits(launches: list[Launch], chip: str, spill_bound: int = 0):
    for launch in launches:
        name, needs = launch.kernel.__name__, compiled_needs(launch, chip)
        print(chip, name, launch.options, needs)
        assert needs.spilled <= max(spill_bound, SPILL_BOUNDS.get(name, 0)), (name, needs)
        assert needs.shared <= CHIPS[chip].shared_bytes, (name, needs)


# One row per entry of the tables: what makes it different.
SELECT_COMMON = [
    dict(),
    dict(index=torch.bfloat16, mask="additive"),
]
BF16 = torch.bfloat16
SCORERS = [
    dict(scorer="exact", index=BF16),
    dict(scorer="exact", index=BF16, by_probability=True, mask="additive"),
    dict(scorer="pages", page=16, index=BF16, mask="bool"),
    dict(by_probability=True),
]
SCORERS_MORE = [
    dict(scorer="exact", index=torch.float32, q=torch.float32, d=64),
    dict(scorer="exact", index=torch.float16, d=256, hq=8, hkv=8, per_head=True),
    dict(scorer="pages", page=3, index=torch.float16, d=80, by_probability=True, mask="bool", s=2),
    dict(scorer="pages", page=256, index=torch.float32, d=256),
    dict(by_probability=True, index=BF16, hq=71, hkv=1, r=20, mask="additive"),
]
WEIGHED = [
    dict(mass=0.95, weigh=True),
    dict(mass=0.95, weigh=True, scorer="exact", index=BF16, by_probability=True, mask="additive"),
]
OWN_BUDGETS = [
    dict(own=True, mask="bool"),
    pytest.param(dict(own=True, weigh=True, scorer="exact", index=BF16), marks=pytest.mark.slow),
    pytest.param(dict(own=True, by_probability=True, mask="additive"), marks=pytest.mark.slow),
]
WEIGHED_MORE = [
    dict(mass=0.95, mask="bool"),
    dict(weigh=True, index=BF16, mask="additive", s=4),
    dict(mass=0.95, weigh=True, hq=71, hkv=1, d=64, r=20),
    dict(mass=0.95, weigh=True, r=64, index=torch.float32, q=torch.float32, mask="additive"),
]
SELECT_MORE = [
    dict(mask="bool", s=4),
    dict(mask="additive", r=64),
    dict(hkv=32),
    dict(hq=8, hkv=8, per_head=True, mask="per head"),
    dict(hq=71, hkv=1, d=64, r=20),
    dict(hq=128, hkv=1, d=192, r=64, index=torch.bfloat16),
    dict(d=256, r=256, index=torch.float16),
    dict(d=80, r=20, index=torch.float32, q=torch.float32),
    dict(r=64, index=torch.float32, q=torch.float32, mask="additive"),
    dict(top_k=16384),
]
ATTEND_COMMON = [
    dict(),
    dict(d=192, dv=128, mask="additive", softcap=50.0, sink_logits=True),
    dict(hq=16, hkv=1, d=512, rest=64, mask="additive"),
    dict(keys=torch.float32, mask="bool"),  # autocast: rotated keys stay fp32
]
ATTENTION_COMMON = [
    dict(),
    dict(s=4, mask="bool", d=64),
    dict(ranges=True),
    dict(ranges=True, s=4, mask="additive", softcap=50.0, sink_logits=True, d=64),
]
ATTENTION_MORE = [
    dict(s=8, hq=64, mask="additive", softcap=50.0, sink_logits=True),
    dict(hq=8, hkv=8, d=256, dtype=torch.float16),
    dict(hq=16, hkv=1, d=512, rest=64, mask="additive"),
    dict(dtype=torch.float32, d=64, s=2, mask="per head"),
    dict(dtype=torch.float32, d=64, s=2, mask="per head", ranges=True),
    dict(hq=16, hkv=1, d=512, rest=64, mask="bool", ranges=True),
]
ATTEND_MORE = [
    dict(d=64, mask="bool", sink_logits=True),
    dict(d=80),
    dict(d=96, dtype=torch.float16),
    dict(d=256, softcap=50.0, mask="additive"),
    dict(hq=64, hkv=1, mask="per head"),
    dict(hq=16, hkv=1, d=256, mask="per head", sink_logits=True),
    dict(hq=128, hkv=1, d=512, rest=64),
    dict(hq=40, hkv=1, d=256, rest=32, dtype=torch.float16),
    dict(hq=16, hkv=1, d=512, rest=64, dtype=torch.float32),
    dict(dtype=torch.float32, d=64),
    dict(dtype=torch.float32, keys=torch.bfloat16, values=torch.bfloat16),
    dict(dtype=torch.float16, keys=torch.float32, values=torch.float32, d=256, mask="additive"),
    dict(dtype=torch.float32, mask="additive", softcap=30.0),
    dict(dtype=torch.float32, hq=64, hkv=1, mask="per head"),
]


def on_chips_in_turn(cases: list[dict]) -> pytest.MarkDecorator:
    """Each case on two of the chips, and where tests are slow on the other two as well: a second
    apiece, and what is common runs on all of them below."""
    return pytest.mark.parametrize(
        ("chip", "case"),
        [
            pytest.param(
                chip, case, marks=[pytest.mark.slow] * ((place + number) % 2), id=f"{chip}-{case}"
            )
            for place, case in enumerate(cases)
            for number, chip in enumerate(CHIPS)
        ],
    )


@on_chips_in_turn(SELECT_COMMON)
def test_select_fits(chip, case):
    assert_fits(select_launches(chip, **case), chip)


@on_chips_in_turn(SCORERS)
def test_every_scorer_fits(chip, case):
    assert_fits(select_launches(chip, **case), chip)


@pytest.mark.parametrize(
    "chip", [c if c == "sm90" else pytest.param(c, marks=pytest.mark.slow) for c in CHIPS]
)
@pytest.mark.parametrize("case", WEIGHED, ids=str)
def test_what_weighs_keys_fits(chip, case):
    assert_fits(select_launches(chip, **case), chip)


@pytest.mark.parametrize(
    "chip", [c if c == "sm90" else pytest.param(c, marks=pytest.mark.slow) for c in CHIPS]
)
@pytest.mark.parametrize("case", OWN_BUDGETS, ids=str)
def test_budgets_of_kv_heads_fit(chip, case):
    assert_fits(select_launches(chip, **case), chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", WEIGHED_MORE, ids=str)
def test_what_weighs_keys_fits_everywhere_else(chip, case):
    assert_fits(select_launches(chip, **case), chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", SCORERS_MORE, ids=str)
def test_every_scorer_fits_everywhere_else(chip, case):
    assert_fits(select_launches(chip, **case), chip)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_updates_of_pages_fit(chip, dtype):
    launches = recorded(
        triton_pages, ("pages_kernel",), chip,
        lambda: triton_pages.update_pages(
            torch.empty(2, 8, 20, 256, dtype=dtype), torch.empty(2, 8, 300, 128, dtype=dtype),
            torch.empty(2, 1, 300, 1, dtype=torch.bool), page=16,
        ),
    )  # fmt: skip
    assert len(launches) == 1
    assert_fits(launches, chip)


@on_chips_in_turn(ATTEND_COMMON)
def test_attend_fits(chip, case):
    assert_fits(attend_launches(chip, **case), chip)


@on_chips_in_turn(ATTENTION_COMMON)
def test_attention_over_all_keys_fits(chip, case):
    assert_fits(attend_launches(chip, slots=0, **case), chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", ATTENTION_MORE, ids=str)
def test_attention_over_all_keys_fits_everywhere_else(chip, case):
    assert_fits(attend_launches(chip, slots=0, **case), chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", SELECT_MORE, ids=str)
def test_select_fits_everywhere_else(chip, case):
    assert_fits(select_launches(chip, **case), chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", ATTEND_MORE, ids=str)
def test_attend_fits_everywhere_else(chip, case):
    assert_fits(attend_launches(chip, **case), chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_the_one_entry_that_spills_spills_little(chip):
    """fp32 at head_dim 256: the operands of a full-precision product outgrow the registers."""
    case = dict(dtype=torch.float32, d=256, softcap=30.0, mask="additive")
    assert_fits(attend_launches(chip, **case), chip, spill_bound=256)


@pytest.mark.parametrize("chip", ["sm90"])
def test_tensor_cores_take_the_index_as_it_is_stored(chip):
    """int8 rows go to the matrix units without a conversion, and by asynchronous copies."""
    launch = next(x for x in select_launches(chip) if x.kernel.__name__ == "list_kernel")
    kernel = triton.compile(launch.source(), target=CHIPS[chip].target, options=launch.options)
    ptx = kernel.asm["ptx"]
    # Triton 3.6 takes mma.sync here, later versions wgmma.
    assert re.search(r"(wgmma\.mma_async|mma\.sync).*s32\.s8\.s8", ptx)
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", ptx), "16 bytes per copy"


@pytest.mark.parametrize("chip", CHIPS)
def test_a_processor_holds_the_programs_that_the_table_counts_on(chip):
    limit = CHIPS[chip]
    device = Device(chip, limit.processors)
    programs = dict(
        list_kernel=select_launch(device, group=4, block_r=32, index_bytes=1, slots=1).programs,
        attend_kernel=attend_launch(device, group=4, block_d=128, bytes_each=2).programs,
    )
    for launch in (*select_launches(chip), *attend_launches(chip)):
        count = programs.get(launch.kernel.__name__, 0)
        needs = compiled_needs(launch, chip)
        threads = launch.options["num_warps"] * limit.target.warp_size
        reserved = 1024 if limit.target.backend == "cuda" else 0
        assert count * (needs.shared + reserved) <= limit.shared_bytes + reserved, needs
        assert count * threads * needs.registers <= limit.registers, needs


@pytest.mark.parametrize("case", [*SCORERS, *WEIGHED], ids=str)
def test_no_scorers_kernels_or_grids_change_as_a_cache_grows(case):
    seen = [select_launches("sm90", t=t, **case) for t in (2, 1000, 1001, 1003, 4096, 5000)]
    kernels = [[x.identity() for x in launches] for launches in seen]
    assert all(k == kernels[1] for k in kernels[2:])
    assert all([x.grid for x in launches] == [x.grid for x in seen[0]] for launches in seen)


@pytest.mark.parametrize("index", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("r", [32, 20])
def test_a_growing_cache_changes_neither_kernels_nor_grids(index, r):
    for b in (1, 3):
        seen = [
            select_launches("sm90", b=b, t=t, r=r, index=index, mask="bool")
            + attend_launches("sm90", b=b, t=t, mask="bool")
            + attend_launches("sm90", b=b, t=t, mask="bool", s=2, slots=0)
            + attend_launches("sm90", b=b, t=t, mask="bool", s=2, slots=0, ranges=True)
            for t in (1, 2, 1000, 1001, 1002, 1003, 4096, 5000)
        ]
        # T = 1 alone differs: a row of the index then has no stride to align.
        kernels = [[x.identity() for x in launches] for launches in seen]
        grids = [[x.grid for x in launches] for launches in seen]
        assert all(k == kernels[1] for k in kernels[1:])
        assert all(g == grids[0] for g in grids)


def test_grids_cover_the_device_once():
    for b, rows in ((1, 8), (8, 64), (64, 512)):
        chosen = {x.kernel.__name__: x.grid for x in select_launches("sm90", b=b)}
        assert chosen["prepare_kernel"] == chosen["choose_kernel"] == (rows,)
        programs = chosen["list_kernel"][0] * chosen["list_kernel"][1]
        assert 132 * 3 <= programs <= 132 * 4
        grid = attend_launches("sm90", b=b)[0].grid
        assert grid[0] == rows and 1 <= grid[1] <= 32
