"""Attention of a prompt in which each KV head reads its first keys and a span of the last ones, by
FlexAttention's block masks. Each row reads what it would read if it was decoded.

The kernel is compiled by itself when it is first needed, once for each head_dim, dtype and form of
spans: a graph that calls the op may run node by node.
"""

from __future__ import annotations

import enum
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from loki_compile.kernels import cpu_build
from loki_compile.kernels.spans import Span, Spans
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

log = logging.getLogger("loki_compile.notices")

BLOCK = 128
# FlexAttention is slower than SDPA for each key that it reads (on a CPU 1.4 times, at 4096 tokens).
PAYS = 0.7
# Lengths of rows that the share of a prompt is taken from.
_SAMPLES = 16
# Devices, dtypes and head_dims that FlexAttention does not compile for.
_failed: set[Any] = set()


class Dense(str, enum.Enum):
    """Why a call of `prefill` read all keys."""

    MASK = "mask"  # it hides more than later tokens
    WIDE = "wide"  # spans leave too little out for it to pay
    NOT_COMPILED = "not compiled"  # no C++ compiler, or FlexAttention does not compile here


# Calls of `prefill` since it was cleared: those by spans under "", the dense ones by `Dense`.
ran: Counter[str] = Counter()


def hides_later_keys_alone(mask: Tensor) -> Tensor:
    """Whether a mask (B, 1, S, S), bool or added to scores, is causal and nothing else: bool ()."""
    tokens = torch.arange(mask.shape[-1], device=mask.device)
    causal = tokens <= tokens.unsqueeze(1)
    if mask.dtype == torch.bool:
        return (mask == causal).all()
    lowest = torch.finfo(mask.dtype).min
    return torch.where(causal, mask == 0, mask <= lowest).all()


def prefill(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, plain: Tensor | None, *,
    scale: float, lines: Sequence[int], sink: int, recent: int, min_keys: int,
) -> Tensor:  # fmt: skip
    """Causal attention (B, Hq, S, Dv): over spans, or dense, where it is not `plain`, spans cover
    all, or too much for it to pay.

    q (B, Hq, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv); mask as SDPA takes it, None where it is
    causal; plain: `hides_later_keys_alone` of it. lines: alpha and beta, in 1/65536, of each line
    of the span of each KV head, all heads with as many; the rest as `Spans` has it.
    """
    heads = k.shape[1]
    grouped = q.shape[1] != heads
    spans = _spans(tuple(lines), heads, sink, recent, min_keys)
    which = (q.device.type, q.dtype, q.shape[-1], v.shape[-1])
    why = ""
    if which in _failed or obstacle(q.device.type):
        why = Dense.NOT_COMPILED.value
    elif not pays(spans, q.shape[2]):
        why = Dense.WIDE.value
    elif plain is not None and not bool(plain):
        why = Dense.MASK.value
    if not why:
        blocks = block_mask(spans, q.shape[1], q.shape[2], q.device)
        try:
            out = compiled_attention()(q, k, v, block_mask=blocks, scale=scale, enable_gqa=grouped)
            ran[why] += 1
            return out.contiguous()
        except TorchDynamoException as error:
            why = Dense.NOT_COMPILED.value
            _failed.add(which)
            log.warning(
                "prompts are dense: FlexAttention does not compile here: %s",
                str(error).partition("\n")[0][:200],
            )
    ran[why] += 1
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    ).contiguous()


def flat_lines(spans: Spans, heads: int) -> list[int]:
    """The `lines` of spans for so many KV heads."""
    of_each = spans.heads * (heads // len(spans.heads))
    most = max(len(span.lines) for span in of_each)
    padded = [(*span.lines, *[span.lines[0]] * (most - len(span.lines))) for span in of_each]
    return [number for of_head in padded for line in of_head for number in line]


def obstacle(device_type: str) -> str:
    """Why FlexAttention cannot be compiled here, "" where it can."""
    return cpu_build.obstacle() if device_type == "cpu" else ""


def pays(spans: Spans, tokens: int) -> bool:
    """Whether spans leave enough of a prompt of so many tokens out."""
    return share_read(spans, tokens) < PAYS


@functools.lru_cache(maxsize=1024)
def share_read(spans: Spans, tokens: int) -> float:
    """Of the keys that the rows of a prompt of so many tokens see, the share that spans read."""
    lengths = [(2 * n + 1) * tokens // (2 * _SAMPLES) for n in range(_SAMPLES)]
    read = sum(sum(spans.keys(length)) for length in lengths)
    return read / max(len(spans.heads) * sum(lengths), 1)


def block_mask(spans: Spans, query_heads: int, tokens: int, device: torch.device) -> Any:
    """FlexAttention's, as `create_block_mask` would make it of `visible_by` without asking it about
    every pair of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    count = torch.arange(1, tokens + 1, device=device)
    starts = []
    for span in spans.heads:
        widths = [(count * beta >> 16) + alpha for alpha, beta in span.lines]
        width = functools.reduce(torch.maximum, widths).clamp(min=max(spans.recent, 1))
        whole = (width + spans.sink >= count) | (count < spans.min_keys)
        starts.append(torch.where(whole, 0, count - width))
    blocks = -(-tokens // BLOCK)
    start = torch.stack(starts)
    start = torch.cat((start, start[:, -1:].expand(-1, blocks * BLOCK - tokens)), 1)
    start = start.view(len(starts), blocks, BLOCK)
    lowest, highest = start.amin(-1, keepdim=True), start.amax(-1, keepdim=True)
    first = torch.arange(blocks, device=device) * BLOCK
    last, row = first + BLOCK - 1, first.unsqueeze(1)
    read = (first <= row + BLOCK - 1) & ((first < spans.sink) | (last >= lowest))
    whole = (last <= row) & ((first >= highest) | (last < spans.sink))
    group = query_heads // len(spans.heads)

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        which = which.repeat_interleave(group, 0).unsqueeze(0)
        order = torch.argsort(which.to(torch.int8), dim=-1, descending=True, stable=True)
        return which.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *listed(read & ~whole), *listed(read & whole), BLOCK_SIZE=BLOCK,
        mask_mod=visible_by(spans, group, device), seq_lengths=(tokens, tokens),
    )  # fmt: skip


def visible_by(spans: Spans, group: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod. It counts a row's span itself, by numbers that are tensors: on CPUs
    (run on 2.13) neither a table of where spans begin compiles nor a number that is a symbol."""
    heads = len(spans.heads)
    lines = torch.tensor(flat_lines(spans, heads), device=device).view(heads, -1, 2)
    lines = lines.repeat_interleave(group, 0)
    alphas = [alpha.contiguous() for alpha in lines[..., 0].unbind(1)]
    betas = [beta.contiguous() for beta in lines[..., 1].unbind(1)]
    sink, recent, least = (
        torch.full_like(alphas[0], number)
        for number in (spans.sink, max(spans.recent, 1), spans.min_keys)
    )

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (k < sink[h]) | (k > q - recent[h]) | (q + 1 < least[h])
        for alpha, beta in zip(alphas, betas, strict=True):
            inside = inside | (k > q - alpha[h] - (beta[h] * (q + 1) >> 16))
        return inside & (k <= q)

    return visible


@functools.cache
def compiled_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


@functools.lru_cache(maxsize=1024)
def _spans(lines: tuple[int, ...], heads: int, sink: int, recent: int, min_keys: int) -> Spans:
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    each = len(pairs) // heads
    of_heads = tuple(Span(tuple(pairs[n * each : (n + 1) * each])) for n in range(heads))
    return Spans(of_heads, sink, recent, min_keys)
