"""A stratified sample of `benchmarks/zoo.py`: one architecture for each way to decode."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from loki_compile.passes.attention import Reason

_FILE = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "zoo.py"
_SPEC = importlib.util.spec_from_file_location("zoo", _FILE)
zoo = importlib.util.module_from_spec(_SPEC)
sys.modules["zoo"] = zoo
_SPEC.loader.exec_module(zoo)

REWRITTEN = [
    ("llama", "static", "sdpa"),  # repeat_kv in front of SDPA, index_copy_ into the cache
    ("llama", "generate", "sdpa"),  # the mask is an input of the graph
    ("gpt2", "dynamic", "eager"),  # written out, one head for each query head
    ("falcon", "static", "sdpa"),  # one KV head by broadcasting, no scale
    ("gemma2", "static", "eager"),  # soft cap, a window that fills up and rolls
    ("gpt_oss", "dynamic", "eager"),  # attention sinks, a window that leaves as a slice
    ("gpt_neo", "static", "eager"),  # where() with a finite fill: rows that see no key
    ("diffllama", "dynamic", "sdpa"),  # two cores over one cache
    ("flint", "static", "eager"),  # products of operands widened to float32
    ("bloom", "dynamic", "sdpa"),  # batch and heads in one dimension, a bias inside the product
    ("xglm", "static", "sdpa"),  # folded too, scores clamped from below
    ("jetmoe", "static", "sdpa"),  # KV heads repeated as tiles, a graph for each layer
    ("deepseek_v3", "static", "sdpa"),  # keys expanded from a cached latent
    ("hy_v4", "dynamic", "eager"),  # the same, with sinks and a mask of chosen keys
]
DENSE = [
    ("openai-gpt", "dynamic", "sdpa"),  # no cache
]


@pytest.fixture(autouse=True)
def _forgets():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("model", "cache", "attention"), REWRITTEN)
def test_every_site_is_rewritten_and_decodes_as_the_uncompiled_model(model, cache, attention):
    result = zoo.run_case(zoo.Case(model, cache, attention))
    sites = [site for graph in result["graphs"] for site in graph]
    assert result["status"] == "equal", result
    assert result["steps"]["sparse_steps"] >= zoo.STEPS and result["steps"]["dense_steps"] == 0
    assert sites and {site["outcome"] for site in sites} == {"sparse"}, sites
    assert result["dynamo"] == {name: result["plain"][name] for name in result["dynamo"]}


@pytest.mark.parametrize(("model", "cache", "attention"), DENSE)
def test_what_is_not_understood_stays_dense_with_a_reason_and_decodes_alike(
    model, cache, attention
):
    result = zoo.run_case(zoo.Case(model, cache, attention))
    sites = [site for graph in result["graphs"] for site in graph]
    assert result["status"] == "equal", result
    assert sites and all(site["outcome"] == "dense" and site["reason"] for site in sites)


def test_a_wrong_rewrite_is_told_from_a_model_that_differs_under_plain_dynamo(monkeypatch):
    import loki_compile.passes.sparse as sparse

    right = sparse.attend
    monkeypatch.setattr(sparse, "attend", lambda *args, **kwargs: right(*args, **kwargs) * 1.5)
    result = zoo.run_case(zoo.Case("gpt2", "dynamic", "sdpa", small=False))
    assert result["status"] == "differs"
    assert result["difference"] > zoo.TOLERANCE > result["plain"]["difference"]


def test_a_rewrite_that_fails_is_a_crash_although_decoding_goes_on_dense(monkeypatch):
    from loki_compile import variants

    def fail(*args):
        raise RuntimeError("no such form")

    monkeypatch.setattr(variants, "rewrite_sparse", fail)
    result = zoo.run_case(zoo.Case("gpt2", "static", "sdpa", small=False))
    assert result["status"] == "crashes" and "no such form" in result["error"]


def test_the_last_line_of_a_case_is_the_one_that_counts(tmp_path):
    record = tmp_path / "eager.jsonl"
    assert zoo.read_record(record) == {}
    lines = [
        {"key": "a", "small": True, "status": "crashes"},
        {"key": "b", "small": False},
        {"key": "a", "small": True, "status": "equal"},
    ]
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert zoo.read_record(record) == {"a": lines[2], "b": lines[1]}


def line(model: str, sites: list, **more) -> dict:
    """A line of the record, as `zoo.compact` makes it of a result."""
    case = zoo.Case(model, "static", "sdpa")
    graphs = [[{"outcome": outcome, "reason": why, "path": "x"} for outcome, why in sites]]
    counts = {"graphs": 2, "breaks": 0, "recompiles": 1}
    result = {"key": case.key, **vars(case), "status": "equal", "graphs": graphs, "trace": "long"}
    facts = {"dynamo": counts, "plain": counts, "revision": "abc", "versions": "torch 1"}
    return zoo.compact({**result, **facts, **more})


def test_a_line_of_the_record_counts_sites_and_drops_traces():
    row = line("ant", [("sparse", ""), ("dense", "wings"), ("sparse", "")], difference=0.123456)
    assert row["sites"] == [["dense", "wings", 1], ["sparse", "", 2]]
    assert row["difference"] == 0.12 and "trace" not in row and "graphs" not in row


def test_the_table_counts_outcomes_and_says_which_architectures_a_reason_costs():
    latent = Reason.LATENT.value.format(512, "a norm")
    results = [
        line("ant", [("sparse", ""), ("dense", latent)]),
        line("bee", [("dense", "its wings: 4")] * 2),
        line("cat", [("dense", latent)] * 2),
    ]
    text = zoo.table(results)
    assert (
        "| eager | static | sdpa | 3 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 3 | 3 | 0 | 1 | 3 | 0 |" in text
    )
    assert "| 1 | its wings | bee |" in text
    assert "| ant | 2 |  | 2 | 1 | 0 | 1 |" in text


def test_the_table_shows_graphs_that_plain_dynamo_does_not_need():
    graphs = {"graphs": 3, "breaks": 0, "recompiles": 2}
    text = zoo.table([line("ant", [("sparse", "")], dynamo=graphs), line("bee", [("sparse", "")])])
    assert "| 2 | 2 | 2 | 2 | 2 | 1 |" in text
    assert "| ant | 3 | 1 graphs, 1 recompiles |" in text
    assert "| bee | 2 |  |" in text


def test_a_case_that_outlasts_its_limit_is_no_crash():
    (result,) = zoo.run_cases([zoo.Case("gpt2", "static", "sdpa")], limit=0)
    assert result["status"] == "out of time" and result["error"] == "no result in 0 s"


def test_lines_without_a_run_behind_them_are_counted_and_run_again():
    old = line("ant", [("sparse", "")]) | {"from_table": True}
    new = line("bee", [("sparse", "")])
    assert " 1 of them were taken over" in zoo.table([old, new])
    cases = [zoo.Case(model, "static", "sdpa") for model in ("ant", "bee", "cat")]
    known = {row["key"]: row for row in (old, new)}
    assert [zoo._finished(case, known) for case in cases] == [False, True, False]
    less = {new["key"]: new | {"small": False}}
    assert not zoo._finished(cases[1], less), "the small budget was left out"


def test_records_of_other_versions_are_compared_by_outcome_and_not_by_numbers_of_sites():
    here = [line("ant", [("sparse", "")]), line("bee", [("sparse", "")])]
    there = [
        line("ant", [("sparse", "")] * 2, versions="torch 2", seconds=3),
        line("bee", [("dense", "wings")], versions="torch 2"),
        line("cat", [("sparse", "")], versions="torch 2"),  # not in the first record
    ]
    text = zoo.versions_table([here, there])
    assert "| torch 2 | torch 1 | 2 | 1 | 0 | 0 |" in text
    assert "| torch 2 | bee/static/sdpa/eager | equal; dense (wings) | equal; sparse |" in text
    assert "cat/" not in text and "ant/" not in text
