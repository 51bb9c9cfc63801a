"""The command line: what a user sees, what is written where, and one line for each mistake."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from loki_compile.pca_store import attention_fit
from loki_compile.pca_store.basis import Basis, BasisSet
from loki_compile.pca_store.fingerprint import weights_fingerprint
from loki_compile.pca_store.layer_plan import (
    BUDGETS_SUFFIX,
    SPANS_SUFFIX,
    USED,
    LayerPlan,
    PlannedLayer,
    save_plan,
)
from loki_compile.pca_store.store import Store

from loki_compile import LokiConfig, observation, progress
from loki_compile.commands import comparison
from loki_compile.commands.evaluate import cases_of
from loki_compile.commands.main import main
from loki_compile.commands.models import BUNDLED, load_model, load_tokenizer
from loki_compile.commands.settings import label_of, options_of, settings_of, with_what_is_stored
from loki_compile.commands.trials import Trials
from loki_compile.plan_words import judged_under

transformers = pytest.importorskip("transformers")

WORDS = "def f(x):\n    return [otter, copper, badger, cobalt][x] + 'heron' * len(x)\n"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random model of two layers and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        vocab_size=2048,
        max_position_embeddings=700,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / name)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("".join(f"# {i}\n{WORDS}" for i in range(60)))
    return str(file)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch._dynamo.reset()
    return tmp_path / "home" / "bases"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


# -------------------------------------------------------------------------------------- bases


def test_calibrate_stores_what_explain_then_uses(tiny, text, own_store):
    before = succeed("explain", tiny, "--min-context", "0")
    assert before.count("auto (fitted to each sequence)") == 1
    shown = succeed("calibrate", tiny, "--text", text, "--tokens", "300", "--length", "77")
    (path,) = own_store.glob("*.safetensors")
    assert f"wrote {path}" in shown
    (stored,) = Store().list()
    assert stored.header.source == "words.txt"
    assert [site.tokens for site in stored.header.sites] == [300, 300]
    after = succeed("explain", tiny, "--min-context", "0")
    assert after.count("score-optimal, 300 tokens") == 1
    for site in stored.header.sites:
        assert 0 <= site.measured["missed_by_exact_scores"] <= 1
        assert 0 <= site.measured["missed_mass"] <= 1 and site.measured["rank"] == 10


def test_calibrate_refines_for_as_long_as_it_may(tiny, text, own_store, monkeypatch):
    """So few seconds that each layer has the least steps there are."""
    steps = []
    descend = attention_fit.AttentionSamples.fit

    def fit(*args, **options):
        steps.append(options["steps"])
        return descend(*args, **options)

    monkeypatch.setattr(attention_fit.AttentionSamples, "fit", fit)
    arguments = ("--text", text, "--tokens", "200", "--refine", "--minutes", "0.0001")
    succeed("calibrate", tiny, *arguments)
    (stored,) = Store().list()
    assert stored.header.kind == "attention" and steps == [progress.LEAST_STEPS] * 2


def test_calibrate_takes_several_files_and_another_folder(tiny, text, tmp_path, own_store):
    other = tmp_path / "other.txt"
    other.write_text(WORDS)
    elsewhere = tmp_path / "elsewhere"
    kind = ("--kind", "score-optimal", "--calibration", "pre-rotary", "--out", elsewhere)
    succeed("calibrate", tiny, "--text", text, other, "--tokens", "200", *kind)
    assert not own_store.exists()
    (stored,) = Store(elsewhere).list()
    assert (stored.header.kind, stored.header.calibration) == ("score-optimal", "pre-rotary")
    assert stored.header.source == "words.txt, other.txt"


def test_bases_are_listed_shown_and_verified(tiny, text, own_store):
    assert succeed("bases", "list").startswith("0 in ")
    succeed("calibrate", tiny, "--text", text, "--tokens", "200")
    (path,) = own_store.glob("*.safetensors")
    assert path.stem in succeed("bases", "list")
    shown = succeed("bases", "show", path.stem)
    assert "model.layers.1.self_attn" in shown
    assert "words.txt" in shown
    assert "intact" in succeed("bases", "verify")
    assert "intact" in succeed("bases", "verify", path.stem)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    result = run("bases", "verify")
    assert result.exit_code == 2
    assert "broken" in result.stdout
    assert result.stderr.startswith("Error: ")


# ------------------------------------------------------------------------------------ explain


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_explain_tells_heads_dims_budget_and_memory(tiny, cache):
    shown = succeed(
        "explain", tiny, "--cache", cache, "--context", "600", "--min-context", "0", "--rank", "7"
    )
    (row,) = [line for line in shown.splitlines() if "self_attn" in line]
    cells = [cell.strip() for cell in re.split("[│┃]", row)[1:-1]]
    # 2 layers x 2 KV heads x (7 dims of a byte and a scale of 4) x 600 tokens
    assert cells[:2] == ["layers 0-1: model.layers.*.self_attn", "sparse"]
    assert cells[2:6] == ["6/2", "7 of 20", "75 of 600", "25.8 KiB"]
    assert "2 of 2 sites sparse" in shown
    assert "25.8 KiB" in shown


def test_explain_says_where_a_short_context_runs_dense(tiny):
    shown = succeed("explain", tiny, "--cache", "dynamic", "--context", "600")
    assert "they run dense (min_context=1024)" in shown
    shown = succeed("explain", tiny, "--cache", "static", "--context", "600")
    assert "dense by plan" in shown


@pytest.mark.parametrize(
    "cache, policy, says",
    [
        ("dynamic", "moa:4:0.1N", "which reads spans where its mask is causal: 10% of 8192 keys"),
        ("dynamic", "moa:4:0.9N", "spans read 91% of 600 tokens' keys"),
        (
            "static",
            "moa:4:0.1N",
            'dense under prefill="spans": its tokens lie behind others, or in',
        ),
        ("dynamic", "loki", "its policy has no spans for it (docs/coverage.md#prefill_dense)"),
    ],
)
def test_explain_says_what_a_prompt_reads_or_why_it_is_dense(tiny, cache, policy, says):
    asked = ("--min-context", "0", "--cache", cache, "--policy", policy, "--context", "600")
    shown = succeed("explain", tiny, *asked, "--prefill", "spans")
    (line,) = [line for line in shown.splitlines() if "prefill (600 query tokens)" in line]
    assert says in line and line.startswith("  layers 0-1: model.layers.*.self_attn")
    assert "prefill (600" not in succeed("explain", tiny, *asked)


def test_explain_does_not_need_a_checkpoint(tiny, tmp_path):
    folder = tmp_path / "config_only"
    folder.mkdir()
    shutil.copy(f"{tiny}/config.json", folder / "config.json")
    assert run("explain", folder).exit_code == 2
    assert "2 of 2 sites" in succeed("explain", folder, "--random-weights", "--min-context", "0")


# --------------------------------------------------------------------------------------- eval


def test_eval_with_the_whole_budget_is_dense(tiny, text, interpreted):
    shown = succeed(
        *("eval", tiny, "--text", text, "--context", "90", "--steps", "19", "--task", "text"),
        *("--top-k", "1.0", "--min-context", "0", "--dtype", "float32"),
    )
    (row,) = [line for line in shown.splitlines() if "loki" in line]
    cells = [cell.strip() for cell in re.split("[│┃]", row)[1:-1]]
    assert cells[2] in ("+0.00%", "-0.00%")
    assert cells[4] == "100.00%"
    assert "38 tokens of text" in shown


SETTINGS = ("--setting", "policy=window,top_k=36", "--setting", "top_k=40,rank=4")
SMALL = ("--context", "300", "--steps", "5", "--pieces", "1", "--min-context", "0", *SETTINGS)


def test_a_setting_is_called_by_what_it_says():
    words = "policy=moa:64:1024,0.25N,min_context=0"
    assert label_of(options_of(words)) == "moa:64:1024,0.25N, min_context=0"
    words = "top_k=64, rank=0.5,basis=some/where.safetensors"
    assert label_of(options_of(words)) == "loki, 64, R 0.5, where"


def test_an_eval_that_was_stopped_goes_on(tiny, text, tmp_path, monkeypatch):
    """Ctrl-C behind the third result: the same command measures the others, and no more."""
    folder = tmp_path / "out"
    command = ("eval", tiny, "--text", text, *SMALL, "--task", "text", "--task", "passkey")
    command += ("--depths", "2", "--seeds", "1", "--engine", "nodes", "--out", folder)
    rows, taken = Trials.rows, []

    def stopping(self, *arguments):
        for row in rows(self, *arguments):
            if len(taken) == 3:
                raise KeyboardInterrupt
            taken.append((row["case"], row["setting"]))
            yield row

    monkeypatch.setattr(Trials, "rows", stopping)
    stopped = run(*command)
    assert stopped.exit_code == 130
    assert "stopped with 3 results; the same command goes on from there" in stopped.stderr
    monkeypatch.setattr(Trials, "rows", rows)
    shown = succeed(*command)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()[1:]]
    measured = [(row["case"], row["setting"]) for row in lines]
    assert measured[:3] == taken
    assert len(measured) == len(set(measured)) == 3 * 3  # a text and two depths, three ways
    assert "3 of 3 cases" in shown
    for name in ("results.json", "results.csv", "results.md", "depths.png", "quality.png"):
        assert (folder / name).stat().st_size
    monkeypatch.setattr(Trials, "rows", lambda *_: pytest.fail("measured again"))
    assert "3 of 3 cases" in succeed(*command)


def test_settings_and_texts_of_one_name_are_kept_apart(tmp_path):
    """By all of the path where the name alone is another's."""
    bases = [tmp_path / folder / "a.safetensors" for folder in ("one", "two")]
    for path in bases:
        eye = torch.eye(8).expand(2, 8, 8)
        basis = Basis(eye, eye, torch.ones(2, 8), weights="0" * 32)
        saved = Store(path.parent).save(BasisSet((basis,)))
        saved.rename(path)
    settings = settings_of((), (0.12345, 0.123451), (), [str(path) for path in bases], (), {})
    labels = [setting.label for setting in settings]
    assert len(set(labels)) == 4 and all(str(path) in " ".join(labels) for path in bases)
    files = [tmp_path / folder / "a.txt" for folder in ("one", "two")]
    for number, file in enumerate(files):
        file.write_text(f"{number} {WORDS}" * 40)
    shapes = {"steps": 8, "pieces": 1, "seeds": 1, "depths": 2}
    cases = cases_of(
        load_tokenizer("reference"), ["text"], False, list(map(str, files)), [90], shapes
    )
    assert [case.task for case in cases] == [f"text {file}" for file in files]


