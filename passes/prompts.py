"""Finds, in a prefill, the queries that are asked of each cache. Analysis only.

A prefill stays as it is, but it is where a prompt's queries are seen: what is known of them when
decoding begins tells what later ones will ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loki_compile.kernels.fused import SCORES
from loki_compile.passes.attention import MAX_QUERY_TOKENS, AttentionSite
from loki_compile.passes.calls import (
    concrete,
    fake_value,
    hint_of,
    op_name,
    operand,
    shape_of,
    share_memory,
    writes_of,
)
from loki_compile.passes.sites import find_sites
from torch import Tensor, fx


@dataclass(frozen=True)
class AskedCache:
    """A cache that a prefill asks queries of, by the `sites` that read it.

    It is the memory of the graph's output number `output`, or, where that is None, of its input
    number `argument`; where both are there, the output continues the input. Its keys begin `offset`
    numbers behind the tensor's own first one.
    """

    sites: tuple[AttentionSite, ...]
    argument: int | None
    output: int | None
    offset: int


def find_asked(graph: fx.Graph) -> tuple[AskedCache, ...]:
    """The caches that prefills of the graph ask queries of.

    Not among them: cores whose masks are a rule or laid out otherwise than (B, Hq, S, T), for which
    padding cannot be told; keys of no cache that can be told; cached latents.
    """
    sites, _ = find_sites(graph, max_query_tokens=None)
    places = _Places(graph)
    by_place: dict[tuple[Any, ...], list[AttentionSite]] = {}
    for site in sites:
        tokens = hint_of(site.tokens)
        if (
            tokens is None
            or tokens <= MAX_QUERY_TOKENS
            or site.latent is not None
            or site.interleaved
        ):
            continue
        if any(term.rule is not None or term.layout != SCORES for term in site.masks):
            continue
        place = places.of(site.key.base)
        if place is not None:
            by_place.setdefault((place, site.kv_heads, site.head_dim), []).append(site)
    return tuple(AskedCache(tuple(sites), *place) for (place, *_), sites in by_place.items())


class _Places:
    """Which input or output of a graph keeps given keys: (argument, output, offset)."""

    def __init__(self, graph: fx.Graph) -> None:
        self.inputs = graph.find_nodes(op="placeholder")
        results: Any = graph.output_node().args[0]
        self.outputs = [(i, node) for i, node in enumerate(results) if isinstance(node, fx.Node)]
        self.writes = writes_of(graph)
        self.appended = [node for node in graph.nodes if op_name(node) == "cat"]

    def of(self, keys: fx.Node) -> tuple[int | None, int | None, int] | None:
        for holder in (keys, *self._takers(keys)):
            output = next((i for i, node in self.outputs if _same_memory(node, holder)), None)
            argument = next((i for i, x in enumerate(self.inputs) if _same_memory(x, holder)), None)
            if argument is None and op_name(holder) == "cat":
                argument = self._past(holder)
            elif argument is not None:
                output = None  # written in place: what leaves the graph is the input's memory
            if output is None and (argument is None or op_name(holder) == "cat"):
                continue
            if output is None:
                assert argument is not None
                kept = self.inputs[argument]
            else:
                kept = dict(self.outputs)[output]
            offset = _offset(holder, kept)
            if offset is not None:
                return argument, output, offset
        return None

    def _takers(self, keys: fx.Node) -> Iterator[fx.Node]:
        """What keys of this very call are stored in."""
        for write in self.writes:
            if write.operand is not keys and _takes(write.call, keys, but=write.operand):
                yield write.operand
        for node in self.appended:
            if _takes(node, keys):
                yield node

    def _past(self, joined: fx.Node) -> int | None:
        parts: Any = operand(joined, "tensors")
        for i, node in enumerate(self.inputs):
            if any(isinstance(part, fx.Node) and _same_memory(node, part) for part in parts):
                return i
        return None


def _takes(call: fx.Node, keys: fx.Node, but: fx.Node | None = None) -> bool:
    return any(node is not but and _same_memory(node, keys) for node in call.all_input_nodes)


def _same_memory(a: fx.Node, b: fx.Node) -> bool:
    x, y = fake_value(a), fake_value(b)
    return isinstance(x, Tensor) and isinstance(y, Tensor) and share_memory(x, y)


def _offset(base: fx.Node, kept: fx.Node) -> int | None:
    """How far behind the first number of `kept` the keys begin, where that is a constant."""
    if shape_of(base) is None or not _same_memory(base, kept):
        return None
    first, begin = (concrete(fake_value(node).storage_offset()) for node in (base, kept))
    return None if first is None or begin is None else first - begin
