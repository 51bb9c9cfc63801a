"""`docs/quality.md`: what ways to choose keys lose on a real model, measured and written here.

    python benchmarks/quality.py MODEL --out FOLDER            measure, go on with, and write
    python benchmarks/quality.py MODEL --out FOLDER --render   write from what is measured already
         [--only text tasks questions ranks lengths]

MODEL is a transformers folder, FOLDER where bases, texts and results are kept: a run that is
stopped goes on when it is started again, and its rows are copied to results/quality.jsonl. Each
part is a `loki eval` of its own (`PARTS`), whose graphs run node by node. What was not measured
stands in the page as such.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, stamp

from loki_compile.commands.evaluate import label_of
from loki_compile.commands.reference_data import RECALL_KEYS, RECALL_VALUES, stdlib_text
from loki_compile.commands.score_pictures import draw_depths, draw_quality
from loki_compile.commands.scores import RECORDS, summary
from loki_compile.commands.trials import DENSE, Row

PAGE = ROOT / "docs" / "quality.md"
PICTURES = ROOT / "docs"
LICENCE = Path("/usr/share/common-licenses/GPL-3")
STEPS = 16
TEXTS = ("licence", "code", "recall")
CALIBRATED = {
    "calibrated": ("--kind", "score-optimal"),
    "pca": ("--kind", "pca", "--tokens", "12288"),
}
BUDGETS: tuple[Any, ...] = (0.125, 128)


def settings(budgets: Sequence[Any], names: Sequence[str], rank: int = 16) -> list[dict[str, Any]]:
    """Each named way at each budget: a policy, or a basis of "loki"."""
    made = []
    for top_k in budgets:
        for name in names:
            if name in ("auto", *CALIBRATED):
                made.append({"policy": "loki", "top_k": top_k, "rank": rank, "basis": name})
            elif name == "tidal":
                made.append({"policy": name, "top_k": top_k, "rank": rank})
            else:
                made.append({"policy": name, "top_k": top_k})
    return made


EVERY = ("auto", "calibrated", "oracle", "quest", "window", "tidal")
MAIN = [*settings(BUDGETS, EVERY), *settings((512,), ("auto", "oracle"))]
PAPER = settings(BUDGETS, ("pca",))
LARGE = settings((64, 256, 512, 1024), EVERY)
RANKS = [
    *settings(BUDGETS, ("auto", "calibrated"), 8),
    *settings(BUDGETS, ("auto", "calibrated"), 32),
]
ASKED = [*settings((128,), EVERY), *settings((0.125,), ("auto",))]
CONTEXT = 2048
TEXT = ("--task", "text", "--context", str(CONTEXT), "--pieces", "1", "--steps", str(STEPS))
HIDDEN = ("single", "multi-key", "multi-value", "multi-query", "tracking", "common", "frequent")
NEEDLES = ("--task", "passkey", *(word for task in HIDDEN for word in ("--task", task)))
# What is measured, most wanted first: arguments of `loki eval`, and the settings.
PARTS: dict[str, tuple[tuple[str, ...], list[dict[str, Any]]]] = {
    "text": (TEXT, MAIN),
    "tasks": ((*NEEDLES, "--context", str(CONTEXT), "--seeds", "2", "--depths", "3"), ASKED),
    "ranks": (TEXT, [*PAPER, *RANKS, *LARGE]),
    "questions": ((*NEEDLES, "--context", str(CONTEXT), "--seeds", "2", "--depths", "3",
                   "--question", "dense"), ASKED),
    "lengths": (
        ("--task", "passkey", "--context", "4096", "--context", "6144", "--seeds", "1",
         "--depths", "3"),
        settings((128,), EVERY),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to keep all in")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not args.render:
        args.out.mkdir(parents=True, exist_ok=True)
        for part in args.only:
            for name in CALIBRATED:
                if any(setting.get("basis") == name for setting in PARTS[part][1]):
                    calibrate(args.model, args.out, name)
            evaluate(args.model, args.out, part)
    render(args.model, args.out)


def run_loki(out: Path, words: Sequence[str]) -> None:
    """A command of `loki` that finds no basis that another run has stored."""
    environment = {**os.environ, "LOKI_HOME": str(out / "home")}
    command = [sys.executable, "-m", "loki_compile.commands.main", *words]
    if subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"loki {' '.join(words)} failed; what is measured is kept in {out}")


def basis_file(out: Path, name: str) -> Path:
    return out / "bases" / f"{name}.safetensors"


def calibrate(model: Path, out: Path, name: str) -> None:
    """A basis of each kind, from text that is none of those measured."""
    file = basis_file(out, name)
    if file.exists():
        return
    folder = out / f"fitting-{name}"
    run_loki(out, ["calibrate", str(model), *CALIBRATED[name], "--out", str(folder)])
    (fitted,) = folder.glob("*.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(fitted, file)


def texts(model: Path, out: Path) -> list[Path]:
    """The licence, code that no basis was fitted to, and facts among code that are asked again: of
    a piece of text the last `STEPS` tokens are measured."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    made = [out / f"{name}.txt" for name in TEXTS]
    made[0].write_text(LICENCE.read_text())
    code = stdlib_text("held_out")[:200_000]
    made[1].write_text(code)
    rng = random.Random(7)
    keys, values = rng.sample(RECALL_KEYS, 32), rng.sample(RECALL_VALUES, 32)
    facts = [f"# {key} {value}" for key, value in zip(keys, values, strict=True)]
    asked = "\n".join(rng.sample(facts, len(facts)))
    length = CONTEXT
    lines = code[30_000:].splitlines()
    low, high = 0, 2000
    while high - low > 1:
        middle = (low + high) // 2
        read = len(tokenizer(among(lines[:middle], facts) + "\n" + asked).input_ids)
        low, high = (middle, high) if read <= length else (low, middle)
    # The questions end where the piece does, or a line of code behind.
    made[2].write_text(among(lines[:low], facts) + "\n" + asked + "\n" + asked)
    return made


