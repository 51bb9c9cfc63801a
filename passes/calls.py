"""What a call is: its name, operands and fake value, what it writes, what shares its memory."""

from __future__ import annotations

import string
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

# One spelling per operation; `normalize` brings the others to it.
ALIASES = {
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "concat": "cat",
    "concatenate": "cat",
    "moveaxis": "movedim",
    "type_as": "to",
    "view": "reshape",
    "__getitem__": "getitem",
    "__setitem__": "setitem",
    "and_": "__and__",  # Python's functions, which end like PyTorch's in-place methods
    "or_": "__or__",
    "not_": "__not__",
}

_IN_PLACE_OPERATORS = frozenset(
    f"i{name}"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or",
                 "xor", "lshift", "rshift")
)  # fmt: skip

# Operands in order, for the operations whose operands the passes read.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": (
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ),
    "transpose": ("input", "dim0", "dim1"),
    "unsqueeze": ("input", "dim"),
    "squeeze": ("input", "dim"),
    "select": ("input", "dim", "index"),
    "narrow": ("input", "dim", "start", "length"),
    "getitem": ("input", "index"),
    "setitem": ("input", "index", "source"),
    "copy_": ("input", "source"),
    "index_copy_": ("input", "dim", "index", "source"),
    "index_copy": ("input", "dim", "index", "source"),
    "scatter_": ("input", "dim", "index", "src"),
    "scatter": ("input", "dim", "index", "src"),
    "index_put_": ("input", "indices", "values", "accumulate"),
    "index_put": ("input", "indices", "values", "accumulate"),
    "cat": ("tensors", "dim"),
    "repeat_interleave": ("input", "repeats", "dim"),
    "roll": ("input", "shifts", "dims"),
    "to": ("input", "dtype"),
    "reshape": ("input", "shape"),
    "flatten": ("input", "start_dim", "end_dim"),
    "softmax": ("input", "dim"),
    "matmul": ("input", "other"),
    "bmm": ("input", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "add": ("input", "other"),
    "sub": ("input", "other"),
    "mul": ("input", "other"),
    "div": ("input", "other"),
    "tanh": ("input",),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
}


def op_name(node: fx.Node) -> str:
    """The operation of a call node in its one spelling (`"transpose"`, `"cat"`, ...), else "".

    Only PyTorch's own: another library's op or function keeps its full name
    (`"mylib::index_copy_"`), since it may do anything under a name that PyTorch uses too.
    """
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return ""
    return ALIASES.get(name, name)


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).removeprefix("aten::")
    name = getattr(target, "__name__", "")
    return f"{target.__module__}.{name}" if _is_foreign(target) else name


def _is_foreign(target: Any) -> bool:
    """Whether a call's target is a Python function that is not PyTorch's."""
    package = str(getattr(target, "__module__", None)).partition(".")[0]
    return isinstance(target, types.FunctionType) and package not in ("torch", "_operator")


def operand(node: fx.Node, name: str, default: Any = None) -> Any:
    """The operand called `name` in `SIGNATURES`, given by position or by keyword."""
    position = SIGNATURES[op_name(node)].index(name)
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def einsum_terms(node: fx.Node) -> tuple[list[str], list[fx.Node]] | None:
    """The letters of an einsum's two factors and of its result, and the factors; None for another.

    Each letter stands once in a term, and none for a diagonal or a number. An ellipsis that begins
    all terms and stands for as many dimensions in both factors is spelled out.
    """
    operands: tuple[Any, ...] = node.args
    equation, *factors = operands or (None,)
    if len(factors) == 1 and isinstance(factors[0], (list, tuple)):
        factors = list(factors[0])
    if node.kwargs or len(factors) != 2 or not isinstance(equation, str):
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = [*inputs.split(","), out]
    if not arrow or len(terms) != 3:
        return None
    ranks = [len(shape_of(factor) or ()) for factor in factors]
    if all(term.startswith("...") for term in terms):
        terms = [term.removeprefix("...") for term in terms]
        more = [rank - len(term) for rank, term in zip(ranks, terms, strict=False)]
        free = [letter for letter in string.ascii_letters if letter not in equation]
        if more[0] != more[1] or not 0 <= more[0] <= len(free):
            return None
        terms = ["".join(free[: more[0]]) + term for term in terms]
    if not "".join(terms).isalpha() or any(len(set(term)) != len(term) for term in terms):
        return None
    return (terms, factors) if ranks == [len(term) for term in terms[:2]] else None


