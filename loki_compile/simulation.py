"""What a plan of layers makes of given tokens, without a compilation for each plan.

The model's graph for some tokens behind a filled cache is traced once and run node by node; each
attention core's result is then taken anew from the keys that the plan has its layer read. Of the
definition of the ops, in fp32; what is compiled for a plan is told by `loki_compile.backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from loki_compile.gradients import by_head
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.fused import QUERIES, laid_out, queries_by_head
from loki_compile.passes.attention import AttentionSite
from loki_compile.passes.normalize import normalize
from loki_compile.passes.sites import find_sites
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.policies.head_budgets import HeadBudget
from loki_compile.policies.kinds import Kind


class Simulation:
    """Runs graphs under `kinds`, by the path of each layer; `look` is what `watched` takes.

    bases: of layers, by their paths; of one that has none a basis is fitted from the keys of the
    first call. fitting: calls are prompts, and leave behind in `bases` what is fitted to their keys
    and queries. refused: why an attention core cannot be simulated, by its path.
    """

    def __init__(
        self,
        budget: Budget,
        rank: int | float | str,
        bases: Mapping[str, Basis],
        *,
        by_probability: bool = False,
    ) -> None:
        self.budget, self.rank, self.by_probability = budget, rank, by_probability
        self.bases = dict(bases)
        self.fitting = False
        self.kinds: dict[str, Kind] = {}
        self.paths: tuple[str, ...] = ()
        self.sources: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.served: dict[str, None] = {}

    def under(self, kinds: Sequence[Kind], paths: Sequence[str]) -> None:
        """Sets the plan: sources count the layers of `paths`."""
        self.kinds = dict(zip(paths, kinds, strict=True))
        self.paths = tuple(paths)
        self.sources = {
            path: paths[kind.source]
            for path, kind in self.kinds.items()
            if kind.reuse and kind.source is not None
        }

    def look(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        normal, _ = normalize(gm)
        sites, skipped = find_sites(normal.graph, max_query_tokens=None)
        for skip in skipped:
            self.refused[skip.path] = skip.sentence()
        plain = {}
        for site in sites:
            core = site.core
            if site.latent is not None or site.interleaved or core.softcap or core.query_scales:
                self.refused[site.path] = "its scores are not plain products"
            elif core.sink_logits is not None or core.row_sinks:
                self.refused[site.path] = "it has sinks"
            else:
                plain[site.node] = site
                self.served[site.path] = None

        def run(*args: Any) -> Any:
            return _Run(normal, plain, self).run(*args)

        return run


class _Run(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, sites: Mapping[fx.Node, AttentionSite], simulation: Simulation
    ) -> None:
        super().__init__(gm)
        self.sites, self.simulation = sites, simulation
        self._keep_until_sites()
        self.chosen: dict[str, Tensor] = {}

    def _keep_until_sites(self) -> None:
        """What a core's views are views of lives until the core has run."""
        until: dict[fx.Node, fx.Node] = {}
        for core, site in self.sites.items():
            for node in (site.query, site.key.base, site.value.base):
                until[node] = max(core, until.get(node, core))
        for user, used in [*self.user_to_last_uses.items()]:
            early = [node for node in used if node in until and user < until[node]]
            for node in early:
                used.remove(node)
                self.user_to_last_uses.setdefault(until[node], []).append(node)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        site = self.sites.get(n)
        if site is None:
            return result
        kind = self.simulation.kinds.get(site.path, Kind(dense=True))
        if kind.dense and not kind.ranking and not self.simulation.fitting:
            return result
        query = self.env[site.query]
        if site.core.query_layout != QUERIES:
            query = queries_by_head(query, site.core.query_layout)
        keys = by_head(self.env[site.key.base], site.key)
        if self.simulation.fitting:
            moments = KeyCovariance(site.kv_heads, site.head_dim)
            moments.update(keys.detach(), query.detach())
            self.simulation.bases[site.path] = moments.score_optimal()
            return result
        grouped = query.float().unflatten(1, (site.kv_heads, -1))  # (B, Hkv, G, S, D)
        scores = site.scale * torch.einsum("bhgsd,bhtd->bhgst", grouped, keys.float())
        seen = self._seen(site, scores)
        if kind.ranking:
            ranks = scores
            if kind.ranking == "loki":
                low, high = self._basis(site, keys)
                near = torch.einsum("bhtd,hdr->bhtr", keys.float(), high)
                wanted = torch.einsum("bhgsd,hdr->bhgsr", grouped, low)
                ranks = site.scale * torch.einsum("bhgsr,bhtr->bhgst", wanted, near)
            agreed = agreed_on(ranks, seen, by_probability=self.simulation.by_probability)
            self.chosen[site.path] = self._choose(kind.budgets, agreed, seen[:, :, 0])
        if kind.dense:
            return result
        reads = self.chosen[self.simulation.sources.get(site.path, site.path)]
        if kind.heads:
            reads = reads[:, list(kind.heads)]
        weights = scores.masked_fill(~(seen & reads[:, :, None]), -torch.inf).softmax(-1)
        values = by_head(self.env[site.value.base], site.value).float()
        out = torch.einsum("bhgst,bhtd->bhgsd", weights, values).flatten(1, 2).to(result.dtype)
        if site.core.out_layout != QUERIES:
            out = laid_out(out, site.core.out_layout, site.group_dim)
        return out.reshape(result.shape)

    def _seen(self, site: AttentionSite, scores: Tensor) -> Tensor:
        """bool (1, 1, 1, S, T): new tokens are the last ones, each sees those before it."""
        tokens, cached = scores.shape[3:]
        last = torch.arange(cached - tokens, cached, device=scores.device)
        seen = torch.arange(cached, device=scores.device) <= last[:, None]
        return seen[None, None, None]

    def _basis(self, site: AttentionSite, keys: Tensor) -> tuple[Tensor, Tensor]:
        held = self.simulation.bases
        if site.path not in held:
            moments = KeyCovariance(site.kv_heads, site.head_dim)
            moments.update(keys.detach(), keys.detach())
            held[site.path] = moments.pca()
        basis = held[site.path]
        return basis.truncate(basis.rank_for(self.simulation.rank))

    def _choose(self, budgets: tuple[HeadBudget, ...], wanted: Tensor, seen: Tensor) -> Tensor:
        """bool (B, Hkv, S, T): the keys of each row's budget, by (B, Hkv, S, T)."""
        budget, seen = self.simulation.budget, seen.expand_as(wanted)
        if not budgets:
            return chosen_keys(wanted, seen, budget)
        budgets = budgets * wanted.shape[1] if len(budgets) == 1 else budgets
        own = [each for each in budgets if each.span is not None]
        reads = torch.empty_like(seen)
        at = [head for head, each in enumerate(budgets) if each.span is not None]
        if own:
            reads[:, at] = chosen_by_head(wanted[:, at], seen[:, at], own, budget)
        for head, each in enumerate(budgets):
            if each.span is None:
                source = self.simulation.paths[each.source]
                reads[:, head] = self.chosen[source][:, each.head]
        return reads


