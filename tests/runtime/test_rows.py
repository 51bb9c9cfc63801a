"""A row decides by what it sees: batches, windows and sites of unlike lengths, at default options.

Rows below `min_context` must come out as they do alone, and as eager attention computes them,
however long their neighbours are. Most tests run with an interpreter in Inductor's place; those
that say so run Inductor. The reads of every row are counted where the kernels are called.
"""

from __future__ import annotations

import pytest
import torch
from toy_capture import recorded
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutput

from loki_compile import stats

KINDS = ["dynamic", "static"]
STEPS = 4
MIN_CONTEXT, SINK, RECENT = 1024, 4, 32  # the defaults, as README has them
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,  # large enough that a row with few of its keys is far off
}
ROUNDING = 2e-5  # of the logits' standard deviation


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their mask, (B, T) each."""
    ids = torch.randint(2, 256, (len(lengths), max(lengths)))
    position = torch.arange(max(lengths))
    return ids, (position >= max(lengths) - torch.tensor(lengths)[:, None]).long()


def alone(ids: torch.Tensor, mask: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of a batch without its padding."""
    kept = ids[row, mask[row] > 0][None]
    return kept, torch.ones_like(kept)


def empty_cache(kind: str, model, slots: int):
    if kind == "dynamic":
        return DynamicCache()  # of full length in layers with windows as well
    full = LlamaConfig(**{**SIZES, "num_hidden_layers": model.config.num_hidden_layers})
    return StaticCache(config=full, max_cache_len=slots)


