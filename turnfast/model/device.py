"""Where a model runs, in which precision, and what rounding in that precision explains."""

from __future__ import annotations

import torch

from ..config.schema import ModelConfig
from ..errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: 'cuda' was asked for, but torch sees no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(config: ModelConfig, device: torch.device) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def default_tolerance(dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest gap of log-probs that rounding explains: two float32 forwards on a CPU differ by
    about 1e-5, two bfloat16 ones by some hundredths, more where a probability is small."""
    if dtype == torch.float32:
        return 1e-4 if torch.device(device).type == "cpu" else 2e-3
    return 0.1 if dtype == torch.float16 else 0.25
