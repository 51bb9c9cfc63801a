"""The runtime: whose index it is, when it is built anew, and which variant runs.

The toys of `toy_decoders` and an interpreter in Inductor's place. `top_k=1.0` with `min_context=0`
forces the sparse variant and must equal eager; a stale index would not show there, so every check
of provenance runs with a small budget too, against an index built anew at each step.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loki_compile.passes.attention import Reason
from loki_compile.pca_store.covariance import KeyCovariance
from toy_attends import gqa_repeat_kv, sdpa
from toy_conversation import Conversation, basis_for, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import causal, left_padded, no_mask
from toy_options import BATCH, EVERYTHING, FEW, FILLED, HEAD_DIM, HIDDEN, KV_HEADS, MODES
from toy_reference import DirectSparse
from toy_writes import (
    cat_bhtd,
    cat_cropped,
    index_copy_method,
    index_copy_returned,
    index_put_returned,
    read_only,
    roll_window,
    slice_assignment,
)

from loki_compile import LokiConfig, builds, fits, reports, reset_stats, runtime, stats, variants
from loki_compile.counts import Because
from loki_compile.indexes import indexes_of

STATIC = Spelling(index_copy_method, mask=left_padded)
GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)
BOTH = pytest.mark.parametrize("spelling", [STATIC, GROWING], ids=["static", "growing"])
pytestmark = [pytest.mark.covers, pytest.mark.usefixtures("interpreted")]


class Pair:
    """A compiled toy and its truth: eager attention, or the reference on a fresh index."""

    def __init__(self, spelling: Spelling, options: dict, **more) -> None:
        self.spelling = spelling
        self.module = ToyDecoder(spelling).eval()
        basis = basis_for(self.module)
        options = {"basis": basis, **options, **more}
        self.fast = torch.compile(self.module, backend="loki", options=options)
        config = LokiConfig.from_options(options)
        self.truth = DirectSparse(basis, config, self.module.kv_heads)
        self.exact = options["top_k"] == 1.0

    def start(self, **kwargs) -> tuple[Conversation, Conversation]:
        here = Conversation.start(self.spelling, **kwargs)
        return here, here.fork()

    def expected(self, conversation: Conversation, x: torch.Tensor) -> torch.Tensor:
        if self.exact:
            return conversation.step(self.module, x)
        with self.truth:
            return conversation.step(self.module, x)

    def step(self, here: Conversation, there: Conversation, steps: int = 1) -> None:
        """Decodes both and compares outputs."""
        for x in tokens(self.spelling, steps, batch=here.batch):
            out, expected = here.step(self.fast, x), self.expected(there, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)

    def dense_step(self, here: Conversation, there: Conversation) -> None:
        """A step without the compiler, as an eager prefill or assisted decoding takes it."""
        x = tokens(self.spelling, 1, batch=here.batch)[0]
        here.step(self.module, x)
        there.step(self.module, x)


BUDGETS = pytest.mark.parametrize("options", [EVERYTHING, FEW], ids=["everything", "few"])


# --- whose index


@BOTH
@MODES
def test_one_rebuild_then_the_index_follows(spelling, mode):
    with mode():
        pair = Pair(spelling, FEW)
        pair.step(*pair.start(), steps=8)
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 8


@BOTH
@MODES
def test_an_eager_step_between_rebuilds_once(spelling, mode):
    with mode():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=3)
        pair.dense_step(here, there)
        pair.step(here, there, steps=3)
    assert stats()["rebuilds"] == 2 and stats()["sparse_steps"] == 6


@BOTH
def test_an_edit_of_an_old_key_rebuilds_once(spelling):
    with torch.no_grad():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=2)
        for conversation in (here, there):
            conversation.keys[:, :, 7] = 3.0
        pair.step(here, there, steps=3)
    assert stats()["rebuilds"] == 2


def test_an_edit_through_a_view_rebuilds_once():
    with torch.no_grad():
        pair = Pair(STATIC, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=2)
        for conversation in (here, there):
            conversation.keys.view(-1)[: 5 * HEAD_DIM].mul_(-2.0)
        pair.step(here, there, steps=2)
    assert stats()["rebuilds"] == 2


def test_new_data_where_the_old_lay_rebuilds_once():
    """`x.data = y` counts as no write, and the allocator hands the old address out again."""
    with torch.no_grad():
        pair = Pair(STATIC, FEW)
        here, there = pair.start()
        address = here.keys.data_ptr()
        for _ in range(20):
            before = stats()["rebuilds"]
            pair.step(here, there)
            for conversation in (here, there):
                conversation.keys.data = conversation.keys.data.flip(-1)
                conversation.keys.data = conversation.keys.data * -2.0
            if here.keys.data_ptr() == address:
                break
            address = here.keys.data_ptr()
        else:
            pytest.skip("the allocator never gave the same memory twice")
        pair.step(here, there)
    assert stats()["rebuilds"] == before + 2


@MODES
def test_a_reset_and_a_new_prompt_in_the_same_cache(mode):
    """What StaticCache.reset does: zeros in place, then another prefill."""
    with mode():
        pair = Pair(STATIC, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=3)
        prompt = torch.randn(BATCH, KV_HEADS, 11, HEAD_DIM)
        for conversation in (here, there):
            conversation.keys.zero_()
            conversation.keys[:, :, :11] = prompt
            conversation.filled = 11
        pair.step(here, there, steps=3)
    assert stats()["rebuilds"] == 2


@BOTH
@MODES
def test_beams_replace_the_cache_tensors(spelling, mode):
    with mode():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        for order in ([1, 0], [0, 0], [1, 1]):
            pair.step(here, there)
            for conversation in (here, there):
                conversation.keys = conversation.keys.index_select(0, torch.tensor(order))
                conversation.values = conversation.values.index_select(0, torch.tensor(order))
        pair.step(here, there)
    assert stats()["rebuilds"] == 4


@BOTH
@MODES
def test_a_reordered_cache_keeps_none_of_the_old_rows(spelling, mode):
    """In place, as `keys.copy_(keys[order])` does it."""
    with mode():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=2)
        for conversation in (here, there):
            conversation.keys.copy_(conversation.keys.flip(0))
            conversation.values.copy_(conversation.values.flip(0))
        pair.step(here, there, steps=2)
    assert stats()["rebuilds"] == 2


@BOTH
@MODES
def test_interleaved_conversations_each_keep_their_index(spelling, mode):
    with mode():
        pair = Pair(spelling, FEW)
        talks = [pair.start(filled=filled) for filled in (11, 17, 23)]
        for _ in range(9):
            for here, there in talks:
                pair.step(here, there)
    assert stats()["rebuilds"] == 3 and stats()["sparse_steps"] == 27


@BOTH
@MODES
def test_a_fork_gets_an_index_of_its_own(spelling, mode):
    with mode():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=2)
        twin, twin_there = copy.deepcopy(here), copy.deepcopy(there)
        for _ in range(3):
            pair.step(here, there)
            pair.step(twin, twin_there)
    assert stats()["rebuilds"] == 2


@MODES
def test_a_cropped_cache_keeps_the_index_of_what_is_left(mode):
    """DynamicCache.crop keeps a slice: assisted decoding does so at every rejection. Where nothing
    counts writes, another tensor is another cache."""
    with mode():
        pair = Pair(GROWING, FEW)
        here, there = pair.start()
        for _ in range(3):
            pair.step(here, there, steps=2)
            for conversation in (here, there):
                conversation.filled -= 1
                conversation.keys = conversation.keys[:, :, : conversation.filled]
                conversation.values = conversation.values[:, :, : conversation.filled]
        pair.step(here, there)
    assert stats()["rebuilds"] == (1 if mode is torch.no_grad else 4)


@MODES
def test_a_static_cache_rewound_is_overwritten_in_step(mode):
    """Rejected tokens stay in the slots and are overwritten: the index is written along."""
    with mode():
        pair = Pair(STATIC, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=4)
        for conversation in (here, there):
            conversation.filled -= 3
        pair.step(here, there, steps=4)
    assert stats()["sparse_steps"] == 8


@BOTH
def test_switching_between_no_grad_and_inference_mode(spelling):
    pair = Pair(spelling, FEW)
    with torch.no_grad():
        here, there = pair.start()
        pair.step(here, there, steps=2)
    with torch.inference_mode():
        pair.step(here, there, steps=2)
    with torch.no_grad():
        pair.step(here, there, steps=2)
    with torch.inference_mode():
        pair.step(here, there, steps=2)
    assert stats()["sparse_steps"] == 8


@BOTH
def test_a_basis_made_under_inference_mode_serves_outside(spelling):
    """The first step decides where bases and indexes are made."""
    pair = Pair(spelling, FEW)
    with torch.inference_mode():
        pair.step(*pair.start(), steps=2)
    with torch.no_grad():
        pair.step(*pair.start(), steps=2)
    assert stats()["sparse_steps"] == 4


@pytest.mark.parametrize("static", [True, False])
def test_inference_tensors_are_spot_checked(static):
    """Without a version counter: an overwritten cache of the same length is noticed by its rows."""
    spelling = STATIC if static else GROWING
    with torch.inference_mode():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=2)
        noise = torch.randn_like(here.keys)
        for conversation in (here, there):
            conversation.keys.copy_(noise)
        pair.step(here, there, steps=2)
    assert stats()["rebuilds"] == 2


@BOTH
@MODES
def test_batch_sizes_may_change(spelling, mode):
    with mode():
        pair = Pair(spelling, FEW)
        for batch in (2, 3, 1, 2):
            pair.step(*pair.start(batch=batch), steps=2)
    assert stats()["rebuilds"] == 4 and stats()["sparse_steps"] == 8


@MODES
def test_a_window_that_slides_keeps_its_index(mode):
    with mode():
        pair = Pair(Spelling(cat_cropped, mask=no_mask, growing=True), FEW)
        here, there = pair.start()
        pair.step(here, there, steps=6)
    assert here.keys.shape[2] == FILLED
    assert stats()["rebuilds"] == 1


def test_two_compiled_models_may_share_a_cache():
    """Other options, another index layout: each has its own index of the one cache tensor."""
    with torch.no_grad():
        module = ToyDecoder(STATIC).eval()
        basis = basis_for(module)
        truth = DirectSparse(basis, LokiConfig.from_options(FEW), KV_HEADS)
        here = Conversation.start(STATIC)
        there = here.fork()
        for options in ({}, {"index_dtype": "int8"}, {}, {"index_dtype": "int8"}):
            torch._dynamo.reset()
            fast = torch.compile(module, backend="loki", options={**FEW, "basis": basis, **options})
            x = tokens(STATIC, 1)[0]
            out = here.step(fast, x)
            with truth:
                expected = there.step(module, x)
            if not options:
                torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert stats()["sparse_steps"] == 4 and stats()["rebuilds"] == 4


class FailsOnDemand(ToyDecoder):
    """Raises behind the cache write, inside the compiled graph."""

    def forward(self, x, ck, cv, pos, mask):
        result = super().forward(x, ck, cv, pos, mask)
        torch.ops.toy.fail(x)
        return result


_failing = False


@torch.library.custom_op("toy::fail", mutates_args=())
def fail(x: torch.Tensor) -> None:
    if _failing:
        raise RuntimeError("the power is out")


@fail.register_fake
def _(x):
    return None


@BOTH
@MODES
def test_a_step_that_raises_leaves_no_stale_index(spelling, mode, monkeypatch):
    with mode():
        pair = Pair(spelling, FEW)
        pair.module.__class__ = FailsOnDemand
        here, there = pair.start()
        pair.step(here, there, steps=2)
        monkeypatch.setitem(globals(), "_failing", True)
        x = tokens(spelling, 1)[0]
        for f, conversation in ((pair.fast, here), (pair.module, there)):
            with pytest.raises(RuntimeError, match="the power is out"):
                conversation.step(f, x)
        monkeypatch.setitem(globals(), "_failing", False)
        pair.step(here, there, steps=3)
    assert stats()["sparse_steps"] == 5


# --- the life of an index


@BOTH
@MODES
def test_indexes_die_with_their_caches(spelling, mode):
    with mode():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=3)
        (index,) = indexes_of(here.keys)
        parts = [weakref.ref(part) for part in index.tensors]
        memory = [weakref.ref(part.untyped_storage()) for part in index.tensors]
        held = sum(part().untyped_storage().nbytes() for part in parts)  # with room
        assert stats()["index_bytes"] == held > 0
        del here, there, index
        gc.collect()
    assert all(part() is None for part in parts + memory)
    assert stats()["index_bytes"] == 0


@BOTH
def test_many_conversations_leave_nothing_behind(spelling):
    with torch.no_grad():
        pair = Pair(spelling, FEW)
        for _ in range(20):
            pair.step(*pair.start(), steps=2)
        gc.collect()
    assert stats()["rebuilds"] == 20 and stats()["index_bytes"] == 0


def test_a_growing_cache_keeps_one_index_alive():
    with torch.no_grad():
        pair = Pair(GROWING, FEW)
        here, there = pair.start()
        pair.step(here, there, steps=6)
        gc.collect()
        (index,) = indexes_of(here.keys)
    rows = BATCH * KV_HEADS * (FILLED + 6)
    assert index.tensors[0].numel() == rows * 4  # rank 4
    assert stats()["index_bytes"] == index.tensors[0].untyped_storage().nbytes()


# --- which variant


@BOTH
@MODES
def test_crossing_min_context_both_ways(spelling, mode):
    options = {**FEW, "min_context": FILLED + 4}
    with mode():
        pair = Pair(spelling, options)
        here, there = pair.start()
        x = tokens(spelling, 3)
        for token in x:  # 18, 19, 20 keys: dense
            torch.testing.assert_close(
                here.step(pair.fast, token), there.step(pair.module, token), rtol=0, atol=2e-5
            )
        assert (stats()["dense_steps"], stats()["sparse_steps"]) == (3, 0)
        pair.step(here, there, steps=3)  # 21, 22, 23 keys
        assert (stats()["dense_steps"], stats()["sparse_steps"]) == (3, 3)
        for conversation in (here, there):
            conversation.filled = 11
            if spelling.growing:
                conversation.keys = conversation.keys[:, :, :11]
                conversation.values = conversation.values[:, :, :11]
        token = tokens(spelling, 1)[0]
        torch.testing.assert_close(
            here.step(pair.fast, token), there.step(pair.module, token), rtol=0, atol=2e-5
        )
        assert (stats()["dense_steps"], stats()["sparse_steps"]) == (4, 3)


@BOTH
@MODES
def test_keys_written_by_the_dense_variant_are_ranked_afterwards(spelling, mode, monkeypatch):
    """Sparse, dense, sparse on one cache: the index misses what the dense steps wrote."""
    options = {**FEW, "recent": 0, "sink": 0}
    with mode():
        pair = Pair(spelling, options)
        here, there = pair.start()
        pair.step(here, there, steps=2)
        with monkeypatch.context() as patch:
            patch.setattr(runtime.DecodeGraph, "why_dense", lambda *_: Because.SHORT)
            for x in tokens(spelling, 3):
                torch.testing.assert_close(
                    here.step(pair.fast, x), there.step(pair.module, x), rtol=0, atol=2e-5
                )
        pair.step(here, there, steps=2)
    assert stats()["dense_steps"] == 3 and stats()["sparse_steps"] == 4
    assert stats()["rebuilds"] == 2


@BOTH
def test_nothing_runs_sparse_where_the_budget_covers_everything(spelling):
    with torch.no_grad():
        pair = Pair(spelling, {"min_context": 5, "top_k": 1.0, "pack_gqa": False})
        pair.step(*pair.start(), steps=3)
        count = Pair(spelling, {"min_context": 5, "top_k": 40, "pack_gqa": False})
        count.exact = True
        count.step(*count.start(), steps=3)
    assert stats()["sparse_steps"] == 0 and stats()["dense_steps"] == 6
    assert stats()["rebuilds"] == stats()["index_bytes"] == 0


def test_a_cache_too_short_to_matter_is_dense_by_plan(interpreted):
    with torch.no_grad():
        pair = Pair(STATIC, {**EVERYTHING, "min_context": STATIC.slots})
        pair.step(*pair.start())
    (site,) = reports()[-1].sites
    assert site.outcome == "dense by plan" and str(STATIC.slots) in site.reason
    assert len(interpreted.graphs) == 1


@pytest.mark.parametrize("options", [{"min_context": 1000}, EVERYTHING], ids=["short", "long"])
def test_the_variant_that_is_not_needed_is_not_compiled(options, interpreted, compiled_at_once):
    with torch.no_grad():
        pair = Pair(GROWING, {"top_k": 1.0, **options})
        here, _ = pair.start()
        here.step(pair.fast, tokens(GROWING, 1)[0])
    assert len(interpreted.graphs) == 1
    sparse = interpreted.calls("loki.select")
    assert sparse == (1 if options is EVERYTHING else 0)


def test_hysteresis_where_caches_are_replaced_at_every_step(caplog):
    """Beam search: after eight rebuilds in a row the next steps run dense."""
    caplog.set_level(logging.INFO, logger="loki_compile")
    with torch.no_grad():
        pair = Pair(GROWING, {**FEW, "min_context": 5})
        here, there = pair.start()
        for step in range(12):
            x = tokens(GROWING, 1)[0]
            out = here.step(pair.fast, x)
            if step > builds.WASTED_BUILDS:
                expected = there.step(pair.module, x)
            else:
                expected = pair.expected(there, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
            for conversation in (here, there):
                conversation.keys = conversation.keys.clone()
                conversation.values = conversation.values.clone()
    # The first step is a graph of its own (a constant length).
    assert stats()["rebuilds"] == stats()["sparse_steps"] == 1 + builds.WASTED_BUILDS
    assert stats()["dense_steps"] == 3
    assert stats()["dense_because"] == {"held back": 3}
    assert "8 indexes of a sequence served one step each" in caplog.text
    assert "61 more steps" in reports()[-1].now


def test_sparse_comes_back_after_the_dense_steps(monkeypatch):
    monkeypatch.setattr(builds, "HELD_BACK_CALLS", 2)
    monkeypatch.setattr(builds, "WASTED_BUILDS", 2)
    with torch.no_grad():
        pair = Pair(GROWING, {**FEW, "min_context": 5})
        here, _ = pair.start()
        for step in range(8):
            here.step(pair.fast, tokens(GROWING, 1)[0])
            if step < 3:
                here.keys = copy.deepcopy(here.keys)  # another cache, with the same strides
    assert stats()["dense_steps"] == 2 and stats()["sparse_steps"] == 6
    # The first graph has a constant length and sees one step; then two rebuilds, two dense steps
    # (whose cache the index does not know) and one rebuild more.
    assert stats()["rebuilds"] == 1 + 2 + 1


# --- the length of what is filled


@pytest.mark.parametrize(
    "spelling",
    [
        STATIC,
        Spelling(slice_assignment, position="int"),
        Spelling(index_copy_returned),
        Spelling(index_put_returned, layout="bthd"),
    ],
    ids=["index_copy_", "slice", "index_copy", "index_put"],
)
@MODES
def test_the_filled_length_is_read_from_the_write(spelling, mode):
    """A cache of many slots that holds few keys is short."""
    with mode():
        pair = Pair(spelling, {**FEW, "min_context": FILLED + 3})
        here, _ = pair.start()
        for _ in range(4):
            x = tokens(spelling, 1)[0]
            here.step(pair.fast, x)
    assert (stats()["dense_steps"], stats()["sparse_steps"]) == (2, 2)


@MODES
def test_an_empty_cache_waits_for_keys_to_fit_a_basis_from(mode):
    """min_context=0 from the first token on."""
    with mode():
        module = ToyDecoder(GROWING).eval()
        fast = torch.compile(module, backend="loki", options=EVERYTHING)
        here = Conversation.start(GROWING, filled=0)
        there = here.fork()
        for x in tokens(GROWING, 5):
            torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=2e-5)
    # From one key, from two and from four: as often as their number has doubled.
    assert stats()["sparse_steps"] >= 3 and stats()["fitted_bases"] == 3


@MODES
def test_positions_counted_from_the_end_mean_a_full_cache(mode):
    def write_last(k, v, ck, cv, pos):
        ck[:, :, -1:], cv[:, :, -1:] = k.transpose(1, 2), v.transpose(1, 2)
        return ck, cv, ()

    spelling = Spelling(write_last, mask=no_mask)
    with mode():
        pair = Pair(spelling, {**FEW, "min_context": 20})
        pair.step(*pair.start(), steps=4)
    assert stats()["sparse_steps"] == 4


# --- bases


@BOTH
@pytest.mark.parametrize("rank", [3, 0.5, "variance:0.9"])
def test_a_basis_is_fitted_once_for_each_cache(spelling, rank, caplog):
    caplog.set_level(logging.INFO, logger="loki_compile")
    with torch.no_grad():
        module = ToyDecoder(spelling).eval()
        fast = torch.compile(module, backend="loki", options={**EVERYTHING, "rank": rank})
        here = Conversation.start(spelling)
        there = here.fork()
        for x in tokens(spelling, 4):
            torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=2e-5)
        other = Conversation.start(spelling, filled=11)
        other.step(fast, tokens(spelling, 1)[0])
    assert stats()["fitted_bases"] == 2
    (index,) = indexes_of(here.keys)
    width = index.tensors[0].shape[-1]
    assert width == {3: 3, 0.5: 5}.get(rank, width) and 1 <= width <= HEAD_DIM


def test_a_fitted_basis_spans_the_keys():
    """Keys of two dims: rank 2 ranks them exactly, so four keys of 17 are the true best four."""
    with torch.no_grad():
        module = ToyDecoder(GROWING).eval()
        plane = torch.randn(2, HEAD_DIM)
        options = {"min_context": 0, "top_k": 4, "rank": 2, "sink": 0, "recent": 1}
        fast = torch.compile(module, backend="loki", options=options)
        module.k.weight.zero_(), module.k.bias.zero_()
        here = Conversation.start(GROWING, batch=1)
        here.keys = torch.randn(1, KV_HEADS, FILLED, 2) @ plane
        there = here.fork()
        x = tokens(GROWING, 1, batch=1)[0]
        out = here.step(fast, x)

        def best_four(query, key, value, **_):
            scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / HEAD_DIM**0.5
            group = scores.unflatten(1, (KV_HEADS, 2)).amax(2, keepdim=True)
            group[..., -1] = torch.inf
            keep = group.topk(4, dim=-1).indices
            mask = torch.zeros_like(group, dtype=torch.bool).scatter(-1, keep, True)
            mask = mask.expand(-1, -1, 2, -1, -1).flatten(1, 2)
            return sdpa(query, key, value, attn_mask=mask, enable_gqa=True)

        there_spelling = there.spelling.but(attend=lambda q, k, v, m: best_four(q, k, v))
        module.spelling = there_spelling
        expected = there.step(module, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


# --- when it cannot be


@BOTH
def test_a_failing_build_stays_dense_and_warns_once(spelling, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(variants, "rewrite_sparse", broken)
    with torch.no_grad():
        pair = Pair(spelling, EVERYTHING)
        pair.step(*pair.start(), steps=4)
    assert stats()["sparse_steps"] == 0 and stats()["dense_steps"] == 4
    warnings = [
        r.getMessage()
        for r in caplog.records
        if r.levelno == logging.WARNING and r.name == "loki_compile"
    ]
    assert all("no such kernel" in warning for warning in warnings)
    assert len(warnings) == len(reports())  # one for each graph, not one for each step


def test_strict_raises_where_the_build_fails(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(variants, "rewrite_sparse", broken)
    with torch.no_grad():
        pair = Pair(STATIC, {**EVERYTHING, "strict": True})
        here, _ = pair.start()
        keys = here.keys.clone()
        with pytest.raises(RuntimeError, match="no such kernel"):
            here.step(pair.fast, tokens(STATIC, 1)[0])
    assert torch.equal(here.keys, keys)  # nothing was written


def test_a_failing_fit_stays_dense(monkeypatch, caplog):
    """Keys that are not finite give no basis; the steps are eager's."""
    with torch.no_grad():
        module = ToyDecoder(STATIC).eval()
        fast = torch.compile(module, backend="loki", options=EVERYTHING)
        here = Conversation.start(STATIC)
        here.keys[0, 0, 3, 1] = torch.nan
        there = here.fork()
        for x in tokens(STATIC, 2):
            out, expected = here.step(fast, x), there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5, equal_nan=True)


