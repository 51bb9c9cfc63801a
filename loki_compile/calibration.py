"""`calibrate(model, batches)`: runs a model over text and fits a basis for each of its key caches.

The compiler's own front half does the work: Dynamo hands over each graph, `find_sites` finds the
attention cores (prefills too), and an interpreter runs the graph as it is while it shows every
core's keys and queries to a `KeyCovariance` or to `AttentionSamples`. A cache is known by the
weights that make its keys, so what is fitted here is found again in the decode graph, whatever that
looks like.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from loki_compile.kernels.fused import QUERIES, Layout, queries_by_head
from loki_compile.passes.attention import AttentionSite, Heads
from loki_compile.passes.calls import writes_of
from loki_compile.passes.emit import insert_rows
from loki_compile.passes.graphs import nearest_matrix, parameter_test
from loki_compile.passes.latent import over_rows
from loki_compile.passes.normalize import normalize
from loki_compile.passes.rotary import Unrotated, before_rotation
from loki_compile.passes.sites import find_sites
from loki_compile.pca_store.attention_fit import RECENT, SINK, STEPS, AttentionSamples
from loki_compile.pca_store.basis import Basis, BasisSet, library_versions
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.metadata import CALIBRATIONS
from loki_compile.pca_store.partial import Partial
from loki_compile.watching import watched

FITTED_KINDS = ("attention", "pca", "score-optimal")

log = logging.getLogger("loki_compile")


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
    expect: Callable[[float], None] | None = None,
    partial: str | Path | None = None,
) -> BasisSet:
    """Fits one basis per key cache of a decoder; the model is left as it was.

    What it has seen is given back: of each cache once it is fitted, and all of it at the end.

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
        expect: called with the seconds that reading and fitting will still take, as measured: after
            each batch from the first on, and while "attention" is fitted.
        partial: a folder in which to keep what was seen and fitted until the end, so that the same
            call goes on where one was stopped; as large as what "attention" keeps in memory.
            A file there that is damaged, or does not belong to this very run, is not used, with a
            warning. None: a stop loses everything.

    Returns:
        One basis for each set of key weights, in the order in which the model uses them.

    Raises:
        ValueError: an unknown choice; no batches, or too short ones; no attention whose keys can be
            observed.
        RuntimeError: part of the model escaped compilation, so that its keys were not seen.
    """
    check_choices(calibration, kind, rank)
    model = getattr(model, "_orig_mod", model)
    device = next(model.parameters()).device
    seen = Seen(pre_rotary=calibration == "pre-rotary", kind=kind, rank=rank)
    extra = _accepted(model, {"use_cache": False, "logits_to_keep": 1})
    sizes: list[int] = []
    if partial is not None or expect is not None:
        batches = list(batches)
        sizes = [_tokens(batch) for batch in batches]
    kept = None
    if partial is not None:
        settings = {"calibration": calibration, "kind": kind, "rank": rank}
        kept = _Kept(Partial(partial, _run_key(model, settings, batches)), device)
    try:
        done = kept.restore(seen) if kept is not None else 0
        pace = _Pace(sum(sizes[done:]))
        with watched(model, seen.observe) as run:
            for number, batch in enumerate(batches):
                inputs = _inputs(batch, device)
                if number >= done:
                    begin = time.perf_counter()
                    seen.start(inputs.get("attention_mask"))
                    run(**{**extra, **inputs})
                    if seen.error is not None:
                        raise seen.error
                    seen.per_batch = seen.per_batch or seen.in_batch
                    if seen.in_batch < max(seen.per_batch, 1):
                        raise _unseen(seen, seen.per_batch)
                    if kept is not None:
                        kept.keep(seen, number)
                    pace.read(_tokens(batch), time.perf_counter() - (seen.running_since or begin))
                if progress is not None:
                    progress(_tokens(batch))
                if expect is not None and number >= done:
                    pace.probe(seen)
                    expect(pace.left(seen))
                done = max(done, number + 1)
        if not done:
            raise ValueError(
                "found no batches to calibrate with; needs at least one: pass more text."
            )
        bases = seen.fit(fit_progress, expect, pace, kept)
    finally:
        seen.forget()
    if kept is not None:
        kept.files.remove()
    return BasisSet(
        bases,
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


def check_lengths(batches: Sequence[Tensor], kind: str) -> None:
    """Refuses text that nothing can be fitted from, before a model is loaded.

    Raises:
        ValueError: no prompt, or none long enough for an "attention" basis.
    """
    longest = max((batch.shape[1] for batch in batches), default=0)
    needed = SINK + RECENT + 1 if kind == "attention" else 2
    if longest < needed:
        raise ValueError(
            f"the longest prompt holds {longest} tokens; a basis of kind {kind!r} needs {needed}: "
            "pass more text, or a larger --length"
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
class Seen:
    """What has been seen of each key cache; `observe` is the backend that adds to it."""

    pre_rotary: bool
    kind: str
    rank: int | float
    held: dict[tuple[str, int], KeyCovariance | AttentionSamples] = field(default_factory=dict)
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
                core = dataclasses.replace(latent.core, query_layout=QUERIES)
                site = dataclasses.replace(latent, core=core, query=query, key=heads)
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
                            s.core.query_layout.index("s") if "s" in s.core.query_layout else None,
                            is_parameter,
                            layout=s.core.query_layout,
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
            self.scales[cache.identity] = cache.scale
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

    def columns(self, identity: tuple[str, int]) -> int:
        """Of an "attention" basis; a count above head_dim is head_dim, for layers may differ."""
        return _columns(self.rank, self.head_dims[identity])

    def fit(
        self,
        progress: Callable[[int, int], None] | None,
        expect: Callable[[float], None] | None,
        pace: _Pace,
        kept: _Kept | None,
    ) -> tuple[Basis, ...]:
        """A basis of each cache, in the order of first sight; what was seen of it is given up."""
        bases: list[Basis] = []
        total = STEPS * len(self.layers)
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
                pace.skip(STEPS)
            elif isinstance(held, AttentionSamples):
                bases.append(held.fit(self.columns(identity), **origin, progress=step))
                if kept is not None:
                    kept.keep_basis(bases[-1], number)
            else:
                bases.append(
                    held.pca(**origin) if self.kind == "pca" else held.score_optimal(**origin)
                )
        return tuple(
            dataclasses.replace(basis, blocks=self.blocks[basis.weights]) for basis in bases
        )


# Of a fit, beside its steps: the scores of where it begins and ends, in steps.
_STEPS_BESIDE = 12


class _Pace:
    """How long the rest will take, from what has been measured. Seconds and tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens_left = tokens
        self.tokens_read = 0
        self.reading = 0.0
        self.step_seconds: float | None = None
        self.steps_left = 0
        self._begun: float | None = None
        self._steps_done = 0

    def read(self, tokens: int, seconds: float) -> None:
        self.tokens_left -= tokens
        self.tokens_read += tokens
        self.reading += seconds

    def probe(self, seen: Seen) -> None:
        """Measures a step of the fit, once."""
        if self.step_seconds is not None:
            return
        self.step_seconds = 0.0
        for identity, held in seen.held.items():
            if isinstance(held, AttentionSamples):
                self.step_seconds = held.seconds_per_step(seen.columns(identity))
                break

    def begin_fitting(self, steps: int) -> None:
        self.steps_left = steps
        self._begun = time.perf_counter()

    def skip(self, steps: int) -> None:
        self.steps_left -= steps

    def step(self, count: int) -> None:
        self.steps_left -= count
        self._steps_done += count

    def left(self, seen: Seen) -> float:
        seconds = self.tokens_left * self.reading / max(self.tokens_read, 1)
        each = (self.step_seconds or 0.0) * (STEPS + _STEPS_BESIDE) / STEPS
        if self._begun is None:
            return seconds + len(seen.held) * STEPS * each
        if self._steps_done >= STEPS // 10:
            each = (time.perf_counter() - self._begun) / self._steps_done
        return self.steps_left * each


