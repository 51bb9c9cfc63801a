"""Which room may import what (the table in CONTRIBUTING.md), and what rooms may not mention."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Folder -> import prefixes allowed besides the standard library.
ROOMS = {
    "kernels": ("torch", "triton", "loki_compile.kernels"),
    "pca_store": ("torch", "numpy", "safetensors", "huggingface_hub", "loki_compile.pca_store"),
    "passes": (
        "torch",
        "loki_compile.passes",
        *(
            f"loki_compile.kernels.{name}"
            for name in (
                "budget",
                "fused",
                "kept",
                "masks",
                "moments",
                "ops",
                "positions",
                "row_products",
                "span_prefill",
                "spans",
            )
        ),
    ),
    "loki_compile/policies": (
        "torch",
        "loki_compile.config",
        "loki_compile.passes",
        "loki_compile.kernels",
        "loki_compile.policies",
    ),
    "loki_compile": ("torch", "loki_compile"),
    # Around decode loops: knows caches of transformers by what they can do, and has one.
    "loki_compile/generation": ("torch", "transformers", "loki_compile"),
    # Above all others: what the command line alone needs, transformers above all.
    "loki_compile/commands": (
        "torch",
        "numpy",
        "click",
        "rich",
        "matplotlib",
        "lm_eval",
        "scipy",
        "transformers",
        "huggingface_hub",
        "loki_compile",
    ),
}
COMMANDS = "loki_compile/commands"
# What `loki --help` imports: every command, and what they share.
WITHOUT_TORCH = {"main", "options", "output"}
# Names of ours with a leading underscore that tests reach for: faults that come from outside a
# process, for which there is no public place.
PRIVATE_IN_TESTS = {
    "loki_compile.kernels.cpu._kernels",
    "loki_compile.kernels.cpu_build._FLAGS",
    "loki_compile.kernels.cpu_build._SOURCES",
    "loki_compile.kernels.cpu_build._cache_folder",
    "loki_compile.kernels.cpu_build._compiler",
    "loki_compile.kernels.ops.select._schema",
    "loki_compile.pca_store.attention_fit._loss",
}
HEAVY = ("transformers", "matplotlib", "scipy", "huggingface_hub")
# The file that is a cache of transformers, imported by whoever asks for one.
OF_TRANSFORMERS = ROOT / "loki_compile/generation/span_cache.py"
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
FAMILIES = (
    "llama|qwen|mistral|mixtral|gemma|gpt|falcon|phi[0-9]|bloom|bert|deepseek|olmo|cohere|granite"
    "|glm|neox|starcoder|pythia|transformers"
)


def imports(tree):
    """(module, line, inside a function) of every import statement."""
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno, id(node) in inside


def dotted(node, bound):
    """The full name of `a.b.c` where `a` is one of the names in `bound`, else ""."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, "")
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, bound)
        return start and f"{start}.{node.attr}"
    return ""


