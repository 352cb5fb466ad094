"""Models for step timings: the tiny model, and public shapes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from turnfast.config.schema import ModelConfig
from turnfast.model import ATTENTION, Policy, attention_backends, dtype_of, load_policy
from turnfast.model.liger import apply_liger

SHAPES: dict[str, dict[str, Any]] = {
    # from the config.json of Qwen/Qwen2.5-1.5B and Qwen/Qwen2.5-7B
    "qwen2.5-1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def architecture(shape: str, layers: int | None = None) -> Qwen2Config:
    """The public architecture, with `layers` layers if given."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    return Qwen2Config(
        **sizes,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        use_sliding_window=False,
        attention_dropout=0.0,
    )


def load(
    shape: str, config: ModelConfig, folder: Path, device: torch.device, layers: int | None = None
) -> Policy:
    """Create a policy of a shape on the device.

    Args:
        shape: "tiny" loads the model in `folder`. A name in SHAPES gets random weights and only the
            tokenizer of `folder`.
    """
    if shape == "tiny":
        return load_policy(config, folder, device)
    made = architecture(shape, layers)
    attention, tree_attention = attention_backends(config, made, device)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            made, dtype=dtype_of(config, device), attn_implementation=ATTENTION
        )
    model.train()
    apply_liger(model, config.liger, device)
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        folder=folder,
        device=device,
        attention=attention,
        tree_attention=tree_attention,
        body=torch.compile(model.base_model, dynamic=True) if config.compile else None,
    )
