"""The implementations by name, and which one `auto` means on a device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

# The Triton designs have names of their own, for benchmarks and for runs that must repeat bitwise
# on another machine; "triton" picks the design by measurement.
NAMES = ("auto", "reference", "cpp", "triton", "triton_safe", "triton_anchored")


def backend(name: str) -> ModuleType:
    """The module of a resolved implementation; it has policy_loss and logprobs like `reference`."""
    module = "triton_loss" if name.startswith("triton") else name
    return importlib.import_module(f".{module}", __package__)


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` to a concrete name; ValueError naming impl where the request cannot be met here."""
    if impl not in NAMES:
        raise ValueError(f"impl: expected one of {', '.join(NAMES)}, got {impl!r}")
    if impl == "auto":
        first = "triton" if device.type == "cuda" else "cpp"
        return "reference" if unavailable(first, device, dtype) else first
    reason = unavailable(impl, device, dtype)
    if reason:
        raise ValueError(f"impl: {impl!r} is not available here: {reason}")
    return impl


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why an implementation cannot take this device and dtype; empty if it can."""
    if name == "reference":
        return ""
    if name == "cpp":
        if importlib.util.find_spec(".cpp", __package__) is None:
            return "the C++ extension was not built"
        return backend("cpp").unavailable(device, dtype)
    if name == "triton_anchored" and dtype == torch.float16:
        return "float16 has no range for exponentials anchored at the target"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"triton needs a CUDA device (or TRITON_INTERPRET=1), the tensors are on {device.type}"
        )
    return backend("triton").unavailable(device, dtype)
