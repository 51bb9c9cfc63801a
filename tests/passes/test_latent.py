"""Keys and values expanded from a cached latent (MLA): attended to without being expanded.

Toys of one layer whose heads are linear maps of a cached latent, beside a part that all heads
share; each spelled in another way. The truth computes in fp64 from rows that it keeps itself: the
index is projected anew, positions come from `reference.select` with absorbed queries, and attention
reads keys and values that are expanded per head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loki_compile.kernels import reference
from loki_compile.kernels.ops import Budget
from loki_compile.passes.attention import Reason
from loki_compile.passes.calls import fake_value, writes_of
from loki_compile.passes.emit import insert_rows
from loki_compile.passes.latent import over_rows
from loki_compile.passes.plan import make_plan
from loki_compile.passes.policy import Choice
from loki_compile.passes.sites import find_sites
from loki_compile.pca_store.basis import BasisSet, random_basis
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.fingerprint import weights_fingerprint
from torch import Tensor, nn
from toy_capture import count_attention, count_calls, interpret, normal_graph
from toy_models import tiny_deepseek
from toy_options import EVERYTHING, FEW, MODES

from loki_compile import LokiConfig, calibrate, reports, stats
from loki_compile.indexes import indexes_of
from loki_compile.policies.low_rank import LOW_RANK

pytestmark = [pytest.mark.soak, pytest.mark.covers]

HIDDEN, HEADS, LATENT, SHARED, OWN, VALUE = 12, 3, 14, 4, 6, 5
SLOTS, FILLED, BATCH = 41, 17, 2
sdpa = F.scaled_dot_product_attention

FEW_DIMS = {**FEW, "rank": 6}


# --- writing the caches: (new latent, new shared part) (B,S,dims), both caches, position
#     -> all latents, all shared parts, the caches that the step returns


def index_copies(c, r, cc, cr, pos):
    cc.index_copy_(2, pos, c.unsqueeze(1))
    cr.index_copy_(2, pos, r.unsqueeze(1))
    return cc, cr, ()


def cats(c, r, cc, cr, pos):
    latents, shared = torch.cat([cc, c[:, None]], -2), torch.cat([cr, r[:, None]], -2)
    return latents, shared, (latents, shared)


def cats_3d(c, r, cc, cr, pos):
    latents, shared = torch.cat([cc, c], 1), torch.cat([cr, r], 1)
    return latents, shared, (latents, shared)


def slices_3d(c, r, cc, cr, pos):
    end = pos + c.shape[1]
    cc[:, pos:end] = c
    cr[:, pos:end] = r
    return cc[:, :end], cr[:, :end], ()


def latent_alone(c, r, cc, cr, pos):
    latents = torch.cat([cc, c], 1)
    return latents, None, (latents, cr)


def one_tensor(c, r, cc, cr, pos):
    """Rows (latent, shared part) in one cache."""
    cc.index_copy_(1, pos, torch.cat([c, r], -1))
    return cc[..., :LATENT], cc[..., LATENT:], ()


def one_tensor_shared_first(c, r, cc, cr, pos):
    rows = torch.cat([cc, torch.cat([r, c], -1)], 1)
    return rows[..., SHARED:], rows[..., :SHARED], (rows, cr)


def windows(c, r, cc, cr, pos):
    """Full windows: all rows move up by one, the newest come last."""
    for cache, new in ((cc, c), (cr, r)):
        moved = cache.roll(-1, dims=2)
        moved[:, :, -1:] = new.unsqueeze(1)
        cache.copy_(moved)
    return cc, cr, ()


def cropped(c, r, cc, cr, pos):
    latents, shared, _ = cats(c, r, cc, cr, pos)
    return latents, shared, (latents[:, :, -FILLED:], shared[:, :, -FILLED:])


# --- expanding: module, latents, shared parts -> keys (B,H,T,OWN+SHARED), values (B,H,T,VALUE)


def heads_of(x: Tensor) -> Tensor:
    """(B,1,T,n) or (B,T,n) as (B,H,T,n / H)."""
    return x.view(x.shape[0], x.shape[-2], HEADS, -1).transpose(1, 2)


def spread(shared: Tensor) -> Tensor:
    shared = shared if shared.ndim == 4 else shared.unsqueeze(1)
    return shared.expand(-1, HEADS, -1, -1)


def into_fresh_tensor(m, latents, shared):
    own, values = torch.split(heads_of(m.expand(latents)), [OWN, VALUE], dim=-1)
    keys = own.new_empty(*own.shape[:3], OWN + SHARED)
    keys[..., :OWN].copy_(own)
    keys[..., OWN:].copy_(spread(shared))
    return keys, values


def assigned(m, latents, shared):
    """Slices of a fresh tensor are assigned; the shared part is broadcast to the heads."""
    both = heads_of(m.expand(latents))
    keys = shared.new_empty(*both.shape[:3], OWN + SHARED)
    keys[:, :, :, :OWN] = both[..., :OWN]
    keys[:, :, :, OWN:] = shared.view(shared.shape[0], 1, -1, SHARED)
    return keys, both[..., OWN:]


def joined(m, latents, shared):
    own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), dim=-1), values


def joined_shared_first(m, latents, shared):
    own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    return torch.cat((spread(shared), own), dim=-1), values


def joined_before_transposing(m, latents, shared):
    both = m.expand(latents).view(latents.shape[0], -1, HEADS, OWN + VALUE)
    beside = shared.unsqueeze(2).expand(-1, -1, HEADS, -1)
    keys = torch.cat([both[..., :OWN], beside], -1)
    return keys.transpose(1, 2), both.narrow(-1, OWN, VALUE).transpose(1, 2)


def two_products(m, latents, shared):
    """All heads' keys by one product with a matrix, all heads' values by another."""
    weight = m.expand.weight.unflatten(0, (HEADS, -1))
    own = heads_of(latents @ m.of_keys)
    values = heads_of(torch.matmul(latents, m.of_values.t()))
    assert weight.shape[1] == OWN + VALUE
    return torch.cat((own, spread(shared)), -1), values


def without_shared(m, latents, shared):
    return heads_of(m.expand(latents)).split((OWN, VALUE), -1)


# --- what must not be touched


def with_bias(m, latents, shared):
    both = heads_of(F.linear(latents, m.expand.weight, m.bias))
    own, values = both.split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def with_named_bias(m, latents, shared):
    both = heads_of(F.linear(latents, m.expand.weight, bias=m.bias))
    own, values = both.split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def with_bias_of_position(m, latents, shared):
    tokens = torch.arange(latents.shape[-2]).view(-1, 1) * 0.1
    own, values = heads_of(m.expand(latents) + tokens).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def normed_latents(m, latents, shared):
    """The latent is cached before its norm."""
    own, values = heads_of(m.expand(F.rms_norm(latents, (LATENT,)))).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def squashed(m, latents, shared):
    own, values = heads_of(torch.tanh(m.expand(latents))).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def squashed_values(m, latents, shared):
    own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), torch.tanh(values)


def values_of_other_latents(m, latents, shared):
    own, _ = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    _, values = heads_of(m.expand(latents.flip(-1))).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def values_of_shared(m, latents, shared):
    own, _ = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), F.pad(spread(shared), (0, VALUE - SHARED))


def map_written(m, latents, shared):
    """The matrix is written into between keys and values."""
    weight = m.expand.weight * 1.0
    own, _ = heads_of(F.linear(latents, weight)).split((OWN, VALUE), -1)
    weight.mul_(0.5)
    _, values = heads_of(F.linear(latents, weight)).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def expansion_written(m, latents, shared):
    both = m.expand(latents)
    both[..., 0] += 1.0
    own, values = heads_of(both).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def keys_written(m, latents, shared):
    keys, values = into_fresh_tensor(m, latents, shared)
    keys[:, :, 3] = 0.5
    return keys, values


def keys_halved(m, latents, shared):
    keys, values = into_fresh_tensor(m, latents, shared)
    keys.mul_(0.5)
    return keys, values


def latents_written_behind(m, latents, shared):
    keys, values = joined(m, latents, shared)
    latents[:, :, 3] = 0.5
    return keys, values


def shared_rotated_when_read(m, latents, shared):
    turned = shared * torch.cos(torch.arange(shared.shape[-2]) * 0.3).view(-1, 1)
    return joined(m, latents, turned)


def shared_by_head(m, latents, shared):
    own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    signs = torch.tensor([1.0, -1.0, 1.0]).view(1, HEADS, 1, 1)
    return torch.cat((own, spread(shared) * signs), -1), values


def tokens_reversed(m, latents, shared):
    own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared.flip(-2))), -1), values


def features_before_heads(m, latents, shared):
    both = m.expand(latents).view(latents.shape[0], latents.shape[-2], -1, HEADS)
    own, values = both.permute(0, 3, 1, 2).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def heads_repeated(m, latents, shared):
    keys, values = joined(m, latents, shared)
    return keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)


def part_left_out(m, latents, shared):
    """One dim of the fresh tensor is nobody's."""
    own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    keys = own.new_zeros(*own.shape[:3], OWN + SHARED)
    keys[..., 1:OWN].copy_(own[..., 1:])
    keys[..., OWN:].copy_(spread(shared))
    return keys, values


