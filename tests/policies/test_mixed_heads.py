"""KV heads of one layer that do different things: the definition head by head, in toy layers.

Inductor's place is taken by an interpreter; `test_compiled_policies.py` runs Inductor.
"""

from __future__ import annotations

import pytest
import torch
from toy_attends import gqa_repeat_kv
from toy_capture import count_calls
from toy_conversation import tokens
from toy_layers import (
    EVERYTHING,
    FEW,
    GROWING,
    STATIC,
    STEPS,
    Conversations,
    Layers,
    compiled,
    farthest,
)
from toy_masks import alibi, causal, causal_float, left_padded
from toy_models import make_model, new_cache, prompt
from toy_policies import DirectLayers

from loki_compile import reports, stats

# Ranked, the last ones, and what heads of two earlier layers chose; in a plan with everything else.
PLAN = {
    0: "dense",
    1: "loki:4,0.6N,last=7",
    2: "moa:1:3,0.5N,2",
    3: "oracle:from=1.1,last=0.3N,2+0.2N",
    4: "reuse:3:2,0,1",
    5: "loki:from=1.1,from=3.2,from=1.2",
    6: "reuse:1",
}
AS_DEFINED = [
    "dense",
    "oracle:4,0.6N,last=7",
    "moa:1:3,0.5N,2",
    "oracle:from=1.1,last=0.3N,2+0.2N",
    "reuse:3:2,0,1",
    "oracle:from=1.1,from=3.2,from=1.2",
    "reuse:1",
]
SPELLINGS = [
    GROWING,
    GROWING.but(new_tokens=3, mask=causal),
    STATIC.but(mask=left_padded, new_tokens=8),
    STATIC.but(mask=causal_float),
]
OPTIONS = [{"share": "head"}, {"index_dtype": "int8"}, {}, {"group_choice": "probability"}]
pytestmark = pytest.mark.usefixtures("interpreted")
slow = pytest.mark.slow
QUICK = (0, 2)
spelled = pytest.mark.parametrize(
    "spelling",
    [pytest.param(s, marks=[slow] * (n not in QUICK)) for n, s in enumerate(SPELLINGS)],
    ids=lambda s: s.name,
)
# Each by each other; two of them where time counts.
PAIRS = [
    pytest.param(spelling, options, marks=[slow] * (place != number or place not in QUICK))
    for place, spelling in enumerate(SPELLINGS)
    for number, options in enumerate(OPTIONS)
]


@pytest.mark.parametrize(("spelling", "options"), PAIRS)
@torch.no_grad()
def test_each_head_reads_what_its_word_says(spelling, options, interpreted):
    module = Layers(*[spelling] * 7).eval()
    options = {**FEW, **options}
    plan = PLAN
    if options["index_dtype"] == "int8":  # which rounds: these rank by the keys
        plan = {n: word.replace("loki", "oracle") for n, word in PLAN.items()}
    truth = DirectLayers(AS_DEFINED, module.kv_heads, options)
    # Through seven layers; what differs in one head is found to be 1e-3 and more below.
    assert farthest(module, compiled(module, plan, **options), truth) < 1e-4
    for gm in interpreted.graphs:
        assert count_calls(gm.graph, "loki.select") == 2, "layer 5 chooses nothing"
    assert stats()["sparse_steps"] == STEPS


