"""`docs/quality.md`: what ways to choose keys lose on a real model, measured and written here.

    python benchmarks/quality.py MODEL --out FOLDER            measure, go on with, and write
         [--note WORDS] [--only text tasks longer needles ...]
    python benchmarks/quality.py --render                      write from results/quality.jsonl

MODEL is a transformers folder, FOLDER where bases, texts and results are kept: a run that is
stopped goes on when it is started again, and its rows are copied to results/quality.jsonl, behind
a line that says of what model, when and with what they were measured. Each part is a `loki eval` of
its own (`PARTS`), whose graphs run node by node. One sentence of the page names what was not
measured.
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
from functools import partial
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, stamp

from loki_compile.commands.measure import WARM_UP_STEPS
from loki_compile.commands.reference_data import RECALL_KEYS, RECALL_VALUES, stdlib_text
from loki_compile.commands.score_pictures import draw_depths, draw_quality
from loki_compile.commands.scores import RECORDS, summary
from loki_compile.commands.settings import label_of
from loki_compile.commands.trials import DENSE, Row

PAGE = ROOT / "docs" / "quality.md"
PICTURES = ROOT / "docs"
# The first has 7658 of SmolLM2's tokens; what is measured behind 8000 is of the second.
LICENCES = [Path("/usr/share/common-licenses") / name for name in ("GPL-3", "GPL-2")]
STEPS = 16
TEXTS = ("licence", "code", "recall")
CALIBRATED = {
    "calibrated": ("--kind", "score-optimal"),
    "pca": ("--kind", "pca", "--tokens", "12288"),
}
BUDGETS: tuple[Any, ...] = (0.125, 128)


# Dims of an index, and what they are stored in: the default of 64 dims, and what takes its bytes
# where a cache is bf16. This model's is float32: two of its bytes more.
Index = tuple[int, str]
USUAL: Index = (32, "int8")
HALF: Index = (16, "cache")


def settings(
    budgets: Sequence[Any], names: Sequence[str], index: Index = USUAL
) -> list[dict[str, Any]]:
    """Each named way at each budget: a policy, or a basis of "loki"."""
    rank, dtype = index
    of_index: dict[str, Any] = {"rank": rank}
    if dtype != "int8":
        of_index["index_dtype"] = dtype
    made = []
    for top_k in budgets:
        for name in names:
            if name in ("auto", *CALIBRATED):
                made.append({"policy": "loki", "top_k": top_k, **of_index, "basis": name})
            elif name == "tidal":
                made.append({"policy": name, "top_k": top_k, **of_index})
            else:
                made.append({"policy": name, "top_k": top_k})
    return made


EVERY = ("auto", "calibrated", "oracle", "quest", "window", "tidal")
MAIN = [
    *settings(BUDGETS, EVERY),
    *settings(BUDGETS, ("auto", "calibrated"), HALF),
    *settings((512,), ("auto", "oracle")),
]
PAPER = settings(BUDGETS, ("pca",))
LARGE = settings((64, 256, 512, 1024), EVERY)
OTHERS: tuple[Index, ...] = ((8, "cache"), (16, "int8"), (32, "cache"))
RANKS = [
    setting for index in OTHERS for setting in settings(BUDGETS, ("auto", "calibrated"), index)
]
ASKED = [
    *settings((128,), EVERY),
    *settings((128,), ("auto", "calibrated"), HALF),
    *settings((0.125,), ("auto",)),
]
CONTEXT = 2048
LONGER = (4096, 8000)  # of text: what the model has positions for
LONGER_STEPS = 64
ASKED_LONGER = (4000, 8000)
RANKABLE = 30  # prompts: fewer leave 95 % intervals of 35 points and more
TEXT = ("--task", "text", "--context", str(CONTEXT), "--pieces", "1", "--steps", str(STEPS))
OF_LONGER = [
    *settings(BUDGETS, ("auto", "calibrated", "oracle", "quest", "window")),
    *settings((0.125,), ("auto", "calibrated", "pca"), HALF),
    *settings((512,), ("auto", "oracle")),
]
BEHIND_LONGER = [
    *settings((0.125, 512), ("auto",)),
    *settings((256, 128), ("auto", "calibrated", "oracle")),
]
HIDDEN = ("single", "multi-key", "multi-value", "multi-query", "tracking", "common", "frequent")
FEW = ("passkey", "single", "multi-key", "multi-value", "multi-query")
NEEDLES = ("--task", "passkey", *(word for task in HIDDEN for word in ("--task", task)))
# What is measured, most wanted first: arguments of `loki eval`, and the settings.
PARTS: dict[str, tuple[tuple[str, ...], list[dict[str, Any]]]] = {
    "text": (TEXT, MAIN),
    **{
        f"longer-{n}": (("--task", "text", "--context", str(n), "--pieces", "1",
                         "--steps", str(LONGER_STEPS)), OF_LONGER)
        for n in LONGER
    },
    **{
        f"needles-{n}": ((*(word for task in FEW for word in ("--task", task)),
                          "--context", str(n), "--seeds", str(seeds), "--depths", "3"),
                         BEHIND_LONGER)
        for n, seeds in zip(ASKED_LONGER, (2, 1), strict=True)
    },
    "tasks": ((*NEEDLES, "--context", str(CONTEXT), "--seeds", "2", "--depths", "3"), ASKED),
    "ranks": (TEXT, [*PAPER, *RANKS, *LARGE]),
    "questions": ((*NEEDLES, "--context", str(CONTEXT), "--seeds", "2", "--depths", "3",
                   "--question", "dense"), ASKED),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, help="folder to keep all in")
    parser.add_argument("--note", default="", help="of the model: what its files do not say")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not args.render:
        if args.model is None or args.out is None:
            parser.error("needs MODEL and --out FOLDER, or --render")
        args.out.mkdir(parents=True, exist_ok=True)
        for part in args.only:
            for name in CALIBRATED:
                if any(setting.get("basis") == name for setting in PARTS[part][1]):
                    calibrate(args.model, args.out, name)
            evaluate(args.model, args.out, part)
            publish(args.out, about_of(args.model, args.note))
    render()


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


def texts(model: Path, out: Path, length: int) -> list[Path]:
    """The licence, code that no basis was fitted to, and facts among code that are asked again,
    each of `length` tokens and more: of a piece of text the last are measured."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = out / f"texts-{length}"
    folder.mkdir(exist_ok=True)
    made = [folder / f"{name}.txt" for name in TEXTS]
    made[0].write_text("".join(licence.read_text() for licence in LICENCES))
    code = stdlib_text("held_out")[:200_000]
    made[1].write_text(code)
    rng = random.Random(7)
    keys, values = rng.sample(RECALL_KEYS, 32), rng.sample(RECALL_VALUES, 32)
    facts = [f"# {key} {value}" for key, value in zip(keys, values, strict=True)]
    asked = "\n".join(rng.sample(facts, len(facts)))
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
    for file in texts(model, out, int(arguments[arguments.index("--context") + 1])):
        words += ["--text", str(file)]
    for setting in chosen:
        words += ["--setting", words_of(setting, out)]
    run_loki(out, words)


