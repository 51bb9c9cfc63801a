"""The compiler: `loki(gm, example_inputs)` is what `torch.compile(..., backend="loki")` calls.

    normalize -> parts -> find sites -> trace caches and plan -> rewrite -> Inductor -> runtime

Dynamo calls it once per graph, at torch level: attention is still one call, and writes into a
cache are still visible mutations. A graph without a sparse site goes to Inductor at once (with
exact attention as fast as can be, unless `pack_gqa=False`); any other becomes a `DecodeGraph`,
whose two variants are compiled when they are first needed. What may be called once is `Deferred`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from loki_compile import recompiles
from loki_compile.bind import adapters, bind_caches, growths, load_basis, token_count
from loki_compile.buffers import Growing, with_room
from loki_compile.caches import CacheBinding
from loki_compile.config import LokiConfig
from loki_compile.counts import (
    Tally,
    note_attention,
    say_compiling,
    say_once,
    steps_taken,
    tally_of,
)
from loki_compile.deferred import PRICE, Deferred
from loki_compile.engines import (
    Engine,
    autocast_now,
    compile_late,
    default,
    in_blocks,
    with_row_products,
)
from loki_compile.floats import ask_for_values, ask_what_inductor_asks
from loki_compile.kernels.kept import Keeps
from loki_compile.kernels.ops import begin_building
from loki_compile.passes.appends import Append, find_appends
from loki_compile.passes.attention import PREFILLS, Reason, Skipped
from loki_compile.passes.calls import fake_value
from loki_compile.passes.dense import (
    first_keys,
    lay_out_first_keys,
    rewrite_dense,
    served_by_attention,
)
from loki_compile.passes.graphs import copy_of, fake_mode_of, log_change, ops_of, remap
from loki_compile.passes.moments import add_query_moments
from loki_compile.passes.normalize import normalize
from loki_compile.passes.plan import Plan, check_source, make_plan, with_prefills
from loki_compile.passes.policy import Candidate
from loki_compile.passes.prompts import AskedCache, find_asked
from loki_compile.passes.prompts_by_spans import rewrite_prefills
from loki_compile.passes.shared_caches import Part, take_parts
from loki_compile.passes.sites import find_sites
from loki_compile.passes.span_prefills import find_prefills
from loki_compile.planned import PlanOfModel
from loki_compile.policies.table import Stored, policy_of
from loki_compile.prompts import PrefillGraph
from loki_compile.refusal import Refusal, plainly
from loki_compile.remarks import remark_on, remarking_on_no_attention
from loki_compile.report import GraphReport, describe, record_graph
from loki_compile.runtime import DecodeGraph
from loki_compile.steps import Served
from loki_compile.variants import Variant, Variants

log = logging.getLogger("loki_compile")


def loki(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    engine: Engine | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """TorchDynamo backend: compiles one graph, with long-context decode attention made sparse.

    Args:
      gm: the graph as Dynamo traced it; it is not changed.
      example_inputs: its inputs, real or fake.
      mode: torch.compile's mode, passed on to Inductor.
      options: see `LokiConfig`.
      engine: what compiles the rewritten graphs, see `inductor`; the default is that of
        `default_engine`. `torch.compile` has no place for it:
        `backend=functools.partial(loki, engine=...)`.

    Raises:
      ValueError: an unknown or impossible option, a basis that is not there or does not belong to
        the model. Options and the basis' name are checked first, before the graph is looked at.
      RuntimeError: under `strict=True`, listing every site that could not be rewritten.
    """
    config = plainly(_checked, {**(options or {}), **unknown}, mode)
    recompiles.allow_for(steps_taken())
    normal, parts = _in_one_form(gm)
    of_model = PlanOfModel(normal, example_inputs, parts, config)
    plan = plainly(plan_graph, normal, config, of_model, parts)
    at_once, later = _compilers(engine or default(), plan, config, mode)
    graph = _Graph.of(gm, normal, parts, config, plan, mode)
    _judge(graph, example_inputs)
    bindings = plainly(graph.bind, example_inputs)
    tally = tally_of(gm, example_inputs)
    late = functools.partial(_late, graph, later, tally)
    compiled: Callable[..., Any]
    running: Any  # what tells how it fares
    if plan.sparse:
        compiled = running = _decode_graph(graph, example_inputs, bindings, late, tally)
    else:
        compiled, running = _dense_graph(graph, example_inputs, late, at_once, tally)
    added = adapters(normal, bindings, example_inputs, parts)
    record_graph(plan, config, bindings, running, added)  # last: it may be traced again
    remark_on(plan, config, tally, of_model)
    if plan.sites or plan.dense:
        note_attention()
        return compiled
    return remarking_on_no_attention(compiled)


@dataclasses.dataclass(frozen=True, eq=False)
class _Graph:
    """A graph as Dynamo traced it, its one form, and what was found in it; none of its inputs.

    once: it is called once, and compiled when that is worth it. in_place: what it makes longer may
    grow in its memory, and `appends` are what does.
    """

    gm: fx.GraphModule
    normal: fx.GraphModule
    parts: Sequence[Part]
    config: LokiConfig
    plan: Plan
    once: bool
    in_place: bool
    appends: Sequence[Append]

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        normal: fx.GraphModule,
        parts: Sequence[Part],
        config: LokiConfig,
        plan: Plan,
        mode: str | None,
    ) -> _Graph:
        in_place = _grows_in_place(normal, config, mode)
        appends = find_appends(normal.graph) if in_place else ()
        # What is promised to be Inductor's to the bit goes to Inductor.
        once = config.pack_gqa and is_called_once(plan, normal.graph, appends)
        return cls(gm, normal, parts, config, plan, once, in_place, appends)

    def bind(self, args: Sequence[Any]) -> list[CacheBinding]:
        """How its caches lie and come in with these inputs."""
        return bind_caches(self.normal, self.plan, args, self.parts, self.config, self.appends)


def _judge(graph: _Graph, example_inputs: Sequence[Any]) -> None:
    """Refuses what `strict=True` does not allow; has the kernels of what is served built.

    Raises:
      RuntimeError: a site that cannot be rewritten, under `strict=True`.
    """
    plan, once = graph.plan, graph.once
    refusal = _refusal(plan) if graph.config.strict else ""
    if plan.sparse or refusal or once:
        ask_what_inductor_asks(graph.gm, example_inputs)  # what is traced again is not judged
    if refusal:
        raise Refusal(refusal)
    if plan.sparse or once:  # behind a prompt comes a step
        nodes = [site.node for site in plan.sites] + [skipped.node for skipped in plan.dense]
        attended = map(fake_value, nodes)
        dtypes = {x.dtype for x in attended if isinstance(x, torch.Tensor)}
        only = dtypes.pop() if len(dtypes) == 1 else None
        for device in {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)}:
            begin_building(device, only)


def _decode_graph(
    graph: _Graph,
    example_inputs: Sequence[Any],
    bindings: list[CacheBinding],
    late: Callable[..., Callable[..., Variant]],
    tally: Tally,
) -> DecodeGraph:
    """What runs a graph with a sparse site."""
    gm, normal, plan, config = graph.gm, graph.normal, graph.plan, graph.config
    counts = [token_count(normal.graph, sparse.site) for sparse in plan.sparse]
    grows = growths(normal.graph, graph.appends)
    growing = Growing(grows) if grows else None
    engine = late(lambda: growing is not None and growing.goes_on)
    variants = Variants(normal, plan, config.pack_gqa, engine, counts, graph.appends)

    def serve(args: Sequence[Any]) -> Served:
        return Served(graph.bind(args), tally_of(gm, args))

    served = Served(bindings, tally)
    compiled = DecodeGraph(variants, config, graph.parts, served, serve, growing)
    compiled.remember(example_inputs)
    return compiled


def _dense_graph(
    graph: _Graph,
    example_inputs: Sequence[Any],
    late: Callable[[], Callable[..., Variant]],
    at_once: Callable[..., Any],
    tally: Tally,
) -> tuple[Callable[..., Any], Any]:
    """What runs a graph without a sparse site, and what tells how it fares, if anything does."""
    running: Any = None
    compiled: Callable[..., Any]
    asked = plainly(_asked_in, graph.normal, graph.parts, graph.config)
    form, outputs = _dense_form(graph, asked)
    form = lay_out_first_keys(form)
    if graph.once:
        missed = functools.partial(tally.add, "interpreted_steps")
        compiled = running = late()(form, _A_PREFILL, missed)
    else:
        _say_compiling_dense(tally, graph.plan)
        compiled = at_once(form, example_inputs)
    # A prompt in parts leaves what steps leave, lest these are traced for two layouts.
    read = any(skip.reason in PREFILLS for skip in graph.plan.dense)
    longer = [(append.output, append.axis) for append in graph.appends if read]
    if graph.in_place and (left := [*first_keys(graph.normal.graph), *longer]):
        # Unless `dynamic=False` was asked for.
        varies = torch._dynamo.config.automatic_dynamic_shapes
        compiled = with_room(compiled, left, varies)
    if asked:  # what was asked of a cache is known by the memory that it leaves in
        compiled = PrefillGraph(compiled, asked, outputs)
    return compiled, running


def _compilers(
    engine: Engine, plan: Plan, config: LokiConfig, mode: str | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What compiles a graph while Dynamo waits for it, and what compiles one behind its back."""
    engines = [engine, in_blocks(engine)]
    # What is promised to be Inductor's to the bit is left to it.
    if config.pack_gqa and (plan.sites or plan.dense):
        engines = list(map(with_row_products, engines))
    at_once, later = (
        PRICE.timed(functools.partial(each, mode=mode, options=config.inductor)) for each in engines
    )
    return at_once, later


