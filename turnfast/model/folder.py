"""Find the model: a folder, a hub name, or the built-in tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..config.schema import Config
from ..errors import ConfigError
from .tiny import tiny_architecture, write_tiny_model


def model_folder(
    config: Config,
    run_dir: Path,
    corpus: Callable[[], Sequence[str]] | None,
    *,
    token_cut: str | None = None,
) -> Path:
    """The folder or hub name of `model.path`; writes the tiny model to the run directory.

    Raises:
        ConfigError: the folder does not exist, or the tiny model has no corpus for its tokenizer.
    """
    if config.model.path != "tiny":
        return checked_folder(config.model.path)
    if corpus is None:
        raise ConfigError(
            "model.path: 'tiny' trains its tokenizer on the environment's corpus(), which "
            f"env.name = {config.env.name!r} does not have; set model.path to a model"
        )
    folder = run_dir / "tiny"
    if not (folder / "config.json").exists():
        write_tiny_model(
            folder,
            corpus(),
            seed=config.train.seed,
            cut=token_cut,
            max_context=config.rollout.max_context,
        )
    return folder


def checked_folder(path: str) -> Path:
    """Expand `~`. Raises ConfigError if `path` is neither a folder nor a possible hub name."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    # a hub name is `owner/name`, or `name` for a few old models
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ConfigError(f"model.path: there is no folder {path}")
    return folder


def architecture_of(config: Config) -> Any:
    """The transformers config of `model.path`, read without the weights.

    Raises:
        ConfigError: see `checked_folder` and `read_architecture`.
    """
    if config.model.path == "tiny":
        return tiny_architecture(max_context=config.rollout.max_context)
    return read_architecture(checked_folder(config.model.path))


def read_architecture(folder: Path) -> Any:
    """Read config.json of a model. Raises ConfigError if it is missing or not supported."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(not_a_model(folder, error)) from None


def not_a_model(folder: Path, error: Exception) -> str:
    """The error message for a folder that transformers cannot load."""
    hint = ""
    if (folder / "checkpoints").is_dir():
        hint = f"; it is a run directory, use one of {folder}/checkpoints/step_*"
    return f"model.path: {folder} cannot be loaded as a model: {error}{hint}"