def test_ranks_combine_with_policies_that_rank_in_dims_alone():
    made = settings_of(("loki", "sparq", "oracle"), (0.1,), (8, 16), (), (), {})
    assert [setting.label for setting in made] == [
        "loki, 0.1, R 8, auto", "loki, 0.1, R 16, auto", "sparq, 0.1, R 8", "sparq, 0.1, R 16",
        "oracle, 0.1",
    ]  # fmt: skip


def test_a_stored_plan_of_budgets_is_a_setting_beside_the_budget_of_its_name(own_store):
    """0.125 that is asked for is one budget for all; that nobody asked for, the plan's."""
    layers = (PlannedLayer("layers.0", "0" * 32, (), 2, "loki:0.5N,64"),)
    scores, under = {USED: True}, judged_under(LokiConfig(), "loki")
    plan = LayerPlan(layers, "tiny", 0.5, "", "2026-01-01", (), scores, under)
    path = save_plan(plan, own_store, BUDGETS_SUFFIX)
    given = ("policy=loki", "policy=loki,top_k=0.125", "policy=loki,rank=8")
    made = with_what_is_stored(
        settings_of((), (), (), (), given, {}), lambda: frozenset({"0" * 32})
    )
    found = {setting.label: (setting.options, setting.uses[:5]) for setting in made}
    assert found == {
        "loki, stored budgets, R auto, auto": ({}, "plan "),
        "loki, 0.125, R auto, auto": ({"top_k": 0.125}, ""),
        "loki, 0.125, R 8, auto": ({"rank": 8}, ""),  # the plan was judged under "auto"
    }
    save_plan(dataclasses.replace(plan, scores={USED: False}), path.parent, BUDGETS_SUFFIX)
    made = with_what_is_stored(
        settings_of((), (), (), (), given, {}), lambda: frozenset({"0" * 32})
    )
    assert [setting.uses for setting in made] == ["", ""]  # one setting, of the first two


