"""What a run will need in memory, worked out without starting it.

The model is built on torch's meta device, where tensors have shapes and no memory, and run once
over a full micro-batch while autograd says what it keeps. So the figure holds for any architecture.
Nothing is loaded but the model's config.json.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers import AutoModelForCausalLM as AnyModel

from .config import Config, ConfigError
from .credit import check_rule
from .lora import add_adapter
from .model import (
    attention_backends,
    dtype_of,
    pick_device,
    refuse_long_context,
    refuse_unsupported,
)
from .moments import BYTES
from .run import checked_folder
from .sampler import choose_backend
from .sampler.ragged import cache_bytes_per_token
from .tiny import tiny_architecture

# The most that a chunk of the loss head takes, by device; see kernels/loss_head.
HEAD_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2_300_000_000}
# Tree attention on the CPU: queries per tile, and the most numbers of its masks that are kept.
TILE, KEPT_MASKS = 128, 1 << 24

ATTENTION = "turnfast-estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes that tensors hold at the end of a full forward pass, where training needs most.

    What an allocator keeps besides is not in it: on a CPU the C library's heap can reach two to
    three times as much, unless MALLOC_MMAP_THRESHOLD_ is set.

    Attributes:
        optimizer: moments, and float32 masters of low-precision weights.
        activations: what autograd keeps of one micro-batch of `tokens` tokens.
        loss_head: float32 sum of a narrower head's gradient, gradient buffer of the hidden states,
            and a chunk of logits.
        cache: keys and values of the sampler, whose `sequences` requests run at a time.
        machine: memory of the device, None where it is not known.
    """

    architecture: str
    device: str
    dtype: str
    parameters: int
    tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_head: int
    sampler: str
    sequences: int
    cache: int
    machine: int | None

    @property
    def training(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.loss_head)
        return sum(parts)


def estimate(config: Config) -> Estimate:
    """The memory of a recipe's run.

    Raises:
        ConfigError: the recipe cannot run, for a reason that shows without starting it.
    """
    check_rule(config.credit.rule, config.credit.options)
    device = pick_device(config.train.device)
    dtype = dtype_of(config.model, device)
    architecture = _architecture(config)
    attention_backends(config.model, architecture, device)
    refuse_long_context(architecture, config.rollout.max_context)
    with torch.device("meta"):
        model = AnyModel.from_config(architecture, dtype=dtype, attn_implementation=ATTENTION)
        refuse_unsupported(model)
        add_adapter(model, config.model.lora, seed=config.train.seed)
    head = model.get_output_embeddings().weight
    if config.model.freeze_head:
        head.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # the reference is a model of its own, unless it is the policy without its adapter
    with_copy = config.loss.kl_coef and not (
        config.model.lora.r and config.loss.reference == "start"
    )
    copies = 2 if with_copy else 1
    masters = 0 if dtype == torch.float32 else 4
    tokens = config.train.tokens_per_microbatch
    V, D = head.shape
    chunk = min(HEAD_CHUNK_BYTES[device.type], 4 * V * tokens)
    # a float32 head adds to its gradient in place, a narrower one to a float32 sum instead
    summed = V * D if masters and head.requires_grad else 0
    sampler, sequences, cache = _cache(config, architecture, dtype, device)
    return Estimate(
        architecture=type(model).__name__,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=tokens,
        weights=(_size(model.parameters()) + _size(model.buffers())) * copies,
        gradients=(trained - summed) * dtype.itemsize,
        optimizer=int(trained * (masters + 2 * BYTES[config.optim.state])),
        activations=_activations(model, config, device),
        loss_head=chunk + 4 * summed + 4 * D * tokens,
        sampler=sampler,
        sequences=sequences,
        cache=cache,
        machine=_machine(device),
    )


def describe(config: Config, found: Estimate) -> str:
    """The estimate as text for a terminal."""
    lines = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "activations": found.activations,
        "loss head": found.loss_head,
        "training, at most": found.training,
        "sampler's cache": found.cache,
    }
    machine = f" of {found.machine / 2**20:,.0f}" if found.machine else ""
    checkpointing = ", recomputed in the backward pass" if config.model.checkpointing else ""
    return "\n".join(
        [
            f"model         {found.architecture}, {found.parameters / 1e6:,.1f} M parameters, "
            f"{found.dtype}, on {found.device}",
            f"token budget  {found.tokens:,} per micro-batch (train.tokens_per_microbatch); a row "
            f"has at most {config.rollout.max_context:,} (rollout.max_context)",
            f"sampler       {found.sampler}, {found.sequences:,} sequences at a time",
            f"optimizer     AdamW, moments in {config.optim.state}; activations{checkpointing} "
            "of one micro-batch",
            f"memory        MiB{machine}",
            *(f"  {name:<20}{size / 2**20:>12,.1f}" for name, size in lines.items()),
        ]
    )


def _architecture(config: Config) -> Any:
    if config.model.path == "tiny":
        return tiny_architecture(max_context=config.rollout.max_context)
    folder = checked_folder(config.model.path)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {folder} has no model's config: {error}") from None


def _activations(model: Any, config: Config, device: torch.device) -> int:
    """Bytes that autograd keeps of a forward pass over a full micro-batch."""
    tokens, context = config.train.tokens_per_microbatch, config.rollout.max_context
    kept: dict[int, Any] = {p.untyped_storage()._cdata: None for p in model.parameters()}
    total = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal total
        storage = x.untyped_storage()
        if storage._cdata not in kept:
            kept[storage._cdata] = storage
            total += storage.nbytes()
        return x

    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        # a mask, though no attention looks at it: without one transformers reads the positions
        mask = torch.ones_like(ids, dtype=torch.bool)
        out = model.base_model(
            input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
    text = model.config.get_text_config()
    if device.type == "cpu" and config.train.share_prefixes:
        # the keys of a tile's path are gathered for every tile; half a context on average
        path = context // 2
        total += tokens * path // TILE * cache_bytes_per_token(model.config, out.dtype)
        if tokens * path <= KEPT_MASKS:
            total += tokens * path * out.element_size()
    if config.model.checkpointing:
        # what enters each layer, and the inside of one
        layers = text.num_hidden_layers
        total = total // layers + layers * out.numel() * out.element_size()
    return total


class _Kept(torch.autograd.Function):
    """Stands in for attention: keeps what every backend keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, torch.empty_like(out), sums)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Kept.apply(query, key, value), None


def _cache(
    config: Config, architecture: Any, dtype: torch.dtype, device: torch.device
) -> tuple[str, int, int]:
    """The sampler, how many sequences it runs at a time, and bytes of their keys and values."""
    backend = choose_backend(config.sampler)
    sequences = config.sampler.max_sequences
    needed = cache_bytes_per_token(architecture, dtype) * config.rollout.max_context * sequences
    total = _machine(device)
    if device.type == "cuda" and total:
        share = int(total * config.sampler.gpu_memory)
        return backend, sequences, share if backend == "vllm" else min(needed, share)
    return backend, sequences, min(needed, total // 2) if total else needed


def _machine(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _size(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
