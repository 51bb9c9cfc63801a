"""Caches that are parts of one tensor: of all layers, or keys beside values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from loki_compile.passes.calls import op_name
from loki_compile.passes.shared_caches import take_parts, with_parts
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from toy_capture import normal_graph

from loki_compile import reports, stats

LAYERS, BATCH, HEADS, KV_HEADS, SLOTS, HEAD_DIM, WIDTH = 2, 2, 4, 2, 24, 8, 32
STEPS = 6
pytestmark = [pytest.mark.soak, pytest.mark.covers, pytest.mark.usefixtures("fresh")]


@dataclass(frozen=True)
class Layout:
    """Where one layer's keys and values, (B, Hkv, T, D) both, lie in one tensor of `shape`.

    `step` stores new ones at positions `pos`, counted from `at`, and returns all that are there.
    """

    shape: tuple[int, ...]
    step: Callable[[Tensor, int, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def by_numbers(cache, layer, k, v, pos, at):
    cache[layer, 0, :, :, pos], cache[layer, 1, :, :, pos] = k, v
    return cache[layer, 0], cache[layer, 1]


def by_slices(cache, layer, k, v, pos, at):
    end = at + k.shape[2]
    cache[layer, 0, :, :, at:end] = k
    cache[layer, 1, :, :, at:end] = v
    return cache[layer, 0, :, :, :end], cache[layer, 1, :, :, :end]


def by_views(cache, layer, k, v, pos, at):
    keys, values = cache[layer].unbind(0)
    keys.index_copy_(2, pos, k)
    values.index_copy_(2, pos, v)
    return keys, values


def by_select(cache, layer, k, v, pos, at):
    keys, values = cache.select(0, layer), cache.select(0, layer - LAYERS)  # from the end
    keys.select(0, 0).index_copy_(2, pos, k)
    values[1].index_copy_(2, pos, v)
    return keys[0], keys[-1]


def side_by_side(cache, layer, k, v, pos, at):
    """Keys and values of a token are neighbours in memory."""
    cache[layer, :, pos, 0] = k.transpose(1, 2)
    cache[layer, :, pos, 1] = v.transpose(1, 2)
    return cache[layer, :, :, 0].transpose(1, 2), cache[layer, :, :, 1].transpose(1, 2)


def values_only_apart(cache, layer, k, v, pos, at):
    """Keys of all layers, then values of all layers."""
    cache[0][layer].index_copy_(2, pos, k)
    cache[1][layer].index_copy_(2, pos, v)
    return cache[0][layer], cache[1][layer]


def both_at_once(cache, layer, k, v, pos, at):
    """One write for keys and values, as flash-attn's inference cache has it."""
    end = at + k.shape[2]
    kv = cache[layer]
    kv[:BATCH, at:end, ...] = torch.stack([k, v], 2).transpose(1, 3)
    k, v = kv[:BATCH, :end].unbind(2)
    return k.transpose(1, 2), v.transpose(1, 2)


def both_at_positions(cache, layer, k, v, pos, at):
    kv = cache[layer].index_copy_(3, pos, torch.stack([k, v]))
    return kv[0], kv[1]


def both_copied(cache, layer, k, v, pos, at):
    cache[layer][:, :, :, at : at + k.shape[2]].copy_(torch.stack((k, v), dim=0))
    return cache[layer, 0], cache[layer][-1]


def both_turned(cache, layer, k, v, pos, at):
    kv = cache[layer]
    kv[:, pos] = torch.stack([k.transpose(1, 2), v.transpose(1, 2)], dim=2)
    kv = kv.permute(2, 0, 3, 1, 4)
    return kv[0], kv[1]


_HEADS_FIRST = (LAYERS, 2, BATCH, KV_HEADS, SLOTS, HEAD_DIM)
_TOKENS_FIRST = (LAYERS, BATCH, SLOTS, 2, KV_HEADS, HEAD_DIM)
LAYOUTS = {
    "numbers": Layout(_HEADS_FIRST, by_numbers),
    "slices": Layout(_HEADS_FIRST, by_slices),
    "views": Layout(_HEADS_FIRST, by_views),
    "select": Layout(_HEADS_FIRST, by_select),
    "side by side": Layout(_TOKENS_FIRST, side_by_side),
    "both at once": Layout(_TOKENS_FIRST, both_at_once),
    "both at positions": Layout(_HEADS_FIRST, both_at_positions),
    "both copied": Layout(_HEADS_FIRST, both_copied),
    "both turned": Layout(_TOKENS_FIRST, both_turned),
    "keys, then values": Layout((2, LAYERS, *_HEADS_FIRST[2:]), values_only_apart),
}


