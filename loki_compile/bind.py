"""From a plan to what the runtime works with: how each cache lies and comes in, and its basis."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from loki_compile.buffers import Growth
from loki_compile.caches import CacheBinding, CacheForm, GivenSize
from loki_compile.config import LokiConfig
from loki_compile.counts import say_once
from loki_compile.kernels.fused import unit_queries
from loki_compile.kernels.kept import PAGE, Keeps, PageLayout
from loki_compile.passes.appends import Append, grown_in_place
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import concrete, fake_value
from loki_compile.passes.graphs import adapters_of, input_of, nearest_matrix, parameter_test
from loki_compile.passes.plan import Plan
from loki_compile.passes.rotary import rotated_pairs
from loki_compile.passes.shared_caches import Part, with_parts
from loki_compile.pca_store.basis import Basis, BasisSet
from loki_compile.pca_store.fingerprint import block_fingerprints, weights_fingerprint
from loki_compile.pca_store.store import Store


def bind_caches(
    gm: fx.GraphModule,
    plan: Plan,
    example_inputs: Sequence[Any],
    parts: Sequence[Part],
    config: LokiConfig,
    appends: Sequence[Append] = (),
) -> list[CacheBinding]:
    """For each cache of the plan: where it comes in, which weights make its keys, its basis.

    Raises:
      ValueError: the basis that the options name does not belong to the model.
    """
    inputs = with_parts(example_inputs, parts)
    graph = _Graph(
        gm.graph,
        {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))},
        dict(enumerate(parts, len(example_inputs))),
        appends,
        parameter_test(gm, inputs),
    )
    bindings = []
    blocks: dict[str, tuple[str, ...]] = {}
    for number, (cache, keeps) in enumerate(zip(plan.caches, plan.keeps, strict=True)):
        site = next(s.site for s in plan.sparse if s.cache == number)
        weight = nearest_matrix(cache.new_keys, graph.is_parameter)
        weights = ""
        if weight is not None:
            matrix = inputs[graph.places[weight]]
            weights = weights_fingerprint(matrix)
            blocks[weights] = block_fingerprints(matrix, site.head_dim)
        bindings.append(graph.binding(cache, keeps, site, weight, weights))
    if config.basis != "auto" or bindings:
        _choose_bases(bindings, blocks, config)
    return bindings


@dataclass(frozen=True)
class _Graph:
    """A graph whose caches are bound: the `places` of its placeholders among its inputs; by place,
    the `parts` of others; what grows; which nodes are parameters; the `rotations` met so far."""

    graph: fx.Graph
    places: dict[fx.Node, int]
    parts: dict[int, Part]
    appends: Sequence[Append]
    is_parameter: Callable[[fx.Node], bool]
    rotations: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def binding(
        self,
        cache: KeyCache,
        keeps: Keeps,
        site: AttentionSite,
        weight: fx.Node | None,
        weights: str,
    ) -> CacheBinding:
        """Of a cache that a site ranks by what it `keeps`, and that a weight makes the keys of;
        its basis is still to be chosen."""
        places, place = self.places, self.places[cache.past]
        dtype = fake_value(cache.past).dtype
        grown = grown_in_place(cache, self.appends)
        return CacheBinding(
            form=_form(cache, in_place=bool(grown)),
            keeps=keeps,
            argument=place,
            part=self.parts.get(place),
            weights=weights,
            layer=site.path or cache.source,
            kv_heads=site.kv_heads,
            head_dim=site.head_dim,
            new_tokens=token_count(self.graph, site) if cache.writes else 0,
            weight=places[weight] if weight is not None else None,
            k_pe=places[cache.k_pe.past] if cache.k_pe is not None else None,
            latent=site.latent is not None,
            unit_queries=_unit_queries(site, places),
            pairs=self._pairs(cache, site) if keeps is Keeps.INDEX else (),
            layout=PageLayout(PAGE, dtype) if keeps is Keeps.PAGES else None,
            grown=grown,
        )

    def _pairs(self, cache: KeyCache, site: AttentionSite) -> tuple[tuple[int, int], ...]:
        """The dims of the cache's rows that turn together; () where that cannot be told, or differs
        between its writes. Of rows that are expanded to keys it is not asked."""
        if site.latent is not None:
            return ()
        found = {
            rotated_pairs(source, site.tokens, site.head_dim, self.is_parameter, self.rotations)
            for source in cache.new_keys
        }
        return found.pop() if len(found) == 1 else ()


def token_count(graph: fx.Graph, site: AttentionSite) -> int | GivenSize:
    """The site's new tokens, or where each call brings their number."""
    if site.query_tokens > 0:
        return site.query_tokens
    place = input_of(graph, site.tokens)
    assert place is not None  # the plan has looked
    return GivenSize(place)


def adapters(
    gm: fx.GraphModule,
    bindings: list[CacheBinding],
    example_inputs: Sequence[Any],
    parts: Sequence[Part],
) -> int:
    """Adapters that the graph adds, where a basis that was fitted before them is used."""
    if all(binding.basis is None for binding in bindings):
        return 0
    return adapters_of(gm.graph, parameter_test(gm, with_parts(example_inputs, parts)))


