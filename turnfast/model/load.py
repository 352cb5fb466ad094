"""Load weights and tokenizer for training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .architecture import (
    attention_backends,
    check_modules,
    logit_scale,
    softcap,
    switch_off_dropout,
)
from .attention import ATTENTION
from .device import dtype_of
from .folder import not_a_model, read_architecture
from .liger import apply_liger
from .policy import Policy
from .selftest import check_logprobs


def load_policy(config: ModelConfig, folder: Path, device: torch.device) -> Policy:
    """Load weights and tokenizer from a local folder or the local hub cache.

    Dropout is switched off, and `check_logprobs` compares the model with its own plain forward.

    Raises:
        ConfigError: the folder has no model, or the model has a feature that is not supported.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    dtype = dtype_of(config, device)
    architecture = read_architecture(folder)
    attention, tree_attention = attention_backends(config, architecture, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, SafetensorError) as error:  # a file is missing or damaged
        raise ConfigError(not_a_model(folder, error)) from None
    check_modules(model)
    switch_off_dropout(model)
    model.to(device)  # pyright: ignore[reportArgumentType]  # the wrapper's type lacks `self`
    model.train()
    apply_liger(model, config.liger, device)
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        device=device,
        attention=attention,
        tree_attention=tree_attention,
        softcap=softcap(architecture),
        logit_scale=logit_scale(architecture),
    )
    check_logprobs(policy)
    if not config.compile:
        return policy
    # packs differ in length: compile one program with dynamic shapes
    return replace(policy, body=torch.compile(model.base_model, dynamic=True))
