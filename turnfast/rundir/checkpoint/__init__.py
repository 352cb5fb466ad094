"""Checkpoints that are either whole or not there, in safetensors and JSON.

    checkpoints/
      latest                      the name of the newest folder, for people and scripts
      step_000050/
        config.json model.safetensors tokenizer.json …    what `model.path` takes
        adapter/adapter_config.json …                     with LoRA, what was trained; the model
                                                          above has it merged
        trainer/optimizer.safetensors  trainer/optimizer.json  trainer/state.json
        trainer/critic.safetensors                        for rules with a critic
        manifest.json             size and SHA-256 of every other file

The trainer's part lies in a folder of its own because inference engines load every `*.safetensors`
they find beside `config.json`. Everything is written to a hidden folder, flushed to the disk and
renamed, so a kill at any moment leaves the earlier checkpoints as they were. Nothing is pickled:
a stranger's checkpoint can be wrong, but it cannot run code.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as hf_logging

from ...errors import CheckpointError
from .folder import TRAINER, fault, move_in, point_latest, retire, seal, sweep
from .randomness import random_states, set_random_states
from .state import (
    Stateful,
    StatefulTensors,
    load_critic,
    load_model,
    load_optimizer,
    save_critic,
    save_model,
    save_optimizer,
    to_json,
)

__all__ = ["CheckpointError", "load_checkpoint", "newest_whole", "save_checkpoint", "save_model"]

log = logging.getLogger("turnfast")


class Saves(Protocol):
    """What is asked of a tokenizer."""

    def save_pretrained(self, save_directory: str, /) -> Any: ...


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
    document = to_json({"step": step, "state": dict(state), "rng": random_states()}, "state")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        (partial / TRAINER).mkdir(parents=True)
        with _no_progress_bar():
            save_model(model, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        save_optimizer(optimizer, partial / TRAINER)
        if critic is not None:
            save_critic(critic, partial / TRAINER)
        (partial / TRAINER / "state.json").write_text(document, encoding="utf-8")
        seal(partial, step)
        move_in(partial, target)
        point_latest(folder, target.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the checkpoint of step {step} could not be written: {error}. Earlier "
            f"checkpoints are untouched; room is needed for {keep + 1} at a time "
            "(train.keep_checkpoints)"
        ) from error
    try:
        retire(folder, step, keep)
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
    load_model(model, path)
    load_optimizer(optimizer, path / TRAINER)
    if critic is not None:
        load_critic(critic, path / TRAINER)
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


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
