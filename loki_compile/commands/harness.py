"""Tasks of lm-evaluation-harness through the compiled decode path: `loki eval MODEL --tasks`.

The harness makes prompts, and turns answers into its metrics; what it asks a model for is decoded
here, as the cases of `trials` are: a context is prefilled once, densely, and each setting decodes
behind a copy of that cache. Answers are kept as they come, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from loki_compile.commands.output import progress, say
from loki_compile.commands.scores import Records
from loki_compile.commands.tasks import CHUNK, Case
from loki_compile.commands.trials import DENSE, Row, Setting, Trials

# Tokens at the end of a prompt that decode steps read where a question is to be sparse: the harness
# does not say where it begins.
ASKED = 64
# Caches are of so many tokens more each, lest every prompt has a shape of its own.
ROOM = 1024
# Of generating tasks that do not say.
NEW_TOKENS = 256
# What decides whether an answer is right, the first of these that a task has.
_DECISIVE = ("exact_match", "acc", "f1", "contains", "bleu")


@dataclass(frozen=True)
class Wanted:
    """What the harness runs: names of its tasks or files of tasks, the number of documents of each
    (None: all) and of examples before each (None: as the task has it), and whether prompts are in
    the model's chat template."""

    tasks: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    chat: bool = False


class Answers:
    """What each setting answers to cases, decoded where it is not on record.

    The first setting that is asked makes all decode the case, behind the same prefill.
    """

    def __init__(
        self, trials: Callable[[], Trials], settings: Sequence[Setting], records: Records
    ) -> None:
        """trials: asked for where something is to be decoded; settings: without `DENSE`."""
        self.trials = trials
        self.uses = {DENSE: "", **{setting.label: setting.uses for setting in settings}}
        self.records = records
        self.known = {self._place(row): row for row in records.rows}

    def rows(self, cases: Sequence[Case], protocol: str, label: str) -> list[Row]:
        """A row for each case; they are decoded in the order of their contexts, which choices
        between several answers share."""
        missing = {
            case: lacking for case in cases if (lacking := self._lacking(case.key, protocol))
        }
        if missing:
            with progress() as bar:
                task = bar.add_task("answers", total=sum(map(len, missing.values())))
                for case in sorted(missing, key=lambda each: (len(each.context), each.context)):
                    bar.update(task, description=f"{case.task}, {len(case.context)} tokens")
                    for row in self.trials().rows(case, {protocol: missing[case]}):
                        uses = self.uses[row["setting"]]
                        row = {**row, "uses": uses} if uses else row
                        self.records.add(row)
                        self.known[self._place(row)] = row
                        bar.advance(task)
        return [self.known[case.key, protocol, label, self.uses[label]] for case in cases]

    def _lacking(self, key: str, protocol: str) -> list[str]:
        return [x for x, used in self.uses.items() if (key, protocol, x, used) not in self.known]

    @staticmethod
    def _place(row: Row) -> tuple[str, str, str, str]:
        return row["case"], row["protocol"], row["setting"], row.get("uses", "")


