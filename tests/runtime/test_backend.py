"""The backend as torch.compile calls it: Inductor below, identity, bases, refusals."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import pytest
import torch
import torch._dynamo
from loki_compile.pca_store.basis import BasisSet, random_basis
from loki_compile.pca_store.store import Store
from torch._dynamo.utils import counters
from toy_attends import gqa_repeat_kv, heads_flipped
from toy_capture import Compiled
from toy_conversation import Conversation, basis_for, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_masks import alibi, causal, left_padded, no_mask
from toy_options import BATCH, EVERYTHING, FEW, HEAD_DIM, HIDDEN, KV_HEADS
from toy_reference import DirectSparse
from toy_writes import (
    cat_bhtd,
    index_copy_method,
    llama_reference,
    read_only,
    roll_window,
    slice_assignment_read,
)

from loki_compile import LokiConfig, backend, engines, given_up, reports, runtime, stats
from loki_compile.counts import Because
from loki_compile.indexes import indexes_of

STATIC = Spelling(index_copy_method, mask=left_padded, attend=gqa_repeat_kv)
GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)
pytestmark = [pytest.mark.covers, pytest.mark.usefixtures("fresh")]


def outputs(f, conversation, xs):
    return [conversation.step(f, x) for x in xs]


# --- identity: the contract's first clause


@pytest.mark.parametrize(
    "spelling",
    [
        STATIC.but(slots=300),  # more slots than min_context: the variants are compiled late
        STATIC,  # never longer than min_context: dense by plan
        GROWING,
        GROWING.but(attend=gqa_repeat_kv, mask=alibi),
    ],
    ids=["static", "short static", "growing", "growing alibi"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_below_min_context_the_output_is_inductors_bit_for_bit(spelling, mode):
    module = ToyDecoder(spelling).eval()
    xs = tokens(spelling, 4)
    start = Conversation.start(spelling)
    runs = []
    with mode():
        for backend_name, options in (
            ("inductor", None),
            ("loki", {"pack_gqa": False, "min_context": 100}),
        ):
            torch._dynamo.reset()
            fast = torch.compile(module, backend=backend_name, options=options)
            conversation = start.fork()
            runs.append((outputs(fast, conversation, xs), conversation))
    (theirs, their_cache), (ours, our_cache) = runs
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert torch.equal(their_cache.keys, our_cache.keys)
    late = spelling.growing or spelling.slots > 100
    assert stats()["sparse_steps"] == 0 and stats()["dense_steps"] == (4 if late else 0)


@torch.no_grad()
def test_where_the_budget_covers_everything_the_output_is_inductors_bit_for_bit():
    module = ToyDecoder(GROWING).eval()
    xs, start = tokens(GROWING, 3), Conversation.start(GROWING)
    theirs = outputs(torch.compile(module, backend="inductor"), start.fork(), xs)
    torch._dynamo.reset()
    options = {"pack_gqa": False, "min_context": 4, "top_k": 100}
    fast = torch.compile(module, backend="loki", options=options)
    ours = outputs(fast, start.fork(), xs)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert stats()["dense_steps"] == 3


@torch.no_grad()
def test_a_graph_without_attention_is_inductors():
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU()).eval()
    x = torch.randn(3, 5)
    theirs = torch.compile(module, backend="inductor")(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, backend="loki")(x), theirs)


def test_attention_inside_vmap_is_as_it_was_and_says_why():
    keys = torch.randn(1, 1, 5, 8)

    def attend_to(row):
        query = row[None, None, None]
        return torch.nn.functional.scaled_dot_product_attention(query, keys, keys)[0, 0, 0]

    def attend(rows):
        return torch.vmap(attend_to)(rows)

    rows = torch.randn(3, 8)
    with torch.no_grad(), engines.default_engine(engines.interpreter):
        assert torch.allclose(torch.compile(attend, backend="loki")(rows), attend(rows), atol=1e-6)
    assert "torch.func" in str(reports())


# --- Inductor below


INDUCTOR = [
    STATIC,
    GROWING,
    Spelling(slice_assignment_read, position="int", mask=no_mask),
    Spelling(
        llama_reference, layout="bthd", position="int", mask=no_mask, attend=gqa_repeat_kv,
        note="larger_batch",
    ),
    Spelling(roll_window, mask=no_mask),
    STATIC.but(new_tokens=3),
]  # fmt: skip


@pytest.mark.parametrize("spelling", INDUCTOR, ids=lambda s: s.name)
@torch.no_grad()
def test_a_small_budget_under_inductor_is_the_reference(spelling):
    module = ToyDecoder(spelling).eval()
    basis = basis_for(module)
    fast = torch.compile(module, backend="loki", options={**FEW, "basis": basis})
    truth = DirectSparse(basis, LokiConfig.from_options(FEW), KV_HEADS)
    here = Conversation.start(spelling)
    there = here.fork()
    for x in tokens(spelling, 4):
        out = here.step(fast, x)
        with truth:
            expected = there.step(module, x)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(here.keys, there.keys, rtol=0, atol=1e-5)
    assert stats()["sparse_steps"] == 4


@pytest.mark.parametrize("spelling", [STATIC, GROWING], ids=["static", "growing"])
@torch.no_grad()
def test_int8_under_inductor_is_dense_attention_with_the_whole_budget(spelling):
    module = ToyDecoder(spelling).eval()
    options = {**EVERYTHING, "index_dtype": "int8", "basis": basis_for(module)}
    fast = torch.compile(module, backend="loki", options=options)
    here = Conversation.start(spelling)
    there = here.fork()
    for x in tokens(spelling, 4):
        torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=2e-5)
    (index,) = indexes_of(here.keys)
    rows, scale = index.tensors
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32
    assert stats()["rebuilds"] == 1


@pytest.mark.parametrize("spelling", [STATIC, GROWING], ids=["static", "growing"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_keys_that_inductors_dense_variant_wrote_are_ranked(spelling, mode, monkeypatch):
    """Inductor's kernels write into the cache in place: the index must notice."""
    with mode():
        module = ToyDecoder(spelling).eval()
        basis, options = basis_for(module), {**FEW, "recent": 0, "sink": 0}
        fast = torch.compile(module, backend="loki", options={**options, "basis": basis})
        truth = DirectSparse(basis, LokiConfig.from_options(options), KV_HEADS)
        here = Conversation.start(spelling)
        there = here.fork()
        for dense in (False, False, True, True, False, False):
            x = tokens(spelling, 1)[0]
            with monkeypatch.context() as patch:
                if dense:
                    patch.setattr(runtime.DecodeGraph, "why_dense", lambda *_: Because.SHORT)
                out = here.step(fast, x)
            if dense:
                expected = there.step(module, x)
            else:
                with truth:
                    expected = there.step(module, x)
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert (stats()["dense_steps"], stats()["sparse_steps"]) == (2, 4)


