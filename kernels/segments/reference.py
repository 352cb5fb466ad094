"""Per-turn sums and broadcasts in torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values_N: Tensor, segments_N: Tensor, num_segments: int) -> Tensor:
    """sums_K[k] = sum of values_N[n] over segments_N[n] == k."""
    sums_K = torch.zeros(num_segments, dtype=values_N.dtype, device=values_N.device)
    # index_put_ sorts its indices, so the order of a sum is fixed on every device.
    return sums_K.index_put_((segments_N,), values_N, accumulate=True)


def segment_broadcast(values_K: Tensor, segments_N: Tensor) -> Tensor:
    """values_N[n] = values_K[segments_N[n]]."""
    return values_K[segments_N]
