"""The Triton loss head on a CUDA device, as its compiler and driver build it."""

from __future__ import annotations

import pytest
import torch
from loss_cases import assert_within_budget, make_case, on_device, with_large_logit
from turnfast.kernels import PolicyRule

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
BUILDS = [("triton_safe", BF16), ("triton_anchored", BF16), ("triton", BF16)]
BUILDS += [("triton_safe", torch.float16), ("triton_safe", torch.float32)]
RULES = [
    PolicyRule(),
    PolicyRule(ratio="turn", dual_clip=3.0, kl_coef=0.5, entropy_coef=0.5, is_cap=2.0),
    PolicyRule(ratio="sequence", kind="cispo"),
]


@pytest.mark.parametrize(("impl", "dtype"), BUILDS)
@pytest.mark.parametrize("rule", RULES, ids=["ppo", "all-terms", "cispo"])
@pytest.mark.parametrize(("V", "D"), [(1520, 256), (1501, 250)], ids=["divisible", "odd"])
def test_it_is_within_the_error_budget(
    impl: str, dtype: torch.dtype, rule: PolicyRule, V: int, D: int
) -> None:
    """Several chunks, partial tiles, and one logit far above its target's."""
    case = make_case(0, N=200, V=V, D=D, rule=rule, dtype=dtype, on_policy=True)
    case = with_large_logit(case, 120.0)
    assert_within_budget(on_device(case, "cuda"), impl, slack=2e-3, chunk_tokens=104)