def private_names(tree):
    """(full name, line) of every name of the package with a leading underscore that is reached."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_within(alias.name, ("loki_compile",)):
                    bound[alias.asname or "loki_compile"] = (
                        alias.name if alias.asname else "loki_compile"
                    )
        elif isinstance(node, ast.ImportFrom) and is_within(node.module or "", ("loki_compile",)):
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    reached = [(name, 0) for name in bound.values()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            reached.append((dotted(node, bound), node.lineno))
        elif isinstance(node, ast.Call):  # setattr(module, "_name", ...), getattr, delattr
            for owner, name in zip(node.args, node.args[1:], strict=False):
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    start = dotted(owner, bound)
                    reached.append((start and f"{start}.{name.value}", node.lineno))
    for name, line in reached:
        last = name.rpartition(".")[2]
        if last.startswith("_") and not last.startswith("__"):
            yield name, line


def is_within(module, prefixes):
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def named(path):
    return str(path.relative_to(ROOT))


def room_of(path):
    return path.parent.relative_to(ROOT).as_posix()


def test_there_are_files_to_look_at():
    assert {room_of(path) for path in FILES} == set(ROOMS)
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_room_imports_only_what_the_table_allows(path):
    allowed = ROOMS[room_of(path)]
    for module, line, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        standard = module.partition(".")[0] in sys.stdlib_module_names
        assert standard or is_within(module, allowed), f"{named(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_what_is_heavy_is_imported_where_it_is_used(path):
    for module, line, in_function in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if path == OF_TRANSFORMERS and is_within(module, ("transformers",)):
            continue
        assert room_of(path) == COMMANDS or not is_within(module, ("transformers",)), named(path)
        if is_within(module, HEAVY):
            assert in_function, f"{named(path)}:{line} imports {module} when it is imported"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) != COMMANDS], ids=named)
def test_nothing_stands_on_the_command_line(path):
    for module, line, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert not is_within(module, ("loki_compile.commands",)), f"{named(path)}:{line}"


def test_commands_and_what_lists_bases_need_no_torch():
    code = (
        "import importlib, sys\n"
        "from loki_compile.commands.main import COMMANDS\n"
        f"for name in {sorted(WITHOUT_TORCH)} + list(COMMANDS.values()):\n"
        "    importlib.import_module(f'loki_compile.commands.{name}')\n"
        "print(sorted({'torch', 'numpy', *" + str(HEAVY) + "} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "loki_compile"])
def test_init_of_a_room_holds_a_docstring_only(room):
    # A stray `import kernels` from the root would otherwise register every op a second time.
    body = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0].value.value, str)


def arrows(room):
    """File -> the files of the same room that it imports, those for a type checker left out."""
    package = "loki_compile" if room == "loki_compile" else f"loki_compile.{room}"
    files = {path.stem: path for path in sorted((ROOT / room).glob("*.py"))}
    drawn = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        unseen = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for child in ast.walk(node)
        }
        reached = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in unseen:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                reached.update([node.module, *names])
            elif isinstance(node, ast.Import) and id(node) not in unseen:
                reached.update(alias.name for alias in node.names)
        drawn[name] = {
            other for other in files if f"{package}.{other}" in reached and other != name
        }
    return drawn


def circle_in(drawn):
    """The files of a circle of arrows, () where there is none."""
    left = dict(drawn)
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        if not free:
            return tuple(left)
        for name in free:
            del left[name]
    return ()


def printed(room, drawn):
    count, pairs = sum(map(len, drawn.values())), len(drawn) * (len(drawn) - 1) // 2
    print(f"{room}: {len(drawn)} files, {count} arrows, {count / pairs:.0%} of all pairs")
    for name, others in drawn.items():
        print(f"  {name:14} {' '.join(sorted(others))}")


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_imports_itself_by_way_of_others(room):
    drawn = arrows(room)
    printed(room, drawn)
    assert not circle_in(drawn)


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ("a", "b", "c")
    assert not circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def mapped():
    """The files that the docstring of passes/ lists, in order."""
    docstring = ast.get_docstring(ast.parse((ROOT / "passes" / "__init__.py").read_text()))
    return re.findall(r"(?m)^    (\w+) +\w", docstring)


def test_passes_map_every_file_in_the_order_of_imports():
    drawn, order = arrows("passes"), mapped()
    assert sorted([*order, "__init__"]) == sorted(drawn)
    printed("passes", {name: drawn[name] for name in order})
    for name, others in drawn.items():
        below = [other for other in others if order.index(other) > order.index(name)]
        assert not below, f"passes/{name}.py imports {below}, which the map lists behind it"


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=named)
def test_passes_import_nothing_inside_functions(path):
    inside = [
        f"{named(path)}:{line} {module}"
        for module, line, in_function in imports(ast.parse(path.read_text(encoding="utf-8")))
        if in_function
    ]
    assert not inside


TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))


def test_tests_and_benchmarks_reach_for_no_private_name():
    reached = {
        f"{named(path)}:{line} {name}": name
        for path in TESTS
        for name, line in private_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not [place for place, name in reached.items() if name not in PRIVATE_IN_TESTS]
    assert set(reached.values()) == PRIVATE_IN_TESTS, "what is not reached any more is not listed"


def test_a_private_name_is_found_however_it_is_reached():
    spelled = {
        "from loki_compile.backend import _a": "loki_compile.backend._a",
        "from loki_compile import runtime\nruntime._a.b()": "loki_compile.runtime._a",
        "from loki_compile import runtime as r\nr.A._a": "loki_compile.runtime.A._a",
        "import loki_compile.backend\nloki_compile.backend._a = 1": "loki_compile.backend._a",
        "import loki_compile.backend as b\npatch.setattr(b, '_a', 1)": "loki_compile.backend._a",
        "from loki_compile import runtime\ngetattr(runtime, '_a')": "loki_compile.runtime._a",
    }
    for text, name in spelled.items():
        assert {found for found, _ in private_names(ast.parse(text))} == {name}, text
    for text in ("import torch\ntorch._a", "from loki_compile import runtime\nruntime.__file__"):
        assert not list(private_names(ast.parse(text)))


@pytest.mark.parametrize("room", ROOMS)
def test_a_folder_of_code_is_a_room(room):
    found = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / room).rglob("*.py")}
    assert found <= set(ROOMS)


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=named)
def test_passes_know_no_model(path):
    found = re.findall(rf"(?i)\b\w*(?:{FAMILIES})\w*", path.read_text(encoding="utf-8"))
    assert not found


def test_every_reason_to_stay_dense_is_documented():
    from loki_compile.passes.attention import Reason

    sections = re.findall(r"(?m)^### (\w+)$", (ROOT / "docs" / "coverage.md").read_text())
    assert sorted(sections) == sorted(reason.name for reason in Reason)


PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "tests/*.md", "tests/peers/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_page_points_to_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    assert not [x for x in links if "://" not in x and not (page.parent / x).exists()]
    if page == ROOT / "tests" / "README.md":
        assert not [
            x for x in re.findall(r"`(\w+/test_\w+\.py)", text) if not (page.parent / x).exists()
        ]


def options_in(page):
    """The default of each option in a page's table."""
    return dict(re.findall(r"(?m)^\| `(\w+)` \| `(.+?)` \|", (ROOT / page).read_text()))