def _late(
    graph: _Graph,
    compile_graph: Callable[..., Callable[..., Any]],
    tally: Tally,
    goes_on: Callable[[], bool] = lambda: False,
) -> Callable[..., Variant]:
    """What compiles a form of the graph when it is needed, or, of what is called once, when that
    is worth it, or where a call `goes_on` all the same."""
    late: Callable[..., Variant] = functools.partial(
        compile_late,
        compile_graph=compile_graph,
        known=len(fake_mode_of(graph.normal.graph).shape_env.guards),
        tally=tally,
        sites=len(graph.plan.sites) or len(graph.plan.dense),
        autocast=autocast_now(graph.normal),
    )
    return functools.partial(Deferred, late, goes_on=goes_on) if graph.once else late


def is_called_once(plan: Plan, graph: fx.Graph, appends: Sequence[Append]) -> bool:
    """Whether a conversation calls the graph once: a prefill, or a step for one length of a cache
    that grows, as Dynamo traces the first, or for any length of one that lies tight, which leaves
    one with room.

    What computes flex_attention is never run as it is: all scores would lie in memory at once.
    """
    if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.nodes):
        return False
    if plan.sparse:
        one_length = any(cache.serves_one_length for cache in plan.caches)
        return one_length or any(append.lies_tight for append in appends)
    if plan.sites or not plan.dense:
        return False
    return all(skip.reason in PREFILLS for skip in plan.dense)


