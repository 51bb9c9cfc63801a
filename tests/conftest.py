"""What every test relies on: the installed package, seeds that are printed, an own basis store."""

import importlib.util
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# With the root on the path, `import kernels` would find our folder instead of Hugging Face's
# package of that name (`python -m pytest` and `pythonpath = .` put it there).
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
_found = importlib.util.find_spec("kernels")
if _found is not None and Path(_found.origin or "").is_relative_to(ROOT):
    raise RuntimeError(f"`import kernels` finds {_found.origin}: take {ROOT} off sys.path")

SEED = int(os.environ.get("LOKI_TEST_SEED", "20240601"))


def pytest_report_header() -> str:
    return (
        f"seed {SEED} (set LOKI_TEST_SEED for another), torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test; the number is shown where the test fails."""
    print(f"seed {SEED}")
    random.seed(SEED)
    np.random.seed(SEED % 2**32)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory):
    """Keeps the user's stored bases out of the tests, and the tests' out of the user's store."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LOKI_HOME", str(tmp_path_factory.mktemp("loki_home")))
    yield
    patch.undo()
