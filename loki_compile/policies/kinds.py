"""What a layer does with its keys, in the words that `policy=` has for it. Imports nothing.

"loki", "oracle", ...   it chooses by that ranking, and reads what it chose
"oracle+dense", ...     it chooses, for others, and reads all keys itself
"dense"                 it reads all keys
"reuse"                 it reads what the nearest layer before it chose whose slots are its own
"reuse:2"               what layer 2 chose
"reuse:2:1,0,0"         KV head 0 what KV head 1 of layer 2 chose, KV heads 1 and 2 what 0 did
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

# The names of `table.RANKINGS`, and of plans for all layers at once (`presets`).
RANKINGS = ("loki", "oracle", "window", "quest", "unified")
PLANS = ("tidal", "tidal-published", "lessismore", "kascade")

_REUSE = re.compile(r"reuse(?::(\d+)(?::(\d+(?:,\d+)*))?)?")


@dataclass(frozen=True)
class Kind:
    """What one layer does.

    ranking: by which it chooses, "" where it does not. dense: it reads all keys. reuse: it reads
    what another chose, layer `source`, or the nearest before it where that is None; `heads` has the
    KV head of the source for each of its own (empty: the same).
    """

    ranking: str = ""
    dense: bool = False
    reuse: bool = False
    source: int | None = None
    heads: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.reuse:
            heads = ",".join(map(str, self.heads))
            parts = ["reuse", "" if self.source is None else str(self.source), heads]
            return ":".join(part for part in parts if part)
        return "+".join(part for part in (self.ranking, "dense" * self.dense) if part)


def kind_of(text: object) -> Kind:
    """The kind that a word of `policy=` names.

    Raises:
      ValueError: none of that name; the message names what there is.
    """
    word = text if isinstance(text, str) else ""
    if reuse := _REUSE.fullmatch(word):
        source = None if reuse[1] is None else int(reuse[1])
        heads = tuple(int(head) for head in reuse[2].split(",")) if reuse[2] else ()
        return Kind(reuse=True, source=source, heads=heads)
    if word == "dense":
        return Kind(dense=True)
    ranking = word.removesuffix("+dense")
    if ranking in RANKINGS:
        return Kind(ranking, dense=ranking != word)
    if text in PLANS:
        raise ValueError(
            f"policy={{...: {text!r}}}: that is a plan of all layers; needs policy={text!r} "
            "alone, or the kind of each layer."
        )
    near = difflib.get_close_matches(str(text), (*RANKINGS, *PLANS, "dense", "reuse"), n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ";"
    raise ValueError(
        f"policy={text!r}: there is none of that name{hint} needs one of "
        f"{', '.join(map(repr, (*RANKINGS, *PLANS)))}, or a dict from layers to the first "
        f'{len(RANKINGS)}, "NAME+dense", "dense" and "reuse".'
    )
