"""The CPU kernels on 64-bit ARM: by every compiler and emulator that are here, the reference's
results; the instructions that they are for; and that Apple's processors' compiler takes them.

The contract tests of test_cpu_kernels.py run there too, by the first of these ways: `make aarch64`.
"""

import importlib.util
import struct
import subprocess
import sys

import pytest
import torch
from loki_compile.kernels import cpu, cpu_build, reference
from loki_compile.kernels.ops import KEEP_ALL_Q16
from toy_emulator import PROCESSORS, build, compilers, emulated, emulators, runs, ways

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEATURES = {**PROCESSORS, "bytes": "+dotprod"}
# Instructions over 16 bytes: the bits that say which one it is, and what they are.
INSTRUCTIONS = {
    "fmla": [(0xFFE0FC00, 0x4E20CC00), (0xFFC0F400, 0x4F801000)],  # vectors, and one lane
    "smlal": [(0xBFE0FC00, 0x0E608000)],  # 16 bits to 32
    "sdot": [(0xFFE0FC00, 0x4E809400), (0xFFC0F400, 0x4F80E000)],
    "bfdot": [(0xFFE0FC00, 0x6E40FC00), (0xFFC0F400, 0x4F40F000)],
}
USED = {
    "neon": {"fmla", "smlal"},
    "bytes": {"fmla", "sdot"},
    "dots": {"fmla", "sdot", "bfdot"},
}


def ids(way):
    return "-".join(way)


# What skips, with the reason, where there is nothing to run.
WAYS = ways() or [None]


@pytest.fixture(params=WAYS, ids=lambda way: ids(way) if way else "none")
def way(request):
    return request.param


@pytest.fixture(params=FEATURES)
def kernels(request, way, monkeypatch):
    """loki_compile.kernels.cpu with emulated kernels."""
    features = FEATURES[request.param]
    if way and not runs(way[1], way[0], features):
        pytest.skip(f"{way[1]} does not run {features}")
    library = emulated(features, way)
    monkeypatch.setattr(cpu, "_kernels", lambda _: library)
    return cpu


@pytest.mark.parametrize("index_dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("group, r", [(1, 16), (3, 5), (8, 40)])
def test_select_is_the_references(kernels, index_dtype, group, r):
    # Small integers: every score is exact in fp32, and many are equal.
    b, hkv, s, t, d = 2, 2, 2, 301, 48
    q = torch.randint(-1, 2, (b, hkv * group, s, d)).float()
    basis = torch.eye(d)[:, :r].expand(hkv, d, r).contiguous()
    index = torch.randint(-2, 3, (b, hkv, t, r)).to(index_dtype)
    scale = torch.ones(b, hkv, t, 1) if index_dtype == torch.int8 else None
    inputs = (q, basis, index, scale, None, None)
    for k, per_head in ((1, True), (33, False), (200, True)):
        options = dict(scale=0.5, top_k=k, keep_q16=KEEP_ALL_Q16, sink=1, recent=3, min_keys=0)
        options["per_head"] = per_head
        found = kernels.select(*inputs, **options)
        assert torch.equal(found, reference.select(*inputs, **options)), (k, per_head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group, d, dv", [(1, 64, 64), (3, 80, 33), (8, 7, 130)])
@pytest.mark.parametrize("chosen", [True, False], ids=["attend", "attention"])
def test_attention_errs_at_most_twice_as_pytorch_does(kernels, dtype, group, d, dv, chosen):
    b, hkv, s, t = 2, 2, 3, 157
    q = torch.randn(b, hkv * group, s, d).to(dtype)
    k, v = (torch.randn(b, t, hkv, n).to(dtype).transpose(1, 2) for n in (d, dv))
    positions = None
    if chosen:
        positions = torch.rand(b, hkv, s, t).argsort(-1)[..., :41].sort(-1).values.int()
    found = kernels.attend(q, k, v, positions, None, scale=0.2)
    exact, theirs = (attention(*(x.to(dt) for x in (q, k, v)), positions, 0.2) for dt in (
        torch.float64, dtype,
    ))  # fmt: skip
    error, allowed = (found - exact).abs().max(), (theirs - exact).abs().max()
    assert found.dtype == dtype and error <= 2 * allowed + 1e-6


def attention(q, k, v, positions, scale):
    """PyTorch's attention, over the positions where there are some."""
    group = q.shape[1] // k.shape[1]
    seen = None
    if positions is not None:
        seen = torch.zeros(*positions.shape[:3], k.shape[2], dtype=torch.bool)
        seen = seen.scatter(-1, positions.long(), True).repeat_interleave(group, 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale)


@pytest.mark.parametrize("processor", FEATURES)
@pytest.mark.parametrize("compiler", list(compilers()) or [None])
def test_the_kernels_are_made_of_the_processors_products(compiler, processor, tmp_path):
    if compiler is None:
        pytest.skip("no compiler for 64-bit ARM: pip install ziglang")
    program = build(compiler, FEATURES[processor], tmp_path).read_bytes()
    words = struct.unpack(f"<{len(program) // 4}I", program[: len(program) // 4 * 4])
    found = dict.fromkeys(INSTRUCTIONS, 0)
    for word in words:
        for name, forms in INSTRUCTIONS.items():
            found[name] += any(word & mask == value for mask, value in forms)
    print(compiler, processor, found)
    # 100: other bytes of the program look like one of them by chance.
    assert {name for name, count in found.items() if count >= 100} == USED[processor]


def test_all_ways_give_the_same(monkeypatch):
    """Two emulators of one program, to the bit."""
    both = [("clang", emulator) for emulator in emulators() if ("clang", emulator) in ways()]
    if len(both) < 2:
        pytest.skip("needs ziglang, unicorn and qemu-user")
    q, k, v = torch.randn(1, 6, 2, 72), torch.randn(1, 2, 333, 72), torch.randn(1, 2, 333, 40)
    outputs = []
    for way in both:
        library = emulated("", way)
        monkeypatch.setattr(cpu, "_kernels", lambda _, library=library: library)
        outputs.append(cpu.attend(q, k, v, None, None, scale=0.1, softcap=3.0))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos"])
@pytest.mark.parametrize("unit", [x for x in cpu_build._SOURCES if x.endswith(".cpp")])
def test_the_kernels_compile_for_macos(target, unit, tmp_path):
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("no compiler for macOS: pip install ziglang")
    flags = [f for f in cpu_build._FLAGS if not f.startswith(("-march", "-fopenmp", "-O3"))]
    flags += ["-O1", "-Xclang", "-fopenmp"]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags]
    command += ["-c", str(cpu_build.FOLDER / unit), "-o", str(tmp_path / "unit.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
