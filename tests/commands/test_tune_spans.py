"""`loki tune --policy moa`: what it stores keeps the density and holds; a stop loses nothing."""

import pytest
import torch
from loki_compile.kernels.spans import Spans
from loki_compile.pca_store.layer_plan import SPANS_SUFFIX, find_plan, stored_plans
from toy_tuned import prepare, run, save_model

from loki_compile.commands import options, span_search
from loki_compile.commands.models import BUNDLED
from loki_compile.policies.kinds import kind_of
from loki_compile.span_profile import SpanProfiler

transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for m in messages %}User: {{ m.content }}\n{% endfor %}Model:"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model with the bundled tokenizer, and the same with a chat template."""
    base = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    made = {}
    for name, template in (("plain", None), ("chat", TEMPLATE)):
        made[name] = save_model(base / name, layers=2)
        if template:
            tokenizer.chat_template = template
            tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def tuning(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(span_search, "ROWS", 24)
    text = prepare(tmp_path, monkeypatch, 400)

    def arguments(name="plain", *more):
        given = ["tune", folders[name], "--policy", "moa", "--text", text, "--length", 400]
        return [*map(str, given), "--prompts", "2", "--sink", "4", *map(str, more)]

    return arguments


def the_plan():
    (plan,) = stored_plans(suffix=SPANS_SUFFIX)
    return plan


def spans_of(plan):
    kinds = [kind_of(layer.word) for layer in plan.layers]
    return [Spans(kind.spans, kind.sink, 32) for kind in kinds]


def test_a_plan_of_spans_is_stored_bound_to_the_model_and_within_the_density(
    tuning, folders, tmp_path
):
    done = run(*tuning("plain", "--density", "0.5"))
    assert done.exit_code == 0, done.output
    assert 'policy="moa" uses it' in done.output and "of its optimum" in done.output
    assert "the text itself" in done.output
    plan = the_plan()
    spans = spans_of(plan)
    assert len(spans) == 2 and all(len(each.heads) == 2 and each.sink == 4 for each in spans)
    assert plan.scores["lengths"] == [100, 200, 400] and plan.scores["gap"] <= 1e-3
    for length in (100, 200, 400):
        read = sum(each.share(length) for each in spans) / 2
        assert read <= 0.5
        assert plan.scores["density"][str(length)] == pytest.approx(read, abs=1e-3)
    weights = [layer.weights for layer in plan.layers]
    assert find_plan(weights, {}, suffix=SPANS_SUFFIX) == plan
    assert find_plan(["0" * 64], {}, suffix=SPANS_SUFFIX) is None
    assert plan.top_k == 0.5 and plan.source.startswith("words.txt")
    assert not (tmp_path / "home" / "partial").exists()


def test_the_answer_is_the_models_own_where_there_is_a_chat_template(tuning, monkeypatch):
    seen = []
    effects = SpanProfiler.effects

    def noted(self, inputs, labels, spans, **more):
        seen.append((inputs["input_ids"].shape[1], labels))
        return effects(self, inputs, labels, spans, **more)

    monkeypatch.setattr(SpanProfiler, "effects", noted)
    done = run(*tuning("chat", "--effects", "entrywise"))
    assert done.exit_code == 0, done.output
    assert "own answers" in done.output and the_plan().scores["effects"] == "entrywise"
    assert len(seen) == 6 and all(rows == len(labels) >= 15 for rows, labels in seen)


def test_prompts_that_a_chat_template_fills_are_refused(folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["chat"])
    ids = torch.arange(2, 300) % 2000
    ((prompt,),) = span_search.asked_prompts(tokenizer, ids, [200], 0)
    assert prompt.start == len(prompt.ids) <= 150 and prompt.asked
    with pytest.raises(ValueError, match="no room for text in 9 tokens"):
        span_search.asked_prompts(tokenizer, ids, [12], 0)


def test_a_stopped_profile_goes_on_where_it_was(tuning, monkeypatch):
    calls = []
    effects = SpanProfiler.effects

    def until_stopped(self, inputs, labels, spans, **more):
        calls.append(labels.tolist())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return effects(self, inputs, labels, spans, **more)

    monkeypatch.setattr(SpanProfiler, "effects", until_stopped)
    assert run(*tuning()).exit_code == 130 and not list(stored_plans(suffix=SPANS_SUFFIX))
    done = run(*tuning())
    assert done.exit_code == 0, done.output
    assert len(calls) == 7 and calls[3] == calls[4]  # what was stopped, and nothing before it
    assert len(the_plan().layers) == 2


def test_a_length_of_which_the_text_holds_one_prompt_is_profiled_and_not_compared(tuning, tmp_path):
    words = (tmp_path / "words.txt").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    (tmp_path / "words.txt").write_text(tokenizer.decode(ids[:560]))
    done = run(*tuning())
    assert done.exit_code == 0, done.output
    assert (
        "the text holds 1 of 200 tokens, 1 of 400 tokens, of the 2 prompts asked for" in done.output
    )
    assert "no prompt of 400 tokens is left to compare plans on" in done.output
    scores = the_plan().scores
    assert scores["prompts"] == [2, 1, 1]
    compared = scores["held out, divergence and change of loss"]["plan"]
    assert [pair is None for pair in compared] == [False, False, True]


def test_without_scipy_nothing_is_profiled(tuning, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    monkeypatch.setattr(SpanProfiler, "effects", lambda *_, **__: pytest.fail("profiled"))
    done = run(*tuning())
    assert done.exit_code == 2
    assert "scipy is not installed; needed for this command" in done.output.splitlines()[-1]


@pytest.mark.parametrize(
    "more, says",
    [
        (["--density", "0.01"], "needs a larger --density"),
        (["--length", "5000"], "positions"),
        (["--length", "256", "--sink", "64"], "a smaller --sink"),
        (["--effects", "both"], "joint, entrywise"),
        (["--top-k", "0.25"], "--top-k: that is of --policy tidal"),
        (["--policy", "tidal", "--density", "0.3"], "--density: that is of --policy moa"),
        (["--text", "short"], "pass more text"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(tuning, more, says, tmp_path):
    arguments = tuning("plain")
    if more[0] == "--text":
        (tmp_path / "words.txt").write_text("heron otter")
        more = []
    done = run(*arguments, *more)
    assert done.exit_code == 2 and says in done.output.splitlines()[-1]
