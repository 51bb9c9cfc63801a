"""A small model, its caches and its prompts, for contexts that are long at default options."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from loki_compile.config import LokiConfig

VOCABULARY, SLOTS = 256, 1400
LONG = LokiConfig().min_context + 77


def make_model(layers: int = 1, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype).eval()


def new_cache(model, kind: str, slots: int = SLOTS):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=slots)
    return DynamicCache(config=model.config)


def prompt(seed: int, length: int = LONG, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def started(model, kind: str, ids: Tensor):
    """A cache that an uncompiled prefill has filled."""
    cache = new_cache(model, kind)
    model.forward(ids, past_key_values=cache, logits_to_keep=1)
    return cache