def test_what_is_stored_meanwhile_is_measured_anew(tiny, text, tmp_path, own_store):
    """A basis, and a plan of spans, under which no budget counts."""
    folder = tmp_path / "out"
    command = ("eval", tiny, "--text", text, "--context", "300", "--steps", "5", "--pieces", "1")
    command += ("--min-context", "0", "--task", "text", "--policy", "loki", "--policy", "moa")
    command += ("--engine", "nodes", "--out", folder)
    before = succeed(*command)
    assert "moa, " in before
    assert "spans are a guess" in succeed("explain", tiny, "--policy", "moa")
    succeed("calibrate", tiny, "--text", text, "--tokens", "200", "--kind", "pca")
    model = load_model(tiny)
    layers = [
        PlannedLayer(f"layers.{n}", weights_fingerprint(layer.self_attn.k_proj.weight), (), 2, word)
        for n, (layer, word) in enumerate(zip(model.model.layers, ["moa:4:9"] * 2, strict=True))
    ]
    plan = LayerPlan(tuple(layers), "tiny", 0.5, "", "2026-01-01")
    path = save_plan(plan, own_store, SPANS_SUFFIX)
    assert label_of({"policy": str(path)}) == str(path)  # it keeps no index
    assert "as `loki tune` found 2026-01-01" in succeed("explain", tiny, "--policy", "moa")
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert "were measured with another basis or plan" in again.stderr
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()[1:]]
    names = [row["setting"].split(",")[0] for row in lines]
    assert sorted(names) == ["dense", "loki", "loki", "moa", "moa"]
    new = {row["setting"].split(",")[0]: row for row in lines[3:]}
    assert new["loki"]["uses"].startswith("basis ") and new["moa"]["uses"].startswith("plan ")
    assert "0.125" not in new["moa"]["setting"] and "uses" not in lines[1]


