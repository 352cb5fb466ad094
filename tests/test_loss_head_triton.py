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
    assert_within_budget,
    make_case,
    relative,
    run,
    truth,
)

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from turnfast.kernels import PolicyRule
from turnfast.kernels.loss_head import backends, policy
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
    actual = triton_policy.policy_terms(case.rule, tokens, logprobs, entropies)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.d_logprob_C, expected.d_logprob_C, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(actual.sums, expected.sums, rtol=1e-5, atol=1e-5)
    assert (actual.d_entropy_C is None) == (expected.d_entropy_C is None)
    if actual.d_entropy_C is not None:
        torch.testing.assert_close(actual.d_entropy_C, expected.d_entropy_C)


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
        out, actual = run(case, impl)
        computed = ~out.logprobs.isnan()
        assert float((actual.logprobs - true.logprobs)[computed].abs().max()) < 1e-5
        assert relative(actual.d_hidden, true.d_hidden) < 6e-3
        assert relative(actual.d_head, true.d_head) < 6e-3


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
    _, actual = run(case, "triton")
    assert torch.equal(actual.d_head, named.d_head)
    with pytest.raises(ValueError, match="only the reference supports float64"):
        backends.implementation("triton", CPU, torch.float64)
