"""Products of a matrix with few rows, as decoding has them, which `kernels.row_products` serves."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.kernels.row_products import (
    is_few,
    is_few_of_any,
    row_products,
    row_products_of_any,
)
from loki_compile.passes.calls import concrete, fake_value, is_transformed, op_name
from loki_compile.passes.graphs import call, finish
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# In `gm.meta`: the sizes, as expressions, that are no more than eight in what calls the graph.
FEW = "loki_few"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RowProduct:
    """`node`: `rows` (..., K) times `weight`, (N, K), or (K, N) where `transposed`, plus `bias`."""

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None = None


def find_row_products(graph: fx.Graph, few: Collection[Any] = ()) -> list[RowProduct]:
    """Products on a CPU of few rows (`is_few`) with a matrix whose every output's numbers are
    one run of memory, in one dtype (under autocast others may come in), no gradients recorded.
    `few`: as `FEW`; rows of another symbolic number are not few."""
    found = (_product(node) for node in graph.nodes if node.op == "call_function")
    return [product for product in found if product is not None and _served(product, few)]


def _product(node: fx.Node) -> RowProduct | None:
    name = op_name(node)
    operands: tuple[Any, ...] = (*node.args, *node.kwargs.values())
    if name == "linear" and len(node.args) >= 2 and set(node.kwargs) <= {"bias"}:
        rows, weight, bias = (*operands, None)[:3]
    elif name in ("matmul", "mm") and len(node.args) == 2 and not node.kwargs:
        (rows, weight), bias = operands, None
    else:
        return None
    if not isinstance(rows, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return RowProduct(node, rows, weight, name != "linear", bias)


def _served(product: RowProduct, few: Collection[Any]) -> bool:
    nodes = (product.rows, product.weight, *([product.bias] if product.bias is not None else []))
    values = [fake_value(node) for node in (product.node, *nodes)]
    if not all(isinstance(x, Tensor) and not is_traceable_wrapper_subclass(x) for x in values):
        return False
    if is_transformed(product.node):
        return False
    if any(x.device.type != "cpu" or x.dtype != values[0].dtype for x in values):
        return False
    if values[0].dtype not in _DTYPES or values[0].requires_grad:
        return False
    rows, weight = values[1:3]
    sizes = [concrete(size) for size in (rows.shape[-1], *weight.shape)]
    if None in sizes or weight.dim() != 2 or min(weight.shape) < 2:
        return False
    run = concrete(weight.stride(0 if product.transposed else 1))
    return run == 1 and _are_few(rows, few)


def _are_few(rows: Tensor, few: Collection[Any]) -> bool:
    dims, sizes = rows.shape[-1], list[Any](rows.shape[:-1])
    symbolic = [size for size in sizes if concrete(size) is None]
    known = math.prod(size for each in sizes if (size := concrete(each)) is not None)
    if not symbolic:
        return is_few(known, dims, rows.dtype)
    return (
        len(symbolic) == known == 1
        and symbolic[0].node.expr in few
        and is_few_of_any(dims, rows.dtype)
    )


def sum_rows(gm: fx.GraphModule, products: Sequence[RowProduct]) -> fx.GraphModule:
    """Swaps them for `row_products`, or `row_products_of_any`. Products come in the order of the
    graph."""
    graph = gm.graph
    new_of: dict[fx.Node | None, fx.Node] = {}  # of products, which others may be of
    for product in products:
        node = product.node
        operands = (product.rows, product.weight, product.bias)
        rows, weight, bias = (new_of.get(operand, operand) for operand in operands)
        with graph.inserting_before(node):
            if product.transposed:
                weight = call(graph, torch.t, weight, like=node)
            sizes = map(concrete, fake_value(product.rows).shape)
            sums = row_products_of_any if None in sizes else row_products
            new_of[node] = call(graph, sums, rows, weight, bias, like=node)
        node.replace_all_uses_with(new_of[node])
        graph.erase_node(node)
    return finish(gm) if products else gm
