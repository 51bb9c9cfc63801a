"""Masks: (batch, S, T, position of the first new key) -> mask or None."""

from __future__ import annotations

import torch
from torch import Tensor
from toy_options import HEADS


def no_mask(batch: int, new: int, slots: int, at: int) -> None:
    return None


def causal(batch: int, new: int, slots: int, at: int) -> Tensor:
    """bool (1,1,S,T)."""
    last = at + torch.arange(new)
    return (torch.arange(slots) <= last[:, None])[None, None]


def causal_2d(batch: int, new: int, slots: int, at: int) -> Tensor:
    return causal(batch, new, slots, at)[0, 0]


def causal_float(batch: int, new: int, slots: int, at: int) -> Tensor:
    """Additive, finfo.min where hidden, and a bias elsewhere."""
    bias = torch.linspace(-1, 1, slots).expand(1, 1, new, slots)
    hidden = ~causal(batch, new, slots, at)
    return bias.masked_fill(hidden, torch.finfo(torch.float32).min)


def causal_inf(batch: int, new: int, slots: int, at: int) -> Tensor:
    return torch.zeros(1, 1, new, slots).masked_fill(~causal(batch, new, slots, at), -torch.inf)


def left_padded(batch: int, new: int, slots: int, at: int) -> Tensor:
    """bool (B,1,S,T): row i of the batch has 3 * i keys of padding in front."""
    padding = torch.arange(slots) >= 3 * torch.arange(batch)[:, None]
    return causal(batch, new, slots, at) & padding[:, None, None]


def alibi(batch: int, new: int, slots: int, at: int) -> Tensor:
    """Additive, another slope for each query head."""
    slopes = 0.3 * torch.arange(1, HEADS + 1).view(1, HEADS, 1, 1)
    distance = torch.arange(slots) - (at + torch.arange(new)[:, None])
    return (slopes * distance).masked_fill(~causal(batch, new, slots, at), -torch.inf)


def nothing_seen_by_first(batch: int, new: int, slots: int, at: int) -> Tensor:
    """The first row of the batch sees no key at all."""
    seen = causal(batch, new, slots, at).expand(batch, 1, new, slots).clone()
    seen[0] = False
    return seen
