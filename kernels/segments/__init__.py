"""Per-turn sums and broadcasts over flat token tensors."""

from __future__ import annotations

from torch import Tensor

from . import reference


def segment_sum(values_N: Tensor, segments_N: Tensor, *, num_segments: int) -> Tensor:
    """Sum the values of each segment."""
    return reference.segment_sum(values_N, segments_N, num_segments)