@pytest.mark.slow
def test_eval_at_its_defaults(tiny, tmp_path):
    """The bundled model has the recall words; engine, policy, budget and rank are the defaults."""
    small = ("--context", "1200", "--steps", "6", "--seeds", "1", "--pieces", "1")
    shown = succeed("eval", "reference", *small, "--out", tmp_path / "out")
    assert "engine 'inductor'" in shown and "recall" in shown
    rows = (tmp_path / "out" / "records.jsonl").read_text().splitlines()[1:]
    loki = [row for row in map(json.loads, rows) if row["setting"] != "dense"]
    assert [row["dense_steps"] for row in loki] == [0, 0]


def test_the_demo_takes_the_stored_basis_that_fits(tiny, text, own_store, monkeypatch):
    """One that holds too few dims for the rank is passed over, and what was taken is named."""
    options = {"min_context": 0, "rank": 0.25}
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert comparison.stored_basis(model, options, 600) is None
    succeed("calibrate", tiny, "--text", text, "--tokens", "200", "--kind", "pca")
    (wide,) = own_store.glob("*.safetensors")
    monkeypatch.setattr(attention_fit, "STEPS", 5)
    narrower = ("--rank", "5", "--kind", "attention")
    succeed("calibrate", tiny, "--text", text, "--tokens", "200", *narrower)
    (narrow,) = set(own_store.glob("*.safetensors")) - {wide}
    stamp = time.time() + 10
    os.utime(narrow, (stamp, stamp))  # of the same second, this one is the newer
    for rank, chosen in ((0.25, narrow), (7, wide)):
        entry, config, found = comparison.stored_basis(model, {**options, "rank": rank}, 600)
        assert entry.path == chosen and config.basis.kind == entry.header.kind
        assert [site.basis for site in found[0].sites] == [f"{entry.header.kind}, 200 tokens"] * 2
    other = transformers.AutoModelForCausalLM.from_config(model.config)
    assert comparison.stored_basis(other, options, 600) is None


