"""The truth that every implementation of the loss head is held against, itself held against peers.

`truth` is plain autograd over full logits in any dtype: float64 is the truth, the model's dtype the
low-precision reference of the error budget. Other test files import it from here.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from turnfast.kernels import PolicyLoss, PolicyRule, turn_policy_loss


@dataclass(frozen=True, kw_only=True)
class Case:
    """All arguments of one turn_policy_loss."""

    hidden: Tensor
    head: Tensor
    rows: Tensor
    targets: Tensor
    turns: Tensor
    sequences: Tensor
    advantages: Tensor
    old: Tensor | None
    weights: Tensor
    ref: Tensor | None
    sampler: Tensor | None
    rule: PolicyRule
    temperature: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Loss, gradients, log-probs and entropies in float64."""

    loss: Tensor
    d_hidden: Tensor
    d_head: Tensor
    logprobs: Tensor
    entropies: Tensor


def full_logprobs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden and head as leaves of the dtype, log-probs and entropies [N] in at least float32."""
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    head = case.head.detach().to(dtype).requires_grad_()
    z = hidden[case.rows] @ head.T
    z = z if dtype == torch.float64 else z.float()
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    every = (z / case.temperature).log_softmax(-1)
    picked = every.gather(1, case.targets[:, None]).squeeze(1)
    # exp(-inf) * -inf is not a probability times its logarithm; a masked logit cannot occur here.
    return hidden, head, picked, -(every.exp() * every).sum(-1)


def truth(case: Case, dtype: torch.dtype = torch.float64) -> Answer:
    """The loss written out from its definition, differentiated by autograd."""
    hidden, head, logprobs, entropies = full_logprobs(case, dtype)
    rule, weights = case.rule, case.weights.to(logprobs.dtype)
    old = logprobs.detach() if case.old is None else case.old.to(logprobs.dtype)
    live = weights != 0
    level = logprobs - old
    if rule.ratio != "token":
        segment = case.turns if rule.ratio == "turn" else case.sequences[case.turns]
        means = torch.zeros_like(level)
        for number in segment[live].unique():
            inside = live & (segment == number)
            means = torch.where(inside, level[inside].mean(), means)
        level = means
    ratio, A = level.exp(), case.advantages.to(logprobs.dtype)[case.turns]
    if rule.kind == "ppo":
        clipped = ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high)
        gain = torch.minimum(ratio * A, clipped * A)
        if rule.dual_clip is not None:
            gain = torch.where(A < 0, torch.maximum(gain, rule.dual_clip * A), gain)
        policy = -gain
    else:
        policy = -ratio.clamp(max=1 + rule.clip_high).detach() * A * logprobs
    if rule.is_cap is not None:
        assert case.sampler is not None
        policy = policy * (old - case.sampler.to(old.dtype)).exp().clamp(max=rule.is_cap)
    each = policy
    if rule.kl_coef:
        assert case.ref is not None
        gap = case.ref.to(old.dtype) - logprobs
        each = each + rule.kl_coef * (gap.exp() - gap - 1)
    if rule.entropy_coef:
        each = each - rule.entropy_coef * entropies
    loss = (weights[live] * each[live]).sum()
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return Answer(
        loss=loss.detach().double(),
        d_hidden=hidden.grad.double(),
        d_head=head.grad.double(),
        logprobs=logprobs.detach().double(),
        entropies=entropies.detach().double(),
    )


def run(case: Case, impl: str, **options: object) -> tuple[PolicyLoss, Answer]:
    """turn_policy_loss of the case, with gradients."""
    hidden = case.hidden.detach().clone().requires_grad_()
    head = case.head.detach().clone().requires_grad_()
    out = turn_policy_loss(
        hidden,
        head,
        case.rows,
        case.targets,
        case.turns,
        case.advantages,
        case.old,
        weights=case.weights,
        ref_logprobs=case.ref,
        sampler_logprobs=case.sampler,
        sequences=case.sequences,
        rule=case.rule,
        temperature=case.temperature,
        softcap=case.softcap,
        impl=impl,
        **options,  # type: ignore[arg-type]
    )
    out.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return out, Answer(
        loss=out.loss.detach().double(),
        d_hidden=hidden.grad.double(),
        d_head=head.grad.double(),
        logprobs=out.logprobs.double(),
        entropies=out.entropies.double(),
    )


def make_case(
    seed: int,
    *,
    N: int = 63,
    V: int = 97,
    D: int = 16,
    K: int = 9,
    rule: PolicyRule | None = None,
    dtype: torch.dtype = torch.float32,
    normaliser: str = "token",
    on_policy: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    shift: float = 0.0,
) -> Case:
    """Random packed turns: rows with several targets, empty turns, advantages of 0, masked tokens.

    shift moves all logits by the same number.
    """
    rule = rule or PolicyRule()
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(max(2, N - 3), D, generator=g)
    head = torch.randn(V, D, generator=g) * 0.7
    if shift:
        hidden[:, 0] = 1.0
        head[:, 0] = shift
    hidden, head = hidden.to(dtype), head.to(dtype)
    rows = torch.randint(0, hidden.shape[0], (N,), generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    # Sorted random numbers leave some of the K turns empty.
    turns = torch.randint(0, K, (N,), generator=g).sort().values
    sequences = torch.randint(0, max(1, K // 2), (K,), generator=g)
    advantages = torch.randn(K, generator=g)
    advantages[::4] = 0.0
    weights = torch.rand(N, generator=g) + 0.1
    if normaliser == "token":
        weights = torch.full((N,), 1.0 / N)
    elif normaliser == "sequence":
        of_token = sequences[turns]
        counts = torch.bincount(of_token, minlength=K)
        weights = 1.0 / (counts[of_token] * len(counts)).float()
    elif normaliser == "masked":
        weights = weights / weights.sum()
        weights[torch.rand(N, generator=g) < 0.3] = 0.0
    case = Case(
        hidden=hidden,
        head=head,
        rows=rows,
        targets=targets,
        turns=turns,
        sequences=sequences,
        advantages=advantages,
        old=None,
        weights=weights,
        ref=None,
        sampler=None,
        rule=dataclasses.replace(rule),
        temperature=temperature,
        softcap=softcap,
    )
    logprobs = full_logprobs(case, torch.float64)[2].detach().float()

    def near(scale: float) -> Tensor:
        return logprobs + scale * torch.randn(N, generator=g)

    return dataclasses.replace(
        case,
        old=None if on_policy else near(0.3),
        ref=near(0.3) if rule.kl_coef else None,
        sampler=near(0.5) if rule.is_cap is not None else None,
    )


def relative(found: Tensor, true: Tensor) -> float:
    """Error in units of the truth's own size."""
    if true.numel() == 0:
        return 0.0
    return float((found - true).norm() / true.norm().clamp(min=1e-12))


