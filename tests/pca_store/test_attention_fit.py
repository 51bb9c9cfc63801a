"""Bases fitted to attention: what they find, what they leave out, and how they fail."""

import math

import pytest
import torch
from loki_compile.pca_store import attention_fit
from loki_compile.pca_store.attention_fit import RECENT, SINK, AttentionSamples
from loki_compile.pca_store.basis import BasisSet
from loki_compile.pca_store.store import Store
from torch import nn
from torch.nn import functional as F

from loki_compile.calibration import calibrate

pytestmark = pytest.mark.covers

HKV, GROUP, DIM, TOKENS, RANK = 2, 3, 16, 160, 3
EVERY = 6
SCALE = 1 / math.sqrt(DIM)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(attention_fit, "STEPS", 200)


def look_ups(seed, prompts=6):
    """Prompts (keys, queries). Every sixth query looks one earlier key up by its tag, 3 of 16 dims.
    In 3 others 3 % of the keys are outliers that score far below all else for every query:
    most of the variance, of keys and of scores, and next to none of the attention."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    made = []
    for _ in range(prompts):
        tags = F.normalize(noise(1, HKV, TOKENS, 3), dim=-1)
        outliers = -20.0 * (torch.rand(1, HKV, TOKENS, 3, generator=generator) < 0.03)
        keys = torch.cat((4 * tags, outliers, 0.3 * noise(1, HKV, TOKENS, 10)), -1)
        source = (torch.rand(TOKENS, generator=generator) * torch.arange(TOKENS)).long()
        asks = (torch.arange(TOKENS) % EVERY == EVERY - 1)[:, None]
        asked = 10 * (tags[:, :, source] * asks).repeat_interleave(GROUP, 1)
        heads = (1, HKV * GROUP, TOKENS)
        rest = (4 * noise(*heads, 3).abs(), 0.3 * noise(*heads, 10))
        made.append((keys, torch.cat((asked, *rest), -1)))
    return made


def samples(prompts, **options):
    held = AttentionSamples(HKV, DIM, scale=SCALE, **options)
    for keys, queries in prompts:
        held.update(keys, queries)
    return held


def missed(basis, prompts, kept=20):
    """Attention mass that the best `kept` keys by a basis's score leave out, sink and recent apart,
    on average over heads and the later queries that look something up; fp64, by definition."""
    query, key = (part.double() for part in basis.truncate(RANK))
    total, count = 0.0, 0
    for keys, queries in prompts:
        k, q = keys[0].double(), queries[0].double().unflatten(0, (HKV, GROUP))
        for at in range(16 * EVERY - 1, TOKENS, EVERY):
            weight = (SCALE * q[:, :, at] @ k[:, : at + 1].mT).softmax(-1)
            middle = slice(SINK, at + 1 - RECENT)
            score = (q[:, :, at] @ query) @ (k[:, middle] @ key).mT
            found = weight[..., middle].gather(-1, score.topk(kept, -1).indices).sum(-1)
            total += float((weight[..., middle].sum(-1) - found).sum())
            count += HKV * GROUP
    return total / count


def test_finds_what_is_looked_up_where_variance_misleads():
    held, unseen = samples(look_ups(1)), look_ups(2)
    fitted = missed(held.fit(RANK), unseen)
    print(f"missed: attention {fitted:.3f}, score-optimal", end=" ")
    print(f"{missed(held.moments.score_optimal(), unseen):.3f}, pca", end=" ")
    print(f"{missed(held.moments.pca(), unseen):.3f}")
    assert fitted < 0.5 * missed(held.moments.score_optimal(), unseen)
    assert fitted < 0.5 * missed(held.moments.pca(), unseen)


def test_holds_as_many_columns_as_asked_in_descending_order():
    basis = samples(look_ups(3, prompts=2)).fit(RANK, weights="0" * 16, layer="a.b")
    assert (basis.kind, basis.columns, basis.layer, basis.tokens) == ("attention", 3, "a.b", 320)
    assert (basis.spectrum[:, :RANK] > 0).all() and (basis.spectrum[:, RANK:] == 0).all()
    with pytest.raises(ValueError, match=r"found rank 4, but the basis holds 3 of 16 dims"):
        basis.truncate(4)


def test_is_the_same_each_time():
    first, second = (samples(look_ups(4, prompts=2), seed=9).fit(RANK) for _ in range(2))
    torch.testing.assert_close(first.key, second.key, rtol=0, atol=0)
    torch.testing.assert_close(first.query, second.query, rtol=0, atol=0)


@pytest.mark.parametrize("garbage", [1e4, math.nan, math.inf])
def test_never_looks_at_padding(garbage):
    (keys, queries), real = look_ups(5, prompts=1)[0], torch.arange(TOKENS) >= 37
    bases = []
    for fill in (0.0, garbage):
        padded = [x.masked_fill(~real[:, None], fill) for x in (keys, queries)]
        held = AttentionSamples(HKV, DIM, scale=SCALE)
        held.update(*padded, real[None])
        bases.append(held.fit(RANK))
    torch.testing.assert_close(bases[0].key, bases[1].key, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bases[0].query, bases[1].query, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_or_query_that_is_not_finite_spreads_nowhere(bad):
    keys, queries = look_ups(6, prompts=1)[0]
    keys, queries = keys.clone(), queries.clone()
    keys[:, 0, 50, 3] = bad
    queries[:, 1, 90] = bad
    basis = samples([(keys, queries)]).fit(RANK)
    assert basis.key.isfinite().all() and basis.query.isfinite().all()


def test_a_descent_that_ends_worse_is_not_taken(monkeypatch):
    held = samples(look_ups(7, prompts=2))
    monkeypatch.setattr(attention_fit, "LEARNING_RATE", 1e6)
    found, start = held.fit(RANK), held.moments.score_optimal()
    scores = found.query @ found.key.mT
    expected = start.truncate(RANK)
    torch.testing.assert_close(scores, expected[0] @ expected[1].mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fits_in_any_gradient_mode(mode):
    with mode():
        prompts = [(k * 1, q * 1) for k, q in look_ups(8, prompts=1)]
        basis = samples(prompts).fit(RANK)
    assert not basis.key.is_inference() and not basis.key.requires_grad


def test_counts_its_steps():
    seen = []
    samples(look_ups(9, prompts=1)).fit(RANK, progress=seen.append)
    assert sum(seen) == attention_fit.STEPS


def test_the_time_of_a_step_leaves_out_what_comes_once(monkeypatch):
    """It is multiplied by 500: what stands in front of the first step would make hours of it."""
    held, now = samples(look_ups(5)), [0.0]

    class Clock:
        perf_counter = staticmethod(lambda: now[0])

    loss, roots = attention_fit._loss, held.moments.score_roots

    def slow_loss(*args):
        now[0] += 2.0
        return loss(*args)

    def slow_roots():
        now[0] += 100.0
        return roots()

    monkeypatch.setattr(attention_fit, "time", Clock)
    monkeypatch.setattr(attention_fit, "_loss", slow_loss)
    monkeypatch.setattr(held.moments, "score_roots", slow_roots)
    assert held.seconds_per_step(RANK) == 2.0


def test_prompts_without_a_choice_are_refused():
    held = AttentionSamples(HKV, DIM, scale=SCALE)
    keys, queries = look_ups(10, prompts=1)[0]
    held.update(keys[:, :, : SINK + RECENT], queries[:, :, : SINK + RECENT])
    held.update(keys[:, :, :5], queries[:, :, :5])
    with pytest.raises(ValueError, match=r"no prompts of more than 36 tokens.*pass longer text"):
        held.fit(RANK)


def test_half_precision_prompts_are_kept_as_they_are():
    held = samples([(k.bfloat16(), q.bfloat16()) for k, q in look_ups(11, prompts=1)])
    assert held._prompts[0].keys.dtype == held._prompts[0].queries.dtype == torch.bfloat16
    assert held.fit(RANK).key.dtype == torch.float32


# ------------------------------------------------------------------------ through calibrate


class Decoder(nn.Module):
    def __init__(self, groups=2):
        super().__init__()
        self.embed = nn.Embedding(31, 24)
        self.q = nn.Linear(24, HKV * groups * 8)
        self.k, self.v = nn.Linear(24, HKV * 8), nn.Linear(24, HKV * 8)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("rank", "columns"), [(0.25, 2), (3, 3), (1.0, 8), (99, 8)])
def test_calibrate_fits_the_rank_that_is_asked_for(rank, columns, tmp_path):
    torch.manual_seed(0)
    steps = []
    batches = [torch.randint(31, (2, 70)), torch.randint(31, (1, 50))]
    found = calibrate(
        Decoder().eval(),
        batches,
        kind="attention",
        rank=rank,
        fit_progress=lambda *done: steps.append(done),
    )
    assert found.kind == "attention" and found.bases[0].columns == columns
    assert steps[-1][0] == attention_fit.STEPS
    again = Store(tmp_path).load(Store(tmp_path).save(found))
    assert isinstance(again, BasisSet)
    torch.testing.assert_close(again.bases[0].query, found.bases[0].query, rtol=0, atol=0)


def test_calibrate_refuses_unrotated_keys_for_attention():
    with pytest.raises(ValueError, match="attention is made of rotated keys; needs"):
        ids = torch.zeros(1, 50, dtype=torch.long)
        calibrate(Decoder(), [ids], kind="attention", calibration="pre-rotary")


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "0.25"])
def test_calibrate_refuses_an_impossible_rank(rank):
    with pytest.raises(ValueError, match=r"rank=.*needs a count >= 1"):
        calibrate(Decoder(), [torch.zeros(1, 50, dtype=torch.long)], rank=rank)


def test_the_loss_is_of_the_keys_that_ranking_chooses_among():
    """Attention is over all visible keys; the first and the last ones are kept in any case."""
    tokens, queries = SINK + RECENT + 9, 4
    keys = torch.randn(HKV, tokens, DIM, dtype=torch.float64)
    asked = torch.randn(HKV, GROUP, queries, DIM, dtype=torch.float64)
    query, key = torch.randn(2, HKV, DIM, RANK, dtype=torch.float64)
    seen = torch.rand(HKV, 1, 1, tokens) < 0.8
    positions = torch.tensor([tokens - 1, tokens - 2, tokens - 5, SINK + RECENT])
    found = attention_fit._loss(query, key, keys, seen, asked, positions, SCALE)
    losses = []
    for head in range(HKV):
        for row in asked[head].unbind():
            for q, at in zip(row, positions.tolist(), strict=True):
                shown = [t for t in range(at + 1) if seen[head, 0, 0, t]]
                weights = (SCALE * keys[head, shown] @ q).softmax(0)
                ranked = [t for t in shown if SINK <= t <= at - RECENT]
                scores = SCALE * (keys[head, ranked] @ key[head]) @ (q @ query[head])
                wanted = weights[[shown.index(t) for t in ranked]]
                losses.append(-(wanted * scores.log_softmax(0)).sum())
    torch.testing.assert_close(found, torch.stack(losses).mean())
