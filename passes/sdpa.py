"""A spelling of attention: the call of `scaled_dot_product_attention`. Analysis only."""

from __future__ import annotations

from typing import Any

from loki_compile.passes.attention import Core, MaskTerm, Reason, Skipped
from loki_compile.passes.calls import concrete, module_path, operand, shape_of
from torch import fx


def core_at(node: fx.Node) -> Core | Skipped:
    """The core that the call is, `Skipped` if it computes something else."""

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
