"""Which sites number their keys alike: what one chose, another may read. Edits nothing.

A position is a slot of a cache. Two sites have the same slots where both caches are as long, take
new tokens in the same way, are read through the same views, and where the same masks say which keys
are seen: then a key that the first may read is one that the second may read, of the same token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from loki_compile.passes.attention import AttentionSite, MaskTerm
from loki_compile.passes.caches import KeyCache
from loki_compile.passes.calls import (
    Write,
    fake_value,
    hint_of,
    may_overlap,
    mutates,
    op_name,
    same_size,
    shape_of,
)
from loki_compile.passes.write_forms import unordered_by
from torch import fx

Cached = tuple[AttentionSite, KeyCache]
# Sizes that are equal in the call that was traced.
Pairs = list[tuple[Any, Any]]


def slot_classes(cached: Sequence[Cached | None], writes: Sequence[Write]) -> list[int | None]:
    """For each site the number of its class; sites of one class have the same slots.

    None for a site without a cache, and for one whose keys move from slot to slot or wrap around.
    `writes` are all of the graph. Sizes that are symbols count as equal where they are in the call
    that was traced: before two sites share anything, `hold_to` makes that so for all calls.
    """
    first: list[Cached] = []
    classes: list[int | None] = []
    for each in cached:
        if each is None or _moves(each[1]):
            classes.append(None)
            continue
        known = (n for n, other in enumerate(first) if _same_slots(each, other, writes) is not None)
        number = next(known, len(first))
        if number == len(first):
            first.append(each)
        classes.append(number)
    return classes


def hold_to(one: Cached, other: Cached, writes: Sequence[Write]) -> None:
    """Guards the graph: it serves calls in which two sites of one class have the same slots."""
    for size, its in _same_slots(one, other, writes) or ():
        if not same_size(size, its):
            bool(size == its)


def masks_at(site: AttentionSite, writes: Sequence[Write]) -> fx.Node | None:
    """The node behind which the site's masks are as its core reads them; None without masks.

    That is the last of the masks, or the last call before the core that writes into one: a mask may
    be allocated first and filled in place. Layers that read the same masks share the node.
    """
    masks = [term.node for term in site.masks]
    if not masks:
        return None
    before = [write for write in writes if write.call < site.node]
    filled = [w.call for w in before if any(may_overlap(w.operand, mask) for mask in masks)]
    return max(*masks, *filled, site.node.graph.find_nodes(op="placeholder")[-1])


def _moves(cache: KeyCache) -> bool:
    return bool(cache.leaves) or any(write.moved or unordered_by(write) for write in cache.writes)


def _same_slots(one: Cached, other: Cached, writes: Sequence[Write]) -> Pairs | None:
    """None where slots differ, else the sizes that must be equal."""
    (site, cache), (its, others) = one, other
    pairs: Pairs = []
    alike = (
        (cache.grows, bool(cache.writes)) == (others.grows, bool(others.writes))
        and _same(_sizes(site, cache), _sizes(its, others), writes, pairs)
        and len(cache.views) == len(others.views)
        and all(_same_view(*both, pairs) for both in zip(cache.views, others.views, strict=True))
        and _same_masks(site, its, writes, pairs)
    )
    return pairs if alike else None


def _sizes(site: AttentionSite, cache: KeyCache) -> tuple[Any, ...]:
    """Slots of the cache, keys that are read, new tokens, sequences."""
    whole, read = shape_of(cache.past) or (), shape_of(site.key.base) or ()
    batch = site.key.order[0]
    return whole[cache.token_axis], read[site.key.order[2]], site.tokens, read[batch]


def _same_view(one: fx.Node, other: fx.Node, pairs: Pairs) -> bool:
    """Whether two views do the same, each to its own operand."""
    return op_name(one) == op_name(other) and _same(
        (one.args[1:], one.kwargs), (other.args[1:], other.kwargs), (), pairs
    )


def _same_masks(
    site: AttentionSite, other: AttentionSite, writes: Sequence[Write], pairs: Pairs
) -> bool:
    """Whether both cores read the same masks: one node, or nodes that are computed alike."""
    if len(site.masks) != len(other.masks):
        return False
    both = masks_at(site, writes), masks_at(other, writes)
    if site.masks == other.masks:
        return both[0] is both[1]
    last = site.node.graph.find_nodes(op="placeholder")[-1]
    for each, at in zip((site, other), both, strict=True):
        if at not in (last, *(term.node for term in each.masks)):  # it is filled in place
            return False
    terms = zip(site.masks, other.masks, strict=True)
    return all(_same_term(one, its, writes, pairs) for one, its in terms)


def _same_term(one: MaskTerm, other: MaskTerm, writes: Sequence[Write], pairs: Pairs) -> bool:
    if dataclasses.replace(one, node=other.node, rule=other.rule) != other:
        return False
    if one.rule is None or other.rule is None:
        return one.rule is other.rule and _same(one.node, other.node, writes, pairs)
    rules, module = (one.rule, other.rule), one.node.graph.owning_module
    assert module is not None
    codes = [getattr(module.get_submodule(rule.name), "code", rule.name) for rule in rules]
    return codes[0] == codes[1] and _same(one.rule.operands, other.rule.operands, writes, pairs)


def _same(one: Any, other: Any, writes: Sequence[Write], pairs: Pairs) -> bool:
    """Whether two nodes, or operands with nodes in them, are computed alike from the same inputs,
    none of which is written into; sizes are told to `pairs`."""
    if one is other:
        return True
    sizes = [fake_value(x) if isinstance(x, fx.Node) else x for x in (one, other)]
    if all(isinstance(size, torch.SymInt) for size in sizes):
        pairs.append((sizes[0], sizes[1]))
        hints = [hint_of(size) for size in sizes]
        return hints[0] is not None and hints[0] == hints[1]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return False
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        alike = one.op == other.op and one.target == other.target
        if not alike or one.op not in ("call_function", "call_method") or mutates(one):
            return False
        if any(may_overlap(w.operand, node) for w in writes for node in (one, other)):
            return False
        return _same((one.args, one.kwargs), (other.args, other.kwargs), writes, pairs)
    if isinstance(one, slice) and isinstance(other, slice):
        ends, its = ((each.start, each.stop, each.step) for each in (one, other))
        return _same(ends, its, writes, pairs)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        both = zip(one, other, strict=False)
        return len(one) == len(other) and all(_same(a, b, writes, pairs) for a, b in both)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _same(one[key], other[key], writes, pairs) for key in one
        )
    return type(one) is type(other) and bool(one == other)
