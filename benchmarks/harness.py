"""What every benchmark here shares: the gate, the clock, the stamp, the bandwidth, the rows.

    require(...)            refuse to time something that is not right
    measure({...})          interleaved timing of several callables: median, 20th, 80th percentile
    copy_bandwidth(device)  bytes per second, measured here and now; readers: to measure in turn
    stamp(device)           device, versions and commit, for each row
    write_rows(...)         JSON lines under benchmarks/results/
    checkout(rev)           another revision of this repository, importable by a subprocess

Times are in milliseconds, sizes in bytes. A CUDA time is the replay of a CUDA graph, so that it
holds no launch overhead of the host; `Timing.how` says where a callable could not be captured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over the rounds of one measurement."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    least_ms: float
    how: str  # "host clock", "CUDA graph" or "CUDA events"


class NotEqual(AssertionError):
    """A benchmarked callable gives a wrong result."""


# ---------------------------------------------------------------------------- correctness first


def require(name: str, got: torch.Tensor, truth: torch.Tensor, bound: float) -> float:
    """‖got − truth‖ / ‖truth‖ in fp64; raises NotEqual above `bound` or where it is not finite."""
    got, truth = got.double(), truth.double().to(got.device)
    error = float((got - truth).norm() / truth.norm().clamp_min(1e-300))
    if not error <= bound:
        raise NotEqual(f"{name}: relative error {error:.3e}, allowed {bound:.3e}; not timed.")
    return error


# ---------------------------------------------------------------------------------------- clock


def measure(
    variants: Mapping[str, Thunk | Sequence[Thunk]],
    device: torch.device | str,
    *,
    budget_s: float = 2.0,
    max_rounds: int = 200,
    min_rounds: int = 5,
) -> dict[str, Timing]:
    """Time several callables against each other, round by round, in one process.

    A variant is one callable, or a sequence of the same call over different inputs: these are run
    in turn, so that the inputs do not stay in a cache that a real step would find cold. Rounds are
    interleaved (each round times every variant once), so that a drift of the machine hits all
    alike. `budget_s` is for the rounds of all variants together, warm-up not counted.
    """
    device = torch.device(device)
    thunks = {n: [v] if callable(v) else list(v) for n, v in variants.items()}
    clock = _cuda_clock if device.type == "cuda" else _host_clock
    clocks = {name: clock(calls) for name, calls in thunks.items()}
    once = sum(c.sample() for c, _ in clocks.values()) * 1e-3
    rounds = max(min_rounds, min(max_rounds, int(budget_s / max(once, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, (clock_of, _) in clocks.items():
            samples[name].append(clock_of.sample() / clock_of.calls)
    return {name: _timing(samples[name], how) for name, (_, how) in clocks.items()}


@dataclass(frozen=True)
class _Clock:
    sample: Callable[[], float]  # milliseconds of one pass over all calls
    calls: int


def _timing(samples: list[float], how: str) -> Timing:
    ordered = sorted(samples)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return Timing(statistics.median(ordered), at(0.2), at(0.8), len(ordered), ordered[0], how)


def _host_clock(calls: list[Thunk]) -> tuple[_Clock, str]:
    for call in calls * 2:
        call()
    start = time.perf_counter()
    for call in calls:
        call()
    once = time.perf_counter() - start
    repeats = max(1, int(2e-3 / max(once, 1e-9)))  # a sample of 2 ms or more

    def sample() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            for call in calls:
                call()
        return (time.perf_counter() - begin) * 1e3

    return _Clock(sample, repeats * len(calls)), "host clock"


def _cuda_clock(calls: list[Thunk]) -> tuple[_Clock, str]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls * 2:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    passes = max(1, -(-8 // len(calls)))  # at least 8 calls between two events
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(passes):
                for call in calls:
                    call()
        run, how = graph.replay, "CUDA graph"
    except Exception:
        torch.cuda.synchronize()

        def run() -> None:
            for _ in range(passes):
                for call in calls:
                    call()

        how = "CUDA events"
    run()
    torch.cuda.synchronize()

    def sample() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return _Clock(sample, passes * len(calls)), how


# ------------------------------------------------------------------------------------ bandwidth


def readers(device: torch.device | str, size: int | None = None) -> dict[str, list[Thunk]]:
    """Reads of large buffers, to `measure` a bandwidth in turn with what uses it."""
    buffers = _large(torch.device(device), size, 2)
    return {
        "read": [lambda x=x: x.sum() for x in buffers],
        "read by dot": [lambda x=x: torch.dot(x, x) for x in buffers],
    }


def copy_bandwidth(device: torch.device | str, size: int | None = None) -> float:
    """Bytes per second of a large copy, counting bytes read plus bytes written."""
    source, target = _large(torch.device(device), size, 2)
    timing = measure({"copy": lambda: target.copy_(source)}, device, budget_s=0.5)["copy"]
    return 2 * source.nbytes / timing.median_ms * 1e3


def _large(device: torch.device, size: int | None, count: int) -> list[torch.Tensor]:
    size = size or (2**32 if device.type == "cuda" else 2**28)
    return [torch.randn(size // 4, device=device) for _ in range(count)]


def input_sets(bytes_read: int, device: torch.device | str) -> int:
    """How many input sets to rotate over, so that no call finds its input in the last cache."""
    device = torch.device(device)
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = _cpu_cache()
    return max(1, min(32, -(-3 * cache // max(bytes_read, 1))))


def _cpu_cache() -> int:
    try:
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        return max(int(s.read_text().strip().rstrip("K")) * 1024 for s in sizes)
    except (OSError, ValueError):
        return 32 * 2**20


# --------------------------------------------------------------------------------------- stamp


def stamp(device: torch.device | str) -> dict[str, Any]:
    """Device, versions, commit and time, for each row."""
    device = torch.device(device)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of the checkout, "+" after it where tracked files were changed; "" without git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return ""
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------- rows


def timing_fields(timing: Timing) -> dict[str, Any]:
    """The fields of a row that say how long it took."""
    return asdict(timing)


def traffic_fields(bytes_moved: int, median_ms: float, bandwidth: float) -> dict[str, float]:
    """Bytes a call must move, and its share of `bandwidth` (bytes/s, measured in the same run)."""
    floor_ms = bytes_moved / bandwidth * 1e3
    return {
        "bytes": bytes_moved,
        "floor_ms": floor_ms,
        "share_of_bandwidth": floor_ms / median_ms,
        "bandwidth_gb_s": bandwidth / 1e9,
    }


def write_rows(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> Path:
    """Append rows to benchmarks/results/<name>.jsonl; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, files by their names alone."""

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(each) for each in value]
        return Path(value).name if isinstance(value, str | Path) else value

    return {key: name(value) for key, value in vars(args).items()}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as text, one column per name; numbers with four significant digits."""
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells), 1) for i, c in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_lines(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> Path | None:
    """One picture, both axes logarithmic; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in series.items():
        axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return path


# --------------------------------------------------------------------------- another revision


@contextlib.contextmanager
def checkout(rev: str) -> Iterator[Path]:
    """A temporary git worktree of `rev`; yields its root, removed on exit."""
    if _git("rev-parse", "--verify", f"{rev}^{{commit}}") is None:
        raise ValueError(f"git revision {rev!r} is not known here; give a commit, branch or tag.")
    with tempfile.TemporaryDirectory(prefix="loki_compare_") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), rev],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


@contextlib.contextmanager
def importable(tree: Path) -> Iterator[dict[str, str]]:
    """Environment in which a subprocess imports `loki_compile` from `tree`, however installed.

    The rooms are mapped by pyproject.toml, so the tree alone is not importable: a folder of links
    stands in for the installed package, first on PYTHONPATH.
    """
    with tempfile.TemporaryDirectory(prefix="loki_import_") as folder:
        package = Path(folder) / "loki_compile"
        package.mkdir()
        for entry in (tree / "loki_compile").iterdir():
            (package / entry.name).symlink_to(entry)
        for room in ("passes", "kernels", "pca_store"):
            (package / room).symlink_to(tree / room)
        # PyTorch finds the backend by its entry point.
        info = Path(folder) / "loki_compile-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loki-compile\nVersion: 0\n")
        points = "[torch_dynamo_backends]\nloki = loki_compile.backend:loki\n"
        (info / "entry_points.txt").write_text(points)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        yield {**os.environ, "PYTHONPATH": path}


def run_python(arguments: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Output of this Python with `arguments`; raises with the end of stderr if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=env
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return done.stdout
