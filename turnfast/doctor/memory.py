"""Estimate the memory of a training run without starting it.

The model is built on torch's meta device, where tensors have shapes and no memory. One forward pass
over a full micro-batch then shows what autograd keeps, for any architecture. Only the model's
config.json is read.

The peak is the end of a forward pass, the optimizer step, or a rollout or checkpoint with the
sampler awake.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..config.schema import Config
from ..kernels.attention.tiles import queries_per_tile
from ..model import dtype_of, pick_device
from ..model.folder import load_architecture
from ..sampler import choose_backend
from ..sampler.cache import cache_bytes_per_token
from ..sampler.vllm_start import cpu_cache_bytes
from ..update.adamw import DTYPES, WORKSPACE, WORKSPACE_BYTES
from .checks import build_on_meta

# Largest chunk of logits in the loss head, by device; see kernels/loss_head.
HEAD_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2_300_000_000}

ATTENTION = "turnfast-estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerMemory:
    """Bytes of the sampler: keys and values, and its own copy of the weights where it has one.

    Attributes:
        sequences: rollouts that it generates at the same time.
        awake, asleep: while it generates, and while the policy is trained.
    """

    backend: str
    sequences: int
    awake: int
    asleep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes of tensors, by purpose.

    The memory of the process is larger: the C library's heap can reach two to three times this on a
    CPU, unless MALLOC_MMAP_THRESHOLD_ is set.

    Attributes:
        weights: of the policy, and of the reference policy if it is a second model.
        gradients: float32 sums; with low-precision weights also the largest single gradient.
        optimizer: moments, and float32 master copies of low-precision weights.
        activations: what autograd keeps of one micro-batch of `tokens` tokens.
        loss_head: gradient of the hidden states, and one chunk of logits.
        workspace: of the optimizer step.
        merged: the layers with a LoRA adapter, merged for a checkpoint.
        available: memory of the device, None if unknown.
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
    workspace: int
    sampler: SamplerMemory
    merged: int
    available: int | None

    @property
    def training(self) -> int:
        """Peak of training, without the sampler."""
        always = self.weights + self.gradients + self.optimizer
        return always + max(self.activations + self.loss_head, self.workspace)

    @property
    def rollout(self) -> int:
        """Peak while the sampler is awake, or a checkpoint is written."""
        return self.weights + self.optimizer + self.sampler.awake + self.merged

    @property
    def peak(self) -> int:
        return max(self.training + self.sampler.asleep, self.rollout)


def estimate(config: Config) -> Estimate:
    """Estimate the memory of a recipe's run; run `check_training` first.

    Raises:
        ConfigError: there is no model at `model.path`.
    """
    device = pick_device(config.train.device)
    dtype = dtype_of(config.model, device)
    architecture = load_architecture(config.model.path, max_context=config.rollout.max_context)
    model = build_on_meta(config.model, architecture, dtype, attention=ATTENTION)
    head = model.get_output_embeddings().weight
    trained = [p for p in model.parameters() if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    # with an adapter the reference is the policy with the adapter off
    has_copy = config.loss.kl_coef and not (
        config.model.lora.r and config.loss.reference == "start"
    )
    master_bytes = 0 if dtype == torch.float32 else 4
    # the head accumulates its gradient in place; other layers return one in their own dtype
    largest = max((p.numel() for p in trained if p is not head), default=0)
    largest_trained = max(largest, head.numel() if head.requires_grad else 0)
    tokens = config.train.tokens_per_microbatch
    V, D = head.shape
    return Estimate(
        architecture=type(model).__name__,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=tokens,
        weights=(_size(model.parameters()) + _size(model.buffers())) * (2 if has_copy else 1),
        gradients=4 * num_trained + (largest * dtype.itemsize if master_bytes else 0),
        optimizer=num_trained * (master_bytes + 2 * DTYPES[config.optim.state].itemsize),
        activations=_activations(model, config, device),
        loss_head=min(HEAD_CHUNK_BYTES[device.type], 4 * V * tokens) + 4 * D * tokens,
        workspace=int(min(1.0, largest_trained / WORKSPACE) * WORKSPACE_BYTES)
        if config.optim.state == "bfloat16"
        else 0,
        sampler=_sampler(config, model, dtype, device),
        merged=_size(p for name, p in model.named_parameters() if ".base_layer." in name),
        available=_memory_of(device),
    )


def describe(config: Config, memory: Estimate) -> str:
    """Format the estimate for a terminal."""
    sizes = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "loss head": memory.loss_head,
        "optimizer step": memory.workspace,
        "training, peak": memory.training,
        "sampler, asleep": memory.sampler.asleep,
        "sampler, awake": memory.sampler.awake,
        "merged adapter": memory.merged,
        "peak": memory.peak,
    }
    checkpointing = ", with activation checkpointing" if config.model.checkpointing else ""
    rows = "\n".join(f"  {name:<20}{size / 2**20:>12,.1f}" for name, size in sizes.items())
    return f"""\