@torch.no_grad()
def decode(step, model, prompt, kind="dynamic", new=1, slots=None) -> torch.Tensor:
    """Logits (B, STEPS * new, V) of tokens that follow the prompt, `new` at a time by `step`.

    `slots`, of a static cache: as many as the prompt and its answer need. Caches of equal slots
    share what is compiled.
    """
    ids, mask = prompt
    cache = empty_cache(kind, model, slots or ids.shape[1] + STEPS * new)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    out = []
    for n in range(STEPS):
        mask = torch.cat([mask, mask.new_ones(len(mask), new)], 1)
        tokens = (torch.arange(new) + 10 + n * new).expand(len(mask), -1)
        positions = mask.cumsum(-1)[:, -new:] - 1
        call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        out.append(step(tokens, **call).logits)
    return torch.cat(out, 1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def reads(calls) -> list[torch.Tensor]:
    """Keys that each row of each call of `select` chose: (B, heads, S)."""
    return [(positions >= 0).sum(-1) for _, positions in calls]


def check_rows(model, prompt, kind, new=1, short=()):
    """The rows of `short` are what they are alone and what eager makes of them, the others what
    they are alone; returns the calls of `select` for the batch."""
    eager = decode(model, model, prompt, kind, new)
    fast = torch.compile(model, backend="loki")  # the defaults, so a basis for each row
    slots = prompt[0].shape[1] + STEPS * new
    by_themselves = [
        decode(fast, model, alone(*prompt, row), kind, new, slots) for row in range(len(eager))
    ]
    before = stats()["sparse_steps"]
    calls: list = []
    with recorded("select", calls):
        found = decode(fast, model, prompt, kind, new)
    assert stats()["sparse_steps"] - before == STEPS, "a dense batch shows nothing"
    for row in range(len(eager)):
        assert error(found[row], by_themselves[row][0]) < ROUNDING, f"row {row} and the row alone"
        if row in short:
            assert error(found[row], eager[row]) < ROUNDING, f"row {row} and eager"
            exact = decode(model, model, alone(*prompt, row), kind, new)[0]
            assert error(found[row], exact) < ROUNDING, f"row {row} alone and eager"
        else:
            assert error(found[row], eager[row]) > 100 * ROUNDING, f"row {row} was not sparse"
    return calls


# --- batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lengths", "layers"), [((2000, 50), 2), ((3000, 700, 20), 1)], ids=str)
def test_a_short_row_beside_a_long_one_is_what_it_is_alone(lengths, layers, kind, interpreted):
    short = range(1, len(lengths))
    model = llama(num_hidden_layers=layers)
    calls = check_rows(model, left_padded(*lengths), kind, short=short)
    assert len(calls) == STEPS * layers
    for n, read in enumerate(reads(calls)):
        seen = [length + n // layers + 1 for length in lengths]
        expected = [-(-seen[0] // 8), *seen[1:]]
        assert (read == torch.tensor(expected).view(-1, 1, 1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index_dtype", ["cache", "int8"])
def test_long_rows_rank_by_what_they_see_themselves(kind, index_dtype, interpreted):
    """Neither the padding in front of a row nor its neighbours' keys are in its basis."""
    model, prompt = llama(), left_padded(2000, 1400)
    fast = torch.compile(model, backend="loki", options={"index_dtype": index_dtype})
    found = decode(fast, model, prompt, kind, 1)
    for row in range(2):
        by_itself = decode(fast, model, alone(*prompt, row), kind, 1, 2000 + STEPS)[0]
        assert error(found[row], by_itself) < ROUNDING
    assert stats()["sparse_steps"] == 3 * STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [2, 3])
def test_each_of_several_new_tokens_counts_what_it_sees(new, kind, interpreted):
    check_rows(llama(), left_padded(1300, 50, 7), kind, new, short=(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_one_step_fall_on_both_sides_of_min_context(kind, interpreted):
    model, calls = llama(), []
    fast = torch.compile(model, backend="loki")
    with recorded("select", calls):
        decode(fast, model, left_padded(1500, MIN_CONTEXT - 3), kind, new=3)
    first = reads(calls)[0]
    assert (first[0] == 188).all()
    assert first[1].tolist() == [[1022, 1023, 128]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_a_prefix_count_it_with_their_own(kind, interpreted):
    """40 tokens for both; then 1500 of one, and behind a hole 30 of the other."""
    ids, mask = left_padded(1540, 1540)
    ids[1, :40] = ids[0, :40]
    mask[1, 40:-30] = 0
    calls = check_rows(llama(), (ids, mask), kind, short=(1,))
    assert (reads(calls)[0][1] == 71).all()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_choose_for_themselves_read_all_in_a_short_row(kind, interpreted):
    model, prompt, calls = llama(), left_padded(1200, 50), []
    eager = decode(model, model, prompt, kind)
    fast = torch.compile(model, backend="loki", options={"share": "head"})
    with recorded("select", calls):
        found = decode(fast, model, prompt, kind)
    assert reads(calls)[0].shape == (2, 4, 1)
    assert error(found[1], eager[1]) < ROUNDING and error(found[0], eager[0]) > 100 * ROUNDING


def test_a_short_row_of_cached_latents_reads_all(interpreted):
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    latent = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8}
    heads = {"qk_nope_head_dim": 12, "v_head_dim": 10, "num_key_value_heads": 4}
    config = DeepseekV3Config(**sizes, **latent, **heads, first_k_dense_replace=1)
    model, calls = DeepseekV3ForCausalLM(config).eval(), []
    prompt = left_padded(1200, 50)
    eager = decode(model, model, prompt)
    fast = torch.compile(model, backend="loki")
    with recorded("select", calls):
        found = decode(fast, model, prompt)
    assert reads(calls)[0].flatten().tolist()[-1] == 51
    assert error(found[1], eager[1]) < 10 * ROUNDING and error(found[0], eager[0]) > 100 * ROUNDING


# --- sites of one model


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_below_min_context_in_a_long_cache_is_read_whole(kind, interpreted):
    """A layer whose mask shows 300 keys of 2000: what it computes is what it did."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=300)).eval()
    ids, mask = left_padded(2000, 150)
    eager, calls = decode(model, model, (ids, mask), kind), []
    fast = torch.compile(model, backend="loki")
    with recorded("select", calls):
        found = decode(fast, model, (ids, mask), kind)
    assert stats()["sparse_steps"] == STEPS
    assert error(found, eager) < ROUNDING
    assert reads(calls)[0][:, 0, 0].tolist() == [300, 151]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_a_window_and_one_without_have_budgets_of_their_own(kind, interpreted):
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "num_hidden_layers": 2}
    config = Gemma3TextConfig(**sizes, sliding_window=300, layer_types=layers)
    model, calls = Gemma3ForCausalLM(config).eval(), []
    fast = torch.compile(model, backend="loki")
    with recorded("select", calls):
        decode(fast, model, left_padded(2000, 150), kind)
    window, full = reads(calls)[:2]
    assert window[:, 0, 0].tolist() == [300, 151] and full[:, 0, 0].tolist() == [251, 151]


def encoder_decoder(kind: str, backend: str | None, dtype=torch.float32, frames: int = 3000):
    """24 steps of a decoder over an encoder's output: logits (1, 24, V), self-attention's reads.

    The encoder's rows are all equal, so that cross attention gives the same whichever it reads:
    what differs is self-attention's.
    """
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 256}
    config = BartConfig(
        **sizes, **heads, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.3,
        max_position_embeddings=3100,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.to(dtype)
    rows = torch.randn(1, 1, 64).to(dtype)
    encoded = BaseModelOutput(rows.expand(1, frames, 64).contiguous())
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if kind == "static":
        parts = [StaticCache(config=config, max_cache_len=slots) for slots in (1500, frames)]
        cache = EncoderDecoderCache(*parts)
    step = torch.compile(model, backend=backend) if backend else model
    tokens, out, calls = torch.randint(3, 256, (1, 25)), [], []
    with torch.no_grad(), recorded("select", calls):
        for n in range(25):
            run = step if n else model  # the first fills the cross attention's cache
            here = {"encoder_outputs": encoded, "past_key_values": cache}
            out.append(run(decoder_input_ids=tokens[:, n : n + 1], **here).logits)
    return torch.cat(out, 1), reads(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_self_attention_reads_all_beside_a_long_cross_attention(kind, interpreted):
    exact, _ = encoder_decoder(kind, None, torch.float64)
    eager, _ = encoder_decoder(kind, None)
    found, read = encoder_decoder(kind, "loki")
    assert error(found.double(), exact) <= 2 * error(eager.double(), exact) + ROUNDING
    assert stats()["sparse_steps"] == 24 and len(read) == 2 * 24
    for n in range(24):
        own, cross = read[2 * n : 2 * n + 2]  # self-attention first
        assert (own == n + 2).all() and (cross == 375).all()


# --- README's sentences, through the compiled path


def choices(prompt, **options):
    """`select`'s choice in the first step after the prompt: of each row, the set of keys."""
    model, calls = llama(), []
    fast = torch.compile(model, backend="loki", options=options)
    with recorded("select", calls):
        decode(fast, model, prompt)
    return [set(row[0, 0][row[0, 0] >= 0].tolist()) for row in calls[0][1]]


def test_min_context_says_from_how_many_visible_keys_on_a_row_is_sparse(interpreted):
    lengths = (1800, MIN_CONTEXT, MIN_CONTEXT - 1, MIN_CONTEXT - 2, 60, 1)  # and the new token
    read = [len(row) for row in choices(left_padded(*lengths))]
    assert read == [226, 129, 128, 1023, 61, 2]


@pytest.mark.parametrize("top_k", [0.125, 0.001, 40])
def test_sink_first_and_recent_last_visible_keys_are_always_kept(top_k, interpreted):
    lengths = (1500, 1100)
    rows = choices(left_padded(*lengths), top_k=top_k)
    for length, chosen in zip(lengths, rows, strict=True):
        first, last = 1500 - length, 1500
        kept = set(range(first, first + SINK)) | set(range(last - RECENT + 1, last + 1))
        assert kept <= chosen
        assert top_k != 0.001 or chosen == kept, "a fraction of 2 keys: these and no others"


def test_sinks_and_recent_keys_count_towards_top_k(interpreted):
    prompt = left_padded(1500, 1100)
    assert [len(row) for row in choices(prompt, top_k=40)] == [40, 40]
    assert [len(row) for row in choices(prompt, top_k=40, sink=8, recent=32)] == [40, 40]


def test_top_k_is_a_fraction_of_what_the_row_sees_or_a_count(interpreted):
    prompt = left_padded(1999, 1199, 300)
    assert [len(row) for row in choices(prompt)] == [250, 150, 301]
    assert [len(row) for row in choices(prompt, top_k=0.5)] == [1000, 600, 301]
    assert [len(row) for row in choices(prompt, top_k=200)] == [200, 200, 301]


def test_forced_sparse_every_row_is_sparse_and_keeps_its_sinks(interpreted):
    read = choices(left_padded(600, 100, 20), min_context=0)
    assert [len(row) for row in read] == [76, SINK + RECENT, 21]


# --- Inductor below


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_row_beside_a_long_one_under_inductor(kind):
    check_rows(llama(), left_padded(2000, 50), kind, short=(1,))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("kind", KINDS)
def test_self_attention_beside_a_long_cross_attention_under_inductor(kind):
    exact, _ = encoder_decoder(kind, None, torch.float64)
    eager, _ = encoder_decoder(kind, None)
    found, read = encoder_decoder(kind, "loki")
    assert error(found.double(), exact) <= 2 * error(eager.double(), exact) + ROUNDING
    assert len(read) == 2 * 24


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "policy",
    [
        "loki",
        pytest.param(
            {0: "loki:1500,0.2N", 1: "oracle:from=0.1,last=200+0.1N"},
            marks=pytest.mark.slow, id="heads apart",
        ),
    ],
)  # fmt: skip
def test_lengths_where_other_terms_of_the_slots_are_the_largest_recompile_nothing(policy):
    """1023 slots for a short row, or an eighth of a long cache: one graph, whatever the length."""
    model = llama(max_position_embeddings=32768, num_hidden_layers=2)
    fast = torch.compile(model, backend="loki", dynamic=True, options={"policy": policy})
    shape = (2, 2, 20_000, 16)
    keys, values = torch.randn(shape), torch.randn(shape)
    compiled = []
    with torch.no_grad():
        for length in (1500, 2000, 8180, 8190, 20_000, 1100, 9000):
            cache = DynamicCache()
            for layer in range(2):
                cache.update(keys[:, :, :length], values[:, :, :length], layer)
            mask = torch.ones(2, length + 1, dtype=torch.long)
            mask[1, :-50] = 0
            fast(torch.full((2, 1), 7), attention_mask=mask, past_key_values=cache)
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert stats()["sparse_steps"] == 7
    assert compiled == compiled[:1] * 7, "a length had to be compiled anew"
