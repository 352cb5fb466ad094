"""The Triton loss head in the interpreter: TRITON_INTERPRET=1, in a process of its own."""

from __future__ import annotations

import dataclasses
import os

import loss_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    Case,
    assert_any_chunks_agree,
    assert_ignores_uninitialised_memory,
    assert_logprobs_match_the_loss,
    assert_microbatches_accumulate,
    assert_repeatable,
    assert_within_budget,
    make_case,
    operator_arguments,
    relative,
    run,
    truth,
    with_large_logit,
)

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from turnfast.kernels import PolicyRule
from turnfast.kernels.loss_head import backends, op, policy
from turnfast.kernels.loss_head.triton import policy as triton_policy
from turnfast.kernels.loss_head.triton.entry import choose_design

DESIGNS = ["triton_safe", "triton_anchored"]
both_designs = pytest.mark.parametrize("impl", DESIGNS)
CPU = torch.device("cpu")

cases = loss_cases.cases(N=[1, 12, 24], V=[2, 37, 128], D=[3, 16, 33], K=[1, 9])


@both_designs
@given(case=cases, chunk=st.sampled_from([None, 16]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_every_option_is_within_the_error_budget(impl: str, case: Case, chunk: int | None) -> None:
    assert_within_budget(case, impl, chunk_tokens=chunk)


@given(case=cases, data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_policy_kernel_equals_the_policy_in_torch(case: Case, data: st.DataObject) -> None:
    level = case.rule.ratio
    segment = None
    if level != "token":
        segment = case.turns if level == "turn" else case.sequences[case.turns].sort().values
        _, segment, lengths = segment.unique_consecutive(return_inverse=True, return_counts=True)
    tokens = policy.Tokens(
        advantages_C=case.advantages[case.turns],
        weights_C=case.weights,
        old_C=case.old,
        ref_C=case.ref,
        sampler_C=case.sampler,
        segment_C=segment,
        lengths_S=None if segment is None else lengths,
    )
    N = len(case.rows)
    logprobs = (case.old if case.old is not None else torch.zeros(N)) + 0.3 * torch.randn(
        N, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    entropies = logprobs.abs() * 0.5
    expected = policy.policy_terms(case.rule, tokens, logprobs, entropies)
    found = triton_policy.policy_terms(case.rule, tokens, logprobs, entropies)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.d_logprob_C, expected.d_logprob_C, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-5, atol=1e-5)
    assert (found.d_entropy_C is None) == (expected.d_entropy_C is None)
    if found.d_entropy_C is not None:
        torch.testing.assert_close(found.d_entropy_C, expected.d_entropy_C)


def test_the_policy_kernel_handles_segments_longer_than_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_policy, "BLOCK", 16)
    case = make_case(1, N=60, V=5, K=2, rule=PolicyRule(ratio="turn", kl_coef=0.1))
    case = dataclasses.replace(case, advantages=torch.tensor([1.0, -0.5]))
    assert_within_budget(case, "triton_safe", chunk_tokens=20)


@both_designs
@pytest.mark.parametrize(
    ("N", "V", "D"), [(1, 1, 4), (1, 1500, 8), (9, 1, 8), (31, 131, 40), (70, 70, 16)]
)
def test_shapes_that_break_kernels(impl: str, N: int, V: int, D: int) -> None:
    assert_within_budget(make_case(1, N=N, V=V, D=D, rule=PolicyRule(ratio="turn")), impl)


@both_designs
@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_logits_far_from_zero(impl: str, shift: float) -> None:
    assert_within_budget(make_case(4, N=20, shift=shift), impl)


@both_designs
@pytest.mark.parametrize("value", [45.0, 100.0, 1000.0])
def test_a_row_that_would_overflow_is_repeated(impl: str, value: float) -> None:
    rule = PolicyRule(entropy_coef=0.01 if value == 45.0 else 0.0)
    case = with_large_logit(make_case(5, N=20, on_policy=True, rule=rule), value)
    assert_within_budget(case, impl, slack=1e-5 * value / 45)
    assert float(truth(case).logprobs[0]) < -value / 3


@both_designs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_low_precision_is_within_the_error_budget(
    impl: str, dtype: torch.dtype, entropy_coef: float
) -> None:
    rule = PolicyRule(ratio="turn", entropy_coef=entropy_coef)
    case = make_case(2, N=40, V=200, D=32, rule=rule, dtype=dtype)
    if impl == "triton_anchored" and dtype == torch.float16:
        with pytest.raises(ValueError, match="float16 cannot hold exponentials"):
            run(case, impl)
        return
    assert_within_budget(case, impl, chunk_tokens=24)


def test_bf16_log_probs_have_float32_accuracy_and_gradients_that_of_bf16() -> None:
    """The interpreter truncates to bf16, hardware rounds: 6e-3 here corresponds to 3e-3 there."""
    case = make_case(3, N=40, V=700, D=64, dtype=torch.bfloat16)
    true = truth(case)
    for impl in DESIGNS:
        out, found = run(case, impl)
        computed = ~out.logprobs.isnan()
        assert float((found.logprobs - true.logprobs)[computed].abs().max()) < 1e-5
        assert relative(found.d_hidden, true.d_hidden) < 6e-3
        assert relative(found.d_head, true.d_head) < 6e-3


@both_designs
def test_any_chunk_size_gives_the_same_gradient(impl: str) -> None:
    case = make_case(6, N=30, rule=PolicyRule(ratio="turn", kl_coef=0.04))
    assert_any_chunks_agree(case, impl, (13,))


@both_designs
def test_the_same_call_twice_is_bitwise_equal(impl: str) -> None:
    case = make_case(8, N=20, V=150, rule=PolicyRule(ratio="turn", entropy_coef=0.01))
    assert_repeatable(case, impl)


@both_designs
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_uninitialised_memory_is_never_read(impl: str, softcap: float | None) -> None:
    assert_ignores_uninitialised_memory(impl, softcap, N=40, chunk_tokens=20)


@both_designs
def test_log_probs_alone_equal_those_of_the_loss(impl: str) -> None:
    case = make_case(12, N=20, V=200, temperature=0.8, softcap=6.0)
    assert_logprobs_match_the_loss(case, impl, (12,))


@both_designs
def test_without_a_loss_bearing_token_the_loss_is_zero(impl: str) -> None:
    case = make_case(11, N=12, K=4)
    case = dataclasses.replace(case, advantages=torch.zeros(4))
    out, answer = run(case, impl)
    assert float(out.loss.detach()) == 0.0 and int(out.stats.skipped) == 12
    assert not answer.d_hidden.any() and not answer.d_head.any()


@both_designs
def test_a_nan_in_the_head_weight_is_reported(impl: str) -> None:
    case = make_case(11)
    case.head[40, 3] = torch.nan
    with pytest.raises(ValueError, match="head_weight: expected finite"):
        run(case, impl)


@both_designs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_microbatches_accumulate_in_one_buffer(impl: str, dtype: torch.dtype) -> None:
    assert_microbatches_accumulate(impl, dtype, chunk_tokens=10)


@both_designs
def test_the_operator_passes_opcheck(impl: str) -> None:
    case = make_case(16, N=10, V=20)
    case = dataclasses.replace(case, advantages=case.advantages + 0.5)
    torch.library.opcheck(op.policy_loss_op, operator_arguments(case, impl))


@pytest.mark.parametrize(
    ("dtype", "capability", "design"),
    [
        (torch.bfloat16, (8, 0), "safe"),
        (torch.bfloat16, (8, 9), "safe"),
        (torch.bfloat16, (9, 0), "anchored"),
        (torch.bfloat16, (10, 0), "safe"),
        (torch.bfloat16, (12, 0), "safe"),
        (torch.float16, (9, 0), "safe"),
        (torch.float32, (9, 0), "safe"),
    ],
)
def test_the_design_is_fixed_per_architecture(
    dtype: torch.dtype, capability: tuple[int, int], design: str
) -> None:
    assert choose_design(dtype, capability) == design


def test_the_name_triton_selects_the_safe_design_in_the_interpreter() -> None:
    case = make_case(18, N=20)
    _, named = run(case, "triton_safe")
    _, found = run(case, "triton")
    assert torch.equal(found.d_head, named.d_head)
    with pytest.raises(ValueError, match="only the reference supports float64"):
        backends.implementation("triton", CPU, torch.float64)
