"""Device and dtype of the model, and the tolerance that follows from the dtype."""

from __future__ import annotations

import torch

from ..config.schema import ModelConfig
from ..errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    """The device for `train.device`; "auto" is CUDA if there is a device.

    Raises:
        ConfigError: "cuda" without a CUDA device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: torch finds no CUDA device; set it to 'cpu' or 'auto'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype for `model.dtype`; "auto" is bfloat16 on CUDA and float32 on the CPU."""
    name = config.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def default_tolerance(dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest log-prob difference between two forwards that rounding can cause.

    Two float32 forwards on a CPU differ by about 1e-5, two bfloat16 forwards by a few hundredths,
    and by more for small probabilities.
    """
    if dtype == torch.float32:
        return 1e-4 if torch.device(device).type == "cpu" else 2e-3
    return 0.1 if dtype == torch.float16 else 0.25
