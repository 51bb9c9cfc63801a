"""What prompts have asked of each cache: seen in compiled prefills, kept until a basis is fitted.

It belongs to a cache's memory as a step left it, as automatic bases do (see `fits`): another write,
which nobody here has seen, and it is not known whose queries they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from loki_compile.caches import CacheBinding, Cached, version_of
from loki_compile.passes.prompts import AskedCache

_lock = threading.RLock()
_asked: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Asked:
    """Queries of a prompt, for each of its sequences: `moment` (B, Hkv, D, D) fp32, the sum of
    q qᵀ, and of how many queries for each KV head, `count` (B or 1,)."""

    moment: Tensor
    count: Tensor

    def of(self, rows: slice, sequences: int) -> tuple[Tensor, Tensor]:
        """The sums of some of so many sequences; of all where there were not so many."""
        moment, count = self.moment, self.count.expand(len(self.moment))
        if len(moment) == sequences:
            moment, count = moment[rows], count[rows]
        return moment.sum(0), count.sum()

    def after(self, before: Asked | None) -> Asked:
        """With those of the chunks before, which weigh no more than these."""
        if before is None or before.moment.shape != self.moment.shape:
            return self
        share = (self.count / before.count.clamp(min=1)).clamp(max=1)
        moment = self.moment + before.moment * share[:, None, None, None]
        return Asked(moment, self.count + before.count * share)

    def at_rest(self) -> Asked:
        """On the CPU, where it is no burden."""
        with torch.inference_mode(False), torch.no_grad():
            return Asked(self.moment.cpu().clone(), self.count.cpu().clone())


class PrefillGraph:
    """The compiled function of a prefill that says what its queries are like."""

    def __init__(self, run: Callable[..., Any], asked: Sequence[AskedCache], outputs: int) -> None:
        """
        Args:
          run: the graph behind `add_query_moments`, compiled.
          outputs: how many outputs are the prefill's own.
        """
        self.run = run
        self.outputs = outputs
        self.caches = [
            (x.argument, x.output, (x.sites[0].kv_heads, x.sites[0].head_dim), x.offset)
            for x in asked
        ]

    def __call__(self, *args: Any) -> Any:
        before = [self._before(args, *cache) for cache in self.caches]
        outputs = list(self.run(*args))
        more = outputs[self.outputs :]
        del outputs[self.outputs :]
        for number, (argument, output, heads, offset) in enumerate(self.caches):
            holder = outputs[output] if output is not None else args[argument or 0]
            # Copies: what a CUDA graph returns is its own memory.
            new = Asked(*(part.clone() for part in more[2 * number : 2 * number + 2]))
            place = (*heads, int(holder.storage_offset()) + offset)
            keep(holder, place, new.after(before[number]))
        return outputs

    def _before(
        self, args: Sequence[Any], argument: int | None, output: int | None, heads: Any, offset: int
    ) -> Asked | None:
        if argument is None:
            return None
        past: Tensor = args[argument]
        return _find(
            past, (*heads, int(past.storage_offset()) + (0 if output is not None else offset))
        )


def any_known() -> bool:
    """Whether it is known of any cache what prompts have asked of it."""
    return bool(_asked)


def asked_of(binding: CacheBinding, cached: Cached) -> Asked | None:
    """What prompts have asked of a cache, if nothing else has written it since."""
    return _find(cached.past, place_of(binding, cached)) if any_known() else None


def _find(tensor: Tensor, place: tuple[int, ...]) -> Asked | None:
    with _lock:
        version, by_place = _asked.get(tensor.untyped_storage(), (None, {}))
    return by_place.get(place) if version == version_of(tensor) else None


def keep(tensor: Tensor, place: tuple[int, ...], asked: Asked) -> None:
    """A step has left the cache, of which this was asked, in a tensor as it is now."""
    storage, version = tensor.untyped_storage(), version_of(tensor)
    with _lock:
        known, by_place = _asked.get(storage, (None, {}))
        by_place = by_place if known == version else {}
        by_place[place] = asked
        _asked[storage] = (version, by_place)


def carry(tensor: Tensor, twin: Tensor) -> None:
    """`twin` is a copy of a cache's tensor: what was asked of that is asked of it."""
    with _lock:
        version, by_place = _asked.get(tensor.untyped_storage(), (None, {}))
        if by_place and version == version_of(tensor):
            _asked[twin.untyped_storage()] = (version_of(twin), dict(by_place))


def place_of(binding: CacheBinding, cached: Cached) -> tuple[int, ...]:
    """Which cache of those that a storage may hold."""
    return binding.kv_heads, binding.head_dim, int(cached.past.storage_offset())
