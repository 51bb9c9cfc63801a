"""Graphs as a whole: copies, new nodes, extraction, which input a size or a weight comes by."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from loki_compile.passes.calls import (
    fake_value,
    may_overlap,
    memory_of,
    mutates,
    op_name,
    same_size,
    shape_of,
    writes_of,
    written_operands,
)
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves


def copy_of(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy whose graph may be edited, and the map from the old nodes to the new.

    Dynamo reads `meta["grapharg"]` of its own placeholders after the backend returns, so a
    backend edits copies only.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    assert isinstance(output, tuple)
    result, old_output = output
    mapping[old_output] = graph.output(result)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    copy = fx.GraphModule(gm, graph)
    # Without these AOTAutograd does not take the graph for Dynamo's: it would neither drop guards
    # on repeated parameters nor tell CUDA graphs which inputs keep their address.
    copy.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy, mapping


def ops_of(graph: fx.Graph) -> Counter[str]:
    """How often each operation is called."""
    return Counter(op_name(node) or node.op for node in graph.nodes if node.op[:4] == "call")


def log_change(log: logging.Logger, what: str, before: Counter[str], graph: fx.Graph) -> None:
    """At level DEBUG: how many calls a graph has behind a pass, and which became more or fewer."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    after = ops_of(graph)
    changed = [
        f"{name} {before[name]} -> {after[name]}"
        for name in sorted(before.keys() | after.keys())
        if before[name] != after[name]
    ]
    sums = f"{sum(before.values())} -> {sum(after.values())} calls"
    log.debug("%s: %s; %s", what, sums, ", ".join(changed) or "the same ones")


def remap(value: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    """The same dataclass, container or node, with every node replaced by its image."""
    if isinstance(value, fx.Node):
        return mapping[value]
    if isinstance(value, (list, tuple)):
        return type(value)(remap(item, mapping) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: remap(getattr(value, f.name), mapping) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Drops what nothing comes from, checks the graph and regenerates its code.

    fx by itself would drop `index_copy_`, `x += 1` or `out=` where nobody reads their result.
    """
    live = _live(gm.graph)
    gm.graph.eliminate_dead_code(live.__contains__)
    gm.graph.lint()
    gm.recompile()
    return gm


def _live(graph: fx.Graph) -> set[fx.Node]:
    """What the outputs come from, and what has an effect that outlives the graph or is not known.

    A write into memory that the graph allocates has none, but is live if anything that is live
    reads that memory. So is a node without fake tensors.
    """
    given = {memory for node in graph.nodes if node.op in _GIVEN for memory in _memories(node)}
    writers: dict[int, list[fx.Node]] = {}
    live: list[fx.Node] = []
    for node in graph.nodes:
        into = {memory for operand in written_operands(node) for memory in _memories(operand)}
        if into and mutates(node) and op_name(node).isidentifier() and not into & given:
            for memory in into:
                writers.setdefault(memory, []).append(node)
        elif into or node.op in ("output", *_GIVEN) or not _is_data(fake_value(node)):
            live.append(node)
    seen = set(live)
    for node in live:
        memories = {memory for source in node.all_input_nodes for memory in _memories(source)}
        found = [*node.all_input_nodes, *(w for m in memories for w in writers.get(m, ()))]
        live += [other for other in dict.fromkeys(found) if other not in seen]
        seen.update(found)
    return seen


_GIVEN = ("placeholder", "get_attr")


def _memories(node: fx.Node) -> list[int]:
    """The storages of the tensors that a node makes: several for a split."""
    return [memory_of(x) for x in tree_leaves(fake_value(node)) if isinstance(x, torch.Tensor)]


def _is_data(value: Any) -> bool:
    """Whether a fake value is a tensor, a number or, as splits have it, a tuple of these."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(_is_data, value))
    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, int))


