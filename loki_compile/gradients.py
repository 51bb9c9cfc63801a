"""Gradients of a loss at each attention core's output, in the memory of one layer.

The model's graph runs without gradients, and what crosses a cut between two cores is kept: the cut
is made where least does. Then each piece runs again, the last one first, with gradients. Weights
have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from loki_compile.kernels.fused import queries_by_head
from loki_compile.kernels.masks import joint_mask, plain_mask
from loki_compile.passes.attention import AttentionSite, Heads

# What a site's core returned and computed it from, and the gradient of the loss there.
See = Callable[["Attended", Tensor], None]


@dataclass(frozen=True)
class Attended:
    """The operands of one core: query (B, Hq, S, D), key (B, Hkv, T, D), value (B, Hkv, T, Dv),
    out (B, Hq, S, Dv); mask broadcastable to (B, Hq, S, T), None where there is none."""

    site: AttentionSite
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    mask: Tensor | None
    sink_logits: Tensor | None


def why_not(site: AttentionSite) -> str:
    """Why what a core attends to cannot be told from its operands; "" where it can."""
    core = site.core
    if site.latent is not None or core.second_product is not None or core.query_scales:
        return "its scores are not plain products"
    if core.row_sinks:
        return "its rows have sinks of their own"
    if any(term.rule is not None for term in core.masks):
        return "its mask is a function"
    if site.interleaved:
        return "its query heads are dealt out to KV heads in turn"
    return ""


def attended(site: AttentionSite, values: Mapping[fx.Node, Any]) -> Attended:
    """The operands of a site of which there is no reason `why_not`."""
    query = queries_by_head(values[site.query], site.core.query_layout)
    out = queries_by_head(values[site.node], site.core.out_layout)
    sizes = (site.query_heads // site.group_dim, site.group_dim, query.shape[2])
    masks = [plain_mask(values[term.node], term.layout, sizes, 0) for term in site.masks]
    rules = [(term.factor, term.inverted, term.fill, term.floor) for term in site.masks]
    mask = joint_mask(rules, query.dtype, *masks) if masks else None
    key, value = (by_head(values[heads.base], heads) for heads in (site.key, site.value))
    sinks = site.core.sink_logits
    return Attended(site, query, key, value, out, mask, None if sinks is None else values[sinks])


def by_head(base: Tensor, heads: Heads) -> Tensor:
    """Keys or values as (B, Hkv, T, dims)."""
    order = list(heads.order)
    if order[1] < 0:
        base = base.unsqueeze(-2)
        head = base.dim() - 2
        order = [head if d < 0 else d + (d >= head) for d in order]
    return base.permute(order)


def operands_of(site: AttentionSite) -> tuple[fx.Node, ...]:
    """The nodes that `attended` reads."""
    sinks = site.core.sink_logits
    nodes = [site.query, site.key.base, site.value.base, *(term.node for term in site.masks)]
    return (*nodes, *(() if sinks is None else (sinks,)))


@dataclass
class _Cut:
    """Values that live behind node number `at`, and their versions when they were kept."""

    at: int
    values: dict[fx.Node, Any]
    versions: dict[fx.Node, int]
    size: int


class Tape(fx.Interpreter):
    """One graph: `run` it as often as wanted, `backward` after each."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.nodes = list(gm.graph.nodes)
        number = {node: place for place, node in enumerate(self.nodes)}
        self.sites = {site.node: site for site in sorted(sites, key=lambda s: number[s.node])}
        last = {node: number[node] for node in self.nodes}
        for node in self.nodes:
            read = operands_of(self.sites[node]) if node in self.sites else ()
            for source in (*node.all_input_nodes, *read):
                last[source] = max(last[source], number[node])
        self.given = [node for node in self.nodes if node.op in ("placeholder", "get_attr")]
        self.dying: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node, place in last.items():
            if node.op not in ("placeholder", "get_attr", "output"):
                self.dying[place].append(node)
        (self.end,) = (node for node in self.nodes if node.op == "output")
        self.returned: tuple[Any, ...] = ()
        self.cuts: list[_Cut] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # The graph was captured without gradients, and turns them off here and there.
        if target is torch._C._set_grad_enabled:
            return None
        return super().call_function(target, args, kwargs)

    @torch.no_grad()
    def run(self, *args: Any) -> Any:  # type: ignore[override]
        self._begin(args)
        self.cuts = [_Cut(-1, {}, {}, 0)]
        live: dict[fx.Node, None] = {}
        best: _Cut | None = None
        passed = False
        for place, node in enumerate(self.nodes):
            if node in self.sites:
                if best is not None:
                    self.cuts.append(best)
                best, passed = None, True
            result = self.env[node] = self.run_node(node)
            if node.op not in ("placeholder", "get_attr"):
                live[node] = None
            for dead in self.dying[place]:
                live.pop(dead, None)
                del self.env[dead]
            if passed and node is not self.end:
                best = self._lesser(best, place, live)
        if best is not None:
            self.cuts.append(best)
        self.env.clear()
        self.returned = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        return result

    def _begin(self, args: Sequence[Any]) -> None:
        places = [node for node in self.given if node.op == "placeholder"]
        self.args = dict(zip(places, args, strict=True))
        self.args_iter = iter(args)
        self.env.clear()

    def _lesser(self, best: _Cut | None, place: int, live: Mapping[fx.Node, None]) -> _Cut | None:
        """A cut behind a node, where that keeps less than the best so far."""
        known = {x.untyped_storage().data_ptr() for x in self.args.values() if _is_tensor(x)}
        size = 0
        for node in live:
            value = self.env[node]
            if _is_tensor(value):
                storage = value.untyped_storage()
                if storage.data_ptr() not in known:
                    known.add(storage.data_ptr())
                    size += storage.nbytes()
            elif value is not None and not isinstance(value, (int, float, bool)):
                return best  # such as parts of a tensor, or a region that is entered and left
        if best is not None and size >= best.size:
            return best
        values = {node: self.env[node] for node in live}
        versions = {node: x._version for node, x in values.items() if _counts(x)}
        return _Cut(place, values, versions, size)

    def backward(self, seeds: Sequence[tuple[Tensor, Tensor]], see: See) -> None:
        """Shows the gradient at each site's output, the last site's first. What was kept is given
        up.

        seeds: outputs of the last `run`, as it returned them, with the gradients of the loss there.

        Raises:
          ValueError: no such output, or a graph whose values are changed in place.
        """
        grads = {self._node_of(out): grad for out, grad in seeds}
        end = len(self.nodes) - 1
        while self.cuts:
            cut = self.cuts.pop()
            self._piece(cut, end, grads, see)
            end = cut.at
        self.forget()

    def forget(self) -> None:
        """Lets go of every tensor."""
        self.returned, self.args, self.cuts = (), {}, []
        self.env.clear()

    def _node_of(self, out: Tensor) -> fx.Node:
        flat = self.end.args[0]
        assert isinstance(flat, (tuple, list))
        for node, value in zip(flat, self.returned, strict=True):
            if value is out and isinstance(node, fx.Node):
                return node
        raise ValueError(
            "the loss is not taken from what the graph of the model's attention returns: needs a "
            "decoder whose prefill is one graph"
        )

    @torch.enable_grad()
    def _piece(self, cut: _Cut, end: int, grads: dict[fx.Node, Tensor], see: See) -> None:
        """Nodes behind a cut, up to number `end`; `grads` of what they make becomes that of what
        crosses the cut."""
        leaves = self._leaves(cut)
        seen: list[tuple[Attended, Tensor]] = []
        heads: dict[fx.Node, Tensor] = {}
        for place in range(cut.at + 1, end + 1):
            node = self.nodes[place]
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            result = self.run_node(node)
            site = self.sites.get(node)
            if site is not None:
                if not result.requires_grad:
                    result = result.detach().requires_grad_()
                self.env[node] = result
                seen.append((attended(site, _Detached(self.env)), result))
            self.env[node] = result
            if node in grads:
                heads[node] = result
            for dead in self.dying[place]:
                self.env.pop(dead, None)
        self.env.clear()
        # As views, queries and gradients have one order of dimensions: that of the output.
        towards = [*(out for _, out in seen), *leaves.values()]
        outs = {node: out for node, out in heads.items() if out.requires_grad}
        given = [grads.pop(node) for node in heads]
        given = [grad for grad, node in zip(given, heads, strict=True) if node in outs]
        if not towards or not outs:
            return
        found = torch.autograd.grad(list(outs.values()), towards, given, allow_unused=True)
        for (each, out), grad in zip(reversed(seen), reversed(found[: len(seen)]), strict=True):
            grad = torch.zeros_like(out) if grad is None else grad
            see(each, queries_by_head(grad, each.site.core.out_layout))
        for node, grad in zip(leaves, found[len(seen) :], strict=True):
            if grad is not None:
                grads[node] = grads[node] + grad if node in grads else grad

    def _leaves(self, cut: _Cut) -> dict[fx.Node, Tensor]:
        """Begins behind a cut: gives up what it kept, of which floating values are leaves.

        Raises:
          ValueError: one of them has changed since.
        """
        self.env.clear()
        self.args_iter = iter([x.detach() if _is_tensor(x) else x for x in self.args.values()])
        for node in self.given:
            self.env[node] = self._unlearned(self.run_node(node))
        leaves: dict[fx.Node, Tensor] = {}
        for node, value in cut.values.items():
            if _counts(value) and value._version != cut.versions[node]:
                raise ValueError(
                    f"{node.name} is changed in place by a later layer: its gradient cannot be "
                    "told. Needs a model that leaves hidden states as they are"
                )
            if _is_tensor(value) and value.is_floating_point():
                leaves[node] = value.detach().requires_grad_()
                value = leaves[node].clone()  # which may be written in place
            self.env[node] = value
        cut.values.clear()
        return leaves

    def _unlearned(self, value: Any) -> Any:
        """Weights take no part."""
        return value.detach() if _is_tensor(value) else value


class _Detached(Mapping[fx.Node, Any]):
    def __init__(self, env: Mapping[fx.Node, Any]) -> None:
        self.env = env

    def __getitem__(self, node: fx.Node) -> Any:
        value = self.env[node]
        return value.detach() if _is_tensor(value) else value

    def __iter__(self) -> Any:
        return iter(self.env)

    def __len__(self) -> int:
        return len(self.env)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _counts(value: Any) -> bool:
    return _is_tensor(value) and not value.is_inference()