@pytest.mark.parametrize("how", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@torch.no_grad()
def test_modes_of_torch_compile_are_taken(how):
    """CompileConfig passes mode="reduce-overhead"; with options there is no mode."""
    module = ToyDecoder(STATIC.but(slots=1100)).eval()
    fast = torch.compile(module, backend="loki", mode=how)
    here = Conversation.start(module.spelling, filled=1050)
    there = here.fork()
    for x in tokens(STATIC, 2):
        out, expected = here.step(fast, x), there.step(module, x)
        assert out.shape == expected.shape and out.isfinite().all()
    assert stats()["sparse_steps"] == 2 and stats()["fitted_bases"] == 1


@torch.no_grad()
def test_inductors_options_reach_inductor(use_engine):
    seen = []

    def inductor(gm, inputs, *, mode, options):
        seen.append((mode, options))
        return gm.forward

    use_engine(inductor)
    module = ToyDecoder(STATIC).eval()
    fast = torch.compile(
        module, backend="loki", options={**EVERYTHING, "inductor": {"epilogue_fusion": False}}
    )
    Conversation.start(STATIC).step(fast, tokens(STATIC, 1)[0])
    assert seen == [(None, {"epilogue_fusion": False})]


@torch.no_grad()
def test_an_engine_goes_with_a_partial_and_through_a_deep_copy():
    mine, default = Compiled(), Compiled()
    chosen = copy.deepcopy(functools.partial(backend.loki, engine=mine))  # as `generate` does
    module = ToyDecoder(STATIC).eval()
    with engines.default_engine(default):
        fast = torch.compile(module, backend=chosen, options=EVERYTHING)
        Conversation.start(STATIC).step(fast, tokens(STATIC, 1)[0])
    assert stats()["sparse_steps"] == 1 and not default.graphs
    assert chosen.keywords["engine"].calls("loki.select") == 1


def test_the_engine_before_comes_back_where_something_is_raised(interpreted):
    with pytest.raises(KeyError), engines.default_engine(Compiled()):
        raise KeyError
    torch.compile(lambda x: x + 1, backend="loki")(torch.ones(3))
    assert len(interpreted.graphs) == 1


@torch.no_grad()
def test_a_variant_runs_only_at_sizes_that_either_compilation_fixed(monkeypatch, use_engine):
    """Inductor may fix a size while it compiles a variant late, after Dynamo has made its guards.

    The variant compiled second finds that size fixed, and adds no guard of its own.
    """
    compiled, ran = [], []

    def inductor_that_fixes_sizes(gm, inputs, **_):
        places = [i for i, value in enumerate(inputs) if isinstance(value, torch.SymInt)][:1]
        sizes = [int(inputs[place]) for place in places]
        if places:
            compiled.append(len(inputs))

        def run(*args):
            if places:
                assert [args[place] for place in places] == sizes, "compiled for other sizes"
                ran.append(len(inputs))
            return gm.forward(*args)

        return run

    use_engine(inductor_that_fixes_sizes)
    module = ToyDecoder(GROWING).eval()
    fast = torch.compile(module, backend="loki", options=EVERYTHING)
    here = Conversation.start(GROWING)

    def step_as_uncompiled():
        x, there = tokens(GROWING, 1)[0], here.fork()
        torch.testing.assert_close(here.step(fast, x), there.step(module, x), rtol=0, atol=2e-5)

    step_as_uncompiled()  # sizes are numbers in Dynamo's first graph
    again = here.fork()
    for _ in range(3):
        step_as_uncompiled()
    assert stats()["sparse_steps"] == 4, "at other sizes the rewritten graph is interpreted"
    monkeypatch.setattr(runtime.DecodeGraph, "why_dense", lambda *_: Because.SHORT)
    step_as_uncompiled()
    here = again
    step_as_uncompiled()
    sparse, dense = compiled
    assert sparse > dense, "indexes and bases are inputs of the sparse variant, compiled first"
    assert ran == [sparse, dense], "each at the size that was fixed, and nowhere else"


# --- as a backend


def test_it_is_found_by_name():
    assert "loki" in torch._dynamo.list_backends(exclude_tags=())


def test_copies_are_the_same_function():
    """`generate` deep-copies the compile configuration, backend included."""
    assert copy.deepcopy(backend.loki) is backend.loki


@torch.no_grad()
def test_it_leaves_dynamos_graph_alone(interpreted):
    seen = []

    def spy(gm, example_inputs, **kwargs):
        before = str(gm.graph)
        result = backend.loki(gm, example_inputs, options=EVERYTHING, **kwargs)
        seen.append((before, gm))
        return result

    module = ToyDecoder(STATIC).eval()
    conversation = Conversation.start(STATIC)
    fast = torch.compile(module, backend=spy)
    for x in tokens(STATIC, 2):
        conversation.step(fast, x)
    assert stats()["sparse_steps"] == 2
    assert all(before == str(gm.graph) for before, gm in seen)


@torch.no_grad()
def test_forward_alone_may_be_compiled(interpreted):
    module = ToyDecoder(STATIC).eval()
    twin = copy.deepcopy(module)
    module.forward = torch.compile(module.forward, backend="loki", options=EVERYTHING)
    here = Conversation.start(STATIC)
    there = here.fork()
    for x in tokens(STATIC, 3):
        torch.testing.assert_close(here.step(module, x), there.step(twin, x), rtol=0, atol=2e-5)
    assert stats()["sparse_steps"] == 3


@torch.no_grad()
def test_module_compile_takes_it(interpreted):
    module = ToyDecoder(STATIC).eval()
    twin = copy.deepcopy(module)
    module.compile(backend="loki", options=EVERYTHING)
    here = Conversation.start(STATIC)
    there = here.fork()
    for x in tokens(STATIC, 3):
        torch.testing.assert_close(here.step(module, x), there.step(twin, x), rtol=0, atol=2e-5)
    assert stats()["sparse_steps"] == 3


# --- strict


@torch.no_grad()
def test_strict_lists_every_site_that_stays_dense(interpreted):
    module = ToyDecoder(STATIC.but(attend=heads_flipped))

    def both(x, ck, cv, pos, mask):
        (x,) = module(x, ck, cv, pos, mask)
        return module(x, ck, cv, pos + 1, mask)

    fast = torch.compile(both, backend="loki", options={**EVERYTHING, "strict": True})
    conversation = Conversation.start(STATIC)
    keys = conversation.keys.clone()
    with pytest.raises(RuntimeError) as error:
        conversation.step(fast, tokens(STATIC, 1)[0])
    message = str(error.value)
    assert "2 attention site(s)" in message and message.count("`flip`") == 2
    assert "Set strict=False" in message
    assert torch.equal(conversation.keys, keys)


def test_strict_refuses_a_model_without_attention(interpreted):
    fast = torch.compile(lambda x: x * 2, backend="loki", options={"strict": True})
    with pytest.raises(RuntimeError, match="no attention to rewrite"):
        fast(torch.ones(3))


@torch.no_grad()
def test_strict_takes_what_is_dense_by_plan(interpreted):
    module = ToyDecoder(STATIC).eval()
    fast = torch.compile(module, backend="loki", options={"strict": True})  # a short cache
    Conversation.start(STATIC).step(fast, tokens(STATIC, 1)[0])
    spelling = STATIC.but(new_tokens=12)
    module = ToyDecoder(spelling).eval()
    fast = torch.compile(module, backend="loki", options={"strict": True})
    Conversation.start(spelling).step(fast, tokens(spelling, 1)[0])
    assert [s.outcome for r in reports() for s in r.sites] == ["dense by plan"] * 2


# --- bases


def refused(basis, match, *, rank=0.25, spelling=STATIC):
    module = ToyDecoder(spelling).eval()
    if callable(basis):
        basis = basis(module)
    options = {**EVERYTHING, "basis": basis, "rank": rank}
    fast = torch.compile(module, backend="loki", options=options)
    conversation = Conversation.start(spelling)
    keys = conversation.keys.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=match):
        conversation.step(fast, tokens(spelling, 1)[0])
    assert torch.equal(conversation.keys, keys)
    assert stats()["sparse_steps"] == stats()["dense_steps"] == 0


