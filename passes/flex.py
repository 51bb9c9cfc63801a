"""FlexAttention's call, seen as the attention core that it is.

`flex_attention` computes softmax(score_mod(scale * q k^T)) v over the keys that mask_mod shows.
Both are graphs of their own, of one number, given those of batch, head, query and key.
A score_mod that changes nothing, multiplies, or caps (c * tanh(x / c)) is the core's scale and
softcap. A mask_mod is asked about all keys at once, with numbers that broadcast; that is the same
wherever each of its steps treats every number by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from loki_compile.passes.attention import Core, MaskRule, MaskTerm, Reason, Skipped
from loki_compile.passes.calls import fake_value, module_path, op_name, written_operands
from torch import fx

# Steps that treat every number by itself.
_EACH_BY_ITSELF = frozenset(
    ("add", "sub", "mul", "div", "truediv", "floordiv", "floor_divide", "mod", "remainder", "fmod",
     "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "xor", "invert", "__and__",
     "__or__", "__xor__", "__invert__", "logical_and", "logical_or", "logical_xor", "logical_not",
     "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "where", "minimum", "maximum",
     "clamp", "to", "bool", "int", "long", "float", "rshift", "lshift")
)  # fmt: skip

# The block size of the mask that stands for none: one block, which holds every key.
_ONE_BLOCK = 1 << 30


def core_at(node: fx.Node) -> Core | Skipped | None:
    """The core that a call of `flex_attention` is; None where nobody reads its result."""
    if not node.users:
        return None
    operands: tuple[Any, ...] = node.args
    query, key, value, score_mod, block_mask, scale, _, score_operands, mask_operands = operands[:9]
    results = [user for user in node.users if op_name(user) == "getitem" and user.args[1] == 0]

    def skip(reason: Reason, *details: Any) -> Skipped:
        core = results[0] if results else node
        return Skipped(core, reason, details, module_path(node))

    if len(results) != 1 or len(node.users) > 1:
        return skip(Reason.WEIGHTS_USED, "flex_attention's other results")
    if not isinstance(scale, (int, float)):
        return skip(Reason.SCALE, getattr(scale, "name", scale))
    found = None if score_operands else _factor_and_cap(_graph_of(score_mod))
    if found is None:
        return skip(Reason.FLEX, "score_mod", _steps(_graph_of(score_mod)))
    factor, softcap = found
    masks: tuple[MaskTerm, ...] = ()
    *_, block, mask_mod = block_mask
    rule = _rule(mask_mod, mask_operands)
    if rule is None:
        return skip(Reason.FLEX, "mask_mod", _steps(_graph_of(mask_mod)))
    if _reads_nothing(_graph_of(mask_mod)):
        # Then only the blocks could hide a key, and eagerly PyTorch does not look at them.
        if block != _ONE_BLOCK:
            return skip(Reason.FLEX, "block mask without a mask_mod", "blocks alone")
    else:
        masks = (MaskTerm(node, rule=rule),)
    read = [x for x in (query, key, value, *mask_operands) if isinstance(x, fx.Node)]
    return Core(
        node=results[0],
        query=query,
        key=key,
        value=value,
        masks=masks,
        scale=float(scale) * factor,
        softcap=softcap,
        reads=tuple((operand, node) for operand in read),
        grouped=True,
    )


def _graph_of(named: fx.Node) -> fx.Graph:
    """The graph that a `get_attr` node names."""
    module = named.graph.owning_module
    assert module is not None
    body = module.get_submodule(str(named.target))
    assert isinstance(body, fx.GraphModule)
    return body.graph


def _result(graph: fx.Graph) -> Any:
    return graph.output_node().args[0]


def _factor_and_cap(graph: fx.Graph) -> tuple[float, float] | None:
    """(f, c) where the graph makes c * tanh(f * x / c), or f * x and c is 0, of its first input."""
    score = graph.find_nodes(op="placeholder")[0]
    node, factor, cap = _result(graph), 1.0, 0.0
    while node is not score:
        if not isinstance(node, fx.Node):
            return None
        name = op_name(node)
        operands: tuple[Any, ...] = node.args
        if name == "tanh" and not cap:
            cap, node = factor, operands[0]
            continue
        if node.kwargs or len(operands) != 2 or name not in ("mul", "div", "truediv"):
            return None
        if name == "mul" and isinstance(operands[0], (int, float)):
            operands = operands[::-1]
        inner, number = operands
        if not isinstance(number, (int, float)) or number <= 0:
            return None
        factor = factor * number if name == "mul" else factor / number
        node = inner
    return factor, cap


def _rule(mask_mod: fx.Node, operands: tuple[Any, ...]) -> MaskRule | None:
    """What the graph says of each key, if it may be asked about all of them at once."""
    graph = _graph_of(mask_mod)
    inputs = graph.find_nodes(op="placeholder")
    varying = set(inputs[:4])  # batch, head, query and key number
    by_head = {inputs[1]}
    for node in graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if written_operands(node):
            return None
        sources = varying.intersection(node.all_input_nodes)
        if not sources or op_name(node) == "new_ones":
            if sources and not _is_one_number(node):
                return None
            continue  # the same for every key
        looked_up = op_name(node) in ("getitem", "index") and _looks_up(node, varying)
        if not looked_up and op_name(node) not in _EACH_BY_ITSELF:
            return None
        if not _is_one_number(node):
            return None
        varying.add(node)
        if by_head.intersection(sources):
            by_head.add(node)
    result = _result(graph)
    if not isinstance(result, fx.Node) or not _is_one_number(result):
        return None
    if fake_value(result).dtype != torch.bool:
        return None
    return MaskRule(str(mask_mod.target), tuple(operands), per_head=result in by_head)


def _is_one_number(node: fx.Node) -> bool:
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and value.ndim == 0


def _looks_up(node: fx.Node, varying: set[fx.Node]) -> bool:
    """Whether the call reads one entry of a tensor that is the same for every key."""
    table, place = node.args[:2]
    if not isinstance(table, fx.Node) or table in varying:
        return False
    places: tuple[Any, ...] = tuple(place) if isinstance(place, (list, tuple)) else (place,)
    value = fake_value(table)
    if not isinstance(value, torch.Tensor) or value.ndim != len(places):
        return False
    return all(isinstance(p, int) or (isinstance(p, fx.Node) and _is_one_number(p)) for p in places)


def _reads_nothing(graph: fx.Graph) -> bool:
    """Whether the graph shows every key: a one, made of nothing."""
    result = _result(graph)
    return isinstance(result, fx.Node) and op_name(result) == "new_ones"


def _steps(graph: fx.Graph) -> str:
    names = [op_name(node) for node in graph.nodes]
    return ", ".join(dict.fromkeys(name for name in names if name)) or "captured tensors"
