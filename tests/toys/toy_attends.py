"""Ways to attend: q (B,Hq,S,D), keys and values (B,Hkv,T,D), mask -> (B,Hq,S,D)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from toy_options import HEADS, KV_HEADS

sdpa = F.scaled_dot_product_attention


def gqa_flag(q, keys, values, mask):
    return sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)


def gqa_flag_by_keyword(q, keys, values, mask):
    return sdpa(enable_gqa=True, attn_mask=mask, value=values, key=keys, query=q, scale=0.4)


def repeat_kv(x: Tensor) -> Tensor:
    batch, kv_heads, length, dim = x.shape
    group = HEADS // kv_heads
    x = x[:, :, None, :, :].expand(batch, kv_heads, group, length, dim)
    return x.reshape(batch, kv_heads * group, length, dim)


def repeat_kv_bthd(x: Tensor) -> Tensor:
    """Meta's repeat_kv, on (B,T,Hkv,D)."""
    batch, length, kv_heads, dim = x.shape
    group = HEADS // kv_heads
    x = x[:, :, :, None, :].expand(batch, length, kv_heads, group, dim)
    return x.reshape(batch, length, kv_heads * group, dim)


def gqa_repeat_kv(q, keys, values, mask):
    return sdpa(q, repeat_kv(keys), repeat_kv(values), mask, 0.0, False, scale=0.3)


def gqa_repeat_kv_bthd(q, keys, values, mask):
    keys, values = repeat_kv_bthd(keys.transpose(1, 2)), repeat_kv_bthd(values.transpose(1, 2))
    return sdpa(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)


def gqa_repeat_interleave(q, keys, values, mask):
    keys, values = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (keys, values))
    return sdpa(q, keys, values, attn_mask=mask)


def mqa_broadcast(q, keys, values, mask):
    return sdpa(q, keys, values, attn_mask=mask)


def mqa_expand(q, keys, values, mask):
    keys, values = (x.expand(-1, HEADS, -1, -1) for x in (keys, values))
    return sdpa(q, keys, values, attn_mask=mask)


def plain(q, keys, values, mask):
    return sdpa(q, keys, values, attn_mask=mask)


def scaled(q, keys, values, mask):
    return sdpa(q, keys, values, attn_mask=mask, scale=0.7)


def mask_edited_in_place(q, keys, values, mask):
    """The mask tensor is made first and filled afterwards."""
    bias = torch.zeros(mask.shape)
    bias.masked_fill_(~mask, -torch.inf)
    return sdpa(q, keys, values, attn_mask=bias, enable_gqa=True)


def mask_assigned(q, keys, values, mask):
    seen = torch.ones(mask.shape, dtype=torch.bool)
    seen[:, :] = mask
    return sdpa(q, keys, values, attn_mask=seen, enable_gqa=True)


def interleaved(q, keys, values, mask):
    """`repeat` lays the heads out as 0 1 2 0 1 2: query head h reads KV head h % Hkv."""
    keys, values = (x.repeat(1, HEADS // x.shape[1], 1, 1) for x in (keys, values))
    return sdpa(q, keys, values, attn_mask=mask)


def interleaved_by_expand(q, keys, values, mask):
    """The same head order by `expand` in front of the heads."""
    batch, kv_heads, length, dim = keys.shape
    group = HEADS // kv_heads
    keys, values = (
        x[:, None].expand(batch, group, kv_heads, length, dim).reshape(batch, HEADS, length, dim)
        for x in (keys, values)
    )
    return sdpa(q, keys, values, attn_mask=mask)


INTERLEAVED = (interleaved, interleaved_by_expand)


def tiles_of_flipped_heads(q, keys, values, mask):
    return interleaved(q, keys.flip(1), values.flip(1), mask)


def values_of_one_head(q, keys, values, mask):
    """The flag repeats keys; the values of one head were repeated before."""
    return gqa_flag(q, keys, values[:, :1].repeat(1, KV_HEADS, 1, 1), mask)


def values_tiled(q, keys, values, mask):
    """Keys repeat in blocks, values as tiles."""
    keys = keys.repeat_interleave(HEADS // keys.shape[1], dim=1)
    return sdpa(q, keys, values.repeat(1, HEADS // values.shape[1], 1, 1), attn_mask=mask)


def with_dropout(q, keys, values, mask):
    return sdpa(q, keys, values, attn_mask=mask, dropout_p=0.25)


def causal_flag(q, keys, values, mask):
    return sdpa(q, keys, values, is_causal=True)


def heads_flipped(q, keys, values, mask):
    return sdpa(q, keys.flip(1), values.flip(1), attn_mask=mask, enable_gqa=True)


def dims_cut(q, keys, values, mask):
    """Scores from the first eight dims of the keys only."""
    return sdpa(q[..., :8], keys[..., :8], values, attn_mask=mask)


def own_values_as_keys(q, keys, values, mask):
    """Mixing, not attention over a cache: keys and values are one computed tensor."""
    mixed = torch.stack([q[:, :, 0], q[:, :, 0] * 2], dim=2)
    return sdpa(q, mixed, mixed)
