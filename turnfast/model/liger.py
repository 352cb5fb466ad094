"""Replace norm, rotary embedding and MLP of a loaded model by Liger's Triton kernels.

Liger's fused losses are not used; the loss head computes the loss.
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
    """Apply Liger's kernels to a model in place; "auto" does so on CUDA for models that have them.

    Returns:
        Whether they were applied.

    Raises:
        ConfigError: see `check_liger`.
    """
    model_type = model.config.model_type
    check_liger(wanted, model_type, device)
    if wanted is False or _problem(wanted, model_type, device):
        return False
    patch = _patch_of(model_type)
    options = inspect.signature(patch).parameters
    # all other options are fused losses
    patch(model=model, **{name: name in PARTS for name in options if name != "model"})
    return True


def check_liger(wanted: bool | str, model_type: str, device: torch.device) -> None:
    """Raise ConfigError if `wanted` is True and the kernels cannot run on this device or model."""
    if wanted is True and (problem := _problem(wanted, model_type, device)):
        raise ConfigError(f"model.liger: {problem}, or set it to 'auto'")


def _problem(wanted: bool | str, model_type: str, device: torch.device) -> str:
    """The reason why the kernels cannot be used, "" if they can."""
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
