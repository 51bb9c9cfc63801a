"""What a model is asked behind long contexts: tasks in the manner of RULER, made here.

Each task hides something in filler and asks for it (Hsieh et al., *RULER*, 2024): needles (single,
one of several keys, several values, several queries), a pass key at a given depth, variables that
are set to one another, the most common and the most frequent words. A prompt is cut into what is
read before (the context) and what comes after all of it is read (the question and the beginning of
the answer), in the model's own tokens and chat template. A seed fixes all of it.

*Recall* is the bundled model's own task (`reference_data`), for tokenizers that have its words.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

# The question begins at such a multiple before the end: decode steps take up to 8 tokens.
CHUNK = 8
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ADJECTIVES = """
amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow noble odd pale quiet
rapid silent tender upper vivid warm young zesty bitter clever dizzy early fancy
"""
_NOUNS = """
anchor basket candle desert engine forest garden harbor island jacket kettle ladder mirror needle
orange pencil quarry ribbon saddle tunnel urn valley window yard zipper bridge castle doctor elbow
feather
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
_KEYS = len(ADJECTIVES) * len(NOUNS)
# A place in a chat template.
_HERE = "@@HERE@@"


@dataclass(frozen=True)
class Prompt:
    """Text of one prompt: what is read, what is asked then, how the answer begins, what must be in
    it."""

    context: str
    question: str
    lead: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """make(seed, units, depth): a prompt with so much filler; depth None: places by the seed.
    new_tokens: for each answer, and once."""

    make: Callable[[int, int, float | None], Prompt]
    new_tokens: tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One prompt in tokens.

    context: what is prefilled. rest: what follows and is fed to the decode path: the question, or
    of text what it continues with. answers: strings, of which a share is found in what is
    generated, up to `new_tokens` or one of `until`. weighed: tokens at the end of `rest` that are
    an answer whose likelihood is asked. queries: of text, (place in `rest`, the token that must be
    predicted there). depth: of the needle, 0 to 1.
    """

    task: str
    length: int
    seed: int
    context: tuple[int, ...]
    rest: tuple[int, ...]
    depth: float | None = None
    answers: tuple[str, ...] = ()
    new_tokens: int = 0
    queries: tuple[tuple[int, int], ...] = ()
    weighed: int = 0
    until: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        return not (self.new_tokens or self.weighed)

    @property
    def key(self) -> str:
        """Names the case, whatever else a run holds."""
        ids = ",".join(map(str, (*self.context, 0, *self.rest)))
        if self.weighed or self.until:
            ids += f",{self.weighed},{self.until}"
        depth = "" if self.depth is None else f"{self.depth:g}"
        return f"{self.task}/{self.length}/{depth}/{self.seed}/{zlib.crc32(ids.encode()):08x}"


def score(case: Case, generated: str) -> float:
    """The share of the answers that are found in a text, as RULER has it."""
    lower = generated.lower()
    return sum(answer.lower() in lower for answer in case.answers) / len(case.answers)


# ------------------------------------------------------------------------------------ the tasks


def _keys(rng: random.Random, count: int) -> list[str]:
    picked = rng.sample(range(_KEYS), count)
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in picked]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(1000000, 10000000), count)]


def _filled(filler: Sequence[str], units: int) -> list[str]:
    return [filler[n % len(filler)] for n in range(units)]


def _with_lines(lines: list[str], needles: Sequence[str], places: Sequence[float]) -> str:
    """Needles at shares of the depth, in the order of these."""
    at = sorted((round(place * len(lines)), n) for n, place in enumerate(places))
    for offset, (line, number) in enumerate(at):
        lines.insert(line + offset, needles[number])
    return "\n".join(lines)


def _needle(
    filler: Sequence[str],
    keys: int,
    values: int,
    asked: int,
    seed: int,
    units: int,
    depth: float | None,
) -> Prompt:
    rng = random.Random(seed)
    names, numbers = _keys(rng, keys), _numbers(rng, keys * values)
    pairs = [(names[n // values], number) for n, number in enumerate(numbers)]
    places = [rng.random() for _ in pairs]
    wanted = rng.sample(names, asked)
    if depth is not None:
        places[next(n for n, (key, _) in enumerate(pairs) if key == wanted[0])] = depth
    needles = [f"One of the special magic numbers for {key} is: {number}." for key, number in pairs]
    answers = tuple(number for key, number in pairs if key in wanted)
    many = len(answers) > 1
    what, verb = ("numbers", "are") if many else ("number", "is")
    ask = ", ".join(wanted)
    plural = "Some special magic numbers are" if many else "A special magic number is"
    return Prompt(
        f"{plural} hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about it afterwards.\n{_with_lines(_filled(filler, units), needles, places)}\n",
        f"What {verb} {'all ' if many else ''}the special magic {what} for {ask} mentioned in the "
        "provided text?",
        f" The special magic {what} for {ask} mentioned in the provided text {verb}",
        answers,
    )


def _passkey(seed: int, units: int, depth: float | None) -> Prompt:
    rng = random.Random(seed)
    number, place = str(rng.randrange(10000, 100000)), rng.random()
    needle = f"The pass key is {number}. Remember it. {number} is the pass key."
    place = place if depth is None else depth
    return Prompt(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        f"it.\n{_with_lines(_filled([NOISE], units), [needle], [place])}\n",
        "What is the pass key?",
        " The pass key is",
        (number,),
    )


def _tracking(seed: int, units: int, depth: float | None) -> Prompt:
    rng = random.Random(seed)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(letters, k=5))
        names += [] if name in names else [name]
    value = str(rng.randrange(10000, 100000))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
    places = sorted(rng.random() for _ in lines)
    return Prompt(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
        f"{_with_lines(_filled([NOISE], units), lines, places)}\n",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
        f"are assigned the value {value}, they are:",
        tuple(names),
    )


def _words(rng: random.Random, count: int) -> list[str]:
    """Words that are none, of syllables that every tokenizer has tokens for."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)]
        words["".join(syllables)] = None
    return list(words)


