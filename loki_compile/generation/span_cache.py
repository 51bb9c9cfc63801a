"""A cache of transformers that keeps, of each KV head, the keys that its span reads, and drops the
others: the memory that plans of spans save.

KV heads of one layer keep different numbers of keys, of different tokens, which no mask of a model
can say and no attention of PyTorch takes. So the cache hands a model no keys but a `Step`, and an
attention function that knows it, registered as transformers has it (`AttentionInterface`), reads
the rings by `loki::attention`, compiled or not. Whatever is not of such a cache goes to "sdpa".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from loki_compile.config import LokiConfig
from loki_compile.counts import tally_of_model
from loki_compile.generation.rings import Rings, slots_of_heads
from loki_compile.generation.span_plans import spans_of_layers
from loki_compile.kernels.ops import attention, unserved
from loki_compile.kernels.positions import visible_slots
from loki_compile.kernels.spans import Spans

ATTENTION = "loki_spans"
DROPPED = "what lies outside its spans is gone."


class SpanCache(Cache):
    """For `model.generate(..., past_key_values=SpanCache(model, "moa:64:0.25N", max_length=8192))`:
    each token reads what it reads under `policy="moa"` by the same plan over a full cache.

    A prompt attends to all of itself and is then dropped but for the spans. Behind it tokens come
    one at a time. Left padding, batches, sampling and beams are as with any cache.
    """

    def __init__(
        self, model: Any, plan: Any = "moa", *, max_length: int,
        min_context: int = 1024, sink: int = 4, recent: int = 32,
    ) -> None:  # fmt: skip
        """
        Args:
          model: of transformers, with attn_implementation="sdpa", which becomes "loki_spans": the
            same but for caches of this kind. Compiled or not, before or after.
          plan: as `policy=` of the backend, of spans alone: "moa" (the plan that is stored for the
            model), a word, a file, or a dict from layer numbers (and "*") to words and "dense".
          max_length: tokens that the cache is made for, prompt and new ones: spans that grow with
            the context have room for this one.
          min_context, sink, recent: as options of the backend. A row that sees fewer tokens than
            `min_context` reads all, so that every head has slots for as many.

        Raises:
          ValueError: no plan, one that may read any key or is of another model, layers that are
            no full attention, or an attention implementation that this one cannot stand in for.
        """
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
            raise ValueError(f"max_length={max_length!r}: needs a count of tokens >= 1.")
        options = LokiConfig(policy=plan, min_context=min_context, sink=sink, recent=recent)
        config = model.config.get_text_config(decoder=True)
        _require_full_attention(config)
        query_heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
        self._spans = spans_of_layers(
            model, options, config.num_hidden_layers, query_heads, kv_heads
        )
        self.max_length = max_length
        _attend_by_spans(model, config)
        super().__init__(layers=[SpanLayer(spans, max_length) for spans in self._spans])
        first: Any = self.layers[0]
        device = next(model.parameters()).device
        first.counted = Counted(tally_of_model(model).of_span_caches(device))

    @property
    def plan(self) -> tuple[Spans, ...]:
        """What the heads of each layer read."""
        return self._spans

    @plan.setter
    def plan(self, plan: Any) -> NoReturn:
        raise ValueError(
            "found another plan for a SpanCache; needed the one that it was made by, or a new "
            f"cache: {DROPPED}"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; 0 before the first tokens."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def share(self) -> float:
        """Of the slots of a full cache for `max_length` tokens, the share that this one has."""
        slots = [slots_of_heads(spans, self.max_length) for spans in self._spans]
        return sum(map(sum, slots)) / (self.max_length * sum(map(len, slots)))


class Counted:
    """The tensor that prompts and steps are counted in, (2,): that of the model, in copies of a
    cache too."""

    def __init__(self, calls: Tensor) -> None:
        self.calls = calls

    def __deepcopy__(self, memo: Any) -> Counted:
        return self


class SpanLayer(CacheLayerMixin):
    """One layer: keys (B, C, Dk) and values (B, C, Dv) of all KV heads, by `Rings`."""

    is_sliding = False
    why_not_rewound = DROPPED
    # From the first tokens on. A length that is a tensor makes one graph for all lengths; `hidden`
    # (B,) are the tokens of the prompt that its last one does not see.
    keys: Any
    values: Any
    cumulative_length: Tensor
    hidden: Tensor
    rings: Rings
    counted: Counted | None = None  # of the first layer

    def __init__(self, spans: Spans, max_length: int) -> None:
        super().__init__()
        self.spans = spans
        self.max_length = max_length

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values) if t is not None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads = key_states.shape[:2]
        if obstacle := unserved(self.device.type):
            raise ValueError(f"found a SpanCache on {self.device.type!r}: {obstacle}.")
        if heads != len(self.spans.heads):
            raise ValueError(
                f"found {heads} KV heads in this process, and a plan of {len(self.spans.heads)}: "
                "a SpanCache needs all heads of a layer in one process."
            )
        self.rings = Rings.of(self.spans, self.max_length, self.device)
        size = self.rings.size
        self.keys = key_states.new_empty((rows, size, key_states.shape[-1]))
        self.values = value_states.new_empty((rows, size, value_states.shape[-1]))
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.hidden = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """A `Step`, twice: what the layer holds cannot be told as keys of tokens in their order."""
        tokens = key_states.shape[-2]
        behind = self.is_initialized
        if behind and tokens != 1:
            raise ValueError(
                f"found {tokens} new tokens behind those of a SpanCache; needed one at a time, for "
                f"{DROPPED} Make a new cache for a longer prompt, or another turn."
            )
        if not behind:
            if tokens > self.max_length:
                raise ValueError(
                    f"found a prompt of {tokens} tokens for a SpanCache of max_length="
                    f"{self.max_length}; needed one that is as long as prompt and new tokens."
                )
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length.add_(tokens)
        if self.counted is not None:
            self.counted.calls[int(behind)].add_(1)
        step = Step(self, key_states, value_states, behind)
        return step, step

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Those of a prompt; a single token behind one needs no mask.
        return (self.max_length if self.is_initialized else query_length), 0

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"found crop({tokens_to_remove}) of a SpanCache; needed a cache that can be "
                f"rewound, such as DynamicCache: {DROPPED}"
            )

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(lambda x: x.repeat_interleave(repeats, dim=0))

    def _take(self, rows: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = rows(self.keys), rows(self.values)
            self.hidden = rows(self.hidden)

    def keep(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Of a prompt's keys (B, H, S, Dk) and values what spans of later tokens may read. The
        prompt's tokens are those that its last one sees by the mask (B or 1, 1, S, S)."""
        rows, _, tokens, _ = keys.shape
        newest = None if mask is None else mask[:, :, -1:, :tokens]
        slots = visible_slots(keys[:, :, -1:], keys, newest)[:, 0, 0].expand(rows, -1)
        count = slots[:, 0].long()
        self.hidden = tokens - count
        rank = self.rings.ranks(count)
        at = slots.gather(1, (rank + 1).clamp(min=1)).long() + self.rings.head * tokens
        at = at.unsqueeze(-1)
        for kept, given in ((self.keys, keys), (self.values, values)):
            kept.copy_(given.flatten(1, 2).gather(1, at.expand(-1, -1, given.shape[-1])))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention (B, Hq, 1, Dv) of one new token, whose key and value are kept first."""
        torch._assert_async(
            self.cumulative_length <= self.max_length,
            "found more tokens than the max_length of a SpanCache; needed one that is as long as "
            "prompt and new tokens.",
        )
        rows, heads = keys.shape[:2]
        count = self.cumulative_length - self.hidden
        at = self.rings.newest(count)
        at = (at + torch.arange(rows, device=at.device).unsqueeze(1) * self.rings.size).flatten()
        for kept, given in ((self.keys, keys), (self.values, values)):
            kept.view(-1, kept.shape[-1]).index_copy_(0, at, given.reshape(rows * heads, -1))
        # All heads are of one run of slots: each has its ranges there.
        of_heads = (
            kept.unsqueeze(1).expand(-1, heads, -1, -1) for kept in (self.keys, self.values)
        )
        return attention(query, *of_heads, None, scale=scale, ranges=self.rings.ranges(count))


@dataclass(frozen=True, repr=False)
class Step:
    """New keys (B, H, S, Dk) and values (B, H, S, Dv), and the layer that keeps what spans need of
    them; it has no tensor's attributes, which would be of keys that are not there."""

    layer: SpanLayer
    keys: Tensor
    values: Tensor
    behind: bool  # of other tokens

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(
            "found keys of a SpanCache in an attention that does not know it; needed the model's "
            f'attn_implementation="{ATTENTION}", which making the cache sets, and no code of its '
            "own between cache and attention."
        )


