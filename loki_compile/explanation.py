"""`explain(model, ...)`: what each attention site of a call would become, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from loki_compile.backend import analyse
from loki_compile.config import LokiConfig
from loki_compile.report import Reports
from loki_compile.watching import watched


def explain(
    model: nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any
) -> Reports:
    """The report of each graph of `model(*args, **kwargs)`; nothing is compiled or rewritten.

    The call itself takes place once, eagerly: a cache that is passed grows by its tokens. Pass a
    decode step (one token and a filled cache), since prefills stay dense by plan.

    Args:
        model: any module.
        *args, **kwargs: what it is called with.
        options: as in `torch.compile(..., options=)`.

    Raises:
        ValueError: an option or a basis that the backend would refuse.
    """
    config = LokiConfig.from_options(options)
    found = Reports()
    refused: list[ValueError] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            found.append(analyse(gm, example_inputs, config))
        except ValueError as error:  # Dynamo would bury it in one of its own
            refused.append(error)
        return gm.forward

    model = getattr(model, "_orig_mod", model)
    with torch.no_grad(), watched(model, look) as run:
        run(*args, **kwargs)
    if refused:
        raise refused[0]
    return found
