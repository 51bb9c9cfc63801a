"""Decoders of one attention layer, each spelled in another way, and what drives and watches them.

A spelling is a way to write the cache and a way to attend. `REWRITTEN` must become sparse,
`UNTOUCHED` must stay as it was for the reason named. Letters: B batch, Hq query heads, Hkv KV
heads, G = Hq / Hkv, S new tokens, T cached tokens, D head_dim.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from loki_compile.kernels import cpu, reference
from loki_compile.kernels.fused import index_rows
from loki_compile.kernels.ops import with_bool_mask
from loki_compile.passes.attention import Reason
from loki_compile.passes.normalize import normalize
from loki_compile.pca_store.basis import BasisSet, random_basis
from loki_compile.pca_store.fingerprint import weights_fingerprint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from loki_compile import reset_stats
from loki_compile.backend import Engine, interpreter
from loki_compile.config import LokiConfig
from loki_compile.counts import forget_notices
from loki_compile.report import clear_reports

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 12, 6, 3, 10
SLOTS, FILLED, BATCH = 41, 17, 2
sdpa = F.scaled_dot_product_attention


# --- writing the cache: (new k, new v) (B,S,Hkv,D), the caches, the position -> keys, values, state


def cat_bhtd(k, v, ck, cv, pos):
    keys = torch.cat([ck, k.transpose(1, 2)], dim=-2)
    values = torch.cat([cv, v.transpose(1, 2)], dim=-2)
    return keys, values, (keys, values)


def cat_bthd(k, v, ck, cv, pos):
    keys, values = torch.concat((ck, k), 1), torch.concat((cv, v), 1)
    return keys.transpose(1, 2), values.transpose(1, 2), (keys, values)


def cat_behind_whole_slice(k, v, ck, cv, pos):
    """A library that cuts the past to its window, where there is no window."""
    keys = torch.cat([ck[:, :, 0:, :], k.transpose(1, 2)], dim=2)
    values = torch.cat([cv[:, :, 0:, :], v.transpose(1, 2)], dim=2)
    return keys, values, (keys, values)


def cat_behind_slice(k, v, ck, cv, pos):
    """The same where there is one: rows leave before the new ones come in."""
    keys = torch.cat([ck[:, :, 1:, :], k.transpose(1, 2)], dim=2)
    values = torch.cat([cv[:, :, 1:, :], v.transpose(1, 2)], dim=2)
    return keys, values, (keys, values)


def cat_window_read(k, v, ck, cv, pos):
    """The whole cache is kept, attention reads its newest 11 keys."""
    keys = torch.cat([ck, k.transpose(1, 2)], dim=2)
    values = torch.cat([cv, v.transpose(1, 2)], dim=2)
    return keys[:, :, -11:], values[:, :, -11:], (keys, values)


def cat_cropped(k, v, ck, cv, pos):
    """A sliding window: the cache that is returned is a slice of what attention reads."""
    keys = torch.cat([ck, k.transpose(1, 2)], dim=2)
    values = torch.cat([cv, v.transpose(1, 2)], dim=2)
    return keys, values, (keys[:, :, -FILLED:], values[:, :, -FILLED:])


def cat_prepended(k, v, ck, cv, pos):
    keys = torch.cat([k.transpose(1, 2), ck], dim=2)
    values = torch.cat([v.transpose(1, 2), cv], dim=2)
    return keys, values, (keys, values)


def cat_three(k, v, ck, cv, pos):
    keys = torch.cat([ck, k.transpose(1, 2), k.transpose(1, 2)], dim=2)
    values = torch.cat([cv, v.transpose(1, 2), v.transpose(1, 2)], dim=2)
    return keys, values, (keys, values)


def cat_then_edited(k, v, ck, cv, pos):
    """The new cache is written into after it was built."""
    keys, values = torch.cat([ck, k.transpose(1, 2)], 2), torch.cat([cv, v.transpose(1, 2)], 2)
    keys[:, :, 0] = 0.5
    return keys, values, (keys, values)


def past_edited_then_cat(k, v, ck, cv, pos):
    ck[:, :, 0] = 0.5
    return cat_bhtd(k, v, ck, cv, pos)


def cat_not_returned(k, v, ck, cv, pos):
    keys, values, _ = cat_bhtd(k, v, ck, cv, pos)
    return keys, values, ()


def split_heads(*caches):
    """(B,Hkv,T,D) of (B,T,Hkv*D)."""
    return (c.view(*c.shape[:2], -1, HEAD_DIM).transpose(1, 2) for c in caches)


def cat_folded(k, v, ck, cv, pos):
    """The cache holds what the projections give; heads are split behind it."""
    ck, cv = torch.cat([ck, k.flatten(2)], 1), torch.cat([cv, v.flatten(2)], 1)
    return *split_heads(ck, cv), (ck, cv)


def index_copy_folded(k, v, ck, cv, pos):
    ck.index_copy_(1, pos, k.flatten(2))
    cv.index_copy_(1, pos, v.flatten(2))
    return *split_heads(ck, cv), ()


def slice_folded(k, v, ck, cv, pos):
    """Reads what is filled."""
    end = pos + k.shape[1]
    ck[:, pos:end], cv[:, pos:end] = k.flatten(2), v.flatten(2)
    return *split_heads(ck[:, :end], cv[:, :end]), ()


def cat_folded_dims_first(k, v, ck, cv, pos):
    """Numbers of one dim lie together, those of one head do not."""
    ck, cv = torch.cat([ck, k.mT.flatten(2)], 1), torch.cat([cv, v.flatten(2)], 1)
    keys = ck.view(*ck.shape[:2], HEAD_DIM, -1).permute(0, 3, 1, 2)
    (values,) = split_heads(cv)
    return keys, values, (ck, cv)


def index_copy_through_split(k, v, ck, cv, pos):
    ck.view(*ck.shape[:2], -1, HEAD_DIM).index_copy_(1, pos, k)
    cv.view(*cv.shape[:2], -1, HEAD_DIM).index_copy_(1, pos, v)
    return *split_heads(ck, cv), ()


def cat_stored_rotated(k, v, ck, cv, pos):
    """Attention reads the cache after a computation over all of it."""
    keys, values, state = cat_bhtd(k, v, ck, cv, pos)
    return keys * torch.linspace(1, 2, HEAD_DIM), values, state


def cat_scaled(k, v, ck, cv, pos):
    """Behind the cache all keys are multiplied with one number."""
    keys, values, state = cat_bhtd(k, v, ck, cv, pos)
    return keys * 1.5, values, state


def cat_divided(k, v, ck, cv, pos):
    keys, values, state = cat_bthd(k, v, ck, cv, pos)
    return (0.7 * keys) / 1.5, values, state


def cat_turned_around(k, v, ck, cv, pos):
    keys, values, state = cat_bhtd(k, v, ck, cv, pos)
    return keys * -1.5, values, state


def index_copy_method(k, v, ck, cv, pos):
    ck.index_copy_(2, pos, k.transpose(1, 2))
    cv.index_copy_(2, pos, v.transpose(1, 2))
    return ck, cv, ()


def index_copy_bthd(k, v, ck, cv, pos):
    ck.index_copy_(1, pos, k)
    cv.index_copy_(1, pos, v)
    return ck.transpose(1, 2), cv.transpose(1, 2), ()


def slice_assignment(k, v, ck, cv, pos):
    end = pos + k.shape[1]
    ck[:, :, pos:end] = k.transpose(1, 2)
    cv[:, :, pos:end] = v.transpose(1, 2)
    return ck, cv, ()


def slice_assignment_read(k, v, ck, cv, pos):
    slice_assignment(k, v, ck, cv, pos)
    end = pos + k.shape[1]
    return ck[:, :, :end], cv[:, :, :end], ()


def tensor_assignment(k, v, ck, cv, pos):
    ck[:, :, pos] = k.transpose(1, 2)
    cv[:, :, pos] = v.transpose(1, 2)
    return ck, cv, ()


def row_assignment(k, v, ck, cv, pos):
    """Each row of the batch writes at its own position: advanced indices in two dimensions."""
    rows = torch.arange(k.shape[0])
    ck[rows, :, pos] = k[:, 0]
    cv[rows, :, pos] = v[:, 0]
    return ck, cv, ()


def index_put_method(k, v, ck, cv, pos):
    rows, heads = torch.arange(k.shape[0])[:, None, None], torch.arange(k.shape[2])[None, :, None]
    ck.index_put_((rows, heads, pos), k.transpose(1, 2))
    cv.index_put_((rows, heads, pos), v.transpose(1, 2))
    return ck, cv, ()


def index_put_bthd(k, v, ck, cv, pos):
    rows = torch.arange(k.shape[0]).unsqueeze(1)
    ck.index_put_((rows, pos[None]), k)
    cv.index_put_(indices=(rows, pos[None]), values=v)
    return ck.transpose(1, 2), cv.transpose(1, 2), ()


def index_put_heads_swapped(k, v, ck, cv, pos):
    """The indices of the heads are not in their order."""
    rows, heads = torch.arange(k.shape[0])[:, None, None], torch.tensor([2, 0, 1])[None, :, None]
    ck.index_put_((rows, heads, pos), k.transpose(1, 2))
    cv.index_put_((rows, heads, pos), v.transpose(1, 2))
    return ck, cv, ()


def narrow_copy(k, v, ck, cv, pos):
    ck.narrow(2, pos, k.shape[1]).copy_(k.transpose(1, 2))
    cv.narrow(2, pos, k.shape[1]).copy_(v.transpose(1, 2))
    return ck, cv, ()


def select_copy(k, v, ck, cv, pos):
    ck.select(2, pos).copy_(k[:, 0])
    cv.select(2, pos).copy_(v[:, 0])
    return ck, cv, ()


def llama_reference(k, v, ck, cv, pos):
    """Meta's llama: caches (max batch, T, Hkv, D), written and read by slices."""
    batch, end = k.shape[0], pos + k.shape[1]
    ck[:batch, pos:end] = k
    cv[:batch, pos:end] = v
    return ck[:batch, :end].transpose(1, 2), cv[:batch, :end].transpose(1, 2), ()


