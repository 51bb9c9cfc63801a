"""From a site's keys to its cache and to every write into it: analysis only, on captured graphs."""

import pytest
import torch
from loki_compile.passes.attention import Reason, Skipped
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import writes_of
from loki_compile.passes.graphs import nearest_matrix
from loki_compile.passes.sites import find_sites
from loki_compile.passes.trace_caches import trace_cache
from toy_attends import gqa_repeat_kv, mqa_broadcast, sdpa
from toy_capture import normal_graph
from toy_conversation import Conversation, tokens
from toy_decoders import REWRITTEN, UNTOUCHED, Spelling, ToyDecoder
from toy_masks import no_mask
from toy_options import BATCH, FILLED, HEAD_DIM, HIDDEN, KV_HEADS, SLOTS
from toy_writes import (
    cat_bhtd,
    cat_cropped,
    cat_window_read,
    index_copy_method,
    index_copy_returned,
    index_put_bthd,
    index_put_method,
    index_put_returned,
    llama_reference,
    narrow_copy,
    one_head_3d,
    read_only,
    ring,
    roll_window,
    row_assignment,
    select_copy,
    slice_assignment,
    slice_assignment_read,
    tensor_assignment,
    write_twice,
    write_two_halves,
)

pytestmark = pytest.mark.covers


def index_put_whole(k, v, ck, cv, pos):
    """None stands for a whole dimension."""
    torch.ops.aten.index_put_(ck, (None, None, pos), k.transpose(1, 2))
    torch.ops.aten.index_put_(cv, (None, None, pos), v.transpose(1, 2))
    return ck, cv, ()


def index_put_added(k, v, ck, cv, pos):
    """Functional, and added to what was there: an index with scales cannot follow."""
    at = (torch.arange(k.shape[0]).view(-1, 1), pos)
    keys, values = ck.index_put(at, k, accumulate=True), cv.index_put(at, v)
    return keys.transpose(1, 2), values.transpose(1, 2), (keys, values)


def row_of_one_head(k, v, ck, cv, pos):
    """The row that is stored has neither heads nor tokens: (B, D)."""
    ck.select(1, pos).copy_(k[:, 0, 0])
    cv.select(1, pos).copy_(v[:, 0, 0])
    return ck.unsqueeze(1), cv.unsqueeze(1), ()


_one_head = {"kv_heads": 1, "layout": "btd", "attend": mqa_broadcast}


def traced(spelling, *, module=None, **start):
    inputs = Conversation.start(spelling, **start).inputs(tokens(spelling, 1)[0])
    graph = normal_graph(module or ToyDecoder(spelling).eval(), *inputs).graph
    (site,), _ = find_sites(graph)
    return trace_cache(site, writes_of(graph))


@pytest.mark.parametrize("spelling", REWRITTEN, ids=lambda s: s.name)
def test_the_cache_and_its_writes_are_found(spelling):
    cache = traced(spelling)
    assert isinstance(cache, KeyCache)
    shape = cache.past.meta["example_value"].shape
    assert cache.past.op == "placeholder" and cache.past.name == "l_ck_"
    assert "ck" in cache.source
    assert shape[cache.token_axis] == (FILLED if spelling.growing else spelling.slots)
    folded = spelling.kv_heads if cache.heads_are_folded else 1  # heads in one dimension's rows
    heads = spelling.kv_heads * (HEAD_DIM if folded > 1 else 1)
    assert cache.head_axis == -1 or shape[cache.head_axis] == heads
    assert cache.replaced == (cache.output is not None)
    for write in cache.writes:
        source = write.source.meta["example_value"].shape
        assert source[-1] == HEAD_DIM * folded
        assert write.head_axis == -1 or source[write.head_axis] == heads


@pytest.mark.parametrize(
    "spelling",
    [s for s in UNTOUCHED if s.reason in (Reason.WRITE, Reason.CACHE_LEAVES, Reason.NO_CACHE)],
    ids=lambda s: s.name,
)
def test_other_caches_are_skipped_for_the_reason(spelling):
    skip = traced(spelling)
    assert isinstance(skip, Skipped) and skip.reason is spelling.reason


def test_keys_that_are_added_to_a_returned_cache_are_skipped():
    skip = traced(Spelling(index_put_added, layout="bthd"))
    assert isinstance(skip, Skipped) and skip.details == ("index_put", "it accumulates")


_static = Spelling(index_copy_method)
_growing = Spelling(cat_bhtd, mask=no_mask, growing=True)


@pytest.mark.parametrize(
    "spelling, writes",
    [
        (_static, 1),
        (_static.but(write=write_twice), 2),
        (_static.but(write=write_two_halves, new_tokens=2), 2),
        (_static.but(write=read_only, mask=no_mask), 0),
        (_static.but(write=roll_window, mask=no_mask), 1),
        (_growing, 1),
    ],
)
def test_writes_come_in_the_order_of_the_graph(spelling, writes):
    cache = traced(spelling)
    assert len(cache.writes) == writes
    order = list(cache.past.graph.nodes)
    places = [order.index(write.node) for write in cache.writes]
    assert places == sorted(places)


@pytest.mark.parametrize("write, views", [(cat_window_read, 1), (cat_bhtd, 0), (cat_cropped, 0)])
def test_views_between_the_cache_and_the_keys_are_listed(write, views):
    cache = traced(_growing.but(write=write))
    assert cache.replaced and len(cache.views) == views
    assert len(cache.leaves) == (1 if write is cat_cropped else 0)
    returned = cache.root.graph.output_node().args[0][cache.output]
    assert returned is (cache.leaves[-1] if cache.leaves else cache.root)


