"""Sums over contiguous segments, without atomics.

bounds:    start_K, stop_K of each segment; N reads, at most 2 writes per segment
sum:       one program per segment in a fixed order, so bitwise repeatable; reads 4N + 8K bytes,
           writes 4K
"""

# pyright has no type for a kernel launch, kernel[grid](...).
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def bounds_kernel(segments_ptr, start_ptr, stop_ptr, N, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    here = tl.load(segments_ptr + n, mask=inside, other=-1)
    before = tl.load(segments_ptr + n - 1, mask=inside & (n > 0), other=-1)
    after = tl.load(segments_ptr + n + 1, mask=n + 1 < N, other=-1)
    # Segments are contiguous, so each start and stop has exactly one writer.
    tl.store(start_ptr + here, n, mask=inside & (here != before))
    tl.store(stop_ptr + here, n + 1, mask=inside & (here != after))


@triton.jit
def segment_sum_kernel(values_ptr, start_ptr, stop_ptr, sums_ptr, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64)
    start = tl.load(start_ptr + k)
    stop = tl.load(stop_ptr + k)
    total = tl.zeros([BLOCK], sums_ptr.dtype.element_ty)
    for first in range(start, stop, BLOCK):
        n = first + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + n, mask=n < stop, other=0.0)
    tl.store(sums_ptr + k, tl.sum(total, 0))


def segment_sum(values_N: Tensor, segments_N: Tensor, num_segments: int) -> Tensor:
    """sums_K[k] = sum of values_N[n] over segments_N[n] == k; each segment contiguous."""
    N = values_N.shape[0]
    sums_K = values_N.new_empty(num_segments)
    if num_segments == 0:
        return sums_K
    # An empty segment keeps start = stop = 0.
    start_K = torch.zeros(num_segments, dtype=torch.int64, device=values_N.device)
    stop_K = torch.zeros_like(start_K)
    if N:
        grid = (triton.cdiv(N, BLOCK),)
        bounds_kernel[grid](segments_N.contiguous(), start_K, stop_K, N, BLOCK=BLOCK)
    segment_sum_kernel[(num_segments,)](values_N.contiguous(), start_K, stop_K, sums_K, BLOCK=BLOCK)
    return sums_K