def roll_window(k, v, ck, cv, pos):
    """A full sliding window: everything moves by one, the newest key comes last."""
    for cache, new in ((ck, k), (cv, v)):
        moved = cache.roll(-1, dims=2)
        moved[:, :, torch.tensor([-1])] = new.transpose(1, 2)
        cache.copy_(moved)
    return ck, cv, ()


def shift_window(k, v, ck, cv, pos):
    """The same by a copy within the cache, then an assignment to its last slot."""
    for cache, new in ((ck, k), (cv, v)):
        cache[:, :, :-1] = cache[:, :, 1:].clone()
        cache[:, :, -1:] = new.transpose(1, 2)
    return ck, cv, ()


def ring(k, v, ck, cv, pos):
    """Positions wrap around a cache that is smaller than the sequence."""
    return index_copy_method(k, v, ck, cv, pos % ck.shape[2])


def write_twice(k, v, ck, cv, pos):
    ck.index_copy_(2, pos, k.transpose(1, 2) * 2)
    ck[:, :, pos] = k.transpose(1, 2)
    cv.index_copy_(2, pos, v.transpose(1, 2))
    return ck, cv, ()


def write_two_halves(k, v, ck, cv, pos):
    """Two tokens, each by its own call."""
    for token in range(k.shape[1]):
        ck.index_copy_(2, pos[token : token + 1], k[:, token : token + 1].transpose(1, 2))
        cv.index_copy_(2, pos[token : token + 1], v[:, token : token + 1].transpose(1, 2))
    return ck, cv, ()


