"""Compiles the CPU kernels, once per machine and user, with the compiler that Inductor uses."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

_LOGGER = logging.getLogger("loki_compile")

_FOLDER = Path(__file__).parent
_SOURCES = (
    "cpu_common.h", "cpu_rows.h", "cpu_score.h", "cpu_topk.h",
    "cpu_select.cpp", "cpu_attend.cpp", "cpu_pages.cpp",
)  # fmt: skip
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-w")
# As Inductor links its own kernels. libgomp is in the process already, brought by torch: one
# thread pool serves both.
_LINK = ("-shared", "-lgomp")
_SECONDS = 300


class KernelsUnavailable(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def load() -> ctypes.CDLL:
    """The compiled kernels, from the cache where they are there.

    Raises KernelsUnavailable. Safe with several processes at once: each compiles to a file of its
    own and moves it into place.
    """
    if not sys.platform.startswith("linux"):
        raise KernelsUnavailable(_only_on_linux())
    sources = {name: (_FOLDER / name).read_bytes() for name in _SOURCES}
    compiler = _compiler()
    library = _cache_folder() / f"{_key(sources, compiler)}.so"
    try:
        if not library.exists():
            _LOGGER.warning("compiling the CPU kernels, once on this machine: up to a minute")
            _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailable(str(error)) from error


def obstacle() -> str:
    """Why the kernels are not even tried to be compiled here, "" where they are."""
    if not sys.platform.startswith("linux"):
        return _only_on_linux()
    try:
        _compiler()
    except KernelsUnavailable as error:
        return str(error)
    return ""


def _only_on_linux() -> str:
    return f"they are built on Linux, this is {sys.platform}"


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


def _key(sources: dict[str, bytes], compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = (*sources.values(), " ".join(_FLAGS + _LINK).encode(), compiler.encode(), version)
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


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    units = [str(_FOLDER / name) for name in _SOURCES if name.endswith(".cpp")]
    command = [compiler, *_FLAGS, *units, *_LINK, "-o", made]
    try:
        subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SECONDS
        )
        os.replace(made, library)
    except subprocess.CalledProcessError as error:
        output = error.stdout.decode(errors="replace").strip()
        raise KernelsUnavailable(f"{compiler} failed: {output[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise KernelsUnavailable(f"{compiler} took over {_SECONDS} s") from error
    finally:
        Path(made).unlink(missing_ok=True)
