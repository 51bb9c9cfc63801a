"""Random uses of one tensor by its parts: the graph that reads parts does what the calls did."""

import itertools
import operator

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from loki_compile.passes.calls import fake_value
from loki_compile.passes.graphs import call, copy_of
from loki_compile.passes.shared_caches import KEY_DIMS, take_parts, with_parts
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = [pytest.mark.soak, pytest.mark.covers]
ALL = slice(None)


class Uses:
    """A graph that is given a cache, and reads and writes parts of it by calls that are drawn."""

    def __init__(self, draw) -> None:
        self.draw, self.outputs = draw, []
        sizes = [draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 2)))] + [2, 2, 3, 2]
        self.cache = torch.randn(draw(st.permutations(sizes)))
        self.graph, self.mode = fx.Graph(), FakeTensorMode()
        self.holder = self.input("cache", self.cache)
        self.at = torch.tensor([0, 1])
        self.positions = self.input("at", self.at)
        # Which dimensions count parts, by the hand that writes the decoder.
        self.counted = set(draw(st.permutations(range(len(sizes))))[: len(sizes) - KEY_DIMS])
        for _ in range(draw(st.integers(1, 4))):
            draw(st.sampled_from([self.read, self.read, self.store]))()
        self.graph.output(tuple(self.outputs))

    def input(self, name, tensor):
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self.mode.from_tensor(tensor)
        return node

    def add(self, function, *args):
        return call(self.graph, function, *args, like=self.holder)

    def part(self, spans: bool):
        """A view of one part, or of several, and what each of its dimensions is of the cache's."""
        node, axes = self.holder, list(range(self.cache.ndim))
        for _ in range(self.draw(st.integers(0, 3))):
            node, axes = self.turned_or_cut(node, axes)
        while not spans and self.counted & {*axes}:
            node, axes = self.taken(node, axes)
        return node, axes

    def turned_or_cut(self, node, axes):
        dim = self.draw(st.integers(0, len(axes) - 1))
        kind = self.draw(st.sampled_from(["permute", "transpose", "slice", "take"]))
        if kind == "permute":
            order = self.draw(st.permutations(range(len(axes))))
            return self.add(torch.permute, node, tuple(order)), [axes[d] for d in order]
        if kind == "transpose":
            axes = [*axes]
            axes[0], axes[dim] = axes[dim], axes[0]
            return self.add(torch.transpose, node, 0, dim), axes
        if kind == "slice":
            size = fake_value(node).shape[dim]
            cut = slice(size // 2, None) if self.draw(st.booleans()) else slice(0, size - size // 2)
            return self.add(operator.getitem, node, (*[ALL] * dim, cut)), axes
        return self.taken(node, axes)

    def taken(self, node, axes):
        left = [d for d, axis in enumerate(axes) if axis in self.counted]
        if not left:
            return node, axes
        dim = self.draw(st.sampled_from(left))
        size = fake_value(node).shape[dim]
        number = self.draw(st.integers(-size, size - 1))
        rest = axes[:dim] + axes[dim + 1 :]
        kind = self.draw(st.sampled_from(["index", "select", "unbind"]))
        if kind == "select":
            return self.add(torch.select, node, dim, number), rest
        if kind == "unbind":
            return self.add(operator.getitem, self.add(torch.unbind, node, dim), number), rest
        return self.add(operator.getitem, node, (*[ALL] * dim, number)), rest

    def read(self):
        node, axes = self.part(spans=self.draw(st.integers(0, 9)) == 0)
        if self.draw(st.booleans()) and len(axes) == KEY_DIMS:  # views behind a part, of its memory
            node = self.add(torch.Tensor.diagonal, node, 0, 0, 1)
            self.add(torch.Tensor.mul_, node, 0.5)
        self.outputs.append(self.add(torch.add, node, 1))

    def store(self):
        node, axes = self.part(spans=self.draw(st.booleans()))
        shape = list(fake_value(node).shape)
        dims = [d for d, axis in enumerate(axes) if axis not in self.counted]
        dim = self.draw(st.sampled_from(dims))
        kind = self.draw(st.sampled_from(["copy_", "index_copy_", "slice", "tensor", "numbers"]))
        if kind == "copy_":
            self.add(torch.Tensor.copy_, node, self.stored(shape))
        elif kind == "index_copy_" and shape[dim] > 1:
            shape[dim] = 2
            node = self.add(torch.Tensor.index_copy_, node, dim, self.positions, self.stored(shape))
        elif kind == "slice":
            shape[dim] = 1
            self.add(operator.setitem, node, (*[ALL] * dim, slice(0, 1)), self.stored(shape))
        elif kind == "tensor" and shape[dim] > 1:
            shape[dim] = 2
            index = (*[ALL] * dim, self.positions)
            self.add(operator.setitem, node, index, self.stored(shape))
        elif shape[dim] > 1 and kind == "numbers":
            number = [axis in self.counted and self.draw(st.booleans()) for axis in axes]
            index = [0 if taken else ALL for taken in number]
            at_zero, index[dim] = tuple(index[:dim]), self.positions
            like = torch.empty(shape)[(*at_zero, self.at, *index[dim + 1 :])]
            self.add(operator.setitem, node, tuple(index), self.stored(list(like.shape)))

    def stored(self, shape):
        """New entries: a computed tensor, or a stack of such along one dimension."""
        source = self.add(torch.mul, self.positions, 0.7)
        dim = self.draw(st.integers(0, len(shape) - 1))
        if self.draw(st.booleans()) and shape[dim] < 4:
            inner = shape[:dim] + shape[dim + 1 :]
            tensors = [self.whole(source, inner, n) for n in range(shape[dim])]
            return self.add(torch.stack, tensors, dim)
        return self.whole(source, shape, 7)

    def whole(self, source, shape, number):
        value = self.add(torch.Tensor.sum, source)
        ones = self.add(torch.Tensor.expand, value, tuple(shape))
        return self.add(torch.add, ones, number)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_reading_and_writing_parts_is_what_the_calls_do(data):
    uses = Uses(data.draw)
    gm = fx.GraphModule({}, uses.graph)
    expected_cache = uses.cache.clone()
    expected = gm(expected_cache, uses.at)
    cut, _ = copy_of(gm)
    parts = take_parts(cut)
    event(f"{len(parts)} parts")
    cache = uses.cache.clone()
    got = cut(*with_parts((cache, uses.at), parts))
    assert all(map(torch.equal, got, expected))
    assert torch.equal(cache, expected_cache)
    memory = [
        {*part.of([torch.arange(cache.numel()).view(cache.shape)]).flatten().tolist()}
        for part in parts
    ]
    assert not any(a & b for a, b in itertools.combinations(memory, 2))