def test_the_demo_takes_the_basis_that_is_bundled_with_the_model(own_store):
    model, options = load_model("reference"), {"min_context": 0}
    entry, config, found = comparison.stored_basis(model, options, 600)
    assert entry.path == comparison.BUNDLED_BASIS and config.basis.kind == "attention"
    assert all(site.basis == "attention, 65536 tokens" for site in found[0].sites)
    assert entry.header.versions["torch"] and Store().verify(entry.path) == entry.header
    assert not own_store.exists() or not list(own_store.iterdir())


@pytest.mark.parametrize("rank, kind", [("auto", "score-optimal"), ("variance:0.9", "pca")])
def test_a_fit_that_would_take_too_long_gives_way_to_a_quick_one(
    tiny, rank, kind, monkeypatch, capsys
):
    """The demo of a large model is not hours of fitting."""
    monkeypatch.setattr(comparison, "CALIBRATION_TOKENS", 700)
    monkeypatch.setattr(comparison, "FIT_SECONDS", 1e-9)
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    basis = comparison.fitted_basis(model, tokenizer, tiny, 200, {"rank": rank})
    assert basis.kind == kind and len(basis.bases) == 2
    assert basis.bases[0].tokens == 200  # one prompt, and not four
    said = capsys.readouterr().err
    assert "the whole fit would take" in said and f"a {kind} one of 200 tokens" in said


@pytest.mark.slow
def test_the_demo_shows_everything_and_writes_the_picture(tiny, tmp_path):
    picture = tmp_path / "new" / "picture.png"
    arguments = ("--context", "560", "--min-context", "0", "--top-k", "1.0", "--dtype", "float32")
    shown = succeed("demo", "--model", tiny, *arguments, "--out", picture)
    for label in ("eager", "inductor", "loki"):
        (row,) = [line for line in shown.splitlines() if re.match(rf"│ {label} ", line)]
        assert "100.0%" in row
        assert re.search(r"\d+/32", row)
    assert "agree on the first 96" in shown
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("anew", [False, True])
def test_the_demo_says_which_basis_it_takes(tiny, text, own_store, anew, monkeypatch):
    monkeypatch.setattr(comparison, "CALIBRATION_TOKENS", 700)
    succeed("calibrate", tiny, "--text", text, "--tokens", "200", "--kind", "pca")
    (path,) = own_store.glob("*.safetensors")
    arguments = ("--context", "560", "--min-context", "0", "--dtype", "float32", "--quick")
    result = run("demo", "--model", tiny, *arguments, *(["--calibrate"] if anew else []))
    assert result.exit_code == 0, result.output
    taken = f"basis: {path.stem}, stored" in result.stderr
    fitted = "one is fitted" in result.stderr
    assert (taken, fitted) == (not anew, anew)
    assert "200 tokens" in result.stdout or anew


# ------------------------------------------------------------------------------------ mistakes

