"""The first answer: seconds of the first `generate` calls of a process, with empty and warm caches.

    python benchmarks/bench_cold.py MODEL [--tokens 6000] [--new 64] [--dtype bfloat16]

Each way of decoding (eager, Inductor, loki) has a process of its own, and those that compile a
second one: the first finds an empty folder in the place of every cache on disk (Inductor's,
Triton's, our C++ kernels', the stored bases'), the second what the first left there. A process asks
the same prompt several times through `model.generate` with its default cache, so that a later call
is what an answer takes once all is compiled, and "longer" is what the first took longer than that.
Loading the model and importing is not counted. CPU time is that of the process and of all that it
started (compilers, Inductor's workers), and says more than the clock where others are busy.

Two goals are printed: what the first call of loki takes longer is at most a quarter of what
Inductor's takes longer; with warm caches it takes at most 15 s more than eager's whole call.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, stamp, table, write_rows

WAYS = ("eager", "inductor", "loki")
CALLS = 2
# Of Inductor's extra time that loki's may be, and seconds over eager's call with warm caches.
SHARE_OF_INDUCTOR, SECONDS_OVER_EAGER = 0.25, 15.0
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """CPU time of this process, of the children that ended, and of all that are alive below it."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + _of_the_living()


def _of_the_living() -> float:
    parents, seconds = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(entry.parent.name)
        parents[pid] = int(fields[1])
        seconds[pid] = sum(map(int, fields[11:15])) / _TICKS  # its own, and of those it waited for
    below, found = {os.getpid()}, True
    while found:
        found = {pid for pid, parent in parents.items() if parent in below} - below
        below |= found
    return sum(seconds[pid] for pid in below - {os.getpid()})


def child(args: argparse.Namespace) -> None:
    """What one process runs; the last line printed is the calls as JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    if args.text is None:
        chosen = torch.Generator().manual_seed(0)
        ids = torch.randint(10, model.config.vocab_size, (1, args.tokens), generator=chosen)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ids = tokenizer(args.text.read_text(), return_tensors="pt").input_ids[:, : args.tokens]
    ids = ids.to(args.device)
    if args.way != "eager":
        model.compile(backend=args.way)
    calls: list[dict[str, Any]] = []
    for _ in range(args.calls):
        cpu, wall = cpu_seconds(), time.perf_counter()
        out = model.generate(ids, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False)
        tokens = out[0, ids.shape[1] :].tolist()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        calls.append({"wall_s": wall, "cpu_s": cpu, "tokens": tokens})
        print(f"{args.way}: {wall:.1f} s, {cpu:.1f} s of CPU", file=sys.stderr, flush=True)
    print(json.dumps({"prompt": ids.shape[1], "calls": calls}))


def in_a_process(way: str, caches: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs `child` with the caches on disk below a folder."""
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "LOKI_HOME": str(caches / "loki"),
        "TMPDIR": str(caches),  # Inductor keeps its compiled headers there, whatever its cache is
    }
    command = [sys.executable, __file__, args.model, "--way", way, "--calls", str(args.calls)]
    command += ["--tokens", str(args.tokens), "--new", str(args.new), "--dtype", args.dtype]
    command += ["--device", args.device]
    if args.text is not None:
        command += ["--text", str(args.text)]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row_of(way: str, caches: str, found: dict[str, Any], expected: list[int]) -> dict[str, Any]:
    """A row: seconds of each call, and what the first took longer than the least later one."""
    walls, cpus = ([call[of] for call in found["calls"]] for of in ("wall_s", "cpu_s"))
    got = found["calls"][-1]["tokens"]
    pairs = zip(got, expected, strict=True)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(got))
    return {
        "way": way,
        "caches": caches,
        "first_s": walls[0],
        "later_s": min(walls[1:]),
        "longer_s": walls[0] - min(walls[1:]),
        "first_cpu_s": cpus[0],
        "later_cpu_s": min(cpus[1:]),
        "longer_cpu_s": cpus[0] - min(cpus[1:]),
        "calls_s": walls,
        "calls_cpu_s": cpus,
        "as_eager_until": same,  # greedy tokens; in bf16 a tie may go either way
    }


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The two goals and what was reached, by the clock and in CPU time."""
    by = {(row["way"], row["caches"]): row for row in rows}
    lines = []
    for unit, clock in (("_s", "on the clock"), ("_cpu_s", "in CPU time")):
        ours, theirs = (by[way, "empty"]["longer" + unit] for way in ("loki", "inductor"))
        over = by["loki", "warm"]["first" + unit] - by["eager", "empty"]["first" + unit]
        lines.append(
            f"{clock}: cold, loki takes {ours:.1f} s longer, Inductor {theirs:.1f}: "
            f"{ours / theirs:.2f} of it (goal {SHARE_OF_INDUCTOR}); with warm caches loki's first "
            f"call is {over:+.1f} s from eager's (goal {SECONDS_OVER_EAGER:+.0f})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder or hub id of a causal LM")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--text", type=Path, help="the prompt; without it, random tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--name", default="cold", help="file under benchmarks/results/")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.calls < 2:
        parser.error(f"--calls {args.calls}: needs at least 2, to tell the first from a later one")
    if args.way:
        child(args)
        return
    about = {
        "bench": "cold",
        "model": Path(args.model).name,
        "prompt_tokens": args.tokens,
        "new_tokens": args.new,
        "dtype": args.dtype,
        "load": os.getloadavg()[0],
        **stamp(args.device),
    }
    rows: list[dict[str, Any]] = []
    expected: list[int] = []
    for way in args.ways:
        with tempfile.TemporaryDirectory(prefix="loki_cold_") as folder:
            # Nothing of eager is kept on disk.
            for caches in ("empty",) if way == "eager" else ("empty", "warm"):
                found = in_a_process(way, Path(folder), args)
                expected = expected or found["calls"][-1]["tokens"]
                rows.append(row_of(way, caches, found, expected))
                written = write_rows(args.name, [{**about, **rows[-1]}])
    shown = [name for name in rows[0] if not name.startswith("calls")]
    print(table(rows, shown))
    if set(args.ways) == set(WAYS):
        print(*verdicts(rows), sep="\n")
    print("written to", written)


if __name__ == "__main__":
    main()
