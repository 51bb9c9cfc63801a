"""Caches as transformers has them, by what their layers can do: which can be rewound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from loki_compile.lengths import forget_filled


def length_of(cache: Any) -> int:
    """Tokens that a cache holds: of its first layer, as all layers advance together.

    Raises:
      ValueError: it is no cache whose layers can be looked at.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, Sequence) or not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"found a cache of type {type(cache).__name__}; needed one of transformers, such as "
            "DynamicCache or StaticCache. For a cache of your own, rewind it yourself and call the "
            "model under loki_compile.exact()."
        )
    return int(cache.get_seq_length()) if layers else 0


def why_not(cache: Any, tokens: int) -> str:
    """Why a cache that holds so many tokens cannot be rewound, a sentence; "" where it can."""
    for number, layer in enumerate(cache.layers):
        reason = _why_not(layer, tokens)
        if reason:
            return (
                f"layer {number} of the cache ({type(layer).__name__}) cannot be rewound: {reason}"
            )
    return ""


def _why_not(layer: Any, tokens: int) -> str:
    if reason := getattr(layer, "why_not_rewound", ""):
        return str(reason)
    if hasattr(layer, "recurrent_states"):
        return "it carries a recurrent state, of which only the newest is there."
    if hasattr(layer, "_quantize"):
        return "its keys are stored quantised, those of several tokens together."
    if getattr(layer, "is_sliding", False):
        most = _most_unwrapped(layer)
        if tokens > most:
            return (
                f"with {tokens} tokens its window, which holds {most} of them, has wrapped, and "
                "what it held before is gone."
            )
    elif not (getattr(layer, "is_croppable", False) or isinstance(_counter(layer), Tensor)):
        return "it has no crop(), and no count of its tokens that could be set back."
    if hasattr(layer, "indexer_cumulative_length"):
        return "what it stores beside keys and values has a count of its own."
    return ""


def _most_unwrapped(layer: Any) -> int:
    """Tokens that a window holds before the first is written over, or falls out."""
    window = getattr(layer, "sliding_window", None)
    return window - 1 if isinstance(window, int) else int(layer.max_cache_len)


def _counter(layer: Any) -> Any:
    return getattr(layer, "cumulative_length", None)


def room_of(cache: Any) -> int | None:
    """Tokens that a cache has slots for, the least of its layers; None where it grows."""
    slots = [
        layer.max_cache_len
        for layer in cache.layers
        if hasattr(layer, "max_cache_len") and not getattr(layer, "is_sliding", False)
    ]
    return min(slots) if slots else None


def most_rewindable(cache: Any) -> int | None:
    """Tokens up to which a cache can be rewound, if it can at all; None: any number."""
    most = [_most_unwrapped(layer) for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return min(most, default=None)


def rewind(cache: Any, tokens: int) -> None:
    """Takes the last tokens off a cache that `why_not` has nothing against."""
    if tokens == 0:
        return
    for layer in cache.layers:
        if not getattr(layer, "is_initialized", True):
            continue
        if hasattr(layer, "crop"):
            layer.crop(-tokens)
            continue
        _counter(layer).sub_(tokens)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int -= tokens
        forget_filled(layer.keys)