class Respondent(TemplateLM):  # type: ignore[misc]
    """A model as the harness knows one, that answers as one setting does."""

    def __init__(
        self, answers: Answers, tokenizer: Any, longest: int, protocol: str, label: str
    ) -> None:
        """
        Args:
            longest: tokens that the model has positions for; prompts lose their beginning beyond.
            protocol: what reads the last `ASKED` tokens of a prompt, "sparse" steps or the "dense"
                prefill.
        """
        super().__init__()
        self.answers, self.tokenizer, self.longest = answers, tokenizer, longest
        self.protocol, self.label = protocol, label
        self.asked: list[Row] = []
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """A first token of its own is given once, whether or not a template has written it."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """
        Raises:
            ValueError: a task that draws its answers.
        """
        cases = [self._generating(*request.args) for request in requests]
        return [
            _until(row["answer"], case.until)
            for row, case in zip(self._rows(cases), cases, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(
            "--tasks: found a task that asks how likely whole documents are, which a prefill tells "
            "and that is dense; `loki eval --task text` has what decode steps lose of text."
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        cases = [self._weighing(context, answer) for _, context, answer in requests]
        return [(-row["nats"], row["greedy"]) for row in self._rows(cases)]

    def _rows(self, cases: Sequence[Case]) -> list[Row]:
        rows = self.answers.rows(cases, self.protocol, self.label)
        self.asked += rows
        return rows

    def _generating(self, context: str, options: dict[str, Any]) -> Case:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError("--tasks: found a task that draws its answers; needed a greedy one.")
        until = options.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        number = int(options.get("max_gen_toks", NEW_TOKENS))
        prompt = self._fitting(self.tok_encode(context), number)
        return _case("generate", prompt, (), new_tokens=number, until=until)

    def _weighing(self, context: list[int], answer: list[int]) -> Case:
        prompt = self._fitting(context, len(answer))
        return _case("likelihood", prompt, answer, weighed=len(answer))

    def _fitting(self, prompt: list[int], more: int) -> list[int]:
        """Without what the model has no positions for, from its beginning as the harness's own
        models leave it out.

        Raises:
            ValueError: the answer alone is too long.
        """
        room = self.longest - more
        if room < 1:
            raise ValueError(
                f"--tasks: found an answer of {more} tokens; the model has {self.longest} "
                "positions."
            )
        self.cut += len(prompt) > room
        return prompt[-room:]


def _case(task: str, prompt: Sequence[int], answer: Sequence[int], **how: Any) -> Case:
    """A prompt is cut where its last tokens begin, in pieces that a decode step takes whole."""
    cut = len(prompt) - max(min(ASKED, (len(prompt) - 1) // CHUNK * CHUNK), 1)
    tokens = len(prompt) + len(answer) + how.get("new_tokens", 0)
    length = -(-tokens // ROOM) * ROOM
    return Case(f"lm-eval {task}", length, 0, tuple(prompt[:cut]), (*prompt[cut:], *answer), **how)


def _until(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0] if end else text
    return text


# ---------------------------------------------------------------------------------- a whole run


def is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def run(
    wanted: Wanted,
    answers: Answers,
    tokenizer: Any,
    longest: int,
    protocols: Sequence[str],
) -> list[Row]:
    """What each setting reaches, a row for each and each question protocol:

    `values`: by task and metric the harness's value and standard error; of the metric that decides
    whether an answer is right also how many documents are `better` and `worse` than with dense
    attention. `answers`: that were asked for, `sparse`: the share of decode steps that were.

    Raises:
        ValueError: a task that is not there or that cannot be measured so.
    """
    files = [str(Path(task).absolute()) if is_file(task) else task for task in wanted.tasks]
    manager = _manager(files)
    rows = []
    for protocol in protocols:
        dense: dict[str, list[dict[str, Any]]] = {}
        for label in answers.uses:
            model = Respondent(answers, tokenizer, longest, protocol, label)
            found = _evaluated(model, wanted, files, manager)
            if label == DENSE:
                dense = found["samples"]
                if model.cut:
                    say(f"note: {model.cut} prompts lost their beginning: the model has {longest} "
                        "positions")  # fmt: skip
            rows.append(
                {"setting": label, "question": protocol, "answers": len(model.asked)}
                | {"sparse": _sparse(model.asked), "values": _values(found, dense)}
            )
    return rows


def _evaluated(
    model: Respondent, wanted: Wanted, tasks: list[Any], manager: TaskManager
) -> dict[str, Any]:
    found = simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=wanted.shots,
        limit=wanted.limit,
        apply_chat_template=wanted.chat,
        bootstrap_iters=1000,
        task_manager=manager,
    )
    return dict(found)


def _manager(tasks: list[str]) -> TaskManager:
    """What finds tasks, each of which it has found. Its own are thousands of files, read where one
    is asked for by its name.

    Raises:
        ValueError: a task that is not there, or whose data is not: the harness raises many kinds.
    """
    try:
        manager = TaskManager(include_defaults=not all(map(is_file, tasks)))
        manager.load(tasks)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--tasks: lm-evaluation-harness says {said[0]!r}; needed names of its tasks whose "
            "data is here, or files of tasks."
        ) from error
    return manager


def _values(
    found: dict[str, Any], dense: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for task, of in found["results"].items():
        named = {name: value for name, value in of.items() if isinstance(value, (int, float))}
        samples = found["samples"].get(task, [])
        decisive = next((n for n in _DECISIVE if samples and n in samples[0]), "")
        for name, value in named.items():
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr") or not filtered:
                continue
            row: dict[str, Any] = {"value": value, "error": of.get(f"{metric}_stderr,{filtered}")}
            if metric == decisive and dense:
                mine, theirs = (_by_document(s, decisive, filtered) for s in (samples, dense[task]))
                row["better"] = sum(mine[at] > theirs[at] for at in mine)
                row["worse"] = sum(mine[at] < theirs[at] for at in mine)
            values[f"{task} {metric}" + (f" {filtered}" if filtered != "none" else "")] = row
    return values


def _by_document(samples: Sequence[dict[str, Any]], metric: str, filtered: str) -> dict[int, float]:
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in samples
        if sample.get("filter", filtered) == filtered
    }


def _sparse(rows: Sequence[Row]) -> float:
    steps = sum(row.get("sparse_steps", 0) + row.get("dense_steps", 0) for row in rows)
    return sum(row.get("sparse_steps", 0) for row in rows) / steps if steps else 0.0


def columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """The columns of a table: a title, and what a row shows."""
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    shown: list[tuple[str, Callable[[Row], str]]] = [("setting", lambda row: row["setting"])]
    if len({row["question"] for row in rows}) > 1:
        shown.append(("question", lambda row: row["question"]))
    shown += [(name, partial(_shown, name)) for name in names]
    shown.append(
        ("sparse steps", lambda row: "" if row["setting"] == DENSE else f"{row['sparse']:.0%}")
    )
    return shown


def _shown(name: str, row: Row) -> str:
    of = row["values"].get(name)
    if of is None:
        return ""
    error = of["error"]
    text = f"{of['value']:.3f}" + (f" ± {error:.3f}" if isinstance(error, float) else "")
    told = "better" in of and row["setting"] != DENSE
    return f"{text}, +{of['better']} -{of['worse']}" if told else text


def write(folder: Path, run: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """tasks.json (the run and its rows) and tasks.md: their names."""
    (folder / "tasks.json").write_text(
        json.dumps({"run": run, "settings": list(rows)}, indent=2) + "\n"
    )
    shown = columns(rows)
    lines = [[title for title, _ in shown], ["---"] * len(shown)]
    lines += [[cell(row) for _, cell in shown] for row in rows]
    (folder / "tasks.md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))
    return ["tasks.json", "tasks.md"]
