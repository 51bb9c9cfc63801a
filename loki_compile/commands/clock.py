"""The clock of `loki bench`: wall and CPU time of decoded tokens, and how fast memory is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Read at a time, in bytes: more than the caches of a processor or a device hold.
CPU_BUFFER, CUDA_BUFFER = 2**28, 2**32


@dataclass(frozen=True)
class Sample:
    """Seconds on the clock and of the process' CPU time, all its threads together."""

    wall: float
    cpu: float


def timed(call: Callable[[], Any], device: torch.device, times: int = 1) -> Sample:
    """Runs a call so many times, and waits for the device once, behind the last.

    On a CUDA device `wall` is the time between two events, so that it holds the host's part only
    where the device waits for it.
    """
    cpu = time.process_time()
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        wall = begin.elapsed_time(end) * 1e-3
    else:
        start = time.perf_counter()
        for _ in range(times):
            call()
        wall = time.perf_counter() - start
    return Sample(wall, time.process_time() - cpu)


class Reader:
    """Reads a large buffer whole, to learn how fast this machine reads memory here and now."""

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        self.device = device
        usual = CUDA_BUFFER if device.type == "cuda" else CPU_BUFFER
        self.buffer = torch.ones((size or usual) // 4, device=device)
        self.best = 0.0  # bytes per second, of all reads so far

    def read(self) -> None:
        """One read by each of two ways; the faster of all counts."""
        for way in (lambda: self.buffer.sum(), lambda: torch.dot(self.buffer, self.buffer)):
            self.best = max(self.best, self.buffer.nbytes / timed(way, self.device).wall)
