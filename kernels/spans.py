"""How many of the last keys each KV head reads, where that is a span alpha + beta N of the N keys
that a row sees (MoA, arXiv 2406.14909): the one formula, and its text. Needs no PyTorch.

`positions.span_ranges` has the same for tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ONE_Q16 = 1 << 16
MOST_KEYS = 1 << 30

_SHARE = r"[0-9]{1,2}(?:\.[0-9]{1,9})?"
_LINE = re.compile(rf"(?:(-?[0-9]{{1,10}})(?:\+({_SHARE})N)?|({_SHARE})N)")


@dataclass(frozen=True)
class Span:
    """The last keys that a head reads: of its lines (alpha keys, beta in 1/65536) the one that is
    longest at N.

    Raises:
      ValueError: no line, a beta outside 0 to 1, or more keys than there can be.
    """

    lines: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("found a span without a line alpha+betaN; needed one")
        for alpha, beta in self.lines:
            if not isinstance(alpha, int) or not -MOST_KEYS <= alpha <= MOST_KEYS:
                raise ValueError(f"found alpha {alpha!r:.40} of a span; needed a count of keys")
            if not isinstance(beta, int) or not 0 <= beta <= ONE_Q16:
                shown = beta / ONE_Q16 if isinstance(beta, int) else beta
                raise ValueError(f"found beta {shown!r:.40} of a span; needed 0 to 1")

    @classmethod
    def of(cls, *lines: tuple[float, float]) -> Span:
        """From (alpha in keys, beta as a fraction): alpha rounded, beta to 1/65536; without lines
        that are never the longest."""
        every = dict.fromkeys((round(alpha), round(beta * ONE_Q16)) for alpha, beta in lines)
        shorter = lambda line, than: line != than and line[0] <= than[0] and line[1] <= than[1]  # noqa: E731
        return cls(tuple(x for x in every if not any(shorter(x, other) for other in every)))

    def keys(self, visible: int) -> int:
        """Keys of a row that sees so many, before the least that any head reads: 0 to `visible`."""
        longest = max(alpha + (beta * visible >> 16) for alpha, beta in self.lines)
        return min(max(longest, 0), visible)

    @property
    def whole(self) -> bool:
        """Whether it covers all keys, however many there are."""
        return any(beta == ONE_Q16 and alpha >= 0 for alpha, beta in self.lines)

    def __str__(self) -> str:
        return "|".join(map(_shown, self.lines))


def _shown(line: tuple[int, int]) -> str:
    alpha, beta = line
    # The shortest that is read as the same.
    shares = (f"{beta / ONE_Q16:.{digits}f}" for digits in range(7))
    share = next(each for each in shares if round(float(each) * ONE_Q16) == beta)
    if beta == 0:
        return str(alpha)
    return f"{share}N" if alpha == 0 else f"{alpha}+{share}N"


def span_of(text: str) -> Span:
    """The span that a text says: "1024", "0.125N", "-1024+1N", "64|-1024+1N" (the longer one).

    Raises:
      ValueError: it says none.
    """
    lines: list[tuple[float, float]] = []
    for part in text.split("|"):
        found = _LINE.fullmatch(part)
        if found is None:
            raise ValueError(
                f'found a span {text!r:.60}; needed keys, "0.25N", "512+0.25N", or several with "|"'
            )
        lines.append((int(found[1] or 0), float(found[2] or found[3] or 0)))
    return Span.of(*lines)


@dataclass(frozen=True)
class Spans:
    """What the KV heads of one layer read: the `sink` first keys that a row sees and a span of the
    last ones, never fewer than `recent`; all keys where a row sees fewer than `min_keys`.

    heads: of each KV head; one alone is that of all.
    """

    heads: tuple[Span, ...]
    sink: int
    recent: int = 1
    min_keys: int = 0

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError("found no span of a KV head; needed one of each, or one for all")

    def keys(self, visible: int) -> tuple[int, ...]:
        """Keys that a row reads which sees so many, sinks and span without counting any twice."""
        if visible < self.min_keys:
            return (visible,) * len(self.heads)
        widths = (max(span.keys(visible), self.recent, 1) for span in self.heads)
        return tuple(min(visible, self.sink + width) for width in widths)

    def most(self, visible: int) -> int:
        """Keys that the head reads which reads the most."""
        return max(self.keys(visible))

    def covers(self, visible: int) -> bool:
        return min(self.keys(visible)) >= visible

    def share(self, visible: int) -> float:
        """Of the keys that a row sees, the share that its KV heads read on average."""
        read = self.keys(visible)
        return sum(read) / (len(read) * max(visible, 1))

    @property
    def whole(self) -> bool:
        return all(span.whole for span in self.heads)

    @property
    def numbers(self) -> tuple[tuple[tuple[tuple[int, int], ...], ...], int, int, int]:
        """All of it, as a graph can hold it."""
        return tuple(span.lines for span in self.heads), self.sink, self.recent, self.min_keys


def spans_from(
    heads: tuple[tuple[tuple[int, int], ...], ...], sink: int, recent: int, min_keys: int
) -> Spans:
    """The spans of which these are the `numbers`."""
    return Spans(tuple(Span(lines) for lines in heads), sink, recent, min_keys)


def heads_text(heads: Sequence[Span]) -> str:
    """The spans of KV heads as one word: "1024,0.125N"."""
    return ",".join(map(str, heads))


def heads_from(text: str) -> tuple[Span, ...]:
    """The spans that `heads_text` wrote.

    Raises:
      ValueError: a part that is no span.
    """
    return tuple(map(span_of, text.split(",")))
