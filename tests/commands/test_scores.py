"""Results of `loki eval`: kept row by row, gone on with, and summed up over what all have."""

import json
import math

import pytest

from loki_compile.commands.scores import (
    RECORDS,
    Records,
    interval,
    markdown,
    spread,
    summary,
    write_results,
)

RUN = {"model": "m", "engine": "nodes"}
DAMAGED = '{"run": {"model": "m", "engine": "nodes"}}\n{}\n'


def text_row(setting, case="a", nats=2.0, **more):
    row = {"case": case, "task": "text t", "length": 90, "depth": None, "protocol": "text"}
    return row | {"setting": setting, "tokens": 10, "nats": nats, "kl": 0.1, "same": 0.9} | more


def task_row(setting, case, score):
    row = {"case": case, "task": "single", "length": 90, "depth": None, "protocol": "sparse"}
    return row | {"setting": setting, "score": score, "same": 0.5, "generated": 7}


def test_a_run_goes_on_where_it_was_stopped_in_the_middle_of_a_line(tmp_path):
    first = Records(tmp_path, RUN)
    first.add(text_row("dense"))
    with (tmp_path / RECORDS).open("a") as file:
        file.write('{"case": "a", "proto')
    again = Records(tmp_path, RUN)
    assert again.rows == first.rows
    assert again.has("a", "text", "dense") and not again.has("a", "text", "loki")
    again.add(text_row("loki"))
    assert Records(tmp_path, RUN).rows == again.rows
    assert [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]


@pytest.mark.parametrize("content", ["", "{}\n", "words\n", '{"run": 3}\n', "[1]\n", DAMAGED])
def test_a_file_that_holds_no_results_is_refused(tmp_path, content):
    (tmp_path / RECORDS).write_text(content)
    with pytest.raises(ValueError, match="holds no results of `loki eval`; needed an empty --out"):
        Records(tmp_path, RUN)
    assert (tmp_path / RECORDS).read_text() == content


def test_results_of_another_run_are_refused(tmp_path):
    Records(tmp_path, RUN)
    with pytest.raises(ValueError, match=r"engine='nodes', and this run has 'inductor': name"):
        Records(tmp_path, {**RUN, "engine": "inductor"})


def test_settings_are_compared_over_the_cases_that_all_have():
    rows = [text_row("dense", "a", 2.0), text_row("loki", "a", 2.5)]
    rows += [text_row("dense", "b", 9.0)]  # the other had no time for it
    dense, loki = summary(rows, ["loki", "never run"])
    assert dense["perplexity"] == pytest.approx(math.exp(2.0)) and dense["change"] == 0
    assert loki["change"] == pytest.approx(math.exp(0.5) - 1)
    assert loki["cases"] == "1 of 2"


def test_tasks_are_counted_against_dense_prompt_by_prompt():
    rows = [task_row("dense", c, s) for c, s in (("a", 1.0), ("b", 0.0), ("c", 1.0))]
    rows += [task_row("loki", c, s) for c, s in (("a", 0.5), ("b", 1.0), ("c", 1.0))]
    found = summary(rows, ["loki"])[1]["sparse"]
    assert found["score"] == pytest.approx(2.5 / 3) and found["prompts"] == 3
    assert (found["better"], found["worse"]) == (1, 1)
    assert found["tasks"] == {"single": pytest.approx(2.5 / 3)}


def test_recall_prompts_are_no_text():
    rows = [text_row(name, "a", 2.0) for name in ("dense", "loki")]
    rows += [text_row(name, "r", 7.0, score=0.5, asked=32) for name in ("dense", "loki")]
    found = summary(rows, ["loki"])[1]
    assert found["tokens"] == 10 and found["perplexity"] == pytest.approx(math.exp(2.0))
    assert found["text"]["score"] == 0.5
    assert found["text"]["interval"] == interval(0.5, 32)  # of questions


def test_an_interval_is_wilsons():
    low, high = interval(0.8, 10)  # Wilson's score interval of 8 of 10
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert interval(1.0, 1)[0] == pytest.approx(0.2065, abs=1e-4)
    assert interval(0.0, 0) == (0.0, 1.0)


def test_a_spread_needs_three_pieces():
    assert spread([1.0, 2.0]) is None
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(4.30 / math.sqrt(3))


def test_all_files_hold_the_same_table(tmp_path):
    rows = [text_row("dense"), text_row("loki", missed=0.25)]
    rows += [task_row(name, "b", 1.0) for name in ("dense", "loki")]
    found = summary(rows, ["loki"])
    write_results(tmp_path, RUN, rows, found)
    table = (tmp_path / "results.md").read_text()
    assert table == markdown(found)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| loki | 7.3891 | +0.00% |" in table
    assert json.loads((tmp_path / "results.json").read_text())["run"] == RUN
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5