def _checked(options: dict[str, Any], mode: str | None) -> LokiConfig:
    """The configuration, with a basis that was named read in; says once what cannot be meant.

    Raises:
      ValueError: an option, a mode or a basis that there is not.
    """
    config = LokiConfig.from_options(options)
    if mode and mode not in (modes := torch._inductor.list_mode_options()):
        raise ValueError(f"mode={mode!r}: needs one of {', '.join(map(repr, modes))}.")
    for notice in config.notices():
        say_once(notice, notice)
    if config.basis == "auto":
        return config
    return dataclasses.replace(config, basis=load_basis(config.basis))


def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any], config: LokiConfig) -> GraphReport:
    """The report of one graph, without compiling it.

    Raises:
      ValueError: a basis that does not belong to the model.
    """
    normal, parts = _in_one_form(gm)
    of_model = PlanOfModel(normal, example_inputs, parts, config)
    plan = plan_graph(normal, config, of_model, parts)
    bindings = bind_caches(normal, plan, example_inputs, parts, config)
    return describe(plan, config, bindings, adapters(normal, bindings, example_inputs, parts))


def _in_one_form(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Part]]:
    """A copy of the graph in one spelling, and the caches that were cut out of other inputs."""
    before = ops_of(gm.graph)
    normal, _ = normalize(gm)
    log_change(log, "normalize", before, normal.graph)
    ask_for_values(normal.graph)
    before = ops_of(normal.graph)
    parts = take_parts(normal)
    log_change(log, "shared_caches", before, normal.graph)
    return normal, parts


