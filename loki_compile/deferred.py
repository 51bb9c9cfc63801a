"""Graphs that may be called once: they run node by node until that has cost what compiling costs.

A prefill comes once in a conversation, and so does the step behind a prompt that was not compiled:
Dynamo traces it for one length of a cache, or for caches that lie tight, and it leaves them with
room. Compiling either takes as long as compiling the step that all tokens go through. Whoever rents
until the rent equals the price never pays more than twice the least that was possible (ski rental).
The rent is what a call node by node takes longer than a compiled one. What goes on where its last
call ended, as where beams lay caches out anew, is no first step: its second call compiles it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from torch import fx

from loki_compile.engines import Variant, in_turn
from loki_compile.readings import Reading

# Seconds per node of a graph, until compilations in this process tell. Decode graphs of 30 layers
# have 2200 nodes; one took 26 s of a quiet machine, and 90 to 120 s of a very busy one.
_FIRST_GUESS = 0.015

# Share of a call's time that compiling saves. An estimate, not a measurement: the products of a
# prefill are a library's either way. First steps behind a prompt save more, but of far less.
_SAVED = 0.2


class Price:
    """What compiling costs in this process, as far as it is known."""

    def __init__(self) -> None:
        self.seconds, self.nodes = 0.0, 0

    def of(self, nodes: int) -> float:
        """Seconds that a graph of so many nodes would take."""
        each = self.seconds / self.nodes if self.nodes else _FIRST_GUESS
        return each * nodes

    def timed(self, compile_graph: Callable[..., Variant]) -> Callable[..., Variant]:
        """The same engine, watched."""

        def timed(gm: fx.GraphModule, *args: Any) -> Variant:
            nodes, began = len(gm.graph.nodes), time.perf_counter()
            run = compile_graph(gm, *args)
            self.seconds += time.perf_counter() - began
            self.nodes += nodes
            return run

        return timed


PRICE = Price()


class Deferred:
    """A graph's function, compiled when running it node by node has cost what that would."""

    gave_up: str | None = None

    def __init__(
        self,
        compile_now: Callable[[fx.GraphModule, str, Callable[[], None]], Variant],
        gm: fx.GraphModule,
        what: str,
        missed: Callable[[], None],
        goes_on: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
          goes_on: asked at each call until it is compiled, whether this goes on where the last one
            ended.
          compile_now: compiles a graph, given in words what it is, and what to call when a call of
            it has to be run node by node all the same. It leaves the graph as it is.
        """
        self.gm = gm
        self.price = functools.partial(PRICE.of, len(gm.graph.nodes))
        self.compile_now: Callable[[], Variant] = lambda: compile_now(gm, what, missed)
        self.goes_on = goes_on
        self.run: Variant | None = None
        self.spent = 0.0  # seconds that compiled calls would have been faster by, estimated

    def __call__(self, *args: Any) -> Any:
        if self.run is None and (self.goes_on() or self.spent >= self.price()):
            with in_turn():
                if self.run is None:
                    self.run = self.compile_now()
        if self.run is not None:
            return self.run(*args)
        began = time.perf_counter()
        outputs = self.gm(*args)
        self.spent += _SAVED * (time.perf_counter() - began)
        return outputs

    def state(self) -> str:
        """In words how it runs; "" where it is compiled."""
        if self.run is not None:
            return ""
        left = max(self.price() - self.spent, 0) / _SAVED
        return f"node by node, uncompiled: compiled after {left:.0f} s more of it"

    def readings(self) -> dict[str, Reading]:
        """None, likewise."""
        return {}

    def fitted_bases(self) -> dict[str, str]:
        """None: nothing of it is sparse."""
        return {}