def shared_elsewhere(c, r, cc, cr, pos):
    """The shared part of a token goes one slot further than its latent."""
    cc.index_copy_(2, pos, c.unsqueeze(1))
    cr.index_copy_(2, pos + 1, r.unsqueeze(1))
    return cc, cr, ()


def shared_accumulated(c, r, cc, cr, pos):
    cc.index_copy_(2, pos, c.unsqueeze(1))
    cr.index_add_(2, pos, r.unsqueeze(1))
    return cc, cr, ()


def one_wider_tensor(c, r, cc, cr, pos):
    """A row has a dim between latent and shared part that nobody reads."""
    cc.index_copy_(1, pos, torch.cat([c, r[..., :1], r], -1))
    return cc[..., :LATENT], cc[..., LATENT + 1 :], ()


# --- attention


def flash(q, keys, values, mask):
    return sdpa(q, keys, values, attn_mask=mask, scale=0.3)


def written_out(q, keys, values, mask):
    scores = torch.matmul(q, keys.transpose(2, 3)) * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, values)


# --- models that absorb the maps themselves: scores are the sum of two products


def absorbed(m, latents, shared):
    """Attention gets the module, the latents (B,T,dims) and the shared parts instead."""
    if latents.ndim == 4:
        latents, shared = latents[:, 0], shared[:, 0]
    return (m, latents, shared), None


def by_einsum(q, cached, _, mask):
    """As DeepSeek's reference code has it."""
    m, latents, shared = cached
    maps = m.expand.weight.unflatten(0, (HEADS, -1))
    q = q.transpose(1, 2)
    asked = torch.einsum("bshd,hdc->bshc", q[..., :OWN], maps[:, :OWN])
    scores = torch.einsum("bshc,btc->bsht", asked, latents)
    scores = (scores + torch.einsum("bshr,btr->bsht", q[..., OWN:], shared)) * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0, :, None], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).type_as(q)
    found = torch.einsum("bsht,btc->bshc", weights, latents)
    return torch.einsum("bshc,hdc->bshd", found, maps[:, OWN:]).transpose(1, 2)


def _asked(m, q):
    return torch.einsum(
        "bhsd,hdc->bhsc", q[..., :OWN], m.expand.weight.view(HEADS, -1, LATENT)[:, :OWN]
    )


def _weighted(scores, mask, m, latents):
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    found = torch.softmax(scores, -1) @ latents
    return found @ m.expand.weight.view(HEADS, -1, LATENT)[:, OWN:].mT


def by_matmul(q, cached, _, mask):
    """The shared part's product comes first; a dimension of one KV head."""
    m, latents, shared = cached[0], cached[1][:, None], cached[2][:, None]
    scores = q[..., OWN:] @ shared.transpose(-1, -2) + _asked(m, q) @ latents.transpose(-1, -2)
    return _weighted(scores * 0.3, mask, m, latents)


def with_other_values(q, cached, _, mask):
    m, latents, shared = cached[0], cached[1][:, None], cached[2][:, None]
    scores = q[..., OWN:] @ shared.transpose(-1, -2) + _asked(m, q) @ latents.transpose(-1, -2)
    return _weighted(scores * 0.3, mask, m, latents * 1.5)


def with_a_half(q, cached, _, mask):
    m, latents, shared = cached[0], cached[1][:, None], cached[2][:, None]
    scores = q[..., OWN:] @ shared.mT * 0.5 + _asked(m, q) @ latents.mT
    return _weighted(scores * 0.3, mask, m, latents)


def with_three_products(q, cached, _, mask):
    m, latents, shared = cached[0], cached[1][:, None], cached[2][:, None]
    scores = q[..., OWN:] @ shared.mT + _asked(m, q) @ latents.mT + q[..., :SHARED] @ shared.mT
    return _weighted(scores * 0.3, mask, m, latents)


