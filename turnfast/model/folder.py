"""Where the model lies: a folder, a hub name, or the built-in tiny model."""

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
    """The folder or hub name of the recipe's model; writes the tiny model to the run directory.

    Raises:
        ConfigError: no such folder, or the tiny model without a corpus for its tokenizer.
    """
    if config.model.path != "tiny":
        return checked_folder(config.model.path)
    if corpus is None:
        raise ConfigError(
            "model.path: 'tiny' learns its tokenizer from the environment's corpus(), which "
            f"env.name = {config.env.name!r} does not have; name a model"
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
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    # a hub name is `owner/name`, or `name` for a few old ones
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ConfigError(f"model.path: there is no folder {path}")
    return folder


def architecture_of(config: Config) -> Any:
    """The config of the recipe's model.

    Raises:
        ConfigError: there is none at `model.path`.
    """
    if config.model.path == "tiny":
        return tiny_architecture(max_context=config.rollout.max_context)
    folder = checked_folder(config.model.path)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {folder} has no model's config: {error}") from None
