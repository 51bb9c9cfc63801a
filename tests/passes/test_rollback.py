"""A graph cut behind any write, what was saved put back, and run again, gives one run's results."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from loki_compile.passes.rollback import Undo, what_to_save
from tally import count
from torch import Tensor, fx
from toy_conversation import Conversation, tokens
from toy_decoders import REWRITTEN, UNTOUCHED, Spelling, ToyDecoder
from toy_masks import no_mask
from toy_options import KV_HEADS
from toy_writes import (
    accumulate,
    cat_bhtd,
    index_copy_method,
    index_put_method,
    ring,
    roll_window,
    select_copy,
    slice_assignment,
    unknown_op,
    write_two_halves,
)

pytestmark = [pytest.mark.soak, pytest.mark.covers]


def counter_advanced(k, v, ck, cv, pos):
    """As transformers' StaticCache: the position is read from a counter that is then advanced."""
    at = torch.arange(k.shape[1]) + pos
    pos.add_(k.shape[1])
    return index_copy_method(k, v, ck, cv, at)


def blended(k, v, ck, cv, pos):
    """What is stored depends on what was there."""
    ck.index_copy_(2, pos, ck.index_select(2, pos) * 0.5 + k.transpose(1, 2))
    return index_copy_method(ck.index_select(2, pos).transpose(1, 2), v, ck, cv, pos)


def mixed_with_the_other(k, v, ck, cv, pos):
    """The values that are stored are keys of the cache before they are written over."""
    cv.index_copy_(2, pos, ck[:, :, :1].clone())
    ck[:, :, :1] = k.transpose(1, 2)
    return ck, cv, ()


def keys_halved(k, v, ck, cv, pos):
    """A view of the cache is written in place, by an operator."""
    old = ck[:, :, 2:5]
    old *= 0.5
    return index_copy_method(k, v, ck, cv, pos)


def onto_itself(k, v, ck, cv, pos):
    """One call reads the cache and writes it."""
    ck.index_copy_(2, pos, ck[:, :, 3:4])
    return ck, cv, ()


_static = Spelling(index_copy_method)
ODD = [
    _static.but(write=counter_advanced),
    _static.but(write=blended),
    _static.but(write=mixed_with_the_other, mask=no_mask),
    _static.but(write=keys_halved),
    _static.but(write=onto_itself, mask=no_mask),
]


def captured(spelling: Spelling) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The graph of one step, and what Dynamo calls it with."""
    calls: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(gm, example_inputs):
        def run(*args):
            calls.append((gm, copy.deepcopy(args)))
            return gm(*args)

        return run

    torch._dynamo.reset()
    inputs = Conversation.start(spelling).inputs(tokens(spelling, 1)[0])
    with torch.no_grad():
        torch.compile(ToyDecoder(spelling).eval(), backend=backend)(*inputs)
    torch._dynamo.reset()
    return calls[0]


class Cut(fx.Interpreter):
    """Stops behind the first `writes` calls that change an input."""

    def __init__(self, gm: fx.GraphModule, writes: int) -> None:
        super().__init__(gm)
        self.left = writes

    def run(self, *args: Any) -> Any:
        self.tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self.seen = [tensor._version for tensor in self.tensors]
        return super().run(*args)

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        now = [tensor._version for tensor in self.tensors]
        if now != self.seen:
            self.seen, self.left = now, self.left - 1
            if not self.left:
                raise InterruptedError
        return result


def check(gm: fx.GraphModule, args: tuple[Any, ...], undo: Undo) -> int:
    """How many cuts there are; the memory that inputs share stays shared in their copies."""
    once = copy.deepcopy(args)
    expected = gm(*once)
    for cuts in itertools.count():
        again = copy.deepcopy(args)
        saved = {place: again[place].clone() for place in (*undo.small, *undo.large)}
        try:
            Cut(gm, cuts + 1).run(*again)
            return cuts
        except InterruptedError:
            pass
        for place, before in saved.items():
            again[place].copy_(before)
        for ours, theirs in zip((*gm(*again), *again), (*expected, *once), strict=True):
            if isinstance(theirs, Tensor):
                assert torch.equal(ours, theirs), f"cut behind write {cuts + 1}"
    raise AssertionError("not reached")


@pytest.mark.parametrize("spelling", [*REWRITTEN, *UNTOUCHED, *ODD], ids=lambda s: s.name)
def test_a_step_cut_anywhere_can_be_run_again(spelling):
    gm, args = captured(spelling)
    with torch.no_grad():
        cuts = check(gm, args, what_to_save(gm.graph))
        count("faults: steps cut behind a write and run again", cuts)
        if spelling in ODD:
            assert cuts
        if spelling in ODD and spelling.write is not onto_itself:
            with pytest.raises(AssertionError, match="cut behind"):
                check(gm, args, Undo((), ()))  # what is saved is needed


@pytest.mark.parametrize(
    "write, more, small, large",
    [
        # New keys in slots, which is what people write: nothing is copied at any step.
        (index_copy_method, {}, set(), set()),
        (slice_assignment, {"position": "int"}, set(), set()),
        (select_copy, {"position": "int"}, set(), set()),
        (index_put_method, {"new_tokens": 3}, set(), set()),
        (write_two_halves, {"new_tokens": 2}, set(), set()),
        (ring, {"mask": no_mask, "slots": 19}, set(), set()),
        (cat_bhtd, {"mask": no_mask, "growing": True}, set(), set()),
        (counter_advanced, {}, {"l_pos_"}, set()),
        # These move or read what is there.
        (roll_window, {"mask": no_mask}, set(), {"l_ck_", "l_cv_"}),
        (accumulate, {"layout": "bthd"}, set(), {"l_ck_"}),
        (unknown_op, {}, {"l_pos_"}, {"l_ck_"}),
        (mixed_with_the_other, {"mask": no_mask}, set(), {"l_ck_"}),
        (keys_halved, {}, set(), {"l_ck_"}),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_saved_is_no_more_than_that(write, more, small, large):
    gm, _ = captured(_static.but(write=write, kv_heads=KV_HEADS, **more))
    undo = what_to_save(gm.graph)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert ({names[i] for i in undo.small}, {names[i] for i in undo.large}) == (small, large)


def test_a_graph_that_other_processes_take_part_in_is_not_run_again():
    """Its first run has sent them what a second one would send again."""
    import torch.distributed._functional_collectives as collectives  # registers the ops

    def alone(x):
        return x * 2

    def together(x):
        return torch.ops._c10d_functional.wait_tensor(x * 2)

    assert collectives is not None
    for function, expected in ((alone, True), (together, False)):
        graph = torch.fx.symbolic_trace(function).graph
        for node in graph.nodes:
            node.meta["example_value"] = torch.ones(2)
        assert what_to_save(graph).alone is expected