def with_positions(q, cached, _, mask):
    """Relative positions: the second factor is no cache."""
    m, latents = cached[0], cached[1][:, None]
    at = torch.arange(latents.shape[2])[:, None].expand(-1, SHARED).sin().expand(BATCH, 1, -1, -1)
    scores = q[..., OWN:] @ at.mT + _asked(m, q) @ latents.mT
    return _weighted(scores * 0.3, mask, m, latents)


@dataclass(frozen=True)
class Form:
    """`caches` names the dimensions of both; `position` is "tensor" (S,) or "int". A `growing`
    cache is returned, a `window` is full from the start, others have masked slots to fill."""

    write: Callable[..., Any]
    expand: Callable[..., Any]
    attend: Callable[..., Tensor] = flash
    caches: str = "b1td"
    position: str = "tensor"
    growing: bool = False
    window: bool = False
    prefix: bool = False
    sizes: tuple[int, int] = (LATENT, SHARED)
    new_tokens: int = 1
    reason: Reason | None = None

    @property
    def name(self) -> str:
        parts = [self.write.__name__, self.expand.__name__, self.attend.__name__]
        return "-".join([*parts, *[f"{self.new_tokens}tokens"] * (self.new_tokens > 1)])

    def but(self, **changes: Any) -> Form:
        return dataclasses.replace(self, **changes)


_static = Form(index_copies, into_fresh_tensor)
_cat = Form(cats, joined, growing=True)
_one = Form(one_tensor, joined, caches="btd", sizes=(LATENT + SHARED, 1))

REWRITTEN = [
    _static,
    _static.but(attend=written_out),
    _static.but(new_tokens=3),
    _static.but(expand=assigned),
    _static.but(expand=joined_shared_first),
    _static.but(expand=two_products),
    _cat,
    _cat.but(expand=into_fresh_tensor),
    _cat.but(attend=written_out, new_tokens=2),
    _cat.but(write=cropped),
    _cat.but(write=cats_3d, caches="btd", expand=joined_before_transposing),
    _cat.but(write=latent_alone, caches="btd", expand=without_shared),
    Form(slices_3d, assigned, caches="btd", position="int", prefix=True),
    _one,
    _one.but(expand=assigned, new_tokens=2),
    _cat.but(write=one_tensor_shared_first, caches="btd", sizes=(LATENT + SHARED, 1)),
    Form(windows, joined, window=True),
    Form(slices_3d, absorbed, by_einsum, caches="btd", position="int", prefix=True),
    _static.but(expand=absorbed, attend=by_einsum, new_tokens=2),
    _static.but(expand=absorbed, attend=by_matmul),
    _cat.but(expand=absorbed, attend=by_matmul),
    _cat.but(write=cats_3d, caches="btd", expand=absorbed, attend=by_einsum),
]

_latent = {"reason": Reason.LATENT}
UNTOUCHED = [
    _static.but(expand=with_bias, **_latent),
    _cat.but(expand=with_named_bias, **_latent),
    _static.but(expand=normed_latents, reason=Reason.NO_CACHE),
    _static.but(expand=squashed_values, **_latent),
    _cat.but(expand=squashed_values, **_latent),
    _static.but(expand=shared_by_head, **_latent),
    _static.but(expand=with_bias_of_position, **_latent),
    _static.but(expand=squashed, **_latent),
    _static.but(expand=values_of_other_latents, **_latent),
    _static.but(expand=values_of_shared, **_latent),
    _static.but(expand=map_written, **_latent),
    _static.but(expand=expansion_written, **_latent),
    _static.but(expand=keys_written, **_latent),
    _static.but(expand=keys_halved, **_latent),
    _static.but(expand=latents_written_behind, **_latent),
    _static.but(expand=shared_rotated_when_read, **_latent),
    _static.but(expand=tokens_reversed, **_latent),
    _static.but(expand=features_before_heads, **_latent),
    _static.but(expand=part_left_out, **_latent),
    _static.but(write=shared_elsewhere, **_latent),
    _static.but(write=shared_accumulated, **_latent),
    Form(one_wider_tensor, joined, caches="btd", sizes=(LATENT + SHARED + 1, 1), **_latent),
    _static.but(write=shared_elsewhere, expand=absorbed, attend=by_einsum, **_latent),
    _static.but(expand=absorbed, attend=with_positions, **_latent),
    _static.but(expand=absorbed, attend=with_other_values, reason=Reason.SOFTMAX),
    _static.but(expand=absorbed, attend=with_a_half, reason=Reason.SOFTMAX),
    _static.but(expand=absorbed, attend=with_three_products, reason=Reason.SOFTMAX),
]


class LatentDecoder(nn.Module):
    """One layer, (B,S,HIDDEN) -> (B,S,HIDDEN); `attend` and the caches as its form has them."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.q = nn.Linear(HIDDEN, HEADS * (OWN + SHARED))
        self.down = nn.Linear(HIDDEN, LATENT + SHARED)
        self.expand = nn.Linear(LATENT, HEADS * (OWN + VALUE), bias=False)
        self.of_keys = nn.Parameter(self.expand.weight.new_empty(LATENT, HEADS * OWN))
        self.of_values = nn.Parameter(self.expand.weight.new_empty(HEADS * VALUE, LATENT))
        self.bias = nn.Parameter(torch.randn(HEADS * (OWN + VALUE)))
        self.out = nn.Linear(HEADS * VALUE, HIDDEN)
        with torch.no_grad():
            for layer in (self.q, self.down, self.expand, self.out):
                layer.weight.mul_(3)  # peaked attention: a key too many or too few shows
            both = self.expand.weight.unflatten(0, (HEADS, -1))
            self.of_keys.copy_(both[:, :OWN].flatten(0, 1).t())
            self.of_values.copy_(both[:, OWN:].flatten(0, 1))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B,H,S,D), new latents and shared parts (B,S,dims)."""
        q = self.q(x).view(x.shape[0], x.shape[1], HEADS, -1)
        c, r = self.down(x).split((LATENT, SHARED), -1)
        return q.transpose(1, 2), F.rms_norm(c, (LATENT,)), torch.tanh(r)

    def forward(self, x, cc, cr, pos, mask):
        q, c, r = self.parts(x)
        latents, shared, state = self.form.write(c, r, cc, cr, pos)
        if shared is None:
            q = q[..., :OWN]
        keys, values = self.form.expand(self, latents, shared)
        out = self.form.attend(q, keys, values, mask)
        out = x + self.out(out.transpose(1, 2).flatten(2))
        return (out, *state)