def test_the_page_of_options_lists_every_one_with_its_default():
    import dataclasses

    from loki_compile.config import LokiConfig

    default = LokiConfig()
    shown = {
        field.name: str(value).replace("'", '"') if not isinstance(value, str) else f'"{value}"'
        for field in dataclasses.fields(LokiConfig)
        for value in [getattr(default, field.name)]
    }
    assert options_in("docs/options.md") == shown
    few = options_in("README.md")
    assert "top_k" in few and few.items() <= shown.items()


def test_the_page_of_options_lists_every_policy():
    from loki_compile.policies.kinds import PLANS, RANKINGS

    text = (ROOT / "docs" / "options.md").read_text()
    assert sorted(re.findall(r'(?m)^\| `"(\w+)"` \|', text)) == sorted(RANKINGS)
    assert all(f'`"{name}"`' in text for name in PLANS)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 480


def long_functions(text, most=50):
    """(name, lines) of each function of more lines than that, its docstring among them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > most:
                yield node.name, lines


def test_few_functions_are_long():
    found = [
        f"{named(path)} {name}: {lines} lines"
        for path in FILES
        for name, lines in long_functions(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(found))
    assert len(found) < 9, "split one of these: " + ", ".join(found)


def test_a_long_function_is_found():
    text = "class A:\n    @cache\n    def b(self):\n" + "        x = 1\n" * 50
    assert list(long_functions(text)) == [("b", 51)]
    assert not list(long_functions(text, most=51))


def test_what_runs_at_each_step_knows_no_graph():
    for name in ("runtime", "fast_path", "step_indexes", "setbacks", "indexes", "index_record"):
        path = ROOT / "loki_compile" / f"{name}.py"
        for module, line, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            assert not is_within(module, ("torch.fx",)), f"{named(path)}:{line} imports {module}"
            assert module != "torch" or "fx." not in path.read_text(encoding="utf-8"), named(path)