def fake_value(node: fx.Node) -> Any:
    """The fake tensor, symbolic integer or constant that Dynamo recorded for `node`."""
    return node.meta.get("example_value")


def is_transformed(node: fx.Node) -> bool:
    """Whether a tensor is one inside a transform of torch.func, as `vmap`.

    Private API, checked on torch 2.11 and 2.13: `is_functorch_wrapped_tensor`.
    """
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(
        value
    )


def shape_of(node: Any) -> torch.Size | None:
    """Shape of the node's fake tensor (entries may be symbolic), or None for anything else."""
    value = fake_value(node) if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


def concrete(size: Any) -> int | None:
    """The size as an int where it is constant, else None."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return None


def hint_of(size: Any) -> int | None:
    """The size in the call that was traced, where the size is a symbol; None if that is not known.

    Private API, checked on torch 2.11 and 2.13: `SymNode.hint`.
    """
    return size.node.hint if isinstance(size, torch.SymInt) else size


def symbol_given_by(number: torch.SymInt | torch.SymFloat) -> Any:
    """The expression that a number which comes in as an input gives a value, as Inductor reads it:
    its own symbol, and not the equal one that stands for both since.

    Private API, checked on torch 2.11 and 2.13: `SymNode._expr`.
    """
    return number.node._expr


def mutates(node: fx.Node) -> bool:
    """Whether the call writes into its first operand and returns it, as PyTorch's own calls do.

    That is what a trailing underscore, an in-place operator and `inplace=True` say.
    """
    name = op_name(node)
    if name == "setitem" or name in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return True
    return name.endswith("_") and not name.endswith("__")


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that a call may write into: all of them where its effects are not known."""
    if node.op not in ("call_function", "call_method"):
        return []
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        unknown = target._schema.is_mutable
    elif isinstance(target, torch._ops.OpOverloadPacket):
        unknown = any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    else:
        higher = isinstance(target, torch._ops.HigherOrderOperator)
        unknown = (higher and op_name(node) != "flex_attention") or _is_foreign(target)
    if unknown:
        return list(node.all_input_nodes)
    written: list[fx.Node] = []
    if mutates(node):
        first = node.args[0] if node.args else node.kwargs.get("input", list(node.all_input_nodes))
        map_arg(first, written.append)
    map_arg(node.kwargs.get("out"), written.append)
    return written


@dataclass(frozen=True)
class Write:
    """A call that may write into the memory of `operand`, at `position` in its graph."""

    position: int
    call: fx.Node
    operand: fx.Node


def writes_of(graph: fx.Graph) -> list[Write]:
    """Everything in the graph that may write into an operand, in order."""
    return [
        Write(position, node, operand)
        for position, node in enumerate(graph.nodes)
        for operand in written_operands(node)
    ]


def may_overlap(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors may share memory. Fake tensors share storage as the real ones do."""
    x, y = fake_value(a), fake_value(b)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if not share_memory(x, y):
        return False
    first, second = _extent(x), _extent(y)
    if first is None or second is None:
        return True
    return first[0] < second[1] and second[0] < first[1]


def share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors have one storage, wherever in it they lie."""
    return memory_of(x) == memory_of(y)


def memory_of(tensor: torch.Tensor) -> int:
    """What tells the storages of fake tensors apart.

    Private API, checked on torch 2.11 and 2.13: `StorageImpl._cdata`.
    """
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a wrapper without memory of its own
        return id(tensor)


def _extent(tensor: torch.Tensor) -> tuple[int, int] | None:
    """First and last element (exclusive) within the storage, None where they are symbolic."""
    numbers = [concrete(n) for n in (tensor.storage_offset(), *tensor.shape, *tensor.stride())]
    known = [n for n in numbers if n is not None]
    if len(known) < len(numbers):
        return None
    start, shape, stride = known[0], known[1 : tensor.ndim + 1], known[tensor.ndim + 1 :]
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return start, start + last + 1 if all(shape) else start


def module_path(node: fx.Node) -> str:
    """Where in the model the node was traced (`model.layers.0.self_attn`), or "" in a fragment."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return path.removeprefix("L['self']").removeprefix(".").replace("['", ".").replace("']", "")


def source_name(placeholder: fx.Node) -> str:
    """How the caller reaches the value (`L['past_key_values'].layers[0].keys`), or ""."""
    grapharg = placeholder.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name
