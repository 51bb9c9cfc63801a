"""Score-optimal bases in closed form: what is kept apart, and what is chosen by it."""

from __future__ import annotations

import pytest
import torch
from loki_compile.pca_store.attention_fit import RECENT, SINK
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.score_fit import APART_EVERY, BUDGET, SHARES, ScoreSamples, missed_mass

HEADS, GROUP, DIM, TOKENS = 2, 3, 8, 600
PAIRS = tuple((d, d + DIM // 2) for d in range(DIM // 2))
SCALE = DIM**-0.5


def prompts(count, seed=0, turned=True):
    """Keys and queries (count, heads, TOKENS, DIM): contents of unequal size in each pair, turned
    by the position, each pair at its own speed and each prompt from its own angle."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([3.0, 1.0, 2.0, 0.3]).repeat(2)

    def contents(heads):
        noise = torch.randn(count, heads, TOKENS, DIM, generator=generator)
        return (noise + torch.randn(heads, 1, DIM, generator=generator)) * size

    keys, queries = contents(HEADS), contents(HEADS * GROUP)
    if not turned:
        return keys, queries
    speed = torch.tensor([1.0, 0.1, 1e-3, 1e-4])
    angles = torch.arange(TOKENS)[:, None] * speed
    angles = angles + 6 * torch.rand(count, 1, 1, 4, generator=generator)
    both = []
    for x in (keys, queries):
        a, b = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        both.append(torch.cat((a * cos - b * sin, a * sin + b * cos), -1))
    return both[0], both[1]


def taken(keys, queries, pairs=PAIRS, mask=None):
    samples = ScoreSamples(HEADS, DIM, scale=SCALE, pairs=pairs)
    samples.update(keys, queries, mask)
    return samples


def test_the_basis_is_of_all_prompts_and_averaged_as_far_as_it_says():
    keys, queries = prompts(6)
    basis = taken(keys, queries).fit(3, weights="0" * 16, layer="a.b")
    whole = KeyCovariance(HEADS, DIM)
    whole.update(keys, queries)
    share = basis.measured["share_over_rotations"]
    expected = whole.over_rotations(PAIRS, share).score_optimal()
    torch.testing.assert_close(basis.key, expected.key, rtol=1e-4, atol=1e-4)
    assert share in SHARES and basis.tokens == 6 * TOKENS
    assert (basis.kind, basis.layer, basis.columns) == ("score-optimal", "a.b", DIM)


def test_the_share_is_that_which_misses_least_on_prompts_kept_apart():
    samples = taken(*prompts(6, seed=3))
    basis = samples.fit(5)
    missed = [
        samples.missed(samples.moments.over_rotations(PAIRS, share).score_optimal(), 5)
        for share in SHARES
    ]
    assert basis.measured["missed_mass"] == min(missed)
    assert len(set(missed)) > 1
    assert basis.measured["missed_by_exact_scores"] <= min(missed)
    assert (basis.measured["rank"], basis.measured["budget"]) == (5.0, BUDGET)


def test_every_fourth_prompt_is_kept_apart_however_they_come():
    keys, queries = prompts(6)
    whole, one_by_one = taken(keys, queries), ScoreSamples(HEADS, DIM, scale=SCALE, pairs=PAIRS)
    for row in range(6):
        one_by_one.update(keys[row : row + 1], queries[row : row + 1])
    assert whole.prompts == one_by_one.prompts == 2 and APART_EVERY == 4
    assert torch.equal(whole.prompt(0)["keys"], keys[1])
    assert torch.equal(one_by_one.prompt(1)["keys"], keys[5])
    assert torch.equal(whole.fit(3).key, one_by_one.fit(3).key)


def test_one_prompt_alone_is_not_trusted_with_rotations():
    keys, queries = prompts(1)
    basis = taken(keys, queries).fit(3)
    seen = KeyCovariance(HEADS, DIM)
    seen.update(keys, queries)
    assert torch.equal(basis.key, seen.over_rotations(PAIRS).score_optimal().key)
    assert basis.measured == {}


def test_without_rotation_nothing_is_averaged():
    keys, queries = prompts(3, turned=False)
    basis = taken(keys, queries, pairs=()).fit(3)
    seen = KeyCovariance(HEADS, DIM)
    seen.update(keys, queries)
    torch.testing.assert_close(basis.key, seen.score_optimal().key, rtol=1e-4, atol=1e-4)
    assert basis.measured["share_over_rotations"] == 0


def test_it_goes_on_from_what_was_kept():
    keys, queries = prompts(6)
    first = taken(keys[:4], queries[:4])
    state, kept = first.state(), [first.prompt(i) for i in range(first.prompts)]
    again = ScoreSamples(HEADS, DIM, scale=SCALE, pairs=PAIRS)
    again.restore(state, kept)
    again.update(keys[4:], queries[4:])
    basis, whole = again.fit(3), taken(keys, queries).fit(3)
    assert torch.equal(basis.key, whole.key) and basis.measured == whole.measured
    with pytest.raises(ValueError, match="not whole"):
        again.restore({n: x for n, x in state.items() if n != "taken"}, kept)


@pytest.mark.parametrize("rank", [None, 3])
def test_missed_mass_is_what_a_plain_loop_says(rank):
    keys, queries = prompts(1, seed=8)
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    mask[:, :17] = False
    samples = ScoreSamples(HEADS, DIM, scale=SCALE)
    samples.apart.update(keys, queries, mask)
    prompt = samples.prompt(0)
    pair = None if rank is None else samples.apart.moments.score_optimal().truncate(rank)
    total, count = 0.0, 0
    k, q = keys[0].double(), prompt["queries"].double()
    for n, at in enumerate(prompt["positions"].tolist()):
        seen = [t for t in range(17, at + 1)]
        for head in range(HEADS):
            scores = SCALE * q[head, :, n] @ k[head].T
            ranked = scores
            if pair is not None:
                query, key = (part[head].double() for part in pair)
                ranked = (q[head, :, n] @ query) @ (k[head] @ key).T
            best = ranked.amax(0)
            order = sorted(seen, key=lambda t: (not (t < SINK or t > at - RECENT), -best[t]))
            budget = max(SINK + RECENT, -(-len(seen) // 8))
            left = torch.tensor([t not in order[:budget] for t in seen])
            total += float((scores[:, seen].softmax(-1) * left).sum())
            count += GROUP
    assert abs(missed_mass(pair, prompt, SCALE) - total / count) < 1e-5
