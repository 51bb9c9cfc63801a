"""What a layer does with its keys, in the words that `policy=` has for it. Imports no PyTorch.

"loki", "oracle", ...   it chooses by that ranking, and reads what it chose
"oracle+dense", ...     it chooses, for others, and reads all keys itself
"dense"                 it reads all keys
"reuse"                 it reads what the nearest layer before it chose whose slots are its own
"reuse:2"               what layer 2 chose
"reuse:2:1,0,0"         KV head 0 what KV head 1 of layer 2 chose, KV heads 1 and 2 what 0 did
"moa"                   each KV head reads the first keys and a span of the last ones, as planned
"moa:64:1024,0.25N"     KV head 0 the 64 first and 1024 last keys, KV head 1 the 64 first and the
                        last quarter of the N that a row sees; one span is that of all heads
"loki:512,0.25N"        KV head 0 chooses 512 keys, KV head 1 a quarter of those that a row sees,
                        whatever `top_k` is; one budget is that of all heads; "oracle:..." alike
"loki:512,last=0.25N"   KV head 1 the first keys and the last ones, as many in all
"loki:512,from=2.1"     KV head 1 what KV head 1 of layer 2 chose
"loki:512,0.25N+dense"  chooses so for others, and reads all keys itself
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from loki_compile.kernels.spans import Span, heads_from, heads_text
from loki_compile.policies.head_budgets import HeadBudget, budgets_from, budgets_text

# The names of `table.RANKINGS`, and of plans for all layers at once (`presets`).
RANKINGS = ("loki", "oracle", "window", "quest", "unified", "sparq", "moa")
# Those that read the keys themselves to rank them.
BY_KEYS = ("oracle", "unified", "sparq")
# Those that rank in as many dims as the option `rank` says.
IN_DIMS = ("loki", "sparq")
# Those that read ranges of keys, and choose none that another layer could read.
SPANS = "moa"
# Those whose KV heads may have budgets of their own.
BUDGETED = ("loki", "oracle")
PLANS = ("tidal", "tidal-published", "lessismore", "kascade")
# Why what they rank by, if anything, weighs no keys.
_UNWEIGHED = {
    "window": "ranks nothing",
    "quest": "ranks by bounds of pages, which are no scores of keys",
    "unified": "has heads name keys in turn, which nothing weighs",
    "moa": "reads spans and ranks nothing",
}

_REUSE = re.compile(r"reuse(?::(\d+)(?::(\d+(?:,\d+)*))?)?")
_SPANS = re.compile(rf"{SPANS}:(\d{{1,9}}):(.+)")


@dataclass(frozen=True)
class Kind:
    """What one layer does.

    ranking: by which it chooses, "" where it does not. dense: it reads all keys. reuse: it reads
    what another chose, layer `source`, or the nearest before it where that is None; `heads` has the
    KV head of the source for each of its own (empty: the same). spans: of the last keys, of each
    KV head or one for all, behind the `sink` first ones; empty where the plan of the model says.
    budgets: of each KV head or one for all, where these and not `top_k` say what it reads.
    """

    ranking: str = ""
    dense: bool = False
    reuse: bool = False
    source: int | None = None
    heads: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    sink: int = 0
    budgets: tuple[HeadBudget, ...] = ()

    @property
    def borrows(self) -> bool:
        """Whether some of its KV heads read what a head of another layer chose."""
        return any(each.span is None for each in self.budgets)

    @property
    def sources(self) -> tuple[int, ...]:
        """The layers that it names as those whose choice it reads."""
        named = {each.source for each in self.budgets if each.span is None}
        return tuple(sorted(named if self.source is None else {*named, self.source}))

    def __str__(self) -> str:
        if self.reuse:
            heads = ",".join(map(str, self.heads))
            parts = ["reuse", "" if self.source is None else str(self.source), heads]
            return ":".join(part for part in parts if part)
        if self.spans:
            return f"{self.ranking}:{self.sink}:{heads_text(self.spans)}"
        word = f"{self.ranking}:{budgets_text(self.budgets)}" if self.budgets else self.ranking
        return "+".join(part for part in (word, "dense" * self.dense) if part)


def why_unweighed(name: str) -> str:
    """Why a word of `policy=`, or a plan's name, has no weights of keys by which a budget could be
    chosen; "" where it has, or chooses nothing."""
    if name in PLANS:
        name = "unified" if name == "lessismore" else "oracle"
    elif name.endswith((".json", ".tsv")) or ".tsv@" in name:
        return ""  # what the file holds is seen when it is read
    return _UNWEIGHED.get(kind_of(name).ranking if name not in RANKINGS else name, "")


def why_no_mass(name: str) -> str:
    """Why the keys of a word of `policy=`, or of a plan, are not as many as hold a mass; "" where
    they may be."""
    budgets = "" if name in PLANS or name.endswith((".json", ".tsv")) or ".tsv@" in name else name
    if budgets and kind_of(budgets).budgets:
        return "has budgets of its own for its KV heads"
    return why_unweighed(name)


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
    if spans := _SPANS.fullmatch(word):
        try:
            return Kind(SPANS, spans=heads_from(spans[2]), sink=int(spans[1]))
        except ValueError as error:
            raise ValueError(f"policy={text!r:.80}: {error}.") from None
    if word == f"{SPANS}+dense":
        raise ValueError(
            f"policy={text!r}: {SPANS!r} reads ranges and chooses for nobody: needs a layer that "
            f'ranks keys, such as "{RANKINGS[0]}+dense", or {SPANS!r}.'
        )
    ranking, colon, heads_of = word.removesuffix("+dense").partition(":")
    if ranking in RANKINGS and not colon:
        return Kind(ranking, dense=word.endswith("+dense"))
    if colon and ranking in RANKINGS and ranking != SPANS:
        return _budgeted(word, ranking, heads_of)
    if text in PLANS:
        raise ValueError(
            f"policy={{...: {text!r}}}: that is a plan of all layers; needs policy={text!r} "
            "alone, or the kind of each layer."
        )
    near = difflib.get_close_matches(str(text), (*RANKINGS, *PLANS, "dense", "reuse"), n=1)
    if colon and (close := difflib.get_close_matches(ranking, BUDGETED, n=1)):
        near = [word.replace(ranking, close[0], 1)]
    hint = f'; did you mean "{near[0]:.80}"?' if near else ";"
    raise ValueError(
        f"policy={text!r:.80}: there is none of that name{hint} needs one of "
        f"{', '.join(map(repr, (*RANKINGS, *PLANS)))}, or a dict from layers to the first "
        f'{len(RANKINGS)}, "NAME+dense", "dense" and "reuse".'
    )


def _budgeted(word: str, ranking: str, text: str) -> Kind:
    """The kind of a layer that ranks keys, with a budget for each KV head in `text`.

    Raises:
      ValueError: a ranking without such budgets, a budget that is none, or one that is of no use.
    """
    dense = word.endswith("+dense")
    if ranking not in BUDGETED:
        instead = " or ".join(f'"{name}:{text:.40}"' for name in BUDGETED)
        raise ValueError(
            f"policy={word!r:.80}: KV heads of {ranking!r} have no budgets of their own: needs "
            f"{instead}."
        )
    try:
        budgets = budgets_from(text)
    except ValueError as error:
        raise ValueError(f"policy={word!r:.80}: {error}.") from None
    lent = next((each for each in budgets if each.span is None), None)
    if dense and lent is not None:
        raise ValueError(
            f'policy={word!r:.80}: a layer that reads all keys itself has no use for "{lent}": '
            f'needs a span in its place, such as "512", or the word without "+dense".'
        )
    return Kind(ranking, dense=dense, budgets=budgets)