@torch.no_grad()
def test_what_heads_read_is_neither_a_uniform_budget_nor_another_heads():
    """Otherwise the comparison with the definition would prove nothing."""
    module = Layers(*[GROWING] * 2).eval()
    right = ("oracle:3,0.6N,last=7", "oracle:from=0.1,last=5,6")
    here, steps = Conversations(module), tokens(GROWING, STEPS)
    start = here.fork(module)
    fast = compiled(module, dict(enumerate(right)), **FEW)
    found = [here.step(fast, x) for x in steps]

    def farthest_from(*words: str) -> float:
        there = start.fork(module)
        with DirectLayers(list(words), module.kv_heads, FEW):
            truth = [there.step(module, x) for x in steps]
        pairs = zip(found, truth, strict=True)
        return max((out - wanted).abs().max().item() for out, wanted in pairs)

    assert farthest_from(*right) < 5e-5
    for wrong in (
        ("oracle:3,0.6N,7", right[1]),
        ("oracle:3,0.6N,last=6", right[1]),
        ("oracle:0.6N,3,last=7", right[1]),
        (right[0], "oracle:from=0.0,last=5,6"),
        (right[0], "oracle:0.6N,last=5,6"),
        ("oracle", "oracle"),
    ):
        assert farthest_from(*wrong) > 1e-3, wrong


@spelled
@torch.no_grad()
def test_the_whole_budget_is_dense_attention(spelling):
    module = Layers(*[spelling] * 3).eval()
    plan = {0: "loki:1N,200,last=1N", 1: "oracle:from=0.1,1N,last=64+0.9N", 2: "loki:last=1N"}
    assert farthest(module, compiled(module, plan, **EVERYTHING)) < 5e-5
    assert stats()["sparse_steps"] == STEPS


@torch.no_grad()
def test_heads_of_other_numbers_and_masks_of_query_heads():
    """A reader with more and with fewer KV heads than its source; query heads that see other keys
    choose for themselves, and read so."""
    masked = STATIC.but(mask=alibi, attend=gqa_repeat_kv)
    for spelling, counts, words in (
        (GROWING, (3, 6), ("oracle:3,0.5N,last=5", "oracle:from=0.2,4,from=0.1,last=5,from=0.0,3")),
        (GROWING, (6, 2), ("oracle:3,4,5,6,7,8", "oracle:from=0.5,0.4N")),
        (GROWING, (3, 1), ("oracle:3,4,8", "oracle:from=0.2")),
        (masked, (3, 3), ("oracle:3,0.5N,last=5", "oracle:from=0.1,4,last=6")),
    ):
        torch._dynamo.reset()
        module = Layers(*(spelling.but(kv_heads=count) for count in counts)).eval()
        truth = DirectLayers(list(words), module.kv_heads, FEW)
        fast = compiled(module, dict(enumerate(words)), **FEW)
        assert farthest(module, fast, truth) < 5e-5, words


@torch.no_grad()
def test_rows_that_see_few_keys_read_all_of_them():
    spelling = STATIC.but(mask=left_padded)
    module = Layers(*[spelling] * 2).eval()
    options = {**FEW, "min_context": 14}
    words = ["oracle:3,0.5N,last=4", "oracle:from=0.0,3,last=4"]
    truth = DirectLayers(words, module.kv_heads, options)
    fast = compiled(module, dict(enumerate(words)), **options)
    assert farthest(module, fast, truth) < 5e-5
    assert stats()["sparse_steps"] == STEPS


@torch.no_grad()
def test_a_head_chooses_itself_where_its_source_is_dense():
    """As many keys as the source's head would choose, by its own layer's ranking."""
    module = Layers(*[GROWING] * 3).eval()
    plan = {0: "oracle:3,0.6N,last=7", 1: "oracle:from=0.1,from=0.2,4", 2: "reuse:0"}
    fast = compiled(module, plan, layers=(1, 2), **FEW)
    words = ["dense", "oracle:0.6N,last=7,4", "oracle:3,0.6N,last=7"]
    assert farthest(module, fast, DirectLayers(words, module.kv_heads, FEW)) < 5e-5
    uniform = {0: "oracle", 1: "oracle:from=0.1,last=5,4"}
    torch._dynamo.reset()
    fast = compiled(module, {**uniform, 2: "dense"}, layers=(1,), **FEW)
    words = ["dense", "oracle:1+0.4N,last=5,4", "dense"]
    assert farthest(module, fast, DirectLayers(words, module.kv_heads, FEW)) < 5e-5


