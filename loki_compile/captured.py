"""How much of each layer's attention lies on the keys that another layer would choose.

A backend that looks on while a model reads prompts: of some rows of each prompt it keeps, layer by
layer, which keys the layer would choose, and sums what attention every later layer gives to these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loki_compile.kernels.budget import Budget
from loki_compile.observation import Observed, Seen
from loki_compile.pca_store.basis import Basis, BasisSet
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.simulation import agreed_on, chosen_keys
from loki_compile.watching import watched

# Rows of each prompt that are looked at, evenly spread over its second half.
ROWS = 24
# The ways to choose that are compared: by the index, and by the keys themselves.
RANKINGS = ("loki", "oracle")


@dataclass
class CapturedMass(Seen):
    """What is seen of the layers of one model; `observe` is the backend.

    captured: by ranking, source and reader, the share of the reader's attention that lies on what
    the source chose: a sum over rows, (KV heads of the reader, KV heads of the source). The source
    of a layer may be itself. rows: how many are in the sums.
    """

    budget: Budget = field(default_factory=lambda: Budget(None, 8192, 4, 32, 0))
    bases: BasisSet | None = None
    by_probability: bool = False
    captured: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    rows: int = 0
    chosen: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        return list(self.layers.values())

    def start(self, mask: Tensor | None) -> None:
        super().start(mask)
        self.chosen = {ranking: [] for ranking in RANKINGS}
        self.rows += ROWS

    def add(self, cache: Observed, keys: Tensor, queries: Sequence[Tensor]) -> None:
        """keys (1, Hkv, T, D); each of `queries` (1, Hq, T, D)."""
        tokens = keys.shape[2]
        if tokens != queries[0].shape[2] or tokens < 2 * ROWS or len(keys) != 1:
            self.reasons[f"{cache.layer}: needs whole prompts of {2 * ROWS} tokens or more"] = None
            return
        reader = self.in_batch
        self.in_batch += 1
        self.layers.setdefault(cache.identity, cache.layer)
        self.head_dims[cache.identity] = cache.head_dim
        rows = torch.linspace(tokens // 2, tokens - 1, ROWS).long()
        query = queries[0][0, :, rows].float().unflatten(0, (cache.kv_heads, -1))
        key = keys[0].float()
        seen = torch.arange(tokens) <= rows[:, None]
        scores = cache.scale * torch.einsum("hgrd,htd->hgrt", query, key)
        attention = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(1)
        basis = self._basis(cache, keys)
        low, high = (side[:, None] for side in basis.truncate(basis.rank_for(self.rank)))
        near = torch.einsum("htd,hdr->htr", key, high[:, 0])
        by_index = cache.scale * torch.einsum("hgrd,htd->hgrt", query @ low, near)
        for ranking, ranks in zip(RANKINGS, (by_index, scores), strict=True):
            agreed = agreed_on(ranks[None], seen, by_probability=self.by_probability)[0]
            keys_of = chosen_keys(agreed, seen.expand_as(agreed), self.budget)
            self.chosen[ranking].append(keys_of)
            for source, sets in enumerate(self.chosen[ranking]):
                share = torch.einsum("hrt,grt->hgr", attention, sets.float())
                place = (ranking, source, reader)
                held = self.captured.get(place, torch.zeros(share.shape[:2]))
                self.captured[place] = held + share.sum(-1)

    def _basis(self, cache: Observed, keys: Tensor) -> Basis:
        """The stored basis of the layer, or, as at run time, one of these keys."""
        if self.bases is not None:
            weights, occurrence = cache.identity
            found = self.bases.find(weights, occurrence=occurrence, num_kv_heads=cache.kv_heads)
            if found is not None:
                return found
        moments = KeyCovariance(cache.kv_heads, cache.head_dim)
        moments.update(keys, keys)
        return moments.pca()

    def forget(self) -> None:
        super().forget()
        self.chosen = {}


@dataclass(frozen=True)
class Mass:
    """Shares captured: by ranking, (layers, layers) of source and reader, each the mean over the
    reader's KV heads of its best head of the source; and those heads. NaN where a source does not
    lie before its reader."""

    paths: tuple[str, ...]
    shares: dict[str, Tensor]
    heads: dict[tuple[str, int, int], tuple[int, ...]]


def summed_up(seen: CapturedMass) -> Mass:
    """What was captured, each KV head of a reader from the head that serves it best."""
    count = len(seen.paths)
    shares = {ranking: torch.full((count, count), torch.nan) for ranking in RANKINGS}
    heads: dict[tuple[str, int, int], tuple[int, ...]] = {}
    for place, total in seen.captured.items():
        ranking, source, reader = place
        mean = total / seen.rows
        best = mean.max(-1) if source != reader else None
        shares[ranking][source, reader] = (mean.diagonal() if best is None else best.values).mean()
        if best is not None:
            heads[place] = tuple(best.indices.tolist())
    return Mass(tuple(seen.paths), shares, heads)


@torch.no_grad()
def captured_mass(
    model: nn.Module,
    prompts: Sequence[Tensor],
    budget: Budget,
    rank: int | float | str,
    bases: BasisSet | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    by_probability: bool = False,
) -> CapturedMass:
    """Reads prompts (1, T) eagerly with a model and looks on.

    Raises:
      ValueError: attention that cannot be observed, or layers whose KV heads differ in number.
      RuntimeError: part of the model escaped compilation.
    """
    seen = CapturedMass(False, "pca", rank, budget=budget, bases=bases)
    seen.by_probability = by_probability
    names = inspect.signature(model.forward).parameters
    extra = {"use_cache": False, "logits_to_keep": 1}
    extra = {name: value for name, value in extra.items() if name in names}
    device = next(model.parameters()).device
    with watched(model, seen.observe) as run:
        for prompt in prompts:
            seen.start(None)
            run(input_ids=prompt.to(device), **extra)
            seen.per_batch = seen.per_batch or seen.in_batch
            if not seen.in_batch or seen.in_batch != seen.per_batch:
                reasons = "; ".join(seen.reasons) or "its attention is not understood"
                raise ValueError(
                    f"{seen.in_batch} layers were seen in a prompt of {prompt.shape[1]} tokens: "
                    f"{reasons}. Needs a decoder whose prefill is one graph."
                )
            if progress is not None:
                progress(prompt.numel())
    return seen
