"""Calibration: which keys are fitted, and that decode graphs find the basis again."""

import contextlib
import functools
import gc
import pathlib
import shutil
import time
import weakref

import pytest
import torch
from loki_compile.passes.normalize import normalize
from loki_compile.pca_store import attention_fit
from loki_compile.pca_store.covariance import KeyCovariance
from loki_compile.pca_store.fingerprint import weights_fingerprint
from torch import nn
from torch.nn import functional as F

from loki_compile import observation, progress
from loki_compile.backend import bind_caches, plan_graph
from loki_compile.calibration import calibrate as calibrate_by_default
from loki_compile.config import LokiConfig

pytestmark = pytest.mark.covers

# What is fitted can be told from the keys alone, or takes the most to go on from.
calibrate = functools.partial(calibrate_by_default, kind="pca")
calibrate_any = functools.partial(calibrate_by_default, kind="attention")

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 61, 48, 6, 2, 14


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------ rotary spellings


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def whole_halves(x, angles):
    """By halves: cos and sin over all of head_dim. Angles broadcast against x, half its dims."""
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    return x * cos + rotate_half(x) * sin


def partial_halves(x, angles):
    """The first four dims only."""
    return torch.cat((whole_halves(x[..., :4], angles[..., :2]), x[..., 4:]), -1)


def interleaved(x, angles):
    """Neighbouring dims are a pair."""
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + swapped * sin


