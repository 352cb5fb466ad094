"""Tiny random models of the families people train, and rows that look at every hidden state."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from turnfast.model import ATTENTION, Policy
from turnfast.rows import Row

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-sliding": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SMALL),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=5),
    "gemma": GemmaConfig(**SMALL),
}


def policy_of(config: PretrainedConfig, device: str = "cpu") -> Policy:
    """A model of random weights, always the same ones; it has no tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    return Policy(
        model=model.to(device),
        tokenizer=None,  # type: ignore[arg-type]
        folder=Path(),
        device=torch.device(device),
        attention="sdpa",
    )


def whole_row(tokens: list[int]) -> Row:
    """Every token of the row predicts the next one, so every hidden state is looked at."""
    num = len(tokens)
    return Row(
        tokens=tokens,
        rows=list(range(num)),
        targets=[1] * num,
        turns=[0] * num,
        logprobs=[0.0] * num,
        advantages=[1.0],
        places=[0],
        trajectory=0,
    )
