"""When something breaks, many threads decode, or many conversations come and go.

A fault ends in dense attention with one warning and right outputs, or is raised before the model's
cache is written; no index that it left half-way is used again. One case is left where an error is
raised behind a write: a window that has moved its rows.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from loki_compile.pca_store.store import Store
from tally import count
from torch.multiprocessing import reductions
from toy_attends import gqa_repeat_kv
from toy_capture import is_sparse
from toy_conversation import Conversation, basis_for, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import left_padded, no_mask
from toy_models import tiny_deepseek, tiny_llama
from toy_options import EVERYTHING, FEW, MODES
from toy_writes import cat_bhtd, index_copy_method, roll_window
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    Qwen3NextConfig,
    StaticCache,
)

from loki_compile import (
    buffers,
    builds,
    caches,
    fast_path,
    fits,
    index_record,
    indexes,
    lengths,
    prompts,
    recovery,
    reports,
    runtime,
    setbacks,
    stats,
    step_indexes,
    steps,
    trails,
    variants,
    witness,
)
from loki_compile.engines import interpreter
from loki_compile.indexes import indexes_of

STATIC = Spelling(index_copy_method, mask=left_padded)
GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)
BOTH = pytest.mark.parametrize("spelling", [STATIC, GROWING], ids=["static", "growing"])
pytestmark = [
    pytest.mark.soak,
    pytest.mark.covers,
    pytest.mark.usefixtures("interpreted", "compiled_at_once"),
]


def compiled(module, **options):
    return torch.compile(module, backend="loki", options=options)


def compare(fast, module, here, there, steps) -> None:
    for x in tokens(here.spelling, steps):
        torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=2e-5)


def warnings_in(caplog) -> list[str]:
    ours = [record for record in caplog.records if record.name == "loki_compile"]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


# --- faults


class OutOfMemory:
    """Projecting a cache's keys runs out of memory at one call, and gives NaN at another."""

    def __init__(self, monkeypatch, at: int, torn: int | None = None) -> None:
        self.at, self.torn, self.calls = at, torn, 0
        self.real = indexes.project_new_keys
        monkeypatch.setattr(indexes, "project_new_keys", self)

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise torch.OutOfMemoryError("no memory for 3 GiB")
        rows, scale = self.real(*args)
        return (rows * torch.nan if self.calls == self.torn else rows), scale


@BOTH
@MODES
@pytest.mark.parametrize("call", [1, 2])
def test_no_memory_for_an_index_is_dense_with_one_warning(
    spelling, mode, call, monkeypatch, caplog
):
    OutOfMemory(monkeypatch, call)
    with mode():
        module = ToyDecoder(spelling).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(spelling)
        there = here.fork()
        compare(fast, module, here, there, 3)
        here.step(module, x := tokens(spelling, 1)[0])  # an eager step: the index is built anew
        there.step(module, x)
        compare(fast, module, here, there, 3)
    found = warnings_in(caplog)
    assert len(found) == 1 and "index" in found[0] and "no memory for 3 GiB" in found[0]
    assert stats()["dense_steps"] > 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_deepseek])
@pytest.mark.parametrize("kind", ["static", "growing"])
def test_no_memory_for_the_second_layers_index_is_dense_with_one_warning(
    make, kind, monkeypatch, caplog
):
    OutOfMemory(monkeypatch, 2)
    model = make()
    fast = compiled(model, **EVERYTHING)
    with torch.no_grad():
        here, there = (new_cache(model, kind) for _ in range(2))
        for past in (here, there):
            ids = model(torch.arange(10)[None], past_key_values=past).logits[:, -1:].argmax(-1)
        found, expected = decode(fast, here, ids), decode(model, there, ids)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=2e-4)
    (warning,) = warnings_in(caplog)
    assert "index" in warning and "no memory for 3 GiB" in warning
    assert stats()["dense_steps"] == (6 if kind == "static" else 1)


