"""Whole graphs, generated: decoders of one or two layers, each a random way to write a cache, group
heads, scale, cap, mask and normalise, compiled and compared with eager.

Sparse with the whole budget, and dense, both equal eager; what is not understood stays as it was.
A failing example shrinks to the `Layer` values that make it. Letters as in `toy_options`.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from loki_compile.kernels.fused import project_new_keys
from loki_compile.pca_store.basis import Basis
from tally import cases, count
from torch import Tensor, nn
from toy_attends import repeat_kv, repeat_kv_bthd, sdpa
from toy_capture import clear_runtime, interpret
from toy_conversation import Conversation
from toy_decoders import REWRITTEN, UNTOUCHED, Spelling
from toy_masks import (
    alibi,
    causal,
    causal_2d,
    causal_float,
    causal_inf,
    left_padded,
    no_mask,
    nothing_seen_by_first,
)
from toy_options import BATCH, FEW, HEAD_DIM, HEADS, HIDDEN, KV_HEADS
from toy_writes import ring

from loki_compile import fits, reports, stats
from loki_compile.indexes import indexes_of

pytestmark = [pytest.mark.soak, pytest.mark.covers]

STEPS = 3
# One spelling for each way to write; two repeat heads themselves, so they attend in one way only.
WRITES = {
    s.write.__name__: s
    for s in (*UNTOUCHED, *REWRITTEN)
    if s.write.__name__ not in ("snapshot_before_write", "values_before_write")
    and not s.layout.startswith("strided")
}
# Ways that are rewritten are what people use: most of the draws.
KNOWN = sorted({s.write.__name__ for s in REWRITTEN})
GROUPS = [
    "flag",
    "repeat_kv",
    "repeat_kv_bthd",
    "repeat_interleave",
    "expand",
    "interleaved",
    "flipped",
]
MASKS = {
    f.__name__: f
    for f in (
        no_mask, causal, causal_2d, causal_float, causal_inf, left_padded, alibi,
        nothing_seen_by_first,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """How one layer is written."""

    write: str
    kv_heads: int
    group: str
    core: str  # of CORES
    scale: str  # where the scale is applied
    cap: float
    mask: str
    masked: str  # how the mask is applied, where attention is written out
    softmax: str
    sink: bool
    norm: str
    rotary: str
    fused: bool
    new_tokens: int

    @property
    def spelling(self) -> Spelling:
        base = WRITES[self.write]
        return base.but(
            mask=MASKS[self.mask],
            kv_heads=self.kv_heads,
            fused=self.fused,
            new_tokens=self.new_tokens,
            reason=None,
        )


CORES = ["sdpa", "matmul", "einsum", "bmm"]
# Scores (B,Hkv,G,S,T), by matmul and by einsum; (B,S,Hkv,G,T); (B,S,Hq,T); (Hq,B,S,T).
LAYOUTS = ["groups", "groups by einsum", "groups behind tokens", "heads behind tokens", "turned"]
HIDING = ["add", "fill", "where", "in place"]


@st.composite
def make_layer(draw, new_tokens: int):
    write = draw(st.sampled_from(3 * KNOWN + sorted(WRITES)))
    base = WRITES[write]
    fixed_heads = base.kv_heads != KV_HEADS or "heads" in write
    kv_heads = base.kv_heads if fixed_heads else draw(st.sampled_from([1, KV_HEADS, HEADS]))
    # Where attention reads another length than the cache has, masks would not fit.
    maskable = base.mask is not no_mask or write in ("cat_bhtd", "cat_bthd")
    # A toy that names its cache "growing" or "static" says nothing about masks by itself.
    mask = draw(st.sampled_from(sorted(MASKS))) if maskable else "no_mask"
    core = draw(st.sampled_from([*CORES, "sdpa", *LAYOUTS]))
    return Layer(
        write=write,
        kv_heads=kv_heads,
        group=draw(st.sampled_from(3 * GROUPS[:5] + GROUPS)),
        core=core,
        scale=draw(st.sampled_from(["default", "default", "query", "product", "quotient", "key"])),
        cap=draw(st.sampled_from([0.0, 0.0, 4.0])),
        mask=mask,
        masked=draw(st.sampled_from(HIDING)),
        softmax=draw(
            st.sampled_from(["function", "function", "method", "fp32", "stabilised", "by hand"])
        ),
        sink=draw(st.booleans()) and draw(st.booleans()),
        norm=draw(st.sampled_from(["none", "rms", "layer", "l2"])),
        rotary=draw(st.sampled_from(["none", "halves", "pairs", "partial"])),
        fused=draw(st.booleans()),
        new_tokens=new_tokens,
    )


@st.composite
def make_layers(draw):
    new_tokens = draw(st.sampled_from([1, 1, 1, 2, 4]))
    return draw(st.lists(make_layer(new_tokens), min_size=1, max_size=2))


class GeneratedLayer(nn.Module):
    """x (B,S,HIDDEN), caches, position, mask -> (x, *state)."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.spelling = layer, layer.spelling
        widths = [HEADS * HEAD_DIM] + [layer.kv_heads * HEAD_DIM] * 2
        self.widths = widths
        if layer.fused:
            self.qkv = nn.Linear(HIDDEN, sum(widths))
        else:
            self.q, self.k, self.v = (nn.Linear(HIDDEN, width) for width in widths)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        self.gain = nn.Parameter(torch.rand(HEAD_DIM) + 0.5)
        self.sink = nn.Parameter(torch.randn(HEADS))
        self.register_buffer("frequencies", 0.7 ** torch.arange(HEAD_DIM // 2))

    def forward(self, x, ck, cv, pos, mask):
        batch, new, _ = x.shape
        if self.layer.fused:
            q, k, v = self.qkv(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.view(batch, new, -1, HEAD_DIM) for y in (q, k, v))
        q, k = (self.rotated(self.normed(y), pos) for y in (q, k))
        keys, values, state = self.spelling.write(k, v, ck, cv, pos)
        out = self.attention(q.transpose(1, 2), keys, values, mask)
        out = x + self.out(out.transpose(1, 2).reshape(batch, new, -1))
        return (out, *state)

    def normed(self, x: Tensor) -> Tensor:
        if self.layer.norm == "rms":
            return F.rms_norm(x, (HEAD_DIM,)) * self.gain * 1.5
        if self.layer.norm == "layer":
            return F.layer_norm(x, (HEAD_DIM,), self.gain)
        if self.layer.norm == "l2":
            return F.normalize(x, dim=-1) * 2.5
        return x * 2

    def rotated(self, x: Tensor, pos) -> Tensor:
        """(B,S,H,D), at positions an int, (S,) or (B,)."""
        kind = self.layer.rotary
        if kind == "none":
            return x
        if isinstance(pos, int):
            at = pos + torch.arange(x.shape[1])
        else:
            at = pos[:, None] if self.spelling.position == "rows" else pos
        angle = (at[..., None] * self.frequencies).unsqueeze(-2)
        cos, sin = angle.cos(), angle.sin()
        if kind == "pairs":
            even, odd = x[..., 0::2], x[..., 1::2]
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
            return turned.flatten(-2)
        half = HEAD_DIM // 2 if kind == "halves" else 3
        first, second = x[..., :half], x[..., half : 2 * half]
        cos, sin = cos[..., :half], sin[..., :half]
        parts = (first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :])
        return torch.cat(parts, -1)

    def grouped(self, x: Tensor) -> Tensor:
        kind, heads = self.layer.group, x.shape[1]
        if kind == "flipped":
            x = x.flip(1)
        if kind in ("flag", "flipped") and self.layer.core == "sdpa":
            return x
        if kind == "repeat_kv_bthd":
            return repeat_kv_bthd(x.transpose(1, 2)).transpose(1, 2)
        if kind == "repeat_interleave":
            return x.repeat_interleave(HEADS // heads, dim=1)
        if kind == "interleaved":
            return x.repeat(1, HEADS // heads, 1, 1)
        if kind == "expand" and heads == 1:
            return x.expand(-1, HEADS, -1, -1)
        return repeat_kv(x)

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        layer = self.layer
        if not layer.core.startswith("groups"):
            keys, values = self.grouped(keys), self.grouped(values)
        scale = HEAD_DIM**-0.5
        if layer.scale == "query":
            q = q * scale
        elif layer.scale == "key":
            keys = keys * scale
        before = layer.scale in ("query", "key")
        if layer.core == "sdpa":
            return sdpa(
                q, keys, values, attn_mask=mask, scale=1.0 if before else None, enable_gqa=True
            )
        scores = self.scores(q, keys)
        if not before:
            scores = scores / math.sqrt(HEAD_DIM) if layer.scale == "quotient" else scores * scale
        if layer.cap:
            scores = torch.tanh(scores / layer.cap) * layer.cap
        if mask is not None:
            scores = self.masked(scores, self.laid_out(mask))
        if layer.sink:
            column = self.laid_out(self.sink.view(1, -1, 1, 1)).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = self.weights(scores)
        if layer.sink:
            weights = weights[..., :-1]
        return self.mixed(F.dropout(weights, 0.0, self.training), values)

    def laid_out(self, x: Tensor) -> Tensor:
        """What is (B,Hq,S,_), or broadcasts to it, like the scores of this core."""
        core, x = self.layer.core, x[(None,) * (4 - x.ndim)]
        if core.startswith("groups"):
            heads = (1, 1) if x.shape[1] == 1 else (self.layer.kv_heads, -1)
            x = x.unflatten(1, heads)
            return x.permute(0, 3, 1, 2, 4) if core == "groups behind tokens" else x
        if core == "heads behind tokens":
            return x.transpose(1, 2)
        return x.transpose(0, 1) if core == "turned" else x

    def scores(self, q: Tensor, keys: Tensor) -> Tensor:
        core = self.layer.core
        if core == "groups":
            return self.laid_out(q) @ keys.unsqueeze(2).mT
        if core == "groups by einsum":
            return torch.einsum("bkgsd,bktd->bkgst", self.laid_out(q), keys)
        if core == "groups behind tokens":
            return torch.einsum("bskgd,bktd->bskgt", self.laid_out(q), keys)
        if core == "heads behind tokens":
            return torch.einsum("bshd,bthd->bsht", q.transpose(1, 2), keys.transpose(1, 2))
        if core == "einsum":
            return torch.einsum("bhsd,bhtd->bhst", q, keys)
        if core == "bmm":
            scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
            return scores.view(q.shape[0], HEADS, q.shape[2], -1)
        return self.laid_out(q @ keys.transpose(-1, -2))

    def mixed(self, weights: Tensor, values: Tensor) -> Tensor:
        core = self.layer.core
        if core == "groups":
            return (weights @ values.unsqueeze(2)).flatten(1, 2)
        if core == "groups by einsum":
            return torch.einsum("bkgst,bktd->bkgsd", weights, values).flatten(1, 2)
        if core == "groups behind tokens":
            return torch.einsum("bskgt,bktd->bkgsd", weights, values).flatten(1, 2)
        if core == "heads behind tokens":
            return torch.einsum("bsht,bhtd->bhsd", weights, values)
        if core == "einsum":
            return torch.einsum("bhst,bhtd->bhsd", weights, values)
        return (weights.transpose(0, 1) if core == "turned" else weights) @ values

    def masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        how = self.layer.masked
        if mask.dtype != torch.bool:
            if how == "in place":
                scores += mask
                return scores
            return scores + mask
        if how == "add":
            return scores + torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        if how == "fill":
            return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if how == "where":
            return torch.where(mask, scores, torch.finfo(scores.dtype).min)
        return scores.masked_fill_(~mask, -torch.inf)

    def weights(self, scores: Tensor) -> Tensor:
        how = self.layer.softmax
        if how == "method":
            return scores.softmax(-1)
        if how == "fp32":
            return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        if how == "stabilised":
            return torch.softmax(scores - scores.amax(-1, keepdim=True), -1)
        if how == "by hand":
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            return e / e.sum(-1, keepdim=True)
        return F.softmax(scores, dim=-1)


class Stack(nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(GeneratedLayer, layers))

    def forward(self, x, states):
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, *new = layer(x, *state)
            after.append(new)
        return x, after


def step(module, talks: list[Conversation], x: Tensor) -> Tensor:
    """The next tokens for all layers; keeps the caches that come back."""
    out, after = module(x, [talk.inputs(x)[1:] for talk in talks])
    for talk, state in zip(talks, after, strict=True):
        if state:
            talk.keys, talk.values = state
        talk.filled += x.shape[1]
    return out


# Eager itself parts from eager by this factor more than its inputs do: a layer norm over keys
# that are nearly equal divides by nearly nothing, and rounding alone then exceeds the bound.
MOST_AMPLIFIED = 25.0


def amplification(module, starts: list[Conversation], xs: list[Tensor], ends) -> float:
    """How many times a relative change of 1e-6 of tokens and caches grows in eager's last caches.

    starts: (consumed) the caches that eager began with; ends: the ones it made of them.
    """
    tiny = 1e-6

    def nearby(x: Tensor) -> Tensor:
        return x * (1 + tiny * torch.randn_like(x)) if x.is_floating_point() else x

    for talk in starts:
        talk.keys, talk.values = nearby(talk.keys), nearby(talk.values)
    for x in xs:
        step(module, starts, nearby(x))
    apart = [
        (a - b).float().nan_to_num().abs().max().item()
        for talk, end in zip(starts, ends, strict=True)
        for a, b in ((talk.keys, end.keys), (talk.values, end.values))
    ]
    return max(apart) / tiny


OPTIONS = [
    {"min_context": 0, "top_k": 1.0},
    {"min_context": 0, "top_k": 1.0, "share": "head"},
    {"min_context": 0, "top_k": 1.0, "index_dtype": "int8", "rank": 3},
    {"min_context": 0, "top_k": 64, "sink": 0, "recent": 1},
    # No cache has as many slots.
    {"min_context": 64},
    {"min_context": 64, "pack_gqa": False},
]


def indexes_mirror_their_caches(talks: list[Conversation]) -> int:
    """Every index that the runtime would use again equals the projection of its cache's keys."""
    checked = 0
    for talk in talks:
        for index in indexes_of(talk.keys):
            if not index.valid:
                continue
            layout = talk.spelling.layout
            axis = talk.keys.ndim - 1 if layout == "btf" else layout.find("h")
            now = project_new_keys(
                talk.keys, index.basis.key, axis, index.layout.dtype, layout.find("b")
            )
            for held, rows in zip(index.tensors, now, strict=False):
                atol = 1.0 if held.dtype == torch.int8 else 1e-4  # a tie in rounding
                torch.testing.assert_close(held.float(), rows.float(), rtol=1e-4, atol=atol)
            checked += 1
    return checked


def check_graph(layers: list[Layer], options: dict, inference: bool, seed: int) -> str:
    """One generated decoder against eager; what ran: "sparse", "dense" or "untouched"."""
    torch._dynamo.reset()
    clear_runtime()
    torch.manual_seed(seed)
    module = Stack(layers).eval()
    with torch.inference_mode() if inference else torch.no_grad():
        here = [Conversation.start(layer.spelling) for layer in layers]
        there, starts = ([talk.fork() for talk in here] for _ in range(2))
        xs = [torch.randn(BATCH, layers[0].new_tokens, HIDDEN) for _ in range(STEPS)]
        try:
            expected = [step(module, there, x) for x in xs]
        except (RuntimeError, IndexError, ValueError):
            assume(False)  # these parts do not fit together
        assume(amplification(module, starts, xs, there) < MOST_AMPLIFIED)
        fast = torch.compile(module, backend="loki", options=options)
        for x, truth in zip(xs, expected, strict=True):
            out = step(fast, here, x)
            torch.testing.assert_close(out, truth, rtol=1e-5, atol=5e-5, equal_nan=True)
        for ours, theirs in zip(here, there, strict=True):
            for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5, equal_nan=True)
        count("whole graphs: indexes equal a projection", indexes_mirror_their_caches(here))
    if stats()["sparse_steps"]:
        return "sparse"
    return "dense" if stats()["dense_steps"] else "untouched"


FIVE_KEYS = {**FEW, "top_k": 5, "recent": 1}


@functools.cache
def axes(weights: str, kv_heads: int, head_dim: int) -> Basis:
    """A basis that projects exactly, however many keys at a time."""
    key = torch.eye(head_dim).roll(3, 0).expand(kv_heads, -1, -1).contiguous()
    spectrum = torch.ones(kv_heads, head_dim)
    return Basis(key, key, spectrum, kind="random", weights=weights, layer="")


class AxesWhateverIsSeen:
    """In the place of moments that a basis is fitted from."""

    tokens = 1  # it has seen some
    queries = 0

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.sizes = kv_heads, head_dim

    def update(self, *_: Tensor | None) -> None:
        pass

    def add_query_moment(self, *_: Tensor) -> None:
        pass

    def over_rotations(self, _: object) -> AxesWhateverIsSeen:
        return self

    def pca(self, *, weights: str, layer: str) -> Basis:
        return axes(weights, *self.sizes)

    score_optimal = pca


def check_small_budget(layers: list[Layer], more: dict, inference: bool, seed: int) -> int:
    """Each step against the same step on copies of the caches, whose indexes are built anew."""
    torch._dynamo.reset()
    clear_runtime()
    torch.manual_seed(seed)
    module = Stack(layers).eval()
    with torch.inference_mode() if inference else torch.no_grad():
        here = [Conversation.start(layer.spelling) for layer in layers]
        fast = torch.compile(module, backend="loki", options={**FIVE_KEYS, **more})
        for _ in range(STEPS):
            x = torch.randn(BATCH, layers[0].new_tokens, HIDDEN)
            anew = [talk.fork() for talk in here]
            try:
                step(module, [talk.fork() for talk in here], x)
            except (RuntimeError, IndexError, ValueError):
                assume(False)  # these parts do not fit together
            before = stats()["dense_steps"]
            expected = step(fast, anew, x)
            copies_dense = stats()["dense_steps"] - before
            out = step(fast, here, x)
            if stats()["dense_steps"] - before == 2 * copies_dense:
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-5, equal_nan=True)
            else:  # the copy of a ring that begins again looks as if it held nothing
                assert copies_dense and set(stats()["dense_because"]) == {"empty"}
                assert any(layer.spelling.write is ring for layer in layers)
    return stats()["sparse_steps"]


def test_generated_decoders_with_a_small_budget_equal_a_fresh_rebuild(monkeypatch, use_engine):
    interpret(use_engine)
    monkeypatch.setattr(fits, "KeyCovariance", AxesWhateverIsSeen)
    ran: Counter[bool] = Counter()
    options = [{}, {"share": "head"}, {"index_dtype": "int8"}]

    @given(make_layers(), st.sampled_from(options), st.booleans(), st.integers(0, 1000))
    @cases(0.4)
    def check(layers, more, inference, seed):
        ran[check_small_budget(layers, more, inference, seed) > 0] += 1
        count("whole graphs: small budgets")

    check()
    assert ran[True] > 1, ran


def test_generated_decoders_equal_eager(use_engine):
    interpret(use_engine)
    ran: Counter[str] = Counter()

    @given(make_layers(), st.sampled_from(OPTIONS), st.booleans(), st.integers(0, 1000))
    @cases(0.6)
    def check(layers, options, inference, seed):
        what = check_graph(layers, options, inference, seed)
        ran[what] += 1
        count(f"whole graphs: {what}")
        count("whole graphs: sites rewritten", sum(r.count("sparse") for r in reports()[-1:]))

    check()
    # Otherwise the comparison would say nothing of the rewriting.
    assert ran["sparse"] > 1, ran
