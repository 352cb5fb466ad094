"""Weights and tokenizer from a folder, ready to be trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .architecture import (
    attention_backends,
    logit_scale,
    refuse_unsupported,
    softcap,
    switch_off_dropout,
)
from .attention import ATTENTION
from .device import dtype_of
from .liger import apply_liger
from .policy import Policy
from .selftest import check_logprobs


def load_policy(config: ModelConfig, folder: Path, device: torch.device) -> Policy:
    """Load weights and tokenizer from a local folder or the local hub cache.

    Dropout is switched off, and the model is compared with its own plain forward on a few tokens.

    Raises:
        ConfigError: the folder is no model, or the model has a feature the kernels do not compute.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    dtype = dtype_of(config, device)
    try:
        architecture = AutoConfig.from_pretrained(folder)
        attention, tree_attention = attention_backends(config, architecture, device)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=ATTENTION
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        hint = ""
        if (folder / "checkpoints").is_dir():
            hint = f"; it is a run directory, give one of {folder}/checkpoints/step_*"
        raise ConfigError(
            f"model.path: {folder} cannot be loaded as a model: {error}{hint}"
        ) from None
    refuse_unsupported(model)
    switch_off_dropout(model)
    model.to(device)  # pyright: ignore[reportArgumentType]  # its wrapper's type takes no `self`
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
    if config.freeze_head:
        policy.head_VD.requires_grad_(False)
    check_logprobs(policy)
    if not config.compile:
        return policy
    # packs differ in length: one program for all of them
    return replace(policy, body=torch.compile(model.base_model, dynamic=True))