def growths(graph: fx.Graph, appends: Sequence[Append]) -> list[Growth]:
    """What calls bring and take of each tensor that grows in place."""
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found = []
    for append in appends:
        size = fake_value(append.source).shape[append.axis]
        count = concrete(size)
        new: int | GivenSize | None = count
        if count is None:
            place = input_of(graph, size)
            assert place is not None  # the analysis has looked
            new = GivenSize(place)
        assert new is not None
        found.append(Growth(places[append.past], append.output, append.axis, new))
    return found


def _form(cache: KeyCache, in_place: bool) -> CacheForm:
    return CacheForm(
        token_axis=cache.token_axis,
        head_axis=cache.head_axis,
        batch_axis=cache.batch_axis,
        folded=cache.heads_are_folded,
        batched=cache.batched,
        grows=cache.grows,
        written=bool(cache.writes),
        item_bytes=fake_value(cache.past).element_size(),
        output=cache.output,
        k_pe_output=None if cache.k_pe is None else cache.k_pe.output,
        in_place=in_place,
    )


def _unit_queries(
    site: AttentionSite, places: dict[fx.Node, int]
) -> Callable[[Sequence[Any]], Tensor | None] | None:
    """What rows that are expanded to keys meet, given a call's arguments; None where they are not,
    or where the graph computes the map."""
    latent = site.latent
    if latent is None or latent.keys is None or latent.keys.weight not in places:
        return None
    place, maps, heads = places[latent.keys.weight], latent.absorption, site.query_heads

    def ask(args: Sequence[Any]) -> Tensor:
        return unit_queries(args[place].detach(), *maps, heads)

    return ask


def _choose_bases(
    bindings: list[CacheBinding], blocks: dict[str, tuple[str, ...]], config: LokiConfig
) -> None:
    """Fills in `binding.basis` from the user's choice or the store; None is fitted at run time.

    blocks: fingerprints of the rows of weights, by the weights' own.
    """
    if config.basis == "auto":
        chosen = _once(Store().find((b.weights for b in bindings if b.weights), blocks))
    else:
        chosen = load_basis(config.basis)
    uses: dict[str, dict[Any, int]] = {}
    for binding in bindings:
        # A cache that is ranked in two ways is bound twice.
        caches = uses.setdefault(binding.weights, {})
        occurrence = caches.setdefault((binding.argument, binding.part, binding.k_pe), len(caches))
        if binding.keeps is not Keeps.INDEX:
            continue
        must = config.basis != "auto" and not binding.latent
        rows = blocks.get(binding.weights, ())
        binding.basis = _pick(chosen, binding, occurrence, rows, must=must)
        if must and binding.basis is None and binding.form.written:
            say_once(
                ("unreadable", binding.layer),
                f"the weights that make the keys of {binding.layer} cannot be read, so basis="
                f"{config.basis!r} cannot be told to be theirs: one is fitted from each cache.",
            )
        if binding.basis is not None and not config.rank_by_spectrum:
            binding.basis.rank_for(config.rank)
    if isinstance(config.rank, int):
        for binding in bindings:
            if binding.keeps is Keeps.INDEX and config.rank > binding.head_dim:
                raise ValueError(
                    f"rank={config.rank} exceeds head_dim={binding.head_dim} of "
                    f"{binding.layer}: use a count up to {binding.head_dim}, or a fraction."
                )


def _pick(
    chosen: BasisSet | None,
    binding: CacheBinding,
    occurrence: int,
    blocks: tuple[str, ...],
    *,
    must: bool,
) -> Basis | None:
    if chosen is None or not binding.weights:  # no weight here made its keys, or none we can read
        return None
    if not must and not chosen.find(binding.weights, blocks=blocks, num_kv_heads=binding.kv_heads):
        return None
    return chosen.match(
        binding.weights,
        layer=binding.layer,
        num_kv_heads=binding.kv_heads,
        head_dim=binding.head_dim,
        occurrence=occurrence,
        blocks=blocks,
    )


_read: deque[BasisSet] = deque(maxlen=8)


def _once(chosen: BasisSet | None) -> BasisSet | None:
    """The equal set that was read before, if there is one.

    Indexes belong to bases: graphs that read one file find each other's. The file itself is read
    for each graph, since it may have been calibrated again.
    """
    if chosen is None:
        return None
    for known in _read:
        if known.fingerprint == chosen.fingerprint and all(
            torch.equal(a.key, b.key) and torch.equal(a.query, b.query)
            for a, b in zip(known.bases, chosen.bases, strict=True)
        ):
            return known
    _read.append(chosen)
    return chosen


def load_basis(choice: str | Path | BasisSet) -> BasisSet:
    """A `BasisSet` as it is, or the one a store name, path or hub id names.

    Raises:
      ValueError: nothing there, or a file that is not an intact basis.
    """
    if isinstance(choice, BasisSet):
        return choice
    chosen = _once(Store().load(choice))
    assert chosen is not None
    return chosen