@BOTH
@pytest.mark.parametrize("strict", [False, True])
def test_no_memory_to_keep_an_index_loses_no_step(
    spelling, strict, monkeypatch, use_engine, caplog
):
    """It is found out behind the writes: that step is right, and the index is built anew.

    Where writes are counted, nothing is made behind a step that finds all as the last left it.
    """
    steps, behind, real = itertools.count(1), [], indexes.adopt

    def adopt(*args, **named):
        if behind:
            behind.clear()
            raise torch.OutOfMemoryError("no memory for 3 GiB")
        return real(*args, **named)

    def engine(gm, inputs, **options):
        run = interpreter(gm, inputs, **options)

        def step(*args):
            outputs = run(*args)
            if next(steps) == 2:
                behind.append(1)
            return outputs

        return step

    monkeypatch.setattr(indexes, "adopt", adopt)
    use_engine(engine)
    with torch.inference_mode():
        module = ToyDecoder(spelling).eval()
        fast = compiled(module, basis=basis_for(module), strict=strict, **EVERYTHING)
        here = Conversation.start(spelling)
        compare(fast, module, here, here.fork(), 5)
    assert len(warnings_in(caplog)) == (not strict)
    assert stats()["sparse_steps"] == (5 if strict else 2)
    assert stats()["rebuilds"] == (2 if strict else 1)


def test_an_index_left_half_way_is_not_used_again(monkeypatch, caplog):
    """Its memory is written over by the rebuild that failed; another graph finds its record."""
    monkeypatch.setattr(indexes, "REBUILD_TOKENS", 20)
    OutOfMemory(monkeypatch, 5, torn=4)  # each rebuild of 41 slots takes three
    with torch.inference_mode():
        module = ToyDecoder(STATIC).eval()
        here = Conversation.start(STATIC)
        options = {**EVERYTHING, "basis": basis_for(module)}
        here.step(compiled(module, **options), tokens(STATIC, 1)[0])
        here.filled -= 1  # not where the index ended: rebuilt, which fails
        torch._dynamo.reset()
        here.step(compiled(module, **options), tokens(STATIC, 1)[0])
        assert not indexes_of(here.keys)  # given back
        torch._dynamo.reset()
        fast = compiled(module, **options)
        compare(fast, module, here, here.fork(), 2)
    (index,) = indexes_of(here.keys)
    assert index.valid and not index.tensors[0].isnan().any()


def test_under_strict_no_memory_is_raised_before_the_cache_is_written(monkeypatch):
    OutOfMemory(monkeypatch, 1)
    with torch.no_grad():
        module = ToyDecoder(STATIC).eval()
        fast = compiled(module, basis=basis_for(module), strict=True, **EVERYTHING)
        here = Conversation.start(STATIC)
        keys = here.keys.clone()
        with pytest.raises(torch.OutOfMemoryError, match="3 GiB"):
            here.step(fast, tokens(STATIC, 1)[0])
    assert torch.equal(here.keys, keys)


class Breaks:
    """A compiled sparse variant whose kernel raises at its n-th call."""

    def __init__(self, use_engine, at: int) -> None:
        self.at, self.calls = at, 0

        def build(gm, inputs, **options):
            run = interpreter(gm, inputs, **options)
            if not is_sparse(gm):
                return run

            def broken(*args):
                self.calls += 1
                outputs = run(*args)
                if self.calls == self.at:  # after the writes: the worst moment
                    raise RuntimeError("an illegal instruction was encountered")
                return outputs

            return broken

        use_engine(build)


@BOTH
@MODES
@pytest.mark.parametrize("at", [1, 3])
def test_a_kernel_that_raises_is_dense_with_one_warning(spelling, mode, at, use_engine, caplog):
    Breaks(use_engine, at)
    with mode():
        module = ToyDecoder(spelling).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(spelling)
        there = here.fork()
        compare(fast, module, here, there, 6)
    assert torch.equal(here.keys, there.keys) and torch.equal(here.values, there.values)
    found = warnings_in(caplog)
    assert len(found) == 1 and "illegal instruction" in found[0]
    ran = stats()["sparse_steps"], stats()["dense_steps"]
    if spelling is STATIC:
        assert ran == (at - 1, 7 - at)
    else:  # the graph of the first length is another one
        assert sum(ran) == 6 and ran[1] >= 1


