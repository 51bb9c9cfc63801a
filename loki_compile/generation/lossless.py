"""Dense decoding's tokens at the price of sparse ones: sparse steps draft, a dense step verifies.

The dense step takes all drafts at once, so that weights and cache are read once for several tokens.
It overwrites what drafting has left in the cache, keys, values and index rows, and what was not
accepted is taken off: behind each cycle the cache is dense decoding's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loki_compile.exact_steps import exact, resting
from loki_compile.generation import verdicts
from loki_compile.generation.correction import require_one_path
from loki_compile.generation.feed import Feed
from loki_compile.generation.pace import Pace
from loki_compile.passes.attention import MAX_QUERY_TOKENS

# Drafts that a verifying step takes, beside the token before them.
MOST_DRAFTS = MAX_QUERY_TOKENS - 1

# Scores (B, V) of what comes behind the tokens (B, T), given logits (B, V).
Scores = Callable[[Tensor, Tensor], Tensor]


class LosslessDecoder:
    """For decode loops of one's own: the tokens that dense decoding gives, several at a time.

        decoder = LosslessDecoder(model, cache)   # behind the prompt
        newest = logits[:, -1:].argmax(-1)        # (B, 1), not in the cache yet
        while ...:
            tokens = decoder.next(newest)         # (B, n), n >= 1
            newest = tokens[:, -1:]

    Behind each call the cache holds all tokens but the newest.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        *,
        drafts: int = MOST_DRAFTS,
        sample: bool = False,
        **inputs: Any,
    ) -> None:
        """
        Args:
          model: compiled by backend="loki".
          cache: of transformers, static or growing, that holds the prompt.
          drafts: tokens to draft at a time at most; how many it is adapts.
          sample: draw tokens by their probabilities (of `scores`) instead of taking the best.
          inputs: what the loop gives the model beside tokens and cache, if anything:
            `attention_mask` (B, all cached tokens), `position_ids` (B, any) up to that of the last
            cached token. Both go on by themselves.

        Raises:
          ValueError: `drafts` out of range, a cache that cannot be rewound, or a model that several
            processes share.
        """
        check_drafts(drafts)
        _require_one_process(model)
        self.sample = sample
        self.feed = Feed(model, cache, inputs)
        self.pace = Pace(drafts)
        self.feed.require_rewinding(self.feed.length)

    @torch.no_grad()
    def next(
        self,
        newest: Tensor,
        *,
        most: int | None = None,
        scores: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Decodes on.

        Args:
          newest: int64 (B, 1), the token that is not in the cache yet.
          most: tokens to return at most; None: as many as come.
          scores: of logits (B, V), what is drawn from or maximised (temperature, top-p).

        Returns:
          int64 (B, n), n >= 1: the tokens behind `newest`. Rows go on together.

        Raises:
          ValueError: backend="loki" has compiled no call of the model, or the cache is full.
        """
        room = self.feed.room
        if room < 1:
            raise ValueError(
                f"found a cache that is full with {self.feed.length} tokens; needed one with room."
            )
        limit = min(room, most if most is not None else room) - 1
        limit = self.feed.drafts(limit)  # none where a window would wrap: dense from there on
        made = None if scores is None else lambda _, logits: scores(logits)
        tokens, _ = cycle(self.feed, self.pace, newest, limit, self.sample, made)
        self.feed.tally()
        return tokens


def lossless(drafts: int = MOST_DRAFTS, *, streamer: Any = None) -> Callable[..., Any]:
    """For `model.generate(..., custom_generate=loki_compile.lossless())`: the tokens of dense
    decoding, greedy or sampled, sooner.

    Args:
      drafts: tokens to draft at a time at most; how many it is adapts to what is accepted.
      streamer: takes tokens as they come (transformers hands its own to no loop but its own).

    Raises:
      ValueError: `drafts` out of range; in `generate`: the model is not compiled by backend="loki",
        its cache cannot be rewound, several processes share it, or what is asked for are beams,
        attentions, hidden states, or scores that depend on how often they were asked for (guidance,
        SynthID's watermark). Processors of one's own must be functions of tokens and scores.
    """
    check_drafts(drafts)
    return functools.partial(_generate, Pace(drafts), streamer)


def check_drafts(drafts: int) -> None:
    """
    Raises:
      ValueError: no number of drafts.
    """
    if not isinstance(drafts, int) or isinstance(drafts, bool) or not 1 <= drafts <= MOST_DRAFTS:
        raise ValueError(
            f"drafts={drafts!r}: needs a count from 1 to {MOST_DRAFTS}, which one dense step takes."
        )


def cycle(
    feed: Feed,
    pace: Pace,
    ids: Tensor,
    limit: int,
    sample: bool = False,
    scores: Scores | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Drafts up to `limit` tokens behind `ids` (B, T), the last of which is not in the cache yet,
    and verifies them. `counts`: bool (B,), rows whose tokens matter; None: all.

    Returns:
      the tokens (B, n) and, for each, the logits and scores (B, n, V) that it was chosen by.
    """
    began = pace.clock()
    number = pace.next(limit)
    if number == 0:
        with resting():
            logits = feed(ids[:, -1:])
        made = _scored(scores, ids, logits[:, -1])
        tokens = _choose(made, sample)
        pace.took(0, 0, pace.clock() - began)
        return tokens, (logits, made.unsqueeze(1))
    drafted: list[Tensor] = []
    path = ids
    for _ in range(number):
        made = _scored(scores, path, feed(path[:, -1:])[:, -1])
        path = torch.cat((path, _choose(made, sample)), 1)
        if sample:
            drafted.append(made)
    feed.rewind(number)
    with exact():
        logits = feed(path[:, ids.shape[1] - 1 :])
    every = [_scored(scores, path[:, : ids.shape[1] + n], logits[:, n]) for n in range(number + 1)]
    made = torch.stack(every, 1)
    drafts = path[:, ids.shape[1] :]
    if sample:
        accepted, instead = verdicts.sampled(drafts, torch.stack(drafted, 1), made)
    else:
        accepted, instead = verdicts.greedy(drafts, made)
    if counts is None:
        counts = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    tokens = verdicts.agreed(accepted, drafts, instead, counts)
    taken = tokens.shape[1]
    feed.rewind(number + 1 - taken)
    pace.took(number, taken - 1, pace.clock() - began)
    return tokens, (logits[:, :taken], made[:, :taken])


def _require_one_process(model: Any, synced: bool = False) -> None:
    """
    Raises:
      ValueError: processes, each of which would draft as many tokens as its own clock says, have
        parts of one model.
    """
    parts = getattr(model, "tp_size", None) or 1
    if parts > 1 or synced:
        found = f"a model that {parts} processes share" if parts > 1 else "synced_gpus=True"
        raise ValueError(f"loki_compile.lossless: found {found}; needed a model of one process.")


def _require_pure_scores(config: Any) -> None:
    """
    Raises:
      ValueError: processors that keep a state would be asked for drafts that are not taken.
    """
    found = ""
    if getattr(config, "guidance_scale", None) not in (None, 1):
        found = f"guidance_scale={config.guidance_scale}"
    watermark = getattr(config, "watermarking_config", None)
    if hasattr(watermark, "ngram_len"):  # SynthID's
        found = f"watermarking_config of type {type(watermark).__name__}"
    if found:
        raise ValueError(
            f"loki_compile.lossless: found {found}; needed scores that depend on tokens alone."
        )


def _scored(scores: Scores | None, path: Tensor, logits: Tensor) -> Tensor:
    if scores is None:
        return logits.float()
    return scores(path, logits.to(torch.float32, copy=True))  # which may write into it


def _choose(scores: Tensor, sample: bool) -> Tensor:
    """(B, 1) of (B, V)."""
    if sample:
        return torch.multinomial(scores.softmax(-1), 1)
    return scores.argmax(-1, keepdim=True)


def _generate(
    pace: Pace,
    streamer: Any,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """The loop of `generate`, with its own prompt, scores and criteria."""
    config = generation_config
    require_one_path(model, config, model_kwargs, "lossless")
    _require_one_process(model, model_kwargs.pop("synced_gpus", False))
    _require_pure_scores(config)
    if streamer is not None:
        streamer.put(input_ids.cpu())  # as `generate` does with one that it was given
    else:
        streamer = model_kwargs.pop("streamer", None)
    _require_tokens_alone(config)
    prompt = input_ids.shape[1]
    text = _Text(config, stopping_criteria, streamer, input_ids)
    logits = model._prefill(input_ids, config, model_kwargs).logits[:, -1:]
    feed = Feed(model, model_kwargs["past_key_values"], model_kwargs, prepared=True)
    feed.tally()
    feed.require_rewinding(feed.length + config.max_length - 1 - prompt)
    scores: Any = logits_processor if len(logits_processor) else None
    made = _scored(scores, input_ids, logits[:, -1]).unsqueeze(1)
    tokens = _choose(made[:, 0], config.do_sample)
    while (over := text.take(tokens, logits, made)) is None:
        limit = min(config.max_length - text.ids.shape[1], feed.room) - 1
        tokens, (logits, made) = cycle(
            feed, pace, text.ids, limit, config.do_sample, scores, text.going
        )
    feed.rewind(over)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return text.ids
    output: Any = importlib.import_module(type(model)._sample.__module__)
    return output.GenerateDecoderOnlyOutput(
        sequences=text.ids,
        scores=tuple(text.scores) if config.output_scores else None,
        logits=tuple(text.logits) if config.output_logits else None,
        past_key_values=feed.cache,
    )


def _require_tokens_alone(config: Any) -> None:
    """
    Raises:
      ValueError: what is asked for beside tokens and scores, drafts have too.
    """
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, False):
            raise ValueError(
                f"loki_compile.lossless: found {name}=True; needed False: drafts have them too."
            )


class _Text:
    """What `generate` returns, as it becomes longer: `ids` (B, T) with the prompt, and scores and
    logits (B, V) of each token where they are asked for. Rows that are `going` (B,) have no end."""

    def __init__(self, config: Any, stopping_criteria: Any, streamer: Any, ids: Tensor) -> None:
        self.config, self.stopping_criteria, self.streamer = config, stopping_criteria, streamer
        self.ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.ids = ids
        self.going = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def take(self, tokens: Tensor, logits: Tensor, made: Tensor) -> int | None:
        """Takes tokens (B, n), chosen by logits and scores (B, n, V), until no row goes on: how
        many are left over then; None while one does."""
        config = self.config
        wanted = config.return_dict_in_generate
        for n, token in enumerate(tokens.unbind(1)):
            if self.ends:
                token = torch.where(self.going, token, config._pad_token_tensor.to(token))
            self.ids = torch.cat((self.ids, token.unsqueeze(1)), 1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            if wanted:
                self.scores += [_kept(made[:, n])] if config.output_scores else []
                self.logits += [_kept(logits[:, n])] if config.output_logits else []
            done = self.stopping_criteria(self.ids, tuple(self.scores) or None)
            self.going = self.going & ~done
            if not self.going.any():
                return tokens.shape[1] - 1 - n
        return None


def _kept(scores: Tensor) -> Tensor:
    """What outlives the step that it came from, whose memory the next one may write over."""
    return scores.to(torch.float32, copy=True)
