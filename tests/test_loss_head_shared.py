"""Tests of every implementation of the loss head.

The two Triton designs run in the interpreter: TRITON_INTERPRET=1, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from loss_cases import (
    assert_same_stats,
    assert_within_budget,
    logprobs_of,
    make_case,
    microbatches,
    needs_cpp,
    operator_arguments,
    relative,
    run,
    run_into,
    select,
    truth,
    with_large_logit,
)
from turnfast.kernels import PolicyRule
from turnfast.kernels.loss_head import op

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.importorskip("triton")
    INTERPRETED, IMPLS = True, ["triton_safe", "triton_anchored"]
else:
    INTERPRETED, IMPLS = False, ["reference", pytest.param("cpp", marks=needs_cpp)]

every_impl = pytest.mark.parametrize("impl", IMPLS)
RATIOS = ["turn"] if INTERPRETED else ["token", "turn", "sequence"]


@every_impl
@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_logits_far_from_zero(impl: str, shift: float) -> None:
    assert_within_budget(make_case(4, N=20 if INTERPRETED else 63, shift=shift), impl)


@every_impl
@pytest.mark.parametrize("value", [45.0, 100.0, 1000.0])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_a_logit_far_above_the_target(impl: str, value: float, entropy_coef: float) -> None:
    rule = PolicyRule(entropy_coef=entropy_coef)
    case = make_case(5, N=20 if INTERPRETED else 63, on_policy=True, rule=rule)
    case = with_large_logit(case, value)
    assert_within_budget(case, impl, slack=1e-5 * value / 45)
    assert float(truth(case).logprobs[0]) < -value / 3


@every_impl
@pytest.mark.parametrize("ratio", RATIOS)
def test_any_chunk_size_gives_the_same_result(impl: str, ratio: str) -> None:
    rule = PolicyRule(ratio=ratio, kl_coef=0.04, entropy_coef=0.01)  # type: ignore[arg-type]
    case = make_case(6, N=30 if INTERPRETED else 200, rule=rule, normaliser="masked")
    expected, answer = run(case, impl, chunk_tokens=len(case.rows))
    for chunk in (13,) if INTERPRETED else (1, 13, 64):
        out, actual = run(case, impl, chunk_tokens=chunk)
        assert relative(actual.d_hidden, answer.d_hidden) < 1e-6
        assert relative(actual.d_head, answer.d_head) < 1e-6
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.turn_logprobs, expected.turn_logprobs, rtol=1e-5, atol=1e-6)
        assert_same_stats(out, expected, rtol=1e-5, atol=1e-6)


@every_impl
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_results_repeat_bitwise_whatever_new_memory_contains(
    impl: str, softcap: float | None
) -> None:
    rule = PolicyRule(ratio="turn", entropy_coef=0.01, kl_coef=0.1)
    N, V, chunk = (40, 150, 20) if INTERPRETED else (300, 500, 70)
    case = make_case(21, N=N, V=V, normaliser="masked", rule=rule, softcap=softcap)
    results = []
    try:
        for nan_in_new_memory in (False, False, True):
            torch.use_deterministic_algorithms(nan_in_new_memory)
            assert not nan_in_new_memory or torch.empty(3).isnan().all()
            out, answer = run(case, impl, chunk_tokens=chunk)
            results.append((answer.loss, answer.d_hidden, answer.d_head, out.turn_logprobs))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@every_impl
def test_log_probs_alone_equal_those_of_the_loss(impl: str) -> None:
    N = 20 if INTERPRETED else 100
    case = make_case(12, N=N, V=200, temperature=0.8, softcap=6.0)
    case = dataclasses.replace(case, advantages=torch.ones_like(case.advantages))
    out, _ = run(case, impl)
    for chunk in (None, 9):
        alone = logprobs_of(case, impl, chunk_tokens=chunk)
        torch.testing.assert_close(alone.logprobs, out.logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.entropies, out.entropies, rtol=1e-5, atol=1e-5)


@every_impl
@pytest.mark.parametrize("why", ["no tokens", "no turns", "masked", "no advantage"])
def test_the_loss_is_zero_without_a_trained_token(impl: str, why: str) -> None:
    case = make_case(11, N=12, K=4)
    no_tokens = select(case, torch.zeros(12, dtype=torch.bool))
    if why == "no tokens":
        case = no_tokens
    elif why == "no turns":
        empty = {name: getattr(case, name)[:0] for name in ("advantages", "sequences")}
        case = dataclasses.replace(no_tokens, **empty)
    elif why == "masked":
        case = dataclasses.replace(case, weights=torch.zeros(12))
    else:
        case = dataclasses.replace(case, advantages=torch.zeros(4))
    for ratio in ("token", "turn", "sequence"):
        case = dataclasses.replace(case, rule=PolicyRule(ratio=ratio))  # type: ignore[arg-type]
        out, answer = run(case, impl)
        assert float(out.loss.detach()) == 0.0
        assert not answer.d_hidden.any() and not answer.d_head.any()
        assert not out.turn_logprobs.any()
        assert int(out.stats.tokens) == 0
        assert int(out.stats.masked) == (12 if why == "masked" else 0)
        assert int(out.stats.skipped) == (12 if why == "no advantage" else 0)
        assert float(out.stats.ratio_max) == 1.0 and float(out.stats.kl) == 0.0


@every_impl
def test_a_nan_in_the_head_weight_is_reported(impl: str) -> None:
    case = make_case(11)
    case.head[40, 3] = torch.nan
    with pytest.raises(ValueError, match="head_weight: expected finite"):
        run(case, impl)
    with pytest.raises(ValueError, match=r"head_weight: expected finite .* index 0 "):
        logprobs_of(case, impl)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@every_impl
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("chunk_tokens", [10] if INTERPRETED else [None, 7])
def test_microbatches_accumulate_in_one_buffer(
    impl: str, dtype: torch.dtype, chunk_tokens: int | None
) -> None:
    """The error is at most that of autograd's sum in the head's dtype."""
    if dtype == torch.float64 and impl != "reference":
        pytest.skip("only the reference supports float64")
    case = make_case(3, N=63, V=150, D=24, rule=PolicyRule(ratio="turn"), dtype=dtype)
    true = truth(case)
    autograd_sum = torch.zeros_like(case.head)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.linspace(-1, 1, case.head.numel()).view(case.head.shape).to(wide)
    head_grad, offset_grad = torch.zeros_like(start), start.clone()
    d_hidden = torch.zeros_like(true.d_hidden)
    for part in microbatches(case, 4):
        _, alone = run(part, impl, chunk_tokens=chunk_tokens)
        autograd_sum += alone.d_head.to(dtype)
        d_part = run_into(part, impl, head_grad, chunk_tokens=chunk_tokens)
        assert torch.equal(d_part, alone.d_hidden)
        run_into(part, impl, offset_grad, chunk_tokens=chunk_tokens)
        d_hidden += d_part
    error, allowed = (relative(x.double(), true.d_head) for x in (head_grad, autograd_sum))
    assert error <= max(allowed, 1e-6), f"{error:.1e}, autograd's sum {allowed:.1e}"
    assert (offset_grad - start - head_grad).abs().max() < 1e-6
    if dtype == torch.float32:
        _, together = run(case, impl, chunk_tokens=chunk_tokens)
        assert (head_grad - together.d_head).abs().max() < 1e-6
        assert (d_hidden - together.d_hidden).abs().max() < 1e-6


@every_impl
def test_the_operators_pass_opcheck(impl: str) -> None:
    case = make_case(16, N=10, V=20)
    # No skipped tokens, whose NaN would differ: opcheck compares with ==.
    case = dataclasses.replace(case, advantages=case.advantages + 0.5)
    arguments = operator_arguments(case, impl)
    torch.library.opcheck(op.policy_loss_op, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(op.policy_loss_onto_op, (*detached, torch.ones(case.head.shape)))
    plain = (case.hidden, case.head, case.rows, case.targets)
    torch.library.opcheck(op.logprobs_op, (*plain, 1.0, None, None, "", 0, impl))
