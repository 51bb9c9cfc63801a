"""Score-optimal bases in closed form, as far averaged over rotations as prompts kept apart tell.

Legend: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, T keys, S queries, D head_dim, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from loki_compile.pca_store.attention_fit import RECENT, SINK, AttentionSamples
from loki_compile.pca_store.basis import Basis
from loki_compile.pca_store.covariance import KeyCovariance
from torch import Tensor

# The second of so many prompts is kept apart: fits are measured on it. So many of its queries.
APART_EVERY = 4
QUERIES_APART = 48
# Of every key that a query sees, the share that is read where a fit is measured (the default).
BUDGET = 0.125
# How far moments are averaged over rotations: from not at all, what was seen, to entirely.
SHARES = (0.0, 0.1, 0.3, 0.6, 1.0)


class ScoreSamples:
    """Moments of some prompts, and whole prompts beside them that a fit is measured on.

    Args:
        scale: of the scores, as in softmax(scale * q.k).
        pairs: dims that turn together with the position; () where none do.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float,
        pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.moments = KeyCovariance(num_kv_heads, head_dim)
        self.apart = AttentionSamples(
            num_kv_heads, head_dim, scale=scale, queries_per_prompt=QUERIES_APART
        )
        self.pairs = tuple(pairs)
        self._taken = 0

    @torch.no_grad()
    def update(self, keys: Tensor, queries: Tensor, mask: Tensor | None = None) -> None:
        """Take in prompts, with the arguments of `KeyCovariance.update`.

        Raises:
            ValueError: shapes that do not fit together.
        """
        for row in range(len(keys)):
            own = slice(row, row + 1)
            into = self.apart if self._taken % APART_EVERY == 1 else self.moments
            into.update(keys[own], queries[own], None if mask is None else mask[own])
            self._taken += 1

    @property
    def prompts(self) -> int:
        """Prompts kept so far."""
        return self.apart.prompts

    def prompt(self, number: int) -> dict[str, Tensor]:
        """The tensors of one kept prompt, by name, in their dtypes and on their device."""
        return self.apart.prompt(number)

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes besides prompts."""
        apart = {f"apart_{name}": value for name, value in self.apart.state().items()}
        return {**self.moments.state(), **apart, "taken": torch.tensor(self._taken)}

    def restore(self, state: dict[str, Tensor], prompts: Sequence[dict[str, Tensor]]) -> None:
        """Takes the place of what was taken in.

        Raises:
            ValueError: tensors are missing or do not fit together.
        """
        if "taken" not in state:
            raise ValueError("found samples that are not whole (no number of prompts)")
        self.moments.restore(state)
        apart = {n.removeprefix("apart_"): x for n, x in state.items() if n.startswith("apart_")}
        self.apart.restore(apart, prompts)
        self._taken = int(state["taken"])

    @torch.no_grad()
    def fit(self, rank: int, *, weights: str = "", layer: str = "") -> Basis:
        """The score-optimal pair of moments that are averaged over rotations in part: by the share
        that misses the least attention, at `rank` dims, on the prompts that were kept apart.

        Its moments are of all prompts, those as well. Without prompts apart, what one prompt shows
        is not trusted: the average over rotations is taken, where there are any.

        Raises:
            ValueError: no keys or no queries seen yet.
        """
        whole = KeyCovariance(self.moments.num_kv_heads, self.moments.head_dim)
        whole.merge(self.moments)
        whole.merge(self.apart.moments)
        shares = SHARES if self.pairs else SHARES[:1]
        if not self.prompts or not self.moments.queries:
            averaged = whole.over_rotations(self.pairs, shares[-1])
            return averaged.score_optimal(weights=weights, layer=layer)
        missed = {
            share: self.missed(self.moments.over_rotations(self.pairs, share).score_optimal(), rank)
            for share in shares
        }
        best = min(missed, key=lambda share: (missed[share], share))
        basis = whole.over_rotations(self.pairs, best).score_optimal(weights=weights, layer=layer)
        measured = {
            "missed_mass": missed[best],
            "missed_by_exact_scores": self.missed(None, rank),
            "share_over_rotations": best,
            "rank": float(rank),
            "budget": BUDGET,
        }
        return dataclasses.replace(basis, measured=measured)

    @torch.no_grad()
    def missed(self, basis: Basis | None, rank: int) -> float:
        """The share of attention on keys that are not among those chosen, the mean over the queries
        kept apart: an eighth of the keys that each sees, by the greatest score in its group. None
        chooses by the exact scores.
        """
        pair = None if basis is None else basis.truncate(rank)
        samples = [
            missed_mass(pair, self.apart.prompt(i), self.apart.scale) for i in range(self.prompts)
        ]
        return sum(samples) / len(samples)


def missed_mass(
    pair: tuple[Tensor, Tensor] | None, prompt: Mapping[str, Tensor], scale: float
) -> float:
    """As `ScoreSamples.missed`, of one prompt: `keys` (Hkv, T, D), `seen` (Hkv, 1, 1, T), `queries`
    (Hkv, G, N, D) and their `positions` (N,)."""
    keys, queries = prompt["keys"].float(), prompt["queries"].float()
    at = torch.arange(keys.shape[1], device=keys.device)
    newest = prompt["positions"][:, None]
    visible = prompt["seen"] & (at <= newest)  # (Hkv, 1, N, T)
    attention = (scale * queries @ keys[:, None].mT).masked_fill(~visible, -torch.inf)
    ranked = attention
    if pair is not None:
        query, key = (part.to(keys.device) for part in pair)
        ranked = (queries @ query[:, None]) @ (keys @ key)[:, None].mT
    ranked = ranked.masked_fill(~visible, -torch.inf).amax(1)  # of the group: (Hkv, N, T)
    kept = visible[:, 0] & ((at < SINK) | (at > newest - RECENT))
    ranked = ranked.masked_fill(kept, torch.inf)
    count = visible[:, 0].sum(-1)
    budget = (count * BUDGET).ceil().clamp(min=SINK + RECENT).long()
    most = min(keys.shape[1], max(SINK + RECENT, math.ceil(BUDGET * keys.shape[1])))
    order = ranked.topk(most, -1).indices
    chosen = torch.zeros_like(visible[:, 0]).scatter(
        -1, order, torch.arange(most, device=keys.device) < budget[..., None]
    )
    left = attention.softmax(-1).masked_fill(chosen[:, None], 0)
    return float(left.sum(-1).nan_to_num().mean())
