"""Finds every attention core of a graph: an `AttentionSite`, or `Skipped` with the reason.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, S new tokens, T cached tokens,
D head_dim of queries and keys, Dv head_dim of values. Analysis only: nothing here edits a graph.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loki_compile.passes.calls import (
    Write,
    concrete,
    fake_value,
    hint_of,
    may_overlap,
    module_path,
    op_name,
    operand,
    same_size,
    shape_of,
    writes_of,
)
from torch import fx

# More new tokens than this in one call are a prefill: each query would choose for itself.
MAX_QUERY_TOKENS = 8
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}


class Reason(enum.Enum):
    """Why a core stays dense; the value is the sentence a user reads, `{}` takes the details."""

    DROPOUT = "dropout is on ({}): run the model in eval() mode"
    CAUSAL_FLAG = "is_causal=True lets a single query token see the first key only; kept as it is"
    LAYOUT = "which dimensions are batch, heads, tokens and head_dim cannot be told: {}"
    GROUPS = "query heads do not map onto KV heads in groups: {}"
    PREFILL = "prefill ({} query tokens; up to 8 are rewritten): dense by plan"
    DTYPE = "queries, keys, values and result are not all float32, bfloat16 or float16: {}"
    DEVICE = "its cache lies on a device of type {}, which none of the kernels runs on: {}"
    SCALE = "the scale is a computed value ({})"
    SOFTMAX = "the scores reach the softmax through `{}`, which is not understood"
    BROKEN = "a graph break lies within attention: its scores {}"
    FLEX = "flex_attention's {} is not understood: it computes `{}`"
    WEIGHTS_USED = "the attention weights are used by `{}` as well"
    MASK = "the mask does not broadcast to (batch, heads, query tokens, keys): {}"
    NO_CACHE = "the keys are computed in this graph ({}), not read from a cache"
    LATENT = "the keys are expanded at each step from a cached latent of {} numbers per token: {}"
    OPAQUE_VIEW = "the way from the cache to the keys runs through `{}`, which is not understood"
    WRITE = "the cache is written by `{}` in a form that cannot be mirrored: {}"
    CACHE_LEAVES = "the appended keys leave the graph as something else than the cache: {}"
    GRAD = "gradients are recorded here: decode under torch.no_grad() or torch.inference_mode()"
    SHORT_CACHE = "the cache holds {} keys, which never exceeds min_context={}: dense by plan"
    LAYER_OFF = "left out by layers={}"
    NO_BASIS = "no basis: {}"
    SHARED_TENSOR = "one tensor {} holds more than this layer's keys"
    NON_CONTIGUOUS_HEAD_DIM = "head_dim is not the last dimension of the cache: {}"


@dataclass(frozen=True)
class Skipped:
    """An attention core that stays as it was, and why."""

    node: fx.Node
    reason: Reason
    details: tuple[Any, ...] = ()
    path: str = ""

    @property
    def by_plan(self) -> bool:
        """Dense because that is the better choice, not because something was not understood."""
        return self.reason in (Reason.PREFILL, Reason.SHORT_CACHE, Reason.LAYER_OFF)

    def sentence(self) -> str:
        return self.reason.value.format(*self.details)


@dataclass(frozen=True)
class Heads:
    """Keys or values behind views: `base` permuted by `order` is (B, Hkv, T, head_dim).

    `order` lists, for each of those four, the dimension of `base`, or -1 where `base` has no
    head dimension because there is one KV head. Every KV head serves `group` query heads: query
    head h reads KV head h // group, or h % Hkv where `tiled`. The core multiplies all numbers
    of `base` with `factor`, which is positive.
    """

    base: fx.Node
    order: tuple[int, int, int, int]
    group: int
    tiled: bool = False
    factor: float = 1.0


# What each dimension of a tensor of attention holds, outermost first: "b" batch, "h" heads, "s" new
# tokens, "t" cached tokens, "d" head_dim. Where each KV head's group of query heads has a dimension
# of its own, that is "g", and "h" are the KV heads. "bh" is batch and heads in one dimension, "" a
# dimension of size one; a letter that is missing everywhere has size one, too.
Layout = tuple[str, ...]
SCORES: Layout = ("b", "h", "s", "t")
QUERIES: Layout = ("b", "h", "s", "d")


@dataclass(frozen=True)
class MaskRule:
    """A mask as a graph that says of one key whether it is visible, given the numbers of batch,
    query head, query and key, and `operands`.

    `name` is the submodule that holds the graph; it may be asked about all keys at once, with
    numbers that broadcast. `per_head`: what it says depends on the query head.
    """

    name: str
    operands: tuple[Any, ...]
    per_head: bool


@dataclass(frozen=True)
class MaskTerm:
    """What a mask does to the scores: a bool `node` sets them to `fill` where it is False (where it
    is True if `inverted`), a floating one is added; `factor` multiplies `fill` or what is added.

    A finite fill differs from -inf in rows that see no key: there it gives the mean of all values.
    What a floating node adds is at least `floor`, before the factor. `layout` is that of the scores
    that `node` is applied to, its last dimensions being theirs; `per_row` says that it adds the
    same to all keys of a row. With a `rule` the mask is not in the graph yet: `node` is the call
    that applies the rule.
    """

    node: fx.Node
    factor: float = 1.0
    inverted: bool = False
    fill: float = float("-inf")
    floor: float = float("-inf")
    layout: Layout = SCORES
    per_row: bool = False
    rule: MaskRule | None = None

    def varies(self, letter: str) -> bool:
        """Whether the mask differs along a dimension; True where its size is not a constant."""
        if self.rule is not None:
            return letter != "h" or self.rule.per_head
        held = reversed(self.layout)
        sizes = reversed(shape_of(self.node) or ())
        return any(
            letter in letters and concrete(size) != 1
            for letters, size in zip(held, sizes, strict=False)
        )


@dataclass(frozen=True)
class Core:
    """An attention core in its one form, before its operands are looked into.

    `key` permuted by `key_order` is (B, heads, T, D), `value` by `value_order` (B, heads, T, Dv);
    -1 stands for heads that have no dimension. `query` is laid out by `query_layout`, and what
    `node` returns by `out_layout`, "d" being Dv there. `scale` None means 1 / sqrt(D); `grouped`
    lets fewer KV heads than query heads stand for blocks of them; `causal` masks by position.
    `reads` names calls that read an operand before `node`: (operand, call). `beside` has queries,
    laid out as `query`, keys and their order of a second product, which is added to the first.
    `row_sinks`, `nan_rows` and `query_scales` are as in `AttentionSite`.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    masks: tuple[MaskTerm, ...]
    scale: float | None
    key_order: tuple[int, int, int, int] = (0, 1, 2, 3)
    value_order: tuple[int, int, int, int] = (0, 1, 2, 3)
    softcap: float = 0.0
    sinks: fx.Node | None = None
    row_sinks: bool = False
    nan_rows: bool = False
    reads: tuple[tuple[fx.Node, fx.Node], ...] = ()
    causal: bool = False
    grouped: bool = False
    query_scales: tuple[tuple[Callable[..., Any], fx.Node], ...] = ()
    query_layout: Layout = QUERIES
    out_layout: Layout = QUERIES
    beside: tuple[fx.Node, fx.Node, tuple[int, int, int, int]] | None = None


