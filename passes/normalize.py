"""One spelling per operation, so that the passes behind match one structure.

Dynamo keeps what the model wrote: `x.transpose(1, 2)` and `torch.transpose(x, 1, 2)`, `x @ y` and
`torch.matmul(x, y)`, `torch.concat` and `torch.cat`. Here each becomes a call of the method or
function that PyTorch documents as the main one. Meaning and results stay bit for bit.
"""

from __future__ import annotations

import torch
from loki_compile.passes.fx_tools import ALIASES, copy_of
from torch import fx

# Method or function name -> the function to call. Only names whose operands agree in order and
# keyword with the target's are here.
_FUNCTIONS = {
    "transpose": torch.transpose,
    "swapaxes": torch.transpose,
    "swapdims": torch.transpose,
    "movedim": torch.movedim,
    "moveaxis": torch.movedim,
    "permute": torch.permute,
    "unsqueeze": torch.unsqueeze,
    "squeeze": torch.squeeze,
    "select": torch.select,
    "narrow": torch.narrow,
    "concat": torch.cat,
    "concatenate": torch.cat,
    "repeat_interleave": torch.repeat_interleave,
    "index_copy": torch.index_copy,
    "index_put": torch.index_put,
    "matmul": torch.matmul,
    "__matmul__": torch.matmul,
    "bmm": torch.bmm,
    "softmax": torch.softmax,
}

_VARIADIC = ("permute",)


def normalize(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Returns a copy of `gm` in one spelling, and the map from its nodes to the copy's."""
    copy, mapping = copy_of(gm)
    for node in copy.graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or name not in _FUNCTIONS:
            continue
        if node.op == "call_function" and name not in ALIASES:
            continue
        if name in _VARIADIC and len(node.args) > 2:
            node.args = (node.args[0], node.args[1:])
        node.op, node.target = "call_function", _FUNCTIONS[name]
    copy.graph.lint()
    copy.recompile()
    return copy, mapping
