"""`loki tune --target`: what it stores keeps the target, and is used only where it is better."""

import pytest
import torch
from loki_compile.pca_store.layer_plan import BUDGETS_SUFFIX, USED, find_plan, stored_plans
from toy_tuned import prepare, run, save_model

from loki_compile import LokiConfig
from loki_compile.commands import budget_search
from loki_compile.commands.evidence import Evidence, Outcome
from loki_compile.commands.tune_budgets import TRIED_SUFFIX
from loki_compile.plan_words import judged_under
from loki_compile.policies.kinds import kind_of

transformers = pytest.importorskip("transformers")

KV_HEADS, LAYERS, LENGTH = 2, 2, 256
# Of a key and its value in fp32, and of a row of its index.
KEY_BYTES, ROW_BYTES = 2 * 20 * 4, 10 + 4


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a random model and the bundled tokenizer."""
    return save_model(tmp_path_factory.mktemp("models") / "small", LAYERS)


@pytest.fixture
def tuning(small, tmp_path, monkeypatch):
    text = prepare(tmp_path, monkeypatch, 300)
    given = ["tune", small, "--text", text, "--length", LENGTH, "--prompts", 1, "--steps", 48]
    return [*map(str, given)]


def as_if(kl_of, finds=lambda kinds: True, answers_of=None):
    """Evidence by the plan alone: divergence of text, and of needles' answers where that is another
    one, and whether needles are found."""

    def of(evidence, kinds, number):
        passage = evidence.passages[number]
        # What is hard about a passage is none of the difference.
        kl = torch.rand(len(passage.rows), generator=torch.Generator().manual_seed(number))
        found = torch.full((len(passage.answers),), finds(kinds))
        of_passage = answers_of if answers_of is not None and len(found) else kl_of
        return Outcome(kl + of_passage(kinds), torch.ones(len(kl), dtype=torch.bool), found)

    return of


def even(kinds):
    return len({str(kind) for kind in kinds}) == 1 and len(kinds[0].budgets) == 1


def the_plan(suffix=BUDGETS_SUFFIX):
    (plan,) = stored_plans(suffix=suffix)
    return plan


def bytes_of(plan):
    """The part of the caches' bytes that a step behind LENGTH tokens reads, from words alone."""
    read, keys = 0.0, {}
    for layer, word in enumerate(each.word for each in plan.layers):
        kind = kind_of(word)
        for head in range(KV_HEADS):
            if kind.dense:
                keys[layer, head] = LENGTH
            elif kind.budgets[head].span is None:
                keys[layer, head] = keys[kind.budgets[head].source, kind.budgets[head].head]
            else:
                keys[layer, head] = max(kind.budgets[head].span.keys(LENGTH), 36)
                read += LENGTH * ROW_BYTES * kind.budgets[head].ranks
            read += keys[layer, head] * KEY_BYTES
    return read / (LAYERS * KV_HEADS * LENGTH * KEY_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["ranked", "any"])
def test_budgets_are_stored_bound_to_the_model_and_within_the_bytes(tuning, heads, tmp_path):
    done = run(*tuning, "--target", "bytes:0.45", "--heads", heads)
    assert done.exit_code == 0, done.output
    assert "of its optimum" in done.output and "95 % bounds" in done.output
    plan = the_plan()
    assert bytes_of(plan) <= 0.45
    assert plan.scores["bytes"] == pytest.approx(bytes_of(plan), abs=1e-5)
    assert plan.scores["bytes of one budget for all"] <= plan.scores["bytes"] + 1e-6
    assert plan.scores["bytes of one budget for all"] == pytest.approx(bytes_of(plan), abs=0.006)
    ranked = [all(each.ranks for each in kind_of(layer.word).budgets) for layer in plan.layers]
    assert all(ranked) or heads == "any"
    weights = [layer.weights for layer in plan.layers]
    assert find_plan(weights, {}, suffix=BUDGETS_SUFFIX) == plan
    assert ("it is not used" in done.output) != plan.scores[USED]
    assert not (tmp_path / "home" / "partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mass", [0.8, 0.95])
def test_the_fewest_bytes_capture_the_mass(tuning, mass):
    done = run(*tuning, "--target", f"mass:{mass}", "--heads", "any")
    assert done.exit_code == 0, done.output
    scores = the_plan().scores
    assert scores["missed"] <= 1 - mass + 1e-6
    assert scores["missed by one budget for all"] > scores["missed"]


@pytest.mark.parametrize(
    "kl_of, finds, used",
    [
        (lambda kinds: 0.01 * even(kinds), lambda kinds: True, True),
        pytest.param(lambda kinds: 0.01 * even(kinds), even, False, marks=pytest.mark.slow),
        pytest.param(lambda kinds: 0.0, lambda kinds: True, False, marks=pytest.mark.slow),
    ],
)
def test_a_plan_is_used_where_it_is_surely_better_and_finds_as_much(
    tuning, monkeypatch, kl_of, finds, used
):
    monkeypatch.setattr(Evidence, "of", as_if(kl_of, finds))
    done = run(*tuning, "--target", "bytes:0.5", "--heads", "any")
    assert done.exit_code == 0, done.output
    plan = the_plan()
    assert plan.scores["bytes"] == pytest.approx(bytes_of(plan), abs=1e-5) and bytes_of(plan) <= 0.5
    assert plan.scores[USED] is used and plan.scores["needles decide"] is True
    assert plan.under == judged_under(LokiConfig(), "loki")
    assert ('policy="loki" uses it' in done.output) == used
    assert ("are not surely better" in done.output) != used


