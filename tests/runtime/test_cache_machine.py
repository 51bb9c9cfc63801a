"""Everything people do to a cache, in any order, to one compiled model: nothing stale is ever read.

A state machine drives conversations through a tiny Llama compiled with `loki` (an interpreter in
Inductor's place). With the whole budget and the sparse variant forced, each step equals the step of
an uncompiled twin on a cache of its own. With a small budget it equals the step from a copy of the
cache, whose index is built anew; the basis picks axes, so that both indexes are equal to the bit.
After every rule each index that would be used again equals the projection of its cache.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from loki_compile.kernels.fused import project_new_keys
from loki_compile.kernels.kept import PAGE, PageLayout, page_bounds
from loki_compile.pca_store.basis import Basis, BasisSet
from loki_compile.pca_store.fingerprint import weights_fingerprint
from tally import cases, count
from torch import Tensor, nn
from toy_capture import interpret, is_sparse
from toy_models import tiny_deepseek, tiny_llama
from toy_options import EVERYTHING, FEW
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    StaticCache,
)

from loki_compile import builds, setbacks, stats
from loki_compile.caches import Cached
from loki_compile.engines import default_engine
from loki_compile.exact_steps import resting
from loki_compile.indexes import indexes_of

pytestmark = [pytest.mark.soak, pytest.mark.covers]

LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 2, 8, 64  # of `tiny_llama`
LATENT_DIMS = 18  # of a cached row of `tiny_deepseek`
SLOTS, TALKS, ROWS = 40, 4, 4
_failing = _breaking = False


@torch.library.custom_op("machine::fail", mutates_args=())
def fail(x: Tensor) -> None:
    if _failing:
        raise RuntimeError("the power is out")


@fail.register_fake
def _(x):
    return None


class FailsOnDemand(nn.Module):
    """Raises between the cache writes of the first layer and of the second."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        torch.ops.machine.fail(x)
        return self.inner(x)


def failing_between_layers(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].mlp = FailsOnDemand(model.model.layers[0].mlp)
    # What bfloat16 can hold: moving to it and back leaves the weights as they are.
    return model.to(torch.bfloat16).to(torch.float32)


def make_model() -> PreTrainedModel:
    return failing_between_layers(tiny_llama())


def make_latent_model() -> PreTrainedModel:
    """Latents in the place of keys, and what heads share in the place of values."""
    return failing_between_layers(tiny_deepseek())


def make_windowed_model() -> Gemma3ForCausalLM:
    """A window of 12 keys, then a layer that sees all."""
    torch.manual_seed(6)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=VOCABULARY,
        max_position_embeddings=256, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def is_latent(model: PreTrainedModel) -> bool:
    return hasattr(model.config, "kv_lora_rank")


def axes(model: PreTrainedModel) -> BasisSet:
    """Bases whose columns are axes: projections are exact, whoever computes them."""
    bases = []
    for number, layer in enumerate(model.model.layers):
        if is_latent(model):
            map_, heads, dims = layer.self_attn.kv_a_proj_with_mqa, 1, LATENT_DIMS
        else:
            map_, heads, dims = layer.self_attn.k_proj, KV_HEADS, HEAD_DIM
        turned = torch.eye(dims).roll(number + 1, 0)
        key = torch.stack([turned, turned.flip(1)][:heads])
        weights = weights_fingerprint(map_.weight)
        spectrum = torch.ones(heads, dims)
        bases.append(Basis(key, key, spectrum, kind="random", weights=weights, layer=str(number)))
    return BasisSet(tuple(bases))


FEW_KEYS = {**FEW, "recent": 1, "rank": 3}
OPTIONS = {
    "everything": EVERYTHING,
    "few": FEW_KEYS,
    "crossing min_context": {**FEW_KEYS, "min_context": 14},
}


def map_tensors(cache, change) -> None:
    """Replaces each key and value tensor of a transformers cache."""
    for layer in cache.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)


@dataclass
class Talk:
    """A conversation: its cache, the twin's, how many tokens they hold, what rows see."""

    here: DynamicCache | StaticCache
    there: DynamicCache | StaticCache
    static: bool
    batch: int
    mask: Tensor | None
    length: int = 0

    @property
    def caches(self) -> list:
        return [self.here, self.there]

    @property
    def layers(self) -> list:
        return [layer for cache in self.caches for layer in cache.layers]

    @property
    def inference(self) -> bool:
        """Whether some tensor was made under inference mode, and has no version counter."""
        return any(
            tensor.is_inference()
            for layer in self.layers
            for tensor in (layer.keys, layer.values, getattr(layer, "cumulative_length", None))
            if isinstance(tensor, Tensor)
        )

    def rewind(self, length: int) -> None:
        for layer in self.layers:
            if self.static:
                layer.cumulative_length.fill_(length)
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        self.length = length
        if self.mask is not None:
            self.mask = self.mask[:, :length]


