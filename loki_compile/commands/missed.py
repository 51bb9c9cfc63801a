"""What choices of keys miss, and what they read: noted while a graph runs node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from loki_compile.kernels.checks import hidden_below
from loki_compile.kernels.ops import attend, attention, select, select_weighed


@dataclass
class Seen:
    """What one step has read. Of each site that chooses or is told keys, in the graph's order:
    missed, the share of each query head's attention on keys that were not chosen, their mean; keys,
    how many a row reads. bytes: of keys, values and what ranks them. dense_bytes: of the keys and
    values of all keys at these sites and at `dense` ones, which read all."""

    missed: list[float] = field(default_factory=list)
    keys: list[float] = field(default_factory=list)
    bytes: float = 0.0
    dense_bytes: float = 0.0
    dense: int = 0


class Watch:
    """An engine (see `engines`) that runs graphs as they are, and fills `seen` where it is set."""

    seen: Seen | None = None

    def engine(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        looking = _Looking(gm, self)

        def run(*args: Any) -> Any:
            return gm.forward(*args) if self.seen is None else looking.run(*args)

        return run


class _Looking(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watch: Watch) -> None:
        super().__init__(gm)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        seen = self.watch.seen
        if seen is not None and n.target in (attend, attention, select, select_weighed):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n.target in (select, select_weighed):
                _note_ranking(seen, args, kwargs)
            elif n.target is attention and kwargs.get("ranges") is None:
                read = _all_bytes(args[1], args[2], args[3], kwargs.get("k_pe"))
                seen.bytes += read
                seen.dense_bytes += read
                seen.dense += 1
            else:
                _note_reading(seen, n.target is attend, args, kwargs)
        return result


def _note_ranking(seen: Seen, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    index, scale, mask = args[2], args[3], args[4]
    rows = index.shape[2]
    share = _visible(mask, rows * kwargs.get("page", 1)) / (rows * kwargs.get("page", 1))
    share = min(share, 1.0) * _ranking_share(kwargs.get("budgets"), kwargs.get("sink", 0))
    for part in (index, scale):
        if part is not None:
            seen.bytes += part.numel() * part.element_size() * share


def _ranking_share(budgets: Tensor | None, sink: int) -> float:
    """Of the heads, those that rank: of `budgets` (B, heads, S, 2), keys and how many of them are
    the last ones, where more are read than these and the sinks."""
    if budgets is None:
        return 1.0
    ranks = budgets[..., 0] > budgets[..., 1] + sink
    return float(ranks.any(2).double().mean())


def _note_reading(
    seen: Seen, by_positions: bool, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    q, k, v, rest = *args[:3], kwargs.get("k_pe")
    mask, slots = args[4 if by_positions else 3], k.shape[2]
    if by_positions:
        chosen = slots_at(args[3], slots)
    else:
        chosen = slots_in(kwargs["ranges"].expand(len(k), k.shape[1], q.shape[2], 4), slots)
    missed = missed_mass(
        q, k if rest is None else torch.cat((k, rest), -1), chosen, mask,
        scale=kwargs["scale"], softcap=kwargs.get("softcap", 0.0),
        sink_logits=kwargs.get("sink_logits"),
    )  # fmt: skip
    seen.missed.append(float(missed))
    keys = chosen.sum(-1).double()  # (B, heads, S)
    seen.keys.append(float(keys.mean()))
    every = _all_bytes(k, v, mask, rest)
    seen.dense_bytes += every
    row = every / max(_visible(mask, slots), 1) / k.shape[1]
    seen.bytes += float(keys.mean(-1).sum()) * row


def slots_at(positions: Tensor, slots: int) -> Tensor:
    """Which of the slots are read at positions (B, heads, S, K), -1 for none: bool
    (B, heads, S, slots)."""
    chosen = torch.zeros(*positions.shape[:3], slots + 1, dtype=torch.bool, device=positions.device)
    chosen.scatter_(3, positions.long() % (slots + 1), True)  # -1 is one behind the last
    return chosen[..., :-1]


def slots_in(ranges: Tensor, slots: int) -> Tensor:
    """The same of two ranges (B, heads, S, 4): from the first to before the second, from the third
    to before the fourth."""
    slot = torch.arange(slots, device=ranges.device)
    first, stop, last, end = ranges[..., None].unbind(-2)
    return ((slot >= first) & (slot < stop)) | ((slot >= last) & (slot < end))


def _all_bytes(k: Tensor, v: Tensor, mask: Tensor | None, rest: Tensor | None) -> float:
    """Of the keys and values that the last row sees."""
    slots = k.shape[2]
    size = sum(part.numel() * part.element_size() for part in (k, v, rest) if part is not None)
    return size * min(_visible(mask, slots) / slots, 1.0)


def _visible(mask: Tensor | None, slots: int) -> int:
    """Keys that the last row sees."""
    if mask is None:
        return slots
    last = mask[0, 0, -1]
    if last.dtype in (torch.bool, torch.uint8):
        return int((last != 0).sum())
    return int((last > hidden_below(last.dtype)).sum())


def missed_mass(
    q: Tensor,
    k: Tensor,
    chosen: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The share of each head's attention that lies on keys not chosen, the mean of all (0-d fp32).

    Arguments as of `loki::attend`; chosen: bool (B, Hkv or Hq, S, T).
    """
    group = q.shape[1] // k.shape[1]
    scores = scale * q.float() @ k.float().repeat_interleave(group, 1).mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        hidden = mask == 0 if mask.dtype in (torch.uint8, torch.bool) else None
        scores = scores + mask if hidden is None else scores.masked_fill(hidden, -torch.inf)
    chosen = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)
    if sink_logits is not None:
        sinks = sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights * ~chosen).sum(-1).mean()
