"""What a model needs, read from its config and its modules: granted here, or refused by name.

What no name is known for is found when the loaded model is compared with itself: see selftest.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.schema import ModelConfig
from ..errors import ConfigError
from ..kernels.attention import Backend, TreeBackend, pick_backend, pick_tree_backend
from .device import dtype_of


def attention_backends(
    config: ModelConfig, architecture: Any, device: torch.device
) -> tuple[Backend, TreeBackend]:
    """What attends over packed rows and over prefix trees, for an architecture on a device.

    Raises:
        ConfigError: the architecture needs what no backend has, or not the one that is asked for.
    """
    _refuse_architecture(architecture)
    text = architecture.get_text_config()
    head_dim, value_dim = _head_dims(text)
    dtype = dtype_of(config, device)
    # rows without shared prefixes may ask for a backend that trees do not have
    for_trees = config.attention if config.attention in ("auto", "sdpa") else "auto"
    try:
        rows = pick_backend(
            device,
            config.attention,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype,
            window=sliding_window(architecture),
        )
        trees = pick_tree_backend(
            device, for_trees, head_dim=head_dim, value_dim=value_dim, dtype=dtype
        )
    except ValueError as error:
        raise ConfigError(f"model.attention: {error}") from None
    return rows, trees


def sliding_window(architecture: Any) -> int:
    """Tokens that a layer with a sliding window sees, 0 where no layer has one."""
    text = architecture.get_text_config()
    layers = getattr(text, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return 0
    return getattr(text, "sliding_window", None) or 0


def softcap(architecture: Any) -> float | None:
    """The final logit soft-cap of models that have one (Gemma, RecurrentGemma), else None."""
    text = architecture.get_text_config()
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if getattr(text, name, None):
            return float(getattr(text, name))
    return None


def logit_scale(architecture: Any) -> float:
    """What a model multiplies its logits by: Cohere's `logit_scale`, or 1 / Granite's
    `logits_scaling`; 1 in most."""
    text = architecture.get_text_config()
    factor, divisor = (getattr(text, name, None) for name in ("logit_scale", "logits_scaling"))
    return (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor)


def refuse_long_context(architecture: Any, max_context: int) -> None:
    """Refuse rows that reach beyond the positions a model was made for.

    Raises:
        ConfigError: with both numbers.
    """
    most = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if most is not None and max_context > most:
        raise ConfigError(
            f"rollout.max_context: {max_context} tokens, but {architecture.model_type} has "
            f"max_position_embeddings = {most}; lower it, or scale the positions in the model's "
            "config.json"
        )


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse a model whose modules show that hidden states and head do not give its log-probs.

    Raises:
        ConfigError: what it has that is not computed here.
    """
    name = model.config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"model.path: {name} does not use transformers' attention interface, through which "
            "packed rows enter"
        )
    if any(parameter.endswith(".sinks") for parameter, _ in model.named_parameters()):
        raise ConfigError(f"model.path: {name} has attention sinks, which no backend here computes")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"model.path: {name} has no linear output projection to train through")
    if head.bias is not None:
        raise ConfigError(
            f"model.path: the output projection of {name} has a bias, which the loss head does not "
            "add; take a model without one"
        )


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, that of whole layers too; its config.json stays.

    A step is recomputed when memory runs out, its old log-probs are those of another forward, and
    the sampler drops nothing: with dropout each of these would be of another model.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _head_dims(text: Any) -> tuple[int, int]:
    """Dimensions of a query or key, and of a value."""
    if getattr(text, "qk_nope_head_dim", None):
        # latent attention (DeepSeek): its `head_dim` is that of the rotated part alone
        return text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return head_dim, getattr(text, "v_head_dim", None) or head_dim


def _refuse_architecture(architecture: Any) -> None:
    name, text = architecture.model_type, architecture.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    layers |= set(getattr(text, "block_types", None) or ()) - {"attention"}
    if layers:
        raise ConfigError(
            f"model.path: {name} has layers of type {', '.join(sorted(layers))}; packed rows need "
            "full or sliding attention in all of them"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise ConfigError(
            f"model.path: {name} caps its attention logits, which no backend here does"
        )


def attention_span_of(model: PreTrainedModel) -> int:
    """The number of keys whose attention costs a token as much as all else.

    A token takes 2 operations for each weight of the matrices, and 4 · heads · head_dim for each
    key in every layer. Example: about 35,000 for Qwen2.5-7B, 18,000 for its 1.5B.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    looked_up, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or looked_up.weight is not head.weight:
        weights -= sum(p.numel() for p in looked_up.parameters())
    return max(1, weights // (2 * config.num_hidden_layers * width))
