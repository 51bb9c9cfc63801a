"""Normalisation: one spelling per operation, the same results, the caller's graph unchanged."""

import pytest
import torch
from loki_compile.passes.calls import (
    may_overlap,
    mutates,
    op_name,
    operand,
    writes_of,
    written_operands,
)
from loki_compile.passes.normalize import normalize
from toy_capture import capture

pytestmark = pytest.mark.covers

X = torch.arange(24.0).view(2, 3, 4)

SAME = {
    "transpose": [
        lambda x: x.transpose(1, 2),
        lambda x: torch.transpose(x, 1, 2),
        lambda x: x.swapaxes(1, 2),
        lambda x: torch.swapdims(x, 1, 2),
        lambda x: torch.swapaxes(x, axis0=1, axis1=2),
        lambda x: torch.transpose(input=x, dim0=1, dim1=2),
        lambda x: x.transpose(dim1=2, dim0=1),
    ],
    "permute": [
        lambda x: x.permute(0, 2, 1),
        lambda x: x.permute((0, 2, 1)),
        lambda x: x.permute(dims=(0, 2, 1)),
        lambda x: torch.permute(x, (0, 2, 1)),
    ],
    "movedim": [
        lambda x: x.movedim(1, 2),
        lambda x: torch.moveaxis(x, 1, 2),
        lambda x: x.moveaxis(source=1, destination=2),
    ],
    "cat": [
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.concat([x, x], dim=1),
        lambda x: torch.concatenate((x, x), axis=1),
        lambda x: torch.cat(tensors=[x, x], dim=1),
    ],
    "matmul": [
        lambda x: x @ x.mT,
        lambda x: torch.matmul(x, x.mT),
        lambda x: x.matmul(x.mT),
    ],
    "unsqueeze": [
        lambda x: x.unsqueeze(1),
        lambda x: torch.unsqueeze(x, dim=1),
        lambda x: torch.unsqueeze(x, axis=1),
    ],
    "softmax": [
        lambda x: x.softmax(-1),
        lambda x: torch.softmax(x, dim=-1),
        lambda x: torch.nn.functional.softmax(x, dim=-1),
    ],
}
CASES = [(name, i) for name, functions in SAME.items() for i in range(len(functions))]


@pytest.mark.parametrize("name, i", CASES)
def test_every_spelling_gets_one_name_and_keeps_its_result(name, i):
    function = SAME[name][i]
    gm = capture(function, X)
    normal, mapping = normalize(gm)
    assert name in [op_name(node) for node in normal.graph.nodes]
    assert torch.equal(normal(X)[0], function(X))
    assert set(mapping) == set(gm.graph.nodes)


@pytest.mark.parametrize("name", ["transpose", "permute", "unsqueeze", "cat"])
def test_operands_are_found_whatever_way_they_were_passed(name):
    wanted = {"transpose": ("dim0", 1), "unsqueeze": ("dim", 1), "cat": ("dim", 1)}
    for function in SAME[name]:
        normal, _ = normalize(capture(function, X))
        node = next(n for n in normal.graph.nodes if op_name(n) == name)
        assert node.args and (name == "cat" or isinstance(node.args[0], torch.fx.Node))
        if name in wanted:
            assert operand(node, wanted[name][0]) == wanted[name][1]


def test_the_graph_of_the_caller_is_not_changed():
    gm = capture(lambda x: x.swapaxes(0, 1).permute(2, 0, 1) @ x[:, 0], X)
    before = [(n.op, str(n.target), str(n.args)) for n in gm.graph.nodes]
    normalize(gm)
    assert before == [(n.op, str(n.target), str(n.args)) for n in gm.graph.nodes]


def test_a_slice_that_leaves_nothing_out_is_the_tensor():
    def function(x):
        return x[:, :, 0:][...][::1] * 2, x[:, 1:] * 2, x[:, :2] * 2, x[::2] * 2, x[None] * 2

    gm = capture(function, X)
    normal, mapping = normalize(gm)
    assert [op_name(node) for node in normal.graph.nodes].count("getitem") == 4
    assert all(map(torch.equal, normal(X), function(X)))
    assert set(mapping.values()) <= set(normal.graph.nodes)
    product = next(node for node in normal.graph.nodes if op_name(node) == "mul")
    assert product.args[0].op == "placeholder"


