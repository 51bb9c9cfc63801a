"""Products of few rows: `row_products` is their value, and only they are swapped for it."""

import re

import pytest
import torch
import torch.nn.functional as F
from loki_compile.kernels.row_products import (
    MAX_CHANGING_DIMS,
    MAX_FLOAT32_DIMS,
    MAX_NUMBERS,
    MAX_ROWS,
    is_few,
    row_products,
    row_products_of_any,
)
from loki_compile.passes.row_products import find_row_products, sum_rows
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

from loki_compile import engines
from loki_compile.backend import loki

EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def traced(function, *args):
    """The graph that Dynamo hands over for a call."""
    torch._dynamo.reset()
    seen = EagerAndRecordGraphs()
    torch.compile(function, backend=seen)(*args)
    (gm,) = seen.graphs
    return gm


def products_in(function, *args):
    with torch.no_grad():
        return find_row_products(traced(function, *args).graph)


def weight(n=33, k=48, dtype=torch.float32):
    return torch.randn(n, k, dtype=torch.float64).div(k**0.5).to(dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("rows", [1, MAX_ROWS])
@pytest.mark.parametrize("dtype", list(EPS))
def test_it_is_the_product_rounded_once(rows, dtype, compiled):
    torch._dynamo.reset()
    run = torch.compile(row_products, dynamic=False) if compiled else row_products
    for n, k, bias in ((130, 65, True),) if compiled else ((33, 48, True), (2, 7, False)):
        w, b = weight(n, k, dtype), torch.randn(n).to(dtype) if bias else None
        # Rows that lie apart, behind other numbers: where a tensor begins must not be forgotten.
        x = torch.randn(rows + 1, 1, k + 3).to(dtype)[1:, :, 2:-1]
        # And column by column, as a convolution leaves them.
        by_column = x.transpose(0, 2).contiguous().transpose(0, 2)
        for rows_ in (x, by_column):
            found = run(rows_, w, b)
            truth = F.linear(rows_.double(), w.double(), None if b is None else b.double())
            assert found.shape == truth.shape and found.dtype == dtype
            assert (found.double() - truth).abs().max() <= 2 * EPS[dtype] * truth.abs().max()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(x, w, bias=w[:, 0]),
        lambda x, w: x @ w.t(),
        lambda x, w: torch.matmul(x, w.transpose(0, 1)),
        lambda x, w: torch.mm(x[0], w.t()),
    ],
)
def test_spellings_of_one_product_are_found(function):
    x, w = torch.randn(1, 1, 48), weight()
    with torch.no_grad():
        gm = traced(function, x, w)
        (product,) = find_row_products(gm.graph)
        truth = function(x.double(), w.double())
        gm = sum_rows(gm, [product])
        assert not find_row_products(gm.graph)
        by_name = {"l_x_": x, "l_w_": w}
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        (found,) = gm(*(by_name[name] for name in names))
    assert (found.double() - truth).abs().max() < 1e-5


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.linear(F.linear(x, w), w.t().contiguous()),  # low rank: LoRA, latents
        lambda x, w: F.linear(x, F.linear(w[:3], w[:1].expand(48, 48))),
        lambda x, w: F.linear(x, w, F.linear(x, w)[0, 0]),
    ],
    ids=["rows", "weight", "bias"],
)
def test_products_of_products_are_swapped_together(function):
    x, w = torch.randn(1, 1, 48), weight()
    with torch.no_grad():
        gm = traced(function, x, w)
        products = find_row_products(gm.graph)
        gm = sum_rows(gm, products)
        by_name = {"l_x_": x, "l_w_": w}
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        (found,) = gm(*(by_name[name] for name in names))
        truth = function(x.double(), w.double())
    assert len(products) == 2 and not find_row_products(gm.graph)
    assert (found.double() - truth).abs().max() < 1e-5


