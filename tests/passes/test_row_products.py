"""Products of few rows: `row_products` is their value, and only they are swapped for it."""

import re

import pytest
import torch
import torch.nn.functional as F
from loki_compile.kernels.row_products import MAX_ROWS, row_products
from loki_compile.passes.row_products import find_row_products, sum_rows
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

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
        found = run(x, w, b)
        truth = F.linear(x.double(), w.double(), None if b is None else b.double())
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


def test_rows_whose_number_changes_are_left():
    torch._dynamo.reset()
    seen = EagerAndRecordGraphs()
    call = torch.compile(F.linear, backend=seen, dynamic=True)
    with torch.no_grad():
        call(torch.randn(3, 48), weight())
    assert not find_row_products(seen.graphs[-1].graph)


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
