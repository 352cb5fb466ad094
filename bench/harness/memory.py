"""Peak memory of a GPU or of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def watch_memory(device: torch.device) -> Callable[[], float]:
    """Start a measurement; the returned function gives the peak in bytes above the current usage.

    NaN where the system does not report it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: float(torch.cuda.max_memory_allocated(device) - held)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    before = _bytes("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    return lambda: max(0.0, _bytes("VmHWM") - before)


def _bytes(name: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return float(line.split()[1]) * 1024
    return float("nan")
