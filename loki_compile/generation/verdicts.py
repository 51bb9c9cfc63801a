"""Which drafts dense decoding would have produced, and what it produces behind them.

Greedy: the draft is the best of the dense scores. Sampling: by rejection (Leviathan et al., Chen et
al. 2023): a draft x of probability q(x) is accepted with the chance min(1, p(x) / q(x)), p being
dense decoding's, and what is drawn in place of the first one that is not, from max(0, p - q):
tokens are distributed as if each was drawn from p.

Letters: B rows, N drafts, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
      drafts: int64 (B, N).
      scores: (B, N + 1, V) of dense decoding, behind each draft and before the first.

    Returns:
      accepted: int64 (B,) drafts of each row, 0 to N.
      instead: int64 (B, N + 1) what dense decoding chooses at each place, if all drafts before it
      are accepted.
    """
    instead = scores.argmax(-1)
    return _leading(drafts == instead[:, :-1]), instead


def sampled(drafts: Tensor, drafted: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """As `greedy`.

    Args:
      drafted: (B, N, V) the scores that drafts were drawn by.
    """
    p, q = scores.softmax(-1), drafted.softmax(-1)
    at = drafts.unsqueeze(-1)
    chance = (p[:, :-1].gather(-1, at) / q.gather(-1, at)).squeeze(-1)
    accepted = torch.rand(drafts.shape, device=drafts.device, dtype=chance.dtype) < chance
    # Where p is q to rounding nothing is left over, and nothing is rejected but by rounding.
    left = (p[:, :-1] - q).clamp(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p[:, :-1])
    every = torch.cat((left, p[:, -1:]), 1)
    instead = torch.multinomial(every.flatten(0, 1), 1).view(every.shape[:2])
    return _leading(accepted), instead


def agreed(accepted: Tensor, drafts: Tensor, instead: Tensor, counts: Tensor) -> Tensor:
    """The tokens that all rows go on by, int64 (B, n), n from 1 to N + 1: the drafts that every row
    accepts, and the next one of each, its draft where it accepts that as well.

    Args:
      accepted, instead: as `greedy` returns them.
      counts: bool (B,) rows that are asked; what comes of the others does not matter.
    """
    length = drafts.shape[1]
    number = int(accepted.masked_fill(~counts, length).min())
    following = instead[:, number]
    if number < length:
        following = torch.where(accepted > number, drafts[:, number], following)
    return torch.cat((drafts[:, :number], following.unsqueeze(1)), 1)


def _leading(accepted: Tensor) -> Tensor:
    """How many are True before the first that is False, of each row."""
    return accepted.to(torch.int64).cumprod(1).sum(1)