def test_a_basis_of_another_model_is_refused():
    refused(lambda m: basis_for(ToyDecoder(STATIC)), "belongs to other weights")


def test_a_basis_of_other_heads_is_refused():
    def other(module):
        right = basis_for(module).bases[0]
        wrong = random_basis(KV_HEADS + 1, HEAD_DIM, seed=1, weights=right.weights)
        return BasisSet((wrong,))

    refused(other, "needed the site's own dims: run `loki calibrate")


def test_a_rank_above_head_dim_is_refused():
    refused("auto", f"rank=11 exceeds head_dim={HEAD_DIM}", rank=11)
    torch._dynamo.reset()
    refused(basis_for, f"rank 11 for a head_dim of {HEAD_DIM}", rank=11)


def test_a_missing_file_is_refused(tmp_path):
    refused(str(tmp_path / "nothing.safetensors"), "nothing.safetensors")


def test_a_file_that_is_no_basis_is_refused(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a basis")
    refused(str(path), "broken.safetensors")


def test_an_unknown_name_is_refused():
    refused("no-such-basis", "no-such-basis")


@torch.no_grad()
def test_a_stored_basis_is_found_by_the_weights(interpreted, tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    module = ToyDecoder(STATIC).eval()
    basis = basis_for(module)
    Store().save(basis)
    truth = DirectSparse(basis, LokiConfig.from_options(FEW), KV_HEADS)
    fast = torch.compile(module, backend="loki", options=FEW)
    here = Conversation.start(STATIC)
    there = here.fork()
    for x in tokens(STATIC, 2):
        out = here.step(fast, x)
        with truth:
            expected = there.step(module, x)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
    assert stats()["fitted_bases"] == 0
    assert reports()[-1].sites[0].basis.startswith("random")


@torch.no_grad()
def test_a_basis_is_read_from_a_path(interpreted, tmp_path):
    module = ToyDecoder(STATIC).eval()
    path = Store(tmp_path).save(basis_for(module))
    for choice in (path, str(path)):
        torch._dynamo.reset()
        fast = torch.compile(module, backend="loki", options={**FEW, "basis": choice})
        Conversation.start(STATIC).step(fast, tokens(STATIC, 1)[0])
    assert stats()["fitted_bases"] == 0 and stats()["sparse_steps"] == 2


@torch.no_grad()
@pytest.mark.parametrize("choice", ["path", "auto"])
def test_graphs_that_read_one_stored_basis_share_an_index(
    choice, interpreted, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    module = ToyDecoder(STATIC.but(mask=causal)).eval()
    path = Store().save(basis_for(module))
    options = {**FEW, "basis": path if choice == "path" else choice}
    fast = torch.compile(module, backend="loki", options=options)
    here = Conversation.start(module.spelling)
    for new in (1, 3, 1):
        x = torch.randn(BATCH, new, HIDDEN)
        torch._dynamo.mark_static(x, 1)  # a graph of its own
        here.step(fast, x)
    assert stats()["sparse_steps"] == 3 and stats()["rebuilds"] == 1


@torch.no_grad()
@pytest.mark.parametrize("choice", ["path", "auto"])
def test_a_basis_that_is_calibrated_again_is_read_again(choice, interpreted, tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_HOME", str(tmp_path))
    module = ToyDecoder(STATIC).eval()
    start = Conversation.start(STATIC)
    (x,) = tokens(STATIC, 1)
    for seed in (1, 2):
        basis = basis_for(module, seed)
        path = Store().save(basis)
        options = {**FEW, "basis": path if choice == "path" else choice}
        torch._dynamo.reset()
        out = start.fork().step(torch.compile(module, backend="loki", options=options), x)
        with DirectSparse(basis, LokiConfig.from_options(FEW), module.kv_heads):
            expected = start.fork().step(module, x)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_read_only_cache_is_fitted_where_the_basis_cannot_name_it(interpreted):
    """Cross-attention: its keys come from weights of another graph."""
    spelling = Spelling(read_only, mask=no_mask)
    module = ToyDecoder(spelling).eval()
    options = {**EVERYTHING, "basis": basis_for(module)}
    fast = torch.compile(module, backend="loki", options=options)
    Conversation.start(spelling).step(fast, tokens(spelling, 1)[0])
    assert stats()["sparse_steps"] == stats()["fitted_bases"] == 1


# --- the report


@torch.no_grad()
def test_the_report_has_dims_basis_and_memory(interpreted, caplog):
    caplog.set_level(logging.INFO, logger="loki_compile")
    module = ToyDecoder(STATIC).eval()
    options = {**EVERYTHING, "basis": basis_for(module), "rank": 4}
    here = Conversation.start(STATIC)
    here.step(torch.compile(module, backend="loki", options=options), tokens(STATIC, 1)[0])
    (site,) = reports()[-1].sites
    assert (site.query_heads, site.kv_heads, site.head_dim, site.rank) == (6, 3, HEAD_DIM, 4)
    assert site.basis == "random, 0 tokens" and site.cache == "L['ck']"
    slots = here.keys.shape[0] * here.keys.shape[2]
    assert site.index_bytes_per_token * slots == stats()["index_bytes"]
    assert "1 attention sites: 1 sparse" in caplog.text


@torch.no_grad()
def test_the_report_counts_bytes_of_an_int8_index(interpreted):
    module = ToyDecoder(STATIC).eval()
    options = {**EVERYTHING, "basis": basis_for(module), "rank": 4, "index_dtype": "int8"}
    here = Conversation.start(STATIC)
    here.step(torch.compile(module, backend="loki", options=options), tokens(STATIC, 1)[0])
    (site,) = reports()[-1].sites
    slots = here.keys.shape[0] * here.keys.shape[2]
    assert site.index_bytes_per_token * slots == stats()["index_bytes"]


def test_reports_of_a_long_run_are_bounded():
    for _ in range(300):
        backend.record_graph(backend.Plan((), (), ()), LokiConfig(), [], None)
    assert len(reports()) == 256


def test_what_dynamo_gave_up_is_said_with_what_to_set():
    def scaled(layer, x):
        return x * layer.number

    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        run = torch.compile(scaled, backend="loki")
        for number in range(2, 7):
            assert given_up() == [] or number > 4
            layer = torch.nn.Module()
            layer.number = number
            assert run(layer, torch.ones(1)) == number
    (sentence,) = given_up()
    assert "Set torch._dynamo.config.recompile_limit above 2" in sentence
    counters.clear()


def test_a_dense_site_names_the_section_that_says_what_would_have_to_change(interpreted):
    spelling = STATIC.but(attend=heads_flipped)
    module = ToyDecoder(spelling).eval()
    with torch.no_grad():
        (x,) = tokens(spelling, 1)
        Conversation.start(spelling).step(torch.compile(module, backend="loki", options=FEW), x)
    (site,) = reports()[-1].sites
    page, _, section = site.see.partition("#")
    text = (Path(__file__).parent.parent.parent / page).read_text(encoding="utf-8")
    assert site.outcome == "dense" and f"### {section.upper()}\n" in text


# --- one graph, several models


def test_models_that_share_a_graph_have_bases_of_their_own(interpreted):
    """Dynamo runs the graph of the first for the second: sizes agree, weights do not."""
    modules = [ToyDecoder(STATIC).eval() for _ in range(2)]
    sets = [basis_for(module, seed) for seed, module in enumerate(modules)]
    both = BasisSet(sum((chosen.bases for chosen in sets), ()))
    with torch.no_grad():
        for module, (basis,) in zip(modules, (chosen.bases for chosen in sets), strict=True):
            fast = torch.compile(module, backend="loki", options={**FEW, "basis": both})
            here = Conversation.start(STATIC)
            for x in tokens(STATIC, 2):
                here.step(fast, x)
            (index,) = indexes_of(here.keys)
            assert torch.equal(index.basis.key, basis.truncate(4)[1]) and index.valid
    assert len(interpreted.graphs) == 1 and stats()["sparse_steps"] == 4
    assert [counts["sparse_steps"] for counts in stats()["models"].values()] == [2, 2]


def test_weights_that_change_take_no_basis_that_was_fitted_for_what_they_were(interpreted):
    """As an adapter that is merged does it: in place, while graphs stay as they are."""
    module = ToyDecoder(STATIC).eval()
    options = {**FEW, "basis": basis_for(module)}
    with torch.no_grad():
        fast = torch.compile(module, backend="loki", options=options)
        here = Conversation.start(STATIC)
        here.step(fast, tokens(STATIC, 1)[0])
        module.key_weight.mul_(2)
        keys = here.keys.clone()
        with pytest.raises(ValueError, match="belongs to other weights"):
            here.step(fast, tokens(STATIC, 1)[0])
        assert torch.equal(here.keys, keys), "before anything is written"
        module.key_weight.div_(2)
        here.step(fast, tokens(STATIC, 1)[0])
    assert stats()["sparse_steps"] == 2