@dataclass(frozen=True)
class HeadMaps:
    """The heads' parts of one linear map: dim d of head h is row `start + block * h + inside + d`
    of `weight` (rows, latent dims), or that column where `columns`; `dims` of them per head."""

    weight: fx.Node
    columns: bool
    start: int
    block: int
    inside: int
    dims: int


@dataclass(frozen=True)
class Latent:
    """How a site's cached rows become keys and values, by linear maps of each head.

    A row is the latent and, behind it, `rest`: what all heads take as it is. That lies in a tensor
    of its own, or in the latent's (`rest` None; then the latent begins at dim `at` of a row), or
    does not exist (`kept` 0). Of a query's dims, the `keys.dims` from `absorbed_at` meet what is
    expanded from the latent, the `kept` from `kept_at` meet the rest. `fills` are the calls that
    put expanded keys together. Where the model itself absorbs the maps, both are None: queries meet
    the rows as they are, and weighted latents are what the core returns.
    """

    keys: HeadMaps | None
    values: HeadMaps | None
    dims: int
    absorbed_at: int
    kept_at: int
    kept: int
    rest: Heads | None
    at: int = 0
    fills: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class AttentionSite:
    """One attention core: `node` computes softmax(scale * q k^T + masks) v, laid out by
    `out_layout`, from `query`, laid out by `query_layout`; "g" has the size `apart` in them, and
    query heads are "h" and "g" together.

    With `softcap` c the scores are c * tanh(scale * q k^T / c); `sinks` (Hq,) are logits that
    take part in the softmax and have no value. With `row_sinks` each row has a sink logit of its
    own: it is subtracted from the scores by a mask that is `per_row`, and is 0 then. A row whose
    keys are all masked with -inf is NaN with `nan_rows`, else zero. `sdpa` says
    that the core is the SDPA call itself. `query_tokens` is S, or -1 where each call has its own
    (`tokens`). `tiled`: query head h reads KV head h % Hkv instead of
    h // group. `query_scales`: tensors of one number that the scores are multiplied with
    (`operator.mul`) or divided by (`operator.truediv`) beside `scale`. With `latent`, one KV head
    of cached rows stands for the keys that the core reads: `key` and `value` are the rows (without
    their `rest`), `head_dim` is that of a whole row and `value_dim` that of the latent. Then the
    dims of queries that meet the rest may be a tensor of their own, `query_rest`.
    """

    node: fx.Node
    query: fx.Node
    key: Heads
    value: Heads
    masks: tuple[MaskTerm, ...]
    scale: float
    query_heads: int
    kv_heads: int
    query_tokens: int
    head_dim: int
    value_dim: int
    path: str
    group: int = 1
    tiled: bool = False
    softcap: float = 0.0
    sinks: fx.Node | None = None
    row_sinks: bool = False
    nan_rows: bool = False
    sdpa: bool = True
    query_scales: tuple[tuple[Callable[..., Any], fx.Node], ...] = ()
    latent: Latent | None = None
    query_rest: fx.Node | None = None
    query_layout: Layout = QUERIES
    out_layout: Layout = QUERIES
    apart: int = 1

    @property
    def tokens(self) -> Any:
        """S, which may be a symbol."""
        return dict(zip(self.query_layout, shape_of(self.query) or (), strict=True)).get("s", 1)