PICK = st.integers(0, TALKS - 1)
INFERENCE = st.booleans()
STEPS = st.sampled_from([1, 2, 3, 0])


class CacheMachine(RuleBasedStateMachine):
    """`model` is eager, `fast` compiled; compared with the twin if `exact`, else with a copy."""

    def __init__(self, model, fast, *, exact: bool) -> None:
        super().__init__()
        self.model, self.fast, self.exact = model, fast, exact
        # What left a window is gone: such a cache cannot go back.
        self.can_go_back = not isinstance(model, Gemma3ForCausalLM)
        self.dtype, self.device = torch.float32, "cpu"
        self.talks: list[Talk] = []
        self.generator = torch.Generator()

    # -- what is shared by the rules

    def talk(self, pick: int) -> Talk:
        return self.talks[pick % len(self.talks)]

    def mode(self, talk: Talk, inference: bool):
        # A cache made under inference mode must not be written in place outside of it.
        locked = talk.static and talk.inference
        return torch.inference_mode() if inference or locked else torch.no_grad()

    def advance(
        self, talk: Talk, new: int, inference: bool, compiled: bool, asked=contextlib.nullcontext
    ) -> None:
        """`new` tokens on; the outputs must agree. `asked`: what compiled steps are asked to be."""
        if talk.length + new > SLOTS:
            return
        ids = torch.randint(VOCABULARY, (talk.batch, new), generator=self.generator)
        ids = ids.to(self.device)
        if new < 9:
            torch._dynamo.mark_static(ids, 1)  # else decoding several tokens is left dense
        if talk.mask is not None:
            talk.mask = torch.cat((talk.mask, torch.ones_like(ids)), 1)
        with self.mode(talk, inference):
            if self.exact:
                expected = self.model(ids, past_key_values=talk.there, attention_mask=talk.mask)
            elif compiled:
                anew = copy.deepcopy(talk.here)
                with asked():
                    expected = self.fast(ids, past_key_values=anew, attention_mask=talk.mask)
            run = self.fast if compiled else self.model
            with asked():
                out = run(ids, past_key_values=talk.here, attention_mask=talk.mask)
        talk.length += new
        if self.exact:
            assert out.logits.dtype == self.dtype
            near = self.near(expected.logits)
            torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=near)
            far = expected.logits.topk(2).values.diff().abs().squeeze(-1) > 5 * near
            assert torch.equal(out.logits.argmax(-1)[far], expected.logits.argmax(-1)[far])
        elif compiled:
            torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-5)
        count("state machine: model calls compared", self.exact or compiled)

    def near(self, expected: Tensor) -> float:
        """What rounding may make of a number like those."""
        return 0.1 * float(expected.std()) if self.dtype == torch.bfloat16 else 2e-4

    @initialize(seed=st.integers(0, 2**16), static=st.booleans(), inference=INFERENCE)
    def begin(self, seed, static, inference):
        """A run may lack any rule, and none of them does anything without a conversation.

        This one has both variants in it, wherever `min_context` is crossed.
        """
        self.generator.manual_seed(seed)
        self.start(static, 1, False, 10, inference, False, 1)
        self.advance(self.talks[0], 3, inference, False)
        self.then(self.talks[0], 2, inference)

    def then(self, talk: Talk, steps: int, inference: bool) -> None:
        """What was done to a cache shows in the steps behind it."""
        for _ in range(steps):
            self.advance(talk, 1, inference, True)

    # -- steps

    @precondition(lambda self: len(self.talks) < TALKS)
    @rule(
        static=st.booleans(),
        batch=st.sampled_from([1, 1, 2, 3]),
        padded=st.sampled_from([False, False, True]),
        length=st.sampled_from([3, 10]),
        inference=INFERENCE,
        compiled=st.booleans(),
        steps=STEPS,
    )
    def start(self, static, batch, padded, length, inference, compiled, steps):
        def cache():
            if static:
                return StaticCache(self.model.config, max_cache_len=SLOTS)
            return DynamicCache(config=self.model.config)

        talk = Talk(cache(), cache(), static, batch, None)
        if padded:
            rows = torch.arange(batch)[:, None]
            seen = (torch.arange(length) >= rows % length).long().to(self.device)
            talk.mask = seen[:, :0]
        with torch.inference_mode() if inference else torch.no_grad():
            self.advance(talk, length, inference, compiled)
        if padded:
            talk.mask = seen
        self.talks.append(talk)
        self.then(talk, steps, inference)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, inference=INFERENCE, steps=st.integers(2, 5))
    def decode(self, pick, inference, steps):
        for _ in range(steps):
            self.advance(self.talk(pick), 1, inference, True)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, inference=INFERENCE, back=st.integers(0, 3), steps=st.lists(STEPS, max_size=3))
    def rest_and_draft(self, pick, inference, back, steps):
        """Dense steps that write no index, some of which are taken back, and sparse ones."""
        talk = self.talk(pick)
        for times in steps:
            rested = stats()["dense_because"].get("resting", 0)
            for _ in range(times + 1):
                self.advance(talk, 1, inference, True, resting)
            rested = stats()["dense_because"].get("resting", 0) - rested
            count("state machine: steps that rest", rested)
            if back and self.can_go_back:
                self.take_back(talk, back, inference)
            self.advance(talk, 1, inference, True)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, inference=INFERENCE, new=st.sampled_from([2, 3]))
    def verify_several_tokens(self, pick, inference, new):
        self.advance(self.talk(pick), new, inference, True)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, inference=INFERENCE, new=st.sampled_from([1, 3]))
    def step_without_the_compiler(self, pick, inference, new):
        self.advance(self.talk(pick), new, inference, False)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, inference=INFERENCE, compiled=st.booleans())
    def another_chunk_of_prompt(self, pick, inference, compiled):
        self.advance(self.talk(pick), 10, inference, compiled)

    @precondition(lambda self: self.talks and self.can_go_back)
    @rule(pick=PICK, inference=INFERENCE, steps=STEPS)
    def fail_in_the_middle_of_a_step(self, pick, inference, steps):
        global _failing
        talk = self.talk(pick)
        before = talk.length
        if before + 1 > SLOTS:
            return
        _failing = True
        try:
            for run, cache in ((self.fast, talk.here), (self.model, talk.there)):
                if run is self.model and not self.exact:
                    continue
                ids = torch.ones(talk.batch, 1, dtype=torch.long, device=self.device)
                mask = talk.mask
                if mask is not None:
                    mask = torch.cat((mask, torch.ones_like(ids)), 1)
                with pytest.raises(RuntimeError, match="power"), self.mode(talk, inference):
                    run(ids, past_key_values=cache, attention_mask=mask)
        finally:
            _failing = False
        with self.mode(talk, inference):
            talk.rewind(before)
        self.then(talk, steps, inference)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, inference=INFERENCE, new=st.sampled_from([1, 3]), steps=STEPS)
    def break_a_kernel_behind_the_writes(self, pick, inference, new, steps):
        """The step is dense, its tokens are right, and the steps behind it are sparse again."""
        global _breaking
        _breaking = True
        try:
            self.advance(self.talk(pick), new, inference, True)
        finally:
            _breaking = False
        self.then(self.talk(pick), steps, inference)

    # -- what is done to a cache between steps

    @precondition(lambda self: self.talks and self.can_go_back and self.exact)
    @rule(
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        inference=INFERENCE,
        steps=STEPS,
    )
    def move_to_another_dtype(self, dtype, inference, steps):
        """The model with all caches: float64 is left dense, bfloat16 has indexes of its own."""
        self.model.to(dtype)
        for talk in self.talks:
            with self.mode(talk, inference):
                self.forget_rounding(talk)
                for cache in filter(self.filled, talk.caches):
                    map_tensors(cache, lambda x: x.to(dtype))
        self.dtype = dtype
        for talk in self.talks:
            self.then(talk, min(steps, 1), inference)

    def forget_rounding(self, talk: Talk) -> None:
        """What the two caches hold may differ by bfloat16's rounding: that would stay."""
        if self.dtype != torch.bfloat16 or not self.filled(talk.here):
            return
        for ours, theirs in zip(talk.here.layers, talk.there.layers, strict=True):
            for name in ("keys", "values"):
                held, expected = getattr(ours, name), getattr(theirs, name)
                near = self.near(expected[:, :, : talk.length])
                torch.testing.assert_close(held, expected, rtol=0, atol=near)
                setattr(theirs, name, held.clone())

    @precondition(lambda self: torch.cuda.is_available() and self.talks and self.can_go_back)
    @rule(device=st.sampled_from(["cpu", "cuda"]), inference=INFERENCE, steps=STEPS)
    def move_to_another_device(self, device, inference, steps):
        """The model with all caches."""
        self.model.to(device)
        self.device = device
        for talk in self.talks:
            talk.mask = None if talk.mask is None else talk.mask.to(device)
            with self.mode(talk, inference):
                for cache in filter(self.filled, talk.caches):
                    map_tensors(cache, lambda x: x.to(device))
                for layer in talk.layers if talk.static else []:
                    layer.cumulative_length = layer.cumulative_length.to(device)
                    layer.device = torch.device(device)
        for talk in self.talks:
            self.then(talk, min(steps, 1), inference)

    @precondition(lambda self: self.talks and self.can_go_back)
    @rule(pick=PICK, tokens=st.integers(1, 5), inference=INFERENCE, steps=STEPS)
    def reject_tokens(self, pick, tokens, inference, steps):
        """`crop`; a static cache is rewound, and its slots are overwritten later."""
        talk = self.talk(pick)
        self.take_back(talk, tokens, inference)
        self.then(talk, steps, inference)

    def take_back(self, talk: Talk, tokens: int, inference: bool) -> None:
        if talk.length <= tokens or (talk.static and talk.inference and not self.exact):
            return  # see README: without a version counter a rewritten row may go unnoticed
        with self.mode(talk, inference):
            if talk.static:
                talk.rewind(talk.length - tokens)
            else:
                for cache in talk.caches:
                    if cache.layers and cache.layers[0].is_initialized:
                        cache.crop(-tokens)
                talk.length -= tokens
                talk.mask = None if talk.mask is None else talk.mask[:, : talk.length]

    @precondition(lambda self: self.talks)
    @rule(
        pick=PICK,
        order=st.lists(st.integers(0, 2), min_size=1, max_size=ROWS),
        beam=st.booleans(),
        inference=INFERENCE,
        steps=STEPS,
    )
    def choose_rows(self, pick, order, beam, inference, steps):
        """`reorder_cache` of beams, `batch_select_indices`."""
        talk = self.talk(pick)
        order = torch.tensor([i % talk.batch for i in order], device=self.device)
        if beam or talk.static:
            order = order.repeat(talk.batch)[: talk.batch]
        with self.mode(talk, inference):
            for cache in talk.caches:
                if not self.filled(cache):
                    continue
                if beam or talk.static:
                    cache.reorder_cache(order)
                else:
                    cache.batch_select_indices(order)
        talk.batch = len(order)
        talk.mask = None if talk.mask is None else talk.mask[order]
        self.then(talk, steps, inference)

    @precondition(lambda self: any(not t.static and t.batch * 2 <= ROWS for t in self.talks))
    @rule(pick=PICK, inference=INFERENCE, steps=STEPS)
    def repeat_rows(self, pick, inference, steps):
        talk = self.talk(pick)
        if talk.static or talk.batch * 2 > ROWS:
            return
        for cache in talk.caches:
            if self.filled(cache):
                cache.batch_repeat_interleave(2)
        talk.batch *= 2
        talk.mask = None if talk.mask is None else talk.mask.repeat_interleave(2, 0)
        self.then(talk, steps, inference)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, inference=INFERENCE, compiled=st.booleans(), steps=STEPS)
    def reset_and_prompt_again(self, pick, inference, compiled, steps):
        talk = self.talk(pick)
        with self.mode(talk, inference):
            for cache in talk.caches:
                cache.reset()
        talk.length, talk.mask = 0, None
        self.advance(talk, 10, inference, compiled)
        self.then(talk, steps, inference)

    @precondition(lambda self: 0 < len(self.talks) < TALKS)
    @rule(pick=PICK, deep=st.booleans(), inference=INFERENCE, steps=STEPS)
    def fork(self, pick, deep, inference, steps):
        """A deep copy, or a growing cache that begins with the same tensors."""
        talk = self.talk(pick)

        def forked(cache):
            if deep or talk.static:
                return copy.deepcopy(cache)
            twin = copy.copy(cache)
            twin.layers = [copy.copy(layer) for layer in cache.layers]
            return twin

        mask = None if talk.mask is None else talk.mask.clone()
        here, there = map(forked, talk.caches)
        self.talks.append(Talk(here, there, talk.static, talk.batch, mask, talk.length))
        self.then(self.talks[-1], steps, inference)
        self.then(talk, steps, inference)

    @precondition(lambda self: self.talks)
    @rule(
        pick=PICK,
        layer=st.integers(0, LAYERS - 1),
        row=st.integers(0, SLOTS),
        how=st.sampled_from(["one key", "a view", "all", "new tensor", "new data", "values"]),
        inference=INFERENCE,
        steps=STEPS,
    )
    def edit_old_keys(self, pick, layer, row, how, inference, steps):
        talk = self.talk(pick)
        if talk.inference and how in ("one key", "a view"):
            return  # see README: what the rows of a sample do not show
        with torch.inference_mode() if talk.inference or inference else torch.no_grad():
            for cache in talk.caches:
                if not self.filled(cache):
                    continue
                held = cache.layers[layer]
                row %= min(talk.length, held.keys.shape[2])
                if how == "one key":
                    held.keys[:, :, row] *= -3
                elif how == "a view":
                    held.keys.select(2, row).copy_(held.keys.select(2, 0).flip(-1))
                elif how == "all":
                    held.keys.mul_(-1)
                elif how == "new tensor":
                    held.keys = held.keys.flip(-1).contiguous()
                elif how == "new data" and not talk.inference and not inference:
                    held.keys.data = held.keys.data.flip(-1)
                elif how == "values":
                    held.values.mul_(0.5)
        self.then(talk, steps, inference)

    @precondition(lambda self: self.talks and self.can_go_back)
    @rule(pick=PICK, inference=INFERENCE, steps=STEPS)
    def change_the_kind_of_cache(self, pick, inference, steps):
        """Static to growing or back, with what is in it."""
        talk = self.talk(pick)
        with torch.inference_mode() if inference or talk.inference else torch.no_grad():
            new = []
            for cache in talk.caches:
                if talk.static:
                    other = DynamicCache(config=self.model.config)
                else:
                    other = StaticCache(self.model.config, max_cache_len=SLOTS)
                for number, layer in enumerate(cache.layers):
                    if not self.filled(cache):
                        continue
                    other.update(
                        layer.keys[:, :, : talk.length].clone(),
                        layer.values[:, :, : talk.length].clone(),
                        number,
                    )
                new.append(other)
        talk.here, talk.there = new
        talk.static = not talk.static
        self.then(talk, steps, inference)

    @precondition(lambda self: len(self.talks) > 1)
    @rule(pick=PICK)
    def end(self, pick):
        del self.talks[pick % len(self.talks)]

    def filled(self, cache) -> bool:
        return bool(cache.layers) and isinstance(cache.layers[0].keys, Tensor)

    # -- what always holds

    @invariant()
    def indexes_mirror_their_caches(self):
        count("state machine: steps")
        for talk in self.talks:
            for layer in talk.here.layers if self.filled(talk.here) else []:
                if layer.keys.is_inference():
                    continue
                rest = layer.values if is_latent(self.model) else None
                held = Cached(layer.keys, rest, 2, layer.keys)
                for index in indexes_of(layer.keys, rest):
                    if not index.valid:
                        continue
                    layout = index.layout
                    if isinstance(layout, PageLayout):
                        self.bounds_hold(index.tensors[0], layer.keys[:, :, : talk.length])
                        continue
                    cached = held.narrow(0, layer.keys.shape[2])
                    rows, _ = project_new_keys(cached, index.basis.key, 1, layout.dtype, 0)
                    atol = self.near(rows) if layout.dtype == torch.bfloat16 else 1e-4
                    torch.testing.assert_close(index.tensors[0], rows, rtol=0, atol=atol)
                    count("state machine: indexes equal a projection")

    def bounds_hold(self, held: Tensor, keys: Tensor) -> None:
        """Of whole pages the bounds are equal; the last one's may still hold keys that were taken
        back, until the next step."""
        bounds, whole = page_bounds(keys, PAGE), keys.shape[2] // PAGE
        assert torch.equal(held[:, :, :whole], bounds[:, :, :whole])
        low, high = held[:, :, whole : bounds.shape[2]].chunk(2, -1)
        least, most = bounds[:, :, whole:].chunk(2, -1)
        assert (low <= least).all() and (high >= most).all()
        count("state machine: bounds equal those of pages")

    def teardown(self):
        self.model.to(device="cpu", dtype=torch.float32)
        count("state machine: runs")