def index_copy_returned(k, v, ck, cv, pos):
    keys = ck.index_copy(2, pos, k.transpose(1, 2))
    values = torch.index_copy(cv, 2, pos, v.transpose(1, 2))
    return keys, values, (keys, values)


def index_put_returned(k, v, ck, cv, pos):
    rows = torch.arange(k.shape[0]).view(-1, 1)
    keys, values = ck.index_put((rows, pos), k), cv.index_put((rows, pos), v)
    return keys.transpose(1, 2), values.transpose(1, 2), (keys, values)


def index_copy_heads(k, v, ck, cv, pos):
    """Functional, and along the heads: a permutation of them."""
    order = torch.tensor([2, 0, 1])
    keys = torch.cat([ck[:, :, 1:], k.transpose(1, 2)], 2)
    keys = ck.index_copy(1, order, keys)
    values = torch.cat([cv[:, :, 1:], v.transpose(1, 2)], 2)
    return keys, values, (keys, values)


def read_only(k, v, ck, cv, pos):
    """Cross-attention: the cache is complete before the first step."""
    return ck, cv, ()


def latent(k, v, ck, cv, pos):
    """What is cached is expanded to keys and values by a linear map, as MLA does."""
    index_copy_method(k, v, ck, cv, pos)
    expand = torch.linspace(-1, 1, HEAD_DIM * HEAD_DIM).view(HEAD_DIM, HEAD_DIM)
    return F.linear(ck, expand), cv @ expand, ()


def latent_pieces(k, v, ck, cv, pos):
    """The same over a growing cache, with keys put together in a fresh tensor."""
    latents, values, state = cat_bhtd(k, v, ck, cv, pos)
    expand = torch.linspace(-1, 1, HEAD_DIM * 8).view(8, HEAD_DIM)
    keys = latents.new_empty(latents.shape)
    keys[..., :8].copy_(F.linear(latents, expand))
    keys[..., 8:].copy_(latents[..., :2])
    return keys, values, state


def encoder_states(k, v, ck, cv, pos):
    """Keys of cross-attention, computed again at each step from states that nothing writes."""
    return ck @ torch.linspace(-1, 1, HEAD_DIM * HEAD_DIM).view(HEAD_DIM, HEAD_DIM), cv, ()


