"""Floating-point operations of a training step, and the peak throughput of the device.

Forward and backward of a decoder without its head on T tokens take

    6 · P · T  +  12 · L · H · d · Σ_t (position_t + 1)

operations, where P is the number of matrix entries of all layers (two operations each in the
forward pass, four in the backward pass). Attention counts the visible query-key pairs: 4 · d per
pair and head in the forward pass, 8 · d in the backward pass. The head takes another 6 · N · V · D
for N targets. Recomputation, norms, activations and rotary embeddings are not counted.

The useful operations of a step are those of its distinct tokens, however often they are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness.timing import medians_s
from torch import nn

from turnfast.model import Policy
from turnfast.packing.pack import Packed


def body_flops(policy: Policy, packed: Packed) -> float:
    """Operations of forward and backward up to the hidden states."""
    body = policy.model.base_model
    entries = sum(m.weight.numel() for m in body.modules() if isinstance(m, nn.Linear))
    config = policy.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = config.num_hidden_layers * config.num_attention_heads * head_dim
    pairs = sum(float((batch.positions_T + 1).sum()) for batch in packed.batches)
    return 6.0 * entries * packed.num_tokens + 12.0 * wide * pairs


def head_flops(policy: Policy, packed: Packed) -> float:
    """Operations from hidden states to log-probs of the targets, forward and backward."""
    return 6.0 * packed.num_targets * policy.head_VD.numel()


def gemm_peak(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float], *, size: int | None = None
) -> float:
    """Measure operations per second of square matrix products (median of several timings).

    On a GPU one timing covers twenty products of 8,192 x 8,192, so that launch and synchronisation
    times are negligible.
    """
    cuda = device.type == "cuda"
    side, count = size or (8192 if cuda else 2048), 20 if cuda else 1
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = partial(torch.mm, a, b, out=torch.empty_like(a))

    def products() -> None:
        for _ in range(count):
            product()

    return 2.0 * side**3 * count / medians_s({"": products}, 7, device, clock)[""]