def breakable(compile_graph):
    """Sparse variants that raise behind their last write while `_breaking`."""

    def build(gm, inputs, **kwargs):
        run = compile_graph(gm, inputs, **kwargs)
        if not is_sparse(gm):
            return run

        def breaks(*args):
            outputs = run(*args)
            if _breaking:
                raise RuntimeError("an illegal instruction was encountered")
            return outputs

        return breaks

    return build


@pytest.fixture(scope="module")
def interpreted():
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as stack,
        # One code object sees every kind of cache, batch and mode: eager would take over.
        torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=2048),
    ):
        interpret(lambda engine: stack.enter_context(default_engine(breakable(engine))))
        # What broke once would stay dense, and the machine would drive no sparse step any more.
        patch.setattr(
            setbacks.Setbacks, "give_up", lambda *_: count("state machine: kernels that broke")
        )
        yield patch
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        # What crosses `min_context` chooses few keys too, behind it.
        pytest.param(options, id=name, marks=[pytest.mark.slow] * (name == "few"))
        for name, options in OPTIONS.items()
    ],
)
@pytest.mark.parametrize(
    "make",
    [make_model, make_latent_model, pytest.param(make_windowed_model, marks=pytest.mark.slow)],
)
def test_any_order_of_what_people_do_to_caches(make, options, interpreted):
    model = make()
    exact = options["top_k"] == 1.0
    if not exact:
        options = {**options, "basis": axes(model)}
        # Dense for a while after many rebuilds is a decision that the copy does not share.
        interpreted.setattr(builds, "WASTED_BUILDS", 10**9)
    before = whole_counts()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="loki", options=options)
    machine = functools.partial(CacheMachine, model, fast, exact=exact)
    run_state_machine_as_test(machine, settings=cases(0.05))
    gc.collect()
    ran = whole_counts() - before
    assert ran["sparse_steps"] and bool(options["min_context"]) <= bool(ran["dense_steps"]), ran
    assert stats()["index_bytes"] == 0


