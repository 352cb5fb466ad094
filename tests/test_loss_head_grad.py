"""head_grad: the head's gradient of many micro-batches, accumulated in one buffer."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import (
    every_impl,
    leaves,
    loss_of,
    make_case,
    microbatches,
    needs_cpp,
    relative,
    run,
    run_into,
)
from torch import Tensor, nn
from turnfast.kernels import turn_policy_loss


@every_impl
def test_the_buffer_may_be_the_gradient_of_a_tied_weight(impl: str) -> None:
    """Autograd adds the gradient of the embedding to the same .grad."""
    case = make_case(5, N=40, V=60, D=16)
    ids = torch.arange(case.hidden.shape[0]) % 60
    results = []
    for in_place in (False, True):
        shared = nn.Parameter(case.head.clone())
        if in_place:
            shared.grad = torch.zeros_like(shared)
        buffer = shared.grad
        for part in microbatches(case, 3):
            hidden = (nn.functional.embedding(ids, shared) + case.hidden).tanh()
            loss_of(part, impl, hidden, shared, head_grad=buffer).loss.backward()
        assert not in_place or shared.grad is buffer
        results.append(shared.grad)
    assert results[0].abs().max() > 1e-3
    assert (results[0] - results[1]).abs().max() < 1e-6


@every_impl
def test_a_head_alone_can_be_trained(impl: str) -> None:
    case = make_case(6)
    _, expected = run(case, impl)
    head = case.head.clone().requires_grad_()
    head_grad = torch.zeros_like(case.head)
    loss_of(case, impl, head=head, head_grad=head_grad).loss.backward()
    assert head.grad is None and relative(head_grad.double(), expected.d_head) < 1e-6


@every_impl
def test_no_gradient_adds_nothing(impl: str) -> None:
    case = make_case(7)
    head_grad = torch.zeros_like(case.head)
    with torch.no_grad():
        loss_of(case, impl, *leaves(case), head_grad=head_grad)
    assert not head_grad.any()
    without_signal = dataclasses.replace(case, advantages=torch.zeros_like(case.advantages))
    run_into(without_signal, impl, head_grad)
    assert not head_grad.any()


@every_impl
def test_a_backward_factor_is_rejected(impl: str) -> None:
    case = make_case(8)
    hidden, head = leaves(case)
    out = loss_of(case, impl, hidden, head, head_grad=torch.zeros(case.head.shape))
    with pytest.raises(ValueError, match=r"head_grad: expected .*factor of 1, got 0\.5.*weights"):
        (out.loss / 2).backward()
    assert hidden.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], r"head_grad: expected shape \[97, 16\], got \[96, 16\]"),
        (lambda x: x.bfloat16(), "head_grad: expected a dtype of float32, got torch.bfloat16"),
        (lambda x: x.double(), "head_grad: expected a dtype of float32"),
        (lambda x: x.T.contiguous().T, "head_grad: expected a contiguous tensor"),
        (lambda x: x.requires_grad_(), "head_grad: expected a tensor that requires no gradient"),
        (lambda x: x.to("meta"), "head_grad: expected device cpu like hidden, got meta"),
        (lambda x: x.to_sparse(), "head_grad: expected a dense tensor"),
        (lambda x: x.tolist(), "head_grad: expected a dense tensor, got list"),
    ],
)
def test_a_wrong_buffer_is_rejected(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_into(make_case(9), "auto", change(torch.zeros(97, 16)))


def test_a_buffer_for_a_frozen_head_is_rejected() -> None:
    case = make_case(9)
    with pytest.raises(ValueError, match="head_grad: given, but head_weight requires no gradient"):
        loss_of(case, head_grad=torch.zeros(97, 16))


@every_impl
def test_a_logit_that_overflows_in_a_later_chunk_is_reported(impl: str) -> None:
    """The buffer holds the earlier chunks by then."""
    case = make_case(10, N=20)
    case = dataclasses.replace(case, advantages=torch.ones_like(case.advantages))
    case.hidden[:, 0] = 0.0
    case.hidden[case.rows[12], 0] = 1e3
    case.head[3, 0] = 3e38
    first = int((case.rows == case.rows[12]).nonzero()[0])
    head_grad = torch.zeros_like(case.head)
    assert first > 0
    with pytest.raises(ValueError, match=f"head_weight: expected finite logits, .*index {first} "):
        run_into(case, impl, head_grad, chunk_tokens=1)
    assert head_grad.any()


@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_caller_sees_one_graph(impl: str, dynamic: bool) -> None:
    case = make_case(17, N=30)

    def step(hidden: Tensor, head: Tensor, head_grad: Tensor) -> Tensor:
        return loss_of(case, impl, hidden * 1.5, head, head_grad=head_grad).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for call in (step, compiled):
        hidden, head = leaves(case)
        head_grad = torch.ones_like(case.head)
        for _ in range(2):
            loss = call(hidden, head, head_grad)
            loss.backward()
        results.append((loss.detach(), hidden.grad, head_grad))
        assert head.grad is None
    for eager, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, eager)
    (2 * compiled(hidden, head, head_grad)).backward()
    assert hidden.grad.isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@needs_cpp
def test_two_microbatches_allocate_no_second_gradient() -> None:
    """Measures the peak resident memory of two micro-batches, above that of the buffer."""
    V, D, N = 60_000, 256, 64
    size = 4 * V * D
    hidden = torch.randn(N, D).requires_grad_()
    head = (0.05 * torch.randn(V, D)).requires_grad_()
    index = torch.arange(N)

    def memory_bytes(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(name + r":\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def growth(in_place: bool) -> int:
        head.grad = torch.zeros_like(head)
        head.grad += 1.0  # maps its pages
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_bytes("VmRSS")
        for _ in range(2):
            buffer = head.grad if in_place else None
            turn_policy_loss(
                hidden, head, index, index, 0 * index, torch.ones(1), head_grad=buffer, impl="cpp"
            ).loss.backward()
        return memory_bytes("VmHWM") - before

    growth(True)  # allocates the workspaces that stay
    assert growth(True) < 0.6 * size < size < growth(False)
