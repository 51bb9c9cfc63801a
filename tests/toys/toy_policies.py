"""The definition of each way to choose keys, in the place of a decoder's attention."""

from __future__ import annotations

from typing import Any

import torch
from loki_compile.kernels import reference
from loki_compile.kernels.checks import hidden_below
from loki_compile.kernels.kept import PAGE, page_bounds
from torch import Tensor
from toy_reference import DirectSparse

from loki_compile.config import LokiConfig

POLICIES = ("loki", "oracle", "window", "quest")
KEEP_NOTHING = ("oracle", "window")


def visible_keys(mask: Tensor | None, *shape: int) -> Tensor:
    """bool (B, Hq, S, T) of that shape."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    mask = mask[(None,) * (4 - mask.ndim)]
    return (mask if mask.dtype == torch.bool else mask > hidden_below(mask.dtype)).expand(shape)


def filled_tokens(visible: Tensor) -> Tensor:
    """For each sequence, the tokens up to the last that any row of (B, Hq, S, T) sees: (B,)."""
    return (visible.any(1).any(1) * torch.arange(1, visible.shape[3] + 1)).amax(-1)


def bounds_of(keys: Tensor, tokens: Tensor) -> Tensor:
    """Page bounds (B, Hkv, P, 2 D) of keys (B, Hkv, T, D), row b of which holds `tokens[b]`; 0 for
    pages without any."""
    b, kv_heads, cached, dims = keys.shape
    bounds = keys.new_zeros((b, kv_heads, -(-cached // PAGE), 2 * dims))
    for row, count in enumerate(tokens.tolist()):
        held = page_bounds(keys[row : row + 1, :, :count], PAGE)
        bounds[row : row + 1, :, : held.shape[2]] = held
    return bounds


def first_and_last(visible: Tensor, heads: int, config: LokiConfig) -> Tensor:
    """The `sink` first and the last keys that each row of (B, Hq, S, T) sees, by its budget."""
    budget = config.budget
    visible = visible[:, :: visible.shape[1] // heads]
    slots = budget.slots(visible.shape[3])
    chosen = torch.full((*visible.shape[:3], slots), -1, dtype=torch.int32)
    for row, seen in enumerate(visible.flatten(0, 2)):
        at = seen.nonzero().flatten()
        number = budget.keys(len(at))
        first = min(budget.sink, number)
        kept = torch.cat((at[:first], at[len(at) - (number - first) :]))
        chosen.flatten(0, 2)[row, : len(kept)] = kept
    return chosen


class DirectPolicy(DirectSparse):
    """As `DirectSparse`, by any policy: what it ranks by is made anew from the keys of the call."""

    def __init__(
        self, policy: str, kv_heads: int, options: dict[str, Any], *, basis=None, tiled=False
    ) -> None:
        super().__init__(basis, LokiConfig.from_options(options), kv_heads, tiled=tiled)
        self.policy = policy

    def positions(self, query, keys, mask, scale, per_head):
        if self.policy == "loki":
            return super().positions(query, keys, mask, scale, per_head)
        visible = visible_keys(mask, *query.shape[:3], keys.shape[2])
        if self.policy == "window":
            heads = query.shape[1] if per_head else keys.shape[1]
            return first_and_last(visible, heads, self.config)
        ranked, more = keys, {}
        if self.policy == "quest":
            ranked = bounds_of(keys, filled_tokens(visible))
            more = {"page": PAGE, "keys": keys.shape[2]}
        return reference.select(
            query, None, ranked, None, mask, None,
            scale=scale, per_head=per_head, **self.choice(per_head), **more,
        )  # fmt: skip
