"""Segment sums in torch.

Sums are bitwise repeatable: `index_add_` runs in order on the CPU, and `index_put_` sorts its
indices on other devices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values_N: Tensor, segments_N: Tensor, num_segments: int) -> Tensor:
    """sums_K[k] = sum of values_N[n] over segments_N[n] == k; 0 for an empty segment."""
    sums_K = torch.zeros(num_segments, dtype=values_N.dtype, device=values_N.device)
    add_rows(sums_K, segments_N, values_N)
    return sums_K


def add_rows(table_TD: Tensor, rows_C: Tensor, values_CD: Tensor) -> None:
    """table_TD[rows_C[c]] += values_CD[c], in place; rows may repeat."""
    if table_TD.device.type == "cpu":
        table_TD.index_add_(0, rows_C, values_CD)
    else:
        table_TD.index_put_((rows_C,), values_CD, accumulate=True)
