"""What the forward and the backward kernels of the tree attention share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Sizes of one kernel: queries and keys per block, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def visible(q, k, ends, depth_q, depth_k, window, HAS_WINDOW: tl.constexpr):
    """Whether a query sees a key, for columns and rows in either order; missing keys end at 0."""
    seen = (k <= q) & (q < ends)
    if HAS_WINDOW:
        seen = seen & (depth_q - depth_k < window)
    return seen


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def precision(q: Tensor) -> str:
    # float32 means float32: with tf32 a tree would not equal the rows it stands for
    return "ieee" if q.dtype == torch.float32 else "tf32"
