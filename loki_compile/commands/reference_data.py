"""Text and recall prompts of the bundled reference model (`loki_compile/reference_model/`).

Two kinds of data, shared by its training, `loki demo` and `loki eval`:

* *Code*: the standard library's own sources as installed with the running Python. Whole top-level
  modules are held out by a fixed hash, so held-out text never shares a package with training text.
* *Recall*: lines ``# key value`` scattered through code and asked again at the end of the prompt.
  A key and a value are one token each, so an answer is right or wrong at a single position.
"""

import random
import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

_ANIMALS = """
otter badger heron falcon lynx marten stoat ibex bison moose walrus narwhal puffin osprey raven
magpie starling thrush linnet finch plover curlew egret stork pelican condor vulture kestrel
merlin buzzard harrier gannet petrel albatross penguin dolphin porpoise beluga orca seal lobster
shrimp oyster mussel limpet squid octopus urchin starfish salmon trout herring mackerel halibut
turbot sturgeon perch carp tench bream beetle cricket hornet bumblebee dragonfly mantis cicada
locust spider scorpion gecko iguana chameleon mink cobra viper tortoise turtle alligator
crocodile salamander newt toad bullfrog hedgehog squirrel chipmunk marmot beaver hamster gerbil
wombat koala kangaroo wallaby platypus echidna
"""
_STONES_AND_PLANTS = """
copper cobalt nickel zinc silver platinum titanium tungsten mercury bismuth antimony gallium
indium iridium osmium rhodium quartz granite basalt marble slate gypsum feldspar obsidian jasper
agate opal topaz garnet beryl emerald sapphire ruby diamond amethyst turquoise malachite amber
ivory walnut chestnut hazel almond pecan cashew pistachio maple birch willow poplar cedar spruce
juniper cypress hemlock larch magnolia hawthorn rowan elder ginger saffron cinnamon nutmeg
cardamom turmeric paprika oregano thyme rosemary lavender chamomile fennel coriander parsley
mustard vanilla apricot cherry peach plum quince mango papaya banana coconut pineapple raspberry
blueberry cranberry gooseberry melon pumpkin carrot parsnip turnip radish celery spinach
"""
RECALL_KEYS = tuple(_ANIMALS.split())
RECALL_VALUES = tuple(_STONES_AND_PLANTS.split())

# Tests are a separate package on many systems; the rest is tables and generated text.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_SKIPPED_FOLDERS |= {"encodings", "pydoc_data", "ensurepip", "lib2to3"}
_HELD_OUT_IN_256 = 20


def _held_out(top_level: str) -> bool:
    return zlib.crc32(top_level.encode()) % 256 < _HELD_OUT_IN_256


