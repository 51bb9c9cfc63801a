"""A simulated layer whose KV heads have budgets of their own reads what their words say."""

import pytest
import torch
from loki_compile.kernels.budget import Budget
from loki_compile.kernels.spans import Span
from toy_models import make_model, prompt

from loki_compile.policies.head_budgets import budgets_from
from loki_compile.policies.kinds import kind_of
from loki_compile.simulation import Simulation, chosen_by_head
from loki_compile.watching import watched

transformers = pytest.importorskip("transformers")

BUDGET = Budget(12, 1 << 16, 1, 2, 0)
PAST, NEW = 80, 10


def decoded(words, mask=None, rank=0.25):
    """Logits of new tokens behind a prompt; under a mask (1, Hq, NEW, PAST + NEW) that is dense."""
    model, ids = make_model(layers=len(words)), prompt(1, PAST + NEW)
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :PAST], past_key_values=cache)
    if mask is not None:
        return model(ids[:, PAST:], past_key_values=cache, attention_mask=mask).logits
    simulation = Simulation(BUDGET, rank, {})
    simulation.under([kind_of(word) for word in words], paths_of(model))
    with watched(model, simulation.look) as run:
        logits = run(input_ids=ids[:, PAST:], past_key_values=cache).logits
    assert not simulation.refused
    return logits


def paths_of(model):
    return [f"model.layers.{n}.self_attn" for n in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("min_keys", [0, 30])
def test_each_head_chooses_so_many_of_its_best_or_last_keys(min_keys):
    torch.manual_seed(3)
    tokens, budget = 50, Budget(None, 1 << 13, 2, 3, min_keys)
    wanted = torch.randint(0, 9, (1, 4, 6, tokens)).float()  # many are equal
    budgets = budgets_from("7,last=0.4N,4+0.2N,last=1")
    counts = torch.tensor([1, 4, 9, 29, 30, 50])
    seen = (torch.arange(tokens) < counts[:, None]).expand_as(wanted)
    chosen = chosen_by_head(wanted, seen, budgets, budget)
    spans = [Span.of((7, 0)), Span.of((0, 0.4)), Span.of((4, 0.2)), Span.of((1, 0))]
    for head, (span, each) in enumerate(zip(spans, budgets, strict=True)):
        for row, count in enumerate(counts.tolist()):
            keep = count if count < min_keys else min(count, max(span.keys(count), 5))
            always = {*range(min(2, count)), *range(max(0, count - 3), count)}
            rest = [t for t in range(count) if t not in always]
            value = wanted[0, head, row]
            rest.sort(key=(lambda t: -t) if each.last else (lambda t, v=value: (-float(v[t]), t)))
            expected = {*always, *rest[: max(0, keep - len(always))]}
            found = chosen[0, head, row].nonzero().flatten().tolist()
            assert found == sorted(expected), (head, count)


@torch.no_grad()
def test_equal_budgets_are_one_and_what_heads_read_of_others_is_reuse():
    plain = decoded(["loki", "reuse:0:1,0", "loki"])
    budgets = ["loki:12", "loki:from=0.1,from=0.0", "loki:12,12"]
    torch.testing.assert_close(decoded(budgets), plain)
    dense = decoded(["dense"] * 3)
    assert (plain - dense).abs().max() > 1e-2
    torch.testing.assert_close(decoded(["loki:1N,last=1N", "loki:last=1N", "dense"]), dense)


@torch.no_grad()
def test_heads_of_the_last_keys_are_dense_attention_under_their_masks():
    rows, slots = torch.arange(PAST, PAST + NEW)[:, None], torch.arange(PAST + NEW)
    masks = []
    for share in (0.1, 0.5):
        keep = torch.tensor([max(Span.of((0, share)).keys(int(row) + 1), 3) for row in rows])
        masks.append((slots < 1) | (slots > rows - (keep[:, None] - 1)))
    mask = torch.stack(masks).repeat_interleave(2, 0)[None] & (slots <= rows)
    expected = decoded(["dense"] * 2, mask)
    found = decoded(["loki:last=0.1N,last=0.5N"] * 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - decoded(["dense"] * 2)).abs().max() > 1e-2
