"""Read from a model's config and modules what it needs, and check that it is supported.

Differences that no field of the config names are found by selftest.py, which compares log-probs.
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
    """Choose the attention backends for packed rows and for prefix trees.

    Raises:
        ConfigError: no backend supports the architecture, or `model.attention` cannot run it here.
    """
    _check_architecture(architecture)
    text = architecture.get_text_config()
    head_dim, value_dim = _head_dims(text)
    dtype = dtype_of(config, device)
    # "flash" and "varlen" choose the backend of packed rows only
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
    """The number of tokens that a sliding-window layer sees, 0 without such layers."""
    text = architecture.get_text_config()
    layers = getattr(text, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return 0
    return getattr(text, "sliding_window", None) or 0


def softcap(architecture: Any) -> float | None:
    """The soft-cap of the final logits (Gemma, RecurrentGemma), or None."""
    text = architecture.get_text_config()
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if getattr(text, name, None):
            return float(getattr(text, name))
    return None


def logit_scale(architecture: Any) -> float:
    """The factor of the logits: Cohere's `logit_scale`, 1 / Granite's `logits_scaling`, else 1."""
    text = architecture.get_text_config()
    factor, divisor = (getattr(text, name, None) for name in ("logit_scale", "logits_scaling"))
    return (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor)


def check_context_length(architecture: Any, max_context: int) -> None:
    """Raise ConfigError if `max_context` exceeds the model's maximum position."""
    limit = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_context > limit:
        raise ConfigError(
            f"rollout.max_context: {max_context} tokens, but {architecture.model_type} has "
            f"max_position_embeddings = {limit}; lower it, or scale the positions in the model's "
            "config.json"
        )


def check_modules(model: PreTrainedModel) -> None:
    """Raise ConfigError if the model has a module or parameter that is not supported."""
    name = model.config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"model.path: {name} does not use transformers' attention interface, which packed rows "
            "need; use another model"
        )
    if any(parameter.endswith(".sinks") for parameter, _ in model.named_parameters()):
        raise ConfigError(
            f"model.path: {name} has attention sinks, which are not supported; use another model"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"model.path: {name} has no linear output projection; use a causal language model"
        )
    if head.bias is not None:
        raise ConfigError(
            f"model.path: the output projection of {name} has a bias, which the loss head does not "
            "support; use a model without one"
        )


def switch_off_dropout(model: nn.Module) -> None:
    """Set all dropout and layer-drop rates of a model to 0; its config keeps them.

    The sampler has no dropout, and old log-probs come from a separate forward: with dropout the
    ratios would compare different models.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _head_dims(text: Any) -> tuple[int, int]:
    """Head dimensions of queries and keys, and of values."""
    if getattr(text, "qk_nope_head_dim", None):
        # latent attention (DeepSeek): `head_dim` is the size of the rotary part only
        return text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return head_dim, getattr(text, "v_head_dim", None) or head_dim


def _check_architecture(architecture: Any) -> None:
    name, text = architecture.model_type, architecture.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    layers |= set(getattr(text, "block_types", None) or ()) - {"attention"}
    if layers:
        raise ConfigError(
            f"model.path: {name} has layers of type {', '.join(sorted(layers))}; only full and "
            "sliding attention are supported, use another model"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise ConfigError(
            f"model.path: {name} caps its attention logits, which is not supported; use another "
            "model"
        )


def attention_span_of(model: PreTrainedModel) -> int:
    """The number of keys whose attention costs a token as much as all matrix products.

    A token costs 2 operations per weight, and 4 · heads · head_dim per key and layer. Example:
    about 35,000 for Qwen2.5-7B, 18,000 for Qwen2.5-1.5B.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        weights -= sum(p.numel() for p in embedding.parameters())  # a lookup, not a product
    return max(1, weights // (2 * config.num_hidden_layers * width))