def among(lines: Sequence[str], facts: Sequence[str]) -> str:
    """Facts at even distances among lines."""
    out = list(lines)
    for number in reversed(range(len(facts))):
        out.insert(number * len(lines) // len(facts), facts[number])
    return "\n".join(out)


def words_of(setting: dict[str, Any], out: Path) -> str:
    basis = setting.get("basis")
    if basis in CALIBRATED:
        setting = {**setting, "basis": basis_file(out, str(basis))}
    return ",".join(f"{name}={value}" for name, value in setting.items())


def evaluate(model: Path, out: Path, part: str) -> None:
    arguments, chosen = PARTS[part]
    words = ["eval", str(model), *arguments, "--engine", "nodes", "--out", str(out / "results")]
    for file in texts(model, out):
        words += ["--text", str(file)]
    for setting in chosen:
        words += ["--setting", words_of(setting, out)]
    run_loki(out, words)


# ------------------------------------------------------------------------------------- the page

NOT_YET = "not measured yet"


def measured(out: Path) -> list[Row]:
    file = out / "results" / RECORDS
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    return [json.loads(line) for line in lines[1:-1]]


def label(setting: dict[str, Any]) -> str:
    """As `loki eval` calls it; a basis is called by its file's name."""
    options = {name: value for name, value in setting.items() if name != "basis"}
    if setting.get("basis") in CALIBRATED:
        options["basis"] = f"{setting['basis']}.safetensors"
    return label_of(options)


def line_of(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def table_of(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(map(line_of, (titles, ["---"] * len(titles), *lines))) + "\n"


def mean_of(rows: Sequence[Row], name: str, digits: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    return format(statistics.fmean(values), digits) if values else NOT_YET


def text_table(rows: Sequence[Row], chosen: Sequence[dict[str, Any]]) -> str:
    titles = ["setting", *(f"missed, {name}" for name in TEXTS)]
    of_text = [row for row in rows if row["task"].startswith("text ")]
    dense = {row["case"]: row for row in of_text if row["setting"] == DENSE}
    names = [DENSE, *map(label, chosen)]
    common = set(dense).intersection(
        *({r["case"] for r in of_text if r["setting"] == name} for name in names)
    )
    over = sorted(dense[case]["task"].removeprefix("text ")[:-4] for case in common)
    scored = sum(dense[case]["tokens"] for case in common)
    titles += ["KL", "same token", f"perplexity of {scored} tokens", "keys", "bytes", "ms"]
    lines = []
    for name in names:
        mine = [row for row in of_text if row["setting"] == name]
        each = [[r for r in mine if r["task"] == f"text {text}.txt"] for text in TEXTS]
        whole = [row for row in mine if row["case"] in common]
        change = NOT_YET
        if whole:
            nats = [row["nats"] - dense[row["case"]]["nats"] for row in whole]
            change = f"{math.expm1(statistics.fmean(nats)):+.2%}"
        share = [r["bytes"] / r["dense_bytes"] for r in whole if "bytes" in r]
        lines.append(
            [
                name,
                *("0" if name == DENSE else mean_of(rows, "missed", ".3f") for rows in each),
                mean_of(whole, "kl", ".4f"),
                mean_of(whole, "same", ".1%"),
                change,
                "all" if name == DENSE else mean_of(whole, "keys", ".0f"),
                "100%" if name == DENSE else f"{statistics.fmean(share):.1%}" if share else NOT_YET,
                mean_of(whole, "step_ms", ".0f"),
            ]
        )
    of = ", ".join(over) or f"{NOT_YET}"
    said = f"All columns behind the missed mass are of the texts that every setting has: {of}."
    return f"{said}\n\n" + table_of(titles, lines)


def grid_table(rows: Sequence[Row]) -> str:
    """Missed mass, the mean of the texts, by budget and by rank."""
    budgets = (64, 128, 256, 512, 1024, 0.125)
    ways: list[tuple[str, int]] = [(name, 16) for name in (*EVERY, "pca")]
    ways += [(name, rank) for rank in (8, 32) for name in ("auto", "calibrated")]
    lines = []
    for name, rank in ways:
        cells = [name if name not in ("auto", *CALIBRATED) else f"loki, {name}, R = {rank}"]
        for top_k in budgets:
            share = missed_of(rows, top_k, name, rank)
            planned = settings((top_k,), (name,), rank)[0] in [*MAIN, *PAPER, *LARGE, *RANKS]
            none = NOT_YET if planned else "not planned"
            cells.append(none if share is None else f"{share:.3f}")
        lines.append(cells)
    return table_of(["way", *(str(b) if b != 0.125 else "12.5 %" for b in budgets)], lines)


def task_table(
    rows: Sequence[Row],
    chosen: Sequence[dict[str, Any]],
    lengths: set[int],
    question: str = "sparse",
) -> str:
    """Over the prompts that every setting has answered."""
    names = [DENSE, *map(label, chosen)]
    mine = [r for r in rows if r["protocol"] == question and r["length"] in lengths]
    found = whole_cases(mine, names[1:])
    if not found:
        return f"{NOT_YET.capitalize()}.\n\n"
    tasks = [name for name in ("passkey", *HIDDEN) if name in found[0][question]["tasks"]]
    missing = [name for name in ("passkey", *HIDDEN) if name not in tasks]
    lines = []
    for row in found:
        of = row[question]
        low, high = of["interval"]
        lines.append(
            [
                row["setting"],
                f"{of['score']:.1%} ({low:.0%} to {high:.0%})",
                f"+{of['better']} -{of['worse']}",
                *(f"{of['tasks'][task]:.0%}" for task in tasks),
                f"{of['same']:.0%}",
                f"{of['generated']:.1f}",
            ]
        )
    titles = ["setting", "score", "prompts against dense", *tasks, "same tokens", "length"]
    count = f"{found[0][question]['prompts']} prompts that every setting has answered"
    if missing and len(lengths) == 1:
        count += f"; {NOT_YET}: {', '.join(missing)}"
    return f"{count}.\n\n" + table_of(titles, lines) + against_oracle(mine, names)


def against_oracle(rows: Sequence[Row], names: Sequence[str]) -> str:
    """How many of the answers of exact ranking at its budget each setting gives too."""
    (exact,) = (name for name in names if name.startswith("oracle"))
    scores: dict[str, dict[str, float]] = {name: {} for name in names}
    for row in rows:
        if row["setting"] in scores:
            scores[row["setting"]][row["case"]] = row["score"]
    whole = set.intersection(*(set(of) for of in scores.values()))
    found = [case for case in whole if scores[exact][case] == 1]
    shares = [
        f"{name}: {sum(scores[name][case] == 1 for case in found)}"
        for name in names
        if name not in (DENSE, exact)
    ]
    return f"Of {len(found)} prompts that {exact} answers in full: {'; '.join(shares)}.\n\n"


def ratios(rows: Sequence[Row]) -> str:
    """What the automatic basis misses against the calibrated one and against exact ranking."""
    against = {
        "calibrated": "the calibrated basis misses",
        "pca": "the paper's PCA, calibrated, misses",
        "oracle": "exact ranking misses",
    }
    sentences = []
    for top_k in BUDGETS:
        shown = f"{top_k:.1%}" if isinstance(top_k, float) else f"{top_k} keys"
        auto, words = missed_of(rows, top_k, "auto"), []
        for name, what in against.items():
            other = missed_of(rows, top_k, name)
            if auto is None or other is None:
                words.append(f"{NOT_YET} against what {what}")
            else:
                words.append(f"{auto / other:.2f} times what {what}")
        if auto is None:
            words = [f"{NOT_YET} on all texts"]
        sentences.append(f"At {shown} and R = 16 the automatic basis misses {', '.join(words)}.")
    return "\n".join(sentences) + "\n\n"


def missed_of(rows: Sequence[Row], top_k: Any, name: str, rank: int = 16) -> float | None:
    """The mean of the texts; None where it was not measured on all of them."""
    (setting,) = settings((top_k,), (name,), rank)
    mine = [row for row in rows if row["setting"] == label(setting) and "missed" in row]
    by_text = {row["task"]: row["missed"] for row in mine}
    shares = [by_text.get(f"text {text}.txt") for text in TEXTS]
    return None if None in shares else statistics.fmean(share for share in shares if share)


def render(model: Path, out: Path) -> None:
    """Writes the page and its pictures from what is there."""
    rows = measured(out)
    about = stamp("cpu")
    parts = [
        INTRODUCTION.format(model=model.name, torch=about["torch"], day=about["time"][:10]),
        "## Text\n\n",
        f"One piece of {CONTEXT} tokens of each text, of which the last {STEPS} are decoded: few,\n"
        "which tell ways apart by missed mass and KL, hardly by perplexity.\n\n",
        text_table(rows, MAIN),
        ratios(rows),
        "Missed mass by budget and rank, the mean of the three texts:\n\n",
        grid_table(rows),
        f"## Tasks\n\n{CONTEXT} tokens. ",
        task_table(rows, ASKED, {CONTEXT}),
        "The same with the question read in the dense prefill. ",
        task_table(rows, ASKED, {CONTEXT}, "dense"),
        "The pass key alone, 4096 and 6144 tokens. ",
        task_table(rows, PARTS["lengths"][1], {4096, 6144}),
    ]
    parts += pictures(rows)
    parts.append(LAST)
    PAGE.write_text("".join(parts))
    if rows:
        shutil.copy(out / "results" / RECORDS, RESULTS / "quality.jsonl")
    print(f"wrote {PAGE}")


def pictures(rows: Sequence[Row]) -> list[str]:
    """Draws those that there is something to show in, and gives the lines that show them."""
    lines = []
    text = [row for row in rows if row["task"].startswith("text ")]
    known = {label(s): label({**s, "top_k": 0.125}).replace(", 0.125", "") for s in MAIN}
    if draw_quality(whole_cases(text, list(known)), known, PICTURES / "quality.png"):
        lines.append("![quality against bytes and time, on text](quality.png)\n\n")
    asked = list(map(label, ASKED))
    keys = [row for row in rows if row["task"] == "passkey" and row["protocol"] == "sparse"]
    keys = [row for row in keys if row["setting"] in (DENSE, *asked)]
    if draw_depths(keys, asked, PICTURES / "quality_depths.png"):
        lines.append("![pass key by depth and length](quality_depths.png)\n\n")
    return lines


def whole_cases(rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """The summary over the cases that dense and all of these settings have."""
    mine = [row for row in rows if row["setting"] in (DENSE, *labels)]
    by_case: dict[tuple[str, str], set[str]] = {}
    for row in mine:
        by_case.setdefault((row["case"], row["protocol"]), set()).add(row["setting"])
    whole = {at for at, of in by_case.items() if of == {DENSE, *labels}}
    return summary([row for row in mine if (row["case"], row["protocol"]) in whole], labels)


INTRODUCTION = """\
# Quality of decoding on a real model

{model} (SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads x 64; weights of its 4-bit file,
in fp32), torch {torch}, {day}, one CPU thread. All of it was decoded through the compiled decode
path, graphs run node by node (`--engine nodes`: the graphs and kernels that Inductor gets, so that
times compare rows alone), with static caches whose contexts were prefilled once, dense. Made by one
command, which goes on where it was stopped; what it had no time for says so:

    python benchmarks/quality.py MODEL --out FOLDER

*Missed* is the share of attention on keys that were not chosen, the mean over layers, heads and the
first 8 decoded tokens. *KL* and *same token* are against dense attention on the same text,
*perplexity* is the change. *Bytes* are those of keys, values and index that a step reads, against
dense. *ms*: CPU time of a step. Texts: the GPL (licence), standard library code that no basis was
fitted to (code), facts among code that are asked again (recall). "auto": nothing stored;
"calibrated": `loki calibrate` with its defaults, on other code; "pca": `--kind pca`, 12288 tokens.

Tasks are made in the manner of RULER (Hsieh et al., 2024) with the model's chat template. Their
question is read by sparse decode steps, with up to 15 tokens before it: nothing that a prompt asks
for was retrieved by a dense prefill. *Score* is the share of answers found with its 95 % interval
over prompts (Wilson's), *same tokens* those of a greedy answer that are dense's, *length* the
tokens generated.

"""
LAST = """\
lm-evaluation-harness: not measured. Its log-likelihood tasks never decode, and tasks that do would
need `lm_eval`, which this project does not install.
"""


if __name__ == "__main__":
    main()