def find_sites(
    graph: fx.Graph, *, max_query_tokens: int | None = MAX_QUERY_TOKENS
) -> tuple[list[AttentionSite], list[Skipped]]:
    """Every attention core of the graph, in order, as a site or with a reason.

    Cores with more than `max_query_tokens`, now or when they were traced, are skipped as prefill;
    None takes any number, and cores with `is_causal=True` as well: calibration observes prefills.
    """
    from loki_compile.passes.chains import chain_core, scores_that_leave
    from loki_compile.passes.flex import flex_core

    sites: list[AttentionSite] = []
    skipped: list[Skipped] = []
    writes = writes_of(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        name = op_name(node)
        core: Core | Skipped | None = None
        if name == "scaled_dot_product_attention":
            core = _sdpa_core(node)
        elif name == "softmax":
            core = chain_core(node)
        elif name == "flex_attention":
            core = flex_core(node)
        if core is None:
            continue
        found: AttentionSite | Skipped
        if isinstance(core, Skipped):
            found = core
        else:
            before = [write for write in writes if write.position < order[core.node]]
            late = _written_after_reading(core, before, order)
            found = late or _site(core, max_query_tokens, before)
        if isinstance(found, AttentionSite):
            sites.append(found)
        else:
            skipped.append(found)
    skipped += scores_that_leave(graph)
    return sites, skipped


def _written_after_reading(
    core: Core, writes: list[Write], order: dict[fx.Node, int]
) -> Skipped | None:
    """Refuses a core whose operands change between the call that reads them and its last one.

    The ops read all of them at the core's node, where attention written out reads its values.
    """
    for operand_, reader in core.reads:
        for write in writes:
            if write.position > order[reader] and may_overlap(write.operand, operand_):
                details = (f"a write by `{op_name(write.call)}` after its operand was read",)
                return Skipped(core.node, Reason.SOFTMAX, details, module_path(core.node))
    return None


def _sdpa_core(node: fx.Node) -> Core | Skipped:
    def skip(reason: Reason, *details: Any) -> Skipped:
        return Skipped(node, reason, details, module_path(node))

    if operand(node, "dropout_p", 0.0) != 0.0:
        return skip(Reason.DROPOUT, operand(node, "dropout_p"))
    scale, mask = operand(node, "scale", None), operand(node, "attn_mask", None)
    if isinstance(scale, fx.Node):
        return skip(Reason.SCALE, scale.name)
    shape = shape_of(operand(node, "query"))
    if operand(node, "is_causal", False) and shape is not None and concrete(shape[-2]) == 1:
        return skip(Reason.CAUSAL_FLAG)
    return Core(
        node=node,
        query=operand(node, "query"),
        key=operand(node, "key"),
        value=operand(node, "value"),
        masks=() if mask is None else (MaskTerm(mask),),
        scale=scale,
        causal=bool(operand(node, "is_causal", False)),
        grouped=bool(operand(node, "enable_gqa", False)),
    )


def _site(core: Core, max_query_tokens: int | None, writes: list[Write]) -> AttentionSite | Skipped:
    def skip(reason: Reason, *details: Any) -> Skipped:
        return Skipped(core.node, reason, details, module_path(core.node))

    shapes = [shape_of(x) for x in (core.query, core.key, core.value)]
    orders = (core.query_layout, core.key_order, core.value_order)
    if any(
        shape is None or len(shape) != len(order) - order.count(-1)  # type: ignore[arg-type]
        for shape, order in zip(shapes, orders, strict=True)
    ):
        return skip(Reason.LAYOUT, [None if s is None else tuple(s) for s in shapes])
    sizes = dict(zip(core.query_layout, shapes[0] or (), strict=True))
    b, h, g, s, d = (sizes.get(letter, 1) for letter in "bhgsd")
    q_shape = (b, h * g, s, d)
    k_shape, v_shape = (
        tuple(1 if d < 0 or shape is None else shape[d] for d in order)
        for shape, order in zip(shapes[1:], (core.key_order, core.value_order), strict=True)
    )
    query_tokens = concrete(q_shape[2])
    if max_query_tokens is not None:
        seen = hint_of(q_shape[2])
        if seen is None or seen > max_query_tokens:
            return skip(Reason.PREFILL, q_shape[2])
        if core.causal:
            return skip(Reason.PREFILL, query_tokens)
    key = _heads_at(core.key, core.key_order, core, writes, scaled=True)
    # Values that are repeated more often than keys stay so: a copy of them is what is attended to.
    value = _heads_at(core.value, core.value_order, core, writes, most=key.group)
    query = _narrow(core.query)
    scales = [by for _, by in core.query_scales]
    dtypes = {fake_value(x).dtype for x in (query, key.base, value.base, core.node, *scales)}
    if not dtypes <= _FLOATS:
        return skip(Reason.DTYPE, ", ".join(sorted(map(str, dtypes))))
    heads, head_dim = concrete(q_shape[1]), concrete(q_shape[3])
    kv_heads, value_dim = concrete(k_shape[1]), concrete(v_shape[3])
    apart = concrete(g)
    if heads is None or head_dim is None or apart is None or kv_heads is None or value_dim is None:
        return skip(Reason.LAYOUT, [q_shape, k_shape, v_shape])
    if not same_size(q_shape[0], k_shape[0]) or not same_size(q_shape[0], v_shape[0]):
        return skip(Reason.LAYOUT, f"batch {[s[0] for s in (q_shape, k_shape, v_shape)]}")
    # K may already be grouped by views (`repeat_kv`), by the flag, by a dimension of its own, or by
    # broadcasting one head.
    by_flag = heads // kv_heads if kv_heads and heads % kv_heads == 0 else 0
    spread = by_flag > apart and kv_heads > 1 and not core.grouped
    if by_flag < apart or by_flag < 1 or spread:
        return skip(Reason.GROUPS, f"{heads} query heads, {kv_heads} KV heads")
    alike = (key.group, key.tiled) == (value.group, value.tiled)
    if not same_size(k_shape[1], v_shape[1]) or not alike:
        return skip(Reason.GROUPS, "keys and values are repeated differently")
    if key.tiled and by_flag > 1:
        return skip(Reason.GROUPS, "KV heads are repeated as tiles of blocks")
    if key.tiled and max_query_tokens is None:  # whoever observes heads takes them to be in blocks
        return skip(Reason.GROUPS, "KV heads are repeated as tiles")
    sizes = {"b": b, "h": h, "g": g, "s": s, "t": k_shape[2]}
    for term in core.masks:
        if not _broadcasts(term, sizes):
            return skip(Reason.MASK, tuple(shape_of(term.node) or ()))
    if core.row_sinks and all(term.per_row for term in core.masks):
        return skip(Reason.SOFTMAX, "cat")  # no mask says which keys the sink is subtracted for
    group = by_flag * key.group
    query_rest, latent = None, None
    if core.beside is not None:
        rows = _rows_beside(core, (query, key), value, writes)
        if rows is None or kv_heads != 1 or value_dim != rows[3].dims:
            return skip(Reason.SOFTMAX, "add")
        query, key, query_rest, latent = rows
        head_dim = latent.dims + latent.kept
    return AttentionSite(
        node=core.node,
        query=query,
        key=key,
        value=value,
        masks=core.masks,
        scale=(head_dim**-0.5 if core.scale is None else float(core.scale)) * key.factor,
        query_heads=heads,
        kv_heads=heads // group,
        query_tokens=-1 if query_tokens is None else query_tokens,
        head_dim=head_dim,
        value_dim=value_dim,
        path=module_path(core.node),
        group=group,
        tiled=key.tiled,
        softcap=core.softcap,
        sinks=core.sinks,
        row_sinks=core.row_sinks,
        nan_rows=core.nan_rows,
        sdpa=op_name(core.node) == "scaled_dot_product_attention",
        query_scales=core.query_scales,
        latent=latent,
        query_rest=query_rest,
        query_layout=core.query_layout,
        out_layout=core.out_layout,
        apart=apart,
    )


def _rows_beside(
    core: Core, first: tuple[fx.Node, Heads], value: Heads, writes: list[Write]
) -> tuple[fx.Node, Heads, fx.Node, Latent] | None:
    """Queries and rows of a latent that is the values too, and queries and rows of what lies beside
    it, for a core of two products; None where their keys are no such rows of the same tokens."""
    assert core.beside is not None
    query, key, order = core.beside
    pairs = [first, (_narrow(query), _heads_at(key, order, core, writes, scaled=True))]
    if pairs[0][1].base is not value.base:
        pairs.reverse()
    (query, key_), (query_rest, rest) = pairs
    if (key_.base, key_.order) != (value.base, value.order):
        return None
    if any(heads.group != 1 or heads.factor != 1.0 or heads.tiled for heads in (key_, rest)):
        return None
    shapes = [_ordered_shape(heads) for heads in (key_, rest)]
    dims, kept = concrete(shapes[0][3]), concrete(shapes[1][3])
    alike = all(map(same_size, shapes[0][:3], shapes[1][:3]))
    dtypes = {fake_value(x).dtype for x in (query, query_rest, key_.base, rest.base)}
    if not alike or concrete(shapes[0][1]) != 1 or dims is None or kept is None or len(dtypes) > 1:
        return None
    return query, key_, query_rest, Latent(None, None, dims, 0, dims, kept, rest)


def _ordered_shape(heads: Heads) -> tuple[Any, ...]:
    shape = shape_of(heads.base) or ()
    return tuple(1 if dim < 0 else shape[dim] for dim in heads.order)


def _broadcasts(term: MaskTerm, sizes: dict[str, Any]) -> bool:
    if term.rule is not None:
        return True
    mask, shape = term.node, shape_of(term.node)
    if shape is None or not 1 <= len(shape) <= len(term.layout):
        return False
    dtype = fake_value(mask).dtype
    if not (dtype == torch.bool or dtype.is_floating_point):
        return False
    for size, letters in zip(reversed(shape), reversed(term.layout), strict=False):
        target = math.prod(sizes[letter] for letter in letters)
        if "t" in letters and concrete(size) == 1 and concrete(target) != 1 and not term.per_row:
            return False  # a mask that broadcasts over keys says nothing per key
        # Keys and mask may name the same length by different symbols: the op compares real sizes.
        if concrete(size) != 1 and letters != "t" and not same_size(size, target):
            return False
        if "b" in letters and "t" in letters and concrete(size) != 1:
            return False
    # The key dimension must be whole.
    return any("t" in letters for letters in term.layout[-len(shape) :])


def _heads_at(
    node: fx.Node,
    at: tuple[int, int, int, int],
    core: Core,
    writes: list[Write],
    most: int | None = None,
    scaled: bool = False,
) -> Heads:
    """`heads_of`, unless what lies behind may be written into before the core reads it.

    A repetition or `contiguous` copies: it holds the cache as it was at that point. In attention
    written out the keys are read by the first product, which lies before the core's node.
    """
    heads = heads_of(node, at, most, scaled)
    written = [write for write in writes if may_overlap(write.operand, heads.base)]
    if not written:
        return heads
    frozen = [node] if op_name(core.node) != "scaled_dot_product_attention" else []
    walked = node
    while walked is not heads.base:
        if not may_overlap(walked, heads.base):
            frozen.append(walked)
        walked = walked.all_input_nodes[0]
    order = {n: i for i, n in enumerate(core.node.graph.nodes)}
    if frozen and any(write.position > min(order[n] for n in frozen) for write in written):
        return Heads(node, at, 1)
    return heads


def heads_of(
    node: fx.Node,
    at: tuple[int, int, int, int] = (0, 1, 2, 3),
    most: int | None = None,
    scaled: bool = False,
) -> Heads:
    """Walks from a core's K or V operand back through permutations and head repetition.

    Stops at the first node that is neither; `base` is that node. The views it understands are
    transposes, permutations, casts between floating dtypes, a repetition of each KV head in place
    (`repeat_kv` by expand and reshape, `repeat_interleave`, an expand of one head), one of all KV
    heads behind each other (`repeat`, or expand and reshape) and copies that keep the values. `at`
    says which dimension of `node` is batch, head, token and head_dim; `most` is the largest
    repetition to look behind. `scaled` says to look behind a product with a positive number too.
    """
    base, order, group, tiled, number = node, list(at), 1, False, 1.0
    while True:
        times = _times(base) if scaled else None
        if times is not None:
            base, number = times[0], number * times[1]
            continue
        step, tiles = _through(base, order), False
        if step is None and group == 1:
            step, tiles = _through_tiles(base, order), True
        beyond = step is not None and most is not None and group * step[2] > most
        if step is None or beyond or (tiled and step[2] > 1):
            return Heads(base, (order[0], order[1], order[2], order[3]), group, tiled, number)
        one_head = order[1] >= 0 and concrete((shape_of(step[0]) or ())[step[1][1]]) == 1
        tiled = tiled or (tiles and not one_head)
        base, order, factor = step
        group *= factor


def _times(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor and the positive number that the call multiplies it with, by `mul` or `div`."""
    name, divides = op_name(node), op_name(node) in ("div", "truediv", "__truediv__")
    if not divides and name not in ("mul", "__mul__", "__rmul__"):
        return None
    if node.kwargs or len(node.args) != 2:
        return None
    tensor, number = node.args
    if not divides and isinstance(number, fx.Node):
        tensor, number = number, tensor
    if not isinstance(tensor, fx.Node) or isinstance(number, bool):
        return None
    if not isinstance(number, (int, float)) or not 0 < number < math.inf:
        return None
    before, after = fake_value(tensor), fake_value(node)
    if not isinstance(before, torch.Tensor) or before.dtype != after.dtype:
        return None
    return tensor, 1 / number if divides else float(number)


def folds(node: fx.Node, at: int) -> bool:
    """Whether the call makes one dimension, `at`, of two of a 4-D tensor: (B * H, x, y), or
    (x, B * H, y)."""
    apart, folded = shape_of(node.args[0]) if node.args else None, shape_of(node)
    if op_name(node) not in ("reshape", "flatten") or at > 1:
        return False
    if apart is None or folded is None or len(apart) != 4 or len(folded) != 3:
        return False
    expected = (*apart[:at], apart[at] * apart[at + 1], *apart[at + 2 :])
    return all(same_size(a, b) for a, b in zip(expected, folded, strict=True))


def before_fold(
    node: fx.Node, at: tuple[int, int, int]
) -> tuple[fx.Node, tuple[int, int, int, int], fx.Node] | None:
    """From a 3-D operand of a batched product back to its 4-D self.

    at: the dimensions of `node` that are batch and heads in one, tokens, head_dim. Returns the 4-D
    node, its dimensions of batch, heads, tokens, head_dim, and the call that folds it.
    """
    order = list(at)
    while node.args and isinstance(node.args[0], fx.Node):
        name, source = op_name(node), node.args[0]
        fold, tokens, last = order
        if folds(node, fold):
            return source, (fold, fold + 1, tokens + (tokens > fold), last + (last > fold)), node
        if name in ("transpose", "permute", "movedim"):
            back = permutation(node)
            order = [back[d] for d in order]
        elif name not in ("contiguous", "detach", "alias") and not (
            name in ("to", "float") and widens(node)
        ):
            return None
        node = source
    return None


def _through(node: fx.Node, order: list[int]) -> tuple[fx.Node, list[int], int] | None:
    """One view back: the node before it, the order on that node, the repetition it adds."""
    name = op_name(node)
    if name in ("transpose", "permute", "movedim", "contiguous", "detach", "alias", "to", "float"):
        source = node.args[0]
        if not isinstance(source, fx.Node) or shape_of(source) is None:
            return None
        if name in ("contiguous", "detach", "alias"):
            return source, order, 1
        if name in ("to", "float"):
            return (source, order, 1) if _recasts(node) else None
        back = permutation(node)
        return source, [back[d] if d >= 0 else d for d in order], 1
    if name == "repeat_interleave":
        source, repeats = node.args[0], operand(node, "repeats")
        dim = operand(node, "dim")
        if isinstance(source, fx.Node) and isinstance(repeats, int) and isinstance(dim, int):
            rank = len(shape_of(source) or ())
            return (source, order, repeats) if dim % rank == order[1] else None
        return None
    if name in ("unsqueeze", "getitem"):
        return _through_new_head(node, order)
    if name == "expand":
        source = node.args[0]
        return _expanded_head(node, source, order) if isinstance(source, fx.Node) else None
    if name in ("reshape", "flatten"):
        return _through_repeat(node, order, new=order[1] + 1)
    return None


def _through_tiles(node: fx.Node, order: list[int]) -> tuple[fx.Node, list[int], int] | None:
    """One view back from all KV heads, repeated behind each other: like `_through`."""
    if op_name(node) in ("reshape", "flatten"):
        return _through_repeat(node, order, new=order[1])
    if op_name(node) != "repeat" or node.kwargs or order[1] < 0:
        return None
    source, times = node.args[0], node.args[1:]
    if len(times) == 1 and isinstance(times[0], (list, tuple)):
        times = tuple(times[0])
    rank = len(shape_of(source) or ())
    if not isinstance(source, fx.Node) or len(times) != rank:
        return None
    if any(n != 1 for dim, n in enumerate(times) if dim != order[1]):
        return None
    factor = times[order[1]]
    return (source, order, factor) if isinstance(factor, int) and factor > 0 else None


def widens(node: fx.Node) -> bool:
    """Whether a cast on one device keeps the dtype or makes it float32, which no value notices.

    The ops compute in float32 whatever they are given: a product of widened operands is theirs.
    """
    before, after = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
    wider = after.dtype == torch.float32 and before.dtype in (torch.float16, torch.bfloat16)
    return before.device == after.device and (wider or before.dtype == after.dtype)


def _recasts(node: fx.Node) -> bool:
    """Whether a cast on one device leads from one floating dtype to another.

    The ops read a cache as it is stored. A cast that narrows it loses what they do not lose.
    """
    before, after = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
    floating = before.dtype.is_floating_point and after.dtype.is_floating_point
    return before.device == after.device and floating


def _narrow(query: fx.Node) -> fx.Node:
    """The queries before a cast that only widens them."""
    while op_name(query) in ("to", "float") and widens(query):
        query = query.args[0]  # type: ignore[assignment]
    return query


def permutation(node: fx.Node) -> list[int]:
    """For a transpose, permute or movedim: which dimension of the input each output one is."""
    rank = len(shape_of(node) or ())
    name = op_name(node)
    if name == "transpose":
        a, b = operand(node, "dim0") % rank, operand(node, "dim1") % rank
        back = list(range(rank))
        back[a], back[b] = b, a
        return back
    if name == "permute":
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dims")
        return [d % rank for d in dims]
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    moved = torch.movedim(probe, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    return [size - 2 for size in moved.shape]


def _through_new_head(node: fx.Node, order: list[int]) -> tuple[fx.Node, list[int], int] | None:
    """`k.unsqueeze(1)` or `k[:, None]` that makes the head dimension of a single KV head."""
    source = node.args[0]
    rank = len(shape_of(node) or ())
    if not isinstance(source, fx.Node) or order[1] < 0:
        return None
    if op_name(node) == "unsqueeze":
        new = operand(node, "dim") % rank
    else:
        index = node.args[1]
        if not isinstance(index, tuple) or index.count(None) != 1:
            return None
        if any(i is not None and i != slice(None) for i in index):
            return None
        new = index.index(None)
    if new != order[1]:
        return None
    return source, [-1 if d == new else d - (d > new) for d in order], 1


def _expanded_head(
    node: fx.Node, source: fx.Node, order: list[int]
) -> tuple[fx.Node, list[int], int] | None:
    """One KV head expanded to all query heads; no other dimension may grow."""
    before, after = shape_of(source), shape_of(node)
    if before is None or after is None or len(before) != len(after) or order[1] < 0:
        return None
    factor = 1
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        if same_size(old, new):
            continue
        times = concrete(new)
        if dim != order[1] or concrete(old) != 1 or times is None:
            return None
        factor = times
    return source, order, factor


def _through_repeat(
    node: fx.Node, order: list[int], *, new: int
) -> tuple[fx.Node, list[int], int] | None:
    """`repeat_kv`: a new dimension beside the heads, expanded to the group, folded into them.

    new: its place; behind the heads it makes blocks, in front of them tiles.
    """
    if order[1] < 0:
        return None
    expand = node.args[0]
    if not isinstance(expand, fx.Node) or op_name(expand) != "expand":
        return None
    grown = expand.args[0]
    if not isinstance(grown, fx.Node) or op_name(grown) not in ("unsqueeze", "getitem"):
        return None
    source = grown.args[0]
    if not isinstance(source, fx.Node):
        return None
    head, base, wide, out = order[1], shape_of(source), shape_of(expand), shape_of(node)
    if base is None or wide is None or out is None or len(base) != 4 or len(wide) != 5:
        return None
    group, kv_heads = concrete(wide[new]), concrete(base[head])
    thin = shape_of(grown)
    if group is None or kv_heads is None or thin is None or concrete(thin[new]) != 1:
        return None
    if concrete(out[head]) != group * kv_heads:
        return None
    for dim in range(4):
        if dim != head and not same_size(base[dim], out[dim]):
            return None
        if not same_size(wide[dim + (dim >= new)], base[dim]):
            return None
    if not only_adds_dim(grown, new):
        return None
    return source, order, group


def only_adds_dim(node: fx.Node, dim: int) -> bool:
    """Whether the view does nothing but insert a dimension of size one at `dim`."""
    if op_name(node) == "unsqueeze":
        return operand(node, "dim") % len(shape_of(node) or (0,)) == dim
    index = node.args[1]
    if not isinstance(index, tuple):
        return False
    return (
        index.count(None) == 1
        and index.index(None) == dim
        and all(i is None or i == slice(None) for i in index)
    )
