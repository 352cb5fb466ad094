"""Checks of a recipe that need no weights: packages, device, model, environment, credit rule.

A dry run and every command that starts something run the same checks. Conflicts between two fields
are reported earlier, when the recipe is read: see config/conflicts.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM as AnyModel
from transformers import AutoTokenizer

from ..chat.open import open_chat
from ..config.schema import Config, ModelConfig, RolloutConfig
from ..credit import check_rule
from ..envs import Demonstrator, Env, Split, tasks_of
from ..envs.base import tool_schemas
from ..envs.load import open_env
from ..errors import ConfigError
from ..model import (
    ATTENTION,
    attention_backends,
    check_context_length,
    check_modules,
    dtype_of,
    pick_device,
)
from ..model.folder import TINY, Corpus, check_path, load_architecture
from ..model.liger import check_liger
from ..model.lora import add_adapter
from ..rundir.sinks import check_sinks
from ..sampler import choose_backend
from ..update.update import check_impl


def check_training(config: Config, *, num_ranks: int = 1) -> Env:
    """Run every check of a training run.

    Returns:
        The environment, which is built on the way.
    Raises:
        ConfigError: names the field and the fix.
    """
    device = pick_device(config.train.device)
    check_rule(config.credit.rule, config.credit.options, num_ranks=num_ranks)
    check_even_ranks(config.rollout, num_ranks)
    check_impl(config.loss, device, dtype_of(config.model, device))
    check_rounded_adapter(config, device)
    check_sinks(config.train.sinks)
    return check_rollouts(config, split="train")


def check_rollouts(config: Config, *, split: Split) -> Env:
    """Run the checks of a command that samples tasks of a split; returns the environment."""
    choose_backend(config.sampler)
    env = open_env(config.env)
    tasks_of(env, split, name=config.env.name)
    check_context_length(check_model(config, env), config.rollout.max_context)
    return env


def check_model(config: Config, env: Env) -> Any:
    """Run the checks of a command that loads a model; returns the model's Hugging Face config."""
    check_path(config.model.path, corpus_of(env))
    device = pick_device(config.train.device)
    architecture = load_architecture(config.model.path, max_context=config.rollout.max_context)
    attention_backends(config.model, architecture, device)
    check_liger(config.model.liger, architecture.model_type, device)
    build_on_meta(config.model, architecture, dtype_of(config.model, device))
    check_chat(config.model, env)
    return architecture


def corpus_of(env: Env) -> Corpus | None:
    """The texts for the tokenizer of the tiny model; None if the environment has none."""
    return env.corpus if isinstance(env, Demonstrator) else None


def build_on_meta(
    config: ModelConfig, architecture: Any, dtype: torch.dtype, attention: str = ATTENTION
) -> Any:
    """Build the model with its adapter on torch's meta device, where tensors have no memory.

    Raises:
        ConfigError: the model has a part that is not supported, or an adapter does not fit it.
    """
    with torch.device("meta"):
        # a model without transformers' attention interface can be built with "eager" only
        model = AnyModel.from_config(architecture, dtype=dtype, attn_implementation="eager")
        check_modules(model)
        model.set_attn_implementation(attention)
        add_adapter(model, config.lora, seed=0)
    return model


def check_chat(config: ModelConfig, env: Env) -> None:
    """Raise ConfigError unless the model has a tokenizer and a chat template that can be used."""
    if config.path == TINY:
        return
    folder = Path(config.path).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: {folder} has no tokenizer: {' '.join(str(error).split())}"
        ) from None
    open_chat(config, tokenizer, tool_schemas(env))


def check_even_ranks(config: RolloutConfig, num_ranks: int) -> None:
    """Raise ConfigError unless every rank gets the same number of prompts."""
    if config.prompts_per_step % num_ranks:
        raise ConfigError(
            f"rollout.prompts_per_step: {config.prompts_per_step} prompts cannot be divided among "
            f"{num_ranks} ranks; set it to a multiple of {num_ranks}"
        )


def check_rounded_adapter(config: Config, device: torch.device) -> None:
    """Raise ConfigError if the sampler rounds the adapter and no importance weight corrects it.

    vLLM gets W + B A rounded to the model's dtype. Where B A is less than half the last digit of W,
    vLLM samples with W alone. The local sampler uses the trainer's own module, adapter included.
    """
    dtype = dtype_of(config.model, device)
    corrected = config.loss.is_cap is not None or config.loss.old_logprobs == "sampler"
    if not config.model.lora.r or dtype == torch.float32 or corrected:
        return
    if choose_backend(config.sampler) == "local":
        return
    raise ConfigError(
        f"loss.is_cap: vLLM samples with the adapter merged and rounded to "
        f"{str(dtype).removeprefix('torch.')}, so its policy differs from the trainer's; set "
        "loss.is_cap (such as 2.0) or loss.old_logprobs = 'sampler' to correct for it, or "
        "model.dtype = 'float32'"
    )
