"""Liger's Triton kernels for norm, rotary embedding and MLP, where they are installed.

They replace modules of the loaded model in place. The loss head stays our own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = {"rope", "rms_norm", "layer_norm", "swiglu", "geglu"}


def apply_liger(model: PreTrainedModel, wanted: bool | str, device: torch.device) -> bool:
    """Put Liger's kernels into a model; "auto" does so on CUDA where Liger knows the model.

    Returns:
        Whether the model has them now.

    Raises:
        ConfigError: they are asked for and cannot run here, or not in this model.
    """
    model_type = model.config.model_type
    check_liger(wanted, model_type, device)
    if wanted is False or _problem(wanted, model_type, device):
        return False
    patch = _patch_of(model_type)
    options = inspect.signature(patch).parameters
    # what it offers besides, fused losses, would take the place of the loss head
    patch(model=model, **{name: name in PARTS for name in options if name != "model"})
    return True


def check_liger(wanted: bool | str, model_type: str, device: torch.device) -> None:
    """Raises ConfigError if the kernels are asked for and cannot run here, or not in this model."""
    if wanted is True and (problem := _problem(wanted, model_type, device)):
        raise ConfigError(f"model.liger: {problem}, or leave it at 'auto'")


def _problem(wanted: bool | str, model_type: str, device: torch.device) -> str:
    """Why the kernels cannot be used; nothing if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; install turnfast[liger]"
    if device.type != "cuda" and (wanted == "auto" or not interpreted):
        return f"Liger's kernels need a CUDA device, not {device.type}"
    if _patch_of(model_type) is None:
        return f"Liger has no kernels for {model_type}"
    return ""


def _patch_of(model_type: str) -> Any:
    known = importlib.import_module("liger_kernel.transformers.monkey_patch")
    return known.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