@dataclass
class Conversation:
    """The caches of one conversation, and the rows (B, filled, LATENT + SHARED) in them, fp64."""

    form: Form
    caches: list[Tensor]
    rows: Tensor
    filled: int = FILLED

    @classmethod
    def start(cls, form: Form, dtype: torch.dtype = torch.float32) -> Conversation:
        slots = FILLED if form.growing or form.window else SLOTS
        caches = []
        for dims in form.sizes:
            shape = (BATCH, 1, slots, dims) if form.caches == "b1td" else (BATCH, slots, dims)
            caches.append(torch.randn(shape).to(dtype))
        started = cls(form, caches, torch.empty(0))
        started.rows = started.read(FILLED)
        return started

    def read(self, filled: int) -> Tensor:
        first, second = (x.squeeze(1) if x.ndim == 4 else x for x in self.caches)
        if self.form.write is one_tensor_shared_first:
            rows = torch.cat([first[..., SHARED:], first[..., :SHARED]], -1)
        elif self.form.sizes[0] > LATENT:
            rows = first
        elif self.form.write is latent_alone:
            rows = F.pad(first, (0, SHARED))
        else:
            rows = torch.cat([first, second], -1)
        return rows[:, :filled].double()

    def fork(self) -> Conversation:
        return dataclasses.replace(self, caches=[x.clone() for x in self.caches])

    def step(self, module: Callable[..., Any], x: Tensor) -> Tensor:
        form, new = self.form, x.shape[1]
        pos: Any = self.filled if form.position == "int" else self.filled + torch.arange(new)
        slots = self.filled + new if form.growing or form.prefix else SLOTS
        if form.window:
            slots = FILLED
        mask = None
        if slots > self.filled + new or new > 1:
            mask = torch.arange(slots) <= self.filled + torch.arange(new)[:, None]
            mask = mask[None, None]
        out, *state = module(x, *self.caches, pos, mask)
        self.caches = state or self.caches
        kept = FILLED if form.window or form.write is cropped else None
        self.filled = kept or self.filled + new
        self.rows = self.read(self.filled)
        return out


def definition(
    module: LatentDecoder, rows: Tensor, x: Tensor, config: LokiConfig, basis: BasisSet | None
) -> Tensor:
    """What the layer gives for x (B,S,HIDDEN) when `rows` are cached before, by the reference.

    basis None reads all keys. In fp64, from a copy of the module that is fp64.
    """
    module = module.double()
    q, c, r = module.parts(x.double())
    with_shared = module.form.expand is not without_shared
    new = torch.cat([c, r], -1)
    rows = torch.cat([rows, new], 1)
    if module.form.window:
        rows = rows[:, new.shape[1] :]
    maps = module.expand.weight.unflatten(0, (HEADS, -1))
    own = torch.einsum("btc,hdc->bhtd", rows[..., :LATENT], maps[:, :OWN])
    values = torch.einsum("btc,hdc->bhtd", rows[..., :LATENT], maps[:, OWN:])
    shared = rows[:, None, :, LATENT:].expand(-1, HEADS, -1, -1)
    keys = torch.cat([own, shared], -1)
    shared_first = module.form.expand is joined_shared_first
    if shared_first:
        keys = torch.cat([shared, own], -1)
    if not with_shared:
        q, keys, rows = q[..., :OWN], own, rows[..., :LATENT]
    slots, new_tokens = rows.shape[1], x.shape[1]
    mask = torch.arange(slots) <= slots - new_tokens + torch.arange(new_tokens)[:, None]
    positions = torch.arange(slots).expand(x.shape[0], 1, new_tokens, -1)
    if basis is not None:
        at = SHARED if shared_first else 0
        absorbed = torch.einsum("bhsd,hdc->bhsc", q[..., at : at + OWN], maps[:, :OWN])
        rest = q[..., :SHARED] if shared_first else q[..., OWN:]
        absorbed = torch.cat([absorbed, rest], -1)
        if module.form.write is one_tensor_shared_first:  # the basis is for rows as they lie
            absorbed, rows = (
                torch.cat([y[..., LATENT:], y[..., :LATENT]], -1) for y in (absorbed, rows)
            )
        (only,) = basis.bases
        query_basis, key_basis = only.truncate(only.rank_for(config.rank))
        index = rows[:, None] @ key_basis.double()
        budget = config.budget
        positions = reference.select(
            absorbed, query_basis.double(), index, None, mask[None, None], None, scale=0.3,
            top_k=budget.top_k, keep_q16=budget.keep_q16, sink=budget.sink,
            recent=budget.recent, min_keys=budget.min_keys, per_head=config.share == "head",
        )  # fmt: skip
    positions = positions.expand(-1, HEADS, -1, -1).int().contiguous()
    scale = 0.3
    out = reference.attend(q, keys, values, positions, mask[None, None], scale=scale)
    return x.double() + module.out(out.transpose(1, 2).flatten(2))


def basis_for(module: LatentDecoder, seed: int = 7) -> BasisSet:
    dims = LATENT if module.form.expand is without_shared else LATENT + SHARED
    weights = weights_fingerprint(module.down.weight)
    return BasisSet((random_basis(1, dims, seed=seed, weights=weights, layer="toy"),))


def names(forms: list[Form]) -> list[str]:
    return [form.name for form in forms]


@pytest.fixture(autouse=True)
def interpreted(use_engine):
    return interpret(use_engine)


class Pair:
    """A compiled toy, and what it must give by definition."""

    def __init__(self, form: Form, options: dict, **more: Any) -> None:
        self.form = form
        self.module = LatentDecoder(form).eval()
        self.basis = basis_for(self.module)
        options = {"basis": self.basis, **options, **more}
        self.fast = torch.compile(self.module, backend="loki", options=options)
        self.config = LokiConfig.from_options(options)
        self.few = options["top_k"] != 1.0

    def start(self) -> Conversation:
        return Conversation.start(self.form)

    def step(self, here: Conversation, steps: int = 1) -> None:
        for _ in range(steps):
            x = torch.randn(BATCH, self.form.new_tokens, HIDDEN)
            rows = here.rows
            out = here.step(self.fast, x)
            expected = definition(
                copied(self.module), rows, x, self.config, self.basis if self.few else None
            )
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


def copied(module: LatentDecoder) -> LatentDecoder:
    twin = LatentDecoder(module.form)
    twin.load_state_dict(module.state_dict())
    return twin.eval()


# --- what becomes of the graph


@pytest.mark.parametrize("options", [EVERYTHING, FEW_DIMS], ids=["everything", "few"])
@pytest.mark.parametrize("form", REWRITTEN, ids=names(REWRITTEN))
def test_attention_over_the_cached_rows_is_attention_over_what_they_expand_to(form, options):
    with torch.no_grad():
        pair = Pair(form, options)
        pair.step(pair.start(), steps=6)
    assert stats()["sparse_steps"] == 6 and stats()["rebuilds"] == 1
    outcomes = {(s.outcome, s.query_heads, s.kv_heads) for g in reports() for s in g.sites}
    assert outcomes == {("sparse", HEADS, 1)}