def fresh(k, v, ck, cv, pos):
    """No cache: attention over keys that this very call computes."""
    return k.transpose(1, 2), v.transpose(1, 2), ()


def accumulate(k, v, ck, cv, pos):
    rows = torch.arange(k.shape[0]).unsqueeze(1)
    ck.index_put_((rows, pos[None]), k, accumulate=True)
    cv[:, pos] = v
    return ck.transpose(1, 2), cv.transpose(1, 2), ()


def index_add(k, v, ck, cv, pos):
    ck.index_add_(2, pos, k.transpose(1, 2))
    cv.index_copy_(2, pos, v.transpose(1, 2))
    return ck, cv, ()


def masked_write(k, v, ck, cv, pos):
    here = torch.arange(ck.shape[2]) == pos
    ck[:, :, here] = k.transpose(1, 2)
    cv[:, :, here] = v.transpose(1, 2)
    return ck, cv, ()


def per_head_write(k, v, ck, cv, pos):
    for head in range(k.shape[2]):
        ck[:, head, pos] = k[:, :, head]
        cv[:, head, pos] = v[:, :, head]
    return ck, cv, ()


def scalar_write(k, v, ck, cv, pos):
    """Besides the new keys, a number is broadcast over the first slot."""
    ck[:, :, 0] = 0.25
    return index_copy_method(k, v, ck, cv, pos)


def head_broadcast_write(k, v, ck, cv, pos):
    ck[:, :, pos] = k[:, :, :1].transpose(1, 2)
    cv[:, :, pos] = v.transpose(1, 2)
    return ck, cv, ()


def dims_by_halves(k, v, ck, cv, pos):
    """The new key is written in two halves of head_dim."""
    half = k.shape[-1] // 2
    ck[:, :, pos, :half] = k[..., :half].transpose(1, 2)
    ck[:, :, pos, half:] = k[..., half:].transpose(1, 2)
    cv[:, :, pos] = v.transpose(1, 2)
    return ck, cv, ()


def through_flat_view(k, v, ck, cv, pos):
    """Written through two views, the first of which merges dimensions."""
    for cache, new in ((ck, k), (cv, v)):
        flat = cache.view(-1, *cache.shape[2:]).transpose(0, 1)
        flat[pos] = new.transpose(1, 2).reshape(-1, *new.shape[1:2], new.shape[3]).transpose(0, 1)
    return ck, cv, ()


def through_data(k, v, ck, cv, pos):
    ck.data[:, :, pos] = k.transpose(1, 2)
    cv.data[:, :, pos] = v.transpose(1, 2)
    return ck, cv, ()


def through_split(k, v, ck, cv, pos):
    """Written through the tensors that `unbind` makes."""
    for cache, new in ((ck, k), (cv, v)):
        for row, fresh_row in zip(cache.unbind(0), new.unbind(0), strict=True):
            row.transpose(0, 1)[pos] = fresh_row
    return ck, cv, ()


def written_with_out(k, v, ck, cv, pos):
    torch.mul(ck[0], 0.5, out=ck[0])
    return index_copy_method(k, v, ck, cv, pos)


def inplace_flag(k, v, ck, cv, pos):
    F.relu(ck, inplace=True)
    return index_copy_method(k, v, ck, cv, pos)


def foreach_write(k, v, ck, cv, pos):
    index_copy_method(k, v, ck, cv, pos)
    torch._foreach_mul_([ck, cv], 0.5)
    return ck, cv, ()


def in_place_operator(k, v, ck, cv, pos):
    index_copy_method(k, v, ck, cv, pos)
    ck *= 0.5
    return ck, cv, ()


