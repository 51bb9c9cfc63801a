"""Plans of layers: which of a model's layers choose keys, and which read what others chose.

A plan is a JSON file beside the bases, bound to the model by the fingerprints of the weights that
make each layer's keys. What a layer does is a word, which this folder does not interpret.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loki_compile.pca_store.basis_header import MAX_SITES
from loki_compile.pca_store.metadata import (
    MAX_BLOCKS,
    check_fingerprint,
    check_text,
    combine_fingerprints,
    run_of,
)
from loki_compile.pca_store.store import default_root, warn_once, write_atomically

# Of plans which layers choose and which reuse, of plans what spans of keys their heads read, and of
# plans how many keys each head chooses: a model may have one of each.
SUFFIX = ".plan.json"
SPANS_SUFFIX = ".spans.json"
BUDGETS_SUFFIX = ".budgets.json"
# By suffix: what such a plan is of, and the options of `loki tune` that make one.
_MADE_BY = {SPANS_SUFFIX: ("spans", " --policy moa"), BUDGETS_SUFFIX: ("budgets", " --target")}
# A score of a plan of budgets, a bool: whether it serves where no policy is asked for, since on
# text that it was not found on it beat a uniform budget of as many keys.
USED = "used"
FORMAT = 1
_MAX_BYTES = 64 << 20


class PlanFileError(ValueError):
    """A plan file that is damaged, or not a plan."""


@dataclass(frozen=True)
class PlannedLayer:
    """One layer: its path, fingerprints as `Basis` has them, KV heads, and what it does."""

    path: str
    weights: str
    blocks: tuple[str, ...]
    kv_heads: int
    word: str

    def __post_init__(self) -> None:
        check_text("path", self.path)
        check_fingerprint("weights", self.weights)
        check_text("word", self.word)
        if not isinstance(self.blocks, (list, tuple)) or len(self.blocks) > MAX_BLOCKS:
            raise ValueError(f"found blocks that are not a list of at most {MAX_BLOCKS} entries")
        for block in self.blocks:
            check_fingerprint("block", block)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not isinstance(self.kv_heads, int) or not 0 < self.kv_heads <= MAX_SITES:
            raise ValueError(f"found kv_heads {self.kv_heads!r}; needed a count")


@dataclass(frozen=True)
class LayerPlan:
    """What each layer of one model does, in the order of the model; sources count them from 0.

    top_k: the budget that it was measured at. mass: by row of source and column of reader, the
    share of the reader's attention that the source's choice captures; None where the source does
    not lie before it. scores: of this plan and those it was compared with, by name. under: the
    options that these were measured under; none where that is not known. path: of the file that it
    was read from, which is no part of it.
    """

    layers: tuple[PlannedLayer, ...]
    model: str
    top_k: float
    source: str
    created: str
    mass: tuple[tuple[float | None, ...], ...] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)
    under: Mapping[str, Any] = field(default_factory=dict)
    path: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.layers) <= MAX_SITES:
            raise ValueError(f"found {len(self.layers)} layers; needed 1 to {MAX_SITES}")
        for name in ("model", "source", "created"):
            check_text(name, getattr(self, name))
        if type(self.top_k) not in (int, float) or not math.isfinite(self.top_k):
            raise ValueError(f"found top_k {self.top_k!r:.80}; needed a number")
        for name in ("scores", "under"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"found {name} {getattr(self, name)!r:.80}; needed an object")
        for option, value in self.under.items():
            check_text("option", option)
            check_text(f"option {option}", str(value))
        rows = [len(row) for row in self.mass]
        if rows and rows != [len(self.layers)] * len(self.layers):
            raise ValueError("found a mass that is not a square of the layers; needed one")
        for share in (share for row in self.mass for share in row if share is not None):
            if not isinstance(share, (int, float)) or not math.isfinite(share):
                raise ValueError(f"found a share {share!r:.80}; needed a number")

    def record(self) -> dict[str, Any]:
        """What of it is written."""
        return {name: value for name, value in asdict(self).items() if name in _WRITTEN}

    @property
    def fingerprint(self) -> str:
        """Of the model, as `BasisSet.fingerprint`."""
        return combine_fingerprints(layer.weights for layer in self.layers)

    def layer_of(self, weights: str, blocks: tuple[str, ...], use: int = 0) -> int | None:
        """The number of the layer whose keys these weights make, or the whole weights of which they
        are some rows; of several that share weights the `use`-th. None for another model's."""
        known = [n for n, layer in enumerate(self.layers) if layer.weights == weights] or [
            n for n, layer in enumerate(self.layers) if run_of(blocks, layer.blocks) is not None
        ]
        return known[min(use, len(known) - 1)] if known else None


