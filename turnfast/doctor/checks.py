"""What a run would refuse only after its start, looked at without starting it.

Packages that are asked for and missing, a loss that cannot run on the device, a model without a
chat template. No weights are loaded, and no environment is built.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..config.schema import Config, ConfigError
from ..model import dtype_of, pick_device
from ..model.liger import check_liger
from ..model.tiny import tiny_architecture
from ..run import bridge_of, checked_folder
from ..rundir.sinks import check_sinks
from ..update.adamw import check_state
from ..update.update import check_impl


def preflight(config: Config) -> None:
    """Raises ConfigError for the first thing that a run would fail on."""
    device = pick_device(config.train.device)
    check_impl(config.loss, device, dtype_of(config.model, device))
    check_state(config.optim)
    check_sinks(config.train.sinks)
    check_liger(config.model.liger, architecture_of(config).model_type, device)
    if config.model.path == "tiny":
        return  # its tokenizer and template are made for it
    folder = checked_folder(config.model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {folder} has no tokenizer: {error}") from None
    bridge_of(config.model, tokenizer, folder, [])


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