def snapshot_before_write(k, v, ck, cv, pos):
    """Attention reads copies that were made before the new keys were written."""
    keys, values = ck.repeat_interleave(HEADS // KV_HEADS, 1), cv.repeat_interleave(2, 1)
    index_copy_method(k, v, ck, cv, pos)
    return keys, values, ()


def values_before_write(k, v, ck, cv, pos):
    """Only the values are a copy from before the write."""
    values = cv.repeat_interleave(HEADS // KV_HEADS, dim=1)
    index_copy_method(k, v, ck, cv, pos)
    return ck.repeat_interleave(HEADS // KV_HEADS, dim=1), values, ()


def cast_to_query(k, v, ck, cv, pos):
    """Caches hold another dtype than the queries."""
    index_copy_method(k.to(ck.dtype), v.to(cv.dtype), ck, cv, pos)
    return ck.to(k.dtype), cv.to(v.dtype), ()


def keys_transposed(k, v, ck, cv, pos):
    """Keys are stored (B,Hkv,D,T)."""
    ck.index_copy_(3, pos, k.permute(0, 2, 3, 1))
    cv.index_copy_(2, pos, v.transpose(1, 2))
    return ck.transpose(2, 3), cv, ()


def values_transposed(k, v, ck, cv, pos):
    """Values are stored (B,Hkv,D,T), as for a matmul whose second operand is transposed."""
    ck.index_copy_(2, pos, k.transpose(1, 2))
    cv.index_copy_(3, pos, v.permute(0, 2, 3, 1))
    return ck, cv.transpose(2, 3), ()


@torch.library.custom_op("toy::append", mutates_args=("cache",))
def opaque_append(cache: Tensor, new: Tensor, pos: Tensor) -> None:
    cache.index_copy_(2, pos, new)


@torch.library.custom_op("toy::index_copy_", mutates_args=("cache",))
def shifted_index_copy(cache: Tensor, dim: int, pos: Tensor, new: Tensor) -> None:
    """Named like PyTorch's, but it negates."""
    cache.index_copy_(dim, pos, -new)


@opaque_append.register_fake
def _(cache, new, pos):
    return None


@shifted_index_copy.register_fake
def _(cache, dim, pos, new):
    return None


def unknown_op(k, v, ck, cv, pos):
    torch.ops.toy.append(ck, k.transpose(1, 2), pos)
    cv.index_copy_(2, pos, v.transpose(1, 2))
    return ck, cv, ()


def namesake_op(k, v, ck, cv, pos):
    torch.ops.toy.index_copy_(ck, 2, pos, k.transpose(1, 2))
    cv.index_copy_(2, pos, v.transpose(1, 2))
    return ck, cv, ()


def one_head_3d(k, v, ck, cv, pos):
    """Caches (B,T,D): one KV head, without a dimension for it."""
    ck[:, pos] = k[:, :, 0]
    cv[:, pos] = v[:, :, 0]
    return ck.unsqueeze(1), cv[:, None], ()


# --- attending: q (B,Hq,S,D), keys and values (B,Hkv,T,D), mask -> (B,Hq,S,D)


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


def tiled(q, keys, values, mask):
    """`repeat` lays the heads out as 0 1 2 0 1 2: query head h reads KV head h % Hkv."""
    keys, values = (x.repeat(1, HEADS // x.shape[1], 1, 1) for x in (keys, values))
    return sdpa(q, keys, values, attn_mask=mask)


def tiled_by_expand(q, keys, values, mask):
    """The same head order by `expand` in front of the heads."""
    batch, kv_heads, length, dim = keys.shape
    group = HEADS // kv_heads
    keys, values = (
        x[:, None].expand(batch, group, kv_heads, length, dim).reshape(batch, HEADS, length, dim)
        for x in (keys, values)
    )
    return sdpa(q, keys, values, attn_mask=mask)


TILED = (tiled, tiled_by_expand)


def tiles_of_flipped_heads(q, keys, values, mask):
    return tiled(q, keys.flip(1), values.flip(1), mask)


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


# --- masks: (batch, S, T, position of the first new key) -> mask or None


def no_mask(batch: int, new: int, slots: int, at: int) -> None:
    return None


def causal(batch: int, new: int, slots: int, at: int) -> Tensor:
    """bool (1,1,S,T)."""
    last = at + torch.arange(new)
    return (torch.arange(slots) <= last[:, None])[None, None]


def causal_2d(batch: int, new: int, slots: int, at: int) -> Tensor:
    return causal(batch, new, slots, at)[0, 0]


def causal_float(batch: int, new: int, slots: int, at: int) -> Tensor:
    """Additive, finfo.min where hidden, and a bias elsewhere."""
    bias = torch.linspace(-1, 1, slots).expand(1, 1, new, slots)
    hidden = ~causal(batch, new, slots, at)
    return bias.masked_fill(hidden, torch.finfo(torch.float32).min)


def causal_inf(batch: int, new: int, slots: int, at: int) -> Tensor:
    return torch.zeros(1, 1, new, slots).masked_fill(~causal(batch, new, slots, at), -torch.inf)


def left_padded(batch: int, new: int, slots: int, at: int) -> Tensor:
    """bool (B,1,S,T): row i of the batch has 3 * i keys of padding in front."""
    padding = torch.arange(slots) >= 3 * torch.arange(batch)[:, None]
    return causal(batch, new, slots, at) & padding[:, None, None]


def alibi(batch: int, new: int, slots: int, at: int) -> Tensor:
    """Additive, another slope for each query head."""
    slopes = 0.3 * torch.arange(1, HEADS + 1).view(1, HEADS, 1, 1)
    distance = torch.arange(slots) - (at + torch.arange(new)[:, None])
    return (slopes * distance).masked_fill(~causal(batch, new, slots, at), -torch.inf)


def nothing_seen_by_first(batch: int, new: int, slots: int, at: int) -> Tensor:
    """The first row of the batch sees no key at all."""
    seen = causal(batch, new, slots, at).expand(batch, 1, new, slots).clone()
    seen[0] = False
    return seen


@dataclass(frozen=True)
class Spelling:
    """One way to write a decoder's attention layer.

    `layout` names the caches' dimensions; `position` is what the write takes: "tensor" (S,), "int"
    or "rows" (B,). `growing` caches are returned, others are `slots` long and written in place.
    `reason` says why it must stay dense; None if it must become sparse. `values` is the layout of
    the value cache where it differs.
    """

    write: Callable[..., Any]
    attend: Callable[..., Tensor] = gqa_flag
    mask: Callable[..., Tensor | None] = causal
    reason: Reason | None = None
    layout: str = "bhtd"
    values: str = ""
    position: str = "tensor"
    growing: bool = False
    kv_heads: int = KV_HEADS
    new_tokens: int = 1
    slots: int = SLOTS
    fused: bool = False
    cache_dtype: torch.dtype = torch.float32
    note: str = ""

    @property
    def name(self) -> str:
        parts = [self.write.__name__, self.attend.__name__, self.mask.__name__]
        parts += [f"{self.new_tokens}tokens"] * (self.new_tokens > 1) + [self.note] * bool(
            self.note
        )
        return "-".join(parts)

    def but(self, **changes: Any) -> Spelling:
        return dataclasses.replace(self, **changes)


_cat = Spelling(cat_bhtd, mask=no_mask, growing=True)
_static = Spelling(index_copy_method)

REWRITTEN = [
    # Ways to write the cache.
    _cat,
    _cat.but(write=cat_bthd, layout="bthd"),
    _cat.but(write=cat_behind_whole_slice),
    _cat.but(write=cat_window_read),
    _cat.but(write=cat_cropped),
    _cat.but(write=cat_folded, layout="btf"),
    _static.but(write=index_copy_folded, layout="btf"),
    _static.but(write=slice_folded, layout="btf", mask=no_mask, position="int"),
    _cat.but(write=cat_scaled),
    _cat.but(write=cat_divided, layout="bthd", attend=gqa_repeat_kv_bthd),
    _static,
    _static.but(write=index_copy_bthd, layout="bthd"),
    _static.but(write=slice_assignment, position="int"),
    _static.but(write=slice_assignment_read, mask=no_mask, position="int"),
    _static.but(write=tensor_assignment),
    _static.but(write=row_assignment, position="rows", mask=left_padded),
    _static.but(write=index_put_method),
    _static.but(write=index_put_method, new_tokens=3, mask=left_padded),
    _static.but(write=index_put_bthd, layout="bthd"),
    _static.but(write=narrow_copy, position="int"),
    _static.but(write=select_copy, position="int"),
    _static.but(
        write=llama_reference,
        attend=gqa_repeat_kv_bthd,
        layout="bthd",
        mask=no_mask,
        position="int",
        note="larger_batch",
    ),
    _static.but(write=write_twice),
    _static.but(write=write_two_halves, new_tokens=2),
    _static.but(write=index_copy_returned),
    _static.but(write=index_put_returned, layout="bthd"),
    _static.but(write=read_only, mask=no_mask),
    _static.but(write=one_head_3d, kv_heads=1, layout="btd", attend=mqa_broadcast),
    _static.but(write=roll_window, mask=no_mask, attend=gqa_repeat_kv),
    _static.but(write=ring, mask=no_mask, slots=FILLED + 2),
    _static.but(write=cast_to_query, cache_dtype=torch.bfloat16),
    _static.but(write=cast_to_query, cache_dtype=torch.float16, attend=gqa_repeat_kv),
    # Ways to group heads.
    _cat.but(attend=plain, kv_heads=HEADS),
    _static.but(attend=plain, kv_heads=HEADS),
    _cat.but(attend=gqa_repeat_kv),
    _static.but(attend=gqa_repeat_kv),
    _static.but(attend=gqa_repeat_kv_bthd),
    _static.but(attend=gqa_repeat_interleave),
    _static.but(attend=mqa_broadcast, kv_heads=1),
    _cat.but(attend=mqa_broadcast, kv_heads=1),
    _static.but(attend=mqa_expand, kv_heads=1),
    _static.but(attend=gqa_repeat_kv, kv_heads=1),
    _static.but(attend=gqa_flag_by_keyword),
    _static.but(attend=scaled, kv_heads=HEADS),
    _static.but(fused=True),
    _static.but(attend=tiled),
    _static.but(attend=tiled, mask=alibi),
    _static.but(attend=tiled, new_tokens=3, mask=left_padded),
    _static.but(attend=tiled_by_expand),
    _cat.but(attend=tiled),
    _static.but(attend=tiled, kv_heads=1),
    _static.but(attend=values_of_one_head),
    # Masks.
    _static.but(mask=causal_2d),
    _static.but(mask=causal_float),
    _static.but(mask=causal_inf),
    _static.but(mask=left_padded),
    _static.but(mask=alibi, attend=gqa_repeat_kv),
    _cat.but(mask=alibi, attend=gqa_repeat_kv),
    _static.but(mask=nothing_seen_by_first),
    _static.but(attend=mask_edited_in_place),
    _static.but(attend=mask_assigned, mask=causal_2d),
    # Several new tokens.
    _static.but(new_tokens=3),
    _static.but(new_tokens=4, mask=left_padded, attend=gqa_repeat_kv),
    _cat.but(new_tokens=2, mask=causal_inf),
    _static.but(write=slice_assignment, position="int", new_tokens=5),
    _static.but(mask=alibi, attend=gqa_repeat_kv, new_tokens=2),
]

UNTOUCHED = [
    # The cache.
    _cat.but(write=cat_not_returned, reason=Reason.CACHE_LEAVES),
    _cat.but(write=cat_prepended, reason=Reason.NO_CACHE),
    _cat.but(write=cat_behind_slice, reason=Reason.NO_CACHE),
    _cat.but(write=cat_three, reason=Reason.WRITE),
    _cat.but(write=cat_then_edited, reason=Reason.WRITE),
    _cat.but(write=past_edited_then_cat, reason=Reason.WRITE),
    _cat.but(write=cat_stored_rotated, reason=Reason.NO_CACHE),
    _cat.but(write=cat_turned_around, reason=Reason.NO_CACHE),
    _cat.but(write=cat_folded_dims_first, layout="btf", reason=Reason.OPAQUE_VIEW),
    _static.but(write=index_copy_through_split, layout="btf", reason=Reason.WRITE),
    _static.but(write=index_copy_heads, reason=Reason.WRITE, mask=no_mask),
    _static.but(write=shift_window, mask=no_mask, reason=Reason.WRITE),
    _static.but(write=index_put_heads_swapped, reason=Reason.WRITE),
    _static.but(write=accumulate, layout="bthd", reason=Reason.WRITE),
    _static.but(write=index_add, reason=Reason.WRITE),
    _static.but(write=masked_write, reason=Reason.WRITE),
    _static.but(write=per_head_write, reason=Reason.WRITE),
    _static.but(write=scalar_write, reason=Reason.WRITE),
    _static.but(write=head_broadcast_write, reason=Reason.WRITE),
    _static.but(write=dims_by_halves, reason=Reason.WRITE),
    _static.but(write=through_flat_view, reason=Reason.WRITE),
    _static.but(write=through_data, reason=Reason.WRITE),
    _static.but(write=through_split, reason=Reason.WRITE),
    _static.but(write=written_with_out, reason=Reason.WRITE),
    _static.but(write=inplace_flag, reason=Reason.WRITE),
    _static.but(write=foreach_write, reason=Reason.WRITE),
    _static.but(write=in_place_operator, reason=Reason.WRITE),
    _static.but(write=unknown_op, reason=Reason.WRITE),
    _static.but(write=namesake_op, reason=Reason.WRITE),
    _static.but(write=snapshot_before_write, attend=plain, reason=Reason.OPAQUE_VIEW),
    _static.but(write=values_before_write, attend=plain, reason=Reason.GROUPS),
    _static.but(write=cast_to_query, cache_dtype=torch.float64, reason=Reason.DTYPE),
    _static.but(write=keys_transposed, layout="bhdt", values="bhtd",
                reason=Reason.NON_CONTIGUOUS_HEAD_DIM),
    _static.but(write=values_transposed, values="bhdt", reason=Reason.NON_CONTIGUOUS_HEAD_DIM),
    _static.but(layout="strided", reason=Reason.NON_CONTIGUOUS_HEAD_DIM),
    _static.but(write=fresh, mask=no_mask, reason=Reason.NO_CACHE),
    _static.but(write=encoder_states, reason=Reason.NO_CACHE),
    _static.but(write=latent, reason=Reason.LATENT),
    _cat.but(write=latent_pieces, reason=Reason.LATENT),
    # The core.
    _static.but(attend=tiles_of_flipped_heads, reason=Reason.OPAQUE_VIEW),
    _static.but(attend=values_tiled, reason=Reason.GROUPS),
    _static.but(attend=heads_flipped, reason=Reason.OPAQUE_VIEW),
    _static.but(attend=dims_cut, kv_heads=HEADS, reason=Reason.OPAQUE_VIEW),
    _static.but(attend=causal_flag, kv_heads=HEADS, mask=no_mask, reason=Reason.CAUSAL_FLAG),
    _static.but(attend=causal_flag, kv_heads=HEADS, mask=no_mask, new_tokens=3,
                reason=Reason.PREFILL),
    _static.but(attend=own_values_as_keys, reason=Reason.NO_CACHE),
    _static.but(new_tokens=9, slots=64, reason=Reason.PREFILL),
]  # fmt: skip


class ToyDecoder(nn.Module):
    """One attention layer of a spelling with a residual, (B,S,HIDDEN) -> (B,S,HIDDEN)."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling, self.kv_heads = spelling, spelling.kv_heads
        widths = [HEADS * HEAD_DIM, self.kv_heads * HEAD_DIM, self.kv_heads * HEAD_DIM]
        if spelling.fused:
            self.qkv = nn.Linear(HIDDEN, sum(widths))
        else:
            self.q, self.k, self.v = (nn.Linear(HIDDEN, width) for width in widths)
        self.widths = widths
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(3)  # peaked attention: a key too many or too few shows

    @property
    def key_weight(self) -> Tensor:
        return self.qkv.weight if self.spelling.fused else self.k.weight

    def forward(self, x, ck, cv, pos, mask):
        batch, new, _ = x.shape
        if self.spelling.fused:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.view(batch, new, -1, HEAD_DIM) for y in (q, k, v))
        keys, values, state = self.spelling.write(k, v, ck, cv, pos)
        out = self.spelling.attend(q.transpose(1, 2), keys, values, mask)
        out = x + self.out(out.transpose(1, 2).reshape(batch, new, -1))
        return (out, *state)


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


# --- watching


@dataclass
class Compiled:
    """An interpreter as engine, and the graphs that were handed to it, in order."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        return interpreter(gm, inputs, **options)

    def calls(self, name: str) -> int:
        """Calls of an op such as "loki.select" in all graphs."""
        return sum(count_calls(gm.graph, name) for gm in self.graphs)


@contextmanager
def recorded(name: str, calls: list[tuple[tuple[Any, ...], torch.Tensor]]) -> Iterator[None]:
    """Calls of loki::<name> on the CPU are noted: their positional arguments and their result."""
    library = torch.library.Library("loki", "IMPL")
    kernel = with_bool_mask(getattr(cpu, name))

    def note(*args, **kwargs):
        calls.append((args, kernel(*args, **kwargs)))
        return calls[-1][1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the kernel is overridden is the purpose
        library.impl(name, note, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def count_calls(graph: fx.Graph, name: str) -> int:
    return sum(
        node.op in ("call_function", "call_method") and str(node.target).startswith(name)
        for node in graph.nodes
    )


def count_attention(graph: fx.Graph) -> int:
    return sum(
        node.op == "call_function"
        and getattr(node.target, "__name__", "") == "scaled_dot_product_attention"
        for node in graph.nodes
    )


def interpret(use_engine: Callable[[Engine], None]) -> Compiled:
    """Puts an interpreter in Inductor's place: seconds become milliseconds.

    Returns what collects the graphs that Inductor would have compiled.
    """
    compiled = Compiled()
    torch._dynamo.reset()
    clear_runtime()
    use_engine(compiled)
    return compiled


def is_sparse(gm: fx.GraphModule) -> bool:
    """Whether an engine is given the sparse variant."""
    return count_calls(gm.graph, "loki.attend") > 0


def clear_runtime() -> None:
    """Forgets counts, reports and the bases that were fitted in this process."""
    reset_stats()
    clear_reports()
    forget_notices()


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The first graph that Dynamo makes of a call, which runs."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*args, **kwargs)
    torch._dynamo.reset()
    return graphs[0]


def normal_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    return normalize(capture(function, *args, **kwargs))[0]


class DirectSparse(TorchFunctionMode):
    """Replaces attention by its definition: the index is built anew from the keys of the call.

    Keys are projected by `basis`, positions come from `reference.select` and the output from
    `reference.attend`, all in fp64.
    """

    def __init__(
        self, basis: BasisSet, config: LokiConfig, kv_heads: int, *, tiled: bool = False
    ) -> None:
        super().__init__()
        self.basis, self.config, self.kv_heads, self.tiled = basis, config, kv_heads, tiled

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
        if self.tiled:  # the definition knows blocks of query heads
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
        return out[:, heads.argsort()] if self.tiled else out

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
            "recent": budget.recent, "min_keys": budget.min_keys,
            "by_probability": self.config.group_choice == "probability" and not per_head,
        }  # fmt: skip

    def _rank(self) -> int:
        return self.basis.bases[0].rank_for(self.config.rank)