def names_of(function, *args):
    """The names of what is left of a function, which still does the same."""
    gm = capture(function, *(x.clone() for x in args))
    normal, mapping = normalize(gm)
    got, expected = normal(*(x.clone() for x in args)), function(*(x.clone() for x in args))
    assert all(map(torch.equal, got, expected))
    assert set(mapping) == set(gm.graph.nodes) and set(mapping.values()) <= set(normal.graph.nodes)
    return [op_name(node) for node in normal.graph.nodes]


def test_of_equal_views_one_is_left():
    def function(x):
        end = x.shape[1] - 1
        a = x[:, :end].mT * 2 + x[:, :end].mT
        x[:, 0] = 7.0  # views see what is written behind them
        return a, x[:, :end].mT * 3, x[:, 1:].mT * 3, x[:, 0] * 1, x.select(1, 0) * 1

    names = names_of(function, X)
    assert names.count("getitem") == 3 and names.count("transpose") == 2


def test_a_view_that_nothing_reads_may_come_first():
    gm = capture(lambda x: (x[:, 1:] * 2, x[:, 1:] * 3), X)
    first, second = (node for node in gm.graph.nodes if op_name(node) == "getitem")
    second.replace_all_uses_with(first)
    for user in list(first.users):
        user.replace_input_with(first, second)
    first.append(second)  # the first has no users any more
    normal, mapping = normalize(gm)
    assert all(map(torch.equal, normal(X), (X[:, 1:] * 2, X[:, 1:] * 3)))
    assert set(mapping.values()) <= set(normal.graph.nodes)


def test_equal_calls_that_copy_or_are_returned_stay():
    at = torch.tensor([0, 2])

    def function(x, at):
        return x[:, at] * 2, x[:, at] * 3, x[:, 1:], x[:, 1:], x.reshape(-1) * 2

    assert names_of(function, X, at).count("getitem") >= 3
    first, second = normalize(capture(lambda x: (x[:, 1:], x[:, 1:]), X))[0](X)
    assert first is not second


def test_numbers_of_other_types_are_not_equal():
    def function(x):
        return x[0] * 2, x[False] * 2, x[:, 1] * 2, x[:, True] * 2

    assert names_of(function, X).count("getitem") == 4


def test_new_dimensions_follow_slices():
    def function(x):
        return (
            x[:, 1:, None] * 2, x[None, 0] * 2, x[..., None, 1:] * 2, x[0, None, :, None, 1] * 2,
            x[:, None] * 2,
        )  # fmt: skip

    gm, _ = normalize(capture(function, X))
    indices = [node.args[1] for node in gm.graph.nodes if op_name(node) == "getitem"]
    for index in indices:
        items = index if isinstance(index, tuple) else (index,)
        whole = all(i is None or i is Ellipsis or i == slice(None) for i in items)
        assert whole or not any(i is None for i in items)
    assert len(indices) == 9 and len(names_of(function, X)) == len(gm.graph.nodes)


def test_new_dimensions_beside_tensors_stay():
    at = torch.tensor([0, 2])
    assert names_of(lambda x, at: (x[:, at, None] * 2,), X, at).count("getitem") == 1


def test_a_whole_slice_that_is_returned_stays_a_view():
    normal, _ = normalize(capture(lambda x: (x[:], x * 2), X))
    view, _ = normal(X)
    assert view is not X and view.data_ptr() == X.data_ptr()


def test_a_write_through_a_whole_slice_is_a_write():
    normal, _ = normalize(capture(lambda x: x[:, 0:].add_(1), X.clone()))
    (write,) = writes_of(normal.graph)
    assert write.operand.op == "placeholder"
    x = X.clone()
    normal(x)
    assert torch.equal(x, X + 1)


@torch.library.custom_op("toy::transpose", mutates_args=())
def negate(x: torch.Tensor) -> torch.Tensor:
    return -x


@negate.register_fake
def _(x):
    return torch.empty_like(x)


def test_another_librarys_op_is_not_taken_for_pytorchs():
    gm = capture(lambda x: torch.ops.toy.transpose(x), X)
    normal, _ = normalize(gm)
    (node,) = (n for n in normal.graph.nodes if n.op == "call_function")
    assert op_name(node) == "toy::transpose"
    assert torch.equal(normal(X)[0], -X)


def effects(function, *args):
    """Which operands of which calls are written into, by name."""
    graph = capture(function, *args).graph
    return [(op_name(w.call), w.operand.name) for w in writes_of(graph)]


