"""Decoders one behind the other whose layers may read what others chose, and conversations."""

from __future__ import annotations

import torch
from torch import nn
from toy_conversation import Conversation, farthest_apart, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import no_mask
from toy_options import HEAD_DIM
from toy_writes import cat_bhtd, index_copy_method

STEPS = 3
# An index of all dims ranks as the keys do.
FEW = {
    "min_context": 0, "top_k": 0.4, "sink": 1, "recent": 2, "rank": HEAD_DIM, "index_dtype": "cache"
}  # fmt: skip
EVERYTHING = {**FEW, "top_k": 1.0}
GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)
STATIC = Spelling(index_copy_method)


class Layers(nn.Module):
    """Decoders one behind the other, each with a cache of its own."""

    def __init__(self, *spellings: Spelling, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ToyDecoder(spelling) for spelling in spellings)
        self.breaks = breaks

    @property
    def kv_heads(self) -> list[int]:
        return [layer.kv_heads for layer in self.layers]

    def forward(self, x, caches, pos, masks):
        state = []
        for layer, (keys, values), mask in zip(self.layers, caches, masks, strict=True):
            if self.breaks:
                torch._dynamo.graph_break()
            x, *new = layer(nn.functional.rms_norm(x, x.shape[-1:]), keys, values, pos, mask)
            state.append(tuple(new) or (keys, values))
        return x, state


class Conversations:
    """The caches of all layers, as `Conversation` has one's."""

    def __init__(self, module: Layers, each: list[Conversation] | None = None) -> None:
        self.each = each or [Conversation.start(layer.spelling) for layer in module.layers]

    def fork(self, module: Layers) -> Conversations:
        return Conversations(module, [one.fork() for one in self.each])

    def step(self, run, x):
        inputs = [one.inputs(x) for one in self.each]
        masks = [i[4] for i in inputs]
        for at, mask in enumerate(masks):  # layers that see the same read the same tensor
            same = (m for m in masks[:at] if m is not None and mask is not None)
            masks[at] = next((m for m in same if torch.equal(m, mask)), mask)
        out, state = run(x, [(i[1], i[2]) for i in inputs], inputs[0][3], masks)
        for one, (keys, values) in zip(self.each, state, strict=True):
            one.keys, one.values = keys, values
            one.filled += x.shape[1]
        return out


def compiled(module, policy, **options):
    return torch.compile(module, backend="loki", options={**options, "policy": policy})


def farthest(module, fast, truth=None, steps: int = STEPS) -> float:
    """Largest difference of outputs over some steps from equal caches."""
    here = Conversations(module)
    there = here.fork(module)
    steps = tokens(module.layers[0].spelling, steps)
    return farthest_apart(here, there, fast, module, steps, truth)
