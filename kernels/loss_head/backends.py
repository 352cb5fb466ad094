"""The implementations by name, and which one `auto` means on a device."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from .problem import LogprobsProblem, Outcome, Problem, Vocab

# Name -> module, attribute; an empty attribute is the module itself. The Triton designs have names
# of their own, for benchmarks and for runs that must repeat bitwise on another machine.
PLACES = {
    "reference": ("reference", ""),
    "cpp": ("cpp", ""),
    "triton": ("triton.entry", "automatic"),
    "triton_safe": ("triton.entry", "safe"),
    "triton_anchored": ("triton.entry", "anchored"),
}
NEEDS = {"triton.entry": "triton", "cpp": f"{__package__}.cpp"}


class Implementation(Protocol):
    """What stands behind a name."""

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why a device and dtype cannot be taken; empty if they can."""
        ...

    def policy_loss(self, problem: Problem) -> Outcome:
        """Loss and gradients of a checked problem."""
        ...

    def logprobs(self, problem: LogprobsProblem) -> tuple[Tensor, Tensor]:
        """log-probs and entropies, [N] in the compute dtype."""
        ...


def implementation(
    impl: str, device: torch.device, dtype: torch.dtype, vocab: Vocab | None = None
) -> Implementation:
    """The implementation that a request means; ValueError naming impl where it cannot be met here.

    "auto" is triton on CUDA and cpp elsewhere, or the reference where that one cannot be used, by
    this rank or by another of the vocabulary's group.
    """
    if impl == "auto":
        first = "triton" if device.type == "cuda" else "cpp"
        usable = not _reason(first, device, dtype)
        if vocab is not None:
            # Ranks whose implementations differ would exchange sums that do not match.
            usable = bool(vocab.least(int(usable), device))
        impl = first if usable else "reference"
    if impl not in PLACES:
        raise ValueError(f"impl: expected one of auto, {', '.join(PLACES)}, got {impl!r}")
    reason = _reason(impl, device, dtype)
    if reason:
        raise ValueError(f"impl: {impl!r} is not available here: {reason}")
    return _load(impl)


def _reason(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    needed = NEEDS.get(PLACES[impl][0])
    if needed and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    return _load(impl).unavailable(device, dtype)


def _load(impl: str) -> Implementation:
    # Imported here and nowhere else, so that importing the package needs neither triton nor C++.
    module_name, attribute = PLACES[impl]
    module = importlib.import_module(f".{module_name}", __package__)
    return getattr(module, attribute) if attribute else module  # type: ignore[return-value]
