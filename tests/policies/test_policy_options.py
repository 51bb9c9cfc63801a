"""`policy` as users write it, on a model of transformers: names, layers, errors, long contexts."""

import pytest
import torch
from toy_capture import clear_runtime
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import no_mask
from toy_models import LONG, make_model, new_cache, prompt, started, tiny_llama
from toy_options import KV_HEADS
from toy_policies import KEEP_NOTHING, POLICIES, DirectPolicy
from toy_writes import cat_bhtd
from transformers import DynamicCache

from loki_compile import LokiConfig, reports, stats
from loki_compile.policies import kinds
from loki_compile.policies.table import RANKINGS

NEW = [name for name in POLICIES if name != "loki"]


def test_every_name_that_options_allow_has_a_ranking():
    assert tuple(RANKINGS) == kinds.RANKINGS
    assert all(ranking.name == name for name, ranking in RANKINGS.items())


def steps(model, run, cache, ids, *, inference: bool = False) -> list[torch.Tensor]:
    with torch.inference_mode() if inference else torch.no_grad():
        return [
            run(ids[:, at : at + 1], past_key_values=cache).logits for at in range(ids.shape[1])
        ]


@pytest.mark.parametrize(
    "policy, expected",
    [
        ({0: "window", "1-2": "quest"}, ["window", "quest"]),
        ({"model.layers.1*": "oracle"}, ["loki", "oracle"]),
        ({(0, "1-3"): "quest", 1: "window"}, ["quest", "quest"]),
    ],
)
def test_layers_choose_as_the_first_entry_that_names_them_says(policy, expected, interpreted):
    model = tiny_llama()
    options = {"min_context": 0, "top_k": 1.0, "policy": policy}
    fast = torch.compile(model, backend="loki", options=options)
    here, there = (DynamicCache(config=model.config) for _ in range(2))
    ids = torch.randint(64, (2, 24))
    with torch.no_grad():
        for cache in (here, there):
            model(ids[:, :20], past_key_values=cache)
        for at in range(20, 24):
            out = fast(ids[:, at : at + 1], past_key_values=here).logits
            truth = model(ids[:, at : at + 1], past_key_values=there).logits
            torch.testing.assert_close(out, truth, rtol=0, atol=2e-4)
    assert [site.policy for site in reports()[-1].sites] == expected
    assert stats()["sparse_steps"] == 4
    assert stats()["rebuilds"] == sum(name not in KEEP_NOTHING for name in expected)
    text = str(reports()[-1])
    assert all(name in text for name in expected if name != "loki")


@pytest.mark.parametrize(
    "policy, says",
    [
        ("qest", 'did you mean "quest"'),
        ("Window", 'did you mean "window"'),
        ("h2o", "one of 'loki', 'oracle', 'window', 'quest'"),
        (None, "one of 'loki'"),
        (["quest"], "one of 'loki'"),
        ({0: "orcle"}, 'did you mean "oracle"'),
        ({0: None}, "one of 'loki'"),
        ({None: "quest"}, "layer numbers"),
        ({1.5: "quest"}, "layer numbers"),
        ({True: "quest"}, "layer numbers"),
        ({(): "quest"}, "layer numbers"),
        ({"3-1": "quest"}, "3-1"),
        ({-1: "quest"}, "-1"),
        ({(0, -2): "quest"}, "-2"),
        ({"": "quest"}, "layer numbers"),
    ],
)
def test_what_names_no_policy_or_no_layer_is_refused_in_one_line(policy, says):
    with pytest.raises(ValueError) as caught:
        LokiConfig(policy=policy)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("policy=")


