"""The calls of a model: as a loop of one's own makes them, or as `generate` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loki_compile.counts import Tally, tally_for
from loki_compile.generation.caches import (
    length_of,
    most_rewindable,
    rewind,
    room_of,
    why_not,
)

# What comes for each token, (..., tokens), and how it goes on: counting, as the last, or with 0.
_COUNT, _SAME, _ZERO = 1, 2, 3
_EACH_TOKEN = {
    "position_ids": _COUNT,
    "token_type_ids": _SAME,
    "mm_token_type_ids": _ZERO,
    "moe_mm_token_type_ids": _ZERO,
}


class Feed:
    """A model and a cache that holds `length` tokens, a number that calls and `rewind` change.

    `inputs` go to the model beside tokens and cache: a mask (B, known) of the tokens that the cache
    holds now, positions (..., any) the last of which is that of token `known` - 1, and whatever
    else. Mask and positions go on by themselves. With `prepared`, what the model gets is made by
    its own `prepare_inputs_for_generation`, as `generate` does.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        inputs: Mapping[str, Any],
        *,
        prepared: bool = False,
    ) -> None:
        """
        Raises:
          ValueError: what `length_of` says of the cache.
        """
        self.model = model
        self.cache = cache
        self.length = length_of(cache)
        self.known = self.length
        self.inputs = {k: v for k, v in inputs.items() if k != "past_key_values"}
        self.mask = self.inputs.pop("attention_mask", None)
        self.prepared = prepared
        self._tally: Tally | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """Gives the model new tokens (B, S) behind those of the cache; logits (B, S, V)."""
        first, last = self.length, self.length + ids.shape[1]
        inputs = dict(self.inputs)
        for name, rule in _EACH_TOKEN.items():
            if isinstance(each := inputs.get(name), Tensor):
                inputs[name] = self._of_tokens(name, each, rule, first, last)
        if self.mask is not None:
            inputs["attention_mask"] = self._mask_of(last)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = ids.shape[1]
        if self.prepared:
            inputs = self.model.prepare_inputs_for_generation(
                ids, next_sequence_length=ids.shape[1], past_key_values=self.cache, **inputs
            )
            inputs["return_dict"] = True
        else:
            inputs |= {"input_ids": ids, "past_key_values": self.cache, "use_cache": True}
        out = self.model(**inputs)
        self.length = last
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits[:, -ids.shape[1] :]

    def rewind(self, tokens: int) -> None:
        """Takes the last tokens off the cache, which must allow it (`require_rewinding`)."""
        rewind(self.cache, tokens)
        self.length -= tokens

    def require_rewinding(self, tokens: int) -> None:
        """
        Raises:
          ValueError: once it holds so many tokens, the cache cannot be rewound.
        """
        reason = why_not(self.cache, tokens)
        if reason:
            raise ValueError(f"{reason} Decode without correction or drafts.")

    @property
    def room(self) -> int:
        """Tokens that the cache still takes."""
        slots = room_of(self.cache)
        return (1 << 40 if slots is None else slots) - self.length

    def drafts(self, wanted: int) -> int:
        """So many drafts or fewer, which with the token before them can be taken off again."""
        most = most_rewindable(self.cache)
        return wanted if most is None else max(0, min(wanted, most - self.length - 1))

    def tally(self) -> Tally:
        """The model's counts.

        Raises:
          ValueError: backend="loki" has compiled no graph of it.
        """
        if self._tally is None:
            self._tally = tally_for(self.model.parameters())
        if self._tally is None:
            raise ValueError(
                f'found {type(self.model).__name__}, no call of which backend="loki" has compiled; '
                'needed model.compile(backend="loki") before it decodes.'
            )
        return self._tally

    def _of_tokens(self, name: str, each: Tensor, rule: int, first: int, last: int) -> Tensor:
        """What comes for tokens [first, last), given it for those up to `known`."""
        begins = self.known - each.shape[-1]
        if first < begins:
            raise ValueError(
                f"found {name} of the last {each.shape[-1]} tokens; needed those of the last "
                f"{self.known - first} or more."
            )
        had = each[..., first - begins : max(last - begins, 0)]
        new = last - max(first, self.known)
        if new <= 0:
            return had
        more = each[..., -1:].expand(*each.shape[:-1], new)
        if rule == _COUNT:
            gap = max(first, self.known) - self.known + 1
            more = more + torch.arange(gap, gap + new, device=each.device, dtype=each.dtype)
        elif rule == _ZERO:
            more = torch.zeros_like(more)
        return torch.cat((had, more), -1)

    def _mask_of(self, tokens: int) -> Tensor:
        mask: Tensor = self.mask
        if mask.shape[1] < tokens:
            ones = mask.new_ones((mask.shape[0], tokens - mask.shape[1]))
            self.mask = mask = torch.cat((mask, ones), 1)
        return mask if mask.shape[1] == tokens else mask[:, :tokens].contiguous()