def agreed_on(scores: Tensor, seen: Tensor, *, by_probability: bool) -> Tensor:
    """What a KV head's query heads rank keys by together: (B, Hkv, S, T), from scores
    (B, Hkv, G, S, T) and which keys are `seen`, as `Choice` has it."""
    if by_probability:
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(2)
    return scores.amax(2)


def chosen_keys(wanted: Tensor, seen: Tensor, budget: Budget) -> Tensor:
    """Which keys rows choose: bool like `wanted` (..., T), of those `seen`, which come first."""
    return _best_keys(wanted, seen, budget.keys_of(seen.sum(-1, keepdim=True)), budget)


def chosen_by_head(
    wanted: Tensor, seen: Tensor, budgets: Sequence[HeadBudget], budget: Budget
) -> Tensor:
    """The same where each KV head has a budget of its own, with a span: of `wanted` (B, H, S, T).
    `budget` says what is kept always, and which rows read all."""
    count = seen.sum(-1, keepdim=True)
    keep = torch.empty_like(count)
    for head, each in enumerate(budgets):
        assert each.span is not None
        lines = [alpha + (count[:, head] * beta >> 16) for alpha, beta in each.span.lines]
        keep[:, head] = torch.stack(lines).amax(0)
    keep = torch.minimum(keep.clamp(min=budget.sink + budget.recent), count)
    keep = torch.where(count < budget.min_keys, count, keep)
    last = torch.tensor([each.last for each in budgets], device=wanted.device)[:, None, None]
    at = torch.arange(wanted.shape[-1], device=wanted.device, dtype=wanted.dtype)
    return _best_keys(torch.where(last, at, wanted), seen, keep, budget)


def _best_keys(wanted: Tensor, seen: Tensor, keep: Tensor, budget: Budget) -> Tensor:
    """The `keep` (..., 1) best ones, and the first of those that are as good, behind what is always
    kept."""
    count, keep = seen.sum(-1, keepdim=True), keep.clamp(min=1)
    at = torch.arange(wanted.shape[-1], device=wanted.device)
    always = (at < budget.sink) | (at >= count - max(budget.recent, 1))
    ranked = wanted.masked_fill(always, torch.inf).masked_fill(~seen, -torch.inf)
    best = ranked.topk(int(keep.max())).values
    least = best.gather(-1, keep - 1)  # of what is chosen; of those equal to it the first are
    above, equal = ranked > least, ranked == least
    return (above | (equal & (equal.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))) & seen
