"""Sparse steps draft, dense ones verify: tokens are dense decoding's, and so is the cache.

Inductor's place is taken by an interpreter, but where a test says so. Drafts of every length are
made at every cycle (`drafting`), but where the pace is what is tested.
"""

import pytest
import torch
from toy_loops import Loop, far_from_dense, true_indexes
from toy_models import LONG, make_model, new_cache, prompt

import loki_compile
from loki_compile import stats
from loki_compile.generation import verdicts
from loki_compile.generation.pace import Pace

slow = pytest.mark.slow


@pytest.fixture
def drafting(monkeypatch):
    """Drafts 1 to 7 tokens in turn; what was accepted of how many."""
    cycles = []

    def fixed(self, limit):
        return max(0, min(limit, 1 + len(cycles) % self.most))

    def took(self, drafts, accepted, seconds):
        cycles.append((drafts, accepted))

    monkeypatch.setattr(Pace, "next", fixed)
    monkeypatch.setattr(Pace, "took", took)
    return cycles


# Half of the keys: some drafts are right, and some are not.
OPTIONS = {"top_k": 0.5}


def generated(model, kind: str, rows: int, **more):
    ids, mask = prompt(1, rows=rows), torch.ones(rows, LONG, dtype=torch.int64)
    mask[1:, :30] = 0
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=new_cache(model, kind),
        max_new_tokens=40,
        return_dict_in_generate=True,
        **{"do_sample": False, **more},
    )
    return out, torch.cat((mask, mask.new_ones(rows, out.sequences.shape[1] - LONG - 1)), 1)


@pytest.mark.parametrize(
    "kind, rows, policy",
    [
        ("growing", 1, "loki"),
        ("static", 2, "tidal"),
        pytest.param("growing", 3, "tidal", marks=slow),
        pytest.param("static", 1, "loki", marks=slow),
        pytest.param("growing", 1, "kascade", marks=slow),
    ],
)
@torch.no_grad()
def test_generate_gives_dense_decodings_tokens(kind, rows, policy, drafting, interpreted, fresh):
    model, uncompiled = make_model(2), make_model(2)
    model.compile(backend="loki", options={**OPTIONS, "policy": policy})
    truth, _ = generated(uncompiled, kind, rows, output_scores=True, output_logits=True)
    out, mask = generated(
        model, kind, rows, output_scores=True, output_logits=True,
        custom_generate=loki_compile.lossless(),
    )  # fmt: skip
    assert torch.equal(out.sequences, truth.sequences)
    assert 0 < sum(n for _, n in drafting) < sum(n for n, _ in drafting)
    for name in ("scores", "logits"):
        here, there = out[name], truth[name]
        assert len(here) == len(there) == 40
        torch.testing.assert_close(torch.stack(here), torch.stack(there), rtol=0, atol=2e-3)
    cache = out.past_key_values
    assert int(cache.get_seq_length()) == LONG + 39
    assert far_from_dense(cache, out.sequences[:, :-1], mask, uncompiled) < 5e-5
    assert true_indexes(cache, LONG + 39) == stats()["rebuilds"], "built once"


@torch.no_grad()
def test_rows_end_where_they_end_under_dense_decoding(drafting, interpreted, fresh):
    model, uncompiled = make_model(2), make_model(2)
    model.compile(backend="loki", options=OPTIONS)
    free, _ = generated(uncompiled, "growing", 2)
    ends = {"eos_token_id": [int(free.sequences[0, LONG + 9]), int(free.sequences[1, LONG + 22])]}
    truth, _ = generated(uncompiled, "growing", 2, pad_token_id=0, **ends)
    loop = loki_compile.lossless()
    out, _ = generated(model, "growing", 2, pad_token_id=0, **ends, custom_generate=loop)
    assert LONG + 9 < truth.sequences.shape[1] < LONG + 40
    assert torch.equal(out.sequences, truth.sequences)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("kind", ["growing", pytest.param("static", marks=slow)])
@torch.no_grad()
def test_a_loop_by_hand_gets_dense_decodings_tokens(kind, drafting, interpreted, fresh):
    model, uncompiled = make_model(2), make_model(2)
    model.compile(backend="loki", options=OPTIONS)
    truth = Loop(uncompiled, kind, 2)
    expected = [prompt(3, 1, 2)]
    for _ in range(20):
        expected.append(truth.step(expected[-1])[:, -1:].argmax(-1))
    loop = Loop(model, kind, 2)
    decoder = loki_compile.LosslessDecoder(
        model, loop.cache, attention_mask=loop.mask, position_ids=loop.mask.cumsum(1) - 1
    )
    made = [expected[0]]
    while sum(x.shape[1] for x in made) < 21:
        left = 21 - sum(x.shape[1] for x in made)
        made.append(decoder.next(made[-1][:, -1:], most=left))
        assert 1 <= made[-1].shape[1] <= left
    assert torch.equal(torch.cat(made, 1), torch.cat(expected, 1))
    assert int(loop.cache.get_seq_length()) == LONG + 20
    assert 0 < sum(n for _, n in drafting) < sum(n for n, _ in drafting)