model         {memory.architecture}, {memory.parameters / 1e6:,.1f} M parameters, \
{memory.dtype}, on {memory.device}
token budget  {memory.tokens:,} per micro-batch (train.tokens_per_microbatch); a row has at most \
{config.rollout.max_context:,} (rollout.max_context)
sampler       {memory.sampler.backend}, {memory.sampler.sequences:,} sequences at the same time
optimizer     AdamW, moments in {config.optim.state}; activations of one micro-batch{checkpointing}
memory        MiB
{rows}
{verdict(memory)}"""


def verdict(memory: Estimate) -> str:
    """Whether the run fits in memory; if not, the field that lowers the largest part."""
    needed = f"{memory.peak / 2**30:,.1f} GiB"
    if memory.available is None:
        return f"needs {needed}; the memory of the {memory.device} is unknown"
    available = f"{memory.available / 2**30:,.1f} GiB"
    if memory.peak <= memory.available:
        return f"fits: {needed} of {available}"
    training = memory.training + memory.sampler.asleep > memory.available
    sampler_field = "gpu_memory" if memory.device == "cuda" else "max_sequences"
    options = [
        (
            memory.activations + memory.loss_head if training else 0,
            "lower train.tokens_per_microbatch, or set model.checkpointing = true",
        ),
        (
            memory.optimizer + (memory.gradients if training else 0),
            "train an adapter with model.lora.r, or set optim.state = 'bfloat16'",
        ),
        (
            memory.sampler.asleep if training else memory.sampler.awake,
            f"lower sampler.{sampler_field}",
        ),
    ]
    return f"does not fit: {needed} of {available}; {max(options)[1]}"


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
    # without a mask transformers reads the values of the positions, which meta tensors lack
    mask = torch.ones_like(ids, dtype=torch.bool)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model.base_model(
            input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
    mask_bytes = 0
    if device.type == "cpu" and config.train.share_prefixes:
        # tree attention gathers the keys of each tile's path, half a context on average
        path = context // 2
        gathered = tokens * path // queries_per_tile(path)
        total += gathered * cache_bytes_per_token(model.config, out.dtype)
        mask_bytes = tokens * path * out.element_size()  # all layers share the masks
    if config.model.checkpointing:
        # the input of every layer, and the inside of one
        layers = model.config.get_text_config().num_hidden_layers
        total = total // layers + layers * out.numel() * out.element_size()
    return total + mask_bytes


class _SaveForBackward(torch.autograd.Function):
    """Attention that saves the tensors that every backend saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        logsumexp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, torch.empty_like(out), logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _SaveForBackward.apply(query, key, value), None


def _sampler(config: Config, model: Any, dtype: torch.dtype, device: torch.device) -> SamplerMemory:
    overlap, context = config.train.overlap, config.rollout.max_context
    sequences, available = config.sampler.max_sequences, _memory_of(device)
    on_gpu = device.type == "cuda"
    share = int((available or 0) * config.sampler.gpu_memory)
    copy = _size(p for name, p in model.named_parameters() if ".lora_" not in name)
    copy += _size(model.buffers())
    backend = choose_backend(config.sampler)
    if backend == "vllm":
        sleeps = on_gpu and config.sampler.sleep and not overlap
        # on a GPU vLLM's share includes its weights
        awake = share if on_gpu else copy + cpu_cache_bytes(model.config, dtype, sequences, context)
    else:
        sleeps = on_gpu and not overlap
        per_sequence = cache_bytes_per_token(model.config, dtype) * context
        limit = share if on_gpu else (available or 0) // 2
        if available:
            sequences = min(sequences, max(1, limit // per_sequence))
        awake = sequences * per_sequence + (copy if overlap else 0)
    asleep = 0 if sleeps else awake
    return SamplerMemory(backend=backend, sequences=sequences, awake=awake, asleep=asleep)


def _memory_of(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not on this operating system
        return None


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