@pytest.mark.parametrize(
    "policy, group_choice",
    [
        ("quest", "max"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [
                ("quest", "probability"),
                ("oracle", "max"),
                ("oracle", "probability"),
                ("window", "max"),
            ]
        ),
    ],
)
def test_any_order_by_any_policy(policy, group_choice, interpreted):
    """With a small budget, and what is kept of a copy of the cache built anew."""
    options = {**FEW, "policy": policy, "group_choice": group_choice}
    interpreted.setattr(builds, "WASTED_BUILDS", 10**9)
    before = whole_counts()
    torch._dynamo.reset()
    model = make_model()
    fast = torch.compile(model, backend="loki", options=options)
    machine = functools.partial(CacheMachine, model, fast, exact=False)
    run_state_machine_as_test(machine, settings=cases(0.04))
    gc.collect()
    ran = whole_counts() - before
    assert ran["sparse_steps"] and bool(ran["rebuilds"]) == (policy == "quest"), ran
    assert stats()["index_bytes"] == 0


def whole_counts() -> Counter[str]:
    """Those of `stats` that are numbers."""
    return Counter({name: n for name, n in stats().items() if isinstance(n, int)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_conversation_moves_to_another_dtype_and_back(dtype, interpreted):
    model = make_model()
    torch._dynamo.reset()
    before = whole_counts()
    fast = torch.compile(model, backend="loki", options=EVERYTHING)
    here = DynamicCache(config=model.config)
    ids = torch.randint(VOCABULARY, (1, 20))
    with torch.no_grad():
        model(ids, past_key_values=here)
        for number, moved in enumerate((torch.float32, dtype, torch.float32)):
            model.to(moved)
            map_tensors(here, lambda x, moved=moved: x.to(moved))
            for at in range(3 * number, 3 * number + 3):
                there = copy.deepcopy(here)
                step = ids[:, at : at + 1]
                out = fast(step, past_key_values=here).logits
                expected = model(step, past_key_values=there).logits
                atol = 2e-4 if moved != torch.bfloat16 else 0.1 * float(expected.std())
                assert out.dtype == moved
                torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    ran = whole_counts() - before
    assert ran["sparse_steps"] == (6 if dtype == torch.float64 else 9)
