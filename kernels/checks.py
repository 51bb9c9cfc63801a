"""What the `loki::` ops take. Each backend calls these before any launch.

Legend: B batch, Hq query heads, Hkv KV heads, S new tokens, T cached tokens, P pages of them,
D dims of q and k, Dv dims of v, R index dims, K position slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KEEP_ALL_Q16 = 1 << 16
MAX_KEYS = 2**31 - 64  # positions are int32, and blocks of them are counted past the end


def hidden_below(dtype: torch.dtype) -> float:
    """An additive mask of `dtype` hides a key where it is at most this: half of the lowest value.

    Lies between any bias a model would use and the fillers in use (-inf, finfo.min).
    """
    return torch.finfo(dtype).min / 2


def keys_ranked(index: Tensor, page: int, keys: int | None) -> int:
    """T: how many keys `loki::select` ranks, which an index of pages alone does not say."""
    return index.shape[2] if keys is None or page == 1 else keys


def check_select(
    q: Tensor,
    basis: Tensor | None,
    index: Tensor,
    index_scale: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    *,
    top_k: int | None,
    keep_q16: int,
    sink: int,
    recent: int,
    min_keys: int,
    per_head: bool,
    page: int = 1,
    keys: int | None = None,
    by_probability: bool = False,
    mass: float = 0.0,
    budgets: Tensor | None = None,
    slots: int | None = None,
    weighed: bool = False,
) -> tuple[int, int, int, int]:
    """Raise ValueError (what was found, what is allowed) unless `loki::select` takes these, or
    `loki::select_weighed`, where keys are `weighed`.

    budgets: int32 (B, heads that choose, S, 2), each of the first three may be 1, in place of
    `top_k` and `keep_q16`: how many keys a row chooses, and how many of these are the last ones
    that it sees. They are read where they lie, unchecked: a row never chooses more than it sees,
    or than the `slots` there are for it.

    Returns:
      (B, heads that choose, S, T).
    """
    op = "loki::select_weighed" if weighed else "loki::select"
    b, hq, s, d = _rank4(op, "q", q)
    _, hkv, _, r = _rank4(op, "index", index)
    t = _check_paging(op, index, page, keys, weighs=weighed or mass != 0.0)
    _check_sizes(op, q, index, t)
    if basis is None:
        _check_unprojected(op, q, index, index_scale, page, t)
    else:
        _check_low_rank(op, q, basis, index, index_scale, page)
    _rows_contiguous(op, "q", q, d)
    _rows_contiguous(op, "index", index, r)
    _same_device(op, "index", index, q)
    if by_probability and per_head:
        allowed = "False with per_head=True: one head ranks alike by scores and by probabilities"
        raise _wrong(op, "by_probability", by_probability, allowed)
    _check_bounded_mask(op, mask, bounds, q, t, per_head)
    _check_budget(op, top_k, keep_q16, sink, recent, min_keys, mass)
    heads = hq if per_head else hkv
    _check_budgets(op, budgets, slots, q, heads, mass)
    return b, heads, s, t


def _check_sizes(op: str, q: Tensor, index: Tensor, t: int) -> None:
    (b, hq, s, _), (bi, hkv, _, r) = q.shape, index.shape
    if q.dtype not in FLOAT_DTYPES:
        raise _wrong(op, "q dtype", q.dtype, "bfloat16, float16 or float32")
    if bi != b:
        raise _wrong(op, "batch of index", bi, f"batch of q, {b}")
    if hkv < 1 or hq % hkv:
        raise _wrong(op, "KV heads of index", hkv, f"a divisor of the {hq} query heads")
    if min(b, s, t, r) < 1 or t > MAX_KEYS:
        raise _wrong(op, "sizes (B, S, T, R)", (b, s, t, r), f"1 or more, T at most {MAX_KEYS}")


def _check_paging(op: str, index: Tensor, page: int, keys: int | None, *, weighs: bool) -> int:
    """Whether it is told what the rows of an index stand for; returns T."""
    if page < 1:
        raise _wrong(op, "page", page, "the keys of a page, or 1 for an index of keys")
    if (page > 1) != (keys is not None):
        allowed = "the number of keys where page > 1, None where each row is a key"
        raise _wrong(op, "keys", f"{keys} with page={page}", allowed)
    if page > 1 and weighs:
        allowed = "1 where keys are weighed: bounds of pages are no scores of keys"
        raise _wrong(op, "page", page, allowed)
    return keys_ranked(index, page, keys)


def _check_bounded_mask(
    op: str, mask: Tensor | None, bounds: Tensor | None, q: Tensor, t: int, per_head: bool
) -> None:
    if (mask is None) != (bounds is None):
        given = ("None" if mask is None else "a mask", "None" if bounds is None else "bounds")
        raise _wrong(op, "(mask, bounds)", given, "both or neither: bounds = mask_bounds(mask)")
    if mask is None or bounds is None:
        return
    _check_mask(op, mask, q, t)
    if not per_head and mask.shape[1] != 1 and mask.stride(1) != 0:
        raise _wrong(
            op,
            "heads of mask",
            mask.shape[1],
            "1 unless per_head=True: a group that shares its choice shares its mask",
        )
    if bounds.dtype != torch.int32 or bounds.shape != (*mask.shape[:3], 3):
        found = (tuple(bounds.shape), bounds.dtype)
        raise _wrong(op, "bounds", found, f"shape {(*mask.shape[:3], 3)}, int32: mask_bounds(mask)")
    _rows_contiguous(op, "bounds", bounds, 3)
    _same_device(op, "bounds", bounds, q)


def _check_budget(
    op: str, top_k: int | None, keep_q16: int, sink: int, recent: int, min_keys: int, mass: float
) -> None:
    if top_k is not None and top_k < 1:
        raise _wrong(op, "top_k", top_k, "None, or at least 1")
    if not 0 < keep_q16 <= KEEP_ALL_Q16:
        raise _wrong(op, "keep_q16", keep_q16, f"1 to {KEEP_ALL_Q16}")
    if sink < 0 or recent < 0 or min_keys < 0:
        raise _wrong(op, "(sink, recent, min_keys)", (sink, recent, min_keys), "0 or more")
    if not 0.0 <= mass < 1.0:
        raise _wrong(op, "mass", mass, "0 (none) or a share in (0, 1)")


def _check_budgets(
    op: str, budgets: Tensor | None, slots: int | None, q: Tensor, heads: int, mass: float
) -> None:
    if (budgets is None) != (slots is None):
        given = ("None" if budgets is None else "a tensor", slots)
        raise _wrong(op, "(budgets, slots)", given, "both or neither")
    if budgets is None or slots is None:
        return
    _check_numbers_of_rows(op, "budgets", budgets, q, ("heads", heads), 2)
    if slots < 1:
        raise _wrong(op, "slots", slots, "at least 1")
    if mass:
        raise _wrong(op, "mass", mass, "0 where rows have budgets")


def _check_numbers_of_rows(
    op: str, name: str, numbers: Tensor, q: Tensor, heads: tuple[str, int], each: int
) -> None:
    """int32 (B, heads, S, each), what there are of the first three being 1 or as many."""
    b, _, s, _ = q.shape
    bn, hn, sn, last = _rank4(op, name, numbers)
    if bn not in (1, b) or hn not in (1, heads[1]) or sn not in (1, s) or last != each:
        wanted = f"(B, {heads[0]}, S, {each}) = {(b, heads[1], s, each)}"
        allowed = f"{wanted}, any of the first three may be 1"
        raise _wrong(op, f"shape of {name}", (bn, hn, sn, last), allowed)
    if numbers.dtype != torch.int32:
        raise _wrong(op, f"{name} dtype", numbers.dtype, "int32")
    _rows_contiguous(op, name, numbers, each)
    _same_device(op, name, numbers, q)


def _check_unprojected(
    op: str, q: Tensor, index: Tensor, index_scale: Tensor | None, page: int, t: int
) -> None:
    """An index of the keys themselves, or of the bounds of their pages."""
    d, (rows, r) = q.shape[3], index.shape[2:]
    width = d if page == 1 else 2 * d
    if r != width or rows * page < t or index.dtype not in FLOAT_DTYPES:
        found = (tuple(index.shape), index.dtype)
        least = f"P >= {-(-t // page)}, 2 D" if page > 1 else "T, D"
        allowed = f"(B, Hkv, {least}), D = {d}, bfloat16, float16 or float32: there is no basis"
        raise _wrong(op, "index", found, allowed)
    if index_scale is not None:
        raise _wrong(op, "index_scale", "a tensor", "None, since there is no basis")


def _check_low_rank(
    op: str, q: Tensor, basis: Tensor, index: Tensor, index_scale: Tensor | None, page: int
) -> None:
    b, _, _, d = q.shape
    _, hkv, t, r = index.shape
    if page > 1:
        raise _wrong(op, "basis", f"a tensor with page={page}", "None: pages hold keys unprojected")
    if basis.shape not in ((hkv, d, r), (b, hkv, d, r)) or basis.dtype != torch.float32:
        found = (tuple(basis.shape), basis.dtype)
        allowed = f"shape (Hkv, D, R) = {(hkv, d, r)}, or one for each of {b} rows, float32"
        raise _wrong(op, "basis", found, allowed)
    if index.dtype == torch.int8:
        if index_scale is None:
            raise _wrong(op, "index_scale", None, "a tensor, since index is int8")
        if index_scale.shape != (b, hkv, t, 1) or index_scale.dtype != torch.float32:
            found = (tuple(index_scale.shape), index_scale.dtype)
            raise _wrong(
                op, "index_scale", found, f"shape (B, Hkv, T, 1) = {(b, hkv, t, 1)}, float32"
            )
        _same_device(op, "index_scale", index_scale, q)
    else:
        if index.dtype not in FLOAT_DTYPES:
            raise _wrong(op, "index dtype", index.dtype, "bfloat16, float16, float32 or int8")
        if index_scale is not None:
            raise _wrong(op, "index_scale", "a tensor", f"None, since index is {index.dtype}")
    _rows_contiguous(op, "basis", basis, r)
    _same_device(op, "basis", basis, q)


def check_pages(pages: Tensor, keys: Tensor, written: Tensor, *, page: int, grows: bool) -> None:
    """Raise ValueError (what was found, what is allowed) unless the page ops take these.

    `grows`: for `loki::extend_pages`, whose pages may be fewer than those of the keys.
    """
    op = "loki::extend_pages" if grows else "loki::update_pages"
    b, hkv, t, d = _rank4(op, "keys", keys)
    if page < 2:
        raise _wrong(op, "page", page, "2 or more keys")
    if keys.dtype not in FLOAT_DTYPES:
        raise _wrong(op, "keys dtype", keys.dtype, "bfloat16, float16 or float32")
    if min(b, hkv, t, d) < 1 or t > MAX_KEYS:
        raise _wrong(op, "sizes (B, Hkv, T, D)", (b, hkv, t, d), f"1 or more, T at most {MAX_KEYS}")
    count = -(-t // page)
    bp, hp, rows, width = _rank4(op, "pages", pages)
    fits = rows <= count if grows else rows >= count
    if (bp, hp, width) != (b, hkv, 2 * d) or not fits or pages.dtype != keys.dtype:
        found = (tuple(pages.shape), pages.dtype)
        allowed = f"({b}, {hkv}, {'up to' if grows else 'at least'} {count}, {2 * d}), {keys.dtype}"
        raise _wrong(op, "pages", found, allowed)
    bw, hw, tw, one = _rank4(op, "written", written)
    if bw not in (1, b) or hw not in (1, hkv) or tw not in (1, t) or one != 1:
        allowed = f"broadcastable to (B, Hkv, T, 1) = {(b, hkv, t, 1)}"
        raise _wrong(op, "shape of written", (bw, hw, tw, one), allowed)
    if written.dtype not in (torch.bool, torch.uint8):
        raise _wrong(op, "written dtype", written.dtype, "bool or uint8")
    _rows_contiguous(op, "pages", pages, width)
    _rows_contiguous(op, "keys", keys, d)
    _same_device(op, "pages", pages, keys, "keys")
    _same_device(op, "written", written, keys, "keys")


def check_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    *,
    softcap: float,
    sink_logits: Tensor | None,
    k_pe: Tensor | None = None,
    ranges: Tensor | None = None,
) -> tuple[int, int, int, int]:
    """Raise ValueError (what was found, what is allowed) unless `loki::attend` takes these, or
    `loki::attention` where there are no positions.

    ranges: int32 (B, Hkv, S, 4), each of the first three may be 1: a row reads the keys from its
    first number to its second, and from its third to its fourth, where these ascend from 0 to T;
    all keys where both ranges are empty. They are read where they lie, unchecked: what is out of
    order is read as if it were cut off.

    q, k, v and k_pe may each have a dtype of its own: a cache is read as it is stored.

    Returns:
      (B, Hq, S, Dv), the shape of what attention returns.
    """
    op = "loki::attention" if positions is None else "loki::attend"
    shape, hkv, t = _check_cache(op, q, k, v, k_pe)
    if positions is not None:
        _check_positions(op, positions, q, hkv)
    if ranges is not None:
        _check_numbers_of_rows(op, "ranges", ranges, q, ("Hkv", hkv), 4)
    if mask is not None:
        _check_mask(op, mask, q, t)
    if softcap < 0:
        raise _wrong(op, "softcap", softcap, "0 (none) or a positive number")
    if sink_logits is not None:
        _check_sink_logits(op, sink_logits, q)
    return shape


def _check_cache(
    op: str, q: Tensor, k: Tensor, v: Tensor, k_pe: Tensor | None
) -> tuple[tuple[int, int, int, int], int, int]:
    """Queries, and the keys and values that they attend to; returns (B, Hq, S, Dv), Hkv, T."""
    b, hq, s, d = _rank4(op, "q", q)
    bk, hkv, t, dk = _rank4(op, "k", k)
    bv, hv, tv, dv = _rank4(op, "v", v)
    more = 0 if k_pe is None else _rank4(op, "k_pe", k_pe)[3]
    if q.dtype not in FLOAT_DTYPES:
        raise _wrong(op, "q dtype", q.dtype, "bfloat16, float16 or float32")
    if k.dtype not in FLOAT_DTYPES or v.dtype not in FLOAT_DTYPES:
        allowed = "each bfloat16, float16 or float32"
        raise _wrong(op, "dtypes of (k, v)", (k.dtype, v.dtype), allowed)
    if bk != b or dk != d - more or hkv < 1 or hq % hkv:
        allowed = f"(B, Hkv, T, D) with B = {b}, D = {d - more} and Hkv a divisor of {hq}"
        raise _wrong(op, "shape of k", (bk, hkv, t, dk), allowed)
    if k_pe is not None:
        if k_pe.shape[:3] != k.shape[:3] or more < 1 or k_pe.dtype not in FLOAT_DTYPES:
            found = (tuple(k_pe.shape), k_pe.dtype)
            allowed = f"(B, Hkv, T, dims) with {(bk, hkv, t)}, as k has, of a dtype that k may have"
            raise _wrong(op, "k_pe", found, allowed)
        _rows_contiguous(op, "k_pe", k_pe, more)
        _same_device(op, "k_pe", k_pe, q)
    if bv != bk or hv != hkv or tv != t:
        raise _wrong(op, "shape of v", tuple(v.shape), f"{(bk, hkv, t)} and Dv, as k has")
    if min(b, s, t, dk, dv) < 1 or t > MAX_KEYS:
        allowed = f"1 or more, T at most {MAX_KEYS}"
        raise _wrong(op, "sizes (B, S, T, D, Dv)", (b, s, t, d, dv), allowed)
    _rows_contiguous(op, "q", q, d)
    _rows_contiguous(op, "k", k, dk)
    _rows_contiguous(op, "v", v, dv)
    _same_device(op, "k", k, q)
    _same_device(op, "v", v, q)
    return (b, hq, s, dv), hkv, t


def _check_sink_logits(op: str, sink_logits: Tensor, q: Tensor) -> None:
    hq = q.shape[1]
    if sink_logits.shape != (hq,) or sink_logits.dtype not in FLOAT_DTYPES:
        found = (tuple(sink_logits.shape), sink_logits.dtype)
        allowed = f"shape (Hq,) = {(hq,)}, bfloat16, float16 or float32"
        raise _wrong(op, "sink_logits", found, allowed)
    _same_device(op, "sink_logits", sink_logits, q)


def _check_positions(op: str, positions: Tensor, q: Tensor, hkv: int) -> None:
    b, hq, s, _ = q.shape
    bp, hp, sp, slots = _rank4(op, "positions", positions)
    if positions.dtype != torch.int32:
        raise _wrong(op, "positions dtype", positions.dtype, "int32")
    if bp != b or sp != s or (hp != hkv and hp != hq) or slots < 1:
        allowed = f"(B, Hkv or Hq, S, K) = ({b}, {hkv} or {hq}, {s}, at least 1)"
        raise _wrong(op, "shape of positions", (bp, hp, sp, slots), allowed)
    _rows_contiguous(op, "positions", positions, slots)
    _same_device(op, "positions", positions, q)


def _check_mask(op: str, mask: Tensor, q: Tensor, t: int) -> None:
    b, hq, s, _ = q.shape
    if mask.dim() != 4:
        raise _wrong(op, "rank of mask", mask.dim(), "4")
    bm, hm, sm, tm = mask.shape
    if bm not in (1, b) or hm not in (1, hq) or sm not in (1, s) or tm != t:
        allowed = f"(B, Hq, S, T) = {(b, hq, s, t)}, any of the first three may be 1"
        raise _wrong(op, "shape of mask", (bm, hm, sm, tm), allowed)
    if mask.dtype not in (torch.bool, torch.uint8, *FLOAT_DTYPES):
        raise _wrong(op, "mask dtype", mask.dtype, "bool, uint8, bfloat16, float16, float32")
    _same_device(op, "mask", mask, q)


def _rank4(op: str, name: str, tensor: Tensor) -> torch.Size:
    shape = tensor.shape
    if len(shape) != 4:
        raise _wrong(op, f"rank of {name}", f"{len(shape)} (shape {tuple(shape)})", "4")
    return shape


def _rows_contiguous(op: str, name: str, tensor: Tensor, size: int) -> None:
    if size > 1 and tensor.stride(-1) != 1:
        raise _wrong(op, f"strides of {name}", tensor.stride(), "1 in the last dim, others free")


def _same_device(op: str, name: str, tensor: Tensor, other: Tensor, whose: str = "q") -> None:
    if tensor.device != other.device:
        raise _wrong(op, f"device of {name}", tensor.device, f"that of {whose}, {other.device}")


def _wrong(op: str, what: str, found: object, allowed: str) -> ValueError:
    return ValueError(f"{op}: {what} is {found}; allowed: {allowed}.")
