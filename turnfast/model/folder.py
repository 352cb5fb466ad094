"""Find the model of a recipe: a folder, a hub name, or the built-in tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..errors import ConfigError
from .tiny import tiny_architecture, write_tiny_model

TINY = "tiny"
Corpus = Callable[[], Sequence[str]]


def model_folder(
    path: str,
    run_dir: Path,
    corpus: Corpus | None,
    *,
    seed: int,
    max_context: int,
    token_cut: str | None = None,
) -> Path:
    """Return the folder or hub name of the recipe's model.

    The tiny model is written to the run directory first, unless it is there already.

    Args:
        path: `model.path`.
        corpus: texts on which the tokenizer of the tiny model is trained.
        seed: of the tiny model's weights. max_context: its number of positions.
        token_cut: see `write_tiny_model`.

    Raises:
        ConfigError: no such folder, or the tiny model without a corpus.
    """
    check_path(path, corpus)
    if path != TINY:
        return Path(path).expanduser()
    folder = run_dir / TINY
    if corpus is not None and not (folder / "config.json").exists():
        write_tiny_model(folder, corpus(), seed=seed, cut=token_cut, max_context=max_context)
    return folder


def check_path(path: str, corpus: Corpus | None) -> None:
    """Raise ConfigError if `model.path` is a missing folder, or 'tiny' without a corpus."""
    if path == TINY:
        if corpus is None:
            raise ConfigError(
                "model.path: 'tiny' trains its tokenizer on the environment's corpus(), which this "
                "environment does not have; set it to a model folder or hub name"
            )
        return
    folder = Path(path).expanduser()
    # a hub name is `owner/name`, or `name` for a few old ones
    is_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    if is_local and not folder.is_dir():
        raise ConfigError(f"model.path: there is no folder {path}")


def load_architecture(path: str, *, max_context: int) -> Any:
    """Load the transformers config of `model.path`, without weights.

    Args:
        max_context: number of positions of the tiny model.

    Raises:
        ConfigError: there is no model at this path.
    """
    if path == TINY:
        return tiny_architecture(max_context=max_context)
    return read_architecture(Path(path).expanduser())


def read_architecture(folder: Path) -> Any:
    """Read config.json of a model. Raises ConfigError if it is missing or not supported."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(not_a_model(folder, error)) from None


def not_a_model(folder: Path, error: Exception) -> str:
    """The error message for a folder that transformers cannot load."""
    is_run = (folder / "checkpoints").is_dir()
    hint = f"; it is a run directory, use one of {folder}/checkpoints/step_*" if is_run else ""
    text = " ".join(str(error).split())
    return f"model.path: {folder} cannot be loaded as a model: {text}{hint}"