@pytest.mark.parametrize("form", [_static, _cat], ids=names([_static, _cat]))
def test_heads_may_choose_for_themselves(form):
    with torch.no_grad():
        pair = Pair(form, FEW_DIMS, share="head")
        pair.step(pair.start(), steps=4)
    assert stats()["sparse_steps"] == 4


@pytest.mark.parametrize("form", [_static, _cat], ids=names([_static, _cat]))
def test_an_int8_index_with_the_whole_budget_is_dense_attention(form):
    with torch.no_grad():
        pair = Pair(form, EVERYTHING, index_dtype="int8")
        pair.step(pair.start(), steps=4)
    assert stats()["sparse_steps"] == 4


@pytest.mark.parametrize("form", UNTOUCHED, ids=names(UNTOUCHED))
def test_what_is_not_that_form_stays_bit_for_bit(form):
    module = LatentDecoder(form).eval()
    fast = torch.compile(module, backend="loki", options={**FEW_DIMS, "pack_gqa": False})
    here = Conversation.start(form)
    there = here.fork()
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(BATCH, form.new_tokens, HIDDEN)
            torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=0)
    assert stats()["sparse_steps"] == 0
    reasons = {site.reason for report in reports() for site in report.sites}
    begin = form.reason.value.partition("{")[0]
    assert reasons and all(reason.startswith(begin) for reason in reasons), reasons


@pytest.mark.parametrize("by_flag", [False, True])
def test_repeated_heads_are_left_dense_with_the_reason(by_flag):
    class Repeated(LatentDecoder):
        def forward(self, x, cc, cr, pos, mask):
            q, c, r = self.parts(x)
            latents, shared, _ = self.form.write(c, r, cc, cr, pos)
            q = q.repeat_interleave(2, 1)
            if by_flag:
                keys, values = joined(self, latents, shared)
                return (sdpa(q, keys, values, attn_mask=mask, enable_gqa=True).sum(1),)
            keys, values = heads_repeated(self, latents, shared)
            return (flash(q, keys, values, mask).sum(1),)

    form = _static
    module = Repeated(form).eval()
    fast = torch.compile(module, backend="loki", options=FEW_DIMS)
    with torch.no_grad():
        Conversation.start(form).step(fast, torch.randn(BATCH, 1, HIDDEN))
    (site,) = reports()[0].sites
    assert site.outcome == "dense" and "repeated" in site.reason


@pytest.mark.parametrize(
    "form", [_static, _cat.but(expand=into_fresh_tensor)], ids=["static", "growing"]
)
def test_nothing_is_expanded_for_all_tokens(form, interpreted):
    with torch.no_grad():
        pair = Pair(form, FEW_DIMS)
        pair.step(pair.start(), steps=2)
    tokens = FILLED + 2 if form.growing else SLOTS
    for gm in interpreted.graphs:
        assert count_calls(gm.graph, "loki.attend") == 1 and not count_attention(gm.graph)
        assert not count_calls(gm.graph, "new_empty") and not count_calls(gm.graph, "copy_")
        longest = [
            n for n in gm.graph.nodes
            if n.op != "placeholder" and isinstance(n.meta.get("example_value"), torch.Tensor)
            and n.meta["example_value"].numel() > BATCH * tokens * (LATENT + SHARED)
        ]  # fmt: skip
        assert not longest


def test_a_fresh_tensor_that_something_else_reads_is_still_filled():
    class Tells(LatentDecoder):
        def forward(self, x, cc, cr, pos, mask):
            q, c, r = self.parts(x)
            latents, shared, _ = self.form.write(c, r, cc, cr, pos)
            keys, values = self.form.expand(self, latents, shared)
            return flash(q, keys, values, mask), keys.sum((1, 2, 3))

    module = Tells(_static).eval()
    fast = torch.compile(module, backend="loki", options=EVERYTHING)
    here = Conversation.start(_static)
    there = here.fork()
    x = torch.randn(BATCH, 1, HIDDEN)
    pos = FILLED + torch.arange(1)
    mask = (torch.arange(SLOTS) <= FILLED)[None, None, None]
    with torch.no_grad():
        found, expected = fast(x, *here.caches, pos, mask), module(x, *there.caches, pos, mask)
    assert stats()["sparse_steps"] == 1
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [_static, _cat, _one], ids=names([_static, _cat, _one]))
def test_half_precision_is_as_near_to_fp64_as_eager_is(form, dtype):
    config = LokiConfig.from_options(EVERYTHING)
    ours, theirs = 0.0, 0.0
    with torch.no_grad():
        for _ in range(4):
            module = LatentDecoder(form).eval().to(dtype)
            fast = torch.compile(module, backend="loki", options=EVERYTHING)
            here = Conversation.start(form, dtype)
            there = here.fork()
            for _ in range(4):
                x, rows = torch.randn(BATCH, 1, HIDDEN).to(dtype), here.rows
                truth = definition(copied(module), rows, x, config, None)
                ours = max(ours, float((here.step(fast, x) - truth).abs().max()))
                theirs = max(theirs, float((there.step(module, x) - truth).abs().max()))
    assert stats()["sparse_steps"] == 16
    assert ours <= 2 * theirs, (ours, theirs)


# --- whose index

BOTH = pytest.mark.parametrize(
    "form", [_static, _cat, _one], ids=["static", "growing", "one_tensor"]
)


@BOTH
@MODES
def test_one_rebuild_then_the_index_follows(form, mode):
    with mode():
        pair = Pair(form, FEW_DIMS)
        pair.step(pair.start(), steps=8)
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 8


@BOTH
@MODES
def test_an_eager_step_between_rebuilds_once(form, mode):
    with mode():
        pair = Pair(form, FEW_DIMS)
        here = pair.start()
        pair.step(here, steps=3)
        here.step(pair.module, torch.randn(BATCH, 1, HIDDEN))
        pair.step(here, steps=3)
    assert stats()["rebuilds"] == 2 and stats()["sparse_steps"] == 6


@pytest.mark.parametrize("form", [_static, _cat], ids=["static", "growing"])
@pytest.mark.parametrize("which", [0, 1], ids=["latents", "shared parts"])
def test_an_edit_of_either_cache_rebuilds_once(form, which):
    with torch.no_grad():
        pair = Pair(form, FEW_DIMS)
        here = pair.start()
        pair.step(here, steps=2)
        here.caches[which][..., 7, :] = 3.0
        here.rows = here.read(here.filled)
        pair.step(here, steps=3)
    assert stats()["rebuilds"] == 2 and stats()["sparse_steps"] == 5


