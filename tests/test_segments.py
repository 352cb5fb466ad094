"""Per-turn sums and broadcasts: the reference, and Triton where TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from turnfast.kernels.segments import segment_broadcast, segment_sum

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = [
    "reference",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
    ),
]
every_impl = pytest.mark.parametrize("impl", IMPLS)


def make(lengths: list[int], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values [N], segments [N] in a shuffled order of segment numbers, and values [K]."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(len(lengths), generator=g)
    segments = numbers.repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    return (
        torch.randn(len(segments), generator=g, dtype=torch.float64).to(dtype),
        segments,
        torch.randn(len(lengths), generator=g, dtype=torch.float64).to(dtype),
    )


@every_impl
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 33]), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_sums_and_broadcasts_equal_a_loop(
    impl: str, lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    values, segments, table = make(lengths, seed, dtype)
    sums = segment_sum(values, segments, num_segments=len(lengths), impl=impl)
    for k in range(len(lengths)):
        true = values[segments == k].double().sum()
        assert float((sums[k].double() - true).abs()) <= 1e-5 * max(1, sum(lengths)) ** 0.5
    spread = segment_broadcast(table, segments, impl=impl)
    assert torch.equal(spread, table[segments])
    assert sums.dtype == spread.dtype == dtype


@every_impl
def test_segments_longer_than_a_block_and_no_tokens(impl: str) -> None:
    values, segments, _ = make([2500, 0, 1024, 1], 3, torch.float32)
    sums = segment_sum(values, segments, num_segments=4, impl=impl)
    true = torch.stack([values[segments == k].double().sum() for k in range(4)])
    torch.testing.assert_close(sums.double(), true, rtol=1e-5, atol=1e-4)
    assert torch.equal(sums, segment_sum(values, segments, num_segments=4, impl=impl))
    none = torch.zeros(0, dtype=torch.long)
    assert segment_sum(values[:0], none, num_segments=3, impl=impl).tolist() == [0.0] * 3
    assert segment_sum(values[:0], none, num_segments=0, impl=impl).shape == (0,)
    assert segment_broadcast(values[:3], none, impl=impl).shape == (0,)


@every_impl
def test_worked_examples_and_int32_segments(impl: str) -> None:
    turns = torch.tensor([0, 0, 2], dtype=torch.int32)
    logprobs = torch.tensor([-1.0, -2.0, -0.5])
    assert segment_sum(logprobs, turns, num_segments=3, impl=impl).tolist() == [-3.0, 0.0, -0.5]
    advantages = torch.tensor([0.75, 0.0, -1.25])
    assert segment_broadcast(advantages, turns, impl=impl).tolist() == [0.75, 0.75, -1.25]


@every_impl
def test_each_is_the_derivative_of_the_other(impl: str) -> None:
    values, segments, table = make([3, 0, 4, 1], 4, torch.float64)
    values.requires_grad_()
    table.requires_grad_()

    def sums(x: Tensor) -> Tensor:
        return segment_sum(x, segments, num_segments=4, impl=impl)

    def spread(x: Tensor) -> Tensor:
        return segment_broadcast(x, segments, impl=impl)

    assert torch.autograd.gradcheck(sums, (values,)) and torch.autograd.gradgradcheck(
        lambda x: sums(x) ** 2, (values,)
    )
    assert torch.autograd.gradcheck(spread, (table,))


@every_impl
def test_the_operators_pass_opcheck(impl: str) -> None:
    values, segments, table = make([3, 0, 4], 5, torch.float32)
    values, table = values.requires_grad_(), table.requires_grad_()
    torch.library.opcheck(torch.ops.turnfast.segment_sum, (values, segments, 3, impl))
    torch.library.opcheck(torch.ops.turnfast.segment_broadcast, (table, segments, impl))


def test_bad_input_is_refused_by_name() -> None:
    values, segments = torch.zeros(3), torch.tensor([0, 0, 1])
    bad = [
        (lambda: segment_sum(values[None], segments, num_segments=2), "values: expected a vector"),
        (lambda: segment_sum(values.half(), segments, num_segments=2), "values: .*float32"),
        (lambda: segment_sum(values, segments.float(), num_segments=2), "segments: .*int32"),
        (lambda: segment_sum(values, segments[:2], num_segments=2), "segments: expected shape"),
        (lambda: segment_sum(values, segments, num_segments=1), "segments: expected 0 <= .* < 1"),
        (lambda: segment_sum(values, segments, num_segments=-1), "num_segments: expected"),
        (lambda: segment_sum(values, segments, num_segments=2.5), "num_segments: .* got 2.5"),
        (lambda: segment_sum([1.0], segments, num_segments=2), "values: .* tensor, got list"),
        (lambda: segment_broadcast(values, [0, 0, 1]), "segments: .* tensor, got list"),
        (lambda: segment_broadcast(values, segments - 1), "segments: expected 0 <="),
        (
            lambda: segment_sum(values, torch.tensor([0, 1, 0]), num_segments=2),
            "segments: .*contiguous",
        ),
        (lambda: segment_sum(values, segments, num_segments=2, impl="cuda"), "impl: expected"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    if not INTERPRETED:
        with pytest.raises(ValueError, match="impl: 'triton' needs a CUDA device"):
            segment_sum(values, segments, num_segments=2, impl="triton")
