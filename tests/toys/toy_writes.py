"""Ways to write a cache: new k and v (B,S,Hkv,D), caches, position -> keys, values, state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from toy_options import FILLED, HEAD_DIM, HEADS, KV_HEADS


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


def scatter_returned(k, v, ck, cv, pos):
    """As for compilers that want no writes in place: a position for each number, in a copy."""
    at = pos[None, None, :, None].expand(k.shape[0], k.shape[2], -1, k.shape[3])
    keys = torch.scatter(ck, 2, at, k.transpose(1, 2))
    values = cv.scatter(dim=2, index=at, src=v.transpose(1, 2))
    return keys, values, (keys, values)


def scatter_returned_folded(k, v, ck, cv, pos):
    """The same where heads and head_dim are one dimension."""
    at = pos[None, :, None].expand(k.shape[0], -1, ck.shape[2])
    keys, values = (c.scatter(1, at, new.flatten(2)) for c, new in ((ck, k), (cv, v)))
    return *split_heads(keys, values), (keys, values)


def scatter_added(k, v, ck, cv, pos):
    """A copy whose numbers are added to."""
    at = pos[None, None, :, None].expand(k.shape[0], k.shape[2], -1, k.shape[3])
    keys = ck.scatter(2, at, k.transpose(1, 2), reduce="add")
    values = cv.scatter(2, at, v.transpose(1, 2), reduce="add")
    return keys, values, (keys, values)


def scatter_copied_index(k, v, ck, cv, pos):
    """A copy, and nothing says that all numbers of a row go to one slot."""
    at = pos[None, None, :, None].repeat(k.shape[0], k.shape[2], 1, k.shape[3])
    keys, values = (c.scatter(2, at, new.transpose(1, 2)) for c, new in ((ck, k), (cv, v)))
    return keys, values, (keys, values)


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