def _common(seed: int, units: int, depth: float | None) -> Prompt:
    """Ten words three times as often as all others; `units` of those."""
    rng = random.Random(seed)
    keys = _keys(rng, min(10 + units, _KEYS))
    often, seldom = keys[:10], keys[10:]
    words = often * 9 + seldom * 3
    rng.shuffle(words)
    listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    return Prompt(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{listed}\n",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        tuple(often),
    )


def _frequent(seed: int, units: int, depth: float | None) -> Prompt:
    """Words by a zeta distribution of exponent 2; the three most frequent are asked for."""
    rng = random.Random(seed)
    words = _words(rng, 64)
    weights = [1 / rank**2 for rank in range(1, len(words) + 1)]
    drawn = rng.choices(words, weights, k=max(units, 1) * 8)
    return Prompt(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words.\n{' '.join(drawn)}\n",
        "Question: What are the three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(words[:3]),
    )


NEEDLES = {
    "single": (1, 1, 1),
    "multi-key": (4, 1, 1),
    "multi-value": (1, 4, 1),
    "multi-query": (4, 1, 4),
}
OTHERS = {
    "passkey": Task(_passkey, (8, 4)),
    "tracking": Task(_tracking, (6, 8)),
    "common": Task(_common, (7, 8)),
    "frequent": Task(_frequent, (6, 8)),
}
GENERATED = ("passkey", *NEEDLES, "tracking", "common", "frequent")
TASKS = ("text", "recall", *GENERATED)


def _task(name: str, filler: Sequence[str]) -> Task:
    if name in OTHERS:
        return OTHERS[name]
    return Task(partial(_needle, filler, *NEEDLES[name]), (12, 8))


# ----------------------------------------------------------------------------------- in tokens