def call(
    graph: fx.Graph, function: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any
) -> fx.Node:
    """Adds a call at the insertion point with its fake value; `like` lends its module path."""
    node = graph.call_function(function, args, kwargs)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    fake_args = map_arg((args, kwargs), fake_value)
    with fake_mode_of(graph), torch.no_grad():
        node.meta["example_value"] = function(*fake_args[0], **fake_args[1])
    return node


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode of the graph's own fake values.

    Not the tracing context's: around a backend call Dynamo puts a fresh mode there, which shares
    the symbols but refuses the tensors of the mode that traced the graph.
    """
    for node in graph.find_nodes(op="placeholder"):
        value = fake_value(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("found a graph without tensor inputs; needed one traced by Dynamo")


def ancestors(nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """Breadth first: the nodes themselves, then what they read, nearest first, each once."""
    queue = list(nodes)
    seen = set(queue)
    for node in queue:
        yield node
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)


def extract(
    gm: fx.GraphModule, outputs: list[Any], read_by: Sequence[fx.Node]
) -> fx.GraphModule | None:
    """A graph with the placeholders of `gm` that computes only `outputs`, before any write.

    None where it would give other values than the calls `read_by`, which take the outputs: a call
    on the way writes into an operand, or a write lies between an input and a call that reads it.
    """
    wanted = [node for node in outputs if isinstance(node, fx.Node)]
    needed = set(ancestors(wanted))
    if any(node.op not in ("placeholder", "get_attr") and mutates(node) for node in needed):
        return None
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    reads = [(source, order[node]) for node in needed for source in node.all_input_nodes]
    reads += [(node, order[reader]) for node in wanted for reader in read_by]
    for write in writes_of(gm.graph):
        if any(write.position < at and may_overlap(write.operand, node) for node, at in reads):
            return None
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            mapping[node] = graph.node_copy(node, lambda source: mapping[source])
    graph.output(map_arg(tuple(outputs), lambda node: mapping[node]))
    return fx.GraphModule(gm, graph)


def input_of(graph: fx.Graph, size: Any) -> int | None:
    """The number of the input that brings a size that is a symbol: Dynamo adds one for each."""
    for place, node in enumerate(graph.find_nodes(op="placeholder")):
        value = fake_value(node)
        if isinstance(value, torch.SymInt) and same_size(value, size):
            return place
    return None


def parameter_test(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[[fx.Node], bool]:
    """Tells whether a placeholder of the graph brings in a parameter of the model."""
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    return lambda node: isinstance(inputs[node], torch.nn.Parameter)


def nearest_matrix(
    starts: Sequence[fx.Node], is_parameter: Callable[[fx.Node], bool]
) -> fx.Node | None:
    """The nearest placeholder of two or more dimensions for which `is_parameter` holds.

    From the new keys of a cache it is the weight that makes the keys: it identifies a site whatever
    the graph, the module path or the kind of cache. Adapters (see `adapters_of`) are passed over:
    what they are added to identifies the site.
    """
    queue, seen = list(starts), set(starts)
    for node in queue:
        if node.op == "placeholder" and is_parameter(node) and len(shape_of(node) or ()) >= 2:
            return node
        added_to = _adapted(node, is_parameter)
        for source in node.all_input_nodes if added_to is None else [added_to]:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return None


def adapters_of(graph: fx.Graph, is_parameter: Callable[[fx.Node], bool]) -> int:
    """How many low-rank adapters the graph adds to what it computes.

    An adapter is two linear maps with weights, one behind the other, of a value that what their
    result is added to is made of as well: `base(x) + scale * B(A(x))`.
    """
    return sum(_adapted(node, is_parameter) is not None for node in graph.nodes)


_LEAVE_THE_VALUE = ("to", "float", "type", "dropout", "contiguous")


def _adapted(node: Any, is_parameter: Callable[[fx.Node], bool]) -> fx.Node | None:
    """What an adapter is added to by this call; None where none is."""
    if not isinstance(node, fx.Node) or op_name(node) not in ("add", "add_"):
        return None
    if len(node.args) != 2:
        return None
    for base, other in (node.args, node.args[::-1]):
        adapter = _value(other)
        if isinstance(adapter, fx.Node) and op_name(adapter) == "mul":  # its scale
            factors = [arg for arg in adapter.args if isinstance(arg, fx.Node)]
            adapter = _value(factors[0]) if factors else None
        inner = _input_of_map(adapter, is_parameter)
        source = _input_of_map(inner, is_parameter)
        if source is None or not isinstance(base, fx.Node):
            continue
        made_of = base
        while (below := _adapted(_value(made_of), is_parameter)) is not None:
            made_of = below
        if any(_value(value) is source for value in _value(made_of).all_input_nodes):
            return base
    return None


def _input_of_map(node: Any, is_parameter: Callable[[fx.Node], bool]) -> fx.Node | None:
    """What a linear map with a weight of the model is applied to."""
    if not isinstance(node, fx.Node) or op_name(node) != "linear" or len(node.args) < 2:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "placeholder" or not is_parameter(weight):
        return None
    return _value(node.args[0])


def _value(node: Any) -> Any:
    """The call behind casts and what does nothing in inference."""
    while isinstance(node, fx.Node) and op_name(node) in _LEAVE_THE_VALUE and node.args:
        node = node.args[0]
    return node
