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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loki_compile.kernels.ops import hidden_below
from loki_compile.kernels.spans import Spans

# Numbers of one tile of scores, for all query heads of a KV head: what the caches of a core hold.
TILE = 1 << 20
# Added to the published denominator, 1 - A.
_PUBLISHED_EPSILON = 2.0**-7


@dataclass(frozen=True)
class SpanEffects:
    """Of R spans in each KV head.

    rows: what each row moves the loss by to first order, summed over the query heads that read the
    KV head, fp32 or wider (Hkv, S, R). entrywise: as published, sums over rows, (Hkv, R); None
    where not asked for. visible: keys that the last row sees.
    """

    rows: Tensor
    entrywise: Tensor | None
    visible: int


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
      mask: of a model's own, broadcastable to (Hq, S, T), as `kernels.masks.joint_mask` makes it;
        no row sees keys behind its own in any case.
      softcap, sink_logits (Hq,): as `kernels.ops.attention` has them.

    Raises:
      ValueError: a row that sees keys with hidden ones between them.
    """
    kv_heads, rules = key.shape[0], len(spans.heads)
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    moved = torch.empty(kv_heads, query.shape[1], rules, dtype=kind, device=query.device)
    single = torch.zeros(kv_heads, rules, dtype=kind, device=query.device)
    visible = 0
    for tile in _tiles(query, key, value, scale, mask, softcap, sink_logits):
        head, attention = tile.head, tile.attention
        gradient = grad[tile.heads, tile.rows].to(attention.dtype)
        moves = gradient @ tile.values.T
        whole = (gradient * out[tile.heads, tile.rows].to(attention.dtype)).sum(-1, keepdim=True)
        reach = _Reach(spans, tile.hidden)
        mass = (reach.sums(attention) + tile.beside).clamp_min(torch.finfo(attention.dtype).tiny)
        effect = reach.sums(attention * moves) / mass - whole
        moved[head, tile.rows] = effect.masked_fill(reach.whole, 0.0).sum(0)
        if entrywise:
            single[head] += _entrywise(attention, moves - whole, reach)
        visible = int(reach.visible[-1])
    return SpanEffects(moved, single if entrywise else None, visible)


def _entrywise(attention: Tensor, moves: Tensor, reach: _Reach) -> Tensor:
    """As published, (R,): what each entry would move the loss by if it alone were left out, of
    those that are. moves (G, n, T): what a key has beyond the row's output, along its gradient."""
    entries = (attention * moves / (1.0 - attention + _PUBLISHED_EPSILON)).abs()
    left = entries.sum(-1, keepdim=True) - reach.sums(entries)
    return left.masked_fill(reach.whole, 0.0).clamp_min(0.0).sum((0, 1))


def attend_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention over what spans hold, one span for each KV head or one for all, in tiles.

    Operands and errors as `span_effects`. Returns (Hq, S, Dv) in the dtype of the queries.
    """
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    heads = spans.heads * key.shape[0] if len(spans.heads) == 1 else spans.heads
    for tile in _tiles(query, key, value, scale, mask, softcap, sink_logits):
        own = replace(spans, heads=(heads[tile.head],))
        keep = tile.attention * _Reach(own, tile.hidden).held()
        mass = (keep.sum(-1, keepdim=True) + tile.beside).clamp_min(torch.finfo(keep.dtype).tiny)
        out[tile.heads, tile.rows] = (keep / mass @ tile.values).to(out.dtype)
    return out


@dataclass(frozen=True)
class _Tile:
    """Some `rows` of the query `heads` of one KV head: attention (G, n, T), of keys from the newest
    back, `beside` (G, n, 1) what lies on a sink logit, and the values (T, Dv)."""

    head: int
    heads: slice
    rows: slice
    hidden: Tensor
    attention: Tensor
    beside: Tensor
    values: Tensor


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float,
    sink_logits: Tensor | None,
) -> Iterator[_Tile]:
    kv_heads, tokens = key.shape[:2]
    group, rows = query.shape[0] // kv_heads, query.shape[1]
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    step = max(1, TILE // (group * tokens))
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            first = rows - part.stop  # no row of the tile sees the newest keys
            # From the newest key back: sums from there on lose nothing where little is kept.
            keys, values = (x[head, : tokens - first].flip(0).to(kind) for x in (key, value))
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
            yield _Tile(head, heads, part, hidden, (scores - total).exp(), beside, values)


class _Reach:
    """Which keys spans hold, of those that are not `hidden` (G, n, T); keys run from the newest
    back.

    whole (n, R): nothing is left out. visible (n,): keys.
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
        self.ends = first[:, None] + width.minimum(most)
        self.sinks = last - sinks
        self.at = torch.arange(seen.shape[-1], device=seen.device)

    def sums(self, values: Tensor) -> Tensor:
        """Of (G, n, T), zero where a row sees nothing, to (G, n, R)."""
        upto = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
        first = values.masked_fill(self.at < self.sinks[:, None], 0.0).sum(-1, keepdim=True)
        return upto.gather(-1, self.ends.expand(len(values), -1, -1)) + first

    def held(self) -> Tensor:
        """bool (n, T), of the one span that there is."""
        return (self.at < self.ends) | (self.at >= self.sinks[:, None])


def _masked(
    mask: Tensor | None, heads: slice, part: slice, tokens: int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which keys rows do not see, bool (1 or G, n, T), and what is added to scores; keys run from
    the newest back."""
    at = torch.arange(tokens - rows, tokens, device=device)[part]
    newest = int(at[-1])
    hidden = (torch.arange(newest, -1, -1, device=device) > at[:, None])[None]
    if mask is None:
        return hidden, None
    mask = mask.expand(mask.shape[0], rows, tokens)[:, part, : newest + 1].flip(-1)
    mask = mask[heads] if mask.shape[0] > 1 else mask
    if not mask.is_floating_point():
        return hidden | (mask == 0), None
    return hidden | (mask <= hidden_below(mask.dtype)), mask
