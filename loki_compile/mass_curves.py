"""How much attention KV heads miss, by how many keys they read and who chooses these.

A backend that looks on while a model reads prompts. Of some rows of each, a KV head's keys are put
in order: as its index ranks them, newest first, or as a head of an earlier layer ranks its own.
What attention lies on the first K of an order is then a running sum, for every K at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.spans import ONE_Q16
from loki_compile.observation import Observed, Seen, columns_of
from loki_compile.pca_store.basis import Basis, BasisSet
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.simulation import agreed_on
from loki_compile.watching import watched

# Of the keys that a row sees, in steps of about the square root of two.
SHARES = (0.01, 0.015, 0.02, 0.03, 0.04, 0.055, 0.08, 0.11, 0.16, 0.22, 0.32, 0.45, 0.64, 1.0)


@dataclass(frozen=True)
class CurvedLayer:
    """A layer that was seen: its weights and their how many-th use, its path, and its heads."""

    weights: str
    occurrence: int
    path: str
    kv_heads: int
    head_dim: int


@dataclass
class MassCurves(Seen):
    """What one prompt at a time shows of the layers of a model; `observe` is the backend.

    sums: by way, reader and, where another layer's heads choose, source, the attention captured at
    each of `shares`, summed over rows: "ranked.L" and "last.L" (KV heads, shares), "read.S.L" (KV
    heads of L, of S, shares). A row that sees N keys reads share * N, never fewer than sink +
    recent; a KV head's attention is the mean of its query heads'.
    """

    sink: int = 4
    recent: int = 32
    shares: tuple[float, ...] = SHARES
    bases: BasisSet | None = None
    by_probability: bool = False
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    sums: dict[str, Tensor] = field(default_factory=dict)
    of_layers: dict[tuple[str, int], CurvedLayer] = field(default_factory=dict)
    orders: list[Tensor] = field(default_factory=list)  # of each layer so far, uint8 (Hkv, rows, T)

    def begin(self, rows: Tensor) -> None:
        """A prompt of which these rows count."""
        self.start(None)
        self.rows, self.sums, self.orders = rows, {}, []

    def add(self, cache: Observed, keys: Tensor, queries: Sequence[Tensor]) -> None:
        """keys (1, Hkv, T, D); each of `queries` (1, Hq, T, D)."""
        tokens = keys.shape[2]
        if tokens != queries[0].shape[2] or len(keys) != 1:
            self.reasons[f"{cache.layer}: needs whole prompts, without a cache"] = None
            return
        reader, own = self.in_batch, cache.identity
        self.in_batch += 1
        self.of_layers[own] = CurvedLayer(*own, cache.layer, cache.kv_heads, cache.head_dim)
        rows = self.rows.to(keys.device)
        query = queries[0][0, :, rows].float().unflatten(0, (cache.kv_heads, -1))
        seen = torch.arange(tokens, device=keys.device) <= rows[:, None]
        scores = cache.scale * torch.einsum("hgrd,htd->hgrt", query, keys[0].float())
        attention = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(1)
        ranks = cache.scale * self._by_index(cache, keys, queries[0], query)
        agreed = agreed_on(ranks[None], seen, by_probability=self.by_probability)[0]
        at = torch.arange(tokens, device=keys.device).expand_as(agreed[:1])
        self.orders.append(self._entered(agreed, seen))
        self.sums[f"ranked.{reader}"] = self._captured(attention, self.orders[-1])
        newest = self._entered(at.float(), seen)
        self.sums[f"last.{reader}"] = self._captured(attention, newest)
        for source, order in enumerate(self.orders[:-1]):
            self.sums[f"read.{source}.{reader}"] = self._captured(attention[:, None], order[None])

    def _by_index(self, cache: Observed, keys: Tensor, queries: Tensor, query: Tensor) -> Tensor:
        """The products that rank keys: (Hkv, G, rows, T), with an index of int8."""
        basis = self._basis(cache, keys, queries)
        low, high = basis.truncate(columns_of(self.rank, cache.head_dim))
        near, scale = index_rows(keys, high, torch.int8)
        assert scale is not None
        return torch.einsum("hgrd,htd->hgrt", query @ low[:, None], (near * scale)[0])

    def _entered(self, wanted: Tensor, seen: Tensor) -> Tensor:
        """With which share each key is read first: uint8 places in `shares`, of keys in the order
        of `wanted` (H, rows, T) behind those that are always kept; those not `seen` with the last.
        """
        count = seen.sum(-1, keepdim=True)
        at = torch.arange(seen.shape[-1], device=seen.device)
        always = (at < self.sink) | (at >= count - max(self.recent, 1))
        ranked = wanted.masked_fill(always, torch.inf).masked_fill(~seen, -torch.inf)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        place = torch.empty_like(order).scatter_(-1, order, at.expand_as(order).contiguous())
        keep = keys_at(self.shares, count, self.sink + self.recent)
        first = torch.searchsorted(
            keep.expand(*place.shape[:-1], -1).contiguous(), place, right=True
        )
        return first.clamp_(max=len(self.shares) - 1).to(torch.uint8)

    def _captured(self, attention: Tensor, order: Tensor) -> Tensor:
        """What lies on the keys of each share, of attention (..., rows, T): its leading dimensions
        and those of `order`, broadcast, and the shares."""
        shape = torch.broadcast_shapes(attention.shape, order.shape)
        found = attention.new_zeros(*shape[:-1], len(self.shares))
        found.scatter_add_(-1, order.long().expand(shape), attention.expand(shape))
        return found.cumsum(-1).sum(-2).cpu()

    def _basis(self, cache: Observed, keys: Tensor, queries: Tensor) -> Basis:
        """The stored basis of the layer, or one of this prompt, as at run time."""
        if self.bases is not None:
            weights, occurrence = cache.identity
            found = self.bases.find(weights, occurrence=occurrence, num_kv_heads=cache.kv_heads)
            if found is not None:
                return found
        moments = KeyCovariance(cache.kv_heads, cache.head_dim)
        moments.update(keys.detach(), queries.detach())
        return moments.score_optimal()

    def forget(self) -> None:
        super().forget()
        self.sums, self.orders = {}, []


def keys_at(shares: Sequence[float], visible: Tensor, least: int) -> Tensor:
    """Keys of rows (..., 1) that see so many, of each share: int64 (..., shares), as a span of that
    share has it, `least` of them or more."""
    parts = torch.tensor([round(share * ONE_Q16) for share in shares], device=visible.device)
    keep = torch.bitwise_right_shift(visible.long() * parts, 16)
    return torch.minimum(keep.clamp(min=max(least, 1)), visible.long())


@torch.no_grad()
def read_curves(
    model: nn.Module,
    seen: MassCurves,
    prompts: Iterable[tuple[Tensor, Tensor]],
    done: Callable[[], Any],
) -> None:
    """Reads prompts, ids (T,) and which rows of each count (R,), eagerly; behind each `done` is
    called, when `seen.sums` is that prompt's.

    Raises:
      ValueError: attention that cannot be observed.
      RuntimeError: part of the model escaped compilation.
    """
    names = inspect.signature(model.forward).parameters
    extra = {"use_cache": False, "logits_to_keep": 1}
    extra = {name: value for name, value in extra.items() if name in names}
    device = next(model.parameters()).device
    with watched(model, seen.observe) as run:
        for ids, rows in prompts:
            seen.begin(rows)
            run(input_ids=ids[None].to(device), **extra)
            if not seen.in_batch or len(seen.of_layers) != seen.in_batch:
                reasons = "; ".join(seen.reasons) or "its attention is not understood"
                raise ValueError(
                    f"{seen.in_batch} layers were seen in a prompt of {len(ids)} tokens: {reasons}."
                    " Needs a decoder whose prefill is one graph."
                )
            done()
    seen.forget()


@dataclass(frozen=True)
class Missed:
    """Attention that KV heads miss, means over rows: of all layers' heads in a row, in order.

    layers, heads: (G,), where each head lies. ranked, last: (G, shares) fp64. read: (G, G, shares),
    of reader and source; infinite where the source does not lie in an earlier layer.
    """

    layers: Tensor
    heads: Tensor
    ranked: Tensor
    last: Tensor
    read: Tensor

    def mean(self, other: Missed) -> Missed:
        """Halfway between two that were measured on different text."""
        parts = ("ranked", "last", "read")
        return replace(self, **{p: (getattr(self, p) + getattr(other, p)) / 2 for p in parts})


def missed_of(
    layers: Sequence[CurvedLayer], sums: Sequence[Mapping[str, Tensor]], rows: Sequence[int]
) -> Missed:
    """What the sums of several prompts say, each over so many rows: the mean of prompts' means."""

    def missed(name: str) -> Tensor:
        means = [each[name].double() / count for each, count in zip(sums, rows, strict=True)]
        return (1 - torch.stack(means).mean(0)).clamp(min=0)

    counts = [layer.kv_heads for layer in layers]
    first = [sum(counts[:n]) for n in range(len(counts) + 1)]
    ranked, last = (
        torch.cat([missed(f"{way}.{n}") for n in range(len(layers))]) for way in ("ranked", "last")
    )
    read = torch.full((first[-1], *ranked.shape), torch.inf, dtype=torch.float64)
    for reader in range(len(layers)):
        for source in range(reader):
            part = missed(f"read.{source}.{reader}")
            read[first[reader] : first[reader + 1], first[source] : first[source + 1]] = part
    number = torch.tensor([n for n, count in enumerate(counts) for _ in range(count)])
    head = torch.tensor([head for count in counts for head in range(count)])
    return Missed(number, head, ranked, last, read)
