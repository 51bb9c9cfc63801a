"""Which sites become sparse: the plan of a graph, before anything is edited or run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from loki_compile.kernels import cpu_build, ops
from loki_compile.kernels.ops import Budget
from loki_compile.passes import plan
from loki_compile.passes.attention import Reason
from loki_compile.passes.graphs import copy_of
from loki_compile.passes.plan import make_plan
from loki_compile.passes.policy import Choice
from loki_compile.passes.sites import find_sites
from torch import nn
from toy_attends import gqa_repeat_kv, sdpa, with_dropout
from toy_capture import normal_graph
from toy_conversation import Conversation, tokens
from toy_decoders import UNTOUCHED, Spelling, ToyDecoder
from toy_masks import alibi, no_mask
from toy_options import BATCH, FILLED, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, SLOTS
from toy_writes import cat_bhtd, cat_cropped, index_copy_method

from loki_compile.policies.low_rank import LOW_RANK

pytestmark = pytest.mark.covers


BUDGET = Budget(top_k=5, keep_q16=1 << 16, sink=1, recent=1, min_keys=0)
STATIC = Spelling(index_copy_method)
GROWING = Spelling(cat_bhtd, mask=no_mask, growing=True)


class Stack(nn.Module):
    """Layers with a cache of their own each."""

    def __init__(self, spelling, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(ToyDecoder(spelling) for _ in range(layers))

    def forward(self, x, caches, pos, mask):
        state = []
        for layer, (ck, cv) in zip(self.layers, caches, strict=True):
            x, *new = layer(x, ck, cv, pos, mask)
            state += new
        return (x, *state)


def graph_of(spelling, module=None):
    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    return normal_graph(module or ToyDecoder(spelling).eval(), *inputs)


def graph_of_stack(spelling=STATIC, layers=3):
    starts = [Conversation.start(spelling) for _ in range(layers)]
    x, _, _, pos, mask = starts[0].inputs(tokens(spelling, 1)[0])
    caches = [(start.keys, start.values) for start in starts]
    return normal_graph(Stack(spelling, layers).eval(), x, caches, pos, mask)


def plan_of(gm, **changes):
    budget = replace(BUDGET, min_keys=changes.pop("min_context", 0))
    choice = Choice(LOW_RANK, budget, changes.pop("per_head", False))
    options = {"policy": lambda sites: [choice] * len(sites), "layers": "all"}
    return make_plan(*find_sites(gm.graph), **{**options, **changes})


def test_every_site_has_a_cache_of_its_own_in_the_order_of_layers():
    plan = plan_of(graph_of_stack())
    assert [sparse.site.path for sparse in plan.sparse] == ["layers.0", "layers.1", "layers.2"]
    assert [sparse.cache for sparse in plan.sparse] == [0, 1, 2]
    assert len({cache.past for cache in plan.caches}) == 3
    assert [sparse.site for sparse in plan.sparse] == list(plan.sites)
    assert not plan.dense and all(sparse.choice.budget == BUDGET for sparse in plan.sparse)


@pytest.mark.parametrize(
    "layers, sparse",
    [
        ("all", [0, 1, 2]),
        ((1,), [1]),
        ((2, 0), [0, 2]),
        ((7,), []),
        (("layers.1",), [1]),
        (("layers.*",), [0, 1, 2]),
        (("*.2", 0), [0, 2]),
        (("layers",), []),
    ],
)
def test_layers_that_are_not_chosen_stay_dense_for_that_reason(layers, sparse):
    plan = plan_of(graph_of_stack(), layers=layers)
    assert [s.site.path for s in plan.sparse] == [f"layers.{i}" for i in sparse]
    left = [skip for skip in plan.dense if skip.reason is Reason.LAYER_OFF and skip.by_plan]
    assert [skip.path for skip in left] == [f"layers.{i}" for i in range(3) if i not in sparse]
    assert len(plan.sites) == 3 and all(skip.details == (layers,) for skip in left)


def test_a_site_without_a_number_in_its_path_is_counted():
    gm = graph_of(STATIC)
    assert len(plan_of(gm, layers=(0,)).sparse) == 1
    assert len(plan_of(gm, layers=(1,)).sparse) == 0


@pytest.mark.parametrize(
    "spelling, most",
    [
        (STATIC, SLOTS),
        (GROWING, None),
        (GROWING.but(write=cat_cropped), FILLED + 1),  # a window, and the new token
        (GROWING.but(write=cat_cropped, new_tokens=3), FILLED + 3),
    ],
    ids=["static", "growing", "window", "window-3tokens"],
)
def test_a_cache_that_never_exceeds_min_context_stays_dense(spelling, most):
    gm = graph_of(spelling)
    assert len(plan_of(gm, min_context=0).sparse) == 1
    if most is None:
        assert len(plan_of(gm, min_context=10**9).sparse) == 1
        return
    assert len(plan_of(gm, min_context=most - 1).sparse) == 1
    plan = plan_of(gm, min_context=most)
    (skip,) = plan.dense
    assert not plan.sparse and not plan.caches
    assert skip.reason is Reason.SHORT_CACHE and skip.details == (most, most)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("mask, differ", [(no_mask, False), (STATIC.mask, False), (alibi, True)])
def test_heads_choose_for_themselves_where_they_see_other_keys(mask, differ, per_head):
    gm = graph_of(STATIC.but(mask=mask, attend=gqa_repeat_kv))
    (sparse,) = plan_of(gm, per_head=per_head).sparse
    assert sparse.choice.per_head == (per_head or differ)


class Twice(nn.Module):
    """Two layers that read one cache, the second the newest keys alone."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.kv = nn.Linear(HIDDEN, 2 * KV_HEADS * HEAD_DIM)

    def forward(self, x, ck, cv, pos, mask):
        q = self.q(x).view(BATCH, 1, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = self.kv(x).view(BATCH, 1, 2 * KV_HEADS, HEAD_DIM).chunk(2, 2)
        ck.index_copy_(2, pos, k.transpose(1, 2))
        cv.index_copy_(2, pos, v.transpose(1, 2))
        whole = sdpa(q, ck, cv, attn_mask=mask, enable_gqa=True)
        part = sdpa(q, ck[:, :, -11:], cv[:, :, -11:], mask[..., -11:], enable_gqa=True)
        return whole + part


def test_sites_that_read_one_cache_share_its_index():
    plan = plan_of(graph_of(STATIC, Twice().eval()))
    whole, part = plan.sparse
    assert len(plan.caches) == 1 and whole.cache == part.cache == 0
    assert not whole.views and len(part.views) == 1
    short = plan_of(graph_of(STATIC, Twice().eval()), min_context=11)
    assert [s.site.node.name for s in short.sparse] == [whole.site.node.name]
    assert [skip.details for skip in short.dense] == [(11, 11)]


@pytest.mark.parametrize(
    "reason", [Reason.WRITE, Reason.NO_CACHE, Reason.CACHE_LEAVES, Reason.LATENT, Reason.DTYPE]
)
def test_a_cache_that_cannot_be_followed_is_named_with_its_reason(reason):
    spellings = [spelling for spelling in UNTOUCHED if spelling.reason is reason]
    assert spellings
    for spelling in spellings:
        plan = plan_of(graph_of(spelling))
        (skip,) = plan.dense
        assert not plan.sparse and skip.reason is reason
        assert not skip.sentence().endswith(": ")  # says what of it was not understood


def test_what_was_no_site_is_listed_first():
    gm = graph_of(STATIC.but(attend=with_dropout, kv_heads=HEADS))
    plan = plan_of(gm)
    assert [skip.reason for skip in plan.dense] == [Reason.DROPOUT]
    assert (plan.sparse, plan.sites, plan.caches) == ((), (), ())


def test_a_plan_follows_its_graph_into_a_copy():
    gm = graph_of_stack()
    plan = plan_of(gm, layers=(0, 2))
    copy, mapping = copy_of(gm)
    there = plan.on(mapping)
    own = set(copy.graph.nodes)
    nodes = [s.site.node for s in there.sparse] + [skip.node for skip in there.dense]
    nodes += [write.node for cache in there.caches for write in cache.writes]
    assert len(nodes) == 5 and own.issuperset(nodes)
    assert [s.site.path for s in there.sparse] == [s.site.path for s in plan.sparse]
    assert [s.choice.budget for s in there.sparse] == [BUDGET, BUDGET]


def test_a_share_of_the_visible_keys_is_rounded_up_and_never_none():
    third = Budget(top_k=None, keep_q16=(1 << 16) // 3, sink=0, recent=0, min_keys=0)
    assert [third.keys(n) for n in (1, 2, 3, 4, 300)] == [1, 1, 1, 2, 100]
    assert [third.covers(n) for n in (1, 2, 3)] == [True, False, False]
    assert third.keys(1 << 20) == 16 * 21845  # a part in 65536 too small, times the length


@pytest.mark.parametrize("device", ["mps", "cuda"])
def test_a_cache_on_a_device_that_nothing_serves_stays_dense(device, monkeypatch):
    """Not a failure of the first sparse step."""
    gm = graph_of(STATIC)
    where = plan.fake_value

    def elsewhere(node):
        value = where(node)
        return SimpleNamespace(device=torch.device(device)) if node.op == "placeholder" else value

    monkeypatch.setattr(plan, "fake_value", elsewhere)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    (skip,) = plan_of(gm).dense
    assert skip.reason is Reason.DEVICE and not skip.by_plan
    assert f"type {device}" in skip.sentence()
    assert ("Triton is not installed" in skip.sentence()) == (device == "cuda")


def test_where_no_compiler_is_a_site_is_sparse_and_says_what_runs_it(monkeypatch):
    gm = graph_of(STATIC)
    assert [sparse.note for sparse in plan_of(gm).sparse] == [""]
    monkeypatch.setattr(cpu_build, "obstacle", lambda: "no C++ compiler")
    (sparse,) = plan_of(gm).sparse
    assert sparse.note == "plain PyTorch ops, slower than compiled kernels: no C++ compiler"
