"""Sizes and options that several tests take, and how they are run.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, S new tokens, T cached tokens, D
head_dim.
"""

import pytest
import torch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 12, 6, 3, 10
SLOTS, FILLED, BATCH = 41, 17, 2

# Forced sparse: every key is chosen, so that what comes out is dense attention; and a few of them.
# The index is in the cache's dtype: it is compared with plain projections, which int8 rounds.
EVERYTHING = {"min_context": 0, "top_k": 1.0, "index_dtype": "cache"}
FEW = {
    "min_context": 0, "top_k": 0.4, "sink": 1, "recent": 2, "rank": 4, "index_dtype": "cache"
}  # fmt: skip

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