@pytest.mark.parametrize("form", [_static, _cat], ids=["static", "growing"])
@pytest.mark.parametrize("which", [0, 1], ids=["latents", "shared parts"])
@MODES
def test_a_new_tensor_for_either_cache_rebuilds_once(form, which, mode):
    with mode():
        pair = Pair(form, FEW_DIMS)
        here = pair.start()
        pair.step(here, steps=2)
        here.caches[which] = here.caches[which].flip(0).contiguous()
        here.rows = here.read(here.filled)
        pair.step(here, steps=3)
    assert stats()["rebuilds"] == 2 and stats()["sparse_steps"] == 5


@BOTH
def test_a_crop_keeps_the_index_of_what_is_left_where_nobody_wrote(form):
    with torch.no_grad():
        pair = Pair(form, FEW_DIMS)
        here = pair.start()
        pair.step(here, steps=3)
        here.filled -= 2
        if form.growing:
            here.caches = [x[..., :-2, :] for x in here.caches]
        else:  # rows behind the end are written again; nothing else changes
            here.caches[0][..., here.filled :, :] = 9.0
        here.rows = here.read(here.filled)
        pair.step(here, steps=3)
    assert stats()["rebuilds"] == (1 if form.growing else 2) and stats()["sparse_steps"] == 6


def test_the_index_is_the_projection_of_both_caches():
    with torch.no_grad():
        for form in (_static, Form(windows, joined, window=True), _cat.but(write=cropped)):
            pair = Pair(form, FEW_DIMS)
            here = pair.start()
            pair.step(here, steps=5)
            index, *others = indexes_of(*here.caches)
            assert index.valid and not others
            rows = torch.cat(here.caches, -1) @ index.basis.key.squeeze(-3)
            torch.testing.assert_close(index.tensors[0], rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "form", [_static, _cat.but(expand=joined_shared_first)], ids=["static", "growing"]
)
def test_a_basis_is_fitted_from_both_caches_for_what_heads_read_of_them(form):
    """Dims of the latent that vary most are read least: PCA of the rows would keep those."""
    with torch.no_grad():
        module = LatentDecoder(form).eval()
        module.expand.weight.mul_(torch.logspace(-2, 0, LATENT))
        fast = torch.compile(module, backend="loki", options={**FEW_DIMS, "recent": 1})
        here = Conversation.start(form)
        here.caches[0].mul_(torch.logspace(1, 0, LATENT))
        rows = here.rows = here.read(FILLED)
        here.step(fast, torch.randn(BATCH, 1, HIDDEN))
    assert stats()["fitted_bases"] == 1 and stats()["sparse_steps"] == 1
    (index,) = indexes_of(*here.caches)
    assert index.basis.key.shape == (BATCH, 1, LATENT + SHARED, 6)
    moments = KeyCovariance(1, LATENT + SHARED)
    rows = rows[:1]  # each sequence has its own
    moments.update(rows[:, None])
    own = module.expand.weight.detach().double().unflatten(0, (HEADS, -1))[:, :OWN].flatten(0, 1)
    shared = torch.eye(SHARED, dtype=torch.float64).repeat(HEADS, 1)
    queries = torch.block_diag(own, shared)
    centred = rows.flatten(0, 1) - rows.flatten(0, 1).mean(0)

    def error(query, key):
        query, key = query[0].double(), key[0].double()
        return (queries @ centred.T - queries @ query @ (centred @ key).T).square().sum()

    assert error(index.basis.query[0], index.basis.key[0]) < 0.5 * error(*moments.pca().truncate(6))


# --- calibration


@pytest.mark.parametrize("kind", ["pca", "attention"])
def test_calibration_sees_the_rows_that_decoding_ranks(kind):
    from transformers import DynamicCache

    model = tiny_deepseek()
    texts = [torch.randint(1, 64, (2, 40)) for _ in range(2)]
    rows: list[list[Tensor]] = [[], []]
    for ids in texts:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for layer, held in enumerate(cache.layers):
            rows[layer].append(torch.cat([held.keys, held.values], -1).flatten(0, 2))
    bases = calibrate(model, texts, kind=kind, rank=FEW_DIMS["rank"])
    assert len(bases.bases) == 2
    for basis, seen in zip(bases.bases, rows, strict=True):
        assert (basis.num_kv_heads, basis.head_dim) == (1, LATENT + SHARED)
        if kind == "pca":
            seen = torch.cat(seen).double()
            first = basis.key[0, :, 0].double()
            most = torch.linalg.eigvalsh(seen.T.cov(correction=0))[-1]
            found = (seen @ first).var(correction=0) / first.square().sum()
            torch.testing.assert_close(found, most, rtol=1e-4, atol=0)
    torch._dynamo.reset()
    step = torch.compile(model, backend="loki", options={**FEW_DIMS, "basis": bases})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(texts[0], past_key_values=cache)
        step(texts[0][:, :1], past_key_values=cache)
    used = {site.basis for report in reports() for site in report.sites}
    assert used == {f"{kind}, 160 tokens"} and stats()["fitted_bases"] == 0
    assert stats()["sparse_steps"] == 1


@pytest.mark.parametrize("attend", [by_einsum, by_matmul])
def test_calibration_sees_whole_rows_also_where_the_model_absorbs_the_maps(attend):
    form = _cat.but(expand=absorbed, attend=attend, new_tokens=11)
    module = LatentDecoder(form).eval()
    caches = Conversation.start(form).caches
    mask = torch.ones(11, FILLED + 11, dtype=torch.bool).tril(FILLED)[None, None]
    graph = normal_graph(module, torch.randn(BATCH, 11, HIDDEN), *caches, None, mask).graph
    ((site,), _) = find_sites(graph, max_query_tokens=None)
    assert over_rows(site, writes_of(graph)) is site
    assert (site.head_dim, site.value_dim) == (LATENT + SHARED, LATENT)
    query, rows = (fake_value(node).shape for node in insert_rows(graph, site))
    assert query == (BATCH, HEADS, 11, LATENT + SHARED)
    assert rows == (BATCH, 1, FILLED + 11, LATENT + SHARED)


