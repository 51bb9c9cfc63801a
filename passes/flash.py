"""A spelling of attention: FlashAttention-2's own op, `flash_attn_func` as Dynamo traces it.

Queries, keys and values are (B, tokens, heads, D). Its `causal` lines the last query up with the
last key, so that one new token sees all keys; of several, each sees fewer than the next, which no
mask of the graph says. Analysis only.
"""

from __future__ import annotations

from typing import Any

from loki_compile.passes.attention import Core, Reason, Skipped
from loki_compile.passes.calls import concrete, module_path, op_name, shape_of
from torch import fx

OP = "flash_attn::_flash_attn_forward"
_OPERANDS = (
    "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right",
    "softcap", "alibi_slopes", "return_softmax",
)  # fmt: skip
_LAYOUT, _ORDER = ("b", "s", "h", "d"), (0, 2, 1, 3)


def core_at(node: fx.Node) -> Core | Skipped | None:
    """The core that the op is, `Skipped` if it computes more; None where it is not read."""
    given: dict[str, Any] = dict(zip(_OPERANDS, node.args, strict=False)) | node.kwargs
    results = [user for user in node.users if op_name(user) == "getitem" and user.args[1] == 0]
    if not results:
        return None

    def skip(reason: Reason, *details: Any) -> Skipped:
        return Skipped(results[0], reason, details, module_path(node))

    if len(node.users) > 1:
        return skip(Reason.WEIGHTS_USED, "the op's other results")
    if given["dropout_p"] != 0.0:
        return skip(Reason.DROPOUT, given["dropout_p"])
    if not isinstance(given["softmax_scale"], (int, float)):
        return skip(Reason.SCALE, getattr(given["softmax_scale"], "name", given["softmax_scale"]))
    if given["alibi_slopes"] is not None:
        return skip(Reason.MASK, "alibi_slopes")
    if (given["window_size_left"], given["window_size_right"]) != (-1, -1):
        return skip(Reason.MASK, "a window")
    one_token = concrete((shape_of(given["q"]) or (0, 0))[1]) == 1
    return Core(
        node=results[0],
        query=given["q"],
        key=given["k"],
        value=given["v"],
        masks=(),
        scale=float(given["softmax_scale"]),
        key_order=_ORDER,
        value_order=_ORDER,
        softcap=float(given["softcap"]),
        reads=tuple((given[name], node) for name in "qkv"),
        causal=bool(given["causal"]) and not one_token,
        grouped=True,
        query_layout=_LAYOUT,
        out_layout=_LAYOUT,
    )
