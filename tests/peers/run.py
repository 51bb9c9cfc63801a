"""Runs other projects' tests with their decode steps compiled by `backend="loki"`.

    python tests/peers/run.py transformers CHECKOUT --python VENV/bin/python
    python tests/peers/run.py --report-only

CHECKOUT is a copy of the project's repository, VENV an environment that its tests run in and that
has loki_compile (tests/peers/README.md has both for each suite); nothing of theirs is kept here.
Every part of a suite runs once for each mode, in a process of its own: with sparse forced at full
budget (`sparse`) and at full budget (`identity`). The tests that fail are run with nothing compiled
(`nothing`) and through Dynamo alone (`dynamo`); with `--all` every test is. Finished tests are
lines of `runs/peers/*.jsonl`, and a second call continues. The table goes to
`benchmarks/results/peers.md`, the counts to `peers.jsonl` beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "peers"
RESULTS = ROOT / "benchmarks" / "results"

MODES = ("sparse", "identity", "nothing", "dynamo")
OURS = ("sparse", "identity")


@dataclass(frozen=True)
class Suite:
    """What to run of a project's tests, from the root of its checkout.

    parts: a name and the paths or node ids it stands for; each is a process of its own.
    decoders: whose calls are decode steps, see `through_loki.DECODERS`. select: pytest's flags.
    path: folders of the checkout to put on PYTHONPATH. packages: whose versions to state.
    """

    parts: dict[str, str]
    decoders: str
    select: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


# One architecture for each way to decode; another is `--parts tests/models/NAME`.
ARCHITECTURES = (
    "llama", "gpt2", "gemma3", "bart", "falcon", "gpt_oss", "bloom", "deepseek_v3", "mistral",
    "opt", "t5", "jamba", "qwen3_moe", "mpt", "gpt_bigcode", "diffllama", "gptj", "gemma2",
)  # fmt: skip

SUITES = {
    "transformers": Suite(
        {name: f"tests/models/{name}/test_modeling_{name}.py" for name in ARCHITECTURES},
        decoders="transformers",
        # Left out: sampling, output formats and embeddings decode as the greedy tests do; assisted
        # decoding asks for attention weights there, and then no site is sparse.
        select=(
            "-m",
            "generate",
            "-k",
            "not (sample or dict_output or without_input_ids or kwargs_forwards or export"
            " or continue_from_inputs_embeds or assisted_decoding_matches)",
        ),
        path=("src",),
        packages=("transformers",),
    ),
    "transformers-caches": Suite(
        {"caches": "tests/utils/test_cache_utils.py", "generation": "tests/generation"},
        decoders="transformers",
        path=("src",),
        packages=("transformers",),
    ),
    "x-transformers": Suite(
        {"decoding": "tests/test_x_transformers.py"},
        decoders="x_transformers",
        select=(
            "-k",
            "kv_cache or hybrid_cache or caching or continuous or prepend or beam_search or parity"
            " or prompts_given or looped or free or xm_latent or ttt_equivalency",
        ),
        path=(".",),
        packages=("x-transformers",),
    ),
    "litgpt": Suite(
        {
            name: f"tests/{name}"
            for name in (
                "generate/test_main.py",
                "test_generate_speculatively.py",
                "test_batch.py",
                "test_model.py",
                "test_multihead_latent_attention.py",
                "test_chat.py",
                "test_api.py",
            )
        },
        decoders="litgpt",
        select=("-k", "not against and not distributed"),
        packages=("litgpt", "transformers"),
    ),
    "kvpress": Suite(
        {
            name: f"tests/{name}"
            for name in (
                "test_attention_patch.py",
                "test_generate.py",
                "test_pipeline.py",
                "test_press_call.py",
                "test_per_layer_compression_press.py",
                "presses/test_head_compression.py",
                "presses/test_block_press.py",
                "presses/test_merging_press.py",
                "test_decoding_compression.py",
            )
        },
        decoders="transformers",
        select=("-k", "not all_presses"),
        path=(".",),
        packages=("kvpress", "transformers"),
    ),
}

# (suite, test id as a regular expression): why its outcome differs from that without us.
REASONS: dict[tuple[str, str], str] = {}

# ----------------------------------------------------------------------------------------- runs


def run(args: argparse.Namespace) -> None:
    """Runs what the record does not have yet."""
    suite = SUITES[args.suite]
    record = RUNS / f"{args.suite}.jsonl"
    RUNS.mkdir(parents=True, exist_ok=True)
    parts = {name: suite.parts.get(name, name) for name in args.parts} or suite.parts
    todo = [(mode, name) for name in parts for mode in MODES if mode in args.modes]
    facts = _facts(suite, args)
    for number, (mode, name) in enumerate(todo, 1):
        began = time.monotonic()
        code, lines = _run_part(args, suite, mode, name, parts[name], record, facts)
        counts = Counter(line["outcome"] for line in lines)
        said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "nothing left to run"
        sparse = sum(line.get("sparse_steps", 0) for line in lines)
        seconds = time.monotonic() - began
        print(
            f"[{number}/{len(todo)}] {args.suite} {name} {mode}: {said}; {sparse} sparse steps;"
            f" {seconds:.0f} s" + f" (pytest ended with {code})" * (code not in (0, 1, 5)),
            flush=True,
        )


def _run_part(
    args: argparse.Namespace,
    suite: Suite,
    mode: str,
    name: str,
    target: str,
    record: Path,
    facts: dict[str, str],
) -> tuple[int, list[dict[str, Any]]]:
    """Runs one part in one mode, again after a test that took the process down."""
    key = {"suite": args.suite, "part": name, "engine": args.engine}
    known = [line for line in read_record(record) if key.items() <= line.items()]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder, "lines.jsonl")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in known))
        wanted = Path(folder, "wanted")
        flags = []
        if mode not in OURS and not args.all:
            finished = {line["test"] for line in known if line["mode"] == mode}
            names = [test for test in _failing(known) if test not in finished]
            if not names:
                return 0, []
            wanted.write_text("\n".join(names))
            flags = ["--those-in", str(wanted)]
        path = os.pathsep.join([str(HERE), *(str(args.checkout / entry) for entry in suite.path)])
        interrupted = True
        try:
            for _ in range(20):
                before = len(fresh.read_text().splitlines())
                done = subprocess.run(
                    _command(args, suite, mode, fresh, [*flags, target]),
                    cwd=args.checkout,
                    env={**environment, "PYTHONPATH": path, "LOKI_HOME": folder},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                written = len(fresh.read_text().splitlines()) - before
                if done.returncode in (0, 1, 5) or not written:
                    break
            interrupted = False
        finally:
            lines = map(json.loads, fresh.read_text().splitlines()[len(known) :])
            kept = list({line["test"]: line for line in lines}.values())
            if interrupted and kept and kept[-1]["outcome"] == "died":
                kept.pop()  # by our hand
            with record.open("a") as out:
                for line in kept:
                    out.write(json.dumps({**key, **facts, **line}) + "\n")
    if done.returncode not in (0, 1, 5):
        print(done.stdout[-3000:], file=sys.stderr)
    return done.returncode, kept


def _command(
    args: argparse.Namespace, suite: Suite, mode: str, record: Path, rest: list[str]
) -> list[str]:
    return [
        str(args.python), "-m", "pytest", "-p", "through_loki", "-p", "no:cacheprovider", "-q",
        "--through", mode, "--engine", args.engine, "--decoders", suite.decoders,
        "--record", str(record), "--timeout", str(args.limit), "--timeout-method", "thread",
        "--rootdir", ".",
        *suite.select, *(["-k", args.only] if args.only else []), *rest,
    ]  # fmt: skip


def _facts(suite: Suite, args: argparse.Namespace) -> dict[str, str]:
    """Versions as the tests' own environment has them, the checkout's name, and our commit."""
    code = (
        "import importlib, sys\n"
        "from importlib.metadata import version\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name.replace('-', '_'))\n"
        "    found = getattr(module, '__version__', None)\n"
        "    if not found and module.__file__.startswith(sys.argv[1]): found = 'of the checkout'\n"
        "    print(name, found or version(name))\n"
    )
    path = os.pathsep.join(str(args.checkout / entry) for entry in suite.path or (".",))
    done = subprocess.run(
        [str(args.python), "-c", code, str(args.checkout), "torch", *suite.packages],
        cwd=args.checkout,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    versions = ", ".join(line for line in done.stdout.splitlines() if line)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {"versions": versions, "checkout": args.revision, "commit": commit}


def read_record(path: Path) -> list[dict[str, Any]]:
    """The record's lines, the last one of each test and mode."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    keys = ("suite", "part", "engine", "mode", "test")
    return list({tuple(line[key] for key in keys): line for line in lines}.values())


