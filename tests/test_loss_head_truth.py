"""The truth of the loss head tests against two peers: TRL's formula and Liger's kernel."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from loss_cases import Case, full_logprobs, is_available, make_case, relative, run, truth
from torch import Tensor
from turnfast.kernels import PolicyRule


def padded_case(seed: int) -> tuple[Case, Tensor]:
    """Make sequences of unequal length, one turn each, and their padding mask [B, L]."""
    lengths = torch.tensor([5, 9, 1, 7])
    B, L = len(lengths), int(lengths.max())
    mask = torch.arange(L) < lengths[:, None]
    rule = PolicyRule(clip_low=0.2, clip_high=0.28, kl_coef=0.04)
    case = make_case(seed, N=int(lengths.sum()), K=B, rule=rule, temperature=0.9)
    case = dataclasses.replace(
        case,
        weights=torch.full_like(case.weights, 1 / int(lengths.sum())),
        turns=torch.arange(B).repeat_interleave(lengths),
        sequences=torch.arange(B),
        advantages=torch.tensor([0.7, -1.1, 0.4, 1.3]),
        rows=torch.arange(int(lengths.sum())) % case.hidden.shape[0],
    )
    logprobs = full_logprobs(case, torch.float64)[2].detach().float()
    g = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(2, len(logprobs), generator=g) * 0.3
    case = dataclasses.replace(case, old=logprobs + noise[0], ref=logprobs + noise[1])
    return case, mask


def pad(values: Tensor, mask: Tensor) -> Tensor:
    """Return [N, ...] as [B, L, ...] with zeros in the padding."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.masked_scatter(mask.view(*mask.shape, *[1] * (values.ndim - 1)), values)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["ppo", "cispo"])
def test_truth_equals_the_padded_formula_of_trl(ratio: str, kind: str) -> None:
    case, mask = padded_case(3)
    rule = dataclasses.replace(case.rule, ratio=ratio, kind=kind, clip_high=0.28)
    case = dataclasses.replace(case, rule=rule)
    assert case.old is not None and case.ref is not None
    hidden, head, logprobs, _ = full_logprobs(case, torch.float64)
    per_token_logps, old, ref = (pad(x, mask) for x in (logprobs, case.old, case.ref))
    advantages, m = case.advantages.double(), mask.double()
    # The loss of the GRPO trainer for loss types "dapo" and "cispo", in its padded layout.
    log_ratio = (per_token_logps - old) * m
    if ratio == "sequence":
        log_ratio = (log_ratio.sum(-1) / m.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = log_ratio.exp()
    if kind == "cispo":
        clamped = torch.clamp(coef_1, max=1.28)
        per_token_loss = -clamped.detach() * advantages[:, None] * per_token_logps
    else:
        coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
        per_token_loss = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])
    per_token_kl = torch.exp(ref - per_token_logps) - (ref - per_token_logps) - 1
    per_token_loss = per_token_loss + 0.04 * per_token_kl
    loss = (per_token_loss * m).sum() / m.sum()
    loss.backward()
    true = truth(case)
    torch.testing.assert_close(true.loss, loss.detach())
    torch.testing.assert_close(true.d_hidden, hidden.grad)
    torch.testing.assert_close(true.d_head, head.grad)
    for impl in filter(is_available, ("reference", "cpp")):
        _, actual = run(case, impl)
        assert relative(actual.d_hidden, true.d_hidden) < 1e-5
        assert relative(actual.d_head, true.d_head) < 1e-5


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Liger's kernel needs TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_implementation_equals_liger_triton_grpo_loss(level: str) -> None:
    liger = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    case, mask = padded_case(5)
    rule = dataclasses.replace(case.rule, ratio=level)
    case = dataclasses.replace(case, rule=rule)
    assert case.old is not None and case.ref is not None
    logits = case.hidden[case.rows] @ case.head.T
    padded = pad(logits, mask)
    # Liger reads L + 1 positions and drops the last.
    padded = torch.cat([padded, padded.new_zeros(len(mask), 1, padded.shape[2])], dim=1)
    padded = padded.detach().requires_grad_()
    each, *_ = liger.triton_grpo_loss(
        padded,
        pad(case.old, mask),
        pad(case.ref, mask),
        pad(case.targets, mask),
        case.advantages,
        completion_mask=mask.int(),
        temperature=0.9,
        beta=0.04,
        eps_low=0.2,
        eps_high=0.28,
        inplace=False,
        importance_sampling_level=level,
    )
    loss = (each * mask).sum() / mask.sum()
    loss.backward()
    assert padded.grad is not None
    d_logits = padded.grad[:, :-1][mask].double()
    d_head = d_logits.T @ case.hidden[case.rows].double()
    for impl in filter(is_available, ("reference", "cpp", "triton_safe", "triton_anchored")):
        out, actual = run(case, impl)
        assert float((out.loss - loss).detach().abs()) < 2e-6
        assert relative(actual.d_head, d_head) < 2e-5
