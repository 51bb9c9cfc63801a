"""`calibrate(model, batches)`: runs a model over text and fits a basis for each of its key caches.

The compiler's own front half does the work: Dynamo hands over each graph, `find_sites` finds the
attention cores (prefills too), and an interpreter runs the graph as it is while it shows every
core's keys and queries to a `KeyCovariance` or to `AttentionSamples`. A cache is known by the
weights that make its keys, so what is fitted here is found again in the decode graph, whatever that
looks like.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, fx, nn

from loki_compile.backend import parameter_test
from loki_compile.passes.cache_writes import nearest_matrix
from loki_compile.passes.fx_tools import writes_of
from loki_compile.passes.latent import over_rows
from loki_compile.passes.normalize import normalize
from loki_compile.passes.rewrite import insert_rows, queries_by_head
from loki_compile.passes.rotary import Unrotated, before_rotation
from loki_compile.passes.sites import QUERIES, AttentionSite, Heads, Layout, find_sites
from loki_compile.pca_store.attention_fit import STEPS, AttentionSamples
from loki_compile.pca_store.basis import CALIBRATIONS, Basis, BasisSet, library_versions
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint

FITTED_KINDS = ("attention", "pca", "score-optimal")
# Dynamo runs a frame eagerly, unseen, once it has been compiled this often.
RECOMPILE_LIMIT = 256


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    calibration: str = "post-rotary",
    kind: str = "attention",
    rank: int | float = 0.25,
    name: str = "",
    source: str = "",
    progress: Callable[[int], None] | None = None,
    fit_progress: Callable[[int, int], None] | None = None,
) -> BasisSet:
    """Fits one basis per key cache of a decoder; the model is left as it was.

    Args:
        model: a decoder in eval mode. It is called with `input_ids=`, and with `use_cache=False`
            and `logits_to_keep=1` where its forward takes them.
        batches: each a tensor of token ids (B, T), or a mapping of keyword arguments. In a mapping,
            `attention_mask` (B, T) keeps padding out of the fit. Moved to the model's device. Make
            them as long as the contexts you decode: slow rotary dims look constant in short ones.
        calibration: "post-rotary" fits the keys as they are cached; "pre-rotary" the keys before
            the rotary embedding. The basis is applied to cached keys in both cases.
        kind: "pca" of the keys (the paper's); "score-optimal", which takes the queries into
            account; or "attention", which is trained to find the keys that are attended, and ranks
            best. It keeps the prompts' keys in memory until the end (see `AttentionSamples`).
        rank: the columns of an "attention" basis, a count or a fraction of head_dim: the largest
            `rank` it can be used at. Other kinds hold all head_dim columns.
        name: the model's name, for display and for messages.
        source: what the text is, for display.
        progress: called with the number of tokens of each batch when it is done.
        fit_progress: called with the steps done and the steps in all while "attention" is fitted.

    Returns:
        One basis for each set of key weights, in the order in which the model uses them.

    Raises:
        ValueError: an unknown choice; no batches, or too short ones; no attention whose keys can be
            observed.
        RuntimeError: part of the model escaped compilation, so that its keys were not seen.
    """
    check_choices(calibration, kind, rank)
    model = getattr(model, "_orig_mod", model)
    seen = _Seen(pre_rotary=calibration == "pre-rotary", kind=kind)
    run = torch.compile(model.forward, backend=seen.observe)
    extra = _accepted(model, {"use_cache": False, "logits_to_keep": 1})
    done, per_batch = 0, 0
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        for batch in batches:
            inputs = _inputs(batch, next(model.parameters()).device)
            seen.start(inputs.get("attention_mask"))
            run(**{**extra, **inputs})
            if seen.error is not None:
                raise seen.error
            per_batch = per_batch or seen.in_batch
            if seen.in_batch < max(per_batch, 1):
                raise _unseen(seen, per_batch)
            done += 1
            if progress is not None:
                progress(inputs["input_ids"].numel() if "input_ids" in inputs else 0)
    if not done:
        raise ValueError("found no batches to calibrate with; needs at least one: pass more text.")
    return BasisSet(
        seen.fit(rank, fit_progress),
        model=name,
        calibration=calibration,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        rope=_rope_parameters(model),
        source=source,
        versions=_versions(),
    )


def check_choices(calibration: str, kind: str, rank: int | float) -> None:
    """Refuses what `calibrate` does not know, before a model is loaded.

    Raises:
        ValueError: an unknown choice.
    """
    for what, value, allowed in (
        ("calibration", calibration, CALIBRATIONS),
        ("kind", kind, FITTED_KINDS),
    ):
        if value not in allowed:
            raise ValueError(f"{what}={value!r}: needs one of {', '.join(map(repr, allowed))}.")
    if kind == "attention" and calibration != "post-rotary":
        raise ValueError(
            f"calibration={calibration!r} with kind='attention': attention is made of rotated "
            "keys; needs calibration='post-rotary', or kind='pca' or 'score-optimal'."
        )
    count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not count and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"rank={rank!r}: needs a count >= 1 (int) or a fraction of head_dim in (0, 1] (float)."
        )


@dataclass(frozen=True)
class _Tap:
    """Where to read keys (of `heads`) or queries (laid out by `layout`): `node`, restored from
    `before` where it is not rotated yet."""

    node: fx.Node
    heads: Heads | None = None
    before: Unrotated | None = None
    layout: Layout = QUERIES

    def read(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """(B, heads, tokens, head_dim)."""
        value = values[self.node]
        if self.before is not None:
            value = self.before.restore(value)
        if self.heads is None:
            return value if self.layout == QUERIES else queries_by_head(value, self.layout)
        if self.heads.order[1] < 0:
            value = value.unsqueeze(-2)
            head = value.dim() - 2
            order = [head if d < 0 else d + (d >= head) for d in self.heads.order]
            return value.permute(order)
        return value.permute(self.heads.order)


@dataclass(frozen=True)
class _Observed:
    """One key cache of one graph: its keys, and the queries of every core that reads them."""

    identity: tuple[str, int]
    layer: str
    kv_heads: int
    head_dim: int
    scale: float
    keys: _Tap
    queries: tuple[_Tap, ...]
    cores: tuple[fx.Node, ...]


@dataclass
class _Seen:
    """What has been seen of each key cache; `observe` is the backend that adds to it."""

    pre_rotary: bool
    kind: str
    held: dict[tuple[str, int], KeyCovariance | AttentionSamples] = field(default_factory=dict)
    head_dims: dict[tuple[str, int], int] = field(default_factory=dict)
    layers: dict[tuple[str, int], str] = field(default_factory=dict)
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    mask: Tensor | None = None
    in_batch: int = 0
    reasons: dict[str, None] = field(default_factory=dict)
    error: ValueError | None = None

    def start(self, mask: Tensor | None) -> None:
        """Begins a batch; `mask` (B, T) marks its real tokens."""
        self.mask = None if mask is None else mask.bool()
        self.in_batch = 0

    def observe(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A TorchDynamo backend: the graph as it was, run by an interpreter that looks on."""
        normal, _ = normalize(gm)
        try:
            caches = self._caches(normal, example_inputs)
        except ValueError as error:  # Dynamo would bury it in one of its own
            caches, self.error = [], error
        if not caches:
            return gm.forward
        return lambda *args: _LookingOn(normal, caches, self).run(*args)

    def _caches(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[_Observed]:
        sites, skipped = find_sites(gm.graph, max_query_tokens=None)
        for skip in skipped:
            self.reasons[f"{skip.path or skip.node.name}: {skip.sentence()}"] = None
        is_parameter = parameter_test(gm, example_inputs)
        by_keys: dict[fx.Node, list[AttentionSite]] = {}
        writes = writes_of(gm.graph) if sites else []
        made_of: dict[fx.Node, fx.Node] = {}
        for site in sites:
            latent = over_rows(site, writes)
            # What decoding ranks are the rows that it will cache. Without a part that all heads
            # share, plain keys look the same: linear maps of hidden states.
            if latent is not None and latent.latent is not None and latent.latent.kept:
                query, rows = insert_rows(gm.graph, latent)
                made_of[rows] = latent.key.base
                heads = Heads(rows, (0, 1, 2, 3), latent.group)
                site = dataclasses.replace(latent, query=query, key=heads, query_layout=QUERIES)
            by_keys.setdefault(site.key.base, []).append(site)
        uses: dict[str, int] = {}
        caches = []
        for base, readers in by_keys.items():
            site = readers[0]
            weight = nearest_matrix([made_of.get(base, base)], is_parameter)
            if weight is None:
                where = site.path or site.node.name
                self.reasons[f"{where}: no weight matrix is behind its keys"] = None
                continue
            matrix = _input(gm, example_inputs, weight)
            fingerprint = weights_fingerprint(matrix)
            if not fingerprint:
                where = site.path or site.node.name
                self.reasons[f"{where}: its weights ({type(matrix).__name__}) cannot be read"] = (
                    None
                )
                continue
            self.blocks[fingerprint] = block_fingerprints(matrix, site.head_dim)
            occurrence = uses.get(fingerprint, 0)
            uses[fingerprint] = occurrence + 1
            caches.append(
                _Observed(
                    identity=(fingerprint, occurrence),
                    layer=site.path,
                    kv_heads=site.kv_heads,
                    head_dim=site.head_dim,
                    scale=site.scale,
                    keys=self._tap(base, site.key.order[2], is_parameter, heads=site.key),
                    queries=tuple(
                        self._tap(
                            s.query,
                            s.query_layout.index("s") if "s" in s.query_layout else None,
                            is_parameter,
                            layout=s.query_layout,
                        )
                        for s in readers
                    ),
                    cores=tuple(s.node for s in readers),
                )
            )
        return caches

    def _tap(
        self,
        node: fx.Node,
        token_axis: int | None,
        is_parameter: Callable[[fx.Node], bool],
        *,
        heads: Heads | None = None,
        layout: Layout = QUERIES,
    ) -> _Tap:
        if not self.pre_rotary or token_axis is None:
            return _Tap(node, heads, layout=layout)
        before = before_rotation(node, token_axis, is_parameter)
        return _Tap(before.node if before else node, heads, before, layout)

    def add(self, cache: _Observed, keys: Tensor, queries: Sequence[Tensor]) -> None:
        """keys (B, Hkv, T, D); each of `queries` (B, Hq, T, D)."""
        tokens = keys.shape[2]
        if any(q.shape[2] != tokens for q in queries):
            self.reasons[
                f"{cache.layer}: {tokens} keys for {queries[0].shape[2]} queries; needs whole "
                "prompts, without a cache"
            ] = None
            return
        held = self.held.get(cache.identity)
        if held is None:
            held = self.held[cache.identity] = self._empty(cache)
            self.layers[cache.identity] = cache.layer
            self.head_dims[cache.identity] = cache.head_dim
        groups = [q.unflatten(1, (cache.kv_heads, -1)) for q in queries]
        together = torch.cat(groups, 2).flatten(1, 2)
        mask = self.mask
        if mask is not None and mask.shape != (keys.shape[0], tokens):
            raise ValueError(
                f"found attention_mask of shape {tuple(mask.shape)} for keys of "
                f"{keys.shape[0]} x {tokens} tokens; needs one entry per token of the batch."
            )
        held.update(keys, together, mask)
        self.in_batch += 1

    def _empty(self, cache: _Observed) -> KeyCovariance | AttentionSamples:
        if self.kind == "attention":
            return AttentionSamples(cache.kv_heads, cache.head_dim, scale=cache.scale)
        return KeyCovariance(cache.kv_heads, cache.head_dim)

    def fit(
        self, rank: int | float, progress: Callable[[int, int], None] | None
    ) -> tuple[Basis, ...]:
        """A basis of each cache, in the order of first sight."""
        bases: list[Basis] = []
        total = STEPS * len(self.held)

        steps_done = itertools.count(1)

        def step(_: int) -> None:
            if progress is not None:
                progress(next(steps_done), total)

        for identity, held in self.held.items():
            origin = {"weights": identity[0], "layer": self.layers[identity]}
            if isinstance(held, AttentionSamples):
                columns = _columns(rank, self.head_dims[identity])
                bases.append(held.fit(columns, **origin, progress=step))
            else:
                bases.append(
                    held.pca(**origin) if self.kind == "pca" else held.score_optimal(**origin)
                )
        return tuple(
            dataclasses.replace(basis, blocks=self.blocks[basis.weights]) for basis in bases
        )


def _columns(rank: int | float, head_dim: int) -> int:
    """As `Basis.rank_for`; a count above head_dim is head_dim, for layers may differ."""
    if isinstance(rank, float):
        return max(1, math.ceil(round(rank * head_dim, 6)))
    return min(rank, head_dim)


class _LookingOn(fx.Interpreter):
    """Runs a graph and hands each cache's keys and queries over when its last core has run.

    Not sooner: keys may be rotated or filled in place after the node that names them.
    """

    def __init__(self, gm: fx.GraphModule, caches: Sequence[_Observed], moments: _Seen) -> None:
        super().__init__(gm)
        self.moments = moments
        self.waiting = {cache: _nodes_of(cache) for cache in caches}
        self.wanted = set().union(*self.waiting.values())
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n not in self.wanted:
            return result
        self.values[n] = result
        for cache, nodes in list(self.waiting.items()):
            if nodes <= self.values.keys():
                del self.waiting[cache]
                keys = cache.keys.read(self.values)
                self.moments.add(cache, keys, [q.read(self.values) for q in cache.queries])
                still = set().union(*self.waiting.values())
                self.values = {node: v for node, v in self.values.items() if node in still}
        return result


def _nodes_of(cache: _Observed) -> set[fx.Node]:
    return {*cache.cores, *(tap.node for tap in (cache.keys, *cache.queries))}


def _input(gm: fx.GraphModule, example_inputs: Sequence[Any], placeholder: fx.Node) -> Any:
    return example_inputs[gm.graph.find_nodes(op="placeholder").index(placeholder)]


def _inputs(batch: Tensor | Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def _accepted(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the model's forward names."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _unseen(seen: _Seen, expected: int) -> Exception:
    reasons = "".join(f"\n  {reason}" for reason in seen.reasons)
    if not seen.held:
        why = reasons or "\n  the model runs no attention that is understood"
        return ValueError(
            f"found no attention whose keys can be observed:{why}\n"
            "Needs a decoder in eval mode with queries, keys and values of its own; in "
            'transformers, attn_implementation="sdpa" is understood best.'
        )
    return RuntimeError(
        f"the keys of {seen.in_batch} caches were seen in this batch, {expected} in the first: "
        f"part of the model ran outside the compiled graph.{reasons}\n"
        "Pass batches of one shape."
    )


def _rope_parameters(model: nn.Module) -> dict[str, Any]:
    """RoPE parameters as the model's configuration states them, where it has one."""
    config = getattr(model, "config", None)
    stated = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return dict(stated) if isinstance(stated, Mapping) else {}


def _versions() -> dict[str, str]:
    own = library_versions()
    if "transformers" in sys.modules:
        own["transformers"] = metadata.version("transformers")
    return own
