"""Words that give each KV head of a layer a budget of its own."""

from __future__ import annotations

import re

import pytest
from loki_compile.kernels.spans import Span

from loki_compile import LokiConfig
from loki_compile.policies.head_budgets import HeadBudget
from loki_compile.policies.kinds import Kind, kind_of


@pytest.mark.parametrize(
    "word",
    [
        "loki:512",
        "loki:0.25N,64+0.125N,64|-1024+1N",
        "oracle:512,last=0.125N,from=2.1",
        "loki:last=64+0.125N",
        "loki:512,0.25N+dense",
        "oracle:from=0.0,from=1.2",
    ],
)
def test_a_word_of_budgets_is_read_as_it_is_written(word):
    assert str(kind_of(word)) == word
    assert kind_of(str(kind_of(word))) == kind_of(word)


def test_a_share_is_rounded_once():
    assert kind_of(str(kind_of("loki:0.1N,64+0.3N"))) == kind_of("loki:0.1N,64+0.3N")


def test_a_word_says_of_each_kv_head_what_it_reads():
    kind = kind_of("loki:512,last=64+0.25N,from=2.1")
    of_heads = (
        HeadBudget(Span.of((512, 0.0))),
        HeadBudget(Span.of((64, 0.25)), last=True),
        HeadBudget(None, source=2, head=1),
    )
    assert kind == Kind("loki", budgets=of_heads)
    assert [each.ranks for each in kind.budgets] == [True, False, False]
    assert kind.sources == (2,)
    assert kind_of("oracle:0.5N+dense") == Kind(
        "oracle", dense=True, budgets=(HeadBudget(Span.of((0, 0.5))),)
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("loki:", "found a span ''; needed keys"),
        ("loki:512,", "found a span ''; needed keys"),
        ("loki:0.25", "found a span '0.25'; needed keys"),
        ("loki:lats=512", 'did you mean "last=512"? Needed keys such as'),
        ("loki:form=2.1", 'did you mean "from=2.1"? Needed keys such as'),
        ("loki:from=2", "found 'from=2'; needed a layer and a KV head of it"),
        ("loki:most=512", "found 'most=512'; needed keys such as"),
        ("quest:512", "KV heads of 'quest' have no budgets of their own: needs \"loki:512\" or"),
        ("window:0.5N+dense", 'needs "loki:0.5N" or "oracle:0.5N"'),
        ("lokii:512", 'did you mean "loki:512"?'),
        ("loki:512,from=2.1+dense", 'has no use for "from=2.1"'),
        ("loki:2.5N", "found beta 2.5"),
        ("loki:-5", "found '-5'; needed keys: more than none"),
        ("loki:64,last=0", "found 'last=0'; needed keys: more than none"),
        ("loki:\u0663", "found a span '\u0663'; needed keys"),
    ],
)
def test_a_word_that_says_no_budgets_is_one_line_that_names_what_is_near(word, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        LokiConfig(policy={0: word})
    assert "\n" not in str(error.value)


def test_budgets_stand_beside_other_words_and_name_earlier_layers():
    words = {0: "loki:512,64", 1: "moa:4:64,0.5N", 2: "reuse:0:1,0", "*": "dense"}
    assert LokiConfig(policy={**words, 3: "loki:from=0.1,from=2.0"}).reads_spans
    assert LokiConfig(policy="oracle:512").reads_spans
    with pytest.raises(ValueError, match="layer 3 cannot read what layer 3 chose"):
        LokiConfig(policy={3: "loki:64,from=3.0"})
    with pytest.raises(ValueError, match="is for some layers: needs a dict"):
        LokiConfig(policy="loki:64,from=3.0")


def test_a_mass_has_no_part_in_layers_with_budgets():
    for policy in ("loki:512", {2: "oracle:512,64"}):
        with pytest.raises(ValueError, match="has budgets of its own for its KV heads") as error:
            LokiConfig(policy=policy, top_k="mass:0.9")
        assert "\n" not in str(error.value)
        LokiConfig(policy=policy, watch_mass=0.2)