@MODES
@pytest.mark.parametrize("at", [1, 3])
def test_a_kernel_that_raises_does_not_advance_a_cache_twice(mode, at, use_engine, caplog):
    """A static cache of transformers counts its tokens in a tensor, in the graph."""
    Breaks(use_engine, at)
    model = tiny_llama()
    fast = compiled(model, **EVERYTHING)
    ids = torch.randint(64, (1, 30))
    with mode():
        here, there = (StaticCache(model.config, max_cache_len=40) for _ in range(2))
        for past in (here, there):
            model(ids[:, :10], past_key_values=past)
        for number in range(10, 16):
            out, expected = (
                run(ids[:, number : number + 1], past_key_values=past).logits
                for run, past in ((fast, here), (model, there))
            )
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-4)
    assert [int(layer.cumulative_length) for layer in here.layers] == [16, 16]
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize(
    ("kind", "at", "mode"),  # every pair of two values meets
    [
        ("static", 1, torch.no_grad),
        ("static", 2, torch.inference_mode),
        ("static", 4, torch.no_grad),
        ("growing", 1, torch.inference_mode),
        ("growing", 2, torch.no_grad),
        ("growing", 4, torch.inference_mode),
    ],
)
def test_a_kernel_that_raises_over_cached_latents_is_dense_with_right_tokens(
    kind, at, mode, use_engine, caplog
):
    """The dense variant expands keys into fresh tensors; the sparse one had dropped those."""
    Breaks(use_engine, at)
    model = tiny_deepseek()
    fast = compiled(model, **EVERYTHING)
    ids = torch.randint(64, (1, 10))
    with mode():
        here, there = (new_cache(model, kind) for _ in range(2))
        for past in (here, there):
            first = model(ids, past_key_values=past).logits[:, -1:].argmax(-1)
        found, expected = (decode(run, past, first) for run, past in ((fast, here), (model, there)))
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=2e-4)
    assert found[0] == expected[0]
    for ours, theirs in zip(here.layers, there.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=2e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=2e-4)
    assert len(warnings_in(caplog)) == 1
    ran = stats()["sparse_steps"], stats()["dense_steps"]
    if kind == "growing" and at == 1:
        assert ran == (5, 1)  # the graph of the first length is another one
    else:
        assert ran == (at - 1, 7 - at)


def new_cache(model, kind: str):
    if kind == "static":
        return StaticCache(model.config, max_cache_len=40)
    return DynamicCache(config=model.config)