@lru_cache(maxsize=2)
def stdlib_modules(split: str) -> tuple[tuple[str, str], ...]:
    """The standard library's sources as ((relative path, text), ...), sorted by path.

    `split` is "train" or "held_out". A file belongs to the split of its top-level module
    (`json/decoder.py` to that of `json`), chosen by crc32 of the module's name.
    Raises ValueError for another split, FileNotFoundError where no sources are installed.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'held_out'")
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if any(name in _SKIPPED_FOLDERS or name.startswith("config-") for name in folders):
            continue
        if relative.name.startswith("_sysconfigdata"):  # written by the build, full of its paths
            continue
        if _held_out(relative.parts[0].removesuffix(".py")) != (split == "held_out"):
            continue
        try:
            modules.append((relative.as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    if not modules:
        raise FileNotFoundError(
            f"no standard library sources under {root}; install Python with its .py files"
        )
    return tuple(modules)


def stdlib_text(split: str) -> str:
    """All modules of a split (see `stdlib_modules`) concatenated, one newline between them."""
    return "\n".join(text for _, text in stdlib_modules(split))


def recall_token_ids(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the key and of the value tokens, two int64 arrays of equal length.

    Raises ValueError if a word is not one token of this tokenizer, as for any other model.
    """
    vocabulary = tokenizer.get_vocab()
    both = []
    for words in (RECALL_KEYS, RECALL_VALUES):
        missing = [word for word in words if f" {word}" not in vocabulary]
        if missing:
            raise ValueError(
                f"{len(missing)} recall words are not single tokens of this tokenizer (first: "
                f"{missing[0]!r}); recall prompts need the bundled reference model's tokenizer"
            )
        both.append(np.array([vocabulary[f" {word}"] for word in words], dtype=np.int64))
    count = min(map(len, both))
    return both[0][:count], both[1][:count]


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text`, nothing added before or after."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=8)
def _encoded_module(tokenizer, split: str, number: int) -> tuple[int, ...]:
    return tuple(encode(tokenizer, stdlib_modules(split)[number][1]))


def _code(tokenizer, tokens: int, split: str, rng: random.Random) -> list[int]:
    """At least `tokens` ids of consecutive code: whole modules in random order."""
    code: list[int] = []
    while len(code) < tokens:
        number = rng.randrange(len(stdlib_modules(split)))
        code.extend(_encoded_module(tokenizer, split, number))
    return code


def recall_prompt(
    tokenizer, tokens: int, pairs: int, seed: int, split: str = "held_out"
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """A prompt of exactly `tokens` ids: code with `pairs` facts scattered in it, then questions.

    A fact is a line ``# key value`` put at the end of a random line of code; the questions are the
    same lines again, in another order, one after the other at the end of the prompt. Returns
    (ids, [(query position, answer ids), ...]) in the order of the prompt: the logits at the query
    position (that of the key) must predict answer ids[0], which stands at query position + 1.
    Everything before the first query position minus 2 is context, so a decode loop may prefill
    it and feed the rest token by token.

    Keys are drawn without replacement, values too; the seed fixes keys, values, code and places.
    Raises ValueError if the facts and questions do not fit, or for more pairs than there are keys.
    """
    keys, values = recall_token_ids(tokenizer)
    line_start = encode(tokenizer, "\n#")
    line = len(line_start) + 2
    filler = tokens - 2 * pairs * line
    if not 1 <= pairs <= len(keys) or filler < pairs:
        raise ValueError(
            f"{pairs} pairs in {tokens} tokens do not fit: between 1 and {len(keys)} pairs, "
            f"and at least {2 * line + 1} tokens for each"
        )
    rng = random.Random(seed)
    chosen_keys = rng.sample(keys.tolist(), pairs)
    chosen_values = rng.sample(values.tolist(), pairs)
    code = _code(tokenizer, filler, split, rng)[:filler]
    newline = newline_tokens(tokenizer)
    ends_of_lines = [at for at, token in enumerate(code) if newline[token]] or [filler]
    places = sorted(rng.choices(ends_of_lines, k=pairs))
    ids: list[int] = []
    taken = 0
    for place, key, value in zip(places, chosen_keys, chosen_values, strict=True):
        ids += [*code[taken:place], *line_start, key, value]
        taken = place
    ids += code[taken:]
    queries = []
    for number in rng.sample(range(pairs), pairs):
        ids += [*line_start, chosen_keys[number], chosen_values[number]]
        queries.append((len(ids) - 2, [chosen_values[number]]))
    return ids, queries


@lru_cache(maxsize=4)
def newline_tokens(tokenizer) -> np.ndarray:
    """bool (vocabulary,): True for the tokens whose text starts with a newline."""
    starts = np.zeros(len(tokenizer), dtype=bool)
    for token, number in tokenizer.get_vocab().items():
        starts[number] = token.startswith("\u010a")  # byte-level BPE writes "\n" as this letter
    return starts


def calibration_prompts(tokenizer, length: int, tokens: int) -> tuple[list[list[int]], str]:
    """Prompts of `length` ids (the last may be shorter), `tokens` in all, and what they are.

    Code of the training split. For the reference model's tokenizer every second prompt has recall
    lines among its code, as in the model's own training: a basis learns to find what it was shown
    being looked up.
    """
    try:
        recall_token_ids(tokenizer)
    except ValueError:
        ids = encode(tokenizer, stdlib_text("train")[: 16 * tokens])[:tokens]
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        return [piece for piece in pieces if len(piece) > 1], "Python's standard library (train)"
    prompts: list[list[int]] = []
    left = tokens
    while left > 1:
        size, number = min(length, left), len(prompts)
        left -= size
        pairs = min(len(RECALL_KEYS), len(RECALL_VALUES), size // 40)
        if number % 2 and pairs:
            prompts.append(recall_prompt(tokenizer, size, pairs, number, "train")[0])
        else:
            prompts.append(_code(tokenizer, size, "train", random.Random(number))[:size])
    return prompts, "Python's standard library (train) and recall lines"


def recall_correct(logits, queries: list[tuple[int, list[int]]]) -> list[bool]:
    """For each query, whether the arg max of `logits` (tokens, vocabulary) is its answer."""
    return [int(logits[at].argmax()) == answer[0] for at, answer in queries]