def whole_scaled(cache, layer, k, v, pos, at):
    found = by_numbers(cache, layer, k, v, pos, at)
    cache.mul_(1.0)
    return found


def written_through_a_reshape(cache, layer, k, v, pos, at):
    found = by_numbers(cache, layer, k, v, pos, at)
    cache[layer, 0].view(BATCH * KV_HEADS, SLOTS, HEAD_DIM).mul_(1.1)
    return found


def written_through_a_diagonal(cache, layer, k, v, pos, at):
    found = by_numbers(cache, layer, k, v, pos, at)
    cache[layer, 0].split(KV_HEADS // 2, dim=1)[0].diagonal(0, 2, 3).mul_(1.1)
    return found


def keys_moved(cache, layer, k, v, pos, at):
    found = by_numbers(cache, layer, k, v, pos, at)
    cache[layer, 0, :, :, 1:2] = cache[layer, 0, :, :, :1]
    return found


def other_layer_written(cache, layer, k, v, pos, at):
    """A number that only the running model knows may be any layer's."""
    found = by_numbers(cache, layer, k, v, pos, at)
    cache[pos[:1] * 0 + layer, 0] = cache[layer, 0].clone()
    return found


class Decoder(nn.Module):
    """Two layers of attention over one tensor that holds both layers' keys and values."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layout = layout
        sizes = (HEADS, KV_HEADS, KV_HEADS)
        self.maps = nn.ModuleList(
            nn.ModuleList(nn.Linear(WIDTH, n * HEAD_DIM) for n in sizes) for _ in range(LAYERS)
        )
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor, cache: Tensor, at: int) -> Tensor:
        pos = torch.arange(at, at + x.shape[1])
        for layer, maps in enumerate(self.maps):
            q, k, v = (
                m(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
                for m in maps  # type: ignore[union-attr]
            )
            keys, values = self.layout.step(cache, layer, k, v, pos, at)
            mask = torch.arange(keys.shape[2]) <= pos[:, None]
            out = sdpa(q, keys, values, attn_mask=mask, enable_gqa=True)
            x = x + self.out(out.transpose(1, 2).flatten(2))
        return x


def decode(step: Callable, model: Decoder, cache: Tensor, x: Tensor, at: int) -> list[Tensor]:
    with torch.no_grad():
        return [step(x[:, t : t + 1], cache, at + t) for t in range(x.shape[1])]


def both(layout: Layout, x: Tensor, **options):
    """Two conversations after the same prefill, compiled and not, and what decodes each."""
    model = Decoder(layout).eval()
    caches = [torch.zeros(layout.shape) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(x, cache, 0)
    fast = torch.compile(model, backend="loki", options={"min_context": 0, **options})
    return model, fast, *caches


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layers_part_has_an_index_of_its_own(name, interpreted):
    start = 12  # a basis is fitted again when keys have doubled: not within these steps
    x = torch.randn(BATCH, start + STEPS, WIDTH)
    model, fast, here, there = both(LAYOUTS[name], x[:, :start], top_k=1.0)
    got = decode(fast, model, here, x[:, start:], start)
    for a, b in zip(got, decode(model, model, there, x[:, start:], start), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert stats()["sparse_steps"] == STEPS and stats()["rebuilds"] == LAYERS
    assert {report.count("sparse") for report in reports()} == {LAYERS}


def test_inductor_writes_into_the_parts():
    x = torch.randn(BATCH, 8, WIDTH)
    model, fast, here, there = both(LAYOUTS["numbers"], x[:, :5], top_k=1.0)
    got = decode(fast, model, here, x[:, 5:], 5)
    for a, b in zip(got, decode(model, model, there, x[:, 5:], 5), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert stats()["sparse_steps"] == 3 and stats()["rebuilds"] == LAYERS


@pytest.mark.parametrize("name", ["numbers", "slices"])
def test_what_is_dense_by_plan_is_right_under_inductor(name):
    """Short caches: Inductor gets a graph at once, or its dense variant where sizes are symbols."""
    x = torch.randn(BATCH, 8, WIDTH)
    model, fast, here, there = both(LAYOUTS[name], x[:, :5], min_context=1024)
    got = decode(fast, model, here, x[:, 5:], 5)
    for a, b in zip(got, decode(model, model, there, x[:, 5:], 5), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert stats()["sparse_steps"] == 0 and reports()


@pytest.mark.parametrize("name", ["numbers", "side by side"])
def test_a_small_budget_equals_a_fresh_rebuilds_also_after_edits(name, interpreted):
    """Whoever writes into the tensor, in whatever part of it, makes all its indexes old."""
    x = torch.randn(BATCH, 16, WIDTH)
    model, fast, here, _ = both(LAYOUTS[name], x[:, :10], top_k=4, sink=1, recent=1, rank=HEAD_DIM)
    decode(fast, model, here, x[:, 10:12], 10)
    with torch.no_grad():
        here[0].mul_(1.5)
    rebuilds = stats()["rebuilds"]
    fresh = here.clone()
    got = decode(fast, model, here, x[:, 12:], 12)
    assert stats()["rebuilds"] == rebuilds + LAYERS
    for a, b in zip(got, decode(fast, model, fresh, x[:, 12:], 12), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


ONE_TENSOR, OTHER_WRITE = "holds more than this layer's keys", "cannot be mirrored"


@pytest.mark.parametrize(
    "step, reason",
    [
        (whole_scaled, ONE_TENSOR),
        (other_layer_written, ONE_TENSOR),
        # Views of a part share its memory, in whatever way they were made.
        (written_through_a_reshape, OTHER_WRITE),
        (written_through_a_diagonal, OTHER_WRITE),
        (keys_moved, OTHER_WRITE),
    ],
)
def test_a_tensor_that_is_written_otherwise_too_stays_dense(step, reason, interpreted):
    x = torch.randn(BATCH, 5 + STEPS, WIDTH)
    model, fast, here, there = both(Layout(_HEADS_FIRST, step), x[:, :5], top_k=1.0)
    got = decode(fast, model, here, x[:, 5:], 5)
    for a, b in zip(got, decode(model, model, there, x[:, 5:], 5), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    sites = [site for report in reports() for site in report.sites]
    assert sites and all(reason in site.reason for site in sites)


def test_parts_become_inputs_and_what_they_are_cut_from_has_no_users():
    def attends(c, x):
        c[1, 0, :, :, 3:4] = x
        return c[1][0] + 1, c[-1, 1] + c.select(0, 0)[1]

    cache, x = torch.randn(2, 2, 3, 2, 5, 4), torch.randn(3, 2, 1, 4)
    gm = normal_graph(attends, cache, x)
    parts = take_parts(gm)
    assert [part.numbers for part in parts] == [
        ((0, 1), (0, 0)),
        ((0, 1), (0, 1)),
        ((0, 0), (0, 1)),
    ]
    base, given, *new = gm.graph.find_nodes(op="placeholder")
    assert not base.users and given.users and all(node.users for node in new)
    expected = attends(there := cache.clone(), x)
    got = gm(*with_parts((cache, x), parts))
    assert all(map(torch.equal, got, expected)) and torch.equal(cache, there)


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c[0, 1] + c.sum(),  # all of it is read
        lambda c: c[0, :, 1] + c[0, 1, :2],  # two dimensions: they cross
        lambda c: c[0] + 1,  # keys and values at once
        lambda c: (c[0, 1] + 1, c[0]),  # a view of two parts is returned
        lambda c: c[torch.tensor(1), 0] + 1,  # a number that only the running model knows
        lambda c: c[:, :1].transpose(0, 1)[0] + c[0, 1],
    ],
)
def test_a_tensor_that_is_used_otherwise_too_stays_one_input(use):
    gm = normal_graph(use, torch.randn(2, 2, 3, 2, 5, 4))
    before = len(gm.graph.find_nodes(op="placeholder"))
    assert take_parts(gm) == []
    assert len(gm.graph.find_nodes(op="placeholder")) == before


def test_parts_are_seen_behind_slices_of_what_numbers_count():
    gm = normal_graph(lambda c: c[1:][0, 0] + c[0, 1], torch.randn(2, 2, 3, 2, 5, 4))
    assert [part.numbers for part in take_parts(gm)] == [((0, 1), (0, 0)), ((0, 0), (0, 1))]


def parts_of(attends, c, *others, base=0):
    """What `take_parts` finds in c; the graph that is left does what the function did."""
    gm = normal_graph(attends, c, *others)
    parts = take_parts(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")[: (len(parts) and -len(parts)) or None]
    there = [t.clone() for t in (c, *others)]
    expected = attends(*there)
    own = {f"l_{name}_": t.clone() for name, t in zip("cxyz", (c, *others), strict=False)}
    args = [own[node.name] for node in placeholders]
    assert all(map(torch.equal, gm(*with_parts(args, parts)), expected))
    assert all(map(torch.equal, own.values(), there))
    names = [node.name for node in placeholders]
    return gm, [part.numbers for part in parts if names[part.base] == "l_c_"]


def stores(index):
    """With the first and second tensor that it is given in the place of 'y' and 'z'."""

    def attends(c, x, y, z):
        c[tuple(y if i == "y" else z if i == "z" else i for i in index)] = x
        return c[:, :, 0] + y[0], c[:, :, 1] + z[0]

    return attends, torch.randn(2, 3, 2, 5, 4), torch.tensor([0, 2]), torch.tensor([4, 1])


ALL = slice(None)


@pytest.mark.parametrize(
    "index, sizes",
    [
        ((ALL, slice(1, 2)), (2, 1, 2, 5, 4)),
        ((ALL, slice(1, 2)), (1, 2, 5, 4)),  # broadcast
        ((Ellipsis, slice(2, 4), ALL), (2, 3, 2, 2, 4)),
        ((ALL, "y"), (2, 2, 2, 5, 4)),
        ((ALL, ALL, ALL, "z"), (2, 3, 2, 2, 4)),
        ((ALL, None, slice(1, 2)), (2, 1, 1, 2, 5, 4)),
    ],
)
def test_one_write_of_all_parts_is_one_for_each(index, sizes):
    attends, cache, *indices = stores(index)
    gm, parts = parts_of(attends, cache, torch.randn(sizes), *indices)
    assert parts == [((2, 0),), ((2, 1),)]
    writes = [node for node in gm.graph.nodes if op_name(node) == "setitem"]
    assert len(writes) == 2 and {write.args[0].op for write in writes} == {"placeholder"}


@pytest.mark.parametrize(
    "index, sizes",
    [
        ((ALL, slice(1, 2), slice(0, 1)), (2, 1, 1, 5, 4)),  # of one part only
        ((ALL, slice(1, 2)), (2, 1, 1, 5, 4)),  # the same for both
        ((ALL, slice(1, 2)), (5, 4)),
        ((1, "y"), (2, 2, 5, 4)),  # numbers of two dimensions cross
        ((ALL, "y", ALL, "z"), (2, 2, 2, 4)),  # indices that it keeps apart
    ],
)
def test_another_write_of_all_parts_stays_one(index, sizes):
    attends, cache, *indices = stores(index)
    assert parts_of(attends, cache, torch.randn(sizes), *indices)[1] == []


def test_what_is_written_after_it_was_stacked_is_not_seen_through():
    def attends(c, x, y):
        kv = torch.stack([x, y], 2)
        x.mul_(2)
        c[:, 1:2] = kv
        return c[:, :, 0] + 1, c[:, :, 1] + 1

    sizes = (2, 1, 5, 4)
    _, parts = parts_of(attends, torch.randn(2, 3, 2, 5, 4), torch.randn(sizes), torch.randn(sizes))
    assert len(parts) == 2


def test_a_tensor_that_overlaps_itself_or_another_input_stays_one_input():
    """Parts are taken for apart from everything else in memory."""

    def attends(c, x):
        c[1, 0, :, :, 3:4] = x
        return c[1, 0] + 1, c[0, 1] + 1

    cache, x = torch.randn(2, 2, 3, 2, 5, 4), torch.randn(3, 2, 1, 4)
    assert len(take_parts(normal_graph(attends, cache, x))) == 2
    tall = torch.randn(2, 2, 3, 2, 9, 4)[:, :, :, :, :5]
    assert len(take_parts(normal_graph(attends, tall, x))) == 2
    one = torch.randn(1, 2, 3, 2, 5, 4).expand(2, -1, -1, -1, -1, -1)
    reads = normal_graph(lambda c: (c[1, 0] + 1, c[0, 1] + 1), one)
    assert take_parts(reads) == []
    folded = torch.randn(400).as_strided((2, 2, 3, 2, 5, 4), (100, 50, 20, 20, 4, 1))
    assert take_parts(normal_graph(lambda c: (c[1, 0] + 1, c[0, 1] + 1), folded)) == []
    both = normal_graph(lambda c, view: (c[1, 0] + view, c[0, 1] + 1), cache, cache[1, 1])
    assert take_parts(both) == []