@pytest.mark.parametrize("worse, used", [(0.0, True), (0.01, False)])
def test_where_no_needle_is_found_the_answers_decide_and_that_is_said(
    tuning, monkeypatch, worse, used
):
    """That no needle is lost says nothing where none was found."""
    answers = lambda kinds: worse * (not even(kinds))  # noqa: E731
    better = as_if(lambda kinds: 0.01 * even(kinds), lambda kinds: False, answers)
    monkeypatch.setattr(Evidence, "of", better)
    done = run(*tuning, "--target", "bytes:0.5")
    assert done.exit_code == 0, done.output
    assert "no needle found by either, so judged by KL alone, of the answers too" in done.output
    assert the_plan().scores[USED] is used
    assert the_plan().scores["needles decide"] is False


@pytest.mark.slow
def test_budgets_of_a_plan_of_layers_belong_to_those_that_choose(tuning, monkeypatch):
    missing = run(*tuning, "--policy", "tidal", "--target", "bytes:0.5")
    assert missing.exit_code == 2 and "run `loki tune` without --target" in missing.output
    monkeypatch.setattr(Evidence, "of", as_if(lambda kinds: 0.0))
    cheap = ["--plans", "2", "--cost-context", "4096", "--tolerance", "9"]
    assert run(*tuning, *cheap).exit_code == 0
    before = the_plan(".plan.json")
    chooses = [not layer.word.startswith("reuse") for layer in before.layers]
    assert not all(chooses)
    done = run(*tuning, "--policy", "tidal", "--target", "bytes:0.6")
    assert done.exit_code == 0, done.output
    assert the_plan(".plan.json") == before  # none is better here
    plan = the_plan(TRIED_SUFFIX)
    assert plan.scores["bytes"] <= 0.6 and plan.mass == before.mass
    for layer, old in zip(plan.layers, before.layers, strict=True):
        kind = kind_of(layer.word)
        assert layer.word == old.word or len(kind.budgets) == KV_HEADS
        assert layer.word != old.word or not old.word.startswith(("loki", "oracle"))


def test_a_stopped_search_goes_on_where_it_was(tuning, monkeypatch):
    runs, reads = [], []
    of, add = as_if(lambda kinds: 0.0), budget_search.MassCurves.begin

    def until_stopped(evidence, kinds, number):
        runs.append((evidence.passages[number].ids.sum(), tuple(kinds)))
        if len(runs) == 5:
            raise KeyboardInterrupt
        return of(evidence, kinds, number)

    def noted(self, rows):
        reads.append(len(rows))
        if len(reads) == 3:
            raise KeyboardInterrupt
        return add(self, rows)

    monkeypatch.setattr(Evidence, "of", until_stopped)
    monkeypatch.setattr(budget_search.MassCurves, "begin", noted)
    given = [*tuning, "--target", "bytes:0.5"]
    for _ in range(2):
        stopped = run(*given)
        assert stopped.exit_code == 130 and "goes on from here" in stopped.output
    done = run(*given)
    assert done.exit_code == 0, done.output
    assert len(reads) == 5  # two prompts of text and two that ask, one of them twice
    assert runs[4] == runs[5] and len({*map(str, runs)}) == len(runs) - 1
    assert len(list(stored_plans(suffix=BUDGETS_SUFFIX))) == 1


@pytest.mark.parametrize(
    "more, says",
    [
        pytest.param(
            ["--target", "bytes:0.1"],
            "for each index); needs more, or --heads any, or a smaller --rank",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--target", "mass:0.9", "--rank", "99"], "dims", marks=pytest.mark.slow),
        (["--target", "bits:0.1"], "needs bytes:SHARE"),
        (["--target", "mass:1.5"], "mass:SHARE"),
        (["--policy", "loki"], "needs --target bytes:0.2 or mass:0.97"),
        (["--target", "bytes:0.2", "--top-k", "9"], "--top-k: that is of --policy tidal"),
        (["--policy", "moa", "--target", "bytes:0.2"], "--target: that is of --policy loki"),
        (["--heads", "any"], "--heads: that is of --policy loki or tidal"),
        (["--target", "bytes:0.5", "--policy", "tidal", "--heads", "any"], "needs --policy loki"),
        (["--target", "bytes:0.5", "--rank", "variance:0.9"], "needs 32, 0.5 or auto"),
        (["--target", "bytes:0.5", "--steps", "70"], "needs 280 or more"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(tuning, more, says):
    done = run(*tuning, *more)
    assert done.exit_code == 2 and says in done.output.splitlines()[-1]
