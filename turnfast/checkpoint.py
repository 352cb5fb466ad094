"""Checkpoints that are either whole or not there, in safetensors and JSON.

    checkpoints/
      latest                      the name of the newest folder, for people and scripts
      step_000050/
        config.json model.safetensors tokenizer.json …    what `model.path` takes
        trainer/optimizer.safetensors  trainer/optimizer.json  trainer/state.json
      trainer/critic.safetensors     for rules with a critic
        manifest.json             size and SHA-256 of every other file

The trainer's part lies in a folder of its own because inference engines load every `*.safetensors`
they find beside `config.json`. Everything is written to a hidden folder, flushed to the disk and
renamed, so a kill at any moment leaves the earlier checkpoints as they were. Nothing is pickled:
a stranger's checkpoint can be wrong, but it cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging as hf_logging

from .randomness import random_states, set_random_states

FORMAT = 1
MANIFEST = "manifest.json"
TRAINER = "trainer"

log = logging.getLogger("turnfast")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. The text names the file and the way out."""


class Saves(Protocol):
    """What is asked of a tokenizer."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


class Stateful(Protocol):
    """What is asked of an optimizer: torch's two methods, `state` and `param_groups` in them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class StatefulTensors(Protocol):
    """What is asked of a critic: all that it is, as named tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None: ...


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Stateful,
    tokenizer: Saves | None,
    state: Mapping[str, Any],
    keep: int,
    critic: StatefulTensors | None = None,
) -> Path:
    """Write `folder/step_000050`, point `latest` at it and drop all but the newest `keep`.

    A whole checkpoint of that step is left as it is: a step has one state, so saving it again
    when a run ends costs nothing.

    Args:
        folder: `run_dir/checkpoints`; made when missing.
        model: a Hugging Face model (`save_pretrained`).
        state: whatever the loop needs to go on; JSON values only, tuples come back as lists.
        keep: number of checkpoints left afterwards, this one included.
    Raises:
        CheckpointError: it could not be written; earlier checkpoints are as they were.
    """
    target = folder / f"step_{step:06d}"
    if target.exists() and fault(target) is None:
        return target
    partial = folder / f".{target.name}.partial"
    document = _to_json({"step": step, "state": dict(state), "rng": random_states()}, "state")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        (partial / TRAINER).mkdir(parents=True)
        with _no_progress_bar():
            model.save_pretrained(partial)  # pyright: ignore[reportCallIssue]
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        _save_optimizer(optimizer, partial / TRAINER)
        if critic is not None:
            tensors = {
                name: x.cpu().contiguous().clone() for name, x in critic.state_dict().items()
            }
            save_file(tensors, _critic_file(partial / TRAINER))
        (partial / TRAINER / "state.json").write_text(document, encoding="utf-8")
        _seal(partial, step)
        _rename(partial, target)
        _point_latest(folder, target.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the checkpoint of step {step} could not be written: {error}. Earlier "
            f"checkpoints are untouched; room is needed for {keep + 1} at a time "
            "(train.keep_checkpoints)"
        ) from error
    try:
        _retire(folder, step, keep)
    except OSError as error:
        log.warning("old checkpoints in %s could not be removed: %s", folder, error)
    return target


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: Stateful,
    critic: StatefulTensors | None = None,
) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer state and random states in place.

    Returns:
        The `state` that was saved, with `step` in it.
    Raises:
        CheckpointError: incomplete, or made with another model or optimizer, or without a critic.
    """
    wrong = fault(path, hashes=False)
    if wrong:
        raise CheckpointError(f"{path}: not a whole checkpoint: {wrong}")
    _load_model(model, path)
    _load_optimizer(optimizer, path / TRAINER)
    if critic is not None:
        _load_critic(critic, path / TRAINER)
    document = json.loads((path / TRAINER / "state.json").read_text(encoding="utf-8"))
    set_random_states(document["rng"])
    return {"step": document["step"], **document["state"]}


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint of the highest step that passes every check of `fault`; those that do not
    are skipped with a warning that names them. None when there is none."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        wrong = fault(path)
        if wrong is None:
            return path
        log.warning("checkpoint %s is skipped: %s", path, wrong)
    return None


