"""Small models of transformers, their caches and their prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loki_compile.config import LokiConfig

# Of the contexts that are long at default options.
VOCABULARY, LONG_SLOTS = 256, 1400
LONG = LokiConfig().min_context + 77


def tiny_llama(seed: int = 5):
    """Two layers with random weights, (B,S) ids -> logits over 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # peaked attention: a key too many or too few shows
    return model


def worded_llama(positions: int = 2048):
    """Two layers with random weights and the bundled tokenizer's vocabulary, and positions for
    contexts that default options decode sparsely behind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=2048, max_position_embeddings=positions,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_deepseek(seed: int = 5):
    """As `tiny_llama`, with latents of 14 dims in the cache and 4 rotated ones that heads share."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "first_k_dense_replace": 2}
    dims = {"q_lora_rank": 16, "kv_lora_rank": 14, "qk_rope_head_dim": 4}
    more = {"qk_nope_head_dim": 6, "v_head_dim": 5, "max_position_embeddings": 256}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **dims, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def make_model(layers: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """For contexts that are long at default options; the same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype).eval()


def new_cache(model, kind: str, slots: int = LONG_SLOTS):
    from transformers import DynamicCache, StaticCache

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
