"""What is installed: the wheel holds the tree's files, and PyTorch finds the backend by name."""

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALLED = {
    "loki_compile": "loki_compile",
    "loki_compile/commands": "loki_compile/commands",
    "loki_compile/policies": "loki_compile/policies",
    "loki_compile/generation": "loki_compile/generation",
    "passes": "loki_compile/passes",
    "kernels": "loki_compile/kernels",
    "pca_store": "loki_compile/pca_store",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel built from a copy, so that no build/ appears in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    for name in (*(name for name in INSTALLED if "/" not in name), "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--wheel-dir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_module_of_the_tree_and_no_other(wheel):
    tree = {
        f"{target}/{path.name}"
        for folder, target in INSTALLED.items()
        for path in (ROOT / folder).glob("*.py")
    }
    assert {name for name in wheel if name.endswith(".py")} == tree


def test_the_wheel_holds_what_modules_read(wheel):
    kernels = {
        f"loki_compile/kernels/{path.name}"
        for path in (ROOT / "kernels").iterdir()
        if path.is_file() and path.suffix != ".py"
    }
    model = {
        f"loki_compile/reference_model/{p.name}"
        for p in (ROOT / "loki_compile" / "reference_model").iterdir()
    }
    assert kernels | model | {"loki_compile/py.typed"} <= set(wheel)


def test_the_wheel_carries_the_licence(wheel):
    assert [name for name in wheel if name.endswith("licenses/LICENSE")]


def test_torch_finds_the_backend_by_name():
    from torch._dynamo.backends.registry import lookup_backend

    from loki_compile.backend import loki

    assert lookup_backend("loki") is loki


def test_the_console_script_is_the_command_line():
    (script,) = metadata.entry_points(group="console_scripts", name="loki")
    assert script.value == "loki_compile.commands.main:main"
    assert callable(script.load())


@pytest.mark.parametrize("module", ["loki_compile", "loki_compile.backend"])
def test_importing_the_package_brings_no_model_library(module):
    code = (
        f"import {module}, sys; "
        "print([m for m in ('transformers', 'matplotlib', 'rich', 'click') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home()
    )
    assert done.stdout.strip() == "[]"
