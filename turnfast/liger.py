"""Liger's Triton kernels for norm, rotary embedding and MLP, where they are installed.

They replace modules of the loaded model in place. The loss head stays our own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from typing import Any

import torch
from torch import nn

from .config import ConfigError

PARTS = {"rope", "rms_norm", "layer_norm", "swiglu", "geglu"}


def apply_liger(model: nn.Module, wanted: bool | str, device: torch.device) -> bool:
    """Put Liger's kernels into a model; "auto" does so on CUDA where Liger knows the model.

    Returns:
        Whether the model has them now.

    Raises:
        ConfigError: they are asked for and cannot run here, or not in this model.
    """
    if wanted is False:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    problem = ""
    if importlib.util.find_spec("liger_kernel") is None:
        problem = "liger-kernel is not installed; install turnfast[liger]"
    elif device.type != "cuda" and (wanted == "auto" or not interpreted):
        problem = f"Liger's kernels need a CUDA device, not {device.type}"
    elif (patch := _patch_of(model)) is None:
        problem = f"Liger has no kernels for {model.config.model_type}"
    else:
        options = inspect.signature(patch).parameters
        # what it offers besides, fused losses, would take the place of the loss head
        patch(model=model, **{name: name in PARTS for name in options if name != "model"})
        return True
    if wanted == "auto":
        return False
    raise ConfigError(f"model.liger: {problem}, or leave it at 'auto'")


def _patch_of(model: Any):
    known = importlib.import_module("liger_kernel.transformers.monkey_patch")
    return known.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