class _Kept:
    """What a `Partial` holds of a run: "seen" (moments, and how far it has come), "chunk-N" (the
    samples of batch N), "basis-N"."""

    def __init__(self, files: Partial, device: torch.device) -> None:
        self.files = files
        self.device = device
        self.fitted: dict[int, Basis] = {}
        self._prompts: dict[tuple[str, int], int] = {}
        self._broken = False

    def restore(self, seen: Seen) -> int:
        """Fills in what was kept; the number of batches that need not be read again."""
        if not self.files.has("seen"):
            return 0
        try:
            done = self._restore(seen)
        except ValueError as error:
            log.warning("%s: it is not used, and calibration begins anew", error)
            for known in (
                seen.held,
                seen.layers,
                seen.scales,
                seen.head_dims,
                seen.blocks,
                self.fitted,
            ):
                known.clear()
            self._prompts.clear()
            seen.per_batch = 0
            self.files.remove()
            return 0
        log.info(
            "going on from %s: %d batches, %d bases", self.files.folder, done, len(self.fitted)
        )
        return done

    def _restore(self, seen: Seen) -> int:
        moments, record = self.files.read("seen")
        prompts: dict[int, list[dict[str, Tensor]]] = {}
        for number, (weights, occurrence, layer, kv_heads, head_dim, scale) in enumerate(
            record["caches"]
        ):
            identity = (weights, occurrence)
            seen.layers[identity], seen.head_dims[identity] = layer, head_dim
            seen.scales[identity] = scale
            if self.files.has(f"basis-{number}"):
                self.fitted[number] = self._basis(number)
                continue
            prompts[number] = []
            if seen.kind == "attention":
                seen.held[identity] = AttentionSamples(kv_heads, head_dim, scale=scale)
            else:
                seen.held[identity] = KeyCovariance(kv_heads, head_dim)
        if seen.kind == "attention" and prompts:
            for batch in range(record["done"]):
                tensors, counts = self.files.read(
                    f"chunk-{batch}", lambda name: int(name.split(".")[0]) in prompts
                )
                for number, samples in prompts.items():
                    for row in range(counts[number]):
                        names = ("keys", "seen", "queries", "positions")
                        samples.append(
                            {n: tensors[f"{number}.{row}.{n}"].to(self.device) for n in names}
                        )
        for number, identity in enumerate(seen.layers):
            if number not in prompts:
                continue
            held = seen.held[identity]
            state = {
                name.partition(".")[2]: value
                for name, value in moments.items()
                if name.partition(".")[0] == str(number)
            }
            if isinstance(held, AttentionSamples):
                held.restore(state, prompts[number])
                self._prompts[identity] = held.prompts
            else:
                held.restore(state)
        seen.per_batch = record["per_batch"]
        seen.blocks = {weights: tuple(blocks) for weights, blocks in record["blocks"].items()}
        return int(record["done"])

    def keep(self, seen: Seen, number: int) -> None:
        """After a batch: its samples first, then how far the run has come."""
        tensors: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        counts, caches = [], []
        for place, (identity, held) in enumerate(seen.held.items()):
            if isinstance(held, AttentionSamples):
                first = self._prompts.get(identity, 0)
                counts.append(held.prompts - first)
                for row in range(held.prompts - first):
                    for name, value in held.prompt(first + row).items():
                        tensors[f"{place}.{row}.{name}"] = value
                self._prompts[identity] = held.prompts
            moments |= {f"{place}.{name}": value for name, value in held.state().items()}
            kv_heads = (held.moments if isinstance(held, AttentionSamples) else held).num_kv_heads
            shape = (kv_heads, seen.head_dims[identity], seen.scales[identity])
            caches.append((*identity, seen.layers[identity], *shape))
        record = {"done": number + 1, "per_batch": seen.per_batch, "caches": caches}
        record["blocks"] = seen.blocks
        if counts:
            self._write(f"chunk-{number}", tensors, counts)
        self._write("seen", moments, record)

    def keep_basis(self, basis: Basis, number: int) -> None:
        tensors = {"query": basis.query, "key": basis.key, "spectrum": basis.spectrum}
        record = {"weights": basis.weights, "layer": basis.layer, "tokens": basis.tokens}
        self._write(f"basis-{number}", tensors, record)

    def _basis(self, number: int) -> Basis:
        tensors, record = self.files.read(f"basis-{number}")
        return Basis(**tensors, **record, kind="attention")  # type: ignore[arg-type]

    def _write(self, name: str, tensors: dict[str, Tensor], record: Any) -> None:
        if self._broken:
            return
        try:
            self.files.write(name, tensors, record)
        except OSError as error:
            self._broken = True
            log.warning(
                "cannot keep what was seen in %s (%s): a stop will lose it. Free some space, or "
                "set LOKI_HOME to another folder.",
                self.files.folder,
                error,
            )


