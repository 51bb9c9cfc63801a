"""Decides, per site, between sparse and dense, and with what budget. Edits nothing.

Everything that can be known before a key is seen is decided here; the rank of an index, which may
come from a basis that is fitted later, is the runtime's to fill in (`kernels` sees it as a shape).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loki_compile.kernels.kept import Keeps
from loki_compile.kernels.ops import BACKENDS, unserved
from loki_compile.kernels.spans import Span
from loki_compile.passes.attention import AttentionSite, Reason, Skipped
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    hint_of,
    shape_of,
    writes_of,
)
from loki_compile.passes.graphs import input_of, remap
from loki_compile.passes.latent import absorb
from loki_compile.passes.policy import Candidate, Choice, Policy
from loki_compile.passes.slots import hold_to, masks_at, slot_classes
from loki_compile.passes.span_prefills import SpanPrefill, too_wide, why_not
from loki_compile.passes.trace_caches import trace_cache
from torch import fx


@dataclass(frozen=True)
class SparseSite:
    """A site that the sparse variant rewrites. `cache` numbers its cache in `Plan.caches`.

    `views` lead from that cache to the site's keys: layers that share a cache share its index,
    whatever part of it each reads. `note` is what its policy, and the kernels of its device, say to
    their user. `masks_at` is the node behind which the site's masks are as its core reads them;
    None where it has none. `source` numbers, in `Plan.sparse`, the site whose positions it reads;
    `borrowed`, where some KV heads read another site's, that site and the KV head of it for each.
    """

    site: AttentionSite
    cache: int
    views: tuple[fx.Node, ...]
    choice: Choice
    note: str = ""
    masks_at: fx.Node | None = None
    source: int | None = None
    borrowed: tuple[tuple[int, int] | None, ...] = ()

    @property
    def weighed(self) -> bool:
        """Whether what its rows choose and leave out leaves the graph."""
        chooses = self.choice.budgets is None or bool(self.choice.budgets.own)
        return self.choice.weighed and self.source is None and chooses

    @property
    def reads_all(self) -> bool:
        """Whether its own result stays dense: it chooses for others alone."""
        return self.choice.dense_result


@dataclass(frozen=True)
class Plan:
    """What becomes of each attention core of one graph.

    `keeps` says of each of `caches` what is kept beside it: a cache that sites rank in two ways is
    there twice. `prefills` are those of `dense` that read spans.
    """

    sparse: tuple[SparseSite, ...]
    dense: tuple[Skipped, ...]
    sites: tuple[AttentionSite, ...]
    caches: tuple[KeyCache, ...] = ()
    keeps: tuple[Keeps, ...] = ()
    prefills: tuple[SpanPrefill, ...] = ()

    def on(self, mapping: dict[fx.Node, fx.Node]) -> Plan:
        """The same plan for a copy of its graph, given the map from old nodes to new."""
        return remap(self, mapping)


def make_plan(
    sites: list[AttentionSite],
    skipped: list[Skipped],
    *,
    policy: Policy,
    layers: str | tuple[int | str, ...],
) -> Plan:
    """Traces each site's cache and decides.

    Args:
      policy: how each site chooses its keys. Where no row can ever see more than `min_keys` of the
        budget, the site is left dense.
      layers: "all", or numbers and path patterns of the sites that may be sparse, see
        `AttentionSite.is_among`.

    Raises:
      ValueError: a choice that names as its source no earlier site of the same slots.
    """
    writes = writes_of(sites[0].node.graph) if sites else []
    found = [_found(site, number, writes, layers) for number, site in enumerate(sites)]
    cached = [None if isinstance(each, Skipped) else each for each in found]
    candidates = [
        Candidate(site if pair is None else pair[0], None if pair is None else pair[1], slots)
        for site, pair, slots in zip(sites, cached, slot_classes(cached, writes), strict=True)
    ]
    choices = list(policy(candidates))
    read = _sources(choices)
    draft = _Draft(writes, list(skipped))
    for number, (each, choice) in enumerate(zip(found, choices, strict=True)):
        check_source(candidates, choices, number)
        if isinstance(each, Skipped):
            draft.dense.append(each)
            continue
        source, choice, own = draft.source_of(number, choice, choices, candidates)
        left_out = _left_out(*each, choice, reads=source is not None, read=number in read)
        if left_out is not None:
            draft.dense.append(left_out)
            continue
        draft.add(each, *draft.with_borrowed(choice, choices), source, own)
    return Plan(
        tuple(draft.sparse),
        tuple(draft.dense),
        tuple(sites),
        tuple(cache for cache, _ in draft.caches),
        tuple(keeps for _, keeps in draft.caches),
    )


@dataclass
class _Draft:
    """What is decided of the sites so far: `places` in `sparse`, of whose positions are read by
    others, and what each of `sparse` was found to be."""

    writes: list[Write]
    dense: list[Skipped]
    sparse: list[SparseSite] = field(default_factory=list)
    caches: list[tuple[KeyCache, Keeps]] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)
    lenders: list[tuple[AttentionSite, KeyCache]] = field(default_factory=list)

    def source_of(
        self,
        number: int,
        choice: Choice,
        choices: Sequence[Choice],
        candidates: Sequence[Candidate],
    ) -> tuple[int | None, Choice, Any]:
        """The place of the site whose positions a site reads, None if it chooses itself; its
        choice; and what it is to be found by among `places`."""
        if choice.source is None:
            return None, choice, number
        source = self.places.get(choice.source)
        own = (choice.source, candidates[number].slots)
        if source is None:
            # Of those that would read what a dense site chose, the first chooses for the others.
            source = self.places.get(own)
            there, site = candidates[choice.source].site, candidates[number].site
            choice = _itself(
                choice, choices[choice.source], there, site.kv_heads, chooses=source is None
            )
        return source, choice, own

    def with_borrowed(
        self, choice: Choice, choices: Sequence[Choice]
    ) -> tuple[Choice, tuple[tuple[int, int] | None, ...]]:
        """The choice, in which heads that would read of a site that has become dense choose
        themselves; and for each KV head the place of the site that it reads of, and its head."""
        if choice.budgets is None or not any(choice.borrowed):
            return choice, ()
        spans, last = list(choice.budgets.heads), list(choice.budgets.last)
        places: list[tuple[int, int] | None] = []
        for head, borrowed in enumerate(choice.borrowed):
            place = None if borrowed is None else self.places.get(borrowed[0])
            places.append(None if borrowed is None or place is None else (place, borrowed[1]))
            if borrowed is not None and place is None:
                spans[head], last[head] = _budget_of(choices[borrowed[0]], borrowed[1])
        budgets = dataclasses.replace(choice.budgets, heads=tuple(spans), last=tuple(last))
        choice = dataclasses.replace(choice, budgets=budgets)
        return choice, tuple(places) if any(places) else ()

    def add(
        self,
        found: tuple[AttentionSite, KeyCache],
        choice: Choice,
        borrowed: tuple[tuple[int, int] | None, ...],
        source: int | None,
        own: Any,
    ) -> None:
        site, cache = found
        assert choice.ranking is not None
        # What ranks nothing needs rows of keys alone, as long as they lie in one tensor.
        ranks = choice.ranks or cache.k_pe is not None
        kept = (cache, choice.ranking.keeps if source is None and ranks else Keeps.NOTHING)
        if kept not in self.caches:
            self.caches.append(kept)
        if any(term.varies(heads) for term in site.masks for heads in "hg"):
            choice = dataclasses.replace(choice, per_head=True)
        if source is not None:
            hold_to(found, self.lenders[source], self.writes)
        else:
            self.places[own] = len(self.sparse)
        for place in {place for place, _ in filter(None, borrowed)}:
            hold_to(found, self.lenders[place], self.writes)
        self.lenders.append(found)
        device = fake_value(cache.past).device.type
        self.sparse.append(
            SparseSite(
                site,
                self.caches.index(kept),
                cache.views,
                choice,
                note="; ".join(filter(None, (choice.note, BACKENDS[device].note()))),
                masks_at=masks_at(site, self.writes),
                source=source,
                borrowed=borrowed,
            )
        )


def with_prefills(
    plan: Plan, sites: Sequence[AttentionSite], choices: Sequence[Choice], hindered: Sequence[str]
) -> Plan:
    """The plan, with prompts that read the spans which `choices` have for them.

    sites: of `find_prefills`. hindered: of each, why it may read none, whatever its choice; "".
    """
    found: dict[fx.Node, Skipped] = {}
    prefills = []
    for site, choice, hindrance in zip(sites, choices, hindered, strict=True):
        why, note, spans = hindrance, choice.note, choice.spans
        if not why and (spans is None or spans.whole):
            why = "its policy has no spans for it"
        why = why or why_not(site)
        if not why and spans is not None:
            wide, always = too_wide(site, spans)
            why = wide if always else ""
            note = f"{note}; dense at this length, where {wide}" if wide else note
        reason, details = (Reason.PREFILL_DENSE, why) if why else (Reason.PREFILL_SPANS, note)
        traced = hint_of(site.tokens)  # of whatever length a call is
        found[site.node] = Skipped(site.node, reason, (traced, details), site.path)
        if not why and spans is not None:
            prefills.append(SpanPrefill(site, spans))
    dense = tuple(
        found.get(skip.node, skip) if skip.reason is Reason.PREFILL else skip for skip in plan.dense
    )
    served = {skip.node for skip in dense if skip.reason is Reason.PREFILL_SPANS}
    prefills = [each for each in prefills if each.site.node in served]
    return dataclasses.replace(plan, dense=dense, prefills=tuple(prefills))


def _found(
    site: AttentionSite, number: int, writes: list[Write], layers: str | tuple[int | str, ...]
) -> tuple[AttentionSite, KeyCache] | Skipped:
    """The site, over cached latents where it reads those, and its cache; or why it stays dense,
    however it would choose."""
    if layers != "all" and not site.is_among(layers, number):
        return Skipped(site.node, Reason.LAYER_OFF, (layers,), site.path)
    cache = trace_cache(site, writes) if site.latent is None else None
    if cache is None or (isinstance(cache, Skipped) and cache.reason is Reason.LATENT):
        dims = site.value_dim if cache is None else cache.details[0]
        absorbed = absorb(site, writes, dims)
        site, cache = absorbed if isinstance(absorbed, tuple) else (site, absorbed)
    if isinstance(cache, Skipped):
        return cache
    device = fake_value(cache.past).device.type
    why_not = unserved(device)
    if why_not:
        return Skipped(site.node, Reason.DEVICE, (device, why_not), site.path)
    if site.query_tokens < 0 and not _counts_tokens(site, cache):
        return Skipped(site.node, Reason.PREFILL, (site.tokens,), site.path)
    return site, cache


def _left_out(
    site: AttentionSite, cache: KeyCache, choice: Choice, *, reads: bool, read: bool
) -> Skipped | None:
    """Why a site stays dense that could be sparse. `reads`: it reads what another chose. `read`:
    others read what it chooses."""
    if choice.ranking is None or (choice.dense_result and not read):
        return Skipped(site.node, Reason.READS_ALL, (), site.path)
    if not reads and (why_not := choice.ranking.refuses(site, cache)):
        return Skipped(site.node, Reason.POLICY, (choice.ranking.name, why_not), site.path)
    slots, least = _most_keys(site, cache), choice.budget.min_keys
    if slots is not None and slots <= least:
        return Skipped(site.node, Reason.SHORT_CACHE, (slots, least), site.path)
    return None


def _sources(choices: Sequence[Choice]) -> set[int]:
    borrowed = {site for choice in choices for site, _ in filter(None, choice.borrowed)}
    return borrowed | {choice.source for choice in choices if choice.source is not None}


def check_source(candidates: Sequence[Candidate], choices: Sequence[Choice], number: int) -> None:
    """
    Raises:
      ValueError: what differs from an earlier site of the same slots, which chooses.
    """
    source, heads = choices[number].source, choices[number].heads
    if source is not None:
        _check_lender(candidates, choices, number, source)
        _check_heads(candidates, number, source, heads)
    for lender, head in filter(None, choices[number].borrowed):
        _check_lender(candidates, choices, number, lender)
        _check_head(candidates, choices, number, lender, head)


def _check_lender(
    candidates: Sequence[Candidate], choices: Sequence[Choice], number: int, source: int
) -> None:
    here, there = (candidates[n].site.path or str(n) for n in (number, source))
    if source >= number:
        raise ValueError(
            f"policy: {here} is to read what {there} chose, which does not lie before it: name an "
            "earlier layer."
        )
    ranking = choices[source].ranking
    if ranking is not None and ranking.ranges:
        raise ValueError(
            f"policy: {here} is to read what {there} chose, which reads ranges and chooses for "
            "nobody: name a layer that ranks keys."
        )
    if choices[source].source is not None:
        raise ValueError(
            f"policy: {here} is to read what {there} chose, which reads what another chose: name "
            "that one."
        )
    both = candidates[number], candidates[source]
    alike = both[0].slots is not None and both[0].slots == both[1].slots
    if None not in (both[0].cache, both[1].cache) and not alike:
        raise ValueError(
            f"policy: {here} is to read what {there} chose, and their keys do not lie in the same "
            "slots (another length, window or mask): name a layer that sees the same keys."
        )


def _check_heads(
    candidates: Sequence[Candidate], number: int, source: int, heads: tuple[int, ...]
) -> None:
    here, there = (candidates[n].site for n in (number, source))
    if heads and (len(heads) != here.kv_heads or max(heads) >= there.kv_heads):
        raise ValueError(
            f"policy: the map of heads {heads} of {here.path or number} does not lead from its "
            f"{here.kv_heads} KV heads to the {there.kv_heads} of {there.path or source}: give as "
            f"many numbers as the first, each below {there.kv_heads}."
        )


def _check_head(
    candidates: Sequence[Candidate],
    choices: Sequence[Choice],
    number: int,
    source: int,
    head: int,
) -> None:
    here, there = (candidates[n].site.path or str(n) for n in (number, source))
    there_are, borrowed = candidates[source].site.kv_heads, choices[source].borrowed
    if head >= there_are:
        raise ValueError(
            f"policy: {here} is to read what KV head {head} of {there} chose, which has "
            f"{there_are}: name one below {there_are}."
        )
    if borrowed and borrowed[head] is not None:
        raise ValueError(
            f"policy: {here} is to read what KV head {head} of {there} chose, which reads what "
            "another chose: name that one."
        )


def _itself(
    choice: Choice, lent: Choice, source: AttentionSite, kv_heads: int, *, chooses: bool
) -> Choice:
    """What a site of so many KV heads does whose source has become dense: it reads as many keys as
    that would have chosen, `lent` being its choice."""
    note = f"{source.path or 'its source'} is dense"
    note += ": chooses itself" if chooses else ": reads what the first of its readers chose"
    budgets = choice.budgets
    if lent.budgets is not None:
        heads = choice.heads or [n * source.kv_heads // kv_heads for n in range(kv_heads)]
        budgets = lent.budgets.mapped(heads, lent.budget.span)
    return dataclasses.replace(choice, heads=(), note=note, budgets=budgets)


def _budget_of(lent: Choice, head: int) -> tuple[Span, bool]:
    """As many keys as a KV head chooses that another would read of, and whether the last ones."""
    if lent.budgets is None:
        return lent.budget.span, False
    return lent.budgets.heads[head] or lent.budget.span, lent.budgets.last[head]


def _counts_tokens(site: AttentionSite, cache: KeyCache) -> bool:
    """Whether a number of new tokens that each call brings can be told when it runs, and no window
    of the cache depends on it."""
    return not cache.leaves and input_of(site.node.graph, site.tokens) is not None


def _most_keys(site: AttentionSite, cache: KeyCache) -> int | None:
    """Keys that the site can ever see, where that is a constant: a static cache, a window."""
    if cache.grows:
        kept = shape_of(cache.leaves[-1]) if cache.leaves else None
        window = concrete(kept[cache.token_axis]) if kept is not None else None
        return None if window is None else window + site.query_tokens
    shape = shape_of(site.key.base)
    return concrete(shape[site.key.order[2]]) if shape is not None else None