# ------------------------------------------------------------------------------------- the page

PUBLISHED = RESULTS / "quality.jsonl"


def about_of(model: Path, note: str) -> dict[str, Any]:
    """What the page says of the model, of the machine and of the day of the measurement."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    heads = config.num_attention_heads
    return {
        "model": model.name,
        "note": note,
        "layers": config.num_hidden_layers,
        "query_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "dtype": str(config.dtype).removeprefix("torch."),
        **stamp("cpu"),
    }


def publish(out: Path, about: dict[str, Any]) -> None:
    """Copies the rows of a run; of its first line the model's place on this machine stays here."""
    first, *rows = (out / "results" / RECORDS).read_text().splitlines(keepends=True)
    run = json.loads(first)["run"] | {"model": about["model"]}
    PUBLISHED.write_text(json.dumps({"run": run, "about": about}) + "\n" + "".join(rows))


def measured() -> tuple[dict[str, Any], list[Row]]:
    first, *rows = PUBLISHED.read_text().splitlines()
    return json.loads(first), list(map(json.loads, rows))


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
    return format(statistics.fmean(values), digits) if values else ""


def text_table(rows: Sequence[Row], chosen: Sequence[dict[str, Any]]) -> str:
    titles = ["setting", *(f"missed, {name}" for name in TEXTS)]
    of_text = [row for row in rows if row["task"].startswith("text ")]
    dense = {row["case"]: row for row in of_text if row["setting"] == DENSE}
    known = {row["setting"] for row in of_text}
    names = [DENSE, *(name for name in map(label, chosen) if name in known)]
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
        change = ""
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
                "100%" if name == DENSE else f"{statistics.fmean(share):.1%}" if share else "",
                f"{statistics.median(row['step_ms'] for row in whole):.0f}" if whole else "",
            ]
        )
    of = ", ".join(over)
    said = f"All columns behind the missed mass are of the texts that every setting has: {of}."
    return f"{said}\n\n" + table_of(titles, lines)


