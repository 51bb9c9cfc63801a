"""Each policy through Inductor: what the compiled graphs make is what the interpreter makes."""

import pytest
import torch
from toy_capture import clear_runtime
from toy_conversation import Conversation, basis_for, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import left_padded, no_mask
from toy_models import LONG, make_model, new_cache, prompt, started
from toy_policies import POLICIES, DirectPolicy
from toy_writes import cat_bhtd, index_copy_method

from loki_compile import stats

FEW = {
    "min_context": 0, "top_k": 0.4, "sink": 1, "recent": 2, "rank": 4, "index_dtype": "cache"
}  # fmt: skip
GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)
STATIC = Spelling(index_copy_method, mask=left_padded)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "spelling, policy, group_choice",
    [
        (GROWING, "oracle", "probability"),
        (GROWING, "window", "max"),
        (STATIC, "quest", "max"),
        pytest.param(STATIC, "loki", "probability", marks=slow),
        pytest.param(STATIC, "oracle", "max", marks=slow),
        pytest.param(STATIC, "window", "max", marks=slow),
        pytest.param(GROWING, "quest", "probability", marks=slow),
        pytest.param(GROWING, "unified", "max", marks=slow),
        pytest.param(STATIC, "unified", "max", marks=slow),
        pytest.param(GROWING, "sparq", "probability", marks=slow),
        (STATIC, "sparq", "max"),
    ],
)
@torch.no_grad()
def test_a_compiled_step_is_the_definition(spelling, policy, group_choice, fresh):
    module = ToyDecoder(spelling).eval()
    options = {**FEW, "group_choice": group_choice}
    truth = DirectPolicy(policy, module.kv_heads, options, basis=basis_for(module))
    if policy == "loki":
        options["basis"] = basis_for(module)
    fast = torch.compile(module, backend="loki", options={**options, "policy": policy})
    here = Conversation.start(spelling, filled=30)
    there = here.fork()
    for x in tokens(spelling, 5):
        out = here.step(fast, x)
        with truth:
            expected = there.step(module, x)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert stats()["sparse_steps"] == 5


@slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_compiled_model_decodes_as_the_interpreter_does(kind, policy, fresh, request):
    model, ids = make_model(), prompt(3, 120)
    options = {**FEW, "policy": policy, "rank": 16}
    logits = []
    for interpreted in (False, True):
        torch._dynamo.reset()
        clear_runtime()
        if interpreted:
            request.getfixturevalue("interpreted")
        fast = torch.compile(model, backend="loki", options=options)
        cache = new_cache(model, kind, 140)
        with torch.no_grad():
            model.forward(ids[:, :100], past_key_values=cache)
            made = [fast(ids[:, n : n + 1], past_key_values=cache).logits for n in range(100, 120)]
        assert stats()["sparse_steps"] == 20
        logits.append(torch.cat(made))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def decode_both_ways(policy, kind: str, request, layers: int, steps: int) -> None:
    """Behind a long context, at default options but for the policy: Inductor, then the interpreter;
    every step is sparse, and logits are the same."""
    model, ids = make_model(layers=layers), prompt(3, LONG + steps)
    logits = []
    for interpreted in (False, True):
        torch._dynamo.reset()
        clear_runtime()
        if interpreted:
            request.getfixturevalue("interpreted")
        fast = torch.compile(model, backend="loki", options={"policy": policy})
        cache = started(model, kind, ids[:, :LONG])
        made = [fast(ids[:, n : n + 1], past_key_values=cache) for n in range(LONG, LONG + steps)]
        assert stats()["sparse_steps"] == steps and stats()["dense_steps"] == 0
        logits.append(torch.cat([step.logits for step in made]))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "policy, kind",
    [
        pytest.param("tidal", "growing", marks=slow),
        ("tidal", "static"),
        ("tidal-published", "growing"),
        pytest.param("tidal-published", "static", marks=slow),
        pytest.param("lessismore", "growing", marks=slow),
        pytest.param("lessismore", "static", marks=slow),
        pytest.param("kascade", "growing", marks=slow),
        pytest.param("kascade", "static", marks=slow),
    ],
)
@torch.no_grad()
def test_plans_of_all_layers_decode_at_default_options_as_the_interpreter_does(
    policy, kind, fresh, request
):
    decode_both_ways(policy, kind, request, layers=5, steps=6)


@pytest.mark.parametrize(
    "policy, kind",
    [
        ("moa", "growing"),
        pytest.param("moa", "static", marks=slow),
        pytest.param("moa:4:300,0.25N", "growing", marks=slow),
        ("moa:4:300,0.25N", "static"),
    ],
)
@torch.no_grad()
def test_spans_decode_at_default_options_as_the_interpreter_does(policy, kind, fresh, request):
    decode_both_ways(policy, kind, request, layers=2, steps=4)


@pytest.mark.parametrize("kind", ["growing", pytest.param("static", marks=slow)])
@torch.no_grad()
def test_heads_with_budgets_of_their_own_decode_at_default_options_as_the_interpreter_does(
    kind, fresh, request
):
    policy = {0: "loki:0.25N,last=300", 1: "loki:from=0.0,60+0.1N"}
    decode_both_ways(policy, kind, request, layers=2, steps=4)


@pytest.mark.parametrize("kind", ["static", pytest.param("growing", marks=slow)])
@torch.no_grad()
def test_generate_reads_spans_at_default_options(kind, fresh):
    """Padded rows, of which one is below `min_context`: the tokens of the definition."""
    model, ids = make_model(layers=2), prompt(3, LONG, rows=2)
    seen = torch.ones_like(ids)
    seen[1, :200] = 0  # sees fewer keys than min_context: all of them are read
    ids[1, :200] = 0
    word = "moa:4:40,0.25N"
    options = {"attention_mask": seen, "max_new_tokens": 4, "do_sample": False}
    options |= {"cache_implementation": "static"} if kind == "static" else {}
    options |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    model.compile(backend="loki", options={"policy": word})
    found = model.generate(ids, **options)
    assert stats()["sparse_steps"] >= 2 and stats()["rebuilds"] == 0
    plain = make_model(layers=2)
    plain.generation_config.eos_token_id = None
    dense = plain.generate(ids, **options)
    cache = new_cache(plain, "growing")
    at = (seen.cumsum(-1) - 1).masked_fill(seen == 0, 1)
    prompted = plain(ids, attention_mask=seen, position_ids=at, past_key_values=cache)
    torch.testing.assert_close(found.logits[0], prompted.logits[:, -1], rtol=0, atol=1e-4)
    for step in range(1, 4):
        seen = torch.cat((seen, torch.ones_like(seen[:, :1])), -1)
        new = found.sequences[:, LONG + step - 1 : LONG + step]
        at = seen.sum(-1, keepdim=True) - 1
        with DirectPolicy(word, 2, {}):
            truth = plain(new, attention_mask=seen, position_ids=at, past_key_values=cache)
        torch.testing.assert_close(found.logits[step], truth.logits[:, -1], rtol=0, atol=1e-3)
    # The row below `min_context` is dense, its neighbour is not.
    torch.testing.assert_close(found.logits[1][1], dense.logits[1][1], rtol=0, atol=1e-3)
    same = torch.equal(found.sequences[0, LONG], dense.sequences[0, LONG])
    assert not same or (found.logits[1][0] - dense.logits[1][0]).abs().max() > 1e-2
