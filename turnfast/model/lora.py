"""A LoRA adapter on a frozen model, with peft; used if `model.lora.r` is set.

A linear layer W x becomes W x + (lora_alpha / r) B A x with trained A [r, in] and B [out, r] and
everything else frozen (arXiv 2106.09685). B starts at 0, so training starts from the base model.
With the adapter disabled the model is the base model: the reference of the KL term needs no copy.

Samplers and checkpoints get the merged weights W + (lora_alpha / r) B A under the base model's
parameter names, rounded once to its dtype. Checkpoints have the adapter in peft's format as well.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config.schema import LoraConfig
from ..errors import ConfigError

NAME = "default"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of the tensor names in peft's files."""


def add_adapter(model: Any, config: LoraConfig, *, seed: int) -> None:
    """Freeze the model and add an adapter to its linear layers, in place; no-op if `r` is 0.

    Raises:
        ConfigError: peft is not installed, or a target is not a linear layer of the model.
    """
    if config.r == 0:
        return
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "model.lora.r: an adapter needs peft; install turnfast[lora], or set r to 0"
        )
    targets = _targets(model, config.target_modules)
    import peft

    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(model.name_or_path),
    )
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # A is the same on all ranks
        peft.inject_adapter_in_model(peft_config, model, adapter_name=NAME)


def _targets(model: Any, wanted: tuple[str, ...]) -> list[str]:
    """The names of the layers to adapt; all linear layers but the head if `wanted` is empty."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    known = sorted({name.rpartition(".")[2] for name in linear})
    if not linear:
        raise ConfigError(f"model.lora.r: {type(model).__name__} has no linear layers; set r to 0")
    for target in wanted:
        if head is not None and any(m is head for n, m in model.named_modules() if n == target):
            raise ConfigError(
                f"model.lora.target_modules: {target} is the output projection, which cannot "
                f"have an adapter; remove it (available: {', '.join(known)})"
            )
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"model.lora.target_modules: {type(model).__name__} has no linear layer {target}; "
                f"available: {', '.join(known)}"
            )
    return list(wanted) or known


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The peft layers of the adapter, by the layer's name in the base model."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Context in which the adapter is disabled; no-op for a model without one."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Convert parameters or state of a model to those of the merged base model, one at a time.

    A model without an adapter keeps its tensors. Example of an adapted layer::

        model.layers.0.mlp.up_proj.base_layer.weight   W                         (in)
        model.layers.0.mlp.up_proj.weight              W + lora_alpha / r B A    (out)
    """
    layers = adapted_layers(model)
    for name, tensor in named:
        layer_name, is_base, leaf = name.rpartition(".base_layer.")
        if is_base and layer_name in layers:
            weight = _merged_weight(layers[layer_name]) if leaf == "weight" else tensor
            yield f"{layer_name}.{leaf}", weight
        elif name.partition(".lora_")[0] not in layers:
            yield name, tensor


def merged_copy(model: nn.Module) -> nn.Module:
    """Copy the model with its adapter merged and removed."""
    plain = copy.deepcopy(model)
    layers = adapted_layers(plain)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        base.weight.data = _merged_weight(layer)
        plain.set_submodule(name, base)
    if layers:
        del plain.peft_config
    return plain


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    # peft's own merge rounds twice: it casts the product of a bfloat16 adapter to bfloat16
    A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    base = layer.get_base_layer().weight
    return (base.float() + layer.scaling[NAME] * (B.float() @ A.float())).to(base.dtype)


def save_adapter(model: Any, folder: Path) -> None:
    """Write `adapter_config.json` and the adapter's weights in the format of peft and vLLM."""
    from peft import get_peft_model_state_dict

    folder.mkdir()
    model.peft_config[NAME].save_pretrained(str(folder))
    state = get_peft_model_state_dict(model, adapter_name=NAME)
    tensors = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: Any, folder: Path) -> None:
    """Load the weights that `save_adapter` wrote.

    Raises:
        ValueError: r, lora_alpha or the layers differ from the model's adapter.
        OSError: a file is missing.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config = model.peft_config[NAME]
    if (saved.get("r"), saved.get("lora_alpha")) != (config.r, config.lora_alpha):
        raise ValueError(
            f"the adapter has r = {saved.get('r')} and lora_alpha = {saved.get('lora_alpha')}, not "
            f"{config.r} and {config.lora_alpha}"
        )
    tensors = load_file(folder / WEIGHTS)
    state = get_peft_model_state_dict(model, adapter_name=NAME)
    if {name: x.shape for name, x in tensors.items()} != {
        PREFIX + name: x.shape for name, x in state.items()
    }:
        raise ValueError("the adapter has other layers")
    set_peft_model_state_dict(model, tensors, adapter_name=NAME)
