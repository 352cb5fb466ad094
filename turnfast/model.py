"""Any Hugging Face causal language model, run over packed rows up to its last hidden state.

The model keeps its own code. Attention enters through transformers' attention interface: with row
boundaries the kernels' packed attention answers, without them (generation, probes) transformers'
own SDPA does, so one module serves both. Logits are never made here; the loss head takes the hidden
states and the head's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from .config import ConfigError, ModelConfig
from .kernels.attention import (
    Backend,
    PackedRows,
    TreeBackend,
    TreeRows,
    packed_attention,
    pick_backend,
    pick_tree_backend,
    tree_attention,
)
from .liger import apply_liger
from .types import Batch

ATTENTION = "turnfast"
_in_packed_forward: ContextVar[bool] = ContextVar("in_packed_forward", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The model being trained, with what the rest needs to know of it.

    Attributes:
        head_VD: the output projection; the same tensor as the embedding where the two are tied.
        attention, tree_attention: what attends over packed rows, and over prefix trees.
        softcap: the final logit soft-cap of models that have one (Gemma), else None.
        body: the compiled model up to its last hidden state, None where it runs as it is.
        folder: where the weights came from; the sampler reads architecture and tokenizer there.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    device: torch.device
    attention: str
    tree_attention: TreeBackend = "sdpa"
    softcap: float | None = None
    body: Callable[..., Any] | None = None

    @property
    def head_VD(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def synchronize(self) -> None:
        """Wait for queued device work, so that a clock read after it is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def load_policy(config: ModelConfig, folder: Path, device: torch.device) -> Policy:
    """Load weights and tokenizer from a local folder or the local hub cache.

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
    _refuse_unknown_attention(model)
    model.to(device).train()
    apply_liger(model, config.liger, device)
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.freeze_head:
        model.get_output_embeddings().weight.requires_grad_(False)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        device=device,
        attention=attention,
        tree_attention=tree_attention,
        softcap=getattr(architecture, "final_logit_softcapping", None),
        # packs differ in length: one program for all of them
        body=torch.compile(model.base_model, dynamic=True) if config.compile else None,
    )


def hidden_states(policy: Policy, batch: Batch) -> Tensor:
    """Last hidden states [T, D] of a pack; a token sees its own row up to itself, nothing else."""
    rows = _attention_rows(policy, batch)
    body = policy.model.base_model if policy.body is None else policy.body
    token = _in_packed_forward.set(True)
    try:
        out = body(
            input_ids=batch.tokens_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            packed_rows=rows,
        )
    finally:
        _in_packed_forward.reset(token)
    return out.last_hidden_state[0]


@contextmanager
def sparse_embedding(policy: Policy, *, wanted: bool) -> Iterator[None]:
    """An embedding that is the head, too, gives its gradient as the rows of its tokens within.

    A dense one would be a second [V, D] in every micro-batch. It needs a dense gradient to be added
    to, as the optimizer's sum for the head is. A compiled model gives it dense.
    """
    embedding = policy.model.get_input_embeddings()
    tied = isinstance(embedding, nn.Embedding) and embedding.weight is policy.head_VD
    if not (wanted and tied and policy.body is None):
        yield
        return
    before, embedding.sparse = embedding.sparse, True
    try:
        yield
    finally:
        embedding.sparse = before


def _attention_rows(policy: Policy, batch: Batch) -> PackedRows | TreeRows:
    if batch.ends_T is not None:
        return TreeRows(
            ends_T=batch.ends_T, positions_T=batch.positions_T, backend=policy.tree_attention
        )
    return PackedRows(
        cu_seqlens=batch.cu_seqlens,
        lengths=tuple((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()),
        backend=policy.attention,  # type: ignore[arg-type]
        max_seqlen=batch.max_seqlen,
    )


def pick_device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: 'cuda' was asked for, but torch sees no CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def dtype_of(config: ModelConfig, device: torch.device) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def attention_backends(
    config: ModelConfig, architecture: Any, device: torch.device
) -> tuple[Backend, TreeBackend]:
    """What attends over packed rows and over prefix trees, for an architecture on a device.

    Raises:
        ConfigError: the architecture needs what no backend has, or not the one that is asked for.
    """
    _refuse_unsupported(architecture)
    text = architecture.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # rows without shared prefixes may ask for a backend that trees do not have
    for_trees = config.attention if config.attention in ("auto", "sdpa") else "auto"
    try:
        rows = pick_backend(
            device, config.attention, head_dim=head_dim, dtype=dtype_of(config, device)
        )
        return rows, pick_tree_backend(device, for_trees, head_dim=head_dim)
    except ValueError as error:
        raise ConfigError(f"model.attention: {error}") from None


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


def _refuse_unsupported(architecture: Any) -> None:
    name = architecture.model_type
    layers = set(getattr(architecture.get_text_config(), "layer_types", None) or ())
    if layers - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"model.path: {name} has layers of type {', '.join(sorted(layers))}; packed rows need "
            "full or sliding attention in all of them"
        )
    if getattr(architecture, "attn_logit_softcapping", None):
        raise ConfigError(
            f"model.path: {name} caps its attention logits, which no backend here does"
        )
    if getattr(architecture, "logits_scaling", 1.0) not in (None, 1.0):
        raise ConfigError(f"model.path: {name} rescales its logits, which the loss head does not")
    if getattr(architecture, "attention_dropout", 0.0):
        raise ConfigError(
            f"model.path: {name} has attention dropout; set it to 0 in its config.json"
        )


def _refuse_unknown_attention(model: PreTrainedModel) -> None:
    name = model.config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"model.path: {name} does not use transformers' attention interface, through which "
            "packed rows enter"
        )
    if any(parameter.endswith(".sinks") for parameter, _ in model.named_parameters()):
        raise ConfigError(f"model.path: {name} has attention sinks, which no backend here computes")


# a compiled model leaves attention as it is: its tiles depend on the pack
@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_rows: PackedRows | TreeRows | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if packed_rows is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise NotImplementedError("attention sinks and capped attention logits are not computed")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or 0
    qkv = query[0], key[0], value[0]
    if isinstance(packed_rows, TreeRows):
        return tree_attention(*qkv, packed_rows, scale=scale, window=window)[None], None
    return packed_attention(*qkv, packed_rows, scale=scale, window=window)[None], None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for packed rows: their boundaries arrive explicitly."""
    return None if _in_packed_forward.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
