"""A pytest plugin that sends the decode steps of someone else's tests through a compiler.

    pytest -p through_loki --through sparse --decoders transformers --record lines.jsonl ...

A decode step is a call of a decoder that is given a cache with tokens in it (`DECODERS` says how
that looks in each library); it runs as it does after `model.compile(backend="loki")`, without
gradients. A `torch.compile` of the tests' own that asks for Inductor gets the same backend.
Prefill and training stay uncompiled. With `--engine eager` Inductor is used nowhere, also not
`--through nothing`: compiled graphs run node by node, which is quick to start.

Each finished test is a line of the record, with what was rewritten while it ran. Tests that the
record already has are not run again, and a test that took the process down is not tried twice.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# What `--through` names: options of the backend; None is no compiler, {} Dynamo alone.
MODES: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "dynamo": {},
    "identity": {"top_k": 1.0},
    "sparse": {"top_k": 1.0, "min_context": 0},
}
# Graphs for each function: tests build many models of one class, and one graph is for one model.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Decoder:
    """Classes whose calls may be decode steps, as "module:name", and which of them are."""

    classes: tuple[str, ...]
    steps: Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], bool]


def _has_filled_cache(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    past = kwargs.get("past_key_values")
    if module.training or not hasattr(past, "get_seq_length"):
        return False
    try:
        return int(past.get_seq_length()) > 0
    except (ValueError, TypeError, IndexError, AttributeError):  # no layer of it is attention
        return False


def _is_given_cache(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("cache") is not None


def _is_past_start(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    positions = kwargs.get("input_pos", args[1] if len(args) > 1 else None)
    return isinstance(positions, torch.Tensor) and bool((positions > 0).all())


DECODERS = {
    "transformers": Decoder(("transformers:PreTrainedModel",), _has_filled_cache),
    "x_transformers": Decoder(
        ("x_transformers:TransformerWrapper", "x_transformers:ContinuousTransformerWrapper"),
        _is_given_cache,
    ),
    "litgpt": Decoder(("litgpt.model:GPT",), _is_past_start),
}

# ------------------------------------------------------------------------------------- the calls

_compiled: weakref.WeakKeyDictionary[torch.nn.Module, Callable[..., Any]] = (
    weakref.WeakKeyDictionary()
)
_inside = threading.local()
_steps = Counter[str]()
_torch_compile = torch.compile


def _backend(mode: str, engine: str) -> Callable[..., Any] | str:
    options = MODES[mode]
    if not options:
        return engine
    from loki_compile import backend, engines

    compiler = engines.interpreter if engine == "eager" else engines.inductor

    def loki(gm: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        return backend.loki(gm, inputs, options=dict(options), engine=compiler)

    return loki


def _install(mode: str, engine: str, decoders: Decoder) -> None:
    backend = _backend(mode, engine)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Where `Module.compile` puts the compiled call: tracing and hooks are as they are there.
        if torch.compiler.is_compiling():
            return self._call_impl(*args, **kwargs)
        if getattr(_inside, "step", False) or not decoders.steps(self, args, kwargs):
            return self._call_impl(*args, **kwargs)
        if self not in _compiled:
            _compiled[self] = _torch_compile(self._call_impl, backend=backend)
        _steps["compiled"] += 1
        _inside.step = True
        try:
            with torch.no_grad():
                return _compiled[self](*args, **kwargs)
        finally:
            _inside.step = False

    def compile(model: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("backend", "inductor") == "inductor":
            kwargs = {**kwargs, "backend": backend, "mode": None, "options": None}
            _steps["own"] += 1
        return _torch_compile(model, **kwargs)

    torch.compile = compile  # type: ignore[assignment]
    if MODES[mode] is None:
        return
    for name in decoders.classes:
        module, _, cls = name.partition(":")
        getattr(importlib.import_module(module), cls)._compiled_call_impl = call


# ----------------------------------------------------------------------------------- the record


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Recorder:
    """Writes a line when a test starts, and one with its outcome when it is over."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self.mode = mode
        self.began = 0.0
        self.outcome: dict[str, str] = {}
        self.heard = _Warnings()
        logging.getLogger("loki_compile").addHandler(self.heard)

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps({"mode": self.mode, **line}) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        finished = set()
        if self.path.exists():
            lines = map(json.loads, self.path.read_text().splitlines())
            finished = {line["test"] for line in lines if line["mode"] == self.mode}
        wanted = config.getoption("--those-in")
        names = set(Path(wanted).read_text().splitlines()) if wanted else None
        kept = [
            item
            for item in items
            if item.nodeid not in finished and (names is None or item.nodeid in names)
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.write({"test": item.nodeid, "outcome": "died"})
        self.outcome = {"outcome": "passed"}
        self.heard.lines.clear()
        _steps.clear()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if MODES[self.mode]:
            from loki_compile.counts import reset_stats
            from loki_compile.report import clear_reports

            clear_reports()
            reset_stats()
        self.began = time.monotonic()
        result = yield
        self.write({"test": item.nodeid, **self.outcome, **self.measured()})
        _compiled.clear()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed:
            return
        text = report.longreprtext
        if report.skipped:
            outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
            self.outcome = {"outcome": outcome, "error": text[-300:]}
        elif self.outcome["outcome"] != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else text.strip().splitlines()[-1]
            error = " ".join(message.split())[:300]
            self.outcome = {"outcome": "failed", "error": error, "trace": text[-6000:]}

    def measured(self) -> dict[str, Any]:
        """Seconds, decode steps that were compiled, and what the backend did in them."""
        counters = torch._dynamo.utils.counters
        line = {
            "seconds": round(time.monotonic() - self.began, 2),
            "compiled_steps": _steps["compiled"],
            "own_compiles": _steps["own"],
            "breaks": sum(counters["graph_break"].values()),
        }
        if not MODES[self.mode]:
            return line
        from loki_compile.counts import stats
        from loki_compile.report import reports

        sites = [site for graph in reports() for site in graph.sites]
        reasons = Counter(site.reason for site in sites if site.outcome == "dense")
        return {
            **line,
            **{name: stats()[name] for name in ("sparse_steps", "dense_steps", "rebuilds")},
            "sites": dict(Counter(site.outcome for site in sites)),
            "reasons": dict(reasons),
            "warnings": sorted(set(self.heard.lines)),
        }


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("through_loki")
    group.addoption("--through", choices=MODES, required=True, help="which compiler, how")
    group.addoption("--engine", choices=("eager", "inductor"), default="eager")
    group.addoption("--decoders", choices=DECODERS, required=True, help="whose calls are compiled")
    group.addoption("--record", required=True, help="the file of lines to add to")
    group.addoption("--those-in", help="a file of test ids, to run no others")


def pytest_configure(config: pytest.Config) -> None:
    mode = config.getoption("--through")
    os.environ.setdefault("LOKI_HOME", str(Path(config.getoption("--record")).parent / "bases"))
    _install(mode, config.getoption("--engine"), DECODERS[config.getoption("--decoders")])
    config.pluginmanager.register(Recorder(Path(config.getoption("--record")), mode))