@torch.no_grad()
def test_a_static_cache_is_filled_to_its_end_and_no_further(drafting, interpreted, fresh):
    model = make_model()
    model.compile(backend="loki", options=OPTIONS)
    cache = new_cache(model, "static", LONG + 10)
    model.forward(prompt(1), past_key_values=cache)
    decoder = loki_compile.LosslessDecoder(model, cache)
    newest, made = torch.full((1, 1), 7), 0
    while made < 10:
        newest = decoder.next(newest)
        made, newest = made + newest.shape[1], newest[:, -1:]
    assert made == 10
    with pytest.raises(ValueError, match="a cache that is full"):
        decoder.next(newest)


@torch.no_grad()
def test_a_compiled_model_gives_dense_decodings_tokens(drafting, fresh):
    model, uncompiled = make_model(), make_model()
    model.compile(backend="loki")
    truth, _ = generated(uncompiled, "growing", 1)
    out, mask = generated(model, "growing", 1, custom_generate=loki_compile.lossless(drafts=3))
    assert torch.equal(out.sequences, truth.sequences)
    assert stats()["sparse_steps"] == sum(n for n, _ in drafting)
    assert far_from_dense(out.past_key_values, out.sequences[:, :-1], mask, uncompiled) < 5e-5


# --- what is accepted


def test_sampled_tokens_are_distributed_as_dense_decodings():
    scores, drafted = torch.randn(1, 3, 5) * 1.5, torch.randn(1, 2, 5) * 1.5
    drafted[0, 0, 2] = float("-inf")  # never drafted
    scores[0, 0, 1] = float("-inf")  # never to be drawn
    rows = 40000
    q = drafted.softmax(-1).expand(rows, -1, -1)
    drafts = torch.multinomial(q.flatten(0, 1), 1).view(rows, 2)
    accepted, instead = verdicts.sampled(
        drafts, drafted.expand(rows, -1, -1), scores.expand(rows, -1, -1)
    )
    p = scores[0].softmax(-1)
    first = torch.where(accepted > 0, drafts[:, 0], instead[:, 0])
    second = torch.where(accepted > 1, drafts[:, 1], instead[:, 1])[accepted > 0]
    third = instead[accepted == 2, 2]
    for made, truth in ((first, p[0]), (second, p[1]), (third, p[2])):
        share = torch.bincount(made, minlength=5) / len(made)
        assert (share - truth).abs().max() < 5 * (0.25 / len(made)) ** 0.5
    expected = torch.minimum(p[:2], drafted[0].softmax(-1)).sum(-1)
    assert abs((accepted > 0).float().mean() - expected[0]) < 0.02


def test_equal_scores_accept_every_draft():
    scores = torch.randn(2, 4, 9)
    drafts = torch.randint(9, (2, 3))
    accepted, _ = verdicts.sampled(drafts, scores[:, :3], scores)
    assert accepted.tolist() == [3, 3]


def test_rows_go_on_together():
    drafts, instead = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.arange(12).view(3, 4)
    accepted, both = torch.tensor([3, 1, 0]), torch.tensor([True, True, False])
    assert verdicts.agreed(accepted, drafts, instead, both).tolist() == [[1, 2], [4, 5], [7, 9]]
    alone = torch.tensor([True, False, False])
    assert verdicts.agreed(accepted, drafts, instead, alone)[0].tolist() == [1, 2, 3, 3]


def test_greedy_accepts_what_is_best_up_to_the_first_that_is_not():
    scores = torch.nn.functional.one_hot(torch.tensor([[3, 1, 2, 0]]), 4).float()
    accepted, instead = verdicts.greedy(torch.tensor([[3, 0, 2]]), scores)
    assert accepted.tolist() == [1]
    assert instead.tolist() == [[3, 1, 2, 0]]


@torch.no_grad()
def test_sampling_draws_by_the_processed_scores(drafting, interpreted, fresh):
    """With one token left to choose from, sampling is greedy decoding."""
    model, uncompiled = make_model(), make_model()
    model.compile(backend="loki", options=OPTIONS)
    how = {"do_sample": True, "top_k": 1, "temperature": 0.7}
    truth, _ = generated(uncompiled, "growing", 1)
    out, _ = generated(model, "growing", 1, **how, custom_generate=loki_compile.lossless())
    assert torch.equal(out.sequences, truth.sequences)


