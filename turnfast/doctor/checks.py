"""What a run would refuse only after its start, looked at without starting it.

Packages that are asked for and missing, a loss that cannot run on the device, a model without a
chat template. No weights are loaded, and no environment is built.
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from ..chat.open import open_chat
from ..config.schema import Config, RolloutConfig
from ..errors import ConfigError
from ..model import (
    dtype_of,
    pick_device,
)
from ..model.folder import architecture_of, checked_folder
from ..model.liger import check_liger
from ..parallel.ranks import Ranks
from ..rundir.sinks import check_sinks
from ..sampler import choose_backend
from ..update.update import check_impl


def preflight(config: Config) -> None:
    """Raises ConfigError for the first thing that a run would fail on."""
    device = pick_device(config.train.device)
    check_impl(config.loss, device, dtype_of(config.model, device))
    check_sinks(config.train.sinks)
    check_liger(config.model.liger, architecture_of(config).model_type, device)
    if config.model.path == "tiny":
        return  # its tokenizer and template are made for it
    folder = checked_folder(config.model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {folder} has no tokenizer: {error}") from None
    open_chat(config.model, tokenizer, [])


def refuse_uneven(config: RolloutConfig, ranks: Ranks) -> None:
    if config.prompts_per_step % ranks.size:
        raise ConfigError(
            f"rollout.prompts_per_step: {config.prompts_per_step} prompts cannot be dealt evenly "
            f"to {ranks.size} ranks; set it to a multiple of {ranks.size}"
        )


def refuse_rounded_adapter(config: Config, device: torch.device) -> None:
    """Refuse an adapter that the sampler knows in part only, with nothing to make up for it.

    A sampler with weights of its own is given W + B A rounded to the model's dtype: where B A is
    below half the last digit of W it samples from W, and the ratio of the trainer's policy to that
    would be taken for 1.

    Raises:
        ConfigError: a low-precision dtype, such a sampler, and no importance weight.
    """
    dtype = dtype_of(config.model, device)
    weighed = config.loss.is_cap is not None or config.loss.old_logprobs == "sampler"
    if not config.model.lora.r or dtype == torch.float32 or weighed:
        return
    if choose_backend(config.sampler) == "local":
        return  # it samples with the trainer's own module, adapter and all
    raise ConfigError(
        f"loss.is_cap: vLLM is given the adapter merged into {str(dtype).removeprefix('torch.')} "
        "weights, which rounds its smallest changes away, and samples from a slightly different "
        "policy; set loss.is_cap (such as 2.0) or loss.old_logprobs = 'sampler', which weigh that, "
        "or model.dtype = 'float32'"
    )