def decode(run, past, ids: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Six greedy tokens, and the logits that each was picked from."""
    picked, logits = [], []
    for _ in range(6):
        logits.append(run(ids, past_key_values=past).logits)
        ids = logits[-1].argmax(-1)
        picked.append(int(ids))
    return picked, torch.cat(logits)


@MODES
@pytest.mark.parametrize("make", [tiny_llama, tiny_deepseek])
def test_where_dense_raises_too_the_counters_are_as_they_were(make, mode, use_engine, caplog):
    """No memory for either: the step can be taken again."""
    failing = [False]

    def build(gm, inputs, **options):
        run = interpreter(gm, inputs, **options)

        def broken(*args):
            outputs = run(*args)
            if failing[0]:
                raise torch.OutOfMemoryError("no memory for 3 GiB")
            return outputs

        return broken

    use_engine(build)
    model = make()
    fast = compiled(model, **EVERYTHING)
    ids = torch.randint(64, (1, 20))
    with mode():
        here, there = (new_cache(model, "static") for _ in range(2))
        for past in (here, there):
            model(ids[:, :10], past_key_values=past)
        for number in range(10, 16):
            step = ids[:, number : number + 1]
            if number == 13:
                failing[0] = True
                with pytest.raises(torch.OutOfMemoryError, match="3 GiB"):
                    fast(step, past_key_values=here)
                failing[0] = False
                assert [int(layer.cumulative_length) for layer in here.layers] == [13, 13]
            out = fast(step, past_key_values=here).logits
            expected = model(step, past_key_values=there).logits
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-4)
    # The memory may be there again: what failed for dense steps too is not given up.
    assert not warnings_in(caplog) and stats()["sparse_steps"] == 6


def test_under_strict_a_kernel_that_raises_leaves_the_counters_as_they_were(use_engine):
    Breaks(use_engine, 2)
    model = tiny_llama()
    fast = compiled(model, strict=True, **EVERYTHING)
    ids = torch.randint(64, (1, 30))
    with torch.no_grad():
        here, there = (StaticCache(model.config, max_cache_len=40) for _ in range(2))
        for past in (here, there):
            model(ids[:, :10], past_key_values=past)
        fast(ids[:, 10:11], past_key_values=here)
        with pytest.raises(RuntimeError, match="illegal instruction"):
            fast(ids[:, 11:12], past_key_values=here)
        assert [int(layer.cumulative_length) for layer in here.layers] == [11, 11]
        for number in (10, 11, 12):
            expected = model(ids[:, number : number + 1], past_key_values=there).logits
        for number in (11, 12):  # the step is taken again
            out = fast(ids[:, number : number + 1], past_key_values=here).logits
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-4)


WINDOW = Spelling(roll_window, mask=no_mask, attend=gqa_repeat_kv)


@MODES
def test_a_kernel_that_raises_at_once_is_dense_where_a_window_has_moved(mode, use_engine, caplog):
    """The first run of a variant has all it writes saved, also what is moved."""
    Breaks(use_engine, 1)
    with mode():
        module = ToyDecoder(WINDOW).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(WINDOW)
        compare(fast, module, here, here.fork(), 4)
    assert len(warnings_in(caplog)) == 1 and stats()["dense_steps"] == 4


@MODES
@pytest.mark.parametrize("limit", ["SAVED_EACH_STEP", "SAVED_PART"])
def test_a_kernel_that_raises_late_is_dense_where_what_has_moved_is_little(
    limit, mode, monkeypatch, use_engine, caplog
):
    """Few bytes, or a small part of all that the graph is given, are saved at every step."""
    Breaks(use_engine, 3)
    if limit == "SAVED_PART":
        monkeypatch.setattr(recovery, "SAVED_EACH_STEP", 10)
        monkeypatch.setattr(recovery, "SAVED_PART", 1)
    with mode():
        module = ToyDecoder(WINDOW).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(WINDOW)
        there = here.fork()
        compare(fast, module, here, there, 6)
        assert torch.equal(here.keys, there.keys) and torch.equal(here.values, there.values)
    assert len(warnings_in(caplog)) == 1
    assert (stats()["sparse_steps"], stats()["dense_steps"]) == (2, 4)


@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_kernel_that_raises_does_not_advance_a_recurrent_state_twice(
    at, kind, use_engine, caplog
):
    """Layers of another sort beside attention carry a state from step to step."""
    Breaks(use_engine, at)
    torch.manual_seed(4)
    config = Qwen3NextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, max_position_embeddings=256,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, mlp_only_layers=[0, 1],
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    fast = compiled(model, **EVERYTHING)
    ids = torch.randint(64, (1, 30))
    with torch.no_grad():
        here, there = (new_cache(model, kind) for _ in range(2))
        for past in (here, there):
            model(ids[:, :10], past_key_values=past)
        for number in range(10, 17):
            step = ids[:, number : number + 1]
            out = fast(step, past_key_values=here).logits
            expected = model(step, past_key_values=there).logits
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-4)
    assert len(warnings_in(caplog)) == 1 and stats()["dense_steps"] >= 1


@MODES
@pytest.mark.parametrize("at", [1, 3])
def test_a_kernel_that_raises_is_raised_where_a_window_has_moved_unsaved(
    mode, at, monkeypatch, use_engine
):
    """Saving it at every step would cost what the step costs. No index is left of it."""
    Breaks(use_engine, at)
    monkeypatch.setattr(recovery, "SAVED_EACH_STEP", 10)
    if at == 1:
        monkeypatch.setattr(recovery, "SAVED_BYTES", 10)
    with mode():
        module = ToyDecoder(WINDOW).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(WINDOW)
        compare(fast, module, here, here.fork(), at - 1)
        with pytest.raises(RuntimeError, match="illegal instruction"):
            here.step(fast, tokens(WINDOW, 1)[0])
        assert not any(index.valid for index in indexes_of(here.keys))
        compare(fast, module, here, here.fork(), 3)
    assert stats()["rebuilds"] == 2 and stats()["dense_steps"] == 0


def test_no_memory_for_what_is_saved_is_dense_with_one_warning(monkeypatch, caplog):
    real = runtime.DecodeGraph.run_sparse

    def run_sparse(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recovery, "Saved", no_memory)
            return real(*args)

    monkeypatch.setattr(runtime.DecodeGraph, "run_sparse", run_sparse)
    with torch.no_grad():
        module = ToyDecoder(WINDOW).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(WINDOW)
        compare(fast, module, here, here.fork(), 3)
    found = warnings_in(caplog)
    assert len(found) == 1 and "no memory for 3 GiB" in found[0]
    assert (stats()["sparse_steps"], stats()["dense_steps"]) == (0, 3)


def no_memory(*_args, **_kwargs):
    raise torch.OutOfMemoryError("no memory for 3 GiB")


def test_a_users_error_is_not_taken_for_a_kernels(monkeypatch, caplog):
    """Dense raises it too: it is raised, and sparse steps go on afterwards."""
    failing = [False]

    class Module(ToyDecoder):
        def forward(self, x, ck, cv, pos, mask):
            result = super().forward(x, ck, cv, pos, mask)
            torch.ops.faults.fail(x)
            return result

    @torch.library.custom_op("faults::fail", mutates_args=())
    def fail(x: torch.Tensor) -> None:
        if failing[0]:
            raise RuntimeError("no such file")

    fail.register_fake(lambda x: None)
    with torch.no_grad():
        module = Module(GROWING).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(GROWING)
        there = here.fork()
        compare(fast, module, here, there, 2)
        failing[0] = True
        with pytest.raises(RuntimeError, match="no such file"):
            here.step(fast, tokens(GROWING, 1)[0])
        failing[0] = False
        compare(fast, module, here, there, 2)
    assert not warnings_in(caplog) and stats()["sparse_steps"] == 4


@BOTH
@pytest.mark.parametrize("variant", ["sparse", "dense"])
def test_a_compilation_that_fails_leaves_the_cache_as_it_was(spelling, variant, use_engine, caplog):
    def build(gm, inputs, **options):
        if is_sparse(gm) == (variant == "sparse"):
            raise RuntimeError("the compiler is gone")
        return interpreter(gm, inputs, **options)

    use_engine(build)
    with torch.no_grad():
        module = ToyDecoder(spelling).eval()
        options = EVERYTHING if variant == "sparse" else {"min_context": 1000}
        fast = compiled(module.eval(), **options)
        here = Conversation.start(spelling.but(slots=1200) if variant == "dense" else spelling)
        there = here.fork()
        if variant == "sparse":
            compare(fast, module, here, there, 3)
            assert all("the compiler is gone" in text for text in warnings_in(caplog))
            assert stats()["sparse_steps"] == 0 and stats()["dense_steps"] == 3
            return
        with pytest.raises(RuntimeError, match="the compiler is gone"):
            here.step(fast, tokens(spelling, 1)[0])
        assert torch.equal(here.keys, there.keys) and torch.equal(here.values, there.values)


@BOTH
def test_a_basis_file_that_vanishes_while_decoding_is_not_missed(spelling, tmp_path):
    with torch.no_grad():
        module = ToyDecoder(spelling).eval()
        path = Path(Store(tmp_path).save(basis_for(module)))
        fast = compiled(module, basis=path, **EVERYTHING)
        here = Conversation.start(spelling)
        there = here.fork()
        compare(fast, module, here, there, 2)
        path.unlink()
        compare(fast, module, here, there, 2)
    assert stats()["sparse_steps"] == 4


def test_a_basis_file_that_is_gone_when_a_graph_is_compiled_is_raised_before_the_step(tmp_path):
    with torch.no_grad():
        module = ToyDecoder(STATIC).eval()
        path = Path(Store(tmp_path).save(basis_for(module)))
        path.unlink()
        here = Conversation.start(STATIC)
        keys = here.keys.clone()
        with pytest.raises(Exception, match="no basis file at"):
            here.step(compiled(module, basis=path, **EVERYTHING), tokens(STATIC, 1)[0])
    assert torch.equal(here.keys, keys)


# --- windows beside longer caches


@MODES
def test_full_windows_beside_longer_caches_keep_their_indexes(mode):
    """A window holds fewer keys than the step says are visible."""
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=64, max_position_embeddings=256,
        sliding_window=6, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    fast = compiled(model, **EVERYTHING)
    ids = torch.randint(64, (1, 30))
    with mode():
        here, there = (StaticCache(config, max_cache_len=40) for _ in range(2))
        for past in (here, there):
            model(ids[:, :10], past_key_values=past)
        for at in range(10, 20):
            out = fast(ids[:, at : at + 1], past_key_values=here).logits
            expected = model(ids[:, at : at + 1], past_key_values=there).logits
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-4)
    assert stats()["sparse_steps"] == 10 and stats()["rebuilds"] == 2


# --- threads


def greedy(model, past, ids: torch.Tensor, steps: int) -> list[int]:
    out = []
    with torch.no_grad():
        for _ in range(steps):
            ids = model(ids, past_key_values=past).logits[:, -1:].argmax(-1)
            out.append(int(ids))
    return out


def own_conversation(model, number: int):
    """A filled cache, growing or static by turns, and its next token."""
    if number % 2:
        past = StaticCache(model.config, max_cache_len=40)
    else:
        past = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(64, (1, 10 + number), generator=generator)
    with torch.no_grad():
        ids = model(prompt, past_key_values=past).logits[:, -1:].argmax(-1)
    return past, ids


@pytest.mark.parametrize("options", [EVERYTHING, FEW], ids=["everything", "few"])
def test_threads_decode_their_own_conversations_as_serial_runs_do(options):
    model = tiny_llama()
    fast = compiled(model, **options)
    threads, steps = 6, 12

    def start(number: int):
        return own_conversation(model, number)

    # Warm: graphs are compiled.
    serial = [greedy(fast, *start(number), steps) for number in range(threads)]
    before = stats()
    rounds = 4
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            talks = [start(number) for number in range(threads)]
            found = list(pool.map(lambda talk: greedy(fast, *talk, steps), talks))
            assert found == serial
    count("threads: conversations compared", rounds * threads)
    after = stats()
    assert after["sparse_steps"] - before["sparse_steps"] == rounds * threads * steps
    if options is EVERYTHING:
        assert serial == [greedy(model, *start(number), steps) for number in range(threads)]
    assert len({tuple(tokens) for tokens in serial}) > 1


@pytest.mark.parametrize("work", ["what_is_seen", "rewrite_sparse", "rewrite_dense"])
def test_one_thread_at_a_time_works_on_the_graphs_of_a_model(work, interpreted, monkeypatch):
    """The values in them share a fake mode, which is in one thread's kernel or in another's."""
    inside, most = 0, 0
    here = getattr(variants, work)

    def watched(*args, **kwargs):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.2)  # for others to come in, where they may
        made = here(*args, **kwargs)
        inside -= 1
        return made

    monkeypatch.setattr(variants, work, watched)
    model = tiny_llama()
    fast = compiled(model, **{**FEW, "min_context": 20 if work == "rewrite_dense" else 0})
    with ThreadPoolExecutor(4) as pool:
        talks = [own_conversation(model, number) for number in (1, 3, 1, 3)]
        found = list(pool.map(lambda talk: greedy(fast, *talk, 2), talks))
    assert found[:2] == found[2:]
    assert most == 1


@pytest.mark.parametrize("make", [tiny_llama, tiny_deepseek])
def test_a_kernel_that_raises_in_one_thread_leaves_the_tokens_of_all_right(
    make, use_engine, caplog
):
    calls, raised = itertools.count(1), []

    def build(gm, inputs, **options):
        run = interpreter(gm, inputs, **options)
        if not is_sparse(gm):
            return run

        def broken(*args):
            outputs = run(*args)
            if next(calls) in (17, 18, 29):
                raised.append(1)
                raise RuntimeError("an illegal instruction was encountered")
            return outputs

        return broken

    use_engine(build)
    model = make()
    fast = compiled(model, **EVERYTHING)
    threads, steps = 6, 10

    def start(number: int):
        past = new_cache(model, ("static", "growing")[number % 2])
        prompt = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            return past, model(prompt, past_key_values=past).logits[:, -1:].argmax(-1)

    expected = [greedy(model, *start(number), steps) for number in range(threads)]
    for number in range(2):  # the graphs are there before the threads are
        assert greedy(fast, *start(number), 3) == expected[number][:3]
    talks = [start(number) for number in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda talk: greedy(fast, *talk, steps), talks))
    assert found == expected
    graphs = 2
    assert raised and 1 <= len(warnings_in(caplog)) <= graphs
    assert stats()["sparse_steps"] and stats()["dense_steps"]


def test_threads_may_meet_at_the_first_compilation():
    model = tiny_llama()
    prompt = torch.arange(10)[None]
    threads = 4

    def decode(number: int) -> list[int]:
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            ids = model((prompt + number) % 64, past_key_values=past).logits[:, -1:].argmax(-1)
        return greedy(fast, past, ids, 5)

    fast = model
    expected = [decode(number) for number in range(threads)]
    fast = compiled(model, **EVERYTHING)
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(decode, range(threads))) == expected
    assert stats()["sparse_steps"] == threads * 5


# --- memory


def converse(fast, spelling: Spelling, steps: int = 2) -> None:
    here = Conversation.start(spelling)
    for x in tokens(spelling, steps):
        here.step(fast, x)


def bytes_of_the_runtime() -> int:
    """What the runtime's own lines have allocated in Python, and the lines that it leans on."""
    ours = (
        runtime, fast_path, step_indexes, setbacks, builds, indexes, index_record, lengths, caches,
        fits, witness, trails, buffers, prompts, steps,
    )  # fmt: skip
    files = (*(module.__file__ for module in ours), torch.utils.weak.__file__, reductions.__file__)
    traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f) for f in files])
    return sum(trace.size for trace in traces.traces)


