"""Random chains of calls: what a view says of a tensor is what the calls do to its numbers."""

import operator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loki_compile.passes.calls import fake_value
from loki_compile.passes.heads import heads_of
from loki_compile.passes.trace_caches import view_dims
from loki_compile.passes.views import through, views_behind
from torch import fx

HEAD_DIM = 4


@st.composite
def chains(draw):
    """The nodes of up to six calls on (B, H, T, D), each with a real tensor as its value."""
    x = torch.randn(draw(st.integers(1, 2)), draw(st.integers(1, 3)), 5, HEAD_DIM)
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    nodes[0].meta["example_value"] = x
    for _ in range(draw(st.integers(1, 6))):
        value = fake_value(nodes[-1])
        rank, shape = value.ndim, tuple(value.shape)
        dim = draw(st.integers(0, rank - 1))
        size = shape[dim]
        calls = [
            (torch.transpose, dim, draw(st.integers(0, rank - 1))),
            (torch.permute, tuple(draw(st.permutations(range(rank))))),
            (torch.movedim, dim, draw(st.integers(-rank, rank - 1))),
            (torch.repeat_interleave, 2, dim),
            (torch.Tensor.repeat, *(2 if d == dim else 1 for d in range(rank))),
            (torch.narrow, dim, size // 2, size - size // 2),
            (operator.getitem, (slice(None),) * dim + (slice(size // 2, None),)),
            (torch.Tensor.contiguous,),
            (torch.clone,),
            (torch.Tensor.detach,),
        ]
        if rank < 5:
            calls += [
                (torch.unsqueeze, dim),
                (operator.getitem, (Ellipsis, None)),
                (torch.unflatten, dim, (1, size)),
                *([(torch.unflatten, dim, (2, size // 2))] if size % 2 == 0 else []),
            ]
        if rank > 3:
            calls += [
                (torch.select, dim, size - 1),
                (operator.getitem, (slice(None),) * dim + (0,)),
                *([(torch.squeeze, dim)] if size == 1 else []),
                *([(torch.flatten, dim, dim + 1)] if dim + 1 < rank else []),
            ]
        if size == 1:
            calls.append((torch.Tensor.expand, *(3 if d == dim else -1 for d in range(rank))))
        function, *args = draw(st.sampled_from(calls))
        node = graph.call_function(function, (nodes[-1], *args))
        node.meta["example_value"] = function(value, *args)
        nodes.append(node)
        if node.meta["example_value"].numel() > 5000:
            break
    return nodes


@settings(max_examples=300, deadline=None)
@given(chains())
def test_a_view_names_the_entries_that_the_calls_take(nodes):
    for view in views_behind(nodes[-1]):
        if None in view.starts:
            continue
        source, value = fake_value(view.source), fake_value(nodes[-1])
        flat = sum(
            start * stride for start, stride in zip(view.starts, source.stride(), strict=True)
        )
        at = torch.full((), flat)
        for steps in view.dims:
            for step in steps:
                stride = 0 if step.axis is None else step.step * source.stride(step.axis)
                at = at[..., None] + torch.arange(step.size) * stride
        entries = source.as_strided((source.untyped_storage().nbytes() // 4,), (1,), 0)
        offset = source.storage_offset()
        assert torch.equal(entries[at + offset].reshape(value.shape), value)


@settings(max_examples=300, deadline=None)
@given(chains(), st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)]))
def test_heads_repeated_are_the_keys_that_attention_reads(nodes, at):
    value = fake_value(nodes[-1])
    if value.ndim != 4:
        return
    heads, _ = heads_of(nodes[-1], at)
    base, order = fake_value(heads.base), list(heads.order)
    if order[1] < 0:
        base, order[1] = base.unsqueeze(-1), base.ndim
    rows = base.permute(order)
    repeat = rows.repeat(1, heads.group, 1, 1)
    blocks = rows.repeat_interleave(heads.group, 1)
    assert torch.equal(repeat if heads.interleaved else blocks, value.permute(at))


@settings(max_examples=300, deadline=None)
@given(chains())
def test_views_of_a_cache_keep_its_dimensions_and_take_rows_whole(nodes):
    for node in nodes[1:]:
        dims, source, value = view_dims(node), fake_value(node.args[0]), fake_value(node)
        if dims is None:
            continue
        assert through(node, next(views_behind(node.args[0]))) is not None
        for size, dim in zip(value.shape, dims, strict=True):
            assert size == 1 if dim is None else size <= source.shape[dim]
        last = source.ndim - 1
        assert last not in dims or value.shape[dims.index(last)] == source.shape[-1]