@pytest.mark.parametrize("choice", ["Max", "sum", None])
def test_another_choice_of_a_group_is_refused_in_one_line(choice):
    with pytest.raises(ValueError, match=r"^group_choice=.*'max', 'probability'"):
        LokiConfig(group_choice=choice)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "kind, inference, group_choice",
    [
        ("growing", False, "max"),
        ("static", True, "probability"),
        pytest.param("growing", True, "probability", marks=pytest.mark.slow),
        pytest.param("static", False, "max", marks=pytest.mark.slow),
    ],
)
def test_long_contexts_are_sparse_at_default_options(
    policy, kind, inference, group_choice, interpreted
):
    """What a fresh compilation makes of a copy of the cache is what the tenth step makes of it."""
    model, ids = make_model(), prompt(1, LONG + 12)
    options = {"policy": policy, "group_choice": group_choice, "rank": 16}
    fast = torch.compile(model, backend="loki", options=options)
    with torch.inference_mode() if inference else torch.no_grad():
        cache = started(model, kind, ids[:, :LONG])
    steps(model, fast, cache, ids[:, LONG : LONG + 11], inference=inference)
    ran = stats()
    assert ran["sparse_steps"] == 11 and ran["dense_steps"] == 0
    assert ran["rebuilds"] == (policy not in KEEP_NOTHING)
    assert (ran["index_bytes"] == 0) == (policy in KEEP_NOTHING)
    with torch.inference_mode() if inference else torch.no_grad():
        anew = new_cache(model, kind)
        length = LONG + 11
        layer = cache.layers[0]
        keys, values = (x[:, :, :length].clone() for x in (layer.keys, layer.values))
        anew.update(keys, values, 0)
    last = ids[:, length : length + 1]
    (out,) = steps(model, fast, cache, last, inference=inference)
    clear_runtime()
    (expected,) = steps(model, fast, anew, last, inference=inference)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert stats()["rebuilds"] == (policy not in KEEP_NOTHING)


@pytest.mark.parametrize("policy", KEEP_NOTHING)
def test_beams_are_never_held_back_where_nothing_is_kept(policy, interpreted):
    model, ids = make_model(), prompt(1, LONG, rows=2)
    fast = torch.compile(model, backend="loki", options={"policy": policy})
    with torch.no_grad():
        cache = started(model, "growing", ids)
        for _ in range(14):
            fast(ids[:, :1], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
    assert stats()["sparse_steps"] == 14 and stats()["rebuilds"] == 0


@pytest.mark.parametrize("policy", NEW)
@torch.no_grad()
def test_as_many_graphs_as_for_loki_whatever_the_sizes(policy, interpreted):
    """A cache that grows, and batches that differ, with sizes as symbols."""
    made, spelling = {}, Spelling(cat_bhtd, mask=no_mask, growing=True)
    for name in ("loki", policy):
        torch._dynamo.reset()
        clear_runtime()
        interpreted.graphs.clear()
        module = ToyDecoder(spelling).eval()
        options = {"min_context": 0, "top_k": 0.5, "sink": 1, "recent": 2}
        truth = DirectPolicy(name, KV_HEADS, options)
        options["policy"] = name
        fast = torch.compile(module, backend="loki", dynamic=True, options=options)
        for batch, filled in ((2, 18), (3, 30), (2, 47)):
            here = Conversation.start(spelling, filled=filled, batch=batch)
            for x in tokens(spelling, 4, batch=batch):
                torch._dynamo.mark_static(x, 1)
                there = here.fork()
                out = here.step(fast, x)
                if name != "loki":
                    with truth:
                        expected = there.step(module, x)
                    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        assert stats()["sparse_steps"] == 12
        made[name] = len(interpreted.graphs)
    assert made[policy] <= made["loki"]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"policy": {7: "window"}}, "policy names 7"),
        ({"layers": (0, "model.layers.9*")}, "layers names 'model.layers.9*'"),
        ({"policy": {"0-1": "window"}, "layers": (0, 1)}, ""),
    ],
)
def test_a_layer_that_there_is_not_is_said_once_with_the_nearest(
    options, says, interpreted, caplog
):
    model = tiny_llama()
    fast = torch.compile(model, backend="loki", options={"min_context": 0, **options})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(64, (1, 9)), past_key_values=cache)
        for _ in range(3):
            fast(torch.randint(64, (1, 1)), past_key_values=cache)
    said = [m for m in caplog.messages if " names " in m]
    assert len(said) == bool(says)
    assert not says or (says in said[0] and "nearest is 'model.layers." in said[0])
