"""Decode loops by hand over models of transformers, and what their caches are measured by."""

from __future__ import annotations

import torch
from toy_models import new_cache, prompt

from loki_compile.indexes import indexes_of


class Loop:
    """A decode loop by hand, rows padded on the left."""

    def __init__(self, model, kind: str, rows: int) -> None:
        self.ids = prompt(1, rows=rows)
        self.mask = torch.ones_like(self.ids)
        self.cache = new_cache(model, kind)
        if rows > 1:
            self.mask[1, :40] = 0
        self.model = model
        model.forward(self.ids, past_key_values=self.cache, **self.inputs(self.ids))

    def inputs(self, new):
        """Mask and positions of the last tokens."""
        if self.ids.shape[0] == 1:
            return {}
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        return {"attention_mask": self.mask, "position_ids": positions}

    def step(self, new):
        self.ids = torch.cat((self.ids, new), 1)
        self.mask = torch.cat((self.mask, torch.ones_like(new)), 1)
        return self.model(
            input_ids=new, past_key_values=self.cache, use_cache=True, **self.inputs(new)
        ).logits


def far_from_dense(cache, ids, mask, uncompiled) -> float:
    """The largest difference of visible keys and values from those of a dense prefill."""
    truth = new_cache(uncompiled, "growing")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    uncompiled.forward(ids, attention_mask=mask, position_ids=positions, past_key_values=truth)
    seen = mask[:, None, :, None].bool()
    apart = []
    for layer, true in zip(cache.layers, truth.layers, strict=True):
        for here, there in ((layer.keys, true.keys), (layer.values, true.values)):
            off = (here[:, :, : ids.shape[1]] - there).masked_fill(~seen, 0)
            apart.append(off.abs().max())
    return torch.stack(apart).max().item()


def true_indexes(cache, tokens: int) -> int:
    """Layers with an index, which must mirror the cache."""
    count = 0
    for layer in cache.layers:
        for index in indexes_of(layer.keys):
            assert index.valid
            rows = layer.keys[:, :, :tokens].float() @ index.basis.key
            held, scale = (tensor[:, :, :tokens].float() for tensor in index.tensors)  # of int8
            near = 0.51 * scale + 1e-5 + 1.3e-6 * rows.abs()
            assert ((held * scale - rows).abs() <= near).all()
            count += 1
    return count