def complex_phases(x, angles):
    """Neighbouring dims are one complex number."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def no_rotation(x, angles):
    return x


class Decoder(nn.Module):
    """One attention block without a cache; `rotate` is what the test is about."""

    def __init__(self, rotate, *, key_norm=False, heads_first=True):
        super().__init__()
        self.rotate, self.heads_first = rotate, heads_first
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.k = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.v = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.key_norm = nn.RMSNorm(HEAD_DIM) if key_norm else nn.Identity()
        self.register_buffer("rates", 10.0 ** -torch.linspace(0, 3, HEAD_DIM // 2))

    def heads(self, x, heads, norm=None):
        x = x.unflatten(-1, (heads, HEAD_DIM))
        x = x if norm is None else norm(x)
        angles = self.angles(x.shape[1])
        if self.heads_first:
            return self.rotate(x.transpose(1, 2), angles)
        return self.rotate(x, angles[:, None]).transpose(1, 2)

    def angles(self, length):
        return torch.arange(length).float()[:, None] * self.rates

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        q, v = self.heads(self.q(x), HEADS), self.v(x).unflatten(-1, (KV_HEADS, HEAD_DIM))
        k = self.heads(self.k(x), KV_HEADS, self.key_norm)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v.transpose(1, 2)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    def keys(self, input_ids):
        """What a reader of this class would call the keys before rotation: (B, Hkv, T, D)."""
        k = self.k(self.embed(input_ids)).unflatten(-1, (KV_HEADS, HEAD_DIM))
        return self.key_norm(k).transpose(1, 2)


SPELLINGS = [whole_halves, partial_halves, interleaved, complex_phases]


def tokens(batch, length, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def pca_of(keys, mask=None):
    moments = KeyCovariance(keys.shape[1], keys.shape[3])
    moments.update(keys, mask=mask)
    return moments.pca()


def assert_same_basis(found, expected):
    # Columns may turn against each other where the variance is equal: compare the covariance.
    assert found.tokens == expected.tokens
    one, other = (b.key * b.spectrum.unsqueeze(-2) @ b.key.mT for b in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- what is fitted


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("key_norm", [False, True])
@pytest.mark.parametrize("rotate", SPELLINGS)
def test_pre_rotary_fits_the_keys_before_rotation(rotate, key_norm, heads_first):
    model = Decoder(rotate, key_norm=key_norm, heads_first=heads_first).eval()
    ids = tokens(3, 37)
    with torch.no_grad():
        nn.init.uniform_(model.key_norm.weight) if key_norm else None
        expected = pca_of(model.keys(ids))
    (basis,) = calibrate(model, [ids], calibration="pre-rotary").bases
    assert_same_basis(basis, expected)


@pytest.mark.parametrize("rotate", [*SPELLINGS, no_rotation])
def test_post_rotary_fits_the_keys_that_attention_reads(rotate):
    model, ids = Decoder(rotate).eval(), tokens(2, 29)
    with torch.no_grad():
        expected = pca_of(rotate(model.keys(ids), model.angles(29)))
    (basis,) = calibrate(model, [ids]).bases
    assert_same_basis(basis, expected)


def test_without_rotation_pre_and_post_are_one():
    model, ids = Decoder(no_rotation, key_norm=True).eval(), tokens(2, 29)
    pre, post = (
        calibrate(model, [ids], calibration=c).bases[0] for c in ("pre-rotary", "post-rotary")
    )
    assert torch.equal(pre.key, post.key)


def test_batches_of_several_lengths_add_up():
    model = Decoder(whole_halves).eval()
    batches = [tokens(2, 31, 1), tokens(1, 53, 2), tokens(3, 17, 3), tokens(2, 90, 4)]
    moments = KeyCovariance(KV_HEADS, HEAD_DIM)
    with torch.no_grad():
        for ids in batches:
            moments.update(model.keys(ids))
    seen = []
    found = calibrate(model, batches, calibration="pre-rotary", progress=seen.append)
    assert_same_basis(found.bases[0], moments.pca())
    assert seen == [62, 53, 51, 180]


def test_padding_is_not_fitted():
    model, ids = Decoder(no_rotation).eval(), tokens(2, 24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    ids[0, :9] = 0
    (basis,) = calibrate(model, [{"input_ids": ids, "attention_mask": mask}]).bases
    with torch.no_grad():
        expected = pca_of(model.keys(ids), mask.bool())
        with_padding = pca_of(model.keys(ids))
    assert_same_basis(basis, expected)
    assert with_padding.tokens != basis.tokens


def test_score_optimal_ranks_by_what_queries_ask():
    model, ids = Decoder(no_rotation).eval(), tokens(4, 200)
    with torch.no_grad():
        model.q.weight[:, :] *= torch.linspace(2, 0.01, HEAD_DIM).repeat(HEADS)[:, None]
        q = model.heads(model.q(model.embed(ids)), HEADS)
        k = model.keys(ids)
    bases = {kind: calibrate(model, [ids], kind=kind).bases[0] for kind in ("pca", "score-optimal")}

    def error(basis, rank=3):
        query, key = basis.truncate(rank)
        group = q.unflatten(1, (KV_HEADS, -1)).double()
        centred = (k - k.mean((0, 2), keepdim=True)).unsqueeze(2).double()
        low = (group @ query.double().unsqueeze(1)) @ (centred @ key.double().unsqueeze(1)).mT
        return (group @ centred.mT - low).square().mean()

    assert error(bases["score-optimal"]) < 0.9 * error(bases["pca"])


def test_the_model_computes_what_it_computed_before():
    model, ids = Decoder(interleaved).eval(), tokens(2, 21)
    with torch.no_grad():
        before = model(ids)
        calibrate(model, [ids])
        assert torch.equal(model(ids), before)


# --------------------------------------------------------------------------- two uses, one weight


class Looped(nn.Module):
    """The same attention block twice: one set of weights, two key caches."""

    def __init__(self):
        super().__init__()
        self.block = Decoder(whole_halves)
        self.back = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def forward(self, input_ids):
        x, block = self.block.embed(input_ids), self.block
        for _ in range(2):
            q, k = block.heads(block.q(x), HEADS), block.heads(block.k(x), KV_HEADS)
            v = block.v(x).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
            k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.back(out.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("calibration", ["pre-rotary", "post-rotary"])
def test_a_block_used_twice_gets_a_basis_per_use(calibration):
    model, ids = Looped().eval(), tokens(2, 33)
    first, second = calibrate(model, [ids], calibration=calibration).bases
    assert first.weights == second.weights == weights_fingerprint(model.block.k.weight)
    assert not torch.allclose(first.key, second.key)
    if calibration == "pre-rotary":
        with torch.no_grad():
            assert_same_basis(first, pca_of(model.block.keys(ids)))


# ------------------------------------------------------------------- what is kept, and for how long


class Stopped(Exception):
    pass


@pytest.fixture
def samples(monkeypatch):
    """Weak references to everything that calibration keeps of prompts; fits are short."""
    for module in (attention_fit, progress):
        monkeypatch.setattr(module, "STEPS", 12)
    alive = []
    update = attention_fit.AttentionSamples.update

    def noting(self, *arguments):
        update(self, *arguments)
        alive.extend(weakref.ref(t) for t in self.prompt(self.prompts - 1).values())

    monkeypatch.setattr(attention_fit.AttentionSamples, "update", noting)
    return alive


def left_alive(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("stop", [None, Stopped, KeyboardInterrupt])
def test_samples_are_given_back_while_the_model_lives(samples, stop):
    model, batches = Decoder(whole_halves).eval(), [tokens(1, 90), tokens(1, 90, 1)]

    def stopping(_):
        if len(samples) > 4 and stop is not None:
            raise stop

    with contextlib.suppress(Stopped, KeyboardInterrupt):
        calibrate_any(model, batches, progress=stopping)
    assert len(samples) == 8
    assert left_alive(samples) == 0
    assert model(batches[0]).shape[1] == 90


def test_samples_of_a_layer_are_given_back_when_it_is_fitted(samples):
    model = Looped().eval()
    alive = []
    calibrate_any(
        model,
        [tokens(1, 90)],
        fit_progress=lambda done, _: alive.append((done, left_alive(samples))),
    )
    assert dict(alive)[1] == 8
    assert dict(alive)[13] == 4  # the second cache: what was seen of the first is gone


def stopped_run(model, batches, folder, *, kind="attention", at=2, in_fit=None):
    seen = []

    def stop(_):
        seen.append(1)
        if in_fit is None and len(seen) == at:
            raise Stopped

    def stop_fit(done, _):
        if done == in_fit:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate_any(
            model, batches, kind=kind, partial=folder, progress=stop, fit_progress=stop_fit
        )


def assert_equal_sets(one, other):
    for a, b in zip(one.bases, other.bases, strict=True):
        assert (a.weights, a.layer, a.tokens, a.kind) == (b.weights, b.layer, b.tokens, b.kind)
        for name in ("key", "query", "spectrum"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("kind", ["attention", "pca", "score-optimal"])
def test_what_was_stopped_goes_on_to_the_same_basis(kind, samples, tmp_path):
    model, batches = Decoder(whole_halves).eval(), [tokens(2, 57, n) for n in range(4)]
    whole = calibrate_any(model, batches, kind=kind)
    stopped_run(model, batches, tmp_path, kind=kind)
    calls = []
    again = calibrate_any(model, batches, kind=kind, partial=tmp_path, progress=calls.append)
    assert_equal_sets(whole, again)
    assert calls == [114] * 4
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing is left behind


def test_fitted_layers_are_kept(samples, tmp_path, monkeypatch):
    model, batches = Looped().eval(), [tokens(1, 90, n) for n in range(2)]
    whole = calibrate_any(model, batches)
    stopped_run(model, batches, tmp_path, in_fit=15)  # three steps into the second of two
    monkeypatch.setattr(
        observation.LookingOn, "run", lambda *_: pytest.fail("the text was read again")
    )
    steps = []
    again = calibrate_any(
        model, batches, partial=tmp_path, fit_progress=lambda done, _: steps.append(done)
    )
    assert steps == list(range(13, 25))
    assert_equal_sets(whole, again)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["seen", "chunk-0"])
@pytest.mark.parametrize("how", [damage, lambda path: path.write_bytes(b"no"), pathlib.Path.unlink])
def test_damaged_files_are_not_used(what, how, samples, tmp_path, caplog):
    model, batches = Decoder(whole_halves).eval(), [tokens(1, 57, n) for n in range(3)]
    whole = calibrate_any(model, batches)
    stopped_run(model, batches, tmp_path)
    (file,) = tmp_path.rglob(f"{what}.safetensors")
    how(file)
    with caplog.at_level("WARNING", "loki_compile"):
        assert_equal_sets(calibrate_any(model, batches, partial=tmp_path), whole)
    missing = what == "seen" and how is pathlib.Path.unlink  # as if nothing had been begun
    assert len([m for m in caplog.messages if "calibration begins anew" in m]) == (not missing)


@pytest.mark.parametrize("other", ["weights", "text", "settings"])
def test_what_belongs_to_another_run_is_not_used(other, samples, tmp_path):
    model, batches = Decoder(whole_halves).eval(), [tokens(1, 57, n) for n in range(3)]
    stopped_run(model, batches, tmp_path)
    rank = 0.25
    if other == "weights":
        with torch.no_grad():
            model.v.weight.mul_(1.5)
    elif other == "text":
        batches[2][0, 5] += 1
    else:
        rank = 5
    whole = calibrate_any(model, batches, rank=rank)
    assert_equal_sets(calibrate_any(model, batches, rank=rank, partial=tmp_path), whole)


def test_a_foreign_file_in_the_folder_is_not_used(samples, tmp_path, caplog):
    model, batches = Decoder(whole_halves).eval(), [tokens(1, 57, n) for n in range(3)]
    stopped_run(model, batches, tmp_path)
    mine, theirs = [tokens(1, 57, n) for n in range(5, 8)], tmp_path / "theirs"
    stopped_run(model, mine, theirs)
    (file,) = (f for f in tmp_path.rglob("seen.safetensors") if theirs not in f.parents)
    (foreign,) = theirs.rglob("seen.safetensors")
    shutil.copy(foreign, file)
    whole = calibrate_any(model, batches)
    with caplog.at_level("WARNING", "loki_compile"):
        assert_equal_sets(calibrate_any(model, batches, partial=tmp_path), whole)
    assert "belongs to another calibration" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(samples, tmp_path, caplog):
    model, batches = Decoder(whole_halves).eval(), [tokens(1, 57)]
    (tmp_path / "file").write_text("")
    with caplog.at_level("WARNING", "loki_compile"):
        found = calibrate_any(model, batches, partial=tmp_path / "file")
    assert_equal_sets(found, calibrate_any(model, batches))
    assert caplog.text.count("a stop will lose it") == 1


def test_the_time_that_is_left_is_measured(samples, monkeypatch):
    """A clock that ticks in the model and in each step: what is announced comes true."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model, batches = Looped().eval(), [tokens(1, 90, n) for n in range(4)]
    run, draw = observation.LookingOn.run, attention_fit._loss

    def slow_run(self, *arguments):
        clock[0] += 7
        return run(self, *arguments)

    def slow_loss(*arguments):
        clock[0] += 2 if torch.is_grad_enabled() else 0.75  # 32 of these are 12 steps
        return draw(*arguments)

    monkeypatch.setattr(observation.LookingOn, "run", slow_run)
    monkeypatch.setattr(attention_fit, "_loss", slow_loss)
    said = []
    calibrate_any(model, batches, expect=lambda left: said.append((clock[0], left)))
    first_at, first = said[0]
    assert first == pytest.approx(3 * 7 + 2 * 2 * 24)
    assert clock[0] - first_at == pytest.approx(first, rel=0.05)
    assert said[-1][1] == 0


