"""A low-rank adapter on a frozen model, in peft's form: trained where `model.lora.r` is set.

A linear layer W x becomes W x + (lora_alpha / r) B A x, with A [r, in] and B [out, r] trained and
everything else frozen (arXiv 2106.09685). B starts at 0, so the run starts from the model as it is;
with the adapter off it still is that model, so the KL term's reference costs no second copy.

Outside the trainer nobody knows of it. Samplers and checkpoints are given the merged weights
W + (lora_alpha / r) B A under the names that the model has without an adapter, rounded once to its
dtype; the adapter lies beside a checkpoint's model in a folder of its own, as peft writes it.
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
"""Before every name in peft's files."""


def add_adapter(model: Any, config: LoraConfig, *, seed: int) -> None:
    """Freeze the model and put an adapter on its linear layers, in place; nothing where `r` is 0.

    Raises:
        ConfigError: peft is not installed, or a target is no linear layer of the model.
    """
    if config.r == 0:
        return
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "model.lora.r: an adapter needs peft; install turnfast[lora], or leave r at 0"
        )
    targets = _targets(model, config.target_modules)
    import peft

    form = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(model.name_or_path),
    )
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)  # every rank draws the same A
        peft.inject_adapter_in_model(form, model, adapter_name=NAME)


def _targets(model: Any, wanted: tuple[str, ...]) -> list[str]:
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    known = sorted({name.rpartition(".")[2] for name in linear})
    if not linear:
        raise ConfigError(f"model.lora.r: {type(model).__name__} has no linear layers to adapt")
    for target in wanted:
        if head is not None and any(m is head for n, m in model.named_modules() if n == target):
            raise ConfigError(
                f"model.lora.target_modules: {target} is the output projection, which the loss "
                f"head reads as it is; leave it out (there are {', '.join(known)})"
            )
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"model.lora.target_modules: {type(model).__name__} has no linear layer {target}; "
                f"there are {', '.join(known)}"
            )
    return list(wanted) or known


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by the name that they have without one."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapter; any other model as it is."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters or state of a model, each under the name it has without an adapter, one merged
    weight at a time. Those of a model without one come as they are.

        model.layers.0.mlp.up_proj.base_layer.weight      W                      not W, but
        model.layers.0.mlp.up_proj.weight                 W + lora_alpha / r B A
    """
    layers = adapted_layers(model)
    for name, tensor in named:
        owner, found, leaf = name.rpartition(".base_layer.")
        if found and owner in layers:
            yield f"{owner}.{leaf}", _merged(layers[owner]) if leaf == "weight" else tensor
        elif name.partition(".lora_")[0] not in layers:
            yield name, tensor


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that has taken its adapter up, and nothing of it left."""
    layers = adapted_layers(model)
    plain = copy.deepcopy(model)
    for name, layer in layers.items():
        base = plain.get_submodule(name).get_base_layer()  # type: ignore[operator]
        with torch.no_grad():
            base.weight.copy_(_merged(layer))
        plain.set_submodule(name, base)
    if layers:
        del plain.peft_config
    return plain


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    base = layer.get_base_layer().weight
    return (base.float() + layer.scaling[NAME] * (B.float() @ A.float())).to(base.dtype)


def save_adapter(model: Any, folder: Path) -> None:
    """Write `adapter_config.json` and the adapter's weights, as peft and vLLM load them."""
    folder.mkdir()
    model.peft_config[NAME].save_pretrained(str(folder))
    tensors = {_name_in_file(n): x.detach().cpu().contiguous() for n, x in _own(model)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: Any, folder: Path) -> None:
    """Put the weights of `save_adapter` in place.

    Raises:
        ValueError: they are of an adapter of another form; OSError: there are none.
    """
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    form = model.peft_config[NAME]
    if (saved.get("r"), saved.get("lora_alpha")) != (form.r, form.lora_alpha):
        raise ValueError(
            f"an adapter of r = {saved.get('r')} and lora_alpha = {saved.get('lora_alpha')}, not "
            f"{form.r} and {form.lora_alpha}"
        )
    loaded, own = load_file(folder / WEIGHTS), {_name_in_file(n): x for n, x in _own(model)}
    if {n: x.shape for n, x in loaded.items()} != {n: x.shape for n, x in own.items()}:
        raise ValueError("an adapter of other layers")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    layers = adapted_layers(model)
    for name, tensor in model.named_parameters():
        if name.partition(".lora_")[0] in layers and ".lora_" in name:
            yield name, tensor


def _name_in_file(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")