MISTAKES = {
    "a folder that is not there": (("explain", "/nowhere/model"), "found no folder /nowhere/model"),
    "a hub id without a network": (("explain", "org/nothing"), "cannot get org/nothing"),
    "a missing text": (("calibrate", "{tiny}", "--text", "no.txt"), "cannot read no.txt"),
    "an empty budget": (("explain", "{tiny}", "--top-k", "0"), "top_k=0: needs"),
    "a rank above head_dim": (
        ("explain", "{tiny}", "--rank", "21", "--min-context", "0"),
        "rank=21 exceeds head_dim=20",
    ),
    "a rank that is none": (("explain", "{tiny}", "--rank", "much"), "rank='much': needs"),
    "a basis that is not there": (("explain", "{tiny}", "--basis", "mine"), "no basis 'mine'"),
    "an unknown kind": (("calibrate", "{tiny}", "--kind", "ica"), "kind='ica': needs one of"),
    "an unknown dtype": (("explain", "{tiny}", "--dtype", "float7"), "found dtype 'float7'"),
    "a basis that is not there, eval": (
        ("eval", "{tiny}", "--basis", "mine", "--context", "90"),
        "no basis 'mine'",
    ),
    "a dtype of integers": (("bench", "{tiny}", "--dtype", "int64"), "found dtype 'int64'"),
    "a device that is not here": (("bench", "{tiny}", "--device", "nowhere"), "cannot use device"),
    "too long a context, demo": (
        ("demo", "--model", "{tiny}", "--context", "4096"),
        "this model has 700 positions; needs at most 604",
    ),
    "too short a context, demo": (
        ("demo", "--model", "{tiny}", "--context", "99"),
        "needs 512 to 604 tokens",
    ),
    "too long a context, eval": (
        ("eval", "{tiny}", "--text", "{text}", "--context", "701"),
        "--context 701: this model has 700 positions",
    ),
    "too long a context, explain": (
        ("explain", "{tiny}", "--context", "701"),
        "--context 701: this model has 700 positions",
    ),
    "too long a context, bench": (
        ("bench", "{tiny}", "--context", "50", "--context", "699", "--rounds", "1"),
        "--context 699: this model has 700 positions; needs at most 684 with 16 tokens behind it",
    ),
    "too long a prompt, calibrate": (
        ("calibrate", "{tiny}", "--text", "{text}", "--length", "701"),
        "--length 701: this model has 700 positions",
    ),
    "too short a prompt, calibrate": (
        ("calibrate", "{tiny}", "--text", "{text}", "--length", "36", "--refine"),
        "a basis of kind 'attention' needs 37",
    ),
    "a file where the folder should be": (
        ("calibrate", "{tiny}", "--text", "{text}", "--out", "{text}/bases"),
        "is not a folder; needs a place",
    ),
    "an unknown policy, bench": (
        ("bench", "{tiny}", "--policies", "loki,loky"),
        "policy='loky': there is none of that name",
    ),
    "a budget that is none, bench": (
        ("bench", "{tiny}", "--policies", "loki@much"),
        "--policies loki@much: found top_k 'much'",
    ),
    "a budget too small, bench": (("bench", "{tiny}", "--policies", "loki@9"), "top_k=9 does not"),
    "a budget that is empty, bench": (
        ("bench", "{tiny}", "--policies", "loki@"),
        "--policies loki@: found top_k ''",
    ),
    "more rounds than a model has room for, bench": (
        ("bench", "{tiny}", "--rounds", "5000"),
        "--rounds 5000: needs 60004 tokens behind each context, this model has 700 positions",
    ),
    "a picture of no known kind, bench": (
        ("bench", "{tiny}", "--picture", "/tmp/rows.xyz"),
        "--picture /tmp/rows.xyz: found the ending '.xyz'; needs one of",
    ),
    "text for a model without a tokenizer, bench": (
        ("bench", "random:4", "--text", "{text}"),
        "random:4 has no tokenizer; needs no text: leave out --text",
    ),
    "no policy, bench": (("bench", "{tiny}", "--policies", " ,"), "--policies ' ,': names nothing"),
    "an unknown dense way, bench": (
        ("bench", "{tiny}", "--dense", "eager,flash"),
        "--dense flash: needs some of eager, inductor, packed, packed-inductor, exact",
    ),
    "a file of something else, bench": (
        ("bench", "{tiny}", "--out", "{text}"),
        "holds no rows of `loki bench`",
    ),
    "too little text, bench": (
        ("bench", "{tiny}", "--text", "{few}", "--context", "500"),
        "--text: holds",
    ),
    "text without a tokenizer, bench": (
        ("bench", "{bare}", "--text", "{text}", "--context", "500"),
        "found no tokenizer for",
    ),
    "an --out below a file, bench": (
        ("bench", "{tiny}", "--out", "{text}/rows.json"),
        "is not a folder; needs a place",
    ),
    "an --out that is a folder, demo": (
        ("demo", "--model", "{tiny}", "--context", "560", "--out", "/"),
        "is a folder; needs the name of a file",
    ),
    "no tokenizer, eval": (("eval", "{bare}", "--context", "90"), "found no tokenizer for"),
    "no tokenizer, calibrate": (("calibrate", "{bare}"), "found no tokenizer for"),
    "no tokenizer, demo": (("demo", "--model", "{bare}"), "found no tokenizer for"),
    "too many steps": (
        ("eval", "{tiny}", "--context", "64", "--steps", "64"),
        "--steps 64: needs at most 62",
    ),
    "a task that there is not": (
        ("eval", "{tiny}", "--task", "ruler"),
        "--task ruler: needs one of text, recall",
    ),
    "a task that does not fit": (
        ("eval", "{tiny}", "--task", "common", "--context", "99"),
        "task common in 99 tokens: it takes",
    ),
    "a setting without a value": (
        ("eval", "{tiny}", "--setting", "policy=loki,top_k"),
        "--setting policy=loki,top_k: 'top_k' needs a value",
    ),
    "a setting of no option": (
        ("eval", "{tiny}", "--setting", "topk=9"),
        'no option "topk"; did you mean "top_k"?',
    ),
    "results that are none": (
        ("eval", "{tiny}", "--context", "200", "--out", "{junk}"),
        "holds no results of `loki eval`",
    ),
    "a folder that nobody can write to": (
        ("eval", "{tiny}", "--context", "90", "--steps", "8", "--out", "/proc/x"),
        "--out /proc/x: cannot be written to",
    ),
    "a context without room for recall": (
        ("eval", "{tiny}", "--context", "64", "--task", "recall"),
        "--task recall --context 64: ",
    ),
    "a policy that is no file": (
        ("explain", "{tiny}", "--policy", "nope.json"),
        "nope.json is no plan of layers",
    ),
    "a table with a share beyond one": (
        ("explain", "{tiny}", "--policy", "{few}.tsv@2"),
        "needed 0 to 1",
    ),
    "a picture of nothing": (
        ("explain", "{tiny}", "--policy", "moa", "--picture", "x.png"),
        "--picture: shows who reads what whom chose; needs --policy tidal",
    ),
    "a picture of another format, explain": (
        ("explain", "{tiny}", "--policy", "tidal", "--picture", "x.txt"),
        "--picture x.txt: found the ending '.txt'; needs one of",
    ),
    "an empty budget, tune": (("tune", "{tiny}", "--top-k", "0"), "top_k=0: needs"),
    "an empty rank, tune": (("tune", "{tiny}", "--rank", "0"), "rank=0: needs"),
    "a choice that is none, tune": (
        ("tune", "{tiny}", "--group-choice", "foo"),
        "group_choice='foo': needs",
    ),
    "a picture of another format, tune": (
        ("tune", "{tiny}", "--picture", "x.txt"),
        "--picture x.txt: found the ending '.txt'; needs one of",
    ),
    "a density that the first keys exceed": (
        ("tune", "{tiny}", "--policy", "moa", "--length", "400", "--sink", "4", "--density", "0.3"),
        "needs a larger --density",
    ),
    "too little text": (
        ("eval", "{tiny}", "--text", "{few}", "--context", "690"),
        "needs 690: pass more text",
    ),
}