# ----------------------------------------------------------------------------------- bad input


def test_a_model_without_attention_is_named_as_such():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(3, 3)

        def forward(self, input_ids):
            return self.line(input_ids.float())

    with pytest.raises(ValueError, match="runs no attention"):
        calibrate(Plain(), [torch.ones(2, 3)])


def test_dropout_is_named_as_the_reason():
    class Dropping(Decoder):
        def forward(self, input_ids):
            q = self.heads(self.q(self.embed(input_ids)), HEADS)
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)

    with pytest.raises(ValueError, match=r"dropout is on \(0.1\)"):
        calibrate(Dropping(no_rotation), [tokens(2, 21)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calibration": "rotary"}, "needs one of 'pre-rotary'"),
        ({"kind": "random"}, "needs one of"),
    ],
)
def test_unknown_choices_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        calibrate(Decoder(no_rotation), [tokens(2, 21)], **wrong)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="found no batches"):
        calibrate(Decoder(no_rotation), [])


def test_a_layout_that_sizes_cannot_tell_is_refused():
    model = Decoder(whole_halves).eval()
    with pytest.raises(ValueError, match="another batch length"):
        calibrate(model, [tokens(1, KV_HEADS)], calibration="pre-rotary")


# ------------------------------------------------------------------------- models of transformers

