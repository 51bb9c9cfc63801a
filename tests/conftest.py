"""What every test relies on: the installed package, seeds that are printed, an own basis store."""

import contextlib
import gc
import importlib.util
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tally
import torch
from hypothesis import HealthCheck, settings
from toy_capture import clear_runtime, interpret

from loki_compile import backend
from loki_compile.counts import stats
from loki_compile.engines import default_engine

ROOT = Path(__file__).resolve().parent.parent

# With the root on the path, `import kernels` would find our folder instead of Hugging Face's
# package of that name (`python -m pytest` and `pythonpath = .` put it there).
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
_found = importlib.util.find_spec("kernels")
if _found is not None and Path(_found.origin or "").is_relative_to(ROOT):
    raise RuntimeError(f"`import kernels` finds {_found.origin}: take {ROOT} off sys.path")

SEED = int(os.environ.get("LOKI_TEST_SEED", "20240601"))


# The default is bounded for every change; `make soak` takes "soak" and prints what it tried;
# `make coverage` takes "brief".
_PROFILE = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("bounded", _PROFILE, max_examples=50, stateful_step_count=15)
settings.register_profile("brief", _PROFILE, max_examples=10, stateful_step_count=15)
settings.register_profile(
    "soak",
    _PROFILE,
    max_examples=int(os.environ.get("LOKI_SOAK_CASES", "3000")),
    stateful_step_count=60,
)
settings.load_profile("bounded")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draws hypothesis' seed here, so that the header can show it.

    A change is judged by the same cases as the one before it; `make soak` looks for new ones.
    """
    if config.option.hypothesis_seed is None:
        soak = config.option.hypothesis_profile == "soak"
        seed = random.SystemRandom().randrange(2**32) if soak else SEED
        config.option.hypothesis_seed = str(seed)


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"seed {SEED} (set LOKI_TEST_SEED for another), torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        f"generated cases: --hypothesis-seed={config.option.hypothesis_seed} repeats them",
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands its counts to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["generated"] = dict(tally.counts)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is never collected is told as a leak by those who made it


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    tally.counts.update(getattr(node, "workeroutput", {}).get("generated", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = tally.counts.copy()
    if terminalreporter.config.getoption("--hypothesis-profile") == "soak":
        counts += tally.recorded(ROOT / "benchmarks/results")
    if counts:
        terminalreporter.section("generated cases")
        width = max(map(len, counts))
        for clause, number in sorted(counts.items()):
            terminalreporter.write_line(f"{clause:<{width}}  {number:>9}")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test; the number is shown where the test fails."""
    print(f"seed {SEED}")
    random.seed(SEED)
    np.random.seed(SEED % 2**32)
    torch.manual_seed(SEED)
    return SEED


_searched_before = 0.0


@pytest.fixture(autouse=True)
def _no_indexes_left():
    """Caches of transformers lie in cycles: what a test leaves is no other's to count.

    A million objects of torch, transformers and what they have compiled live as long as the
    process: now and then they are taken out of what each collection would search again, which was
    a quarter of these tests' time.
    """
    global _searched_before
    if time.monotonic() > _searched_before + 10:
        gc.collect()
        gc.freeze()
        _searched_before = time.monotonic()
    yield
    if stats()["index_bytes"]:
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory):
    """Keeps the user's stored bases out of the tests, and the tests' out of the user's store."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LOKI_HOME", str(tmp_path_factory.mktemp("loki_home")))
    yield
    patch.undo()


@pytest.fixture
def fresh() -> None:
    """Nothing is compiled, counted or fitted yet."""
    torch._dynamo.reset()
    clear_runtime()


@pytest.fixture
def use_engine():
    """Sets what compiles the graphs of this test; the last one that was set holds."""
    with contextlib.ExitStack() as stack:
        yield lambda engine: stack.enter_context(default_engine(engine))


@pytest.fixture
def compiled_at_once(monkeypatch):
    """Prefills and first steps go to the engine at their first call, as all else does."""
    monkeypatch.setattr(backend, "is_called_once", lambda *_: False)


@pytest.fixture
def interpreted(use_engine):
    """An interpreter in Inductor's place; the graphs that Inductor would have compiled."""
    return interpret(use_engine)
