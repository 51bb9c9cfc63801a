"""Default options, as people decode: conversations in turn, beam search, edits, a server's life.

Everywhere else most tests force what they test (`min_context=0`, `top_k=1.0`). Here no option is
given: contexts are longer than `min_context`, and what is read of them is the default budget.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loki_compile.pca_store.basis import BasisSet, random_basis
from loki_compile.pca_store.fingerprint import weights_fingerprint
from tally import count
from torch import Tensor
from toy_capture import clear_runtime
from toy_models import LONG, VOCABULARY, make_model, new_cache, prompt, started
from toy_options import MODES
from transformers import LlamaConfig, LlamaForCausalLM

from loki_compile import indexes, stats
from loki_compile.indexes import indexes_of

CACHES = pytest.mark.parametrize("kind", ["static", "growing"])


class Steps:
    """What `stats` have counted since this was made, or was last asked."""

    def __init__(self) -> None:
        self.before = self._now()

    def __call__(self) -> Counter[str]:
        now = self._now()
        ran = Counter({name: now[name] - self.before[name] for name in now})
        self.before = now
        return ran

    @staticmethod
    def _now() -> Counter[str]:
        return Counter({name: n for name, n in stats().items() if isinstance(n, int)})


def mostly_sparse(ran: Counter[str]) -> bool:
    return ran["sparse_steps"] >= 0.95 * (ran["sparse_steps"] + ran["dense_steps"]) > 0


def mirrored(cache) -> bool:
    """Whether each layer has an index that is the projection of the keys it holds now."""
    filled = cache.get_seq_length()
    for layer in cache.layers:
        close = []
        for index in indexes_of(layer.keys):
            rows = layer.keys[:, :, :filled].float() @ index.basis.key
            held, scale = (tensor[:, :, :filled].float() for tensor in index.tensors)  # of int8
            near = (held * scale - rows).abs() < 0.51 * scale + 1e-4
            close.append(index.valid and bool(near.all()))
        if not any(close):
            return False
    return True


# --- many conversations on one model


@CACHES
@pytest.mark.parametrize(
    ("many", "mode"),
    [(12, torch.no_grad), (12, torch.inference_mode), (40, torch.no_grad)],
    ids=["12", "12-inference", "40"],
)
def test_conversations_in_turn_stay_sparse_with_one_build_each(many, kind, mode, interpreted):
    model = make_model()
    model.compile(backend="loki")
    steps = 16 if many < 40 else 8
    with mode():
        caches = [started(model, kind, prompt(seed)) for seed in range(many)]
        ran = Steps()
        for step in range(steps):
            for cache in caches:
                model(torch.full((1, 1), step + 2), past_key_values=cache)
    ran = ran()
    count("defaults: steps of conversations in turn", many * steps)
    assert ran["sparse_steps"] + ran["dense_steps"] == many * steps
    assert mostly_sparse(ran), ran
    assert ran["rebuilds"] == many, "one layer each"


@CACHES
@pytest.mark.parametrize("theirs", ["of the same model", "of another model"])
def test_a_graph_that_is_short_of_memory_takes_no_index_of_another(
    theirs, kind, interpreted, monkeypatch
):
    """Caches of both have heads alike, so that their indexes are found alike."""
    model = make_model()
    other = model if theirs == "of the same model" else make_model()
    for each in {model, other}:
        each.compile(backend="loki")
    real, failing = indexes.project_new_keys, [False]

    def project(*args):
        if failing[0]:
            raise torch.OutOfMemoryError("no memory for 3 GiB")
        return real(*args)

    monkeypatch.setattr(indexes, "project_new_keys", project)
    with torch.no_grad():
        talk, short = started(model, kind, prompt(1)), started(other, kind, prompt(2, rows=2))
        before = started(other, kind, prompt(3, rows=2))
        for _ in range(3):  # Dynamo is done with both graphs
            model(torch.full((1, 1), 2), past_key_values=talk)
            other(torch.full((2, 1), 2), past_key_values=before)
        mine, ran = Counter(), Steps()
        for step in range(20):
            failing[0] = step < 2  # behind a prompt, a growing cache's first graph is another one
            other(torch.full((2, 1), step + 2), past_key_values=short)
            failing[0] = False
            assert ran()["dense_steps"] == 1, step
            model(torch.full((1, 1), step + 2), past_key_values=talk)
            mine.update(ran())
    assert mine["sparse_steps"] == 20 and mine["rebuilds"] == 0, mine
    assert not any(indexes_of(layer.keys) for layer in short.layers)


@CACHES
def test_beam_search_keeps_its_protection(kind, interpreted):
    """It makes every cache a new tensor at every step: no rebuild at each of them."""
    model = make_model()
    model.compile(backend="loki")
    new, ran = 60, Steps()
    with torch.no_grad():
        model.generate(
            prompt(3), num_beams=4, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            past_key_values=new_cache(model, kind), pad_token_id=0,
        )  # fmt: skip
    ran = ran()
    assert 0 < ran["rebuilds"] <= new / 3, ran


@CACHES
def test_beams_and_a_conversation_on_one_graph_do_not_decide_for_each_other(kind, interpreted):
    """As many rows as beams, so that both decode by the same graph."""
    model = make_model()
    model.compile(backend="loki")
    new, beams, theirs, ran = 60, Counter(), Counter(), Steps()
    with torch.no_grad():
        searched, talk = (started(model, kind, prompt(seed, rows=4)) for seed in (3, 9))
        for step in range(new):
            token = torch.full((4, 1), step + 2)
            searched.reorder_cache(torch.tensor([0, 0, 1, 3]))
            model(token, past_key_values=searched)
            beams.update(ran())
            model(token, past_key_values=talk)
            theirs.update(ran())
    assert mostly_sparse(theirs) and theirs["rebuilds"] == 1, theirs
    assert 0 < beams["rebuilds"] <= new / 3, beams


@CACHES
def test_answers_of_one_step_hold_no_other_conversation_back(kind, interpreted):
    """Their indexes serve one step each as well; but nothing of them goes on."""
    model = make_model()
    model.compile(backend="loki")
    with torch.no_grad():
        ran = Steps()
        for seed in range(20):
            cache = started(model, kind, prompt(seed % 3))
            model(torch.full((1, 1), 2), past_key_values=cache)
        for seed in range(3):
            cache = started(model, kind, prompt(seed, LONG + seed))
            for step in range(10):
                model(torch.full((1, 1), step + 2), past_key_values=cache)
    ran = ran()
    assert (ran["sparse_steps"], ran["dense_steps"]) == (50, 0), ran


# --- what serving code runs


@pytest.mark.parametrize(
    ("kind", "index_dtype", "dtype"),
    [
        ("static", "cache", torch.bfloat16),
        ("growing", "int8", torch.bfloat16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("static", "int8", torch.bfloat16),
                ("growing", "cache", torch.bfloat16),
                ("static", "cache", torch.float32),
                ("static", "int8", torch.float32),
                ("growing", "cache", torch.float32),
                ("growing", "int8", torch.float32),
            ]
        ),
    ],
    ids=str,
)
def test_under_inference_mode_inductors_steps_build_an_index_once(kind, index_dtype, dtype, fresh):
    """The engine is the real one: fused, it rounds otherwise than the projection of an index."""
    steps = 50
    model = make_model(dtype=dtype)
    model.compile(backend="loki", options={"index_dtype": index_dtype})
    with torch.inference_mode():
        cache = started(model, kind, prompt(1))
        ran = Steps()
        for step in range(steps):
            model(torch.full((1, 1), step + 2), past_key_values=cache)
    ran = ran()
    assert ran["sparse_steps"] == steps and ran["rebuilds"] == 1, ran


@torch.no_grad()
def test_an_index_is_int8_of_half_the_dims_or_of_what_a_stored_basis_holds(interpreted):
    heads, dims = 2, 16
    model = make_model()
    weights = weights_fingerprint(model.model.layers[0].self_attn.k_proj.weight)

    def layout(**options) -> tuple[torch.dtype, int, int]:
        torch._dynamo.reset()
        clear_runtime()
        model.compile(backend="loki", options=options)
        cache = started(model, "growing", prompt(1))
        for token in (2, 3):
            model(torch.tensor([[token]]), past_key_values=cache)
        (index,) = indexes_of(cache.layers[0].keys)
        return index.tensors[0].dtype, index.tensors[0].shape[-1], len(index.tensors)

    few = random_basis(heads, dims, seed=0, weights=weights)
    columns = few.key[..., :3].contiguous()
    few = dataclasses.replace(few, key=columns, query=columns, kind="attention")
    assert layout() == (torch.int8, 8, 2)
    assert layout(basis=BasisSet((few,))) == (torch.int8, 3, 2)
    assert layout(rank=5) == (torch.int8, 5, 2)
    assert layout(rank=0.25, index_dtype="cache") == (torch.float32, 4, 1)


# --- whose basis it is


def narrow_model() -> LlamaForCausalLM:
    """Keys live in 6 of 64 dims of each head, as trained keys do; an index has 32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            max_position_embeddings=4096, initializer_range=0.25,
            rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        plane = torch.randn(128, 6)
        weights = [torch.randn(64, 6) @ plane.T for _ in range(2)]
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.copy_(torch.cat(weights) * 0.03)
    return model