@pytest.mark.parametrize("scales, found", [((1, 1), 1), ((0.5, 1), 0), ((1, 0.5), 0)])
def test_a_scale_of_one_of_two_products_is_not_that_of_both(scales, found):
    """One head, folded into the batch, whose queries are scaled behind that."""

    def attends(q, q_rest, latents, shared):
        q, q_rest, latents, shared = (x.flatten(0, 1) for x in (q, q_rest, latents, shared))
        q, q_rest = (x if n == 1 else x * n for x, n in zip((q, q_rest), scales, strict=True))
        scores = q @ latents.transpose(1, 2) + q_rest @ shared.transpose(1, 2)
        return torch.softmax(scores * 0.3, -1) @ latents

    shapes = [(2, 1, 1, LATENT), (2, 1, 1, SHARED), (2, 1, 9, LATENT), (2, 1, 9, SHARED)]
    sites, skipped = find_sites(normal_graph(attends, *map(torch.randn, shapes)).graph)
    assert len(sites) == found and len(skipped) == 1 - found


def test_a_named_basis_without_the_rows_is_fitted_instead_of_refused():
    other = BasisSet((random_basis(2, 10, seed=0, weights="0123456789abcdef", layer="other"),))
    module = LatentDecoder(_static).eval()
    fast = torch.compile(module, backend="loki", options={**FEW_DIMS, "basis": other})
    with torch.no_grad():
        Conversation.start(_static).step(fast, torch.randn(BATCH, 1, HIDDEN))
    assert stats()["fitted_bases"] == 1 and stats()["sparse_steps"] == 1


# --- analysis alone


def test_the_maps_of_the_heads_are_found_in_the_weight():
    module = LatentDecoder(_static).eval()
    here = Conversation.start(_static)
    mask = (torch.arange(SLOTS) <= FILLED)[None, None, None]
    gm = normal_graph(
        module, torch.randn(BATCH, 1, HIDDEN), *here.caches, FILLED + torch.arange(1), mask
    )
    sites, skipped = find_sites(gm.graph)
    budget = Budget(None, 1 << 15, 1, 1, 0)
    choices = [Choice(LOW_RANK, budget)] * len(sites)
    plan = make_plan(sites, skipped, policy=lambda sites: choices, layers="all")
    (sparse,) = plan.sparse
    latent = sparse.site.latent
    assert (latent.keys.start, latent.keys.block, latent.keys.inside) == (0, OWN + VALUE, 0)
    assert (latent.values.start, latent.values.block, latent.values.inside) == (
        0, OWN + VALUE, OWN,
    )  # fmt: skip
    assert (sparse.site.head_dim, sparse.site.value_dim) == (LATENT + SHARED, LATENT)
    assert sparse.site.kv_heads == 1 and sparse.site.group == HEADS
    assert math.isclose(sparse.site.scale, 0.3)
    assert plan.caches[0].k_pe is not None


# --- spellings that nobody writes on purpose: right in every case, and rewritten or dense as listed


def from_both(take: Callable[[Tensor], Tensor], share: Callable[[Tensor], Tensor] = spread):
    """Heads of keys and values (B,H,T,OWN+VALUE) as `take` has them of the map's result."""

    def expand(m, latents, shared):
        own, values = take(m.expand(latents)).split((OWN, VALUE), -1)
        return torch.cat((own, share(shared)), -1), values

    return expand


def from_own(change: Callable[[Tensor], Tensor]):
    """Keys (B,H,T,OWN) and the shared part are joined behind some change of the keys."""

    def expand(m, latents, shared):
        both = heads_of(m.expand(latents))
        return torch.cat((change(both), spread(shared)), -1), both[..., OWN:]

    return expand


def split_along_the_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """A split names no dimension where it is the first."""
    own, values = heads_of(x).movedim(-1, 0).split((OWN, VALUE))
    return own.movedim(0, -1), values.movedim(0, -1)


def from_parts(take: Callable[[Tensor], tuple[Tensor, Tensor]]):
    def expand(m, latents, shared):
        own, values = take(m.expand(latents))
        return torch.cat((own, spread(shared)), -1), values

    return expand


def filled_by(fill: Callable[[Tensor, Tensor], None]):
    """`fill` puts the heads' own keys into a fresh tensor of keys."""

    def expand(m, latents, shared):
        own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
        keys = own.new_empty(*own.shape[:3], OWN + SHARED)
        fill(keys, own)
        keys[..., OWN:].copy_(spread(shared))
        return keys, values

    return expand


def filled_twice(keys, own):
    keys[..., :OWN].copy_(own * 2)
    keys[..., :OWN].copy_(own)


def filled_transposed(keys, own):
    keys.transpose(1, 2)[..., :OWN].copy_(own.transpose(1, 2))


def filled_with_a_cast(keys, own):
    keys[..., :OWN].copy_(own.double())


def folded_and_back(x: Tensor) -> Tensor:
    return heads_of(x.reshape(-1, x.shape[-1]).view(x.shape[0], -1, x.shape[-1]))


def tokens_split_and_back(x: Tensor) -> Tensor:
    half = x.shape[-2] // 2
    return heads_of(x.view(x.shape[0], 2, half, x.shape[-1]).flatten(1, 2))


def last_dim_left_out(m, latents, shared):
    """The last dim of the fresh tensor is nobody's."""
    own, values = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    keys = own.new_zeros(*own.shape[:3], OWN + SHARED)
    keys[..., :OWN].copy_(own)
    keys[..., OWN:-1].copy_(spread(shared)[..., :-1])
    return keys, values


def in_five_dimensions(m, latents, shared):
    own, values = heads_of(m.expand(latents[:, None])).split((OWN, VALUE), -1)
    return torch.cat((own, spread(shared)), -1), values


def latents_split_and_back(m, latents, shared):
    rows = latents.view(latents.shape[0], 2, -1, LATENT).flatten(1, 2)
    return joined(m, rows, shared)


def heads_and_dims_mixed(x: Tensor) -> Tensor:
    x = x.view(x.shape[0], x.shape[-2], HEADS, OWN + VALUE)
    return x.view(x.shape[0], x.shape[1], OWN + VALUE, HEADS).permute(0, 3, 1, 2)


def values_across_blocks(m, latents, shared):
    """Blocks of ten rows from the third on; the values are the later half of each."""
    own, _ = heads_of(m.expand(latents)).split((OWN, VALUE), -1)
    values = heads_of(m.expand(latents)[..., 3:])[..., VALUE:]
    return torch.cat((own, spread(shared)), -1), values


def one_key_for_all_heads(m, latents, shared):
    both = m.expand(latents).reshape(latents.shape[0], 1, -1, HEADS * (OWN + VALUE))
    own = both[..., :OWN].expand(-1, HEADS, -1, -1)
    return torch.cat((own, spread(shared)), -1), heads_of(both)[..., OWN:]


def shared_by_a_new_dimension(m, latents, shared):
    return joined(m, latents, shared[:, None])


def one_number_shared(m, latents, shared):
    return joined(m, latents, shared[..., :1].expand(*shared.shape[:-1], SHARED))


