"""Sparse attention by its definition, in the place of a toy's own."""

from __future__ import annotations

from typing import Any

import torch
from loki_compile.kernels import reference
from loki_compile.kernels.fused import index_rows
from loki_compile.pca_store.basis import BasisSet
from torch import Tensor
from torch.overrides import TorchFunctionMode
from toy_attends import sdpa

from loki_compile.config import LokiConfig


class DirectSparse(TorchFunctionMode):
    """Replaces attention by its definition: the index is built anew from the keys of the call.

    Keys are projected by `basis`, positions come from `reference.select` and the output from
    `reference.attend`, all in fp64.
    """

    def __init__(
        self, basis: BasisSet, config: LokiConfig, kv_heads: int, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.basis, self.config, self.kv_heads, self.interleaved = (
            basis,
            config,
            kv_heads,
            interleaved,
        )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not sdpa:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self.attention(*args, **kwargs)

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False,
    ):  # fmt: skip
        if self.interleaved:  # the definition knows blocks of query heads
            heads = torch.arange(query.shape[1]).view(-1, self.kv_heads).T.flatten()
            query, key, value = query[:, heads], key[:, heads], value[:, heads]
            if attn_mask is not None and attn_mask.ndim > 2 and attn_mask.shape[-3] > 1:
                attn_mask = attn_mask[..., heads, :, :]
        keys, values = (x[:, :: x.shape[1] // self.kv_heads] for x in (key, value))
        mask = attn_mask
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        heads_differ = mask is not None and mask.shape[1] != 1
        per_head = self.config.share == "head" or heads_differ
        positions = self.positions(query, keys, mask, scale, per_head)
        out = reference.attend(query, keys, values, positions, mask, scale=scale)
        return out[:, heads.argsort()] if self.interleaved else out

    def positions(
        self, query: Tensor, keys: Tensor, mask: Tensor | None, scale: float, per_head: bool
    ) -> Tensor:
        """What each row reads, as `kernels.ops.select` returns it."""
        query_basis, key_basis = self.basis.bases[0].truncate(self._rank())
        index, _ = index_rows(keys, key_basis, torch.float32)
        return reference.select(
            query, query_basis, index, None, mask, None,
            scale=scale, per_head=per_head, **self.choice(per_head),
        )  # fmt: skip

    def choice(self, per_head: bool) -> dict[str, Any]:
        """The options of `kernels.reference.select` that say how many keys, and whose they are."""
        budget = self.config.budget
        return {
            "top_k": budget.top_k, "keep_q16": budget.keep_q16, "sink": budget.sink,
            "recent": budget.recent, "min_keys": budget.min_keys, "mass": budget.mass,
            "by_probability": self.config.group_choice == "probability" and not per_head,
        }  # fmt: skip

    def _rank(self) -> int:
        return self.basis.bases[0].rank_for(self.config.rank)
