"""The bundled reference model: what the rest of the project relies on."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import loki_compile
from loki_compile.commands import reference_data as data

transformers = pytest.importorskip("transformers")

BUNDLED = Path(loki_compile.__file__).parent / "reference_model"
LONGEST_MB = 10


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        BUNDLED, local_files_only=True, dtype="auto"
    )
    return loaded.eval()


def test_it_loads_offline_with_the_shape_the_project_needs(model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = model.config
    assert model.dtype == torch.bfloat16
    assert config.num_key_value_heads == 2
    assert config.num_attention_heads > config.num_key_value_heads  # grouped queries
    assert config.head_dim >= 64
    assert config.max_position_embeddings >= 4096
    assert config.rope_parameters["rope_type"] == "default"


def test_everything_bundled_is_at_most_ten_megabytes():
    files = [path for path in BUNDLED.iterdir() if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= LONGEST_MB * 1e6


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x  # tabs,  two spaces\n\n\n",
        " otter copper otters coppersmith\n# otter copper\n",
        "naïve – 你好 🙂 \x00 \r\n",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(data.encode(tokenizer, text)) == text


def test_held_out_code_survives_the_tokenizer(tokenizer):
    text = data.stdlib_modules("held_out")[0][1]
    assert tokenizer.decode(data.encode(tokenizer, text)) == text


def test_no_top_level_module_is_in_both_splits():
    top_level = {
        split: {name.split("/")[0] for name, _ in data.stdlib_modules(split)}
        for split in ("train", "held_out")
    }
    assert not top_level["train"] & top_level["held_out"]
    assert len(top_level["train"]) > 5 * len(top_level["held_out"])


@pytest.mark.parametrize(("tokens", "pairs", "seed"), [(257, 7, 0), (513, 31, 1), (1023, 97, 2)])
def test_recall_answers_are_where_they_are_claimed_to_be(tokenizer, tokens, pairs, seed):
    ids, queries = data.recall_prompt(tokenizer, tokens, pairs, seed)
    assert len(ids) == tokens and len(queries) == pairs
    keys, values = (set(half.tolist()) for half in data.recall_token_ids(tokenizer))
    first_query = queries[0][0]
    context = ids[: first_query - len(data.encode(tokenizer, "\n#"))]
    assert queries[-1][0] == tokens - 2
    for at, (answer,) in queries:
        key = ids[at]
        assert key in keys and answer in values
        assert ids[at + 1] == answer
        # The fact stands exactly once before the questions, the key directly before its value.
        places = [i for i, token in enumerate(context) if token == key]
        assert len(places) == 1 and context[places[0] + 1] == answer


def test_recall_prompts_repeat_by_seed_and_differ_between_seeds(tokenizer):
    one, again, other = (data.recall_prompt(tokenizer, 400, 9, seed)[0] for seed in (3, 3, 4))
    assert one == again
    assert one != other


def test_recall_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="do not fit"):
        data.recall_prompt(tokenizer, 64, 32, seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        data.recall_prompt(tokenizer, 4096, 98, seed=0)


def test_scoring_counts_the_arg_max_at_the_query(tokenizer):
    ids, queries = data.recall_prompt(tokenizer, 300, 5, seed=8)
    logits = torch.zeros(len(ids), len(tokenizer))
    for at, (answer,) in queries[:3]:
        logits[at, answer] = 1.0
    for at, (answer,) in queries[3:]:
        logits[at, (answer + 1) % len(tokenizer)] = 1.0
    assert data.recall_correct(logits, queries) == [True] * 3 + [False] * 2


@pytest.mark.filterwarnings("ignore")
def test_it_is_trained_and_looks_things_up(model, tokenizer):
    """Held-out code costs far less than a uniform guess, and short recall beats guessing."""
    seed = random.Random(5).randrange(1000)
    ids, queries = data.recall_prompt(tokenizer, 512, 16, seed)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].float()
    start = queries[0][0] - 2
    loss = torch.nn.functional.cross_entropy(logits[: start - 1], torch.tensor(ids[1:start]))
    right = np.mean(data.recall_correct(logits, queries))
    print(f"seed {seed}: {loss:.2f} nats a token, {right:.0%} recalled")
    assert loss < 5.0  # ln(2048) = 7.6; facts cost about ln(97) for each key and value
    assert right >= 0.9  # a guess among the told values is right 1 time in 16
