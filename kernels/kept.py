"""What is kept beside a key cache, so that its keys can be ranked without being read.

Two kinds: a low-rank index (a row for each key) and bounds of pages (a row for so many keys). Each
says what its tensors look like; `fused.project_new_keys` and `page_bounds` make their rows from
keys. How a graph keeps them true at each write is `passes.mirror`'s to know, which of them a way to
choose keys needs is its ranking's (`loki_compile.policies`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor


class Keeps(enum.Enum):
    """What a ranking wants kept beside each cache that it ranks."""

    NOTHING = "nothing"
    INDEX = "index"
    PAGES = "page bounds"


# Keys per page: Quest's (arXiv 2406.10774, section 4.1).
PAGE = 16


@dataclass(frozen=True)
class IndexLayout:
    """What one cache's key index looks like: `rank` dims of `dtype`; int8 carries scales.

    `each_row`: every sequence of the batch is projected by a basis of its own.
    """

    rank: int
    dtype: torch.dtype
    each_row: bool = False

    @property
    def tensors(self) -> int:
        """Tensors that make up the index: its rows, and for int8 their scales."""
        return 2 if self.dtype == torch.int8 else 1


@dataclass(frozen=True)
class PageLayout:
    """Bounds of pages of `page` keys: one tensor (B, Hkv, ceil(T / page), 2 * D) of the keys'
    dtype, the least number of each dim in front of the greatest."""

    page: int
    dtype: torch.dtype

    @property
    def tensors(self) -> int:
        return 1


Layout = IndexLayout | PageLayout


def page_bounds(keys: Tensor, page: int) -> Tensor:
    """The least and the greatest number of each dim in each page: (B, Hkv, ceil(T / page), 2 * D).

    keys: (B, Hkv, T, D); T need not be a multiple of `page`. A NaN bounds nothing: padding that no
    row sees may hold some. A dim that is NaN in all keys of a page has NaN for its bounds.
    """
    whole = keys.shape[2] // page * page
    pieces = [keys[:, :, :whole].unflatten(2, (-1, page))] if whole else []
    if whole < keys.shape[2]:
        pieces.append(keys[:, :, None, whole:])
    bounds = [torch.cat(least_and_greatest(x, x.isnan(), 3), -1) for x in pieces]
    if not bounds:
        return keys.new_empty((*keys.shape[:2], 0, 2 * keys.shape[3]))
    return torch.cat(bounds, 2)


def least_and_greatest(keys: Tensor, left_out: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Over one dimension, of the numbers that are not left out (bool, of the keys' shape); NaN
    where there is none."""
    low = keys.masked_fill(left_out, torch.inf).amin(dim)
    high = keys.masked_fill(left_out, -torch.inf).amax(dim)
    none = low > high
    return low.masked_fill(none, torch.nan), high.masked_fill(none, torch.nan)
