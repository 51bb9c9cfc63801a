"""Compiles the CPU kernels, once per machine and user, with the compiler that Inductor uses.

A library serves one float type, as a model's tensors mostly have, or any: what is compiled for one
takes half the time. Each is built when it is first needed, or begun.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

_LOGGER = logging.getLogger("loki_compile")

FOLDER = Path(__file__).parent
_SOURCES = (
    "cpu_common.h", "cpu_lanes.h", "cpu_rows.h", "cpu_score.h", "cpu_topk.h",
    "cpu_select.cpp", "cpu_attend.cpp", "cpu_pages.cpp",
)  # fmt: skip
# Apple's clang knows no -march=native of its own processors; without it, it compiles for the first
# of them. It has OpenMP behind -Xclang.
_PROCESSOR = () if (sys.platform, platform.machine()) == ("darwin", "arm64") else ("-march=native",)
_OPENMP = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
# As in cpu_common.h: the codes of the float types.
CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_FLAGS = ("-O3", *_PROCESSOR, "-std=c++17", *_OPENMP, "-fPIC", "-fvisibility=hidden", "-w")
_SECONDS = 300

_one_at_a_time = threading.Lock()
_compilers: set[subprocess.Popen[bytes]] = set()
_ends = False  # the process does: what is started from now on is killed by who starts it


class KernelsUnavailable(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def load(only: torch.dtype | None = None) -> ctypes.CDLL:
    """The compiled kernels, from the cache where they are there; `only`: those of a float type.

    Raises KernelsUnavailable. Safe with several processes at once: each compiles to a file of its
    own and moves it into place.
    """
    if elsewhere := _elsewhere():
        raise KernelsUnavailable(elsewhere)
    try:
        return ctypes.CDLL(str(_built(only)))
    except OSError as error:
        raise KernelsUnavailable(_quoted(str(error))) from error


def _built(only: torch.dtype | None) -> Path:
    """The library; a build that has begun is waited for."""
    command = _command(only)
    library = _library(command)
    with _one_at_a_time:
        if not library.exists():
            _LOGGER.warning("compiling the CPU kernels, once on this machine: up to a minute")
            _compile(command, library)
    return library


def _command(only: torch.dtype | None) -> tuple[str, ...]:
    """The compiler and its flags. A type that the kernels do not know is served by those of any:
    theirs is to refuse it."""
    alone = [f"-DLOKI_ONLY={CODES[only]}"] if only in CODES else []
    return (_compiler(), *_FLAGS, *alone)


def _library(command: Sequence[str]) -> Path:
    sources = {name: (FOLDER / name).read_bytes() for name in _SOURCES}
    return _cache_folder() / f"{_key(sources, command)}.so"


@functools.cache
def begin(only: torch.dtype | None = None) -> None:
    """Builds what is not there yet in the background, lest the first step that needs it waits.

    What fails is left for `load` to find out, and to tell. A process that ends before the compiler
    has takes that with it.
    """
    if obstacle() or _library(_command(only)).exists():
        return

    def build() -> None:
        with contextlib.suppress(KernelsUnavailable, OSError):
            _built(only)

    thread = threading.Thread(target=build, name="loki_compile kernels", daemon=True)
    atexit.register(_give_up, thread)
    thread.start()


def _give_up(thread: threading.Thread) -> None:
    """Ends the compilers, and lets what waits for them clean up."""
    global _ends
    _ends = True
    for process in list(_compilers):
        process.kill()
    thread.join(timeout=5)


def _forget_the_parents() -> None:
    """In a forked child: the thread that builds, and would free the lock, is the parent's alone,
    and so are its compilers. What the child needs it builds itself."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()
    _compilers.clear()
    begin.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_the_parents)


def obstacle() -> str:
    """Why the kernels are not even tried to be compiled here, "" where they are."""
    if elsewhere := _elsewhere():
        return elsewhere
    try:
        _compiler()
    except KernelsUnavailable as error:
        return str(error)
    return ""


def _elsewhere() -> str:
    served = sys.platform == "darwin" or sys.platform.startswith("linux")
    return "" if served else f"they are built on Linux and macOS, this is {sys.platform}"


def _link() -> tuple[str, ...]:
    """As Inductor links its own kernels. OpenMP is in the process already, brought by torch: one
    thread pool serves both."""
    if sys.platform != "darwin":
        return ("-shared", "-lgomp")
    # Its name is @rpath/libomp.dylib: dyld takes the one that is loaded.
    libraries = Path(torch.__file__).parent / "lib"
    return ("-shared", f"-L{libraries}", "-lomp", f"-Wl,-rpath,{libraries}")


def _compiler() -> str:
    # Here and not above: importing Inductor takes a second that a GPU user need not spend.
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise KernelsUnavailable("no C++ compiler: install g++ or clang++, or set CXX") from error


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "loki_compile"


def _key(sources: dict[str, bytes], command: Sequence[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    parts = (*sources.values(), " ".join((*command, *_link())).encode(), version)
    digest = hashlib.sha256()
    for part in (*parts, _processor()):
        digest.update(part + b"\0")
    return digest.hexdigest()[:32]


def _processor() -> bytes:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    try:
        info = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0]
    except OSError:
        return platform.processor().encode()
    wanted = (b"flags", b"Features", b"model name", b"CPU part")
    return b"\n".join(line for line in info.splitlines() if line.startswith(wanted))


def _compile(command: Sequence[str], library: Path) -> None:
    """All units at once, then what links them; into place when it is whole."""
    library.parent.mkdir(parents=True, exist_ok=True)
    # No TemporaryDirectory: a forked child that ends would remove its parent's.
    folder = tempfile.mkdtemp(dir=library.parent)
    try:
        units = [FOLDER / name for name in _SOURCES if name.endswith(".cpp")]
        objects = [str(Path(folder) / f"{unit.stem}.o") for unit in units]
        made = str(Path(folder) / library.name)
        pairs = zip(units, objects, strict=True)
        _run([[*command, "-c", str(unit), "-o", to] for unit, to in pairs])
        _run([[*command, *objects, *_link(), "-o", made]])
        os.replace(made, library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(commands: Sequence[Sequence[str]]) -> None:
    """Runs commands beside each other, to the end of all or to the first that fails."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            running.append(process)
            _compilers.add(process)
            if _ends:  # `_give_up` may have looked before this one was there
                raise KernelsUnavailable("the process ends")
        for process in running:
            output, _ = process.communicate(timeout=_SECONDS)
            if process.returncode:
                said = _quoted(output.decode(errors="replace"))
                said = said or f"exit status {process.returncode}"
                raise KernelsUnavailable(f"{commands[0][0]} failed: {said}")
    except subprocess.TimeoutExpired as error:
        raise KernelsUnavailable(f"{commands[0][0]} took over {_SECONDS} s") from error
    finally:
        for process in running:
            process.kill()
            process.wait()
        _compilers.difference_update(running)


def _quoted(said: str) -> str:
    """One line of it: the first that tells of an error, else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = (line for line in lines if "error" in line.lower())
    return next(errors, lines[-1] if lines else "")[:500]