def test_rows_too_long_for_the_nearest_cache_are_left():
    """There a library's product takes 0.4 to 0.9 of the time."""
    bfloat16 = torch.bfloat16
    assert is_few(1, MAX_NUMBERS, bfloat16) and not is_few(1, MAX_NUMBERS + 1, bfloat16)
    assert is_few(1, MAX_FLOAT32_DIMS, torch.float32)
    assert not is_few(1, MAX_FLOAT32_DIMS + 1, torch.float32)
    assert is_few(MAX_ROWS, MAX_NUMBERS // MAX_ROWS, bfloat16)
    assert not is_few(MAX_ROWS, MAX_NUMBERS // MAX_ROWS + 1, bfloat16)
    long = MAX_NUMBERS + 1
    assert not products_in(F.linear, torch.randn(1, long), weight(3, long))


def test_what_libraries_serve_better_or_a_sum_would_not_be_is_left():
    one, w = torch.randn(1, 1, 48), weight()
    assert products_in(F.linear, one, w)
    assert not products_in(F.linear, torch.randn(1, MAX_ROWS + 1, 48), w)
    assert not products_in(lambda x, w: x @ w, one, weight(48, 33)), "its sums lie across rows"
    assert not products_in(F.linear, one, weight(33, 96)[:, ::2])
    assert not products_in(torch.matmul, torch.randn(1, 4, 1, 48), torch.randn(1, 4, 48, 9))
    assert not products_in(F.linear, one.double(), w.double())
    assert not products_in(lambda x, w: torch.nn.functional.linear(x, w.view(-1)), one, weight(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products_in(F.linear, one, w), "autocast rounds what comes in"


def of_any_number(dtype=torch.float32, batch=1, dims=48):
    """The graph of a product whose number of rows each call brings, and that number."""
    torch._dynamo.reset()
    seen = EagerAndRecordGraphs()
    x = torch.randn(batch, 3, dims).to(dtype)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        torch.compile(F.linear, backend=seen)(x, weight(k=dims, dtype=dtype))
    graph = seen.graphs[-1].graph
    (node,) = [n for n in graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
    return graph, node.meta["example_value"].shape[1].node.expr


def test_rows_of_any_number_are_swapped_where_that_is_known_to_be_few():
    graph, rows = of_any_number()
    assert not find_row_products(graph)
    assert not find_row_products(graph, {rows + 1})
    assert find_row_products(graph, {rows})


def test_rows_of_any_number_that_libraries_serve_better_are_left():
    for changed in (
        {"dtype": torch.bfloat16},
        {"batch": 2},
        {"dims": MAX_CHANGING_DIMS + 1},
    ):
        graph, rows = of_any_number(**changed)
        assert not find_row_products(graph, {rows}), changed


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_of_rows_that_each_call_brings_is_compiled_once_for_all(with_bias):
    torch._dynamo.reset()
    counters.clear()
    w, bias = weight(130, 65), torch.randn(130) if with_bias else None
    run = torch.compile(row_products_of_any)
    for count in range(2, 9):
        x = torch.randn(count + 1, 1, 70)[1:, :, 2:-3]
        torch._dynamo.mark_dynamic(x, 0)
        truth = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        for found in (run(x, w, bias), row_products_of_any(x, w, bias)):
            assert found.shape == truth.shape and found.is_contiguous()
            assert (found.double() - truth).abs().max() <= 2 * EPS[x.dtype] * truth.abs().max()
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_the_graph_that_is_swapped_computes_the_same():
    graph, rows = of_any_number()
    gm, w = sum_rows(GraphModule({}, graph), find_row_products(graph, {rows})), weight()
    for count in (2, 5):
        x = torch.randn(1, count, 48)
        by_name = {"l_args_0_": x, "l_args_1_": w}
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        (found,) = gm(*(by_name.get(name, count) for name in names))
        assert (found.double() - F.linear(x.double(), w.double())).abs().max() < 1e-5


def test_gradients_pass_through_as_before():
    torch._dynamo.reset()
    model = torch.nn.Linear(48, 33)
    call = torch.compile(model, backend="loki")
    x = torch.randn(1, 48)
    call(x).sum().backward()
    assert torch.allclose(model.weight.grad, x.expand(33, 48))


def test_what_makes_the_rows_is_computed_once():
    """Else each row of the matrix computes it again: twice the time."""
    torch._dynamo.reset()
    metrics.reset()
    with torch.no_grad():
        torch.compile(lambda x, w: row_products(x.sigmoid(), w))(torch.randn(1, 48), weight())
    assert metrics.generated_kernel_count == 2


def swapped(options, *, attends=True, dtype=torch.bfloat16):
    """Whether no library's product is left in a compiled call, and whether it is Inductor's."""
    torch._dynamo.reset()
    w, keys = weight(dtype=dtype), torch.randn(1, 1, 5, 33).to(dtype)
    x = torch.randn(1, 1, 48).to(dtype)

    def call(x):
        y = F.linear(x.sigmoid(), w)
        return F.scaled_dot_product_attention(y[None], keys, keys) if attends else y

    with torch.no_grad():
        found, code = run_and_get_code(torch.compile(call, backend="loki", options=options), x)
        torch._dynamo.reset()
        plain = torch.compile(call)(x)
    assert (found - plain).abs().max() < 0.05
    libraries = re.search(r"extern_kernels\.\w*mm\(|mkldnn", "".join(code))
    return libraries is None, torch.equal(found, plain)


def test_graphs_that_attend_have_it_unless_they_are_to_be_inductors():
    assert swapped({})[0]
    assert swapped({"pack_gqa": False}) == (False, True)
    assert swapped({}, attends=False) == (False, True)
    assert not swapped({"inductor": {"freezing": True}})[0]


def test_engines_that_fuse_nothing_get_the_product_as_it_is():
    assert engines.with_row_products(engines.interpreter) is engines.interpreter
    torch._dynamo.reset()
    graphs = []

    def engine(gm, inputs, **_):
        graphs.append(gm)
        return gm.forward

    def call(x, w):
        y = F.linear(x, w)[None]
        return F.scaled_dot_product_attention(y, y, y)

    with torch.no_grad():
        torch.compile(call, backend=lambda gm, x: loki(gm, x, engine=engine))(
            torch.randn(1, 1, 48), weight()
        )
    assert find_row_products(graphs[0].graph)