def test_not_a_number_in_an_old_key_reaches_the_output_as_in_eager():
    with torch.no_grad():
        pair = Pair(STATIC, EVERYTHING)
        here, there = pair.start()
        for conversation in (here, there):
            conversation.keys[0, 0, 5, 1] = torch.nan
        x = tokens(STATIC, 1)[0]
        out, expected = here.step(pair.fast, x), pair.expected(there, x)
    assert expected[0].isnan().any() and not expected[1].isnan().any()
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5, equal_nan=True)


# --- several graphs on one cache


@BOTH
def test_graphs_of_one_and_of_several_tokens_hand_the_index_over(spelling):
    """Assisted decoding: one token, then three, then one; each length is a graph of its own."""
    spelling = spelling.but(mask=causal)
    with torch.no_grad():
        pair = Pair(spelling, FEW)
        here, there = pair.start()
        for new in (1, 3, 1, 3, 1):
            x = torch.randn(BATCH, new, HIDDEN)
            torch._dynamo.mark_static(x, 1)  # else Dynamo makes the number of tokens symbolic
            out, expected = here.step(pair.fast, x), pair.expected(there, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 5


def takes_tokens(spelling: Spelling, options: dict, counts: tuple[int, ...]) -> None:
    """One conversation, so many new tokens at a time: outputs are by definition."""
    with torch.no_grad():
        pair = Pair(spelling.but(mask=causal), options)
        here, there = pair.start()
        for new in counts:
            x = torch.randn(BATCH, new, HIDDEN)
            out, expected = here.step(pair.fast, x), pair.expected(there, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@BOTH
@pytest.mark.parametrize("options", [EVERYTHING, FEW], ids=["everything", "few"])
def test_one_graph_takes_any_few_tokens(spelling, options):
    """Assisted decoding as it is: Dynamo makes the number of tokens symbolic when it changes."""
    takes_tokens(spelling, options, (1, 3, 2, 5, 1, 8, 2))
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 7
    assert len(reports()) < 4  # one token; several; several in a cache that grows


@BOTH
def test_many_tokens_are_dense_in_a_graph_that_was_traced_with_few(spelling):
    takes_tokens(spelling, EVERYTHING, (1, 3, 9, 1, 4))
    assert stats()["dense_steps"] == 1 and stats()["sparse_steps"] == 4
    assert stats()["rebuilds"] == 2


@BOTH
def test_few_tokens_are_dense_by_plan_in_a_graph_that_was_traced_with_many(spelling):
    takes_tokens(spelling, EVERYTHING, (1, 9, 3))
    prefills = [s.reason for report in reports() for s in report.sites if s.outcome != "sparse"]
    assert prefills and all("prefill" in reason for reason in prefills)


class Broken(ToyDecoder):
    """The graph breaks between the write and attention."""

    def forward(self, x, ck, cv, pos, mask):
        k, v = (y.view(*x.shape[:2], -1, HEAD_DIM) for y in (self.k(x), self.v(x)))
        index_copy_method(k, v, ck, cv, pos)
        torch._dynamo.graph_break()
        q = self.q(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
        out = gqa_repeat_kv(q, ck, cv, mask)
        return (x + self.out(out.transpose(1, 2).flatten(2)),)


def test_a_write_in_another_graph_rebuilds_at_every_step():
    with torch.no_grad():
        pair = Pair(STATIC.but(attend=gqa_repeat_kv), {**FEW, "basis": "auto"})
        pair.module.__class__ = Broken
        pair.exact = True
        fast = torch.compile(pair.module, backend="loki", options=EVERYTHING)
        here, there = pair.start()
        for x in tokens(STATIC, 4):
            out, expected = here.step(fast, x), there.step(pair.module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert stats()["rebuilds"] == stats()["sparse_steps"] == 4


@MODES
def test_a_full_window_that_rolls_keeps_its_index(mode):
    with mode():
        pair = Pair(Spelling(roll_window, mask=no_mask), FEW)
        pair.step(*pair.start(), steps=5)
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 5


class ReadsAnotherToo(ToyDecoder):
    """An encoder's keys beside the decoder's own: self-attention, then cross-attention."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        self.encoder_keys = torch.randn(BATCH, KV_HEADS, 19, HEAD_DIM)

    def forward(self, x, ck, cv, pos, mask):
        x, *state = super().forward(x, ck, cv, pos, mask)
        q = self.q(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
        out = sdpa(q, self.encoder_keys, self.encoder_keys * 0.5, enable_gqa=True)
        return (x + self.out(out.transpose(1, 2).flatten(2)), *state)


@BOTH
@MODES
def test_a_read_only_cache_beside_a_growing_one_is_projected_once(spelling, mode):
    with mode():
        module = ReadsAnotherToo(spelling).eval()
        fast = torch.compile(module, backend="loki", options=EVERYTHING)
        here = Conversation.start(spelling)
        there = here.fork()
        for x in tokens(spelling, 5):
            torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=2e-5)
    assert stats()["sparse_steps"] == 5 and stats()["rebuilds"] == 2


@MODES
def test_a_cache_that_is_never_written_is_projected_once(mode):
    spelling = Spelling(read_only, mask=no_mask)
    with mode():
        pair = Pair(spelling, EVERYTHING)
        pair.step(*pair.start(), steps=5)
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 5


class ReadThenWrite(ToyDecoder):
    """Attention sees the cache as it was before this step; the new keys are for the next one."""

    def forward(self, x, ck, cv, pos, mask):
        q, k, v = (y.view(*x.shape[:2], -1, HEAD_DIM) for y in (self.q(x), self.k(x), self.v(x)))
        out = sdpa(q.transpose(1, 2), ck, cv, attn_mask=mask, enable_gqa=True)
        index_copy_method(k, v, ck, cv, pos)
        return (x + self.out(out.transpose(1, 2).flatten(2)),)


@BUDGETS
def test_a_write_behind_attention_is_seen_by_the_next_step(options):
    spelling = Spelling(index_copy_method, mask=no_mask)
    with torch.no_grad():
        pair = Pair(spelling, options)
        pair.module.__class__ = ReadThenWrite
        pair.step(*pair.start(), steps=5)
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 5


class StateInModule(ToyDecoder):
    """Hand-written caches: buffers of the module, a counter beside them."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__(spelling)
        shape = (BATCH, self.kv_heads, spelling.slots, HEAD_DIM)
        self.register_buffer("key_cache", torch.randn(shape))
        self.register_buffer("value_cache", torch.randn(shape))
        self.register_buffer("seen", torch.tensor([FILLED]))

    def forward(self, x):
        mask = (torch.arange(self.spelling.slots) <= self.seen)[None]
        (out,) = super().forward(x, self.key_cache, self.value_cache, self.seen, mask)
        self.seen.add_(1)
        return out


@MODES
@BUDGETS
def test_caches_in_buffers_of_the_module(mode, options):
    with mode():
        module = StateInModule(Spelling(index_copy_method)).eval()
        twin = copy.deepcopy(module)
        basis = basis_for(module)
        fast = torch.compile(module, backend="loki", options={**options, "basis": basis})
        truth = DirectSparse(basis, LokiConfig.from_options(options), KV_HEADS)
        for x in tokens(module.spelling, 5):
            out = fast(x)
            if options is EVERYTHING:
                expected = twin(x)
            else:
                with truth:
                    expected = twin(x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert torch.equal(module.seen, twin.seen)
    assert stats()["rebuilds"] == 1 and stats()["sparse_steps"] == 5


# --- several threads


@BOTH
def test_threads_that_share_a_compiled_model_get_the_results_of_serial_runs(spelling):
    with torch.no_grad():
        pair = Pair(spelling, FEW)
        talks = [Conversation.start(spelling) for _ in range(4)]
        inputs = [tokens(spelling, 20) for _ in talks]
        serial = [
            [talk.step(pair.fast, x) for x in xs]
            for talk, xs in zip([talk.fork() for talk in talks], inputs, strict=True)
        ]

    def decode(talk, xs):
        with torch.no_grad():
            return [talk.step(pair.fast, x) for x in xs]

    with ThreadPoolExecutor(len(talks)) as pool:
        parallel = list(pool.map(decode, talks, inputs))
    for ours, theirs in zip(parallel, serial, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- counts


def test_counts_are_in_dynamos_counters_too():
    with torch.no_grad():
        pair = Pair(STATIC, FEW)
        pair.step(*pair.start(), steps=3)
    from torch._dynamo.utils import counters

    assert counters["loki"]["sparse_steps"] == 3 and counters["loki"]["rebuilds"] == 1
    assert counters["loki"]["sites_sparse"] == 1
    reset_stats()
    assert not counters["loki"] and not stats()["models"] and not stats()["dense_because"]
    names = ("sparse_steps", "dense_steps", "interpreted_steps", "rebuilds", "fitted_bases")
    assert [stats()[name] for name in names] == [0] * 5


def test_layers_are_named_by_number_and_by_path():
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(ToyDecoder(STATIC) for _ in range(3))

        def forward(self, x, keys, values, pos, mask):
            for layer, ck, cv in zip(self.layers, keys, values, strict=True):
                (x,) = layer(x, ck, cv, pos, mask)
            return x

    stack = Stack().eval()
    keys, values = torch.randn(2, 3, BATCH, KV_HEADS, STATIC.slots, HEAD_DIM).unbind()
    inputs = (torch.randn(BATCH, 1, HIDDEN), list(keys), list(values))
    inputs = (*inputs, torch.tensor([FILLED]), causal(BATCH, 1, STATIC.slots, FILLED))
    for layers, sparse in (("all", [0, 1, 2]), ((1,), [1]), (2, [2]), ("layers.0*", [0])):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(stack, backend="loki", options={**EVERYTHING, "layers": layers})(*inputs)
        sites = reports()[-1].sites
        assert [i for i, s in enumerate(sites) if s.outcome == "sparse"] == sparse
        off = [s for s in sites if s.outcome != "sparse"]
        assert all(s.outcome == "dense by plan" for s in off)
        assert all(s.reason.startswith(Reason.LAYER_OFF.value.split("{}")[0]) for s in off)


@pytest.mark.parametrize(
    "most, taken", [(5, [0, 4, 8, 12, 16]), (16, [*range(15), 16]), (17, range(17))]
)
@pytest.mark.parametrize("spelling", [GROWING, STATIC], ids=["growing", "static"])
def test_a_basis_is_fitted_from_so_many_keys_evenly_spread(spelling, most, taken, monkeypatch):
    monkeypatch.setattr(fits, "FIT_TOKENS", most)
    with torch.no_grad():
        spelling = spelling.but(mask=no_mask)
        module = ToyDecoder(spelling).eval()
        fast = torch.compile(module, backend="loki", options=EVERYTHING)
        here = Conversation.start(spelling)
        keys = here.keys[:, :, :FILLED].clone()
        here.step(fast, tokens(spelling, 1)[0])
    (index,) = indexes_of(here.keys)
    for row in range(BATCH):  # each sequence has its own
        moments = KeyCovariance(KV_HEADS, HEAD_DIM)
        moments.update(keys[row : row + 1, :, list(taken)])
        _, expected = moments.pca().truncate(index.layout.rank)
        torch.testing.assert_close(index.basis.key[row], expected)


@MODES
@pytest.mark.parametrize("given", [False, True])
def test_an_empty_cache_is_no_failure_and_serves_a_basis_that_is_given(given, mode, caplog):
    with mode():
        module = ToyDecoder(GROWING).eval()
        basis = {"basis": basis_for(module)} if given else {}
        fast = torch.compile(module, backend="loki", options={**EVERYTHING, **basis})
        here = Conversation.start(GROWING, filled=0)
        here.step(fast, tokens(GROWING, 1)[0])
        assert (stats()["sparse_steps"], stats()["dense_steps"]) == ((1, 0) if given else (0, 1))
        for x in tokens(GROWING, 3):
            here.step(fast, x)
    assert stats()["fitted_bases"] == (0 if given else 2) and stats()["sparse_steps"] >= 3
    assert not [record for record in caplog.records if record.name == "loki_compile"]