_WRITTEN = {each.name for each in fields(LayerPlan)} - {"path"}


def save_plan(plan: LayerPlan, root: Path | None = None, suffix: str = SUFFIX) -> Path:
    """Writes a plan in place of an older one of the same model and suffix; atomic, as `Store.save`.

    Raises:
      OSError: the folder cannot be written.
    """
    root = default_root() if root is None else root
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{plan.fingerprint[:24]}{suffix}"
    write_atomically(path, json.dumps({"format": FORMAT, **plan.record()}).encode())
    return path


def read_plan(path: str | Path) -> LayerPlan:
    """The plan in a file.

    Raises:
      PlanFileError: no such file, or not a whole plan.
    """
    path = Path(os.path.expanduser(path))
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        given = json.loads(path.read_bytes())
        if not isinstance(given, dict) or given.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if not _WRITTEN - {"under"} <= given.keys() <= _WRITTEN:
            raise ValueError(f"it has {sorted(given)}; needed {sorted(_WRITTEN)}")
        rows, mass = given.pop("layers"), given.pop("mass")
        if not all(isinstance(each, list) for each in (rows, mass, *(mass or ()))):
            raise ValueError("found layers or mass that are no lists; needed a list for each")
        layers = tuple(_layer(*numbered) for numbered in enumerate(rows))
        mass = tuple(map(tuple, mass))
        return LayerPlan(layers=layers, mass=mass, path=str(path), **given)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, str(error)) from None


def damaged(path: str | Path, why: str) -> PlanFileError:
    """The error of a plan's file, in one line: which, why, and what makes a new one."""
    what, options = next(
        (made for suffix, made in _MADE_BY.items() if str(path).endswith(suffix)), ("layers", "")
    )
    reason = why.partition("\n")[0][:600]
    return PlanFileError(f"{path} is no plan of {what} ({reason}): run `loki tune{options}`")


def _layer(number: int, given: Any) -> PlannedLayer:
    """
    Raises:
      ValueError: as said.
    """
    names = {each.name for each in fields(PlannedLayer)}
    if not isinstance(given, dict) or given.keys() != names:
        found = sorted(given) if isinstance(given, dict) else f"{given!r:.80}"
        raise ValueError(f"layer {number} has {found}; needed {sorted(names)}")
    try:
        return PlannedLayer(**given)
    except ValueError as error:
        raise ValueError(f"layer {number}: {error}") from None


def find_plan(
    weights: Iterable[str],
    blocks: Mapping[str, tuple[str, ...]],
    root: Path | None = None,
    suffix: str = SUFFIX,
) -> LayerPlan | None:
    """The newest stored plan of that suffix that knows all of these weights; None where there is
    none.

    blocks: fingerprints of the rows of weights, by their own.
    """
    wanted = list(weights)
    for plan in stored_plans(root, suffix) if wanted else ():
        if all(plan.layer_of(each, blocks.get(each, ())) is not None for each in wanted):
            return plan
    return None


def any_plan(root: Path | None = None, suffix: str = SUFFIX) -> bool:
    """Whether a plan of that suffix is stored, of whatever model."""
    root = default_root() if root is None else root
    return next(iter(root.glob(f"*{suffix}")), None) is not None


def stored_plans(root: Path | None = None, suffix: str = SUFFIX) -> Iterator[LayerPlan]:
    """All that can be read, newest first; what cannot, or has other layers than the model that its
    name stands for, is passed over with a warning, once."""
    root = default_root() if root is None else root
    try:
        files = sorted(root.glob(f"*{suffix}"), key=lambda path: -path.stat().st_mtime_ns)
    except OSError as error:
        warn_once(f"the plans in {root} cannot be read: {error}")
        return
    for path in files:
        try:
            plan = read_plan(path)
            if not path.name.startswith(plan.fingerprint[:24]):
                count = len(plan.layers)
                raise damaged(path, f"its {count} layers are not those that its name stands for")
        except PlanFileError as error:
            warn_once(f"passed over: {error}")
        else:
            yield plan
