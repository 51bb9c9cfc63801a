"""Tasks of lm-evaluation-harness: what it asks is answered by decode steps, and kept."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from toy_models import worded_llama

from loki_compile.commands import evaluate, options
from loki_compile.commands.models import load_tokenizer
from loki_compile.commands.reference_data import stdlib_text
from loki_compile.commands.scores import RECORDS, Records
from loki_compile.commands.trials import DENSE, Setting, Trials

pytest.importorskip("lm_eval")
harness = importlib.import_module("loki_compile.commands.harness")

FEW = Setting("few", {"policy": "window", "top_k": 40})
LONGEST = 2048
CHOICES = ["self", "None", "value", "return x"]


@pytest.fixture(scope="module")
def model():
    return worded_llama(LONGEST)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path / "home"))
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("reference")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Texts of 1200 tokens and more."""
    text = stdlib_text("held_out")
    return [text[at : at + 3600].rstrip() for at in range(0, 18000, 6000)]


def answers_of(model, tokenizer, settings=(FEW,), folder=None):
    records = Records(folder, {"model": "tiny"})

    def trials():
        return Trials(model, tokenizer, settings, engine="nodes", cache="static", mass_steps=0)

    made = []

    def once():
        made[:] = made or [trials()]
        return made[0]

    return harness.Answers(once, settings, records)


def respondent(answers, tokenizer, label=DENSE, protocol="sparse", longest=LONGEST):
    return harness.Respondent(answers, tokenizer, longest, protocol, label)


def asks(*args):
    return SimpleNamespace(args=args)


@pytest.mark.parametrize("protocol", ["sparse", "dense"])
def test_dense_likelihoods_are_those_of_one_call_over_all(model, tokenizer, prompts, protocol):
    wanted = [asks(prompts[0], " " + choice) for choice in CHOICES] + [asks("", "def x():")]
    found = respondent(
        answers_of(model, tokenizer, ()), tokenizer, protocol=protocol
    ).loglikelihood(wanted, disable_tqdm=True)
    for request, (told, greedy) in zip(wanted, found, strict=True):
        context, answer = request.args
        whole = tokenizer.encode(context + answer)
        before = len(tokenizer.encode(context)) if context else 0
        if not context:
            whole, before = [tokenizer.eos_token_id, *whole], 1
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, before - 1 : -1]
        truth = torch.tensor(whole[before:])
        nats = logits.log_softmax(-1).gather(1, truth[:, None]).sum()
        assert told == pytest.approx(float(nats), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == truth).all())


def test_an_answer_ends_at_the_words_that_end_it(model, tokenizer, prompts):
    ids = torch.tensor([tokenizer.encode(prompts[0])])
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    end = whole[len(whole) // 2 :][:3]
    answers = answers_of(model, tokenizer, ())
    asked = [
        asks(prompts[0], {"until": until, "max_gen_toks": 12}) for until in ([end], [], "@never@")
    ]
    cut, *others = respondent(answers, tokenizer).generate_until(asked)
    assert others == [whole, whole]
    assert cut == whole.split(end)[0] and len(cut) < len(whole)
    assert answers.records.rows[0]["generated"] < 12


@pytest.mark.parametrize(("protocol", "read"), [("sparse", 8), ("dense", 1)])
def test_the_last_tokens_of_a_prompt_are_read_by_what_is_said(
    model, tokenizer, prompts, protocol, read
):
    answers = answers_of(model, tokenizer)
    few = respondent(answers, tokenizer, FEW.label, protocol)
    few.loglikelihood([asks(prompts[0], " " + CHOICES[3])], disable_tqdm=True)
    (row,) = few.asked
    steps = (row["sparse_steps"], row["dense_steps"])
    assert steps == (read + row["tokens"] - 1, 0)


def test_a_prompt_beyond_the_positions_loses_its_beginning(model, tokenizer, prompts):
    long, short = prompts[0], prompts[0][-2000:]
    longest = len(tokenizer.encode(short)) + 4
    model_of = respondent(answers_of(model, tokenizer, ()), tokenizer, longest=longest)
    found = model_of.generate_until(
        [asks(text, {"until": [], "max_gen_toks": 4}) for text in (long, short)]
    )
    assert found[0] == found[1]
    assert model_of.cut == 1
    with pytest.raises(ValueError, match=f"an answer of 999 tokens; the model has {longest}"):
        model_of.generate_until([asks(short, {"max_gen_toks": 999})])


def test_what_cannot_be_measured_so_is_refused(model, tokenizer, prompts):
    model_of = respondent(answers_of(model, tokenizer, ()), tokenizer)
    with pytest.raises(ValueError, match="draws its answers; needed a greedy one"):
        model_of.generate_until([asks(prompts[0], {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(ValueError, match="--task text"):
        model_of.loglikelihood_rolling([asks(prompts[0])])


@pytest.fixture
def task(tmp_path, prompts):
    """A file of a task of the harness's, whose documents are beside it."""
    documents = tmp_path / "documents.jsonl"
    lines = [{"text": text, "choices": CHOICES, "gold": n} for n, text in enumerate(prompts)]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"""
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
"""
    )
    return file


def test_a_task_of_a_file_is_run_by_each_setting_and_gone_on_with(
    model, tokenizer, tmp_path, task, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    wanted = harness.Wanted((str(task),), limit=2)
    answers = answers_of(model, tokenizer, folder=tmp_path / "out")
    rows = harness.run(wanted, answers, tokenizer, LONGEST, ("sparse",))
    assert [row["setting"] for row in rows] == [DENSE, FEW.label]
    assert [row["answers"] for row in rows] == [8, 8]  # two documents, four choices
    assert rows[1]["sparse"] == 1
    value, mine = (row["values"]["tiny acc"] for row in rows)
    assert value["value"] in (0, 0.5, 1) and (value["better"], value["worse"]) == (0, 0)
    assert mine["value"] - value["value"] == (mine["better"] - mine["worse"]) / 2
    for name in harness.write(tmp_path / "out", {}, rows):
        assert FEW.label in (tmp_path / "out" / name).read_text()

    lines = (tmp_path / "out" / RECORDS).read_text().splitlines()
    assert len(lines) == 1 + 2 * 8

    def nothing_to_decode():
        raise AssertionError("decoded again")

    again = Records(tmp_path / "out", {"model": "tiny"})
    answers = harness.Answers(nothing_to_decode, (FEW,), again)
    assert harness.run(wanted, answers, tokenizer, LONGEST, ("sparse",)) == rows


def test_a_task_that_is_not_there_is_one_error(model, tokenizer):
    wanted = harness.Wanted(("no_such_task",))
    with pytest.raises(ValueError, match="no_such_task"):
        harness.run(wanted, answers_of(model, tokenizer, ()), tokenizer, LONGEST, ("sparse",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--limit", "2"), "--limit: needs --tasks"),
        (("--apply-chat-template",), "--apply-chat-template: needs --tasks"),
        (("--tasks", "gone.yaml"), "--tasks gone.yaml: no such file"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(words, said):
    found = CliRunner().invoke(evaluate.command, ["reference", *words])
    assert said in str(found.exception)


def test_without_the_harness_the_install_command_is_said(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    found = CliRunner().invoke(evaluate.command, ["reference", "--tasks", "any"])
    assert "pip install 'loki-compile[harness]'" in str(found.exception)
