"""How many graphs Dynamo may make of one function of a model that decodes.

Behind `recompile_limit` of them, 8, it runs a function eagerly for good. So many serve one caller
at a time; padded and unpadded batches of several sizes, both kinds of caches, and drafts take some
twenty (docs/coverage.md). The limit is there against functions that are compiled at nearly every
call. So it rises as steps show that graphs are used: a graph for each `STEPS_PER_GRAPH`, up to
`MOST`, before the next one is made. It never does where somebody has set another than PyTorch's
own, or has compiled with `recompile_limit=`.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

import torch

log = logging.getLogger("loki_compile")

STEPS_PER_GRAPH = 4
MOST = 64
DEFAULT = 8  # PyTorch's, of 2.13; where it is another, nothing rises

# What it was raised to here; options of Dynamo's are each thread's own as well.
_risen_to: ContextVar[int] = ContextVar("risen_to", default=DEFAULT)


def allow_for(steps: int) -> None:
    """Raises the limit by what `steps` so far have earned."""
    limit = torch._dynamo.config.recompile_limit
    earned = min(steps // STEPS_PER_GRAPH, MOST)
    if limit not in (DEFAULT, _risen_to.get()) or earned <= limit:
        return
    torch._dynamo.config.recompile_limit = earned
    _risen_to.set(earned)
    log.debug("torch._dynamo.config.recompile_limit raised from %d to %d", limit, earned)