def plan_graph(
    normal: fx.GraphModule,
    config: LokiConfig,
    stored: Stored = lambda candidates, policy: None,
    parts: Sequence[Part] = (),
) -> Plan:
    """The analysis half of the compiler: what would become of each attention core. `stored` finds
    the plan of layers that is stored for the model.

    Raises:
      ValueError: a policy that has a layer read what no earlier one of the same slots chose.
    """
    sites, skipped = find_sites(normal.graph)
    if _records_gradients(normal):
        skipped += [Skipped(site.node, Reason.GRAD, (), site.path) for site in sites]
        sites = []
    policy = policy_of(config, stored)
    plan = make_plan(sites, skipped, policy=policy, layers=config.layers)
    prompts = find_prefills(normal.graph) if config.prefill == "spans" else []
    if not prompts:
        return plan
    why = "caches of several layers share a tensor" if parts else ""
    why = "gradients are recorded here" if _records_gradients(normal) else why
    hindered = [
        f"left out by layers={config.layers}"
        if config.layers != "all" and not site.is_among(config.layers, number)
        else why
        for number, site in enumerate(prompts)
    ]
    candidates = [Candidate(site, None, None, (site.key.base,)) for site in prompts]
    return with_prefills(plan, prompts, policy(candidates), hindered)


def _dense_form(graph: _Graph, asked: Sequence[AskedCache]) -> tuple[fx.GraphModule, int]:
    """What is compiled of a graph without a sparse site, and how many outputs are its own: those
    behind them say what its caches are asked."""
    normal, plan, config = graph.normal, graph.plan, graph.config
    own = len(normal.graph.output_node().args[0])  # type: ignore[arg-type]
    faster = config.pack_gqa and any(x.group > 1 or served_by_attention(x) for x in plan.sites)
    if graph.parts or not (asked or faster or plan.prefills):
        return graph.gm, own
    form, mapping = copy_of(normal)
    if asked:
        form = add_query_moments(form, remap(asked, mapping))
    if faster:
        form = rewrite_dense(form, plan.on(mapping).sites)
    if plan.prefills:
        form = rewrite_prefills(form, plan.on(mapping).prefills)
    return form, own


def _asked_in(
    normal: fx.GraphModule, parts: Sequence[Part], config: LokiConfig
) -> tuple[AskedCache, ...]:
    """The caches of which prompts' queries are taken note of, for bases that will be fitted."""
    if config.basis != "auto" or parts or _records_gradients(normal):
        return ()
    asked = find_asked(normal.graph)
    sites = [site for cache in asked for site in cache.sites]
    # As if each chose for itself: what others will read from, only the steps' graphs tell.
    candidates = [Candidate(site, None, None) for site in sites]
    choices = policy_of(config)(candidates)
    for number in range(len(sites)):
        check_source(candidates, choices, number)  # sooner than the step's graph does
    ranked = {
        site.node
        for site, choice in zip(sites, choices, strict=True)
        if choice.ranking is not None and choice.ranking.keeps is Keeps.INDEX
    }
    return tuple(cache for cache in asked if any(site.node in ranked for site in cache.sites))


def _grows_in_place(normal: fx.GraphModule, config: LokiConfig, mode: str | None) -> bool:
    """Whether what a graph makes longer may grow in its memory: not in training, nor where CUDA
    graphs keep addresses from step to step, nor where dense attention is to be Inductor's to the
    bit: PyTorch's adds up otherwise where keys lie apart."""
    options = {**(torch._inductor.list_mode_options(mode) if mode else {}), **config.inductor}
    cuda_graphs = options.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
    return config.pack_gqa and not cuda_graphs and not _records_gradients(normal)


def _records_gradients(gm: fx.GraphModule) -> bool:
    values = (fake_value(node) for node in gm.graph.find_nodes(op="placeholder"))
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in values
    )


def _refusal(plan: Plan) -> str:
    """What `strict=True` has against a plan; "" for nothing."""
    refused = [skip for skip in plan.dense if not skip.by_plan]
    if refused:
        lines = "\n".join(f"  {s.path or s.node.name}: {s.sentence()}" for s in refused)
        return (
            f"strict=True, and {len(refused)} attention site(s) cannot be rewritten:\n{lines}\n"
            "Set strict=False to leave them dense."
        )
    if not plan.sites and not plan.dense:
        return (
            "strict=True, and this graph has no attention to rewrite. Compile a model that "
            "decodes with a key/value cache, or set strict=False."
        )
    return ""


def _say_compiling_dense(tally: Tally, plan: Plan) -> None:
    if plan.dense:
        prefill = all(skip.reason in PREFILLS for skip in plan.dense)
        what = _A_PREFILL if prefill else "a graph that stays dense"
        say_compiling(tally, what, len(plan.dense))


_A_PREFILL = "a prefill, which is dense"
