"""What a run will need in memory, worked out without starting it.

The model is built on torch's meta device, where tensors have shapes and no memory, and run once
over a full micro-batch while autograd says what it keeps. So the figure holds for any architecture.
Nothing is loaded but the model's config.json. What a weight takes is told in optim.py.

Three moments can be the peak: the end of a forward pass, the optimizer's step, and a rollout with
the sampler awake, or a checkpoint then. In the first two the sampler takes what it keeps asleep;
beside `train.overlap` it never sleeps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import AutoModelForCausalLM as AnyModel

from ..config.schema import Config
from ..credit import check_rule
from ..kernels.attention.tiles import queries_per_tile
from ..model import (
    attention_backends,
    check_context_length,
    check_modules,
    dtype_of,
    pick_device,
)
from ..model.folder import architecture_of
from ..model.lora import add_adapter
from ..sampler import choose_backend
from ..sampler.cache import cache_bytes_per_token
from ..sampler.vllm_start import cpu_cache_bytes
from ..update.adamw import DTYPES, WORKSPACE, WORKSPACE_BYTES
from .checks import refuse_rounded_adapter

# The most that a chunk of the loss head takes, by device; see kernels/loss_head.
HEAD_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2_300_000_000}

ATTENTION = "turnfast-estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes that tensors hold, part by part.

    What an allocator keeps besides is not in it: on a CPU the C library's heap can reach two to
    three times as much, unless MALLOC_MMAP_THRESHOLD_ is set.

    Attributes:
        weights: of the policy, and of a reference that is a model of its own.
        gradients: float32 sums; of low-precision weights also the largest one that autograd makes.
        optimizer: moments, and float32 masters of low-precision weights.
        activations: what autograd keeps of one micro-batch of `tokens` tokens.
        loss_head: gradient buffer of the hidden states, and a chunk of logits.
        workspace: temporary memory of the optimizer's step.
        sampler_awake: its keys and values, and its own copy of the weights where it has one.
        sampler_asleep: what of that stays while the policy is trained.
        merged: the layers that have taken an adapter up, as a checkpoint holds them all at once.
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
    workspace: int
    sampler: str
    sequences: int
    sampler_awake: int
    sampler_asleep: int
    merged: int
    machine: int | None

    @property
    def training(self) -> int:
        """The most that training takes without the sampler."""
        held = self.weights + self.gradients + self.optimizer
        return held + max(self.activations + self.loss_head, self.workspace)

    @property
    def rollout(self) -> int:
        """The most that is held without a gradient, a checkpoint after it included."""
        return self.weights + self.optimizer + self.sampler_awake + self.merged

    @property
    def peak(self) -> int:
        return max(self.training + self.sampler_asleep, self.rollout)


def estimate(config: Config) -> Estimate:
    """The memory of a recipe's run.

    Raises:
        ConfigError: the recipe cannot run, for a reason that shows without starting it.
    """
    check_rule(config.credit.rule, config.credit.options)
    device = pick_device(config.train.device)
    refuse_rounded_adapter(config, device)
    dtype = dtype_of(config.model, device)
    architecture = architecture_of(config)
    attention_backends(config.model, architecture, device)
    check_context_length(architecture, config.rollout.max_context)
    with torch.device("meta"):
        model = AnyModel.from_config(architecture, dtype=dtype, attn_implementation=ATTENTION)
        check_modules(model)
        add_adapter(model, config.model.lora, seed=config.train.seed)
    head = model.get_output_embeddings().weight
    if config.model.freeze_head:
        head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    num_trained = sum(p.numel() for p in trained)
    # the reference is a model of its own, unless it is the policy without its adapter
    with_copy = config.loss.kl_coef and not (
        config.model.lora.r and config.loss.reference == "start"
    )
    copies = 2 if with_copy else 1
    masters = 0 if dtype == torch.float32 else 4
    # the head adds to its sum in place, others hand over one gradient of their own dtype at a time
    largest = max((p.numel() for p in trained if p is not head), default=0)
    tokens = config.train.tokens_per_microbatch
    V, D = head.shape
    own_weights = _size(model.parameters()) + _size(model.buffers())
    sequences, awake, asleep = _sampler(config, model, dtype, device)
    step = min(1.0, max(largest, head.numel() if head.requires_grad else 0) / WORKSPACE)
    return Estimate(
        architecture=type(model).__name__,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=tokens,
        weights=own_weights * copies,
        gradients=4 * num_trained + (largest * dtype.itemsize if masters else 0),
        optimizer=num_trained * (masters + 2 * DTYPES[config.optim.state].itemsize),
        activations=_activations(model, config, device),
        loss_head=min(HEAD_CHUNK_BYTES[device.type], 4 * V * tokens) + 4 * D * tokens,
        workspace=int(step * WORKSPACE_BYTES) if config.optim.state == "bfloat16" else 0,
        sampler=choose_backend(config.sampler),
        sequences=sequences,
        sampler_awake=awake,
        sampler_asleep=asleep,
        merged=_size(p for name, p in model.named_parameters() if ".base_layer." in name),
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
        "optimizer's step": found.workspace,
        "training, at most": found.training,
        "sampler, asleep": found.sampler_asleep,
        "sampler, awake": found.sampler_awake,
        "merged adapter": found.merged,
        "at most": found.peak,
    }
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
            "memory        MiB",
            *(f"  {name:<20}{size / 2**20:>12,.1f}" for name, size in lines.items()),
            verdict(found),
        ]
    )


def verdict(found: Estimate) -> str:
    """Whether it fits the machine, and if not, which setting takes most of what can be lowered."""
    needed = f"{found.peak / 2**30:,.1f} GiB"
    if found.machine is None:
        return f"needs {needed}; how much memory there is on the {found.device} is not known"
    there = f"{found.machine / 2**30:,.1f} GiB"
    if found.peak <= found.machine:
        return f"fits in {needed} of {there}"
    asleep = found.training + found.sampler_asleep > found.machine
    sizes = {
        "train.tokens_per_microbatch, or set model.checkpointing = true": (
            found.activations + found.loss_head if asleep else 0
        ),
        "what is trained, with model.lora.r, or optim.state = 'bfloat16'": (
            found.optimizer + (found.gradients if asleep else 0)
        ),
        "sampler.gpu_memory" if found.device == "cuda" else "sampler.max_sequences": (
            found.sampler_asleep if asleep else found.sampler_awake
        ),
    }
    return f"does not fit: {needed} of {there}; lower {max(sizes, key=lambda name: sizes[name])}"


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
    masks = 0
    if device.type == "cpu" and config.train.share_prefixes:
        # the keys of a tile's path are gathered for every tile; half a context on average
        path = context // 2
        gathered = tokens * path // queries_per_tile(path)
        total += gathered * cache_bytes_per_token(model.config, out.dtype)
        masks = tokens * path * out.element_size()  # all layers look at the same
    if config.model.checkpointing:
        # what enters each layer, and the inside of one
        layers = text.num_hidden_layers
        total = total // layers + layers * out.numel() * out.element_size()
    return total + masks


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


def _sampler(
    config: Config, model: Any, dtype: torch.dtype, device: torch.device
) -> tuple[int, int, int]:
    """Sequences that it runs at a time, and the bytes it takes awake and asleep."""
    overlap, context = config.train.overlap, config.rollout.max_context
    sequences, total = config.sampler.max_sequences, _machine(device)
    share = int((total or 0) * config.sampler.gpu_memory)
    copy = _size(p for name, p in model.named_parameters() if ".lora_" not in name)
    copy += _size(model.buffers())
    if choose_backend(config.sampler) == "vllm":
        if device.type == "cuda":  # the share is of weights and cache together
            return sequences, share, 0 if config.sampler.sleep and not overlap else share
        awake = copy + cpu_cache_bytes(model.config, dtype, sequences, context)
        return sequences, awake, awake
    per_sequence = cache_bytes_per_token(model.config, dtype) * context
    most = share if device.type == "cuda" else (total or 0) // 2
    if total:
        sequences = min(sequences, max(1, most // per_sequence))
    awake = sequences * per_sequence + (copy if overlap else 0)
    return sequences, awake, awake if overlap or device.type == "cpu" else 0


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
