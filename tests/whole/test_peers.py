"""`tests/peers/run.py` tells what fails without us, through Dynamo alone, and through us."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

_FILE = Path(__file__).resolve().parent.parent / "peers" / "run.py"
_SPEC = importlib.util.spec_from_file_location("peers_run", _FILE)
peers = importlib.util.module_from_spec(_SPEC)
sys.modules["peers_run"] = peers
_SPEC.loader.exec_module(peers)

# A project with a decoder that keeps its cache in buffers, and tests of every kind.
_MODEL = """
import torch
from torch import nn

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 4, 20, 8))

    def forward(self, x, input_pos):
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.keys.index_copy_(2, input_pos, k)
        self.values.index_copy_(2, input_pos, v)
        seen = torch.arange(20) <= input_pos[:, None]
        out = nn.functional.scaled_dot_product_attention(q, self.keys, self.values, seen)
        return out.transpose(1, 2).flatten(2)
"""
_TESTS = """
import os
import pytest
import torch
from litgpt.model import GPT

def decode():
    x, model, whole = torch.randn(1, 12, 32), GPT(), GPT()
    with torch.no_grad():
        expected = whole(x, torch.arange(12))[:, 6:]
        model(x[:, :6], torch.arange(6))
        steps = [model(x[:, at : at + 1], torch.tensor([at])) for at in range(6, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)

def test_steps_equal_the_whole():
    decode()

def test_of_a_model_that_is_nowhere():
    raise OSError("no network")

def test_that_nobody_compiles():
    decode()
    assert not torch._dynamo.utils.counters["frames"]

def test_that_nobody_is_sparse():
    decode()
    assert not torch._dynamo.utils.counters["loki"]["sparse_steps"]

def test_that_takes_the_process_down():
    os._exit(3)

@pytest.mark.xfail
def test_that_is_known_to_fail():
    assert False

def test_behind_it():
    pass
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments of a run over a project of seven tests."""
    checkout = tmp_path / "checkout"
    (checkout / "litgpt").mkdir(parents=True)
    (checkout / "litgpt" / "__init__.py").touch()
    (checkout / "litgpt" / "model.py").write_text(_MODEL)
    (checkout / "test_all.py").write_text(_TESTS)
    suite = peers.Suite({"all": "test_all.py"}, decoders="litgpt", path=(".",))
    monkeypatch.setitem(peers.SUITES, "project", suite)
    monkeypatch.setattr(peers, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    return argparse.Namespace(
        suite="project", checkout=checkout, python=Path(sys.executable), parts=[],
        modes=["sparse", "nothing", "dynamo"], all=False, engine="eager", limit=120.0,
        revision="first", only=None,
    )  # fmt: skip


def test_a_failure_is_laid_at_the_door_of_who_causes_it(project, capsys, tmp_path):
    peers.run(project)
    lines = peers.read_record(tmp_path / "runs" / "project.jsonl")
    counts = peers.count(lines)
    assert {name: n for name, n in counts.items() if name.startswith("sparse: ") and n} == {
        "sparse: passed": 2,
        "sparse: failed without us": 2,  # no network, and the one that takes the process down
        "sparse: failed through Dynamo alone": 1,
        "sparse: failed": 1,
        "sparse: xfailed": 1,
    }
    assert counts["tests with sparse steps"] == 3 and counts["sparse steps"] == 3 * 6
    died = [line for line in lines if line["outcome"] == "died"]
    assert {line["test"] for line in died} == {"test_all.py::test_that_takes_the_process_down"}
    peers.report()
    text = (tmp_path / "peers.md").read_text()
    assert "| test_all.py::test_that_nobody_is_sparse | sparse |" in text
    assert text.count("**no reason known: a bug**") == 1
    assert json.loads((tmp_path / "peers.jsonl").read_text())["sparse: failed"] == 1

    capsys.readouterr()
    peers.run(project)
    assert "nothing left to run" in capsys.readouterr().out
    assert peers.read_record(tmp_path / "runs" / "project.jsonl") == lines


def test_a_suite_in_which_nothing_became_sparse_says_so():
    facts = {"suite": "s", "part": "p", "engine": "eager", "versions": "", "checkout": ""}
    line = {**facts, "commit": "", "mode": "sparse", "test": "t", "outcome": "passed"}
    assert "Nothing became sparse in this suite." in peers.table([{**line, "sparse_steps": 0}])
    assert "Nothing became sparse" not in peers.table([{**line, "sparse_steps": 1}])


def test_a_difference_has_the_reason_that_is_known_for_it(monkeypatch):
    facts = {"suite": "s", "part": "p", "engine": "eager", "versions": "", "checkout": ""}
    line = {**facts, "commit": "", "test": "file::test_x", "error": "1 != 2"}
    lines = [{**line, "mode": "sparse", "outcome": "failed"}]
    lines += [{**line, "mode": mode, "outcome": "passed"} for mode in ("nothing", "dynamo")]
    assert "no reason known" in peers.table(lines)
    monkeypatch.setitem(peers.REASONS, ("s", "test_x$"), "it asks for the bits of the scores.")
    text = peers.table(lines)
    assert "it asks for the bits of the scores." in text and "no reason known" not in text