@torch.no_grad()
def test_layers_that_choose_for_others_read_all_keys():
    module = Layers(*[GROWING] * 2).eval()
    plan = {0: "oracle:3,0.5N,last=5+dense", 1: "reuse:0"}
    truth = DirectLayers(["oracle:3,0.5N,last=5+dense", "reuse:0"], module.kv_heads, FEW)
    assert farthest(module, compiled(module, plan, **FEW), truth) < 5e-5


@torch.no_grad()
def test_nothing_is_kept_where_no_head_ranks(interpreted):
    module = Layers(*[GROWING] * 2).eval()
    plan = {0: "loki:last=4,last=0.5N,last=6", 1: "loki:from=0.1,last=5,from=0.0"}
    truth = DirectLayers([word.replace("loki", "oracle") for word in plan.values()],
                         module.kv_heads, FEW)  # fmt: skip
    assert farthest(module, compiled(module, plan, **FEW), truth) < 5e-5
    assert stats()["rebuilds"] == stats()["index_bytes"] == 0


@torch.no_grad()
def test_a_watched_layer_tells_of_the_heads_that_choose():
    module = Layers(*[GROWING] * 3).eval()
    words = ["oracle:3,last=5,4", "oracle:from=0.1,last=5,6", "oracle:from=0.0,from=1.2,from=0.2"]
    plan, options = dict(enumerate(words)), {**FEW, "watch_mass": 0.99}
    truth = DirectLayers(words, module.kv_heads, FEW)
    assert farthest(module, compiled(module, plan, **options), truth) < 5e-5
    (model,) = stats()["models"].values()
    told = list(model["layers"].values())
    assert [each["keys"] for each in told] == [pytest.approx(4.0), pytest.approx(5.5)]
    assert all(0.0 < each["left_out"] < 1.0 for each in told)
    assert [site.keys for site in reports()[-1].sites] == [4.0, 5.5, None]


@pytest.mark.parametrize(
    "policy, says",
    [
        ({0: "oracle:3,4"}, "layers.0 has 3 KV heads, and 'oracle:3,4' has budgets for 2"),
        ({0: "oracle", 1: "loki:from=0.3"}, "KV head 3 of layers.0 chose, which has 3: name one"),
        ({0: "dense", 1: "loki:from=0.0"}, 'which is "dense" and does not choose'),
        ({0: "moa:1:4", 1: "loki:from=0.0"}, "does not choose"),
        ({"layers.0": "loki:from=1.0"}, "does not lie before it"),
        ({0: "oracle", 1: "oracle:from=0.0", 2: "loki:from=1.0"}, "reads what another chose: name"),
        ({0: "oracle", 2: "loki:from=0.0"}, "do not lie in the same slots"),
    ],
)
@torch.no_grad()
def test_a_plan_that_does_not_fit_its_heads_is_refused_with_what_differs(policy, says):
    module = Layers(STATIC, STATIC, STATIC.but(mask=left_padded)).eval()
    if "reads what another" in says:
        module = Layers(*[STATIC] * 3).eval()
    (x,) = tokens(STATIC, 1)
    with pytest.raises(ValueError, match=says) as caught:
        Conversations(module).step(compiled(module, policy, **FEW), x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "policy, says",
    [
        ({1: "loki:64,64,64"}, "model.layers.1.self_attn has 2 KV heads"),
        ({1: "moa:4:64,64,64"}, "model.layers.1.self_attn has 2 KV heads"),
        ({1: "loki:64,from=0.9"}, "to read what KV head 9 of model.layers.0.self_attn chose"),
    ],
)
@torch.no_grad()
def test_a_wrong_word_is_one_line_at_the_prompt(policy, says, fresh):
    model = make_model(2)
    model.compile(backend="loki", options={"policy": policy})
    with pytest.raises(ValueError, match=says) as caught:
        model(prompt(1, 40), past_key_values=new_cache(model, "growing"))
    assert "\n" not in str(caught.value)
