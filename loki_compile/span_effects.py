"""What leaving keys out costs the loss, to first order: of windows of recent keys, from gradients.

A row whose attention is A over values v, with the gradient dO of the loss at its output O, moves
the loss by dO . (O' - O) where it reads a set P of its keys alone and O' is attention over P:

    effect = (sum over P of A g) / (sum over P of A) - dO . O,    g_j = dO . v_j

That is the joint effect of all that is left out, renormalised once. P is the first `sinks` keys and
a window of the last ones, so both sums are differences of sums along the row, and every window
costs a look-up and a division. The published effect (MoA, arXiv 2406.14909) takes each entry as if
it alone were left out, |A (dO . O - g) / (1 - A)|, and adds these up; they do not add.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loki_compile.kernels.ops import hidden_below
from loki_compile.kernels.spans import Spans

# Numbers of one tile of scores, for all query heads of a KV head: what the caches of a core hold.
_TILE = 1 << 20
# Added to the published denominator, 1 - A.
_PUBLISHED_EPSILON = 2.0**-7


@dataclass(frozen=True)
class SpanEffects:
    """Of each KV head and window, sums over rows, fp64 (Hkv, R).

    joint: the first-order change of the loss by the row, its size alone: |sum over the query heads
    that read the KV head|. signed: the same with its sign. entrywise: as published, None where not
    asked for. kept: keys that the last row reads, int64 (Hkv, R); visible: those it sees, (Hkv,).
    """

    joint: Tensor
    signed: Tensor
    entrywise: Tensor | None
    kept: Tensor
    visible: Tensor


def span_effects(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad: Tensor,
    spans: Spans,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    entrywise: bool = False,
) -> SpanEffects:
    """Effects of spans on one sequence; rows are the last S tokens of T.

    Memory is linear in T: a tile holds whole rows of scores, of one KV head's query heads.

    Args:
      query: (Hq, S, D). key (Hkv, T, D), value (Hkv, T, Dv); query head h reads KV head h // G.
      out, grad: (Hq, S, Dv), what attention returned and the gradient of the loss there.
      spans: the R spans to judge in the place of heads, each of them for every KV head.
      mask: of a model's own, broadcastable to (Hq, S, T), as `kernels.fused.joint_mask` makes it;
        no row sees keys behind its own in any case.
      softcap, sink_logits (Hq,): as `kernels.ops.attention` has them.

    Raises:
      ValueError: a row that sees keys with hidden ones between them.
    """
    kv_heads, tokens = key.shape[:2]
    group, rows = query.shape[0] // kv_heads, query.shape[1]
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    zeros = torch.zeros(kv_heads, len(spans.heads), dtype=torch.float64, device=query.device)
    joint, signed, single = zeros, zeros.clone(), zeros.clone()
    kept, visible = [], []
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        # From the newest key back: sums from there on lose nothing where little is kept.
        keys, values = (x[head].flip(0).to(kind) for x in (key, value))
        for begin, end in _tiles(rows, group * tokens):
            part = slice(begin, end)
            hidden, added = _masked(mask, heads, part, tokens, rows, query.device)
            scores = query[heads, part].to(kind) @ keys.T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if added is not None:
                scores = scores + added.to(kind)
            scores = scores.masked_fill(hidden, -torch.inf)
            total = scores.logsumexp(-1, keepdim=True)
            beside = torch.zeros_like(total)
            if sink_logits is not None:
                logits = sink_logits[heads].to(kind)[:, None, None]
                total = torch.logaddexp(total, logits)
                beside = (logits - total).exp()
            attention = (scores - total).exp()
            gradient = grad[heads, part].to(kind)
            moves = gradient @ values.T
            whole = (gradient * out[heads, part].to(kind)).sum(-1, keepdim=True)
            reach = _Reach(spans, hidden)
            mass = reach.sums(attention) + beside
            moved = reach.sums(attention * moves) / mass.clamp_min(torch.finfo(kind).tiny)
            effect = (moved - whole).masked_fill(reach.whole, 0.0).sum(0)
            joint[head] += effect.abs().sum(0).double()
            signed[head] += effect.sum(0).double()
            if entrywise:
                entries = attention * (whole - moves) / (1.0 - attention + _PUBLISHED_EPSILON)
                entries = entries.abs()
                left = entries.sum(-1, keepdim=True) - reach.sums(entries)
                left = left.masked_fill(reach.whole, 0.0).clamp_min(0.0)
                single[head] += left.sum((0, 1)).double()
        kept.append(reach.kept[-1])
        visible.append(reach.visible[-1])
    every = torch.stack(kept), torch.stack(visible)
    return SpanEffects(joint, signed, single if entrywise else None, *every)


class _Reach:
    """Which keys spans hold, of those that are not `hidden` (G, n, T); keys run from the newest
    back.

    whole (n, R): nothing is left out. kept (n, R), visible (n,): keys.
    """

    def __init__(self, spans: Spans, hidden: Tensor) -> None:
        seen = ~hidden[0]
        self.visible = seen.sum(-1)
        first = seen.int().argmax(-1)
        last = seen.shape[-1] - seen.flip(-1).int().argmax(-1)
        if not torch.equal(last - first, self.visible) or (hidden != hidden[:1]).any():
            raise ValueError(
                "found a mask that hides keys between those that a row sees, or others in each "
                "head: spans of such rows are not defined; needs causal attention, or windows"
            )
        widths = [
            torch.stack([alpha + (beta * self.visible >> 16) for alpha, beta in span.lines]).amax(0)
            for span in spans.heads
        ]
        width = torch.stack(widths, -1).clamp_min(max(spans.recent, 1))
        sinks = self.visible.clamp_max(spans.sink)
        most = (self.visible - sinks)[:, None]
        self.whole = width >= most
        self.kept = sinks[:, None] + width.minimum(most)
        self.ends = first[:, None] + width.minimum(most)
        self.sinks = last - sinks

    def sums(self, values: Tensor) -> Tensor:
        """Of (G, n, T), zero where a row sees nothing, to (G, n, R)."""
        upto = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
        at = torch.arange(values.shape[-1], device=values.device)
        first = values.masked_fill(at < self.sinks[:, None], 0.0).sum(-1, keepdim=True)
        return upto.gather(-1, self.ends.expand(len(values), -1, -1)) + first


def _tiles(rows: int, numbers: int) -> Iterator[tuple[int, int]]:
    step = max(1, _TILE // numbers)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _masked(
    mask: Tensor | None, heads: slice, part: slice, tokens: int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which keys rows do not see, bool (1 or G, n, T), and what is added to scores; keys run from
    the newest back."""
    at = torch.arange(tokens - rows, tokens, device=device)[part]
    hidden = (torch.arange(tokens - 1, -1, -1, device=device) > at[:, None])[None]
    if mask is None:
        return hidden, None
    mask = mask.expand(mask.shape[0], rows, tokens)[:, part].flip(-1)
    mask = mask[heads] if mask.shape[0] > 1 else mask
    if not mask.is_floating_point():
        return hidden | (mask == 0), None
    return hidden | (mask <= hidden_below(mask.dtype)), mask