@pytest.fixture(scope="session")
def bare(tiny, tmp_path_factory):
    """The configuration alone."""
    folder = tmp_path_factory.mktemp("models") / "bare"
    folder.mkdir()
    shutil.copy(f"{tiny}/config.json", folder / "config.json")
    return str(folder)


# What needs the weights to be found out.
AFTER_LOADING = {"a rank above head_dim"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake, tiny, bare, text, tmp_path, own_store, monkeypatch
):
    if mistake not in AFTER_LOADING:
        loader = transformers.AutoModelForCausalLM
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    few = tmp_path / "few.txt"
    few.write_text(WORDS)
    arguments, message = MISTAKES[mistake]
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / "records.jsonl").write_text("junk")
    places = {"tiny": tiny, "text": text, "bare": bare, "few": few, "junk": junk}
    result = run(*(a.format(**places) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.rstrip().endswith(line)
    assert not own_store.exists()  # nothing was written


def test_help_and_a_list_of_bases_need_no_torch(tiny, text, own_store):
    """The whole process, with a store to list."""
    succeed("calibrate", tiny, "--text", text, "--tokens", "200", "--kind", "pca")
    (path,) = own_store.glob("*.safetensors")
    (own_store / "damaged.safetensors").write_bytes(b"junk")
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from loki_compile.commands.main import COMMANDS, main\n"
        "for words in ([], *([name] for name in COMMANDS), ['bases', 'list']):\n"
        "    assert CliRunner().invoke(main, [*words, '--help']).exit_code == 0\n"
        "listed = CliRunner().invoke(main, ['bases', 'list'])\n"
        f"assert listed.exit_code == 0 and {path.stem!r} in listed.stdout, listed.output\n"
        "assert 'damaged.safetensors' in listed.stderr, listed.stderr\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_eval_says_that_answers_of_multiple_choice_are_decoded():
    help_of = " ".join(run("eval", "--help").stdout.split())
    assert "the answers of multiple choice too, which its own models prefill" in help_of


def test_a_stopped_calibration_goes_on(tiny, text, own_store, monkeypatch):
    """Ctrl-C in the third prompt: the next command reads the rest alone, and fits the same."""
    command = ("calibrate", tiny, "--text", text, "--tokens", "400", "--length", "80")
    for module in (attention_fit, progress):
        monkeypatch.setattr(module, "STEPS", 20)
    succeed(*command)
    (path,) = own_store.glob("*.safetensors")
    whole = Store().load(path)
    path.unlink()
    read = []
    add = observation.Seen.add

    def stopping(self, *arguments):
        read.append(arguments[1].shape[2])
        if len(read) == 6:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(observation.Seen, "add", stopping)
    result = run(*command)
    assert result.exit_code == 130 and "the same command goes on" in result.stderr
    assert "Aborted" not in result.output
    assert (own_store.parent / "partial").exists() and not list(own_store.glob("*"))
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert len(read) == 6 + 2 * 3  # the third prompt again, and the two behind it, in two layers
    assert "to go: the rest of the text, and the fit" in result.stderr
    again = Store().load(next(own_store.glob("*.safetensors")))
    for one, other in zip(whole.bases, again.bases, strict=True):
        assert torch.equal(one.key, other.key) and torch.equal(one.query, other.query)
    assert not (own_store.parent / "partial").exists()


def test_a_basis_of_another_model_is_refused(tiny, text, tmp_path):
    other = tmp_path / "other"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    model.save_pretrained(other)
    succeed("calibrate", tiny, "--text", text, "--tokens", "200")
    (stored,) = Store().list()
    result = run("explain", other, "--basis", stored.name, "--min-context", "0")
    assert result.exit_code == 2
    assert "model.layers.1.self_attn" in result.stderr
    assert "loki calibrate" in result.stderr


def test_a_traceback_is_there_for_the_asking():
    result = run("--traceback", "explain", "/nowhere/model")
    assert isinstance(result.exception, ValueError)
