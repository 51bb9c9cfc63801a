"""What plans are judged by: passages, needles in them, and what a plan makes of these."""

import math

import pytest
import torch
from loki_compile.kernels.budget import Budget
from toy_models import make_model

from loki_compile.commands.evidence import (
    BLOCK,
    Evidence,
    Passage,
    bounds,
    needle_passage,
    text_passages,
)
from loki_compile.commands.models import BUNDLED
from loki_compile.policies.kinds import Kind
from loki_compile.simulation import Simulation
from loki_compile.watching import watched

transformers = pytest.importorskip("transformers")

BUDGET = Budget(None, 1 << 13, 1, 2, 0)
LAYERS = 3
PATHS = [f"model.layers.{n}.self_attn" for n in range(LAYERS)]


@pytest.mark.parametrize("tokens", [100 + 4 * 20, 333, 4 * 120])
def test_what_passages_decode_overlaps_nowhere(tokens):
    passages = text_passages(torch.arange(tokens), 100, 20, 4)
    decoded = torch.cat([each.ids[each.start :] for each in passages])
    assert len(decoded) == len(set(decoded.tolist())) == 80
    assert all(len(each.ids) == 120 and each.start == 100 for each in passages)
    with pytest.raises(ValueError, match="needs 180"):
        text_passages(torch.arange(179), 100, 20, 4)


@pytest.mark.parametrize("steps", [48, 130])
def test_needles_lie_in_the_context_at_even_depths_and_are_asked_for(steps):
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    hay = torch.full((700,), 9)
    passage = needle_passage(tokenizer, hay, 500, steps, seed=3)
    assert len(passage.ids) == 500 + steps and passage.start <= 500
    context = tokenizer.decode(passage.ids[: passage.start])
    places = []
    for begin, end in passage.answers:
        number = tokenizer.decode(passage.ids[begin:end]).strip()
        assert number.isdigit() and len(number) == 5 and begin >= passage.start
        asked = "The magic" + tokenizer.decode(passage.ids[:begin]).rsplit("The magic", 1)[-1]
        assert f"{asked.strip()} {number}." in context
        places.append(context.index(number) / len(context))
    assert len(set(places)) == len(passage.answers) >= 2
    gaps = [b - a for a, b in zip([0, *sorted(places)], [*sorted(places), 1], strict=True)]
    assert max(gaps) < 1.5 / len(places)
    assert not torch.equal(passage.ids, needle_passage(tokenizer, hay, 500, steps, seed=4).ids)


def test_bounds_hold_the_mean_nineteen_times_in_twenty():
    torch.manual_seed(0)
    above = below = 0
    for _ in range(400):
        sample = (torch.randn(24).repeat_interleave(BLOCK) + torch.randn(24 * BLOCK)) / 4 + 1.0
        low, high = bounds(sample)
        above, below = above + (low > 1.0), below + (high < 1.0)
    assert 4 <= above <= 40 and 4 <= below <= 40
    assert bounds(torch.ones(2 * BLOCK)) == (-math.inf, math.inf)
    assert bounds(torch.full((3 * BLOCK,), 0.5)) == (0.5, 0.5)


@torch.no_grad()
def test_a_passage_in_one_call_is_its_tokens_one_by_one_and_each_has_bases_of_its_own():
    model = make_model(layers=LAYERS)
    ids = [torch.randint(0, model.config.vocab_size, (96,)) for _ in range(2)]
    passages = [Passage(ids[0], 80), Passage(ids[1], 80, ((84, 87), (90, 91)))]
    kinds = [Kind("loki"), Kind(reuse=True, source=0, heads=(1, 0)), Kind("loki")]
    dense = [Kind(dense=True)] * LAYERS
    simulation = Simulation(BUDGET, 0.25, {})
    with watched(model, simulation.look) as run:
        evidence = Evidence(model, simulation, run, PATHS, passages, {})
        for number, passage in enumerate(passages):
            same = evidence.of(dense, number)
            assert same.same.all() and same.kl.abs().max() < 1e-5
            whole = evidence.decoded(kinds, number)
            cache = transformers.DynamicCache(config=model.config)
            model(passage.ids[None, :80], past_key_values=cache)
            simulation.under(kinds, PATHS)
            one_by_one = [
                run(passage.ids[None, at : at + 1], past_key_values=cache).logits[0, -1]
                for at in range(80, 96)
            ]
            expected = torch.stack(one_by_one)[passage.rows].log_softmax(-1)
            torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
            reference = model(passage.ids[None]).logits[0, 80:][passage.rows].log_softmax(-1)
            kl = (reference.exp() * (reference - expected)).sum(-1)
            got = evidence.of(kinds, number)
            torch.testing.assert_close(got.kl, kl, rtol=1e-3, atol=1e-4)
            assert kl.max() > 1e-3 and len(got.found) == len(passage.answers)
        first, second = (evidence.behind(number).bases for number in range(2))
        assert first.keys() == second.keys() == set(PATHS)
        assert not any(torch.equal(first[p].key, second[p].key) for p in PATHS)
