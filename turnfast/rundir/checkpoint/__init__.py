"""Checkpoints in safetensors and JSON, complete or absent.

    checkpoints/
      latest                      the name of the newest folder
      step_000050/
        config.json model.safetensors tokenizer.json …    a folder for `model.path`
        adapter/adapter_config.json …                     with LoRA; the model above has it merged
        trainer/optimizer.safetensors  trainer/optimizer.json  trainer/state.json
        trainer/critic.safetensors                        for rules with a critic
        manifest.json             size and SHA-256 of every other file

The trainer's files have their own folder, because inference engines load every `*.safetensors`
next to `config.json`. All files are written to a hidden folder, flushed to disk and renamed, so
that a kill at any time leaves the earlier checkpoints intact. Nothing is pickled: loading a
checkpoint runs no code from it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as hf_logging

from ...errors import CheckpointError
from .folder import (
    TRAINER,
    find_damage,
    point_latest,
    publish,
    remove_leftovers,
    retire_old,
    write_manifest,
)
from .randomness import random_states, set_random_states
from .state import (
    TrainingState,
    load_critic,
    load_model,
    load_optimizer,
    save_critic,
    save_model,
    save_optimizer,
    to_json,
)

__all__ = [
    "CheckpointError",
    "TrainingState",
    "load_checkpoint",
    "newest_complete",
    "save_checkpoint",
    "save_model",
]

log = logging.getLogger("turnfast")


def save_checkpoint(
    folder: Path, step: int, training: TrainingState, *, progress: Mapping[str, Any], keep: int
) -> Path:
    """Write `folder/step_000050`, point `latest` at it and remove all but the newest `keep`.

    A complete checkpoint of the same step is not written again.

    Args:
        folder: `run_dir/checkpoints`; created if missing.
        progress: what the training loop needs to continue; JSON values, tuples come back as lists.
        keep: number of checkpoints to keep, this one included.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are intact.
    """
    target = folder / f"step_{step:06d}"
    if target.exists() and find_damage(target) is None:
        return target
    partial = folder / f".{target.name}.partial"
    document = to_json({"step": step, "state": dict(progress), "rng": random_states()}, "progress")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        (partial / TRAINER).mkdir(parents=True)
        with _no_progress_bar():
            save_model(training.model, partial)
        if training.tokenizer is not None:
            training.tokenizer.save_pretrained(str(partial))
        save_optimizer(training.optimizer, partial / TRAINER)
        if training.critic is not None:
            save_critic(training.critic, partial / TRAINER)
        (partial / TRAINER / "state.json").write_text(document, encoding="utf-8")
        write_manifest(partial, step)
        publish(partial, target)
        point_latest(folder, target.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{target}: the checkpoint could not be written ({error}); earlier ones are intact. "
            f"Free disk space for {keep + 1} checkpoints or lower train.keep_checkpoints"
        ) from error
    try:
        retire_old(folder, step, keep)
    except OSError as error:
        log.warning("old checkpoints in %s could not be removed: %s", folder, error)
    return target


def load_checkpoint(path: Path, training: TrainingState) -> dict[str, Any]:
    """Load weights, optimizer state and random states in place.

    Returns:
        The saved `progress`, with `step`.

    Raises:
        CheckpointError: the checkpoint is incomplete, or is of another model, optimizer or critic.
    """
    damage = find_damage(path, hashes=False)
    if damage:
        raise CheckpointError(f"{path}: incomplete checkpoint: {damage}")
    load_model(training.model, path)
    load_optimizer(training.optimizer, path / TRAINER)
    if training.critic is not None:
        load_critic(training.critic, path / TRAINER)
    document = json.loads((path / TRAINER / "state.json").read_text(encoding="utf-8"))
    set_random_states(document["rng"])
    return {"step": document["step"], **document["state"]}


def newest_complete(folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step or None; warn of incomplete later ones."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        log.warning("checkpoint %s is skipped: %s", path, damage)
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
