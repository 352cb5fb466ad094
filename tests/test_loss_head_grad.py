"""head_grad: the head's gradient of many micro-batches, added up in one buffer of the caller's."""

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
    assert_head_grad_adds_up,
    flat,
    have,
    make_case,
    microbatches,
    onto,
    relative,
    run,
)
from torch import Tensor, nn
from turnfast.kernels import turn_policy_loss
from turnfast.kernels.loss_head import op

IMPLS = [
    "reference",
    pytest.param("cpp", marks=pytest.mark.skipif(not have("cpp"), reason="C++ is not built")),
]
every_impl = pytest.mark.parametrize("impl", IMPLS)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_microbatches_add_up_in_one_buffer(
    impl: str, dtype: torch.dtype, chunk_tokens: int | None
) -> None:
    assert_head_grad_adds_up(impl, dtype, chunk_tokens)


def test_float64_adds_up_in_float64() -> None:
    assert_head_grad_adds_up("reference", torch.float64, None)


@every_impl
def test_the_buffer_may_be_the_gradient_that_an_embedding_shares(impl: str) -> None:
    """Tied weights: autograd adds what the embedding brings to the same .grad."""
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
            given = (part.rows, part.targets, part.turns, part.advantages, part.old)
            turn_policy_loss(
                hidden, shared, *given, weights=part.weights, head_grad=buffer, impl=impl
            ).loss.backward()
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
    given = (case.rows, case.targets, case.turns, case.advantages, case.old)
    out = turn_policy_loss(
        case.hidden, head, *given, weights=case.weights, head_grad=head_grad, impl=impl
    )
    out.loss.backward()
    assert head.grad is None and relative(head_grad.double(), expected.d_head) < 1e-6


@every_impl
def test_no_gradient_adds_nothing(impl: str) -> None:
    case = make_case(7)
    head_grad = torch.zeros_like(case.head)
    hidden, head = case.hidden.requires_grad_(), case.head.requires_grad_()
    given = (hidden, head, case.rows, case.targets, case.turns, case.advantages, case.old)
    with torch.no_grad():
        turn_policy_loss(*given, weights=case.weights, head_grad=head_grad, impl=impl)
    assert not head_grad.any()
    dark = dataclasses.replace(case, advantages=torch.zeros_like(case.advantages))
    onto(dark, impl, head_grad)
    assert not head_grad.any()


@every_impl
def test_another_factor_is_refused(impl: str) -> None:
    case = make_case(8)
    hidden, head = case.hidden.requires_grad_(), case.head.requires_grad_()
    given = (hidden, head, case.rows, case.targets, case.turns, case.advantages, case.old)
    out = turn_policy_loss(*given, head_grad=torch.zeros(case.head.shape), impl=impl)
    with pytest.raises(ValueError, match=r"head_grad: expected .*factor of 1, got 0\.5.*weights"):
        (out.loss / 2).backward()
    assert hidden.grad is None


@pytest.mark.parametrize(
    ("wrong", "message"),
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
def test_a_wrong_buffer_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onto(make_case(9), "auto", wrong(torch.zeros(97, 16)))


def test_a_buffer_for_a_frozen_head_is_refused() -> None:
    case = make_case(9)
    given = (case.rows, case.targets, case.turns, case.advantages)
    with pytest.raises(ValueError, match="head_grad: given, but head_weight requires no gradient"):
        turn_policy_loss(case.hidden, case.head, *given, head_grad=torch.zeros(97, 16))


@every_impl
def test_a_call_that_fails_halfway_says_why(impl: str) -> None:
    """A logit that overflows in a later chunk; the sum has the earlier ones by then."""
    case = make_case(10, N=20)
    case = dataclasses.replace(case, advantages=torch.ones_like(case.advantages))
    case.hidden[:, 0] = 0.0
    case.hidden[case.rows[12], 0] = 1e3
    case.head[3, 0] = 3e38
    first = int((case.rows == case.rows[12]).nonzero()[0])
    head_grad = torch.zeros_like(case.head)
    assert first > 0
    with pytest.raises(ValueError, match=f"head_weight: expected finite logits, .*index {first} "):
        onto(case, impl, head_grad, chunk_tokens=1)
    assert head_grad.any()


@every_impl
def test_the_operator_passes_opcheck(impl: str) -> None:
    case = make_case(16, N=20)
    # No NaN of a skipped token: opcheck compares with ==.
    case = dataclasses.replace(case, advantages=case.advantages + 0.5)
    given = [x.detach() if isinstance(x, Tensor) else x for x in flat(case, impl)]
    torch.library.opcheck(op.policy_loss_onto_op, (*given, torch.ones(case.head.shape)))


@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_caller_sees_one_graph(impl: str, dynamic: bool) -> None:
    case = make_case(17, N=30)
    given = (case.rows, case.targets, case.turns, case.advantages, case.old)

    def step(hidden: Tensor, head: Tensor, head_grad: Tensor) -> Tensor:
        return turn_policy_loss(
            hidden * 1.5, head, *given, weights=case.weights, head_grad=head_grad, impl=impl
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for call in (step, compiled):
        hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
        head_grad = torch.ones_like(case.head)
        for _ in range(2):
            loss = call(hidden, head, head_grad)
            loss.backward()
        results.append((loss.detach(), hidden.grad, head_grad))
        assert head.grad is None
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager)
    (2 * compiled(hidden, head, head_grad)).backward()
    assert hidden.grad.isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.skipif(not have("cpp"), reason="C++ is not built")
def test_two_microbatches_hold_one_gradient() -> None:
    """Largest resident memory of two micro-batches, above that with the sum in place."""
    V, D, N = 60_000, 256, 64
    size = 4 * V * D
    hidden = torch.randn(N, D).requires_grad_()
    head = (0.05 * torch.randn(V, D)).requires_grad_()
    index = torch.arange(N)

    def held(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(name + r":\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def growth(in_place: bool) -> int:
        head.grad = torch.zeros_like(head)
        head.grad += 1.0  # its pages are there
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = held("VmRSS")
        for _ in range(2):
            buffer = head.grad if in_place else None
            turn_policy_loss(
                hidden, head, index, index, 0 * index, torch.ones(1), head_grad=buffer, impl="cpp"
            ).loss.backward()
        return held("VmHWM") - before

    growth(True)  # workspaces that stay
    assert growth(True) < 0.6 * size < size < growth(False)
