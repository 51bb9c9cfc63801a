"""Mutation testing: small changes to one source file, each of which some test should notice.

    python tests/mutants.py passes/plan.py --sample 30 --seed 0

The changes are cosmic-ray's. Every mutant is tested in a fork of one process that has imported
PyTorch already, by the tests that `ORACLES` names for its file; the mutated source takes the place
of the file at import, and nothing on disk changes. What only a type checker sees (annotations) is
left out. One line of JSON for each mutant goes to `build/mutants/FILE.jsonl`; those that are there
are not run again. tests/MUTANTS.md explains the survivors.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import difflib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # of CPU time, for one mutant

# The fastest tests that know a file, by test file, class or test; the first failure ends a run.
STORE = "pca_store::Test"
SHORT_HEADER = "pca_store::test_a_header_that_reaches_behind_the_end_is_said_to_claim_too_much"
LATENT_ROWS = "latent::test_attention_over_the_cached_rows_is_attention_over_what_they_expand_to"
LATENT_BASES = "latent::test_calibration_sees_the_rows_that_decoding_ranks"
LATENT_FORMS = (
    "latent::test_the_maps_of_the_heads_are_found_in_the_weight",
    LATENT_ROWS,
    "latent::test_what_is_not_that_form_stays_bit_for_bit",
    "latent::test_odd_latents_are_right_and_dense_unless_understood",
)
FLEX_FORMS = (
    "flex::test_the_cap_and_the_scale_are_read",
    "flex::test_a_scale_of_the_number_of_keys_is_not_read",
    "flex::test_a_flex_call_is_the_same_core",
    "flex::test_another_flex_call_stays_as_it_is_and_says_why",
    "flex::test_a_rule_of_other_steps_stays_as_it_is_and_says_why",
)
ORACLES = {
    "passes/attention.py": ("sites", "plan", LATENT_ROWS),
    "passes/caches.py": ("cache_writes", "rewrite"),
    "passes/views.py": ("views", "cache_writes", "sites", "odd_spellings"),
    "passes/heads.py": ("views", "sites", "odd_spellings"),
    "passes/sdpa.py": ("sites", "odd_spellings"),
    "passes/score_steps.py": ("sites", "odd_spellings"),
    "passes/written_out.py": ("sites", "odd_spellings"),
    "passes/write_forms.py": ("cache_writes", "odd_spellings"),
    "passes/trace_caches.py": ("cache_writes", "odd_spellings"),
    "passes/flex.py": FLEX_FORMS,
    "passes/flash.py": ("flash",),
    "passes/calls.py": ("graphs", "normalize", "cache_writes", "rollback"),
    "passes/graphs.py": ("graphs", "cache_writes", "rollback"),
    "passes/latent.py": LATENT_FORMS,
    "passes/normalize.py": ("normalize", "sites"),
    "passes/shared_caches.py": ("shared_tensors", "shared_properties"),
    "passes/products.py": ("sites", "odd_spellings"),
    "passes/plan.py": ("plan", "config"),
    "passes/emit.py": ("rewrite", LATENT_ROWS, LATENT_BASES, "sites"),
    "passes/dense.py": ("rewrite",),
    "passes/mirror.py": ("rewrite", LATENT_ROWS),
    "passes/masks.py": ("masks", "rewrite"),
    "passes/sparse.py": ("rewrite", LATENT_ROWS),
    "passes/rotary.py": ("rotary",),
    "passes/sites.py": ("sites", "odd_spellings"),
    "passes/rollback.py": ("rollback",),
    "loki_compile/runtime.py": ("runtime", "faults"),
    "loki_compile/fast_path.py": ("runtime", "faults"),
    "loki_compile/step_indexes.py": ("runtime", "faults"),
    "loki_compile/setbacks.py": ("faults",),
    "kernels/masks.py": ("masks", "ops"),
    "kernels/fused.py": ("masks", "ops", LATENT_ROWS, LATENT_BASES, "rewrite"),
    "kernels/reference.py": ("ops", "rewrite"),
    "pca_store/attention_fit.py": ("attention_fit",),
    "pca_store/basis.py": (f"{STORE}Basis", f"{STORE}BasisSet", f"{STORE}Pca"),
    "pca_store/basis_file.py": (f"{STORE}FileFormat", f"{STORE}FileNames", SHORT_HEADER),
    "pca_store/basis_header.py": (f"{STORE}FileFormat", f"{STORE}FileNames", SHORT_HEADER),
    "pca_store/metadata.py": (f"{STORE}FileFormat", f"{STORE}BasisSet"),
    "pca_store/covariance.py": (f"{STORE}KeyCovariance", f"{STORE}ScoreOptimal", f"{STORE}Ordered"),
    "pca_store/fingerprint.py": (f"{STORE}Fingerprint",),
    "pca_store/store.py": (
        f"{STORE}Lookup",
        f"{STORE}Hub",
        f"{STORE}FileNames",
        f"{STORE}Durability",
    ),
}
# Operators that make names of other names: nearly all of them raise at once.
LEFT_OUT = ("VariableReplacer", "VariableInserter")


def module_of(file: str) -> str:
    """The name that a source file is imported by."""
    name = file.removesuffix(".py").replace("/", ".")
    return name if name.startswith("loki_compile.") else f"loki_compile.{name}"


def places_of(source: str) -> list[tuple[str, int]]:
    """Every change that can be made: an operator, and which of its places in the source."""
    nodes = list(ast_nodes(get_ast(source)))
    places = []
    for name in sorted(cosmic_ray.plugins.operator_names()):
        if not any(part in name for part in LEFT_OUT):
            operator = cosmic_ray.plugins.get_operator(name)()
            count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
            places += [(name, occurrence) for occurrence in range(count)]
    return places


def sample(source: str, size: int | None, seed: int) -> Iterator[tuple[str, str]]:
    """Names of changes and mutated sources, each another program than the rest."""
    places = places_of(source)
    random.Random(seed).shuffle(places)
    seen = {meaning(source)}
    for name, occurrence in places:
        if size is not None and len(seen) > size:
            return
        mutated = mutate_code(source, cosmic_ray.plugins.get_operator(name)(), occurrence)
        assert mutated is not None
        with contextlib.suppress(SyntaxError):
            if (what := meaning(mutated)) not in seen:
                seen.add(what)
                yield f"{name.removeprefix('core/')} {occurrence}", mutated


def meaning(source: str) -> str:
    """The program without its annotations."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(value=None)
    return ast.dump(tree)


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one module from another source."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_source(self, name):
        return self.source

    def exec_module(self, module):
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def survives(file: str, source: str) -> str:
    """ "survived", "killed", or "timeout": what the tests say of the file with that source."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        signal.alarm(20 * SECONDS)  # for what waits instead of computing
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        sys.meta_path.insert(0, Mutated(module_of(file), ROOT / file, source))
        import pytest

        names = [name.partition("::") for name in ORACLES[file]]
        tests = [
            f"{next((ROOT / 'tests').rglob(f'test_{name}.py'))}{colons}{test}"
            for name, colons, test in names
        ]
        flags = ["-x", "-q", "-p", "no:cacheprovider", "--timeout=0"]
        flags += ["--hypothesis-seed=0", "--hypothesis-profile=brief"]
        status = pytest.main([*flags, f"--rootdir={ROOT}", *tests])
        os._exit(1 if status else 0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        over = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
        return "timeout" if over else "killed"
    return "killed" if os.WEXITSTATUS(status) else "survived"


def changes(old: str, new: str) -> str:
    """The lines that differ, as a diff without context."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", choices=sorted(ORACLES), metavar="FILE")
    parser.add_argument("--sample", type=int, help="so many mutants of each file, at random")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `make test`
    # All that the tests import and that is not mutated: forks find it loaded.
    import hypothesis.stateful  # noqa: F401
    import pytest  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    for file in chosen.files:
        source = (ROOT / file).read_text()
        record = ROOT / f"build/mutants/{file.replace('/', '-')}l".replace(".pyl", ".jsonl")
        record.parent.mkdir(parents=True, exist_ok=True)
        known = {}
        if record.exists():
            entries = map(json.loads, record.read_text().splitlines())
            known = {entry["change"]: entry["outcome"] for entry in entries}
        if survives(file, source) != "survived":
            sys.exit(f"{file}: its tests fail without a change")
        outcomes: collections.Counter[str] = collections.Counter()
        for name, mutated in sample(source, chosen.sample, chosen.seed):
            change = changes(source, mutated)
            outcome = known.get(change) or survives(file, mutated)
            outcomes[outcome] += 1
            if change not in known:
                entry = {"operator": name, "change": change, "outcome": outcome}
                with record.open("a") as out:
                    out.write(json.dumps(entry) + "\n")
            if outcome == "survived":
                print(f"{file}: {name} survived\n{change}", flush=True)
        places = len(places_of(source))
        print(f"{file}: of {places} places, seed {chosen.seed}: {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
