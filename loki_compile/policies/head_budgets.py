"""How many keys each KV head of a layer reads that ranks them, and the words for it. Imports no
PyTorch.

"0.25N"       the best quarter of the N keys that a row sees, by the layer's ranking; any span
              that `kernels.spans` reads: "512", "64+0.1N", "64|-1024+1N"
"last=0.25N"  as many keys, none of them ranked: the `sink` first ones and the last ones
"from=2.1"    what KV head 1 of layer 2 chose
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loki_compile.kernels.spans import Span, span_of

LAST, FROM = "last", "from"
_FROM = re.compile(r"(\d{1,9})\.(\d{1,9})")


@dataclass(frozen=True)
class HeadBudget:
    """What one KV head reads: by `span` so many of the keys that a row sees, which it ranks, or
    which are the first and the `last` ones; or, where that is None, what the KV head `head` of
    layer `source` chose."""

    span: Span | None
    last: bool = False
    source: int = -1
    head: int = 0

    @property
    def ranks(self) -> bool:
        return self.span is not None and not self.last

    def __str__(self) -> str:
        if self.span is None:
            return f"{FROM}={self.source}.{self.head}"
        return f"{LAST}={self.span}" if self.last else str(self.span)


def budgets_text(budgets: Sequence[HeadBudget]) -> str:
    """The budgets of KV heads as one word: "512,last=0.125N,from=2.1"."""
    return ",".join(map(str, budgets))


def budgets_from(text: str) -> tuple[HeadBudget, ...]:
    """The budgets that `budgets_text` wrote.

    Raises:
      ValueError: a part that is none; the message names what it could be.
    """
    return tuple(map(_budget, text.split(",")))


def _budget(text: str) -> HeadBudget:
    name, equals, value = text.partition("=")
    if not equals or name == LAST:
        span = span_of(value if equals else text)
        if all(alpha <= 0 and beta == 0 for alpha, beta in span.lines):
            raise ValueError(f'found {text!r:.60}; needed keys: more than none, such as "512"')
        return HeadBudget(span, last=bool(equals))
    if name == FROM:
        if found := _FROM.fullmatch(value):
            return HeadBudget(None, source=int(found[1]), head=int(found[2]))
        raise ValueError(
            f'found {text!r:.60}; needed a layer and a KV head of it, such as "{FROM}=2.1"'
        )
    near = difflib.get_close_matches(name, (LAST, FROM), n=1)
    hint = f'; did you mean "{near[0]}={value:.40}"? Needed' if near else "; needed"
    raise ValueError(
        f'found {text!r:.60}{hint} keys such as "512" or "0.25N", "{LAST}=0.25N", or "{FROM}=2.1"'
    )
