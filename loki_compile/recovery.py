"""What makes a step that fails half-way one that can be taken again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from loki_compile.passes.rollback import Undo

# What a step may save of tensors that it does not only append to (windows that move, recurrent
# states): so many bytes in the first sparse step of a graph, which is where most breaks; in each
# one behind it so few, or one part in so many of all that the graph is given.
SAVED_BYTES = 1 << 30
SAVED_EACH_STEP = 1 << 18
SAVED_PART = 128


class Rollback:
    """Of one graph: which of its inputs are saved before a step."""

    def __init__(self, undo: Undo) -> None:
        self.undo = undo
        self.given_bytes = 0

    def saves_all(self, args: Sequence[Any], has_run: bool) -> bool:
        """Whether all that a second run of this step would notice is saved before the first.

        Most of what can break breaks in the first run of a variant. Behind it no step pays much for
        copies of windows.
        """
        if not self.undo.alone:
            return False
        large = sum(args[place].nbytes for place in self.undo.large)
        if large <= SAVED_EACH_STEP:
            return True
        if not has_run:
            return large <= SAVED_BYTES
        if not self.given_bytes:
            self.given_bytes = sum(arg.nbytes for arg in args if isinstance(arg, Tensor))
        return large * SAVED_PART <= self.given_bytes

    def save(self, args: Sequence[Any], whole: bool) -> Saved:
        """What a step may need to have put back; only counters and the like unless `whole`."""
        places = self.undo.small + self.undo.large if whole else self.undo.small
        return Saved([args[place] for place in places])


class Saved:
    """What tensors hold now, to be put back. Those of one dtype and device are saved in one piece:
    the counters of all layers take one kernel at each step, not one each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        groups: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        self.groups = [
            (group, torch.cat([tensor.reshape(-1) for tensor in group]))
            for group in groups.values()
        ]

    def put_back(self) -> None:
        with torch.inference_mode():  # the one mode in which every tensor may be written
            for group, before in self.groups:
                parts = before.split([tensor.numel() for tensor in group])
                for tensor, part in zip(group, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made under inference mode could not be used outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def is_shortage(error: Exception) -> bool:
    """Whether memory was short, which may pass. PyTorch's CPU allocator raises a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory")
    )
