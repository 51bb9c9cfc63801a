"""One conversation with a toy decoder: its caches, its inputs, a basis for it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.pca_store.basis import BasisSet, random_basis
from loki_compile.pca_store.fingerprint import weights_fingerprint
from torch import Tensor
from toy_decoders import Spelling, ToyDecoder
from toy_options import BATCH, FILLED, HEAD_DIM, HIDDEN


def make_cache(layout: str, batch: int, kv_heads: int, slots: int, dtype: torch.dtype) -> Tensor:
    """A cache of random keys in all slots, so that a slot read by mistake shows."""
    sizes = {"b": batch, "h": kv_heads, "t": slots, "d": HEAD_DIM}
    sizes["f"] = kv_heads * HEAD_DIM  # heads and head_dim in one
    if layout == "strided":  # (B,Hkv,T,D) over memory of (B,Hkv,D,T)
        return make_cache("bhdt", batch, kv_heads, slots, dtype).transpose(2, 3)
    return torch.randn([sizes[letter] for letter in layout], dtype=torch.float64).to(dtype)


@dataclass
class Conversation:
    """The caches of one conversation with a toy, and how many tokens they hold."""

    spelling: Spelling
    keys: Tensor
    values: Tensor
    filled: int
    batch: int = BATCH

    @classmethod
    def start(
        cls, spelling: Spelling, *, filled: int = FILLED, batch: int = BATCH, dtype=None
    ) -> Conversation:
        slots = filled if spelling.growing else spelling.slots
        rows = batch + 1 if spelling.note == "larger_batch" else batch
        dtype = dtype or spelling.cache_dtype
        layouts = spelling.layout, spelling.values or spelling.layout
        keys, values = (
            make_cache(layout, rows, spelling.kv_heads, slots, dtype) for layout in layouts
        )
        return cls(spelling, keys, values, filled, batch)

    def fork(self) -> Conversation:
        """Copies of the caches; strides stay."""

        def copied(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)

        return dataclasses.replace(self, keys=copied(self.keys), values=copied(self.values))

    def inputs(self, x: Tensor) -> tuple[Any, ...]:
        """What the module takes for the next tokens x (B,S,HIDDEN)."""
        new = x.shape[1]
        pos: Any = self.filled
        if self.spelling.position == "tensor":
            pos = self.filled + torch.arange(new)
        elif self.spelling.position == "rows":
            pos = torch.full((self.batch,), self.filled)
        slots = self.filled + new if self.spelling.growing else self.spelling.slots
        mask = self.spelling.mask(self.batch, new, slots, self.filled)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(x.dtype)
        return x, self.keys, self.values, pos, mask

    def step(self, module: Callable[..., Any], x: Tensor) -> Tensor:
        """Runs the next tokens and keeps the caches that come back."""
        out, *state = module(*self.inputs(x))
        if state:
            self.keys, self.values = state
        self.filled += x.shape[1]
        return out


def tokens(spelling: Spelling, steps: int, *, batch: int = BATCH, dtype=torch.float32):
    """Inputs (B,S,HIDDEN) for so many steps."""
    shape = (batch, spelling.new_tokens, HIDDEN)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(steps)]


def farthest_apart(here, there, fast, slow, steps: Sequence[Tensor], truth=None) -> float:
    """Largest difference of the outputs of two conversations, `here` by `fast` and `there` by
    `slow`, which computes by a definition where `truth` is one. NaN in one of them is NaN; where
    both have it they are equal."""
    worst = torch.zeros(())
    for x in steps:
        out = here.step(fast, x)
        with truth or contextlib.nullcontext():
            expected = there.step(slow, x)
        apart = (out - expected).abs().masked_fill(out.isnan() & expected.isnan(), 0)
        worst = torch.maximum(worst, apart.max())
    return worst.item()


def basis_for(module: ToyDecoder, seed: int = 7) -> BasisSet:
    """A random orthonormal basis: what it ranks highest is far from what attention sees."""
    basis = random_basis(
        module.kv_heads,
        HEAD_DIM,
        seed=seed,
        weights=weights_fingerprint(module.key_weight),
        layer="toy",
    )
    return BasisSet((basis,))
