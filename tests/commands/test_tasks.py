"""Prompts of `loki eval`: what is asked for is there, where it is said to be, and fits."""

import itertools

import pytest

from loki_compile.commands import tasks
from loki_compile.commands.models import load_tokenizer

pytest.importorskip("transformers")

FILLER = "\n".join(
    f"Line {n} says that nothing of note happened on day {7 * n}." for n in range(90)
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("reference")


def whole(tokenizer, case):
    return tokenizer.decode([*case.context, *case.rest])


@pytest.mark.parametrize("name", tasks.GENERATED)
def test_a_prompt_holds_its_answers_and_fits_with_them(tokenizer, name):
    case = tasks.generated_case(tokenizer, name, FILLER, 1500, seed=1)
    text = tokenizer.decode(case.context)
    for answer in case.answers:
        assert answer in text
    used = len(case.context) + len(case.rest) + case.new_tokens
    assert 1300 < used <= 1500
    assert len(case.rest) % tasks.CHUNK == 0 and len(case.rest) >= 2 * tasks.CHUNK
    asked = tokenizer.decode(case.rest).rpartition("\n" if name == "passkey" else "Question")[2]
    assert not any(answer in asked for answer in case.answers)


@pytest.mark.parametrize("name", tasks.GENERATED)
def test_a_seed_fixes_a_prompt_and_another_asks_for_something_else(tokenizer, name):
    first, again, other = (
        tasks.generated_case(tokenizer, name, FILLER, 1200, seed) for seed in (1, 1, 2)
    )
    assert first == again and first.key == again.key
    assert first.answers != other.answers and first.key != other.key


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["passkey", "single"])
def test_a_needle_lies_at_its_depth(tokenizer, name, depth):
    case = tasks.generated_case(tokenizer, name, FILLER, 1500, 3, depth)
    text = whole(tokenizer, case)
    at = text.index(case.answers[0]) / len(text)
    assert abs(at - depth) < 0.15


def test_the_common_words_are_the_most_common(tokenizer):
    case = tasks.generated_case(tokenizer, "common", "", 3000, 2)
    words = [word for word in whole(tokenizer, case).split() if "-" in word]
    counts = {word: words.count(word) for word in set(words)}
    best = sorted(counts, key=counts.get, reverse=True)[:10]
    assert set(best) == set(case.answers)


def test_the_frequent_words_are_the_most_frequent(tokenizer):
    case = tasks.generated_case(tokenizer, "frequent", "", 3000, 2)
    words = tokenizer.decode(case.context).split("\n")[1].split()
    counts = {word: words.count(word) for word in set(words)}
    best = sorted(counts, key=counts.get, reverse=True)[:3]
    assert set(best) == set(case.answers)


def test_variables_are_set_one_from_the_other_in_order(tokenizer):
    case = tasks.generated_case(tokenizer, "tracking", "", 2000, 5)
    text = tokenizer.decode(case.context)
    first, *others = case.answers
    places = [text.index(f"VAR {first} = ")]
    places += [text.index(f"VAR {b} = VAR {a}") for a, b in itertools.pairwise(case.answers)]
    assert others and places == sorted(places)


def test_a_prompt_is_written_in_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    try:
        case = tasks.generated_case(tokenizer, "single", FILLER, 900, 4)
    finally:
        tokenizer.chat_template = None
    text = whole(tokenizer, case)
    assert text.startswith("<|user|>\n") and text.count("<|assistant|>") == 1
    asked, _, answered = text.partition("</s>\n<|assistant|>\n")
    assert asked.endswith("?") and answered.startswith("The special magic number for")


def test_the_score_is_the_share_of_answers_that_are_found():
    case = tasks.Case("x", 9, 0, (1,), (2,), answers=("Amber-Fox", "17"), new_tokens=5)
    assert tasks.score(case, "it is amber-fox.") == 0.5
    assert tasks.score(case, "17, AMBER-FOX") == 1.0
    assert tasks.score(case, "") == 0.0


def test_a_length_that_does_not_hold_a_task_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"task common in 300 tokens: it takes \d+ .*longer"):
        tasks.generated_case(tokenizer, "common", "", 300, 0)


def test_a_tokenizer_without_the_words_is_refused(tokenizer):
    class Digitless:
        """Has one token for every digit."""

        chat_template = None
        bos_token_id = None

        def __call__(self, text, **_):
            ids = [0 if c.isdigit() else ord(c) for c in text]
            return {"input_ids": ids}

        def decode(self, ids, **_):
            return "".join("?" if i == 0 else chr(i) for i in ids)

    with pytest.raises(ValueError, match=r"this tokenizer writes '\d+' as .*needed one"):
        tasks.generated_case(Digitless(), "passkey", "", 900, 0)
    with pytest.raises(ValueError, match="recall"):
        Digitless.get_vocab = lambda self: {}
        tasks.recall_cases(Digitless(), 900, 1)


def test_text_is_cut_into_pieces_whose_last_tokens_are_predicted(tokenizer):
    cases = tasks.text_cases(tokenizer, "a", FILLER, 200, 30, 3)
    ids = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    assert [(*case.context, *case.rest) for case in cases] == [
        tuple(ids[at : at + 200]) for at in (0, 200, 400)
    ]
    assert all(len(case.rest) == 31 for case in cases)
    with pytest.raises(ValueError, match=r"the text a holds \d+ tokens; needs 99999: pass more"):
        tasks.text_cases(tokenizer, "a", FILLER, 99999, 30, 1)
