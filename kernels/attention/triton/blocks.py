"""Functions of both the forward and the backward kernels of tree attention."""

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
    """Whether a query sees a key, broadcast over both; masked keys have an end of 0."""
    seen = (k <= q) & (q < ends)
    if HAS_WINDOW:
        seen = seen & (depth_q - depth_k < window)
    return seen


@triton.jit
def load_tile(
    ptr, rows, stride_t, T, D, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load [rows, BLOCK_D] of a [T, D] tensor with a contiguous last dimension; 0 outside."""
    d = tl.arange(0, BLOCK_D)
    inside = (rows < T)[:, None] & (EVEN_D | (d[None, :] < D))
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride_t + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(
    ptr, rows, stride_t, tile, T, D, EVEN_D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store [rows, BLOCK_D] to a [T, D] tensor, in the dtype of the tensor."""
    d = tl.arange(0, BLOCK_D)
    inside = (rows < T)[:, None] & (EVEN_D | (d[None, :] < D))
    at = rows[:, None].to(tl.int64) * stride_t + d[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_depth(depth_ptr, rows, T, HAS_WINDOW: tl.constexpr):
    """Load the depths of tokens if there is a window; without one they are not used."""
    depth = rows
    if HAS_WINDOW:
        depth = tl.load(depth_ptr + rows, mask=rows < T, other=0).to(tl.int32)
    return depth


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def precision(q: Tensor) -> str:
    # with tf32 the result for float32 would differ from that of the separate rows
    return "ieee" if q.dtype == torch.float32 else "tf32"