SMALL = {"vocab_size": 97, "max_position_embeddings": 512}
LLAMA_LIKE = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WITH_HEAD_DIM = {**LLAMA_LIKE, "head_dim": 24}
GPT_LIKE = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
# Model class, config class, its settings, and where the keys before rotation come out:
# (module of layer 0, columns of its output, KV heads).
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", WITH_HEAD_DIM, "k_proj", 2),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA_LIKE, "k_proj", 2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", WITH_HEAD_DIM, "k_norm", 2),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA_LIKE, "k_norm", 2),
    "cohere": ("CohereForCausalLM", "CohereConfig", LLAMA_LIKE, "k_proj", 2),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT_LIKE, "rotary_dim": 8}, "k_proj", 4),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT_LIKE, None, 4),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"},
        None,
        4,
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        None,
        1,
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**LLAMA_LIKE, "pad_token_id": 0}, None, 2),
}


def build(name, layers=2):
    transformers = pytest.importorskip("transformers")
    model, config, settings, tap, kv_heads = ARCHITECTURES[name]
    depth = "n_layer" if "n_layer" in settings else "num_hidden_layers"
    settings = {**settings, depth: layers}
    torch.manual_seed(1)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    return built, tap, kv_heads


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decode_graph_finds_the_calibrated_basis(name):
    """Prefill without a cache and decode with one name the same key weights."""
    from transformers import DynamicCache

    model, _, kv_heads = build(name)
    ids = tokens(2, 27)
    fitted = calibrate(model, [ids], name=name)
    assert [basis.num_kv_heads for basis in fitted.bases] == [kv_heads] * 2
    bound = []

    def look(gm, example_inputs):
        normal, _ = normalize(gm)
        config = LokiConfig(basis=fitted)
        bound.extend(bind_caches(normal, plan_graph(normal, config), example_inputs, [], config))
        return gm.forward

    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        torch.compile(model, backend=look)(ids[:, :1], past_key_values=cache, use_cache=True)
    assert [b.weights for b in bound] == [basis.weights for basis in fitted.bases]
    for found, basis in zip(bound, fitted.bases, strict=True):
        assert found.basis is basis