def trained(out: PolicyLoss) -> Tensor:
    """The tokens that were computed."""
    return ~out.logprobs.isnan()


def assert_within_budget(case: Case, impl: str, slack: float = 1e-5, **options: object) -> None:
    """err(found) <= 2 err(low-precision reference) + slack, each against float64."""
    out, found = run(case, impl, **options)
    true, low = truth(case), truth(case, case.hidden.dtype)
    live = trained(out)
    assert torch.equal(live | (case.weights == 0) | _dark(case), torch.ones_like(live))
    pairs = [
        ("loss", found.loss - true.loss, low.loss - true.loss, max(1.0, float(true.loss.abs()))),
        *(
            (name, getattr(found, name)[live] - getattr(true, name)[live],
             getattr(low, name)[live] - getattr(true, name)[live], 1.0)
            for name in ("logprobs", "entropies")
        ),
        *(
            (name, getattr(found, name) - getattr(true, name),
             getattr(low, name) - getattr(true, name), float(getattr(true, name).abs().max()))
            for name in ("d_hidden", "d_head")
        ),
    ]  # fmt: skip
    for name, error, low_error, unit in pairs:
        if error.numel() == 0:
            continue
        unit = max(unit, 1e-12)
        worst, allowed = float(error.abs().max()) / unit, float(low_error.abs().max()) / unit
        assert worst <= 2 * allowed + slack, f"{name}: {worst:.2e} > 2 * {allowed:.2e} + {slack}"


def _dark(case: Case) -> Tensor:
    """Tokens whose own turn has no advantage; only those may be skipped."""
    if case.rule.kl_coef or case.rule.entropy_coef:
        return torch.zeros_like(case.turns, dtype=torch.bool)
    return (case.advantages == 0)[case.turns]


def padded_case(seed: int) -> tuple[Case, Tensor]:
    """Sequences of unequal length, one turn each, token mean, and their padding mask [B, L]."""
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
    """[N, ...] to [B, L, ...] with zeros in the padding."""
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
    # The loss of TRL's GRPO trainer for loss types "dapo" and "cispo", in its padded layout.
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
    _, found = run(case, "reference")
    assert relative(found.d_hidden, true.d_hidden) < 1e-5


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
    for impl in ("reference", "triton_safe", "triton_anchored"):
        out, found = run(case, impl)
        assert float((out.loss - loss).abs()) < 2e-6
        assert relative(found.d_head, d_head) < 2e-5
