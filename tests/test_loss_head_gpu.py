"""The self-test of the Triton loss head on a real GPU: it passes, and soon."""

from __future__ import annotations

import time

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("design", "dtype"),
    [
        ("safe", torch.bfloat16),
        ("anchored", torch.bfloat16),
        ("safe", torch.float16),
        ("safe", torch.float32),
    ],
)
def test_the_self_test_passes_within_two_seconds(design: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from turnfast.kernels.loss_head.triton import selftest

    device = torch.device("cuda", torch.cuda.current_device())
    assert selftest.run(device, design, dtype) == ""
    # Compiled by now: the kernels of a real problem are the same, and compiled once for both.
    start = time.perf_counter()
    assert selftest.run(device, design, dtype) == ""
    assert time.perf_counter() - start < 2.0
