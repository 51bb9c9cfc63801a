"""The CPU kernels, compiled for a 64-bit ARM processor and run by an emulator.

`Emulated` stands in for the library that `loki_compile.kernels.cpu` calls. A call's tensors are
copied to the emulated program and back; what it writes beside its results is an error.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.util
import itertools
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from loki_compile.kernels import cpu_build

PROGRAM = Path(__file__).parent / "emulated_kernels.cpp"
# What a processor has beside plain NEON: nothing; products of bytes and of bf16.
PROCESSORS = {"neon": "", "dots": "+dotprod+bf16"}
# As in kernels/cpu.py: words of a tensor, its dtypes.
_VIEW = 10
_BYTES = {0: 2, 1: 2, 2: 4, 3: 1, 4: 1}
_NONE = 5
_GAP = 256  # bytes between tensors


def compilers() -> dict[str, list[str]]:
    """Cross-compilers that are here, by name: g++ with threads, zig's clang without."""
    found = {}
    if path := shutil.which("aarch64-linux-gnu-g++"):
        found["g++"] = [path, "-fopenmp"]
    if importlib.util.find_spec("ziglang"):
        zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
        found["clang"] = [*zig, "-fopenmp-simd", "-fno-exceptions"]
    return found


def emulators() -> dict[str, list[str]]:
    """Emulators that are here, by name; `runs` says what they run."""
    found = {}
    if path := shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static"):
        found["qemu"] = [path, "-cpu", "max"]
    if importlib.util.find_spec("unicorn"):
        found["unicorn"] = [sys.executable, str(Path(__file__).parent / "toy_unicorn.py")]
    return found


def runs(emulator: str, compiler: str, features: str) -> bool:
    """Unicorn's processor does not multiply bf16, and its programs have one thread."""
    return emulator == "qemu" or ("bf16" not in features and compiler == "clang")


def build(compiler: str, features: str, folder: Path) -> Path:
    """The program for a processor with such features, compiled by the flags of users' kernels."""
    program = folder / f"{compiler}{features}"
    other = ("-march", "-fopenmp", "-fPIC", "-fvisibility")
    flags = [flag for flag in cpu_build._FLAGS if not flag.startswith(other)]
    if compiler == "clang":
        flags.append(f"-mcpu=generic{features}")
    else:
        flags.append(f"-march=armv8.2-a{features}")
    units = [cpu_build.FOLDER / x for x in cpu_build._SOURCES if x.endswith(".cpp")]
    objects = [f"{program}-{unit.stem}.o" for unit in (*units, PROGRAM)]
    command = compilers()[compiler]
    for unit, made in zip((*units, PROGRAM), objects, strict=True):
        _run([*command, *flags, "-c", str(unit), "-o", made])
    # The kernels need headers of a C++ library alone; zig would build a whole one, for minutes.
    link = ["cc" if part == "c++" else part for part in command]
    _run([*link, "-static", *objects, "-o", str(program)])
    return program


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@functools.cache
def ways() -> list[tuple[str, str]]:
    """Pairs of a compiler and an emulator for what it makes."""
    return [
        pair for pair in itertools.product(compilers(), emulators()) if runs(pair[1], pair[0], "")
    ]


@functools.cache
def emulated(features: str, way: tuple[str, str] | None = None) -> Emulated:
    """The kernels for a processor with such features, by the first way that there is; the test is
    skipped where there is none."""
    able = [w for w in ([way] if way else ways()) if runs(w[1], w[0], features)]
    if not able:
        pytest.skip(
            "64-bit ARM: found no compiler with an emulator; needed ziglang and unicorn (`make "
            "aarch64`), or g++-aarch64-linux-gnu and qemu-user; products of bf16 need qemu-user"
        )
    compiler, emulator = able[0]
    folder = tempfile.TemporaryDirectory()
    library = Emulated(emulator, build(compiler, features, Path(folder.name)))
    atexit.register(folder.cleanup)
    atexit.register(library.close)
    return library


class Emulated:
    """The library's functions, run by a program that waits for calls."""

    def __init__(self, emulator: str, program: Path) -> None:
        command = [*emulators()[emulator], str(program)]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        self._program.kill()
        self._program.wait()

    def loki_select(self, block: bytes) -> int:
        words = struct.unpack(f"{len(block) // 8}q", block)
        views = 6 * _VIEW
        batch, heads, tokens = words[2], words[3], words[4]
        slots, per_head = words[views + 1], words[views + 7]
        rows = batch * (heads if per_head else words[2 * _VIEW + 3]) * tokens
        results = {views: 4 * rows * slots, views + 12: 8 * rows}
        return self._call(0, words, 6, results)

    def loki_attend(self, block: bytes) -> int:
        words = struct.unpack(f"{len(block) // 8}q", block)
        batch, heads, tokens, dims = *words[2:5], words[3 * _VIEW + 5]
        size = batch * heads * tokens * dims * _BYTES[words[1]]
        return self._call(1, words, 8, {8 * _VIEW: size})

    def loki_update_pages(self, block: bytes) -> int:
        words = struct.unpack(f"{len(block) // 8}q", block)
        return self._call(2, words, 3, {0: _bytes_of(words[:_VIEW])})

    def _call(
        self, kernel: int, words: tuple[int, ...], views: int, results: dict[int, int]
    ) -> int:
        """results: the words that are addresses of what is written, and how many bytes that is."""
        spans = {at: _bytes_of(words[at : at + _VIEW]) for at in range(0, views * _VIEW, _VIEW)}
        spans |= results
        spans = {at: size for at, size in spans.items() if words[at] and size}
        memory, place = bytearray(b"\xff" * _GAP), {}
        for start, stop in _runs((words[at], words[at] + size) for at, size in spans.items()):
            memory += b"\xff" * ((start - len(memory)) % 64)  # aligned as it is here
            place[start, stop] = len(memory)
            memory += ctypes.string_at(start, stop - start) + b"\xff" * _GAP
        moved = list(words)
        for at in spans:
            run = next(r for r in place if r[0] <= words[at] < r[1])
            moved[at] = place[run] + words[at] - run[0]
        header = struct.pack("4q", kernel, len(spans), len(words), len(memory))
        call = struct.pack(f"{len(spans) + len(words)}q", *spans, *moved)
        self._program.stdin.write(header + call + memory)
        self._program.stdin.flush()
        answer = self._program.stdout.read(8 + len(memory))
        assert len(answer) == 8 + len(memory), f"the program ended: {self._program.poll()}"
        after = bytearray(answer[8:])
        for at in results:
            if at not in spans:
                continue
            written = slice(moved[at], moved[at] + spans[at])
            ctypes.memmove(words[at], bytes(after[written]), spans[at])
            memory[written] = after[written]
        assert after == memory, "something else than the results was written"
        return struct.unpack("q", answer[:8])[0]


def _bytes_of(view: tuple[int, ...]) -> int:
    """Bytes from a tensor's first element to behind its last."""
    if view[1] == _NONE or 0 in view[2:6]:
        return 0
    last = sum((size - 1) * step for size, step in zip(view[2:6], view[6:10], strict=True))
    return (last + 1) * _BYTES[view[1]]


def _runs(spans):
    """Spans [start, stop), those that overlap as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
