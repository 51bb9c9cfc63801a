"""What the passes ask of a graph: memory, copies, what runs before a write."""

import pytest
import torch
from loki_compile.passes.calls import concrete, may_overlap, op_name, same_size, writes_of
from loki_compile.passes.graphs import copy_of, extract, fake_mode_of, finish
from loki_compile.passes.sites import find_sites
from loki_compile.passes.trace_caches import trace_cache
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from toy_capture import normal_graph
from toy_conversation import Conversation, tokens
from toy_decoders import Spelling, ToyDecoder
from toy_writes import index_copy_method

pytestmark = pytest.mark.covers


def holding(*values):
    """Placeholders of these values."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["example_value"] = value
    return nodes


def test_parts_of_one_memory_overlap_where_they_meet():
    memory = torch.zeros(4, 6)
    whole, top, bottom, column, number = holding(memory, memory[:2], memory[2:], memory[:, 1], 7)
    other = holding(torch.zeros(4, 6))[0]
    assert may_overlap(whole, top) and may_overlap(top, column) and may_overlap(bottom, column)
    assert not may_overlap(top, bottom) and not may_overlap(whole, other)
    assert not may_overlap(whole, number) and not may_overlap(number, number)


def test_tensors_without_a_storage_overlap_themselves_alone():
    first, second = holding(*(torch.eye(3).to_sparse() for _ in range(2)))
    assert may_overlap(first, first) and not may_overlap(first, second)


def test_a_graph_that_dynamo_did_not_trace_is_copied_and_has_no_fake_mode():
    gm = fx.symbolic_trace(lambda x: x + 1)
    copy, mapping = copy_of(gm)
    assert copy(torch.ones(2)).tolist() == [2, 2] and len(mapping) == 3
    assert mapping[next(iter(gm.graph.nodes))] is next(iter(copy.graph.nodes))
    with pytest.raises(ValueError, match="needed one traced by Dynamo"):
        fake_mode_of(copy.graph)


def advanced_then_computed(k, v, ck, cv, pos):
    pos.add_(1)
    return index_copy_method(k, v, ck, cv, pos - 1)


def advanced_then_read(k, v, ck, cv, pos):
    pos.add_(1)
    return index_copy_method(k, v, ck, cv, pos)


def advanced_and_read(k, v, ck, cv, pos):
    return index_copy_method(k, v, ck, cv, pos.add_(1))


def read_then_advanced(k, v, ck, cv, pos):
    result = index_copy_method(k, v, ck, cv, pos)
    pos.add_(1)
    return result


def computed_then_advanced(k, v, ck, cv, pos):
    at = pos + 0
    pos.add_(1)
    return index_copy_method(k, v, ck, cv, at)


@pytest.mark.parametrize(
    "write, known",
    [
        (advanced_then_computed, False),
        (advanced_then_read, False),
        (advanced_and_read, False),
        (read_then_advanced, True),
        (computed_then_advanced, True),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_a_write_reads_is_computed_beforehand_unless_it_changes_until_then(write, known):
    spelling = Spelling(write)
    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    gm = normal_graph(ToyDecoder(spelling).eval(), *inputs)
    (site,), _ = find_sites(gm.graph)
    (write,) = trace_cache(site, writes_of(gm.graph)).writes
    assert (extract(gm, [write.fill[0]], [write.node]) is not None) == known


def test_sizes_are_the_same_where_that_is_known_without_a_guard():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    first, second = (
        mode.from_tensor(
            torch.zeros(size),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC]),
        ).shape[0]
        for size in (5, 7)
    )
    assert same_size(first, first) and same_size(2 * first, first + first)
    for a, b in ((first, second), (first, first + 1), (first + 1, first), (first, 5), (5, first)):
        assert not same_size(a, b)
    assert same_size(5, 5) and not same_size(5, 7)
    assert concrete(first) is None and concrete(first - first + 3) == 3 and concrete(4) == 4
    assert not mode.shape_env.guards


@pytest.mark.parametrize(
    "function, left",
    [
        (lambda x: (torch.zeros(3).copy_(x), x + 1)[1], {"add"}),
        (lambda x: (torch.zeros(4)[1:].copy_(x), x.add_(1))[1], {"add_"}),
        (lambda x: (fill := x.new_empty(2, 3), fill[1].copy_(x), fill[0] + 1, x)[3], set()),
        (lambda x: (fill := x.new_zeros(2, 3), fill[1].copy_(x), fill[0])[2],
         {"new_zeros", "getitem", "copy_"}),  # what is returned may be read
        (lambda x: (fill := torch.zeros(3), fill.copy_(x), x.mul_(fill))[2],
         {"zeros", "copy_", "mul_"}),
        (lambda x: (fill := torch.zeros(3), torch.add(x, 1, out=fill), x)[2], {"zeros", "add"}),
        (lambda x: (parts := x.split(1), parts[0].add_(1), x + 1)[2],
         {"split", "getitem", "add_", "add"}),
    ],
)  # fmt: skip
def test_what_is_written_where_nothing_reads_is_dropped(function, left):
    gm = normal_graph(function, x := torch.ones(3))
    given, there = x.clone(), x.clone()
    expected = function(there)
    (got, *_) = finish(gm)(given)
    assert torch.equal(got, expected) and torch.equal(given, there)
    assert {op_name(node) for node in gm.graph.nodes} - {""} == left