# --- how many are drafted


def decoded(
    chance: float, draft: float, verify, tokens: int, later: tuple[int, float] | None = None
) -> tuple[float, Pace]:
    """Seconds of a simulated conversation; `verify` by the number of tokens. `later`: from which
    token on the chance is another."""
    pace, now, made = Pace(7), 0.0, 0
    generator = torch.Generator().manual_seed(1)
    while made < tokens:
        n = pace.next(tokens - made)
        if later is not None and made >= later[0]:
            chance = later[1]
        right = int((torch.rand(n, generator=generator) < chance).long().cumprod(0).sum())
        took = n * draft + verify(n + 1)
        pace.took(n, right, took)
        now, made = now + took, made + right + 1
    return now, pace


@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("draft", [0.3, 0.8, 1.2])
@pytest.mark.parametrize("tokens", [100, 384, 1000])
def test_where_drafts_fail_decoding_is_dense(tokens, draft, chance):
    def verify(tokens):
        return 1 + 0.4 * (tokens - 1)

    seconds, _ = decoded(chance, draft, verify, tokens)
    # A credit of 4 dense steps, a hundredth of one for each token, and what the cycles that ask
    # what a draft takes lose beyond it.
    assert seconds < 4 + (1.01 * tokens + draft + verify(2)) * verify(1)


def test_drafts_that_come_to_be_right_are_noticed():
    def verify(tokens):
        return 1 + 0.07 * (tokens - 1)

    seconds, _ = decoded(0.0, 0.3, verify, 2600, later=(600, 0.95))
    assert seconds < 0.85 * 2600


def test_a_cycle_that_was_held_up_ends_no_drafting():
    slow = iter([False] * 60 + [True] + [False] * 10000)

    def verify(tokens):
        return 1 + 0.05 * (tokens - 1) + 500 * next(slow)

    seconds, _ = decoded(0.95, 0.15, verify, 1000)
    assert 1000 / (seconds - 500) > 2.2


@pytest.mark.parametrize(
    "chance, draft, each, least",
    [(0.95, 0.15, 0.05, 2.4), (0.8, 0.15, 0.05, 1.7), (1, 0.3, 0, 2.2)],
)
def test_where_drafts_are_right_the_best_number_is_found(chance, draft, each, least):
    def verify(tokens):
        return 1 + each * (tokens - 1)

    seconds, pace = decoded(chance, draft, verify, 1000)
    best = max(sum(chance**i for i in range(n + 1)) / (n * draft + verify(n + 1)) for n in range(8))
    assert 1000 / seconds > max(0.9 * best, least)
    assert pace.chance == pytest.approx(chance, abs=0.12)


def test_dense_steps_that_were_held_up_at_first_do_not_make_drafts_look_cheap():
    """As SmolLM2 behind 6000 tokens: nearly every draft is right, and not worth what it takes."""
    held_up = iter([True] * 4 + [False] * 10000)

    def verify(tokens):
        if tokens == 1:
            return 1 + 1.3 * next(held_up)
        return 0.8 + 0.35 * tokens

    seconds, pace = decoded(0.999, 0.85, verify, 600)
    assert seconds < 1.05 * 600 and pace.ran[0] > 400


def test_a_compilation_is_no_price_of_drafts():
    seen = []

    def verify(tokens):
        seen.append(tokens)
        return 1 + 60 * (tokens == 4 and seen.count(4) == 1)

    _, pace = decoded(0.95, 0.1, verify, 400)
    assert pace.speed(7) > 2.5 * pace.speed(0)


# --- what is refused


@pytest.mark.parametrize("drafts", [0, 8, -1, 2.0, True])
def test_drafts_are_as_many_as_a_step_verifies(drafts):
    for make in (
        loki_compile.lossless,
        lambda drafts: loki_compile.LosslessDecoder(0, 0, drafts=drafts),
    ):
        with pytest.raises(ValueError, match="needs a count from 1 to 7"):
            make(drafts=drafts)


@torch.no_grad()
def test_what_cannot_be_verified_is_refused(fresh):
    model = make_model()
    with pytest.raises(ValueError, match="has compiled"):
        generated(model, "growing", 1, custom_generate=loki_compile.lossless())
    with pytest.raises(ValueError, match="found output_attentions=True"):
        loop = loki_compile.lossless()
        generated(model, "growing", 1, custom_generate=loop, output_attentions=True)
    with pytest.raises(ValueError, match="cache of type list"):
        loki_compile.LosslessDecoder(model, [])