def _run_key(
    model: nn.Module, settings: dict[str, Any], batches: Iterable[Tensor | Mapping[str, Any]]
) -> str:
    """Names a run (64 hex digits): the weights of the model, the settings, and every token."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings, STEPS]).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {_fingerprint(parameter)} ".encode())
    for batch in batches:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        for name, value in sorted(given.items()):
            digest.update(f"{name} ".encode())
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype} ".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()


def _fingerprint(parameter: Tensor) -> str:
    """Weights of a kind that has no fingerprint are told by their shape."""
    try:
        return weights_fingerprint(parameter)
    except Exception:  # of whatever library's tensor subclass
        return str(tuple(parameter.shape))


def _tokens(batch: Tensor | Mapping[str, Any]) -> int:
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 0


def _columns(rank: int | float, head_dim: int) -> int:
    """As `Basis.rank_for`; a count above head_dim is head_dim, for layers may differ."""
    if isinstance(rank, float):
        return max(1, math.ceil(round(rank * head_dim, 6)))
    return min(rank, head_dim)


class LookingOn(fx.Interpreter):
    """Runs a graph and hands each cache's keys and queries over when its last core has run.

    Not sooner: keys may be rotated or filled in place after the node that names them.
    """

    def __init__(self, gm: fx.GraphModule, caches: Sequence[_Observed], moments: Seen) -> None:
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


def _unseen(seen: Seen, expected: int) -> Exception:
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