def one_tensor_latent_alone(c, r, cc, cr, pos):
    latents, _, state = one_tensor(c, r, cc, cr, pos)
    return latents, None, state


def one_tensor_accumulated(c, r, cc, cr, pos):
    cc.index_add_(1, pos, torch.cat([c, r], -1))
    return cc[..., :LATENT], cc[..., LATENT:], ()


def latents_accumulated(c, r, cc, cr, pos):
    cc.index_add_(2, pos, c.unsqueeze(1))
    cr.index_copy_(2, pos, r.unsqueeze(1))
    return cc, cr, ()


def shared_written_twice(c, r, cc, cr, pos):
    cr.index_copy_(2, pos, r.unsqueeze(1) * 2)
    return index_copies(c, r, cc, cr, pos)


def shared_assigned(c, r, cc, cr, pos):
    cc.index_copy_(2, pos, c.unsqueeze(1))
    cr[:, :, pos] = r.unsqueeze(1)
    return cc, cr, ()


def shared_through_a_view(c, r, cc, cr, pos):
    cc.index_copy_(2, pos, c.unsqueeze(1))
    cr[:, 0].index_copy_(1, pos, r)
    return cc, cr, ()


def windows_of(shift: int, last: slice, roll: bool = True):
    """Full windows, of which that of the shared part moves in another way."""

    def write(c, r, cc, cr, pos):
        moved = cc.roll(-1, dims=2)
        moved[:, :, -1:] = c.unsqueeze(1)
        cc.copy_(moved)
        moved = cr.roll(shift, dims=2) if roll else cr
        moved[:, :, last] = r.unsqueeze(1)
        if roll:
            cr.copy_(moved)
        return cc, cr, ()

    return write


_windows = Form(windows, joined, window=True)
ODD = {
    # The way from the linear map to the keys.
    "squeezed": _static.but(expand=from_both(lambda x: heads_of(x.squeeze(1)))),
    "the one head selected": _static.but(expand=from_both(lambda x: heads_of(x.select(1, 0)))),
    "the one head indexed": _static.but(expand=from_both(lambda x: heads_of(x[:, 0]))),
    "squeezed wherever it can be": _static.but(
        expand=from_both(lambda x: heads_of(x.squeeze()))),
    "the one head selected from the end": _static.but(
        expand=from_both(lambda x: heads_of(x.select(1, -1)))),
    "in five dimensions": _static.but(expand=in_five_dimensions, **_latent),
    "last dim left out": _static.but(expand=last_dim_left_out, **_latent),
    "folded and back, growing": _cat.but(expand=from_both(folded_and_back)),
    "folded and back": _static.but(expand=from_both(folded_and_back)),
    "a new dimension by None": _one.but(expand=shared_by_a_new_dimension),
    "split along the first dimension": _static.but(expand=from_parts(split_along_the_first)),
    "copied": _static.but(expand=from_own(lambda x: x[..., :OWN].clone().contiguous())),
    "indexed from the end": _static.but(expand=from_own(lambda x: x[..., : -VALUE])),
    "narrowed from the end": _static.but(
        expand=from_own(lambda x: x.narrow(-1, -OWN - VALUE, OWN))),
    "dims by a list": _static.but(
        expand=from_own(lambda x: x[..., torch.arange(OWN)]), **_latent),
    "every other dim": _static.but(
        expand=from_own(lambda x: x[..., ::2]), **_latent),
    "tokens split and back": _cat.but(expand=from_both(tokens_split_and_back), **_latent),
    "latents split and back": _cat.but(
        write=cats_3d, caches="btd", expand=latents_split_and_back, reason=Reason.LATENT),
    "heads and dims mixed": _static.but(expand=from_both(heads_and_dims_mixed), **_latent),
    "values across blocks": _static.but(expand=values_across_blocks, **_latent),
    "one key for all heads": _static.but(expand=one_key_for_all_heads, **_latent),
    "one number shared": _static.but(expand=one_number_shared, **_latent),
    # What a fresh tensor is filled with.
    "filled twice": _static.but(expand=filled_by(filled_twice), **_latent),
    "filled transposed": _static.but(expand=filled_by(filled_transposed), **_latent),
    "filled with a cast": _static.but(expand=filled_by(filled_with_a_cast), **_latent),
    # Caches, and two that are not written alike.
    "rows that hold more": _one.but(
        write=one_tensor_latent_alone, expand=without_shared, **_latent),
    "rows accumulated": _one.but(write=one_tensor_accumulated, **_latent),
    "latents accumulated": _static.but(write=latents_accumulated, **_latent),
    "shared part written twice": _static.but(write=shared_written_twice, **_latent),
    "shared part assigned": _static.but(write=shared_assigned, **_latent),
    "shared part through a view": _static.but(write=shared_through_a_view, **_latent),
    "windows moved alike": _windows.but(write=windows_of(-1, slice(-1, None))),
    "windows moved by different steps": _windows.but(
        write=windows_of(-2, slice(-1, None)), **_latent),
    "windows stored at different slots": _windows.but(
        write=windows_of(-1, slice(-2, -1)), **_latent),
    "one window moved": _windows.but(
        write=windows_of(0, slice(-1, None), roll=False), **_latent),
}  # fmt: skip


def follows_eager(form: Form, steps: int, batch: int = BATCH) -> None:
    """Steps with the whole budget beside an uncompiled twin; the site becomes as the form says."""
    module = LatentDecoder(form).eval()
    fast = torch.compile(module, backend="loki", options=EVERYTHING)
    here = Conversation.start(form)
    here.caches = [cache[:batch].clone() for cache in here.caches]
    there = here.fork()
    with torch.no_grad():
        for _ in range(steps):
            x = torch.randn(batch, form.new_tokens, HIDDEN)
            out, truth = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=2e-5)
            for found, expected in zip(here.caches, there.caches, strict=True):
                assert torch.equal(found, expected)
    (site,) = reports()[0].sites
    if form.reason is None:
        assert site.outcome == "sparse", site.reason
    else:
        assert site.outcome == "dense"
        assert site.reason.startswith(form.reason.value.partition("{")[0]), site.reason


@pytest.mark.parametrize("name", ODD)
def test_odd_latents_are_right_and_dense_unless_understood(name):
    # Halves of an odd number of tokens are none.
    follows_eager(ODD[name], steps=1 if "split and back" in name else 3)


@pytest.mark.parametrize("form", [_static, _cat, _one], ids=names([_static, _cat, _one]))
def test_a_batch_of_one_is_a_batch(form):
    follows_eager(form, steps=3, batch=1)
