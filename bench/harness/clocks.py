"""Clocks for measurements."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "thread": time.thread_time}
"""Wall time, processor time of all threads of this process, and processor time of the calling
thread. Only wall time includes the load of other programs on a shared machine."""


def clock_of(name: str, device: torch.device) -> Callable[[], float]:
    """Return a clock; on a GPU it synchronises the device before each reading."""
    if device.type != "cuda":
        return CLOCKS[name]
    if name != "wall":
        raise SystemExit(f"--clock {name}: processor time does not measure a GPU; use --clock wall")

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