@pytest.mark.parametrize(
    "write, more, fill",
    [
        (index_copy_method, {}, FILLED + 1),
        (tensor_assignment, {}, FILLED + 1),
        (row_assignment, {"position": "rows"}, FILLED + 1),
        (index_put_method, {}, FILLED + 1),
        (index_put_bthd, {"layout": "bthd"}, FILLED + 1),
        (slice_assignment, {"position": "int"}, FILLED + 1),
        (slice_assignment_read, {"position": "int", "mask": no_mask}, FILLED + 1),
        (narrow_copy, {"position": "int"}, FILLED + 1),
        (select_copy, {"position": "int"}, FILLED + 1),
        (llama_reference, {"position": "int", "layout": "bthd", "mask": no_mask}, FILLED + 1),
        (index_copy_returned, {}, FILLED + 1),
        (index_put_returned, {"layout": "bthd"}, FILLED + 1),
        (index_put_whole, {}, FILLED + 1),
        (ring, {"mask": no_mask, "slots": FILLED - 2}, 3),
        (roll_window, {"mask": no_mask}, None),
        (one_head_3d, _one_head, FILLED + 1),
        (row_of_one_head, {**_one_head, "position": "int"}, FILLED + 1),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_write_tells_how_far_the_cache_is_filled(write, more, fill):
    from loki_compile.passes.graphs import extract

    spelling = _static.but(write=write, **more)
    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    gm = normal_graph(ToyDecoder(spelling).eval(), *inputs)
    (site,), _ = find_sites(gm.graph)
    cache = trace_cache(site, writes_of(gm.graph))
    (write,) = cache.writes
    if fill is None:
        assert write.fill is None
        return
    what, plus = write.fill
    reader = extract(gm, [what], [write.node])
    values = {"l_pos_": inputs[3]}
    args = [values.get(n.name) for n in gm.graph.find_nodes(op="placeholder")]
    (end,) = reader(*args)
    assert int(end.max() if isinstance(end, torch.Tensor) else end) + plus == fill


def test_the_weight_behind_the_keys_identifies_the_cache():
    for fused in (True, False):
        for base in (_static, _growing):
            cache = traced(base.but(fused=fused))
            weight = nearest_matrix(cache.new_keys, lambda node: "parameters" in node.name)
            assert ("qkv" if fused else "_k_") in weight.name and "weight" in weight.name


class Nested(ToyDecoder):
    """One tensor holds keys and values of the layer, or of several layers."""

    def __init__(self, spelling, read):
        super().__init__(spelling)
        self.read = read

    def forward(self, x, cache, _values, pos, mask):
        q, k, v = (
            y.view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        keys, values = self.read(cache)
        keys[:, :, pos], values[:, :, pos] = k, v
        out = sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)
        return (self.out(out.transpose(1, 2).flatten(2)),)


@pytest.mark.parametrize(
    "shape, read",
    [
        ((2, BATCH, KV_HEADS, SLOTS, HEAD_DIM), lambda c: (c[0], c[1])),
        ((BATCH, 2 * KV_HEADS, SLOTS, HEAD_DIM), lambda c: (c[:, :KV_HEADS], c[:, KV_HEADS:])),
        ((BATCH, KV_HEADS, SLOTS, 2 * HEAD_DIM), lambda c: c.chunk(2, dim=-1)),
        ((2, 3, BATCH, KV_HEADS, SLOTS, HEAD_DIM), lambda c: (c[0, 1], c[1, 1])),
    ],
    ids=["stacked", "heads", "dims", "layers"],
)
@torch.no_grad()
def test_a_tensor_that_holds_more_than_these_keys_is_right_or_dense(shape, read, use_engine):
    from toy_capture import interpret

    interpret(use_engine)
    module = Nested(_static, read).eval()
    options = {"min_context": 0, "top_k": 1.0}
    fast = torch.compile(module, backend="loki", options=options)
    caches = [torch.randn(shape)]
    caches.append(caches[0].clone())
    for step in range(3):
        x, pos = torch.randn(BATCH, 1, HIDDEN), torch.tensor([FILLED + step])
        mask = torch.arange(SLOTS)[None] <= FILLED + step
        (out,), (expected,) = (
            f(x, c, None, pos, mask) for f, c in zip((fast, module), caches, strict=True)
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(*caches, rtol=0, atol=1e-6)


def test_half_of_the_heads_of_a_larger_cache_is_skipped():
    """The index would have the cache's heads, the basis only the site's."""

    class HalfOfTheHeads(ToyDecoder):
        def forward(self, x, ck, cv, pos, mask):
            q = self.q(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
            out = sdpa(q, ck[:, :2], cv[:, :2], attn_mask=mask, enable_gqa=True)
            return (self.out(out.transpose(1, 2).flatten(2)),)

    skip = traced(_static, module=HalfOfTheHeads(_static).eval())
    assert isinstance(skip, Skipped) and skip.reason is Reason.SHARED_TENSOR


def test_a_boolean_index_is_no_position():
    def masked_rows(k, v, ck, cv, pos):
        ck[True, :, :, pos] = k.permute(1, 0, 2, 3)
        return ck, cv, ()

    skip = traced(_static.but(write=masked_rows, attend=gqa_repeat_kv))
    assert isinstance(skip, Skipped)


def test_analysis_edits_nothing():
    inputs = Conversation.start(_static).inputs(tokens(_static, 1)[0])
    gm = normal_graph(ToyDecoder(_static).eval(), *inputs)
    before = str(gm.graph)
    (site,), _ = find_sites(gm.graph)
    trace_cache(site, writes_of(gm.graph))
    assert str(gm.graph) == before