@BOTH
@pytest.mark.parametrize("conversations", [80, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_conversations(spelling, conversations):
    with torch.no_grad():
        module = ToyDecoder(spelling).eval()
        fast = compiled(module, basis=basis_for(module), **FEW)
        converse(fast, spelling)
        sizes = []
        tracemalloc.start()
        try:
            for _ in range(2 * trails.MOST):  # so many are known at a time
                converse(fast, spelling)
            for _ in range(4):
                for _ in range(conversations // 4):
                    converse(fast, spelling)
                gc.collect()
                assert stats()["index_bytes"] == 0
                sizes.append(bytes_of_the_runtime())
        finally:
            tracemalloc.stop()
    count("memory: conversations", conversations)
    # One record left behind by each conversation would be some hundred bytes each.
    assert sizes[-1] - sizes[0] < 20 * conversations, sizes


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_thousand_conversations_leave_memory_as_it_was():
    """One compiled model, caches of both kinds that come and go, none the same as another."""
    model = tiny_llama()
    fast = compiled(model, **FEW)
    per_talk = 2 * 2 * 400 * 4 * 4  # layers, KV heads, keys, rank, fp32: the least index of any
    numbers, sizes = [], []
    for number in range(1100):
        if number % 2:
            past = StaticCache(model.config, max_cache_len=410)
        else:
            past = DynamicCache(config=model.config)
        with torch.no_grad():
            ids = torch.randint(64, (1 + number % 3, 400 + number % 5))
            model(ids, past_key_values=past)
            for at in range(2):
                fast(ids[:, at : at + 1], past_key_values=past)
        assert stats()["index_bytes"] >= per_talk
        del past
        if number >= 100 and number % 20 == 0:  # what is allocated once is there by then
            gc.collect()
            assert stats()["index_bytes"] == 0
            numbers.append(number)
            sizes.append(resident_bytes())
    assert stats()["sparse_steps"] > 2000
    count("memory: conversations", 1100)
    slope = float(np.polyfit(numbers, sizes, 1)[0])
    assert slope < per_talk / 10, f"{slope:.0f} bytes per conversation"


def test_the_report_states_the_bytes_of_the_indexes_alive():
    with torch.no_grad():
        model = tiny_llama()
        fast = compiled(model, **EVERYTHING, rank=3)
        pasts = [DynamicCache(config=model.config) for _ in range(3)]
        for past in pasts:
            greedy(fast, past, torch.arange(9)[None], 4)
        gc.collect()
        layers = [layer for past in pasts for layer in past.layers]
        held = [part for layer in layers for part in indexes_of(layer.keys)[0].tensors]
        tokens = sum(layer.keys.shape[2] for layer in layers)
        assert sum(part.numel() for part in held) == tokens * 2 * 3  # KV heads, rank
        assert stats()["index_bytes"] == sum(part.untyped_storage().nbytes() for part in held)
        del past, pasts, layers, held
        gc.collect()
    assert stats()["index_bytes"] == 0


# --- what passes, and what does not


@BOTH
@MODES
def test_a_shortage_of_memory_passes(spelling, mode, monkeypatch, caplog):
    """Dense for a while, then the index is tried again; each further shortage lasts longer."""
    monkeypatch.setattr(setbacks, "SHORTAGE_CALLS", 2)
    with mode():
        module = ToyDecoder(spelling).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        here = Conversation.start(spelling)
        there = here.fork()
        compare(fast, module, here, there, 2)  # two graphs where the cache grows
        before = stats()
        OutOfMemory(monkeypatch, 1)
        here.step(module, x := tokens(spelling, 1)[0])  # uncompiled: the index is old
        there.step(module, x)
        compare(fast, module, here, there, 1)
        assert "no memory" in reports()[-1].now and not indexes_of(here.keys)
        assert stats()["index_bytes"] == 0
        compare(fast, module, here, there, 4)
    assert stats()["dense_because"] == {"shortage": 3}
    assert stats()["sparse_steps"] - before["sparse_steps"] == 2
    assert reports()[-1].now == "" and len(warnings_in(caplog)) == 1


@MODES
def test_what_gave_up_gives_back_the_indexes_of_all_conversations(mode, use_engine, caplog):
    def engine(gm, inputs, **options):
        run = interpreter(gm, inputs, **options)

        def step(*args):
            if broken and is_sparse(gm):
                raise RuntimeError("no such instruction")
            return run(*args)

        return step

    broken: list[int] = []
    use_engine(engine)
    with mode():
        module = ToyDecoder(STATIC).eval()
        fast = compiled(module, basis=basis_for(module), **EVERYTHING)
        talks = [Conversation.start(STATIC) for _ in range(3)]
        for talk in talks:
            talk.step(fast, tokens(STATIC, 1)[0])
        assert all(indexes_of(talk.keys) for talk in talks)
        held = stats()["index_bytes"]
        broken.append(1)
        compare(fast, module, talks[0], talks[0].fork(), 2)
    assert held and not any(indexes_of(talk.keys) for talk in talks)
    assert stats()["index_bytes"] == 0 and stats()["peak_index_bytes"] >= held
    assert stats()["dense_because"] == {"gave up": 2} and len(warnings_in(caplog)) == 1
    (site,) = reports()[-1].sites
    assert site.outcome == "dense" and "no such instruction" in site.reason
