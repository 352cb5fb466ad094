"""The implementations by name, and the one that "auto" selects on a device."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from .problem import LogprobsProblem, Outcome, Problem

# Name -> module, attribute; an empty attribute means the module itself. Benchmarks and tests use
# the names of the two Triton designs.
PLACES = {
    "reference": ("reference", ""),
    "cpp": ("cpp", ""),
    "triton": ("triton.entry", "automatic"),
    "triton_safe": ("triton.entry", "safe"),
    "triton_anchored": ("triton.entry", "anchored"),
}
NEEDS = {"triton.entry": "triton", "cpp": f"{__package__}.cpp"}


class Implementation(Protocol):
    """The interface of an implementation."""

    def unavailable(self, device: torch.device, dtype: torch.dtype, sharded: bool) -> str:
        """Return why this device, dtype or sharding is not supported, or an empty string."""
        ...

    def policy_loss(self, problem: Problem) -> Outcome:
        """Compute loss and gradients of a problem."""
        ...

    def logprobs(self, problem: LogprobsProblem) -> tuple[Tensor, Tensor]:
        """Compute log-probs and entropies, [N] in the compute dtype."""
        ...


def implementation(
    impl: str, device: torch.device, dtype: torch.dtype, sharded: bool = False
) -> Implementation:
    """Return the implementation of a name. Raises ValueError naming impl if it is not available.

    "auto" is triton on CUDA and cpp elsewhere, or the reference where that one is not available.
    sharded: the ranks of a group share the vocabulary.
    """
    if impl == "auto":
        impl = "triton" if device.type == "cuda" else "cpp"
        if _reason(impl, device, dtype, sharded):
            impl = "reference"
    if impl not in PLACES:
        raise ValueError(f"impl: expected one of auto, {', '.join(PLACES)}, got {impl!r}")
    reason = _reason(impl, device, dtype, sharded)
    if reason:
        raise ValueError(f"impl: {impl!r} is not available here: {reason}")
    return _load(impl)


def _reason(impl: str, device: torch.device, dtype: torch.dtype, sharded: bool) -> str:
    needed = NEEDS.get(PLACES[impl][0])
    if needed and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    return _load(impl).unavailable(device, dtype, sharded)


def _load(impl: str) -> Implementation:
    # Imported on use only, so that the package imports without triton and without the extension.
    module_name, attribute = PLACES[impl]
    module = importlib.import_module(f".{module_name}", __package__)
    return getattr(module, attribute) if attribute else module  # type: ignore[return-value]
