"""What `loki eval` decodes: behind copies of one dense prefill, by the compiled decode path."""

import pytest
import torch
from toy_models import worded_llama

from loki_compile import reports
from loki_compile.commands.missed import missed_mass, slots_at, slots_in
from loki_compile.commands.models import load_tokenizer
from loki_compile.commands.tasks import Case
from loki_compile.commands.trials import DENSE, Setting, Trials, copied

transformers = pytest.importorskip("transformers")

# Long enough for the default min_context.
CONTEXT = 1100


@pytest.fixture(scope="module")
def model():
    return worded_llama()


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path / "home"))
    torch._dynamo.reset()


def ids(count, seed):
    return tuple(
        torch.randint(3, 2048, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


TEXT = Case("text", CONTEXT + 13, 0, ids(CONTEXT, 1), ids(12, 2))
ASKED = Case("single", CONTEXT + 40, 0, ids(CONTEXT, 3), ids(16, 4), answers=("x",), new_tokens=6)


def trials(model, settings, cache="static", engine="nodes", mass_steps=3):
    made = [Setting(label, options) for label, options in settings.items()]
    tokenizer = load_tokenizer("reference")
    return Trials(model, tokenizer, made, engine=engine, cache=cache, mass_steps=mass_steps)


def rows_of(runs, case, protocol, labels):
    return {row["setting"]: row for row in runs.rows(case, {protocol: [DENSE, *labels]})}


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_nearly_the_whole_budget_is_nearly_dense_and_a_small_one_is_not(model, cache):
    runs = trials(model, {"all": {"top_k": 0.999, "policy": "oracle"}, "few": {"top_k": 40}}, cache)
    found = rows_of(runs, TEXT, "text", ["all", "few"])
    assert found[DENSE]["kl"] == 0 and found[DENSE]["same"] == 1
    assert found["all"]["kl"] < 1e-3 < found["few"]["kl"]
    assert found["all"]["missed"] < 0.01 < found["few"]["missed"]
    assert len(found["few"]["missed_by_site"]) == 2
    for row in (found["all"], found["few"]):
        assert (row["sparse_steps"], row["dense_steps"]) == (len(TEXT.rest) - 1, 0)
    assert found["few"]["keys"] == 40
    # As behind a compiled prefill, although each setting decodes a copy of the cache.
    bases = str({site.basis for graph in reports() for site in graph.sites})
    assert "auto (fitted to each sequence, from the prompt's queries" in bases
    assert "from the keys alone" not in bases


def test_dense_is_what_one_call_over_all_gives(model):
    found = rows_of(trials(model, {}), TEXT, "text", [])[DENSE]
    whole = torch.tensor([[*TEXT.context, *TEXT.rest]])
    with torch.no_grad():
        logs = model(whole).logits[0, CONTEXT:-1].log_softmax(-1)
    truth = -logs.gather(1, torch.tensor(TEXT.rest[1:])[:, None]).mean()
    assert found["nats"] == pytest.approx(float(truth), abs=1e-4)


@pytest.mark.parametrize("protocol", ["sparse", "dense"])
def test_dense_answers_are_what_generate_gives(model, protocol):
    found = rows_of(trials(model, {}), ASKED, protocol, [])[DENSE]
    prompt = torch.tensor([[*ASKED.context, *ASKED.rest]])
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)[0, -6:]
    assert found["answer"] == load_tokenizer("reference").decode(tokens)


def test_a_question_is_read_by_sparse_steps_only_where_that_is_said(model):
    settings = {
        "few": {"top_k": 40, "policy": "window"},
        "all": {"top_k": 0.999, "policy": "oracle"},
    }
    runs = trials(model, settings)
    found = rows_of(runs, ASKED, "sparse", ["few", "all"])
    assert found["all"]["same"] == 1
    sparse = found["few"]
    dense = rows_of(runs, ASKED, "dense", ["few"])["few"]
    pieces = len(ASKED.rest) // 8
    assert sparse["sparse_steps"] == pieces + sparse["generated"] - 1
    assert dense["sparse_steps"] == 1 + dense["generated"] - 1


def test_bytes_are_those_of_the_index_and_of_the_chosen_rows(model):
    settings = {
        "loki": {"top_k": 100, "rank": 4},
        "window": {"top_k": 100, "policy": "window"},
        "spans": {"policy": "moa:4:60,96"},
        "half": {"policy": "loki:100,last=60", "rank": 4},
    }
    found = rows_of(trials(model, settings), TEXT, "text", list(settings))
    layers, heads, dim, size = 2, 2, 16, 4
    chosen = layers * heads * 100 * 2 * dim * size
    assert found["window"]["bytes"] == chosen
    seen = CONTEXT + 2  # behind the second of three steps, the mean
    index = layers * heads * seen * (4 + 4)  # dims of a byte, and a scale
    assert found["loki"]["bytes"] == pytest.approx(chosen + index)
    assert found["loki"]["dense_bytes"] == layers * heads * seen * 2 * dim * size
    read = layers * (100 + 60) * 2 * dim * size  # one head of each layer ranks
    assert found["half"]["bytes"] == pytest.approx(read + index / 2)
    assert found["spans"]["keys"] == (64 + 100) / 2
    assert 0 < found["spans"]["missed"] < 1


def test_settings_decode_copies_of_one_prefill(model):
    runs = trials(model, {})
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        runs.read(torch.tensor([TEXT.context]), past_key_values=cache, use_cache=True)
    twin = copied(cache)
    for layer, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
        assert other.keys.data_ptr() != layer.keys.data_ptr()
        other.keys.zero_()
        assert layer.keys.count_nonzero()


def test_missed_mass_is_the_attention_on_keys_that_are_not_read():
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, n, s, 8, generator=generator) for n, s in ((4, 1), (2, 9)))
    positions = torch.tensor([[[[0, 3, -1]], [[1, 2, 8]]]], dtype=torch.int32)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    mask[..., 5] = False
    sinks = torch.randn(4, generator=generator)
    got = missed_mass(q, k, slots_at(positions, 9), mask, scale=0.4, softcap=2.0, sink_logits=sinks)
    shares = []
    for head in range(4):
        logits = 2 * torch.tanh(0.4 * (k[0, head // 2].double() @ q[0, head, 0].double()) / 2)
        logits[5] = -torch.inf
        weights = torch.cat((logits, sinks[head : head + 1].double())).softmax(0)[:-1]
        read = [at for at in positions[0, head // 2, 0].tolist() if at >= 0]
        shares.append(float(weights.sum() - weights[read].sum()))
    assert float(got) == pytest.approx(sum(shares) / 4, abs=1e-6)


@pytest.mark.slow
def test_an_index_of_all_dims_chooses_as_the_keys_themselves(model):
    settings = {"oracle": {"top_k": 60, "policy": "oracle"}, "loki": {"top_k": 60, "rank": 1.0}}
    runs = trials(model, settings)
    text = rows_of(runs, TEXT, "text", list(settings))
    for name in ("missed", "kl", "nats"):
        assert text["loki"][name] == pytest.approx(text["oracle"][name], rel=0.02, abs=1e-5)
    answers = rows_of(runs, ASKED, "sparse", list(settings))
    assert answers["loki"]["answer"] == answers["oracle"]["answer"]


def test_slots_in_two_ranges_are_those_between_their_ends():
    ranges = torch.tensor([[[[0, 2, 5, 7]], [[1, 1, 0, 3]]]], dtype=torch.int32)
    chosen = slots_in(ranges, 8)
    assert [row.nonzero().flatten().tolist() for row in chosen[0, :, 0]] == [
        [0, 1, 5, 6],
        [0, 1, 2],
    ]


@pytest.mark.slow
def test_through_inductor_at_default_options_the_same_is_measured(model):
    interpreted = rows_of(trials(model, {"loki": {}}), TEXT, "text", ["loki"])["loki"]
    torch._dynamo.reset()
    compiled = rows_of(trials(model, {"loki": {}}, engine="inductor"), TEXT, "text", ["loki"])[
        "loki"
    ]
    for name in ("nats", "kl", "missed", "keys", "bytes"):
        assert compiled[name] == pytest.approx(interpreted[name], rel=1e-2, abs=1e-4)
    assert compiled["sparse_steps"] == len(TEXT.rest) - 1