def behind_context(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["length"] == CONTEXT]


def grid_table(rows: Sequence[Row]) -> str:
    """Missed mass, the mean of the texts, by budget and by rank, as far as it was measured."""
    ways: list[tuple[str, Index]] = [(name, USUAL) for name in (*EVERY, "pca")]
    ways += [(name, index) for index in (HALF, *OTHERS) for name in ("auto", "calibrated")]
    shares = {
        (way, top_k): share
        for way in ways
        for top_k in GRID
        if (share := missed_of(rows, top_k, *way)) is not None
    }
    budgets = [top_k for top_k in GRID if any(at == top_k for _, at in shares)]
    lines = [
        [way_name(*way), *(_shown(shares.get((way, top_k))) for top_k in budgets)]
        for way in ways
        if any(other == way for other, _ in shares)
    ]
    return table_of(["way", *map(budget_name, budgets)], lines)


GRID: tuple[Any, ...] = (64, 128, 256, 512, 1024, 0.125)


def _shown(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"


def way_name(name: str, index: Index) -> str:
    if name not in ("auto", *CALIBRATED):
        return name
    return f"loki, {name}, {shown_index(index)}"


def shown_index(index: Index) -> str:
    rank, dtype = index
    return f"R = {rank} in {'the dtype of the cache' if dtype == 'cache' else dtype}"


def budget_name(top_k: Any) -> str:
    return f"{top_k:.1%}" if isinstance(top_k, float) else f"{top_k} keys"


def left_out(rows: Sequence[Row]) -> str:
    """One sentence that names what is planned and was not measured; "" where all was."""
    here = behind_context(rows)
    parts = []
    nothing = []  # budgets at which no way was measured
    for top_k in GRID:
        planned = [s for s in [*MAIN, *LARGE] if s["top_k"] == top_k]
        names = list(dict.fromkeys(way_of(setting) for setting in planned))
        gone = [name for name in names if missed_of(here, top_k, name) is None]
        if gone == names:
            nothing.append(str(top_k))
        elif gone:
            parts.append(f"{', '.join(gone)} at {budget_name(top_k)}")
    if nothing:
        parts.insert(0, f"budgets of {', '.join(nothing)} keys")
    others = [
        (way_of(s), (s["rank"], s.get("index_dtype", "int8")), s["top_k"]) for s in [*PAPER, *RANKS]
    ]
    gone = [way_name(n, x) for n, x, top_k in others if missed_of(here, top_k, n, x) is None]
    parts += dict.fromkeys(gone)
    done = {(row["task"], row["protocol"], row["length"]) for row in rows}
    tasks = [name for name in ("passkey", *HIDDEN) if (name, "sparse", CONTEXT) not in done]
    if tasks:
        parts.append(f"the tasks {', '.join(tasks)}")
    if not any(protocol == "dense" for _, protocol, _ in done):
        parts.append("questions read in the dense prefill")
    behind = {length for *_, length in done}
    far = [str(n) for n in sorted({*LONGER, *ASKED_LONGER}) if n not in behind]
    if far:
        parts.append(f"{' and '.join(far)} tokens")
    return f"Not measured yet: {'; '.join(parts)}.\n\n" if parts else ""


def way_of(setting: dict[str, Any]) -> str:
    return str(setting.get("basis", setting["policy"]))


def task_table(
    rows: Sequence[Row],
    chosen: Sequence[dict[str, Any]],
    lengths: Sequence[int],
    said: str,
    question: str = "sparse",
) -> str:
    """Over the prompts that every setting has answered; "" where there are none."""
    names = [DENSE, *map(label, chosen)]
    mine = [r for r in rows if r["protocol"] == question and r["length"] in lengths]
    found = whole_cases(mine, names[1:])
    if not found:
        return ""
    tasks = [name for name in ("passkey", *HIDDEN) if name in found[0][question]["tasks"]]
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
    if found[0][question]["prompts"] < RANKABLE:
        count += ": too few to rank settings whose intervals overlap"
    return f"{said} {count}.\n\n" + table_of(titles, lines) + against_oracle(mine, names)


def against_oracle(rows: Sequence[Row], names: Sequence[str]) -> str:
    """How many of the answers of exact ranking at its budget each setting gives too."""
    scores: dict[str, dict[str, float]] = {name: {} for name in names}
    for row in rows:
        if row["setting"] in scores:
            scores[row["setting"]][row["case"]] = row["score"]
    whole = set.intersection(*(set(of) for of in scores.values()))
    sentences = []
    for exact in (name for name in names if name.startswith("oracle")):
        found = [case for case in whole if scores[exact][case] == 1]
        shares = [
            f"{name}: {sum(scores[name][case] == 1 for case in found)}"
            for name in names
            if name not in (DENSE, exact)
        ]
        sentences.append(
            f"Of {len(found)} prompts that {exact} answers in full: {'; '.join(shares)}.\n"
        )
    return "".join(sentences) + "\n"


def ratios(rows: Sequence[Row], index: Index = USUAL) -> str:
    """What the automatic basis misses against the calibrated one and against exact ranking."""
    against = {
        "calibrated": "the calibrated basis misses",
        "pca": "the paper's PCA, calibrated, misses",
        "oracle": "exact ranking misses",
    }
    sentences = []
    for top_k in BUDGETS:
        shown = budget_name(top_k)
        auto, words = missed_of(rows, top_k, "auto", index), []
        for name, what in against.items():
            other = missed_of(rows, top_k, name, index)
            if auto is not None and other is not None:
                words.append(f"{auto / other:.2f} times what {what}")
        if words:
            said = f"At {shown} and {shown_index(index)} the automatic basis misses"
            sentences.append(f"{said} {', '.join(words)}.\n")
    return "".join(sentences)


def missed_of(rows: Sequence[Row], top_k: Any, name: str, index: Index = USUAL) -> float | None:
    """The mean of the texts; None where it was not measured on all of them."""
    (setting,) = settings((top_k,), (name,), index)
    mine = [row for row in rows if row["setting"] == label(setting) and "missed" in row]
    by_text = {row["task"]: row["missed"] for row in mine}
    shares = [by_text.get(f"text {text}.txt") for text in TEXTS]
    return None if None in shares else statistics.fmean(share for share in shares if share)


def render() -> None:
    """Writes the page and its pictures from what is published."""
    first, rows = measured()
    run, about = first["run"], first["about"]
    timed = STEPS - run["mass_steps"] - WARM_UP_STEPS
    values = {**about, "mass_steps": run["mass_steps"], "timed": timed, "day": about["time"][:10]}
    values["name"] = f"{about['model']} ({about['note']})" if about["note"] else about["model"]
    values["threads"] = "one thread" if about["threads"] == 1 else f"{about['threads']} threads"
    values["dense_timed"] = STEPS - WARM_UP_STEPS
    here = behind_context(rows)
    tasks = [
        task_table(rows, ASKED, (CONTEXT,), f"{CONTEXT} tokens."),
        task_table(rows, ASKED, (CONTEXT,), "The question read in the dense prefill.", "dense"),
        *(task_table(rows, BEHIND_LONGER, (n,), f"{n} tokens.") for n in ASKED_LONGER),
    ]
    parts = [
        INTRODUCTION.format(**values),
        left_out(rows),
        "## Text\n\n",
        f"One piece of {CONTEXT} tokens of each text, of which the last {STEPS} are decoded: few,\n"
        "which tell ways apart by missed mass and KL, hardly by perplexity.\n\n",
        text_table(here, MAIN),
        ratios(here) + "\n",
        "Missed mass by budget and rank, the mean of the three texts:\n\n",
        grid_table(here),
        *map(partial(longer, rows), LONGER),
        "## Tasks\n\n" if any(tasks) else "",
        *tasks,
        *pictures(rows),
        LAST,
    ]
    PAGE.write_text("".join(parts))
    print(f"wrote {PAGE}")


def longer(rows: Sequence[Row], length: int) -> str:
    """Text behind more tokens; "" where none was measured."""
    mine = [row for row in rows if row["length"] == length and row["task"].startswith("text ")]
    if not mine:
        return ""
    said = f"Pieces of {length} tokens, of which the last {LONGER_STEPS} are decoded."
    table = text_table(mine, OF_LONGER)
    return f"{said} {table}{ratios(mine)}{ratios(mine, HALF)}\n"


def pictures(rows: Sequence[Row]) -> list[str]:
    """Draws those that there is something to show in, and gives the lines that show them."""
    lines = []
    text = [row for row in behind_context(rows) if row["task"].startswith("text ")]
    known = {label(s): label({**s, "top_k": 0.125}).replace(", 0.125", "") for s in MAIN}
    if draw_quality(whole_cases(text, list(known)), known, PICTURES / "quality.png"):
        lines.append("![quality against bytes and time, on text](quality.png)\n\n")
    asked = [name for name in map(label, ASKED) if name in map(label, BEHIND_LONGER)]
    keys = [row for row in rows if row["task"] == "passkey" and row["protocol"] == "sparse"]
    keys = [row for row in keys if row["setting"] in (DENSE, *asked)]
    several = len({row["length"] for row in keys}) > 1  # else the table says the same
    if several and draw_depths(keys, asked, PICTURES / "quality_depths.png"):
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

{name}: {layers} layers, {query_heads} query and {kv_heads} KV heads x {head_dim}, {dtype};
torch {torch}, {day}, {threads} of a CPU. All of it was decoded through the compiled decode
path, graphs run node by node (`--engine nodes`: the graphs and kernels that Inductor gets, so that
times compare rows alone), with static caches whose contexts were prefilled once, dense. Made by one
command, which goes on where it was stopped:

    python benchmarks/quality.py MODEL --out FOLDER

*Missed* is the share of attention on keys that were not chosen, the mean over layers, heads and the
first {mass_steps} decoded tokens. *KL* and *same token* are against dense attention on the same
text, *perplexity* is the change. *Bytes* are those of keys, values and index that a step reads,
against dense. R dims of an index are int8, with a float32 scale for each key: 36 bytes at the
default of 32 dims, where 16 in bfloat16 are 32 bytes; "index_dtype=cache": in the cache's dtype,
float32 here. *ms*: CPU time of a step, the median over texts of the median of the last {timed}
steps (of dense: {dense_timed}), in the picture as well: few, on a busy machine, so differences of
10 % say nothing. Texts: the GPL (licence), standard library code that no basis was fitted to
(code), facts among code that are asked again (recall). "auto": nothing stored; "calibrated":
`loki calibrate` with its defaults, on other code; "pca": `--kind pca`, 12288 tokens.

Tasks are made in the manner of RULER (Hsieh et al., 2024) with the model's chat template. Their
question is read by sparse decode steps, with up to 15 tokens before it: nothing that a prompt asks
for was retrieved by a dense prefill. *Score* is the share of answers found with its 95 % interval
over prompts (Wilson's), *same tokens* those of a greedy answer that are dense's, *length* the
tokens generated.

"""
LAST = """\
`loki eval MODEL --tasks NAME|FILE.yaml` (extra `harness`) runs tasks of lm-evaluation-harness: the
answers of multiple choice, which its own models prefill, are decoded step by step too, and the last
64 tokens of a prompt are read by decode steps unless `--question dense` is said. None are measured
here: their data comes from a hub.
"""


if __name__ == "__main__":
    main()
