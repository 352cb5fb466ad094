"""Weights, optimizer and critic of a training run as safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import CheckpointError
from ...model.lora import adapted_layers, load_adapter, merged, save_adapter

ADAPTER = "adapter"
OPTIMIZER = "optimizer.safetensors"
CRITIC = "critic.safetensors"


class Stateful(Protocol):
    """An optimizer, whose state is torch's `state` and `param_groups`, or a critic of tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class Tokenizer(Protocol):
    """A Hugging Face tokenizer."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The objects whose state a checkpoint contains; `model` is a Hugging Face model."""

    model: nn.Module
    optimizer: Stateful
    tokenizer: Tokenizer | None = None
    critic: Stateful | None = None


def save_optimizer(optimizer: Stateful, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    saved = optimizer.state_dict()
    for index, entries in saved["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().to("cpu").contiguous()
            else:
                plain.setdefault(str(index), {})[name] = value
    document = {"groups": saved["param_groups"], "plain": plain}
    (folder / "optimizer.json").write_text(to_json(document, "optimizer"), encoding="utf-8")
    save_file(_unshared(tensors), folder / OPTIMIZER)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with an earlier one, which safetensors does not allow."""
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return unshared


def load_optimizer(optimizer: Stateful, folder: Path) -> None:
    document = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in document["plain"].items()
    }
    for key, tensor in load_file(folder / OPTIMIZER).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in document["groups"]
    ]
    try:
        optimizer.load_state_dict({"state": dict(sorted(state.items())), "param_groups": groups})
    except ValueError as error:  # other parameter groups, as torch reports them
        raise CheckpointError(
            f"{folder}: the optimizer state does not match the parameters ({error}); resume with "
            "the model and optim sections of the run that wrote it"
        ) from error
    if isinstance(optimizer, Optimizer):
        _restore_dtypes(optimizer, state)


def _restore_dtypes(optimizer: Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    # load_state_dict casts moments to the parameter's dtype: float32 ones would be rounded
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        loaded = optimizer.state[parameters[index]]
        for name, value in entries.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def save_critic(critic: Stateful, folder: Path) -> None:
    tensors = {name: x.cpu().contiguous().clone() for name, x in critic.state_dict().items()}
    save_file(tensors, folder / CRITIC)


def load_critic(critic: Stateful, folder: Path) -> None:
    try:
        critic.load_state_dict(load_file(folder / CRITIC))
    except (FileNotFoundError, KeyError, RuntimeError) as error:  # missing, or of another width
        raise CheckpointError(
            f"{folder}: no matching critic ({error}); resume with the credit and model sections of "
            "the run that wrote it"
        ) from error


def save_model(model: Any, folder: Path) -> None:
    """Write a Hugging Face folder; with LoRA the merged model, and `folder/adapter`."""
    if not adapted_layers(model):
        model.save_pretrained(folder)
        return
    model.save_pretrained(folder, state_dict=dict(merged(model, model.state_dict().items())))
    save_adapter(model, folder / ADAPTER)


def load_model(model: nn.Module, path: Path) -> None:
    if adapted_layers(model):
        _load_adapter(model, path)
        return
    wanted = model.state_dict()
    loaded: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        loaded |= load_file(file)
    if not _fits(wanted, loaded):
        # for some architectures the files have other tensor names and shapes than the module
        fresh = type(model).from_pretrained(path, dtype="auto")  # pyright: ignore
        loaded = fresh.state_dict()
    if not _fits(wanted, loaded):
        raise CheckpointError(
            f"{path}: the tensors do not match the model; resume with the model section of the "
            "run that wrote it"
        )
    with torch.no_grad():
        for name, tensor in loaded.items():
            wanted[name].copy_(tensor)


def _load_adapter(model: nn.Module, path: Path) -> None:
    """Load the adapter, and check that the tensors without an adapter equal the base model's."""
    try:
        load_adapter(model, path / ADAPTER)
    except (FileNotFoundError, ValueError) as error:  # missing, or of another form
        raise CheckpointError(
            f"{path}: no matching adapter ({error}); resume with the model section of the run "
            "that wrote it"
        ) from error
    own = dict(model.named_parameters())
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name in own and not torch.equal(own[name].cpu(), tensor):
                raise CheckpointError(
                    f"{path}: the adapter was trained on another model ({name} differs); resume "
                    "with the model.path of the run that wrote it"
                )


def _fits(wanted: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> bool:
    """Whether the model has every loaded tensor, and the rest share memory with loaded ones."""
    if any(name not in wanted or wanted[name].shape != t.shape for name, t in loaded.items()):
        return False
    filled = {wanted[name].data_ptr() for name in loaded}
    return all(tensor.data_ptr() in filled for tensor in wanted.values())


def to_json(document: Mapping[str, Any], what: str) -> str:
    try:
        return json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's {what} cannot be JSON: {error}") from error
