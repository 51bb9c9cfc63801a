"""Everything worth running on a GPU, in one command and under eight minutes.

    python benchmarks/gpu_suite.py

In this order, each with its own share of the time: the tests on the device (kernels against the
reference, CUDA graphs without skips), the kernels against every dense path over lengths (from
which `min_context` is set), and whole-model decoding. A later step runs even if an earlier one
failed or ran out of time, except that nothing is timed when the kernels' tests are red. Results go
to benchmarks/results/, logs to --logs; the last lines are a short table: what the kernels must
show, and what they did. The package need not be installed: the checkout is made importable.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import RESULTS, ROOT, device_name, importable, table, version_of


@dataclass(frozen=True)
class Step:
    """One command: what to call it, its arguments for Python, and its limit in seconds."""

    name: str
    arguments: list[str]
    limit_s: int


def steps() -> list[Step]:
    # Most of the tests' time is compiling kernels, on the host.
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return [
        Step("kernel tests", [*pytest, *parallel, "tests/kernels/test_triton_kernels.py"], 150),
        Step("CUDA graph tests", [*pytest, "-m", "gpu", "tests/runtime/test_cuda_graphs.py"], 60),
        Step("kernels", ["benchmarks/bench_kernels.py", "--budget", "1.0"], 165),
        Step(
            "decode",
            [
                *("benchmarks/bench_decode.py", "--name", "decode_gpu", "--dtype", "bfloat16"),
                *("--context", "2048", "32768", "131072", "--top-k", "2048", "0.125"),
                *("--index-dtype", "int8", "--mode", "reduce-overhead"),
            ],
            95,
        ),
    ]


@dataclass(frozen=True)
class Goal:
    """At least `least` for a field of the row of `loki` at one shape."""

    batch: int
    tokens: int
    field: str
    least: float


GOALS = [
    Goal(8, 32768, "vs_fastest_dense", 3.0),
    Goal(8, 131072, "vs_fastest_dense", 8.0),
    Goal(1, 131072, "vs_fastest_dense", 3.0),
    Goal(8, 131072, "share_of_index_and_kv", 0.7),
]


def goal_rows(since: float) -> list[dict]:
    """What each goal asked for and got, from the rows written after `since` (seconds, UTC)."""
    path = RESULTS / "kernels_gpu.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    oldest = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(since))
    rows = [row for row in map(json.loads, lines) if row["time"] >= oldest]
    found = {(r["batch"], r["tokens"]): r for r in rows if r["stage"] == "loki"}
    return [
        {
            "batch": goal.batch,
            "tokens": goal.tokens,
            "what": goal.field,
            "at least": goal.least,
            "got": found.get((goal.batch, goal.tokens), {}).get(goal.field, "not measured"),
        }
        for goal in GOALS
    ]


def run(step: Step, logs: Path, env: dict[str, str]) -> tuple[str, float]:
    """Runs a step; returns its outcome in a word and the seconds it took."""
    start = time.perf_counter()
    log = logs / f"{step.name.replace(' ', '_')}.log"
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [sys.executable, *step.arguments],
                cwd=ROOT,
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=step.limit_s,
            )
            outcome = "ok" if done.returncode == 0 else f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"over {step.limit_s} s"
    print(f"--- {step.name}: {outcome}", *_tail(log), sep="\n", flush=True)
    return outcome, time.perf_counter() - start


def _tail(log: Path, lines: int = 40) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logs", type=Path, default=ROOT / "runs" / "gpu_suite")
    parser.add_argument("--copy-results", type=Path, help="also copy the result files here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("found no GPU that torch can use; this suite needs one. On a CPU run `make test`.")
        return 2
    args.logs.mkdir(parents=True, exist_ok=True)
    versions = {name: version_of(name) for name in ("torch", "triton", "transformers")}
    print(device_name(torch.device("cuda")), versions)
    start = time.time()
    rows: list[dict] = []
    with importable(ROOT) as env:
        env.pop("TRITON_INTERPRET", None)  # the device itself
        for step in steps():
            red = rows and rows[0]["outcome"] != "ok" and step.arguments[0] != "-m"
            outcome, seconds = (
                ("not run: kernel tests are red", 0.0) if red else run(step, args.logs, env)
            )
            rows.append({"step": step.name, "outcome": outcome, "seconds": round(seconds, 1)})
    if args.copy_results:
        args.copy_results.mkdir(parents=True, exist_ok=True)
        for result in RESULTS.glob("*gpu*"):
            shutil.copy(result, args.copy_results)
    print(table(rows, ["step", "outcome", "seconds"]))
    print(table(goal_rows(start), ["batch", "tokens", "what", "at least", "got"]))
    return int(any(row["outcome"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