@pytest.mark.parametrize("name", [n for n, row in ARCHITECTURES.items() if row[3]])
def test_pre_rotary_is_what_the_key_module_puts_out(name):
    model, tap, kv_heads = build(name, layers=1)
    module = next(m for path, m in model.named_modules() if path.endswith(tap))
    caught = []
    hook = module.register_forward_hook(lambda _, __, out: caught.append(out.detach()))
    ids = tokens(3, 26)
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    keys = caught[0]
    if keys.dim() == 3:
        keys = keys.unflatten(-1, (kv_heads, -1))
    keys = keys.transpose(1, 2) if keys.shape[1] != kv_heads else keys
    basis = calibrate(model, [ids], calibration="pre-rotary").bases[0]
    assert_same_basis(basis, pca_of(keys))


def test_attention_written_out_is_observed_as_well():
    model, _, _ = build("llama", layers=1)
    ids = tokens(2, 27)
    for which in ("pre-rotary", "post-rotary"):
        found = []
        for form in ("sdpa", "eager"):
            model.set_attn_implementation(form)
            found += calibrate(model, [ids], calibration=which).bases
        assert found[0].weights == found[1].weights
        assert_same_basis(found[1], found[0])


class Grouped(Decoder):
    """Query groups have a dimension of their own; tokens lie in front of heads."""

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        q = self.heads(self.q(x), HEADS).transpose(1, 2).unflatten(2, (KV_HEADS, -1))
        k = self.heads(self.k(x), KV_HEADS, self.key_norm)
        v = self.v(x).unflatten(-1, (KV_HEADS, HEAD_DIM))
        scores = torch.einsum("btkgd,bksd->bkgts", q, k) * HEAD_DIM**-0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        out = torch.einsum("bkgts,bskd->btkgd", scores.softmax(-1), v)
        return out.flatten(2)


def test_queries_in_another_layout_are_observed_as_the_same():
    model, ids = Decoder(whole_halves).eval(), tokens(3, 37)
    grouped = Grouped(whole_halves).eval()
    grouped.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(grouped(ids), model(ids))
    both = [calibrate(m, [ids], kind="score-optimal").bases[0] for m in (model, grouped)]
    one, other = (basis.key @ basis.query.mT for basis in both)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="use another batch length, or post-rotary calibration"):
        calibrate(grouped, [ids], calibration="pre-rotary", kind="pca")


def test_learned_positions_are_not_a_rotation():
    model, _, _ = build("gpt2", layers=1)
    ids = tokens(2, 27)
    pre, post = (calibrate(model, [ids], calibration=c) for c in ("pre-rotary", "post-rotary"))
    assert all(torch.equal(a.key, b.key) for a, b in zip(pre.bases, post.bases, strict=True))