def text_cases(
    tokenizer: Any, name: str, text: str, length: int, steps: int, pieces: int
) -> list[Case]:
    """`pieces` of a text, each of `length` tokens of which the last `steps` are predicted.

    Raises:
        ValueError: the text holds fewer tokens than one piece.
    """
    from loki_compile.commands.reference_data import encode

    ids = encode(tokenizer, text[: 24 * pieces * length])
    if len(ids) < length:
        raise ValueError(
            f"the text {name} holds {len(ids)} tokens; needs {length}: pass more text, or a "
            "shorter --context"
        )
    cases = []
    for number in range(min(pieces, len(ids) // length)):
        piece = ids[number * length : (number + 1) * length]
        cut = length - steps - 1
        cases.append(Case(f"text {name}", length, number, tuple(piece[:cut]), tuple(piece[cut:])))
    return cases


def recall_cases(tokenizer: Any, length: int, seeds: int) -> list[Case]:
    """Prompts of 32 questions each; see `reference_data.recall_prompt`.

    Raises:
        ValueError: a tokenizer without the words, a length that does not hold them.
    """
    from loki_compile.commands.reference_data import recall_prompt

    cases = []
    for seed in range(seeds):
        ids, queries = recall_prompt(tokenizer, length, 32, 9000 + seed)
        cut = queries[0][0] - 2
        asked = tuple((at - cut, answer[0]) for at, answer in queries)
        cases.append(
            Case("recall", length, seed, tuple(ids[:cut]), tuple(ids[cut:]), queries=asked)
        )
    return cases


def generated_case(
    tokenizer: Any, name: str, filler: str, length: int, seed: int, depth: float | None = None
) -> Case:
    """The longest prompt of a task that holds at most `length` tokens with its answer.

    Args:
        name: one of GENERATED.
        filler: text whose lines needles are hidden among.

    Raises:
        ValueError: a length that does not hold the task, a tokenizer that cannot write it.
    """
    lines = [" ".join(line.split()) for line in filler.splitlines() if line.strip()]
    task = _task(name, lines)
    each, once = task.new_tokens
    # Not `hash`, which differs from process to process.
    drawn = zlib.crc32(f"{name} {seed}".encode())

    def attempt(units: int) -> tuple[Prompt, list[int], list[int]]:
        prompt = task.make(drawn, units, depth)
        return prompt, *_in_tokens(tokenizer, prompt)

    # How much of a line or a word is a number of tokens differs: the answer's are counted.
    prompt, context, rest = attempt(0)
    _check_written(tokenizer, prompt)
    longest = max(len(tokenizer(a, add_special_tokens=False)["input_ids"]) for a in prompt.answers)
    new_tokens = len(prompt.answers) * max(each, longest + 3) + once
    room = length - new_tokens
    if len(context) + len(rest) > room:
        raise ValueError(
            f"task {name} in {length} tokens: it takes {len(context) + len(rest) + new_tokens} "
            "without any filler; needs a longer --context"
        )
    low, high = 0, max(1, length)
    while high - low > 1:
        middle = (low + high) // 2
        prompt, context, rest = attempt(middle)
        fits = len(context) + len(rest) <= room
        low, high = (middle, high) if fits else (low, middle)
    prompt, context, rest = attempt(low)
    cut = min(-(-max(len(rest), 2 * CHUNK) // CHUNK) * CHUNK, len(context) + len(rest) - 1)
    ids = [*context, *rest]
    return Case(
        name, length, seed, tuple(ids[:-cut]), tuple(ids[-cut:]), depth, prompt.answers, new_tokens
    )


def _in_tokens(tokenizer: Any, prompt: Prompt) -> tuple[list[int], list[int]]:
    """The context and what follows, in the tokenizer's chat template where it has one."""
    before, after = "", "\n"
    if getattr(tokenizer, "chat_template", None):
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": _HERE}], tokenize=False, add_generation_prompt=True
        )
        before, _, after = shown.partition(_HERE)
    else:
        whole = tokenizer("a")["input_ids"]
        first = getattr(tokenizer, "bos_token_id", None)
        before = tokenizer.bos_token if first is not None and whole[:1] == [first] else ""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    lead = prompt.lead.lstrip() if after.endswith("\n") else prompt.lead
    return encode(before + prompt.context), encode(prompt.question + after + lead)


def _check_written(tokenizer: Any, prompt: Prompt) -> None:
    """Refuses a tokenizer that has no tokens for what is asked.

    Raises:
        ValueError: as said.
    """
    for answer in prompt.answers:
        ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=True)
        if "".join(back.lower().split()) != "".join(answer.lower().split()):
            raise ValueError(
                f"this tokenizer writes {answer!r} as {back!r}; needed one that has tokens for "
                "letters, hyphens and digits: choose other --task"
            )
