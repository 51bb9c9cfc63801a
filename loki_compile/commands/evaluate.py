"""`loki eval`: quality of decoding MODEL, sparse against dense, by many settings in one run."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from loki_compile.commands.options import (
    EACH_OPTIONS,
    MODEL_HELP,
    MODEL_OPTIONS,
    NUMBER,
    AskedModel,
    check_harness,
    dense_because,
    with_options,
)
from loki_compile.commands.output import going_on, out, progress, say, show
from loki_compile.commands.settings import label_of, settings_of, with_what_is_stored

if TYPE_CHECKING:
    from loki_compile.commands.scores import Records
    from loki_compile.commands.tasks import Case
    from loki_compile.commands.trials import Row, Setting, Trials

_ALL = "all"
# Options, by their parameters: of cases, those of which all combinations are settings, and of what
# decodes.
SHAPES = ("steps", "pieces", "seeds", "depths")
HARNESS = ("harness", "limit", "num_fewshot", "apply_chat_template")
COMBINED = ("policies", "budgets", "ranks", "bases", "named")
DECODING = ("engine", "cache", "mass_steps")


@click.command(epilog=MODEL_HELP)
@click.argument("name", metavar="MODEL")
@click.option("--text", "files", multiple=True,
              help="Text file, may be repeated. [held-out Python library]")  # fmt: skip
@click.option("--context", "contexts", type=click.IntRange(64), multiple=True,
              help="Tokens of each case; may be repeated. [4096, or what it has]")  # fmt: skip
@click.option("--task", "tasks", multiple=True,
              help="text, recall, passkey, single, multi-key, multi-value, multi-query, tracking, "
              "common, frequent, or all; may be repeated. [text, and recall where the tokenizer "
              "has its words]")  # fmt: skip
@click.option("--tasks", "harness", multiple=True, metavar="NAME",
              help="Task of lm-evaluation-harness, or file.yaml of one; may be repeated, and alone "
              "replaces --task.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1),
              help="Documents of each of --tasks. [all]")  # fmt: skip
@click.option("--num-fewshot", type=click.IntRange(0),
              help="Examples before each document of --tasks. [as the task has it]")  # fmt: skip
@click.option("--apply-chat-template", is_flag=True,
              help="Give --tasks in the model's chat template.")  # fmt: skip
@click.option("--steps", type=click.IntRange(2), default=128, show_default=True,
              help="Tokens of each piece of text that are decoded, its last.")  # fmt: skip
@click.option("--pieces", type=click.IntRange(1), default=2, show_default=True,
              help="Pieces of each text.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True,
              help="Prompts of each task and context; passkey: of each depth.")  # fmt: skip
@click.option("--depths", type=click.IntRange(2), default=5, show_default=True,
              help="Depths of the pass key, from the beginning to the end.")  # fmt: skip
@click.option("--question", type=click.Choice(["sparse", "dense", "both"]), default="sparse",
              show_default=True,
              help="What reads a question: decode steps, or the prefill.")  # fmt: skip
@click.option("--policy", "policies", multiple=True,
              help='How keys are chosen: "loki", "oracle", ...; may be repeated.')  # fmt: skip
@click.option("--top-k", "budgets", type=NUMBER, multiple=True,
              help="Keys each query reads: 0.125 or 1024; may be repeated.")  # fmt: skip
@click.option("--rank", "ranks", type=NUMBER, multiple=True,
              help="Dims of the index: 0.5, 32 or variance:0.9; may be repeated.")  # fmt: skip
@click.option("--basis", "bases", multiple=True,
              help="Store name, path, hub id; may be repeated. [auto]")  # fmt: skip
@click.option("--setting", "named", multiple=True, metavar="NAME=VALUE,...",
              help="One more setting, by its options: policy=loki,top_k=128,group_choice="
              "probability; may be repeated, and alone replaces the combinations.")  # fmt: skip
@click.option("--engine", type=click.Choice(["inductor", "nodes"]), default="inductor",
              show_default=True, help="What runs decode steps: Inductor's code, or the same graphs "
              "node by node, with nothing to compile.")  # fmt: skip
@click.option("--cache", type=click.Choice(["static", "dynamic"]), default="static",
              show_default=True)  # fmt: skip
@click.option("--mass-steps", type=click.IntRange(0), default=8, show_default=True,
              help="Steps of each piece of text whose missed attention is noted.")  # fmt: skip
@click.option("--out", "folder", type=click.Path(path_type=Path),
              help="Folder for results.json, .csv, .md, pictures, and to go on from.")  # fmt: skip
@with_options(EACH_OPTIONS)
@with_options(MODEL_OPTIONS)
def command(folder: Path | None, **given: Any) -> None:
    """Quality of decoding MODEL, sparse against dense: text, and tasks in the manner of RULER.

    Each case's context is prefilled once, dense; every setting (each policy at each budget, rank
    and basis) decodes behind a copy of that cache, through the compiled decode path. With --out a
    run that was stopped goes on when the same command is given again, and more settings or cases
    add to it.

    Of text: perplexity, KL divergence and equal greedy tokens against dense, the attention on keys
    that were not chosen, bytes read. Of tasks: the share of answers found, with 95 % intervals over
    prompts; a question is read by sparse decode steps (with up to 15 tokens before it), unless
    --question says otherwise.

    --tasks runs lm-evaluation-harness: what it asks is decoded in the same way, the answers of
    multiple choice too, which its own models prefill. A question is the last 64 tokens there. Steps
    behind fewer than --min-context tokens are dense: `sparse steps` says how many were not.
    """
    kept: list[Records] = []

    def rest() -> str:
        if not kept:
            return " before anything was measured"
        how = "the same command goes on from there" if folder else "--out would have kept them"
        return f" with {len(kept[0].rows)} results; {how}"

    asked = AskedModel.taken(given)
    with going_on(rest):
        _evaluate(kept, asked, folder, **given)


def _evaluate(
    kept: list[Records],
    asked: AskedModel,
    folder: Path | None,
    files: tuple[str, ...],
    contexts: tuple[int, ...],
    tasks: tuple[str, ...],
    question: str,
    **given: Any,
) -> None:
    from loki_compile.commands.models import (
        check_writable,
        load_config,
        load_tokenizer,
        longest_context,
    )
    from loki_compile.commands.scores import Records

    shapes = {name: given.pop(name) for name in SHAPES}
    of_harness = {name: given.pop(name) for name in HARNESS}
    check_harness(of_harness)
    combined = {name: given.pop(name) for name in COMBINED}
    decoding = {name: given.pop(name) for name in DECODING}
    settings = settings_of(**combined, others=given)
    asked.check()
    if folder is not None:
        check_writable("--out", folder, folder=True)
    wanted = [] if of_harness["harness"] and not tasks else _tasks(tasks)
    config, tokenizer = load_config(asked.name), load_tokenizer(asked.name)
    cases: list[Case] = []
    if wanted:
        lengths = _lengths(contexts, config)
        cases = cases_of(tokenizer, wanted, not tasks, files, lengths, shapes)
        _say_what_is_dense(settings, min(lengths))
    records = Records(folder, _run(asked, config, decoding, given))
    kept.append(records)
    protocols = ("sparse", "dense") if question == "both" else (question,)
    of_tasks: Callable[..., None] | None = None
    if of_harness["harness"]:
        longest = longest_context(config)
        of_tasks = partial(_harness, of_harness, tokenizer, longest, protocols, folder)
    _measure(asked, tokenizer, settings, cases, protocols, of_tasks, records, folder)


def _measure(
    asked: AskedModel,
    tokenizer: Any,
    settings: list[Setting],
    cases: Sequence[Case],
    protocols: Sequence[str],
    of_tasks: Callable[..., None] | None,
    records: Records,
    folder: Path | None,
) -> None:
    """of_tasks: what else is asked of the same trials."""
    from loki_compile.commands.stored import weights_of

    @functools.cache
    def model() -> Any:
        say(f"loading {asked.name}")
        return asked.load()

    settings = with_what_is_stored(settings, functools.cache(lambda: weights_of(model())))
    trials = functools.cache(partial(_trials, model, settings, records, tokenizer))
    try:
        if cases:
            _decode(trials, _missing(cases, settings, protocols, records), settings, records)
        if of_tasks is not None:
            of_tasks(trials, settings, records)
    except KeyboardInterrupt:
        _report(records, settings, cases, folder)
        raise
    _report(records, settings, cases, folder)


def _lengths(contexts: Sequence[int], config: Any) -> list[int]:
    from loki_compile.commands.models import fitting_context

    return [fitting_context("--context", each, 4096, config) for each in contexts or (None,)]


def _run(
    asked: AskedModel, config: Any, decoding: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """What results in one folder have in common."""
    return {
        "model": asked.name,
        "config": f"{zlib.crc32(config.to_json_string().encode()):08x}",
        "dtype": asked.dtype,
        "device": asked.device or "",
        **decoding,
        "options": {key: value for key, value in options.items() if value is not None},
    }


# --------------------------------------------------------------------------- before any model


def _say_what_is_dense(settings: Sequence[Setting], context: int) -> None:
    """A note where settings have nothing to measure."""
    from loki_compile.config import LokiConfig

    reasons: dict[str, list[str]] = {}
    for setting in settings:
        if why := dense_because(LokiConfig.from_options(setting.options), context):
            reasons.setdefault(why, []).append(setting.label)
    for why, labels in reasons.items():
        say(f"note: behind {context} tokens every step of {'; '.join(labels)} runs dense ({why})")


def _tasks(given: Sequence[str]) -> list[str]:
    """What is asked for, "recall" left out of "all": it needs a tokenizer of its own.

    Raises:
        ValueError: a task that there is not.
    """
    from loki_compile.commands.tasks import GENERATED, TASKS

    named: dict[str, None] = {}
    for word in given or ("text",):
        if word != _ALL and word not in TASKS:
            raise ValueError(f"--task {word}: needs one of {', '.join((*TASKS, _ALL))}.")
        named |= dict.fromkeys(("text", *GENERATED) if word == _ALL else (word,))
    return list(named)


def cases_of(
    tokenizer: Any,
    tasks: Sequence[str],
    by_default: bool,
    files: Sequence[str],
    lengths: Sequence[int],
    shapes: dict[str, int],
) -> list[Case]:
    """All cases: a first of every kind, then a second, so that a run that is stopped has some of
    each.

    Raises:
        ValueError: too little text, a length or a tokenizer that does not do.
    """
    from loki_compile.commands.reference_data import stdlib_text
    from loki_compile.commands.tasks import recall_cases

    texts = _texts(files) or {"python": stdlib_text("held_out")}
    kinds: list[list[Case]] = []
    steps, seeds = shapes["steps"], shapes["seeds"]
    for length in lengths:
        if steps > length - 2 and "text" in tasks:
            raise ValueError(f"--steps {steps}: needs at most {length - 2} of {length} tokens.")
        for task in tasks:
            kinds += _kinds_of(tokenizer, task, texts, length, shapes)
        if by_default:
            with contextlib.suppress(ValueError):  # other words, or they do not fit
                kinds.append(recall_cases(tokenizer, length, seeds))
    rounds = max(map(len, kinds))
    return [kind[number] for number in range(rounds) for kind in kinds if number < len(kind)]


def _texts(files: Sequence[str]) -> dict[str, str]:
    """The texts of files, by names that tell them apart."""
    from loki_compile.commands.models import read_text

    files = list(dict.fromkeys(files))
    alike = Counter(Path(file).name for file in files)
    names = [file if alike[Path(file).name] > 1 else Path(file).name for file in files]
    return {name: read_text([file]) for name, file in zip(names, files, strict=True)}


def _kinds_of(
    tokenizer: Any, task: str, texts: dict[str, str], length: int, shapes: dict[str, int]
) -> list[list[Case]]:
    """The cases of one task at one length, by kind: by text, or by depth.

    Raises:
        ValueError: too little text, a length or a tokenizer that does not do.
    """
    from loki_compile.commands.tasks import generated_case, recall_cases, text_cases

    seeds, depths = range(shapes["seeds"]), shapes["depths"]
    if task == "text":
        kinds = []
        for name, text in texts.items():
            pieces = text_cases(tokenizer, name, text, length, shapes["steps"], shapes["pieces"])
            if len(pieces) < shapes["pieces"]:
                say(f"the text {name} holds {len(pieces)} pieces of {length} tokens, of "
                    f"the {shapes['pieces']} asked for")  # fmt: skip
            kinds.append(pieces)
        return kinds
    if task == "recall":
        try:
            return [recall_cases(tokenizer, length, len(seeds))]
        except ValueError as error:
            raise ValueError(f"--task recall --context {length}: {error}") from None
    if task == "passkey":
        return [
            [generated_case(tokenizer, task, "", length, seed, depth) for seed in seeds]
            for depth in (number / (depths - 1) for number in range(depths))
        ]
    filler = next(iter(texts.values()))
    return [[generated_case(tokenizer, task, filler, length, seed) for seed in seeds]]


def _missing(
    cases: Sequence[Case],
    settings: Sequence[Setting],
    protocols: Sequence[str],
    records: Records,
) -> list[tuple[Case, dict[str, list[str]]]]:
    """The cases that lack a result, and of which settings, by protocol."""
    from loki_compile.commands.trials import DENSE

    uses = {DENSE: "", **{setting.label: setting.uses for setting in settings}}
    work = []
    for case in cases:
        lacking = {}
        for protocol in ("text",) if case.is_text else protocols:
            left = [x for x, used in uses.items() if not records.has(case.key, protocol, x, used)]
            if left:
                lacking[protocol] = left
        if lacking:
            work.append((case, lacking))
    return work


# ---------------------------------------------------------------------------------- decoding


def _trials(
    load: Callable[[], Any], settings: Sequence[Setting], records: Records, tokenizer: Any
) -> Trials:
    from loki_compile.commands.trials import Trials

    engine, cache = records.run["engine"], records.run["cache"]
    compiled = "compiled by Inductor at the first steps" if engine == "inductor" else "node by node"
    model = load()
    say(f"contexts are prefilled densely, {len(settings)} settings decode each, {compiled}")
    mass_steps = records.run["mass_steps"]
    return Trials(model, tokenizer, settings, engine=engine, cache=cache, mass_steps=mass_steps)


def _decode(
    trials: Callable[[], Trials],
    work: Sequence[tuple[Case, dict[str, list[str]]]],
    settings: Sequence[Setting],
    records: Records,
) -> None:
    if not work:
        say(f"all {len(records.rows)} results are there already")
        return
    from loki_compile.commands.measure import many_variants

    results = sum(len(labels) for _, lacking in work for labels in lacking.values())
    uses = {setting.label: setting.uses for setting in settings}
    decoding = trials()
    with many_variants(), progress() as bar:
        task = bar.add_task(f"results of {len(work)} cases", total=results)
        for case, lacking in work:
            bar.update(task, description=f"{case.task}, {case.length} tokens")
            for row in decoding.rows(case, lacking):
                used = uses.get(row["setting"], "")
                records.add({**row, "uses": used} if used else row)
                bar.advance(task)


def _harness(
    given: dict[str, Any],
    tokenizer: Any,
    longest: int,
    protocols: Sequence[str],
    folder: Path | None,
    trials: Callable[[], Trials],
    settings: Sequence[Setting],
    records: Records,
) -> None:
    """Tasks of lm-evaluation-harness: their table and, where there is a folder, files."""
    from loki_compile.commands import harness
    from loki_compile.commands.measure import many_variants

    wanted = harness.Wanted(
        given["harness"], given["limit"], given["num_fewshot"], given["apply_chat_template"]
    )
    answers = harness.Answers(trials, settings, records)
    with many_variants():
        rows = harness.run(wanted, answers, tokenizer, longest, protocols)
    count = rows[0]["answers"]
    _print_table(f"lm-evaluation-harness, {count} answers each", harness.columns(rows), rows)
    if folder is not None:
        show(f"wrote {', '.join(harness.write(folder, records.run, rows))} to {folder}")


def _print_table(
    title: str, shown: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]
) -> None:
    table = Table(title=title, title_justify="left")
    for number, (name, _) in enumerate(shown):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in shown))
    out.print(table)


def _report(
    records: Records, settings: Sequence[Setting], cases: Sequence[Case], folder: Path | None
) -> None:
    """The table, and where there is a folder all files; nothing where there are no cases."""
    if not cases:
        return
    from loki_compile.commands.score_pictures import draw_depths, draw_quality
    from loki_compile.commands.scores import columns, summary, write_results

    keys = {case.key for case in cases}
    uses = {setting.label: setting.uses for setting in settings}
    labels = list(uses)
    rows = [
        row
        for row in records.rows
        if row["case"] in keys
        and row.get("uses", "") == uses.get(row["setting"], row.get("uses", ""))
    ]
    if older := sum(row["case"] in keys for row in records.rows) - len(rows):
        say(f"note: {older} results are left out that were measured with another basis or plan")
    found = summary(rows, labels)
    if found:
        shown = columns(found)
        what = f"{found[0]['cases']} cases"
        if "tokens" in found[0]:
            what += f"; {found[0]['tokens']} tokens of text"
        _print_table(f"decoding {records.run['model']}: {what}", shown, found)
    show(f"Steps by the engine {records.run['engine']!r}; intervals are 95 %, over prompts.")
    if folder is None:
        return
    write_results(folder, records.run, rows, found)
    policies = {
        setting.label: label_of({**setting.options, "top_k": 0.125}).replace(", 0.125", "", 1)
        for setting in settings
    }
    wrote = ["results.json", "results.csv", "results.md"]
    try:
        if draw_depths(rows, labels, folder / "depths.png"):
            wrote.append("depths.png")
        if draw_quality(found, policies, folder / "quality.png"):
            wrote.append("quality.png")
    except ImportError:
        say("note: without matplotlib there are no pictures: pip install 'loki-compile[eval]'")
    show(f"wrote {', '.join(wrote)} to {folder}")
