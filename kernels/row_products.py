"""A matrix times few rows as a sum that Inductor vectorises itself: the matrix is read once, as it
lies, at the speed of memory. On CPUs a library's product of one row reads it at a half of that and
less, or wants a second copy of all weights in its own order."""

from __future__ import annotations

import torch
from torch import Tensor

# More rows than these are a product that a library's blocks serve better.
MAX_ROWS = 4


def row_products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, summed up in float32 and rounded once; to be compiled.

    Args:
      x: (..., K), `MAX_ROWS` rows at most, float32, bfloat16 or float16.
      weight: (N, K) of the same dtype, each of its rows one run of memory.
      bias: (N,) or None.

    Returns:
      (..., N) of the dtype of `x`.
    """
    dims, rows = x.shape[-1], x.numel() // x.shape[-1]
    # New memory, that as_strided makes Inductor lay out: it would compute what makes x again for
    # each row of the matrix. (float32: `float` alone would be x itself, wherever that lies.)
    each = (
        x.reshape(rows, dims).float() if x.dtype != torch.float32 else x.reshape(rows, dims) + 0.0
    )
    each = torch.as_strided(each, (rows, dims), (dims, 1))
    wide = weight.float()
    # A sum for each row, which Inductor fuses to one pass over the matrix; one sum of all rows
    # would read it again for each.
    sums = [(row * wide).sum(-1) for row in each.unbind()]
    out = sums[0][None] if rows == 1 else torch.stack(sums)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