def fault(path: Path, *, hashes: bool = True) -> str | None:
    """The first thing wrong with a checkpoint, in words, or None when it is whole.

    Args:
        hashes: also read every byte; without it only names and sizes are compared.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        if f"step_{manifest['step']:06d}" != path.name:
            return f"{MANIFEST} is of step {manifest['step']}"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size_bytes"]:
                return f"{name} has {file.stat().st_size} of {expected['size_bytes']} bytes"
            if hashes and _sha256(file) != expected["sha256"]:
                return f"{name} is damaged (SHA-256 differs)"
        if f"{TRAINER}/state.json" not in manifest["files"]:
            return f"{MANIFEST} does not list {TRAINER}/state.json"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    return None


# --- optimizer ------------------------------------------------------------------------------------


def _save_optimizer(optimizer: Stateful, folder: Path) -> None:
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
    (folder / "optimizer.json").write_text(_to_json(document, "optimizer"), encoding="utf-8")
    # a copy each: optimizers may let several entries share memory, the format does not
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, _optimizer_file(folder))


def _load_optimizer(optimizer: Stateful, folder: Path) -> None:
    document = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in document["plain"].items()
    }
    for key, tensor in load_file(_optimizer_file(folder)).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in document["groups"]
    ]
    try:
        optimizer.load_state_dict({"state": dict(sorted(state.items())), "param_groups": groups})
    except (ValueError, LookupError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: the optimizer state belongs to other parameters ({error}); resume with "
            "the model and optim sections of the run that wrote it"
        ) from error
    if isinstance(optimizer, Optimizer):
        _restore_dtypes(optimizer, state)


def _restore_dtypes(optimizer: Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    # load_state_dict casts moments to the parameter's dtype, which would round float32 moments of
    # bfloat16 weights
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        loaded = optimizer.state[parameters[index]]
        for name, value in entries.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def _load_critic(critic: StatefulTensors, folder: Path) -> None:
    try:
        critic.load_state_dict(load_file(_critic_file(folder)))
    except (OSError, LookupError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: holds no critic that fits ({error}); resume with the credit and model "
            "sections of the run that wrote it"
        ) from error


def _critic_file(folder: Path) -> Path:
    return folder / "critic.safetensors"


def _optimizer_file(folder: Path) -> Path:
    return folder / "optimizer.safetensors"


# --- model ----------------------------------------------------------------------------------------


def _load_model(model: nn.Module, path: Path) -> None:
    wanted = model.state_dict()
    loaded: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        loaded |= load_file(file)
    if not _fits(wanted, loaded):
        # files of some architectures name and cut the tensors otherwise than the module does
        fresh = type(model).from_pretrained(path, dtype="auto")  # pyright: ignore
        loaded = fresh.state_dict()
    if not _fits(wanted, loaded):
        raise CheckpointError(
            f"{path}: its tensors do not fit the model; resume with the model section of the run "
            "that wrote it"
        )
    with torch.no_grad():
        for name, tensor in loaded.items():
            wanted[name].copy_(tensor)


def _fits(wanted: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> bool:
    """Every loaded tensor has its place, and what is missing shares memory with what is there."""
    if any(name not in wanted or wanted[name].shape != t.shape for name, t in loaded.items()):
        return False
    filled = {wanted[name].data_ptr() for name in loaded}
    return all(tensor.data_ptr() in filled for tensor in wanted.values())


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


# --- files ----------------------------------------------------------------------------------------


def _to_json(document: Mapping[str, Any], what: str) -> str:
    try:
        return json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's {what} is not JSON: {error}") from error


def _seal(folder: Path, step: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(folder)): {
            "size_bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(
        json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1), encoding="utf-8"
    )
    for path in (*files, manifest, folder / TRAINER, folder):
        _flush(path)


def _rename(partial: Path, target: Path) -> None:
    if target.exists():
        target.rename(_retired(target))
    partial.rename(target)
    _flush(target.parent)


def _point_latest(folder: Path, name: str) -> None:
    partial = folder / ".latest.partial"
    partial.write_text(name + "\n", encoding="utf-8")
    _flush(partial)
    partial.replace(folder / "latest")
    _flush(folder)


def _retire(folder: Path, step: int, keep: int) -> None:
    """Drop what is older than the newest `keep` up to this step. Folders of later steps were passed
    over by a resume and incomplete ones hold no state: neither may push a good one out."""
    steps = (path for path in folder.glob("step_*") if path.name <= f"step_{step:06d}")
    usable = sorted((p for p in steps if fault(p, hashes=False) is None), reverse=True)
    for path in usable[max(keep, 1) :]:
        path.rename(_retired(path))
    _sweep(folder)


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.retired")


def _sweep(folder: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in (*folder.glob(".step_*.partial"), *folder.glob(".step_*.retired")):
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