def converse(model, ids: Tensor, steps: int = 8) -> tuple[Tensor, list[Tensor]]:
    """Logits (steps,VOCABULARY) of the last tokens of a text (1,N), and each layer's key basis."""
    cache = new_cache(model, "growing")
    with torch.no_grad():
        model.forward(ids[:, :-steps], past_key_values=cache, logits_to_keep=1)
        logits = [
            model(ids[:, at : at + 1], past_key_values=cache).logits[0, -1]
            for at in range(ids.shape[1] - steps, ids.shape[1])
        ]
    bases = [indexes_of(layer.keys)[-1].basis.key for layer in cache.layers if layer.keys.numel()]
    return torch.stack(logits), bases


WARM_UP = torch.full((1, 1100), 42)


def test_a_warm_up_does_not_decide_how_later_prompts_are_ranked(interpreted):
    model, text = narrow_model(), prompt(1, 1400)
    eager = []
    cache = new_cache(model, "growing")
    with torch.no_grad():
        model.forward(text[:, :-8], past_key_values=cache, logits_to_keep=1)
        for at in range(1392, 1400):
            eager.append(model(text[:, at : at + 1], past_key_values=cache).logits[0, -1])
    errors = []
    for warmed in (False, True):
        torch._dynamo.reset()
        clear_runtime()
        model = narrow_model()
        model.compile(backend="loki")
        if warmed:
            converse(model, WARM_UP)
        logits, _ = converse(model, text)
        errors.append(float((logits - torch.stack(eager)).abs().mean()))
    cold, warm = errors
    assert stats()["sparse_steps"] == 16
    assert warm <= 1.05 * cold, errors