def test_effects_are_seen_in_every_spelling():
    def function(x, y):
        x.add_(1)
        x += 1
        x[0] = 2
        torch.nn.functional.relu(x, inplace=True)
        torch.add(y, 1, out=x)
        torch._foreach_mul_([x, y], 2)
        return x.relu(), x + y, y.transpose(0, 1).contiguous()

    names = [name for name, _ in effects(function, X.clone(), X.clone())]
    assert names == ["add_", "iadd", "setitem", "relu", "add", "_foreach_mul_", "_foreach_mul_"]


def test_views_share_memory_and_copies_do_not():
    def function(x):
        view = x.view(6, 4)[1:].t()
        return view, view.contiguous(), x[:1], x[1:], x.clone()

    graph = capture(function, X).graph
    x = next(iter(graph.nodes))
    view, copy, first, last, clone = graph.output_node().args[0]
    assert may_overlap(x, view) and may_overlap(view, last)
    assert not may_overlap(x, copy) and not may_overlap(x, clone)
    assert not may_overlap(first, last)


def test_reading_methods_write_nothing():
    graph = capture(lambda x: x.abs().__neg__().sum().float() ** 2, X).graph
    assert not any(written_operands(node) or mutates(node) for node in graph.nodes)


@pytest.mark.parametrize(
    "equation, sizes",
    [
        ("ij,jk->ik", [(3, 4), (4, 5)]),
        ("bij,bkj->bik", [(2, 3, 4), (2, 5, 4)]),
        ("kj, ij -> ik", [(5, 4), (3, 4)]),  # the columns' factor first
        ("b h q d, b k h d -> b h q k", [(2, 3, 1, 4), (2, 5, 3, 4)]),
        ("bij,bjk->kbi", [(2, 3, 4), (2, 4, 5)]),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_an_einsum_of_rows_and_columns_is_a_matmul(equation, sizes, listed):
    factors = [torch.randn(size, dtype=torch.float64) for size in sizes]

    def function(*factors):
        return torch.einsum(equation, list(factors)) if listed else torch.einsum(equation, *factors)

    normal, mapping = normalize(capture(function, *factors))
    names = [op_name(node) for node in normal.graph.nodes]
    assert names.count("matmul") == 1 and "einsum" not in names
    torch.testing.assert_close(normal(*factors)[0], function(*factors))
    old = next(node for node in mapping if op_name(node) == "einsum")
    assert mapping[old] is normal.graph.output_node().args[0][0]


@pytest.mark.parametrize(
    "equation, sizes",
    [
        ("ij,jk,kl->il", [(3, 4), (4, 5), (5, 6)]),  # three factors
        ("ij->ji", [(3, 4)]),  # one
        ("ij,jk", [(3, 4), (4, 5)]),  # no arrow
        ("i,j->ij", [(3,), (4,)]),  # nothing is summed
        ("bij,bj->bi", [(2, 3, 4), (2, 4)]),  # no columns
        ("bj,bkj->bk", [(2, 4), (2, 5, 4)]),  # no rows
        ("ijm,jk->ik", [(3, 4, 2), (4, 5)]),  # m is summed in one factor alone
        ("ijl,jlk->ik", [(3, 4, 2), (4, 2, 5)]),  # two sums
        ("ij,jkl->ikl", [(3, 4), (4, 5, 2)]),  # two columns
        ("ilj,jk->ilk", [(3, 2, 4), (4, 5)]),  # two rows
        ("iij,jk->ik", [(3, 3, 4), (4, 5)]),  # a diagonal
        ("bij,bjk->ik", [(2, 3, 4), (2, 4, 5)]),  # the batch is summed
        ("bij,bjk->bik", [(1, 3, 4), (2, 4, 5)]),  # the batch is broadcast
        ("ij,jk->ik", [(3, 1), (4, 5)]),  # the sum is broadcast
    ],
)
def test_another_einsum_stays_as_it_is(equation, sizes):
    factors = [torch.randn(size, dtype=torch.float64) for size in sizes]

    def function(*factors):
        return torch.einsum(equation, *factors)

    normal, _ = normalize(capture(function, *factors))
    names = [op_name(node) for node in normal.graph.nodes]
    assert names.count("einsum") == 1 and "matmul" not in names
    assert torch.equal(normal(*factors)[0], function(*factors))