def attend_by_spans(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function as transformers has them: output (B, S, Hq, Dv)."""
    if not isinstance(key, Step):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
    step = key
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if more.get(name) is not None:
            raise ValueError(f"found attention with {name}; needed one without for a SpanCache.")
    if step.behind:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = step.layer.attend(query, step.keys, step.values, scale)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.shape[1] != 1:
        raise ValueError("found a mask of its own for each head; needed one mask for a SpanCache.")
    step.layer.keep(step.keys, step.values, attention_mask)
    return sdpa_attention_forward(
        module, query, step.keys, step.values, attention_mask, scaling=scaling, **more
    )


AttentionInterface.register(ATTENTION, attend_by_spans)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _require_full_attention(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) or getattr(
            config, "attention_chunk_size", None
        )
        kinds = ["sliding_attention" if sliding else "full_attention"]
    other = next((kind for kind in kinds if kind != "full_attention"), "")
    if other:
        raise ValueError(
            f"found a model with layers of {other}; needed full attention in all layers for a "
            "SpanCache."
        )


def _attend_by_spans(model: Any, config: Any) -> None:
    found = config._attn_implementation
    if found == ATTENTION:
        return
    if found != "sdpa":
        raise ValueError(
            f"found a model with attn_implementation={found!r}; needed 'sdpa' for a SpanCache, by "
            'model.set_attn_implementation("sdpa").'
        )
    model.set_attn_implementation(ATTENTION)
    if config._attn_implementation != ATTENTION:
        raise ValueError(
            f"found a {type(model).__name__}, whose attention cannot be set; needed a model that "
            "has its attention by transformers' AttentionInterface."
        )