def test_a_conversation_inherits_no_basis(interpreted):
    """Its basis is the one that it has where it is the first of the process."""
    text = prompt(1, 1400)
    model = narrow_model()
    model.compile(backend="loki")
    expected, (basis,) = converse(model, text)

    torch._dynamo.reset()
    clear_runtime()
    model = narrow_model()
    model.compile(backend="loki")
    converse(model, WARM_UP)
    found = {"after another": converse(model, text)}
    torch._dynamo.reset()
    found["after dynamo.reset"] = converse(model, text)
    model = narrow_model()
    model.compile(backend="loki")
    found["in a second model"] = converse(model, text)
    inherited = [
        name
        for name, (logits, (ours,)) in found.items()
        if max((ours - basis).abs().max(), (logits - expected).abs().max()) > 1e-4
    ]
    assert not inherited


@MODES
def test_a_static_cache_that_starts_again_has_a_basis_of_its_new_keys(mode, interpreted):
    """Reset and filled with another prompt: what the memory held before decides nothing."""
    model = make_model()
    model.compile(backend="loki")
    with mode():
        used, unused = new_cache(model, "static"), new_cache(model, "static")
        bases = []
        for cache, prompts in ((used, (1, 2)), (unused, (2,))):
            for seed in prompts:
                cache.reset()
                model.forward(prompt(seed), past_key_values=cache, logits_to_keep=1)
                model(torch.full((1, 1), 2), past_key_values=cache)
            bases.append(indexes_of(cache.layers[0].keys)[0].basis.key)
    torch.testing.assert_close(*bases, rtol=0, atol=1e-4)


def test_a_conversation_after_a_change_of_weights_has_a_basis_of_its_own_keys(interpreted):
    """What an adapter that is merged does, or is switched, while graphs stay as they are."""
    text = prompt(1, 1400)
    bases = []
    for before in (False, True):
        torch._dynamo.reset()
        clear_runtime()
        model = narrow_model()
        model.compile(backend="loki")
        if before:
            converse(model, text)
        with torch.no_grad():
            weight = model.model.layers[0].self_attn.k_proj.weight
            weight.copy_(weight.flip(0))
        bases.append(converse(model, text)[1][0])
    torch.testing.assert_close(*bases, rtol=0, atol=1e-4)


