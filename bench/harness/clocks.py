"""The clocks that results are measured by."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "thread": time.thread_time}
"""Seconds of the world, of all threads of this process, and of the thread that asks. What other
programs take on a shared machine is in the first only."""


def clock_of(name: str, device: torch.device) -> Callable[[], float]:
    """A clock that, on a GPU, is read when all queued work is done."""
    if device.type != "cuda":
        return CLOCKS[name]
    if name != "wall":
        raise SystemExit(f"--clock {name}: the processor's time says nothing of a GPU; take wall")

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
