"""What calibration sees: keys and queries of every cache, as graphs of the model compute them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx

from loki_compile.kernels.fused import QUERIES, Layout, queries_by_head
from loki_compile.passes.attention import AttentionSite, Heads
from loki_compile.passes.calls import writes_of
from loki_compile.passes.emit import insert_rows
from loki_compile.passes.graphs import nearest_matrix, parameter_test
from loki_compile.passes.latent import over_rows
from loki_compile.passes.normalize import normalize
from loki_compile.passes.rotary import Unrotated, before_rotation, rotated_pairs
from loki_compile.passes.sites import find_sites
from loki_compile.pca_store import attention_fit
from loki_compile.pca_store.attention_fit import AttentionSamples
from loki_compile.pca_store.basis import AUTO, AUTO_SHARE, Basis, dims_of
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.score_fit import ScoreSamples

if TYPE_CHECKING:
    from loki_compile.progress import Kept, Pace


Samples: TypeAlias = KeyCovariance | ScoreSamples | AttentionSamples


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
class Observed:
    """One key cache of one graph: its keys, and the queries of every core that reads them."""

    identity: tuple[str, int]
    layer: str
    kv_heads: int
    head_dim: int
    scale: float
    keys: _Tap
    queries: tuple[_Tap, ...]
    cores: tuple[fx.Node, ...]
    pairs: tuple[tuple[int, int], ...] = ()


@dataclass
class Seen:
    """What has been seen of each key cache; `observe` is the backend that adds to it."""

    pre_rotary: bool
    kind: str
    rank: int | float | str
    steps: int = field(default_factory=lambda: attention_fit.STEPS)  # of each "attention" fit
    held: dict[tuple[str, int], Samples] = field(default_factory=dict)
    pairs: dict[tuple[str, int], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    scales: dict[tuple[str, int], float] = field(default_factory=dict)
    head_dims: dict[tuple[str, int], int] = field(default_factory=dict)
    layers: dict[tuple[str, int], str] = field(default_factory=dict)
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    mask: Tensor | None = None
    in_batch: int = 0
    per_batch: int = 0
    running_since: float | None = None
    reasons: dict[str, None] = field(default_factory=dict)
    error: ValueError | None = None

    def start(self, mask: Tensor | None) -> None:
        """Begins a batch; `mask` (B, T) marks its real tokens."""
        self.mask = None if mask is None else mask.bool()
        self.in_batch = 0
        self.running_since = None

    def forget(self) -> None:
        """Lets go of every tensor."""
        self.held.clear()
        self.mask = None

    def observe(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """A TorchDynamo backend: the graph as it was, run by an interpreter that looks on."""
        normal, _ = normalize(gm)
        try:
            caches = self._caches(normal, example_inputs)
        except ValueError as error:  # Dynamo would bury it in one of its own
            caches, self.error = [], error
        if not caches:
            return gm.forward

        def run(*args: Any) -> Any:
            if self.running_since is None:  # Dynamo has compiled what comes first
                self.running_since = time.perf_counter()
            return LookingOn(normal, caches, self).run(*args)

        return run

    def _caches(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Observed]:
        is_parameter = parameter_test(gm, example_inputs)
        uses: dict[str, int] = {}
        rotations: dict[str, tuple[tuple[int, int], ...]] = {}
        caches = []
        for base, (source, readers) in self._keys_read(gm).items():
            weight, site = nearest_matrix([source], is_parameter), readers[0]
            matrix = None if weight is None else _input(gm, example_inputs, weight)
            fingerprint = "" if matrix is None else weights_fingerprint(matrix)
            if matrix is None or not fingerprint:
                why = "no weight matrix is behind its keys"
                if matrix is not None:
                    why = f"its weights ({type(matrix).__name__}) cannot be read"
                self.reasons[f"{site.path or site.node.name}: {why}"] = None
                continue
            self.blocks[fingerprint] = block_fingerprints(matrix, site.head_dim)
            occurrence = uses.get(fingerprint, 0)
            uses[fingerprint] = occurrence + 1
            pairs: tuple[tuple[int, int], ...] = ()
            if source is base:  # rows of a latent are put together of what is rotated and not
                pairs = rotated_pairs(base, site.tokens, site.head_dim, is_parameter, rotations)
            identity = fingerprint, occurrence
            caches.append(self._observed(identity, base, readers, is_parameter, pairs))
        return caches

    def _keys_read(self, gm: fx.GraphModule) -> dict[fx.Node, tuple[fx.Node, list[AttentionSite]]]:
        """The sites of a graph by the keys that they read, and what those are made of. Of a latent,
        the rows that decoding will cache are put together in the graph."""
        sites, skipped = find_sites(gm.graph, max_query_tokens=None)
        for skip in skipped:
            self.reasons[f"{skip.path or skip.node.name}: {skip.sentence()}"] = None
        writes = writes_of(gm.graph) if sites else []
        read: dict[fx.Node, tuple[fx.Node, list[AttentionSite]]] = {}
        for site in sites:
            latent = over_rows(site, writes)
            source = site.key.base
            # What decoding ranks are the rows that it will cache. Without a part that all heads
            # share, plain keys look the same: linear maps of hidden states.
            if latent is not None and latent.latent is not None and latent.latent.k_pe_dims:
                query, rows = insert_rows(gm.graph, latent)
                source = latent.key.base
                heads = Heads(rows, (0, 1, 2, 3), latent.group)
                core = dataclasses.replace(latent.core, query_layout=QUERIES)
                site = dataclasses.replace(latent, core=core, query=query, key=heads)
            read.setdefault(site.key.base, (source, []))[1].append(site)
        return read

    def _observed(
        self,
        identity: tuple[str, int],
        base: fx.Node,
        readers: list[AttentionSite],
        is_parameter: Callable[[fx.Node], bool],
        pairs: tuple[tuple[int, int], ...],
    ) -> Observed:
        site = readers[0]
        layouts = [reader.core.query_layout for reader in readers]
        tokens = [layout.index("s") if "s" in layout else None for layout in layouts]
        return Observed(
            identity=identity,
            layer=site.path,
            kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            scale=site.scale,
            keys=self._tap(base, site.key.order[2], is_parameter, heads=site.key),
            queries=tuple(
                self._tap(reader.query, axis, is_parameter, layout=layout)
                for reader, axis, layout in zip(readers, tokens, layouts, strict=True)
            ),
            cores=tuple(reader.node for reader in readers),
            pairs=pairs,
        )

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

    def add(self, cache: Observed, keys: Tensor, queries: Sequence[Tensor]) -> None:
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
            self.scales[cache.identity] = cache.scale
            self.head_dims[cache.identity] = cache.head_dim
            self.pairs[cache.identity] = cache.pairs
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

    def _empty(self, cache: Observed) -> Samples:
        return self.empty(cache.kv_heads, cache.head_dim, cache.scale, cache.pairs)

    def empty(
        self, kv_heads: int, head_dim: int, scale: float, pairs: Sequence[tuple[int, int]]
    ) -> Samples:
        """What takes in one cache's keys and queries, for the kind that is fitted."""
        if self.kind == "attention":
            return AttentionSamples(kv_heads, head_dim, scale=scale)
        if self.kind == "score-optimal" and not self.pre_rotary:
            return ScoreSamples(kv_heads, head_dim, scale=scale, pairs=pairs)
        return KeyCovariance(kv_heads, head_dim)

    def columns(self, identity: tuple[str, int]) -> int:
        """Of an "attention" basis, and where others are measured; a count above head_dim is
        head_dim, for layers may differ."""
        return columns_of(self.rank, self.head_dims[identity])

    def fit(
        self,
        progress: Callable[[int, int], None] | None,
        expect: Callable[[float], None] | None,
        pace: Pace,
        kept: Kept | None,
    ) -> tuple[Basis, ...]:
        """A basis of each cache, in the order of first sight; what was seen of it is given up."""
        bases: list[Basis] = []
        total = self.steps * len(self.layers)
        if expect is not None:
            pace.probe(self)
        pace.begin_fitting(total)
        if expect is not None:
            expect(pace.left(self))

        def step(count: int) -> None:
            pace.step(count)
            if progress is not None:
                progress(total - pace.steps_left, total)
            if expect is not None:
                expect(pace.left(self))

        for number, identity in enumerate(self.layers):
            origin = {"weights": identity[0], "layer": self.layers[identity]}
            held = self.held.pop(identity, None)
            if held is None:  # an earlier run has fitted it
                assert kept is not None
                bases.append(kept.fitted[number])
                pace.skip(self.steps)
            elif isinstance(held, AttentionSamples):
                columns = self.columns(identity)
                bases.append(held.fit(columns, **origin, progress=step, steps=self.steps))
                if kept is not None:
                    kept.keep_basis(bases[-1], number)
            elif isinstance(held, ScoreSamples):
                bases.append(held.fit(self.columns(identity), **origin))
            else:
                bases.append(
                    held.pca(**origin) if self.kind == "pca" else held.score_optimal(**origin)
                )
        return tuple(
            dataclasses.replace(basis, blocks=self.blocks[basis.weights]) for basis in bases
        )


def columns_of(rank: int | float | str, head_dim: int) -> int:
    """As `Basis.rank_for`, but of no spectrum; a count above head_dim is head_dim, for layers may
    differ."""
    share = AUTO_SHARE if rank == AUTO else rank
    return min(share, head_dim) if isinstance(share, int) else dims_of(float(share), head_dim)


class LookingOn(fx.Interpreter):
    """Runs a graph and hands each cache's keys and queries over when its last core has run.

    Not sooner: keys may be rotated or filled in place after the node that names them.
    """

    def __init__(self, gm: fx.GraphModule, caches: Sequence[Observed], moments: Seen) -> None:
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


def _nodes_of(cache: Observed) -> set[fx.Node]:
    return {*cache.cores, *(tap.node for tap in (cache.keys, *cache.queries))}


def _input(gm: fx.GraphModule, example_inputs: Sequence[Any], placeholder: fx.Node) -> Any:
    return example_inputs[gm.graph.find_nodes(op="placeholder").index(placeholder)]