# --- memory


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def alive_bytes() -> int:
    """Of all tensors that Python knows."""
    gc.collect()
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) is Tensor and x.device.type == "cpu" and x.layout == torch.strided
    }
    return sum(held.values())


def generate_once(model, number: int) -> None:
    length = LONG + 37 * (number % 5)
    model.generate(
        prompt(number, length), max_new_tokens=4 + number % 3, do_sample=False, pad_token_id=0,
        past_key_values=new_cache(model, ("growing", "static")[number % 2]),
    )  # fmt: skip


@torch.no_grad()
def test_generate_calls_of_varying_lengths_leave_no_tensor_behind(interpreted):
    model = make_model(2)
    model.compile(backend="loki")
    for number in range(10):
        generate_once(model, number)
    before, ran = alive_bytes(), Steps()
    for number in range(10, 20):
        generate_once(model, number)
        gc.collect()
        assert stats()["index_bytes"] == 0
    ran = ran()  # of 3 to 5 decode steps for each prefill
    assert ran["sparse_steps"] >= 3 * 10, ran
    # A basis is 2 * 2 * 16 * 4 * 4 bytes for each layer: none of them stays with each call.
    assert alive_bytes() - before < 2000


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@torch.no_grad()
def test_resident_memory_is_flat_over_500_generate_calls(interpreted):
    model = make_model(2)
    model.compile(backend="loki")
    numbers, sizes = [], []
    for number in range(500):
        generate_once(model, number)
        if number >= 100 and number % 20 == 0:
            gc.collect()
            assert stats()["index_bytes"] == 0
            numbers.append(number)
            sizes.append(resident_bytes())
    slope = float(np.polyfit(numbers, sizes, 1)[0])
    index = 2 * 2 * LONG * 4 * 4  # layers, KV heads, keys, rank, fp32
    assert slope < index / 10, f"{slope:.0f} bytes per call"


# --- what people do to a cache between two steps


def eager_turn(model, cache, filled):
    model.forward(prompt(5, 30, rows=2), past_key_values=cache)


def reset_and_fill_alike(model, cache, filled):
    """The trap: as many tokens as before, in the same tensors."""
    cache.reset()
    model.forward(prompt(6, filled, rows=2), past_key_values=cache, logits_to_keep=1)


def reset_and_fill_one_less(model, cache, filled):
    """The trap of who counts the next step in."""
    cache.reset()
    model.forward(prompt(6, filled - 1, rows=2), past_key_values=cache, logits_to_keep=1)


def crop(model, cache, filled):
    cache.crop(-5)


def crop_and_fill_alike(model, cache, filled):
    cache.crop(-20)
    model.forward(prompt(7, 20, rows=2), past_key_values=cache)


def reorder(model, cache, filled):
    cache.reorder_cache(torch.tensor([1, 0]))


def edit_in_place(model, cache, filled):
    for layer in cache.layers:
        layer.keys[:, :, 100:600].neg_()


def swap_rows_in_place(model, cache, filled):
    for layer in cache.layers:
        layer.keys.copy_(layer.keys.flip(0))
        layer.values.copy_(layer.values.flip(0))


EDITS = [eager_turn, reset_and_fill_alike, reset_and_fill_one_less, crop, crop_and_fill_alike]
EDITS += [reorder, edit_in_place, swap_rows_in_place]


@CACHES
@MODES
def test_an_edit_between_two_steps_is_in_the_index(kind, mode, interpreted):
    model = make_model()
    model.compile(backend="loki")
    wrong = {}
    for edit in EDITS:
        if kind == "static" and edit in (crop, crop_and_fill_alike):
            continue  # a static cache cannot be cropped
        with mode():
            cache = started(model, kind, prompt(4, rows=2))
            for step in range(3):
                model(torch.full((2, 1), step + 2), past_key_values=cache)
            assert mirrored(cache)
            edit(model, cache, LONG + 3)
            ran = Steps()
            right = []
            for step in range(3):
                model(torch.full((2, 1), step + 9), past_key_values=cache)
                right.append(mirrored(cache))
        ran = ran()
        found = ran["sparse_steps"], ran["rebuilds"], all(right)
        # Where writes are counted, the index of what is left is known to be true.
        kept = kind == "growing" and edit is crop and mode is not torch.inference_mode
        if found != (3, 0 if kept else 1, True):
            wrong[edit.__name__] = found
        count("defaults: edits of a cache")
    assert not wrong, "(sparse steps, rebuilds, the index is of the keys)"
