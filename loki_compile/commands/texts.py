"""Text for searches: prompts to read, and what lies behind them to judge by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loki_compile.commands.models import encode
from loki_compile.commands.output import say

# Prompts' worth of text, at most, that held-out passages are spread over.
SPREAD = 32


def prompts_of(
    tokenizer: Any, text: str, prompts: int, length: int, steps: int, passages: int
) -> tuple[Tensor, Tensor]:
    """Token ids of prompts to read (n, length), and of all text behind them that plans are judged
    by (T,), in so many passages of which `steps` tokens are decoded.

    Raises:
        ValueError: the text does not hold one prompt and as much held out.
    """
    least = length + passages * steps
    # Passages are spread over all that lies behind the prompts: text of several kinds judges best.
    ids = encode(tokenizer, text[: 16 * (prompts + SPREAD) * (length + steps)])
    if len(ids) < length + least:
        raise ValueError(
            f"the text holds {len(ids)} tokens; needs {length + least}, one prompt and as much "
            "held out: pass more text, or a smaller --length"
        )
    count = min(prompts, (len(ids) - least) // length)
    if count < prompts:
        say(f"the text holds {count} prompts of the {prompts} asked for")
    return ids[: count * length].view(count, length), ids[count * length :]
