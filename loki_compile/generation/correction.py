"""Tokens that were decoded sparsely go through dense attention once more, and overwrite what sparse
steps left of them in the cache: keys, values, index rows.

Layers above the first sparse one read what it computed, so their keys and values differ from those
of dense decoding for every token that was decoded sparsely; a correction every so many steps keeps
that from adding up. Tokens that were given out stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loki_compile.exact_steps import exact
from loki_compile.generation.feed import Feed
from loki_compile.passes.attention import MAX_QUERY_TOKENS


@torch.no_grad()
def correct(model: Any, cache: Any, tokens: Tensor, **inputs: Any) -> None:
    """Decodes the last tokens of a cache once more, densely, for decode loops of one's own.

    Args:
      model: compiled by backend="loki".
      cache: of transformers, static or growing.
      tokens: int64 (B, N), the last N tokens that the cache holds. (The newest one that was chosen
        is not among them: it goes into the cache at the next step.)
      inputs: what the loop gives the model beside tokens and cache, if anything: `attention_mask`
        (B, all cached tokens), `position_ids` (B, N) of these tokens.

    Raises:
      ValueError: the model is not compiled by backend="loki", the cache cannot be rewound (windows
        that have wrapped, recurrent states, quantised keys), or it holds fewer tokens.
    """
    feed = Feed(model, cache, inputs)
    feed.tally()
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[1] < 1:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"found tokens of shape {found}; needed (B, N), N at least 1.")
    if tokens.shape[1] > feed.length:
        raise ValueError(
            f"found {tokens.shape[1]} tokens to correct in a cache that holds {feed.length}; "
            "needed the last ones that it holds, at most all of them."
        )
    feed.require_rewinding(feed.length)
    _again(feed, tokens)


def _again(feed: Feed, tokens: Tensor) -> None:
    """The oldest first: later ones read what these have become."""
    feed.rewind(tokens.shape[1])
    with exact():
        for part in tokens.split(MAX_QUERY_TOKENS, 1):
            feed(part)


def corrected(every: int = 32, *, streamer: Any = None) -> Callable[..., Any]:
    """For `model.generate(..., custom_generate=loki_compile.corrected(every=32))`: sampling or
    greedy decoding as `generate` does it, with the cache corrected every so many steps.

    Args:
      streamer: takes tokens as they come (transformers hands its own to no loop but its own).

    Raises:
      ValueError: `every` is no count of steps; in `generate`: what `correct` raises, beams, or no
        cache.
    """
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every={every!r}: needs a count of steps >= 1.")

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        require_one_path(model, generation_config, model_kwargs, "corrected")
        corrector = _Corrector(model, every, input_ids.shape[1], generation_config, model_kwargs)
        watching = type(stopping_criteria)([*stopping_criteria, corrector])
        if streamer is not None:
            streamer.put(input_ids.cpu())  # as `generate` does with one that it was given
            model_kwargs["streamer"] = streamer
        # As `generate` itself: the loop of the class.
        return type(model)._sample(
            model, input_ids, logits_processor, watching, generation_config, **model_kwargs
        )

    return decode


class _Corrector:
    """A criterion that stops nothing: it sees each token, and every so many corrects the cache."""

    def __init__(
        self, model: Any, every: int, prompt: int, config: Any, inputs: dict[str, Any]
    ) -> None:
        self.every = every
        self.exact_until = prompt  # tokens of `input_ids` that are as dense decoding leaves them
        self.prompt = prompt
        self.most = config.max_length - 1 - prompt
        # Tokens of the cache that came otherwise than by `input_ids`: as embeddings, or before.
        self.before = 0
        self.model = model
        self.cache = inputs["past_key_values"]
        self.inputs = {k: v for k, v in inputs.items() if k not in ("streamer", "synced_gpus")}
        self.feed: Feed | None = None
        self.sparse_steps = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        cached = input_ids.shape[1] - 1  # the newest is not in the cache yet
        if self.feed is None:  # behind the prompt: now the cache has its layers
            self.feed = Feed(self.model, self.cache, self.inputs, prepared=True)
            self.before = self.feed.length - self.prompt
            self.sparse_steps = self.feed.tally().counts["sparse_steps"]
            self.feed.require_rewinding(self.feed.length + self.most)
        if cached - self.exact_until >= self.every:
            ran = self.feed.tally().counts["sparse_steps"]
            if ran != self.sparse_steps:
                self.feed.length = self.before + cached
                _again(self.feed, input_ids[:, self.exact_until : cached])
                self.sparse_steps = ran
            self.exact_until = cached
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def require_one_path(model: Any, config: Any, inputs: dict[str, Any], name: str) -> None:
    """
    Raises:
      ValueError: `generate` was asked for what a loop over one sequence for each row is not.
    """
    found = needed = ""
    if getattr(model.config, "is_encoder_decoder", False):
        found, needed = "an encoder-decoder model", "a decoder"
    elif config.num_beams > 1:
        found, needed = f"num_beams={config.num_beams}", "greedy decoding or sampling"
    elif not inputs.get("use_cache", True) or inputs.get("past_key_values") is None:
        found, needed = "use_cache=False", "a cache"
    if found:
        raise ValueError(f"loki_compile.{name}: found {found}; needed {needed}.")
