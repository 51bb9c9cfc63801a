"""Whole decoders as people write them: each family with its own cache, attention and positions.

Two layers with norms, an MLP and a head each. After a prompt that is prefilled uncompiled, one to
three tokens at a time are decoded by `torch.compile(model, backend="loki")`, with the sparse
variant forced and all keys read, and compared with the uncompiled twin. A family names the reason
where its cache is not followed: then it is dense, and right.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_capture import interpret

from loki_compile import reports, stats

pytestmark = pytest.mark.covers

BATCH, HEADS, KV_HEADS, HEAD_DIM, WIDTH, SLOTS, VOCABULARY = 2, 4, 2, 16, 64, 32, 50
GROUP = HEADS // KV_HEADS
CHUNKS = (6, 1, 1, 3, 1, 1, 2, 1)  # the first is the prompt
sdpa = F.scaled_dot_product_attention


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (S,) or (B,S) for x (B,heads,S,D)."""
    frequencies = 100.0 ** (-torch.arange(x.shape[-1] // 2) / (x.shape[-1] // 2))
    angles = positions[..., None] * frequencies
    angles = angles[:, None] if angles.ndim == 3 else angles
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def causal(at: int, new: int) -> Tensor:
    return torch.ones(new, at + new, dtype=torch.bool).tril(at)


def visible(positions: Tensor, slots: int = SLOTS) -> Tensor:
    return torch.arange(slots) <= positions[..., None]


class Attention(nn.Module):
    """`forward(x, at)`: at is the number of tokens before x, or their positions (`tensor`)."""

    kv_heads = KV_HEADS
    tensor = False
    reason = ""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.kv = nn.Linear(WIDTH, 2 * self.kv_heads * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.start()

    def start(self) -> None:
        self.past: tuple[Tensor, Tensor] | None = None

    def slots(self, *shape: int) -> None:
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def project(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Queries, keys, values (B,heads,S,D); rotated if there are positions."""
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for y in (self.q(x), k, v))
        return (q, k, v) if positions is None else (rotate(q, positions), rotate(k, positions), v)

    def grow(self, k: Tensor, v: Tensor, dim: int = 2) -> tuple[Tensor, Tensor]:
        if self.past is not None:
            k, v = (torch.cat(pair, dim) for pair in zip(self.past, (k, v), strict=True))
        self.past = (k, v)
        return k, v

    def merge(self, out: Tensor) -> Tensor:
        return self.out(out.transpose(1, 2).flatten(2))


class SlicedBuffers(Attention):
    """Llama's reference code: buffers (B,T,H,D), assigned and read by slices, heads expanded."""

    def start(self):
        self.slots(BATCH, SLOTS, KV_HEADS, HEAD_DIM)

    def forward(self, x, at):
        (batch, new, _), end = x.shape, at + x.shape[1]
        q, k, v = self.project(x, torch.arange(at, end))
        self.keys[:batch, at:end] = k.transpose(1, 2)
        self.values[:batch, at:end] = v.transpose(1, 2)
        keys, values = (
            y[:batch, :end, :, None].expand(-1, -1, -1, GROUP, -1).reshape(batch, end, HEADS, -1)
            for y in (self.keys, self.values)
        )
        scores = q @ keys.permute(0, 2, 3, 1) / math.sqrt(HEAD_DIM)
        if new > 1:
            scores = scores + torch.full((new, end), -torch.inf).triu(at + 1)
        weights = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.merge(weights @ values.transpose(1, 2))


class IndexedBuffers(Attention):
    """gpt-fast: buffers written at positions, a row of a stored mask."""

    tensor = True

    def start(self):
        self.slots(BATCH, KV_HEADS, SLOTS, HEAD_DIM)
        self.register_buffer("mask", torch.ones(SLOTS, SLOTS, dtype=torch.bool).tril())

    def forward(self, x, at):
        q, k, v = self.project(x, at)
        self.keys[:, :, at], self.values[:, :, at] = k, v
        keys, values = (y.repeat_interleave(GROUP, dim=1) for y in (self.keys, self.values))
        return self.merge(sdpa(q, keys, values, attn_mask=self.mask[None, None, at]))


class OwnCounter(Attention):
    """torchtune: the cache counts its tokens itself and holds expanded heads."""

    tensor = True

    def start(self):
        self.slots(BATCH, HEADS, SLOTS, HEAD_DIM)
        self.register_buffer("next", torch.arange(SLOTS))

    def forward(self, x, at):
        q, k, v = self.project(x, at)
        k, v = (y.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2) for y in (k, v))
        self.keys[:, :, self.next[: x.shape[1]]] = k
        self.values[:, :, self.next[: x.shape[1]]] = v
        self.next.add_(x.shape[1])
        return self.merge(sdpa(q, self.keys, self.values, attn_mask=visible(at)))


class FusedWrite(Attention):
    """flash-attn: keys and values of a layer in one tensor (B,T,2,H,D), stored by one write."""

    def start(self):
        self.register_buffer("cache", torch.zeros(BATCH, SLOTS, 2, KV_HEADS, HEAD_DIM))

    def forward(self, x, at):
        (batch, new, _), end = x.shape, at + x.shape[1]
        q, k, v = self.project(x, torch.arange(at, end))
        self.cache[:batch, at:end, ...] = torch.stack([k, v], dim=3).permute(0, 2, 3, 1, 4)
        keys, values = (y.transpose(1, 2) for y in self.cache[:batch, :end].unbind(dim=2))
        return self.merge(sdpa(q, keys, values, attn_mask=causal(at, new), enable_gqa=True))


class Narrowed(Attention):
    """Plain tensors and a Python counter on the module."""

    def start(self):
        self.slots(BATCH, KV_HEADS, SLOTS, HEAD_DIM)

    def forward(self, x, at):
        new = x.shape[1]
        q, k, v = self.project(x, torch.arange(at, at + new))
        self.keys.narrow(2, at, new).copy_(k)
        self.values.narrow(2, at, new).copy_(v)
        keys, values = self.keys.narrow(2, 0, at + new), self.values.narrow(2, 0, at + new)
        return self.merge(sdpa(q, keys, values, attn_mask=causal(at, new), enable_gqa=True))


class TokensFirst(Attention):
    """Megatron: everything (S,B,H,D), batch and heads folded, baddbmm into an empty tensor."""

    kv_heads = HEADS

    def start(self):
        self.slots(SLOTS, BATCH, HEADS, HEAD_DIM)

    def forward(self, x, at):
        (batch, new, _), end = x.shape, at + x.shape[1]
        q, k, v = (y.permute(2, 0, 1, 3) for y in self.project(x))
        self.keys[at:end, 0:batch, ...], self.values[at:end, 0:batch, ...] = k, v
        keys = self.keys[:end, 0:batch].reshape(end, batch * HEADS, HEAD_DIM)
        values = self.values[:end, 0:batch].reshape(end, batch * HEADS, HEAD_DIM)
        q = q.reshape(new, batch * HEADS, HEAD_DIM).transpose(0, 1)
        empty = torch.empty(batch * HEADS, new, end)
        keys = keys.transpose(0, 1).transpose(1, 2)
        scores = torch.baddbmm(empty, q, keys, beta=0.0, alpha=1 / math.sqrt(HEAD_DIM))
        scores = scores.view(batch, HEADS, new, end).masked_fill(~causal(at, new), -1e9)
        weights = F.softmax(scores, dim=-1).view(batch * HEADS, new, end)
        return self.merge(torch.bmm(weights, values.transpose(0, 1)).view(batch, HEADS, new, -1))


class Grown(Attention):
    """nanoGPT with a cache: fused projection, `cat`, softmax over masked scores."""

    kv_heads = HEADS

    def forward(self, x, at):
        q, k, v = self.project(x)
        keys, values = self.grow(k, v)
        scores = (q @ keys.transpose(-2, -1)) * (1.0 / math.sqrt(keys.size(-1)))
        scores = scores.masked_fill(causal(at, x.shape[1]) == 0, float("-inf"))
        return self.merge(F.dropout(F.softmax(scores, dim=-1), 0.1, self.training) @ values)


class GrownProjections(Attention):
    """Whisper: projections (B,T,H*D) grow, heads are split behind; the scale is on both sides."""

    kv_heads = HEADS

    def forward(self, x, at):
        keys, values = self.grow(*self.kv(x).chunk(2, -1), dim=1)
        scale = HEAD_DIM**-0.25
        q = self.q(x).view(*x.shape[:2], HEADS, -1).permute(0, 2, 1, 3) * scale
        keys = keys.view(*keys.shape[:2], HEADS, -1).permute(0, 2, 3, 1) * scale
        values = values.view(*values.shape[:2], HEADS, -1).permute(0, 2, 1, 3)
        scores = q @ keys
        if x.shape[1] > 1:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(at + 1)
        return self.merge(F.softmax(scores.float(), dim=-1).to(q.dtype) @ values)


class MultiQuery(Attention):
    """One KV head without a dimension of its own, by einsums as in PaLM's sketches."""

    kv_heads = 1

    def forward(self, x, at):
        q, k, v = self.project(x)
        keys, values = self.grow(k[:, 0], v[:, 0], dim=1)
        scores = torch.einsum("bhid,bjd->bhij", q * HEAD_DIM**-0.5, keys)
        scores = scores.masked_fill(~causal(at, x.shape[1]), -torch.finfo(scores.dtype).max)
        return self.merge(torch.einsum("bhij,bjd->bhid", scores.softmax(-1), values))


class GroupsByEinsum(Attention):
    """Groups as a dimension of their own, as in code that came from JAX; a soft cap."""

    def forward(self, x, at):
        q, k, v = self.project(x, torch.arange(at, at + x.shape[1]))
        keys, values = self.grow(k.transpose(1, 2), v.transpose(1, 2), dim=1)
        q = q.unflatten(1, (KV_HEADS, GROUP))
        scores = torch.einsum("bkgtd,bskd->bkgts", q, keys) * HEAD_DIM**-0.5
        scores = 30.0 * torch.tanh(scores / 30.0)
        scores = torch.where(causal(at, x.shape[1]), scores, torch.finfo(scores.dtype).min)
        out = torch.einsum("bkgts,bskd->btkgd", torch.softmax(scores, -1), values)
        return self.out(out.flatten(2))


class RelativeBias(Attention):
    """T5: a learned bias of the distance, no scale."""

    kv_heads = HEADS

    def start(self):
        super().start()
        self.bias = nn.Embedding(SLOTS, HEADS)

    def forward(self, x, at):
        q, k, v = self.project(x)
        keys, values = self.grow(k, v)
        new, end = x.shape[1], at + x.shape[1]
        distance = (torch.arange(at, end)[:, None] - torch.arange(end)).clamp_min(0)
        bias = self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        bias = bias + torch.full((new, end), torch.finfo(x.dtype).min).triu(at + 1)
        return self.merge(F.softmax((q @ keys.mT + bias).float(), -1).type_as(q) @ values)


class RingBuffer(Attention):
    """Mistral's rotating buffer: slot p mod T, and the position that each slot holds."""

    tensor = True

    def start(self):
        self.slots(BATCH, 12, KV_HEADS, HEAD_DIM)
        self.register_buffer("held", torch.full((12,), -1))

    def forward(self, x, at):
        q, k, v = self.project(x, at)
        self.keys[:, at % 12], self.values[:, at % 12] = k.transpose(1, 2), v.transpose(1, 2)
        self.held[at % 12] = at
        seen = (self.held >= 0) & (self.held <= at[:, None]) & (self.held > at[:, None] - 12)
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        return self.merge(sdpa(q, keys, values, attn_mask=seen, enable_gqa=True))


class OwnPositions(Attention):
    """Ragged batches: each sequence has its own length, and stores at its own position."""

    def start(self):
        self.slots(BATCH, KV_HEADS, SLOTS, HEAD_DIM)
        self.register_buffer("length", torch.arange(BATCH))

    def forward(self, x, at):
        batch, new, _ = x.shape
        positions = self.length[:, None] + torch.arange(new)
        q, k, v = self.project(x, positions)
        rows = torch.arange(batch)[:, None].expand(batch, new)
        self.keys[rows, :, positions] = k.transpose(1, 2)
        self.values[rows, :, positions] = v.transpose(1, 2)
        self.length.add_(new)
        mask = visible(positions)[:, None]
        return self.merge(sdpa(q, self.keys, self.values, attn_mask=mask, enable_gqa=True))


class AbsorbedLatents(Attention):
    """DeepSeek's reference code: latents and rotated parts cached apart, maps absorbed."""

    latent, shared, own = 24, 8, 16

    def start(self):
        self.q = nn.Linear(WIDTH, HEADS * (self.own + self.shared))
        self.down = nn.Linear(WIDTH, self.latent + self.shared)
        self.up = nn.Parameter(torch.randn(HEADS, self.own + HEAD_DIM, self.latent) * 0.2)
        self.register_buffer("latents", torch.zeros(BATCH, SLOTS, self.latent))
        self.register_buffer("rotated", torch.zeros(BATCH, SLOTS, self.shared))

    def forward(self, x, at):
        (batch, new, _), end = x.shape, at + x.shape[1]
        positions = torch.arange(at, end)
        q, q_rotated = self.q(x).view(batch, new, HEADS, -1).split([self.own, self.shared], -1)
        q_rotated = rotate(q_rotated.transpose(1, 2), positions).transpose(1, 2)
        latent, rotated = self.down(x).split([self.latent, self.shared], -1)
        asked = torch.einsum("bshd,hdc->bshc", q, self.up[:, : self.own])
        self.latents[:batch, at:end] = latent
        self.rotated[:batch, at:end] = rotate(rotated[:, None], positions)[:, 0]
        scores = (
            torch.einsum("bshc,btc->bsht", asked, self.latents[:batch, :end])
            + torch.einsum("bshr,btr->bsht", q_rotated, self.rotated[:batch, :end])
        ) * (self.own + self.shared) ** -0.5
        if new > 1:
            scores = scores + torch.full((new, end), -torch.inf).triu(at + 1).unsqueeze(1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        found = torch.einsum("bsht,btc->bshc", weights, self.latents[:batch, :end])
        return self.out(torch.einsum("bshc,hdc->bshd", found, self.up[:, -HEAD_DIM:]).flatten(2))


class Memory(Attention):
    """Cross-attention to what the prompt left: read, and never written again."""

    def forward(self, x, at):
        q, k, v = self.project(x)
        if self.past is None:
            self.past = (k, v)
        return self.merge(sdpa(q, *self.past, enable_gqa=True))


class NoCache(Attention):
    """Attends within the call alone."""

    reason = "the keys are computed in this graph"

    def forward(self, x, at):
        q, k, v = self.project(x)
        return self.merge(sdpa(q, k, v, attn_mask=causal(0, x.shape[1]), enable_gqa=True))


class RotatedWhenRead(Attention):
    """StreamingLLM: keys are cached without positions, which change with what is evicted."""

    reason = "the keys are computed in this graph"

    def forward(self, x, at):
        q, k, v = self.project(x)
        keys, values = self.grow(k, v)
        positions = torch.arange(at + x.shape[1])
        q, keys = rotate(q, positions[at:]), rotate(keys, positions)
        return self.merge(sdpa(q, keys, values, attn_mask=causal(at, x.shape[1]), enable_gqa=True))


class Paged(Attention):
    """Blocks of a pool, gathered through a table."""

    tensor = True
    reason = "the way from the cache to the keys runs through"

    def start(self):
        self.slots(20, 4, KV_HEADS, HEAD_DIM)
        self.register_buffer("table", torch.randperm(16).view(BATCH, 8))

    def forward(self, x, at):
        q, k, v = self.project(x, at)
        blocks, offsets = self.table[:, at // 4], (at % 4).expand(BATCH, -1)
        self.keys[blocks, offsets] = k.transpose(1, 2)
        self.values[blocks, offsets] = v.transpose(1, 2)
        keys, values = (
            y[self.table].flatten(1, 2).transpose(1, 2) for y in (self.keys, self.values)
        )
        return self.merge(sdpa(q, keys, values, attn_mask=visible(at), enable_gqa=True))


class KeysTransposed(Attention):
    """BLOOM's old cache: keys (B,H,D,T), ready for the product."""

    kv_heads = HEADS
    reason = "head_dim is not the last dimension of the cache"

    def forward(self, x, at):
        q, k, v = self.project(x)
        k = k.mT
        if self.past is not None:
            k, v = torch.cat([self.past[0], k], 3), torch.cat([self.past[1], v], 2)
        self.past = (k, v)
        scores = (q @ k * HEAD_DIM**-0.5).masked_fill(~causal(at, x.shape[1]), -torch.inf)
        return self.merge(scores.softmax(-1) @ v)


class HeavyHitters(Attention):
    """H2O: the weights decide which keys stay."""

    kv_heads = HEADS
    reason = "the attention weights are used by"

    def forward(self, x, at):
        q, k, v = self.project(x)
        keys, values = self.grow(k, v)
        new = x.shape[1]
        mask = causal(keys.shape[2] - new, new)
        weights = (q @ keys.mT * HEAD_DIM**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        if keys.shape[2] > 5:
            kept = weights.sum(2).topk(5).indices.sort(-1).values[..., None]
            kept = kept.expand(-1, -1, -1, HEAD_DIM)
            self.past = (keys.gather(2, kept), values.gather(2, kept))
        return self.merge(weights @ values)


class OneHotWrites(Attention):
    """Code that came from JAX: the whole cache is chosen anew between old and new rows."""

    reason = "the cache is written by"

    def start(self):
        self.slots(BATCH, KV_HEADS, SLOTS, HEAD_DIM)

    def forward(self, x, at):
        new = x.shape[1]
        positions = torch.arange(at, at + new)
        q, k, v = self.project(x, positions)
        hot = F.one_hot(positions, SLOTS).to(x.dtype).T  # (T,S)
        old = 1 - hot.sum(-1, keepdim=True)
        self.keys.copy_(self.keys * old + hot @ k)
        self.values.copy_(self.values * old + hot @ v)
        out = sdpa(q, self.keys, self.values, attn_mask=visible(positions), enable_gqa=True)
        return self.merge(out)


class Block(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x, at):
        x = x + self.attention(self.norms[0](x), at)
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(attention) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens, at):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, at)
        return self.head(x)


def families(attention: type[Attention] = Attention) -> list[type[Attention]]:
    below = attention.__subclasses__()
    return [*below, *(inner for family in below for inner in families(family))]


by_name = pytest.mark.parametrize("family", families(), ids=lambda family: family.__name__)


@by_name
@pytest.mark.usefixtures("fresh")
def test_a_family_decodes_as_it_does_uncompiled(family, use_engine):
    interpret(use_engine)
    decodes_alike(family)


@pytest.mark.parametrize("family", [Grown, FusedWrite, AbsorbedLatents], ids=lambda f: f.__name__)
@pytest.mark.usefixtures("fresh")
def test_inductor_compiles_what_became_of_a_family(family):
    decodes_alike(family, CHUNKS[:3])


def decodes_alike(family: type[Attention], chunks: tuple[int, ...] = CHUNKS) -> None:
    torch.manual_seed(5)
    model = Decoder(family).eval()
    twin = copy.deepcopy(model)
    fast = torch.compile(model, backend="loki", options={"top_k": 1.0, "min_context": 0})
    tokens = torch.randint(VOCABULARY, (BATCH, sum(chunks)))
    ends = torch.tensor(chunks).cumsum(0).tolist()
    with torch.no_grad():
        for end, new in zip(ends, chunks, strict=True):
            at = torch.arange(end - new, end) if family.tensor else end - new
            part = tokens[:, end - new : end]
            found = (fast if end > new else model)(part, at)
            torch.testing.assert_close(found, twin(part, at), rtol=0, atol=2e-5)
    sites = [site for report in reports() for site in report.sites]
    assert sites
    if family.reason:
        assert all(site.reason.startswith(family.reason) for site in sites), sites
        assert stats()["sparse_steps"] == 0
    else:
        assert {site.outcome for site in sites} == {"sparse"}, sites
        assert stats()["sparse_steps"] == len(chunks) - 1