# ------------------------------------------------------------------------------------- the table


def _bad(outcome: str | None) -> bool:
    return outcome in ("failed", "died")


def _by_test(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    tests: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        tests.setdefault(line["test"], {})[line["mode"]] = line
    return tests


def _outcome(modes: dict[str, dict[str, Any]], mode: str) -> str | None:
    return modes[mode]["outcome"] if mode in modes else None


def _failing(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Tests that fail through us, in any mode."""
    return [
        test
        for test, modes in _by_test(lines).items()
        if any(_bad(_outcome(modes, mode)) for mode in OURS)
    ]


def count(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """One row of the table."""
    row = Counter[str]()
    for modes in _by_test(lines).values():
        for mode in OURS:
            outcome = _outcome(modes, mode)
            if outcome in ("passed", "skipped", "xfailed"):
                row[f"{mode}: {outcome}"] += 1
            elif outcome is not None and _bad(_outcome(modes, "nothing")):
                row[f"{mode}: failed without us"] += 1
            elif outcome is not None and _bad(_outcome(modes, "dynamo")):
                row[f"{mode}: failed through Dynamo alone"] += 1
            elif outcome is not None:
                row[f"{mode}: failed"] += 1
        line = modes.get("sparse", {})
        row["tests with compiled steps"] += bool(
            line.get("compiled_steps") or line.get("own_compiles")
        )
        row["tests with sparse steps"] += line.get("sparse_steps", 0) > 0
        row["sparse steps"] += line.get("sparse_steps", 0)
        row["tests that fell back"] += any("could not" in w for w in line.get("warnings", ()))
    return {name: row[name] for name in _COLUMNS}


_OUTCOMES = ("passed", "failed", "failed without us", "failed through Dynamo alone", "skipped",
             "xfailed")  # fmt: skip
_COLUMNS = (*(f"{mode}: {outcome}" for mode in OURS for outcome in _OUTCOMES),
            "tests with compiled steps", "tests with sparse steps", "sparse steps",
            "tests that fell back")  # fmt: skip

_HEAD = """# Other projects' tests, their decode steps compiled by `backend="loki"`

Written by `python tests/peers/run.py` on {date}; how to repeat it: tests/peers/README.md.

* **sparse**: `top_k=1.0, min_context=0`, so that every rewritten site takes the sparse ops and
  reads all keys. **identity**: `top_k=1.0`, where the dense variant runs. The tests' own assertions
  decide.
* **failed without us**: fails with nothing compiled (most ask a network for a model). **failed
  through Dynamo alone**: fails with `backend="eager"`. **failed** has neither.
* **sparse steps**: calls of rewritten graphs that ran sparse attention. **fell back**: a step of
  the test warned and ran dense.
* A test without a compiled step (prefill, training) passes as it would anyway. What is not listed
  has not been run.
"""


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The record as Markdown: counts by part, differences with their reasons, dense sites."""
    out = [_HEAD.format(date=datetime.date.today())]
    for suite in dict.fromkeys(line["suite"] for line in lines):
        of_suite = [line for line in lines if line["suite"] == suite]
        out.append(f"## {suite}\n")
        facts = Counter(
            (line["versions"], line["checkout"], line["engine"], line["commit"])
            for line in of_suite
        )
        for (versions, checkout, engine, commit), number in facts.most_common():
            out.append(
                f"{versions}; checkout {checkout}; engine {engine}; our commit {commit}:"
                f" {number} results.\n"
            )
        parts = list(dict.fromkeys(line["part"] for line in of_suite))
        counts = {p: count([line for line in of_suite if line["part"] == p]) for p in parts}
        counts["**all**"] = count(of_suite)
        ran = {f"{mode}: {outcome}" for mode in OURS for outcome in ("passed", "failed")}
        ran = {name for name in ran if any(name.startswith(line["mode"]) for line in of_suite)}
        shown = [c for c in _COLUMNS if c in ran or any(row[c] for row in counts.values())]
        rows = [[part, *(row[name] for name in shown)] for part, row in counts.items()]
        out.append(_markdown(["part", *shown], rows))
        if not counts["**all**"]["tests with sparse steps"]:
            out.append("Nothing became sparse in this suite.\n")
        out.append(_differences(suite, of_suite))
        out.append(_dense(of_suite))
    return "\n".join(out)


def _differences(suite: str, lines: Sequence[dict[str, Any]]) -> str:
    tests = _by_test(lines)
    rows = []
    for test in _failing(lines):
        modes = tests[test]
        if _bad(_outcome(modes, "nothing")):
            continue
        failed = [mode for mode in OURS if _bad(_outcome(modes, mode))]
        if _bad(_outcome(modes, "dynamo")):
            reason = "Dynamo alone fails too: " + modes["dynamo"].get("error", "it died")[:160]
        else:
            known = [
                why for (of, like), why in REASONS.items() if of == suite and re.search(like, test)
            ]
            reason = known[0] if known else "**no reason known: a bug**"
        rows.append([test, ", ".join(failed), modes[failed[0]].get("error", "")[:160], reason])
    if not rows:
        return "No test that passes without us fails through us.\n"
    return _markdown(["differs", "modes", "error", "reason"], rows)


def _dense(lines: Sequence[dict[str, Any]]) -> str:
    reasons, tests = Counter[str](), Counter[str]()
    for line in lines:
        if line["mode"] == "sparse":
            for reason, number in line.get("reasons", {}).items():
                reasons[re.sub(r"`[^`]*`", "`...`", reason)] += number
                tests[re.sub(r"`[^`]*`", "`...`", reason)] += 1
    rows = [[reason, number, tests[reason]] for reason, number in reasons.most_common()]
    if not rows:
        return "No attention site of a compiled step was dense.\n"
    return _markdown(["why sites of compiled steps were dense", "sites", "tests"], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def report() -> None:
    """Writes the table and the counts of everything in the record."""
    lines = [line for path in sorted(RUNS.glob("*.jsonl")) for line in read_record(path)]
    (RESULTS / "peers.md").write_text(table(lines))
    with (RESULTS / "peers.jsonl").open("w") as out:
        for key in dict.fromkeys((line["suite"], line["part"]) for line in lines):
            mine = [line for line in lines if (line["suite"], line["part"]) == key]
            facts = {name: mine[-1][name] for name in ("versions", "checkout", "engine", "commit")}
            out.write(json.dumps({"suite": key[0], "part": key[1], **facts, **count(mine)}) + "\n")
    print(f"wrote {RESULTS / 'peers.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("suite", nargs="?", choices=SUITES)
    parser.add_argument("checkout", nargs="?", type=Path, help="their repository's work tree")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of their tests")
    parser.add_argument("--parts", nargs="+", default=[], help="of the suite, or paths of tests")
    parser.add_argument("--only", help="in the place of the suite's `-k`")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--all", action="store_true", help="every test in every mode")
    parser.add_argument("--engine", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one test")
    parser.add_argument("--revision", default="?", help="the checkout's commit, for the record")
    parser.add_argument("--report-only", action="store_true", help="write the table, run nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended; a second call continues"))
    if not args.report_only:
        if args.suite is None or args.checkout is None:
            parser.error("needed a suite and the folder of its checkout, or --report-only")
        args.checkout = args.checkout.resolve()
        args.python = args.python.absolute()
        run(args)
    report()


if __name__ == "__main__":
    main()
