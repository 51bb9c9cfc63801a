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

FEW = {"min_context": 0, "top_k": 0.4, "sink": 1, "recent": 2, "rank": 4}
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


@pytest.mark.parametrize(
    "policy, kind",
    [
        ("tidal", "growing"),
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
    model, ids = make_model(layers=5), prompt(3, LONG + 6)
    logits = []
    for interpreted in (False, True):
        torch._dynamo.reset()
        clear_runtime()
        if interpreted:
            request.getfixturevalue("interpreted")
        fast = torch.compile(model, backend="loki", options={"policy": policy})
        cache = started(model, kind, ids[:, :LONG])
        steps = [fast(ids[:, n : n + 1], past_key_values=cache) for n in range(LONG, LONG + 6)]
        assert stats()["sparse_steps"] == 6
        logits.append(torch.cat([step.logits for step in steps]))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
