"""The vocabulary: what an attention core is, what it reads, and why one stays dense.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, S new tokens, T cached tokens,
D head_dim of queries and keys, Dv head_dim of values.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loki_compile.kernels.fused import QUERIES, SCORES, Layout
from loki_compile.passes.calls import concrete, op_name, shape_of
from torch import fx

# More new tokens than this in one call are a prefill: each query would choose for itself.
MAX_QUERY_TOKENS = 8


class Reason(enum.Enum):
    """Why a core stays dense; the value is the sentence a user reads, `{}` takes the details."""

    DROPOUT = "dropout is on ({}): run the model in eval() mode"
    CAUSAL_FLAG = "is_causal=True lets a single query token see the first key only; kept as it is"
    LAYOUT = "which dimensions are batch, heads, tokens and head_dim cannot be told: {}"
    GROUPS = "query heads do not map onto KV heads in groups: {}"
    PREFILL = "prefill ({} query tokens; up to 8 are rewritten): dense by plan"
    PREFILL_SPANS = "prefill ({} query tokens), which reads spans where its mask is causal: {}"
    PREFILL_DENSE = 'prefill ({} query tokens), dense under prefill="spans": {}'
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
    TRANSFORM = "it is computed inside a transform of torch.func, such as vmap: {}"
    GRAD = "gradients are recorded here: decode under torch.no_grad() or torch.inference_mode()"
    SHORT_CACHE = "the cache holds {} keys, which never exceeds min_context={}: dense by plan"
    LAYER_OFF = "left out by layers={}"
    READS_ALL = "its policy has it read all keys: dense by plan"
    POLICY = "the policy {!r} cannot serve it: {}"
    NO_BASIS = "no basis: {}"
    SHARED_TENSOR = "one tensor {} holds more than this layer's keys"
    NON_CONTIGUOUS_HEAD_DIM = "head_dim is not the last dimension of the cache: {}"


PREFILLS = (Reason.PREFILL, Reason.PREFILL_SPANS, Reason.PREFILL_DENSE)


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
        return self.reason in (
            *PREFILLS,
            Reason.SHORT_CACHE,
            Reason.LAYER_OFF,
            Reason.READS_ALL,
        )

    def sentence(self) -> str:
        return self.reason.value.format(*self.details)


class No(Exception):
    """Why what is looked at is no site, or has no cache that can be kept track of: a `Reason` and
    its details. Raised and caught within a stage of analysis."""

    def skipped(self, node: fx.Node, path: str) -> Skipped:
        reason, *details = self.args
        return Skipped(node, reason, tuple(details), path)


@dataclass(frozen=True)
class Heads:
    """Keys or values behind views: `base` permuted by `order` is (B, Hkv, T, head_dim).

    `order` lists, for each of those four, the dimension of `base`, or -1 where `base` has no
    head dimension because there is one KV head. Every KV head serves `group` query heads: query
    head h reads KV head h // group, or h % Hkv where `interleaved`. The core multiplies all numbers
    of `base` with `factor`, which is positive.
    """

    base: fx.Node
    order: tuple[int, int, int, int]
    group: int
    interleaved: bool = False
    factor: float = 1.0


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
    `reads` names calls that read an operand before `node`: (operand, call). `second_product` has
    queries, laid out as `query`, keys and their order of one that is added to the first.

    With `softcap` c the scores are c * tanh(scale * q k^T / c); `sink_logits` (Hq,) are logits that
    take part in the softmax and have no value. With `row_sinks` each row has a sink logit of its
    own: it is subtracted from the scores by a mask that is `per_row`, and is 0 then. A row whose
    keys are all masked with -inf is NaN with `nan_if_fully_masked`, else zero. `query_scales`:
    tensors of one number that the scores are multiplied with (`operator.mul`) or divided by
    (`operator.truediv`) beside `scale`.
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
    sink_logits: fx.Node | None = None
    row_sinks: bool = False
    nan_if_fully_masked: bool = False
    reads: tuple[tuple[fx.Node, fx.Node], ...] = ()
    causal: bool = False
    grouped: bool = False
    query_scales: tuple[tuple[Callable[..., Any], fx.Node], ...] = ()
    query_layout: Layout = QUERIES
    out_layout: Layout = QUERIES
    second_product: tuple[fx.Node, fx.Node, tuple[int, int, int, int]] | None = None


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

    @property
    def numbers(self) -> tuple[bool, int, int, int, int]:
        """Where the maps lie in the weight, as `kernels.fused` takes it."""
        return self.columns, self.start, self.block, self.inside, self.dims


@dataclass(frozen=True)
class Latent:
    """How a site's cached rows become keys and values, by linear maps of each head.

    A row is the latent, `kv_lora_rank` dims of it, and beside it the `k_pe_dims` that all heads
    take as they are: in models, the decoupled rotary key. Those lie in a tensor of their own,
    `k_pe`, or in the latent's (`k_pe` None; then the latent begins at dim `at` of a row), or do not
    exist (`k_pe_dims` 0). Of a query's dims, the `keys.dims` from `absorbed_at` meet what is
    expanded from the latent, the `k_pe_dims` from `k_pe_at` meet those. Where the model itself
    absorbs the maps, `keys` and `values` are None: queries meet the rows as they are, and weighted
    latents are what the core returns.
    """

    keys: HeadMaps | None
    values: HeadMaps | None
    kv_lora_rank: int
    absorbed_at: int
    k_pe_at: int
    k_pe_dims: int
    k_pe: Heads | None
    at: int = 0

    @property
    def absorption(self) -> tuple[tuple[bool, int, int, int, int], int, tuple[int, int], bool]:
        """What `absorbed_queries` is told beside queries and the weight of `keys`."""
        assert self.keys is not None
        return self.keys.numbers, self.absorbed_at, (self.k_pe_at, self.k_pe_dims), self.at == 0


@dataclass(frozen=True)
class AttentionSite:
    """One attention core whose operands were looked into: `core.node` computes
    softmax(scale * q k^T + masks) v from `query`, laid out as the core's; "g" has the size
    `group_dim` in layouts, and query heads are "h" and "g" together.

    `query_tokens` is S, or -1 where each call has its own (`tokens`). Query head h reads KV head
    h // group, or h % Hkv where `interleaved`. With `latent`, one KV head of cached rows stands
    for the keys that the core reads: `key` and `value` are the rows (without their `k_pe`),
    `head_dim` is that of a whole row and `value_dim` that of the latent. Then the dims of queries
    that meet `k_pe` may be a tensor of their own, `q_pe`.
    """

    core: Core
    query: fx.Node
    key: Heads
    value: Heads
    scale: float
    query_heads: int
    kv_heads: int
    query_tokens: int
    head_dim: int
    value_dim: int
    path: str
    group: int = 1
    interleaved: bool = False
    latent: Latent | None = None
    q_pe: fx.Node | None = None
    group_dim: int = 1

    @property
    def node(self) -> fx.Node:
        return self.core.node

    @property
    def masks(self) -> tuple[MaskTerm, ...]:
        return self.core.masks

    @property
    def sdpa(self) -> bool:
        """Whether the core is the SDPA call itself."""
        return op_name(self.node) == "scaled_dot_product_attention"

    @property
    def tokens(self) -> Any:
        """S, which may be a symbol."""
        return dict(zip(self.core.query_layout, shape_of(self.query) or (), strict=True)).get(
            "s", 1
        )

    def layer(self, number: int) -> int:
        """The number of its layer; without a path it has its `number` among its graph's sites."""
        digits = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.path)
        return int(digits[1]) if digits else number

    def is_among(self, layers: Sequence[int | str], number: int) -> bool:
        """Whether one of `layers` names the site: by its `layer`'s number, or by a pattern
        (`fnmatch`) of its path."""
        layer = self.layer(number)
        return any(
            layer == pick if isinstance(pick, int) else fnmatch.fnmatch(self.path, pick)
            for pick in layers
        )
