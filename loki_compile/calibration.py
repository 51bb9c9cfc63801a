"""`calibrate(model, batches)`: runs a model over text and fits a basis for each of its key caches.

The compiler's own front half does the work: Dynamo hands over each graph, `find_sites` finds the
attention cores (prefills too), and an interpreter runs the graph as it is while it shows every
core's keys and queries to a `KeyCovariance` or to `AttentionSamples`. A cache is known by the
weights that make its keys, so what is fitted here is found again in the decode graph, whatever that
looks like.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loki_compile.observation import Seen
from loki_compile.pca_store.attention_fit import RECENT, SINK
from loki_compile.pca_store.basis import BasisSet
from loki_compile.pca_store.metadata import CALIBRATIONS
from loki_compile.pca_store.partial import Partial
from loki_compile.progress import Kept, Pace, rope_parameters, run_key, versions
from loki_compile.watching import watched

FITTED_KINDS = ("attention", "pca", "score-optimal")

log = logging.getLogger("loki_compile")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    calibration: str = "post-rotary",
    kind: str = "score-optimal",
    rank: int | float = 0.5,
    name: str = "",
    source: str = "",
    progress: Callable[[int], None] | None = None,
    fit_progress: Callable[[int, int], None] | None = None,
    expect: Callable[[float], None] | None = None,
    partial: str | Path | None = None,
    refine_seconds: float | None = None,
) -> BasisSet:
    """Fits one basis per key cache of a decoder; the model is left as it was.

    What it has seen is given back: of each cache once it is fitted, and all of it at the end.

    Args:
        model: a decoder in eval mode. It is called with `input_ids=`, and with `use_cache=False`
            and `logits_to_keep=1` where its forward takes them.
        batches: each a tensor of token ids (B, T), or a mapping of keyword arguments. In a mapping,
            `attention_mask` (B, T) keeps padding out of the fit. Moved to the model's device. Make
            them as long as the contexts you decode: slow rotary dims look constant in short ones.
        calibration: "post-rotary" fits the keys as they are cached; "pre-rotary" the keys before
            the rotary embedding. The basis is applied to cached keys in both cases.
        kind: "score-optimal", in closed form from the moments of keys and queries, averaged over
            rotations of rotary pairs as far as every fourth prompt, kept apart, tells for each
            layer; "pca" of the keys (the paper's); or "attention", which starts from moments and is
            trained to find the keys that are attended. It keeps all prompts' keys in memory until
            the end (see `AttentionSamples`), and takes minutes for each layer's one second.
        rank: the columns of an "attention" basis, a count or a fraction of head_dim: the largest
            `rank` it can be used at. Other kinds hold all head_dim columns; "score-optimal" is
            measured at this one.
        name: the model's name, for display and for messages.
        source: what the text is, for display.
        progress: called with the number of tokens of each batch when it is done.
        fit_progress: called with the steps done and the steps in all while "attention" is fitted.
        expect: called with the seconds that reading and fitting will still take, as measured: after
            each batch from the first on, and while "attention" is fitted.
        partial: a folder in which to keep what was seen and fitted until the end, so that the same
            call goes on where one was stopped; as large as what "attention" keeps in memory.
            A file there that is damaged, or does not belong to this very run, is not used, with a
            warning. None: a stop loses everything.
        refine_seconds: how long the "attention" fits may take together: they have as many steps as
            fit in, 40 for each layer at least. None: 500 for each.

    Returns:
        One basis for each set of key weights, in the order in which the model uses them.

    Raises:
        ValueError: an unknown choice; no batches, or too short ones; no attention whose keys can be
            observed.
        RuntimeError: part of the model escaped compilation, so that its keys were not seen.
    """
    check_choices(calibration, kind, rank)
    model = getattr(model, "_orig_mod", model)
    device = next(model.parameters()).device
    seen = Seen(pre_rotary=calibration == "pre-rotary", kind=kind, rank=rank)
    sizes: list[int] = []
    if partial is not None or expect is not None:
        batches = list(batches)
        sizes = [_tokens(batch) for batch in batches]
    kept = None
    if partial is not None:
        settings = {"calibration": calibration, "kind": kind, "rank": rank}
        kept = Kept(Partial(partial, run_key(model, settings, batches)), device)
    try:
        done = kept.restore(seen) if kept is not None else 0
        pace = Pace(sum(sizes[done:]))
        reading = _Reading(model, seen, kept, pace, progress, expect)
        if not reading.all(batches, done):
            raise ValueError(
                "found no batches to calibrate with; needs at least one: pass more text."
            )
        if refine_seconds is not None and kind == "attention":
            pace.bound(seen, refine_seconds)
        bases = seen.fit(fit_progress, expect, pace, kept)
    finally:
        seen.forget()
    if kept is not None:
        kept.files.remove()
    return BasisSet(
        bases,
        model=name,
        calibration=calibration,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        rope=rope_parameters(model),
        source=source,
        versions=versions(),
    )


@dataclass(frozen=True)
class _Reading:
    """A model that reads batches, what is `seen` of it meanwhile, and who is told. What was seen
    is `kept` on the way, if anything is."""

    model: nn.Module
    seen: Seen
    kept: Kept | None
    pace: Pace
    progress: Callable[[int], None] | None
    expect: Callable[[float], None] | None

    def all(self, batches: Iterable[Tensor | Mapping[str, Any]], done: int) -> int:
        """Reads the batches behind those that are `done`; how many are then."""
        device = next(self.model.parameters()).device
        extra = _accepted(self.model, {"use_cache": False, "logits_to_keep": 1})
        with watched(self.model, self.seen.observe) as run:
            for number, batch in enumerate(batches):
                inputs = _inputs(batch, device)
                if number >= done:
                    self._one(number, _tokens(batch), functools.partial(run, **extra), inputs)
                if self.progress is not None:
                    self.progress(_tokens(batch))
                if self.expect is not None and number >= done:
                    self.pace.probe(self.seen)
                    self.expect(self.pace.left(self.seen))
                done = max(done, number + 1)
        return done

    def _one(
        self, number: int, tokens: int, run: Callable[..., Any], inputs: dict[str, Any]
    ) -> None:
        """
        Raises:
          ValueError, RuntimeError: keys that could not be seen.
        """
        seen, begin = self.seen, time.perf_counter()
        seen.start(inputs.get("attention_mask"))
        run(**inputs)
        if seen.error is not None:
            raise seen.error
        seen.per_batch = seen.per_batch or seen.in_batch
        if seen.in_batch < max(seen.per_batch, 1):
            raise _unseen(seen, seen.per_batch)
        if self.kept is not None:
            self.kept.keep(seen, number)
        self.pace.read(tokens, time.perf_counter() - (seen.running_since or begin))


def check_choices(calibration: str, kind: str, rank: int | float) -> None:
    """Refuses what `calibrate` does not know, before a model is loaded.

    Raises:
        ValueError: an unknown choice.
    """
    for what, value, allowed in (
        ("calibration", calibration, CALIBRATIONS),
        ("kind", kind, FITTED_KINDS),
    ):
        if value not in allowed:
            raise ValueError(f"{what}={value!r}: needs one of {', '.join(map(repr, allowed))}.")
    if kind == "attention" and calibration != "post-rotary":
        raise ValueError(
            f"calibration={calibration!r} with kind='attention': attention is made of rotated "
            "keys; needs calibration='post-rotary', or kind='pca' or 'score-optimal'."
        )
    count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not count and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ValueError(
            f"rank={rank!r}: needs a count >= 1 (int) or a fraction of head_dim in (0, 1] (float)."
        )


def check_lengths(batches: Sequence[Tensor], kind: str) -> None:
    """Refuses text that nothing can be fitted from, before a model is loaded.

    Raises:
        ValueError: no prompt, or none long enough for an "attention" basis.
    """
    longest = max((batch.shape[1] for batch in batches), default=0)
    needed = SINK + RECENT + 1 if kind == "attention" else 2
    if longest < needed:
        raise ValueError(
            f"the longest prompt holds {longest} tokens; a basis of kind {kind!r} needs {needed}: "
            "pass more text, or a larger --length"
        )


def _tokens(batch: Tensor | Mapping[str, Any]) -> int:
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 0


def _inputs(batch: Tensor | Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def _accepted(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the model's forward names."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _unseen(seen: Seen, expected: int) -> Exception:
    reasons = "".join(f"\n  {reason}" for reason in seen.reasons)
    if not seen.held:
        why = reasons or "\n  the model runs no attention that is understood"
        return ValueError(
            f"found no attention whose keys can be observed:{why}\n"
            "Needs a decoder in eval mode with queries, keys and values of its own; in "
            'transformers, attn_implementation="sdpa" is understood best.'
        )
    return RuntimeError(
        f"the keys of {seen.in_batch} caches were seen in this batch, {expected} in the first: "
        f"part of the model ran outside the compiled graph.{reasons}\n"
        "Pass batches of one shape."
    )
