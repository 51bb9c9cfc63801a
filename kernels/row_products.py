"""A matrix times few rows as a sum that Inductor vectorises itself: the matrix is read once, as it
lies, at the speed of memory. On CPUs a library's product of one row reads it at a half of that and
less, or wants a second copy of all weights in its own order."""

from __future__ import annotations

import torch
from torch import Tensor

# What a library's blocks serve better. Measured on one core (Zen 4, 32 KB of nearest cache); the
# figures are a library's CPU time over the sum's, in float32 / bfloat16.
# - More rows than these.
MAX_ROWS = 4
# - Rows whose numbers, as floats, leave that cache while the matrix passes (4 rows of 1024: 1.2 /
#   1.2, of 2048: 1.0 / 0.65), and sums so long that Inductor adds them in cascades (a row of 4096:
#   0.9 / 1.9, of 4128: 0.7 / 0.9, of 14336: 0.7 / 0.9).
MAX_NUMBERS = 4096
# - A long row of float32, which a library need not convert (2048: 1.4, 3072: 0.9).
MAX_FLOAT32_DIMS = 2048
# - Two to eight rows, as calls bring them, of more numbers than these or of another type. (One core
#   of an EPYC with 16-bit products, 2, 3, 4, 5 and 8 rows. An output layer of 576 dims in float32:
#   5.1, 5.7, 2.2, 2.3, 1.2, in bfloat16: 1.1, 0.8, 0.6, 0.5, 0.4. Smaller matrices of 1536 dims in
#   float32: 0.9, 1.2, 0.9, 0.9, 0.7. A decoder's layers of 576: bench_row_products.py --changing.)
MAX_CHANGING_DIMS = 1024


def is_few(rows: int, dims: int, dtype: torch.dtype) -> bool:
    """Whether `row_products` of so many rows of `dims` numbers is faster than a library's."""
    longest = MAX_FLOAT32_DIMS if dtype == torch.float32 else MAX_NUMBERS
    return 1 <= rows <= MAX_ROWS and rows * dims <= MAX_NUMBERS and dims <= longest


def is_few_of_any(dims: int, dtype: torch.dtype) -> bool:
    """The same, where each call brings its own number of rows, up to eight."""
    return dtype == torch.float32 and dims <= MAX_CHANGING_DIMS


def row_products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, summed up in float32 and rounded once; to be compiled.

    Args:
      x: (..., K) however it lies, few rows (`is_few`), float32, bfloat16 or float16.
      weight: (N, K) of the same dtype, each of its rows one run of memory.
      bias: (N,) or None.

    Returns:
      (..., N) of the dtype of `x`.
    """
    wide = weight.float()
    # A sum for each row, which Inductor fuses to one pass over the matrix; one sum of all rows
    # would read it again for each.
    sums = [(row * wide).sum(-1) for row in _rows_of(x).unbind()]
    out = sums[0][None] if len(sums) == 1 else torch.stack(sums)
    return _finished(out, x, weight, bias)


def row_products_of_any(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for rows whose number each call brings (`is_few_of_any`)."""
    # The matrix outside, so that each of its rows is near when the next sum reads it.
    sums = (weight.float()[:, None] * _rows_of(x)[None]).sum(-1)
    return _finished(sums.t().contiguous(), x, weight, bias)


def _rows_of(x: Tensor) -> Tensor:
    # New memory, that as_strided makes Inductor lay out: it would compute what makes x again for
    # each row of the matrix. (float32: `float` alone would be x itself, wherever that lies. Both
    # keep the order that x lies in, hence `contiguous`.)
    dims, rows = x.shape[-1], x.numel() // x.shape[-1]
    each = x.reshape(rows, dims)
    each = each.float() if x.dtype != torch.float32 else each + 0.0
    return torch.as_strided(each.contiguous(), (rows, dims), (dims, 1))


def _finished(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
