"""Segment sums of the loss head: torch, and Triton in the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from turnfast.kernels.segments import reference

IMPLS = [reference.segment_sum]
if os.environ.get("TRITON_INTERPRET") == "1":
    from turnfast.kernels.segments import triton_segments

    IMPLS.append(triton_segments.segment_sum)


@pytest.mark.parametrize("segment_sum", IMPLS, ids=lambda f: f.__module__.rpartition(".")[2])
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 33, 1024, 2500]), max_size=6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_sums_match_a_loop_and_repeat_bitwise(segment_sum, lengths, seed, dtype) -> None:
    """Empty segments, segments longer than a block, and segment numbers in any order."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(len(lengths), generator=generator)
    segments_N = numbers.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    values_N = torch.randn(len(segments_N), generator=generator, dtype=dtype)
    sums_K = segment_sum(values_N, segments_N, len(lengths))
    assert sums_K.dtype == dtype and len(sums_K) == len(lengths)
    for k, total in enumerate(sums_K):
        expected = values_N[segments_N == k].double().sum()
        assert float((total - expected).abs()) <= 1e-5 * max(1, sum(lengths)) ** 0.5
    assert torch.equal(sums_K, segment_sum(values_N, segments_N, len(lengths)))
