"""The ways of decoding that `loki bench` times: dense ones, and each policy of loki."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loki_compile.commands.measure import Step
from loki_compile.config import LokiConfig
from loki_compile.published import TABLE

# No context is as long: attention stays dense, as fast as it can be.
NEVER_SPARSE = (1 << 30) - 1
DENSE = {
    "eager": "the model as it is",
    "inductor": "torch.compile(model)",
    "packed": "attention as two matmuls over query groups, each key read once",
    "packed-inductor": "the same through Inductor",
    "exact": "loki's dense variant: our own attention over all keys",
}


@dataclass(frozen=True)
class Way:
    """One way of decoding: `step` is called as `model` is; `config` is loki's, None without it.

    `dense`: it attends to all keys at any length.
    """

    name: str
    model: Any
    step: Step
    dense: bool = True
    config: LokiConfig | None = None


def policy_options(word: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of one of `--policies`: "NAME", or "NAME@TOP_K" for a budget of its own.

    Raises:
      ValueError: no such policy, or a budget that there cannot be.
    """
    name, at, budget = word.partition("@")
    if name.endswith(TABLE):  # there it says how many heads read all, and is part of the name
        name, at = word, ""
    chosen = {**options, "policy": name}
    if at:
        try:
            chosen["top_k"] = float(budget) if "." in budget else int(budget)
        except ValueError:
            raise ValueError(
                f"--policies {word}: found top_k {budget!r}; needs a fraction or a count, such as "
                f"{name}@0.125 or {name}@1024"
            ) from None
    LokiConfig.from_options(chosen)
    return chosen


def ways_of(model: Any, dense: Sequence[str], policies: dict[str, dict[str, Any]]) -> list[Way]:
    """The ways that were asked for, eager first; those by packed matmul share the model's tensors.

    Args:
      dense: names out of `DENSE`.
      policies: the options of each policy by the name it has in tables.

    Raises:
      ValueError: the model's attention cannot be replaced, and "packed" was asked for.
    """
    ways = [Way("eager", model, model)]
    if "inductor" in dense:
        ways.append(Way("inductor", model, torch.compile(model)))
    if {"packed", "packed-inductor"} & set(dense):
        packed = with_packed_attention(model)
        if "packed" in dense:
            ways.append(Way("packed", packed, packed))
        if "packed-inductor" in dense:
            ways.append(Way("packed-inductor", packed, torch.compile(packed)))
    if "exact" in dense:
        ways.append(_by_loki("exact", model, {"min_context": NEVER_SPARSE}, dense=True))
    ways += [_by_loki(name, model, options, dense=False) for name, options in policies.items()]
    return ways


def _by_loki(name: str, model: Any, options: dict[str, Any], *, dense: bool) -> Way:
    step = torch.compile(model, backend="loki", options=options)
    return Way(name, model, step, dense, LokiConfig.from_options(options))


def with_packed_attention(model: Any) -> Any:
    """The same model, of the same tensors, whose decode attention is two matmuls.

    Raises:
      ValueError: a model that does not take its attention from transformers' table.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_PACKED, packed_attention)
    AttentionMaskInterface.register(_PACKED, sdpa_mask)
    tensors = itertools.chain(model.parameters(), model.buffers())
    packed = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    packed.set_attn_implementation(_PACKED)
    return packed


_PACKED = "loki_packed"


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token that reads each key once: the query heads of a group are rows.

    Args:
      query, key, value: (B, Hq, S, D), (B, Hkv, T, D), (B, Hkv, T, Dv). A prompt (S > 1) goes to
        PyTorch's attention.
      attention_mask: bool (B, 1, S, T), or None.

    Returns:
      (B, S, Hq, Dv), and None in the place of weights.
    """
    batch, heads, new, _ = query.shape
    if new > 1:
        from transformers import AttentionInterface

        sdpa = AttentionInterface()["sdpa"]
        result: tuple[Tensor, None] = sdpa(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return result
    rows = query.reshape(batch, key.shape[1], -1, query.shape[3])
    scores = rows @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    out = scores.float().softmax(-1).to(value.dtype) @ value
    return out.reshape(batch, heads, new, -1).transpose(1, 2), None
