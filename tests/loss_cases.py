"""Cases of the loss head, their true results, and the error budgets of an implementation.

`truth` is plain autograd over full logits. In float64 it is the truth; in the model's dtype it is
the low-precision baseline of the error budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from turnfast.kernels import (
    LinearLogprobs,
    PolicyLoss,
    PolicyRule,
    linear_logprobs,
    turn_policy_loss,
)
from turnfast.kernels.loss_head import backends
from turnfast.kernels.loss_head.problem import Problem, Vocab, compute_dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """The arguments of one turn_policy_loss."""

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
    """Return hidden and head as leaves of the dtype, and log-probs and entropies [N] of them."""
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    head = case.head.detach().to(dtype).requires_grad_()
    z = hidden[case.rows] @ head.T
    z = z if dtype == torch.float64 else z.float()
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    log_p = (z / case.temperature).log_softmax(-1)
    logprobs = log_p.gather(1, case.targets[:, None]).squeeze(1)
    return hidden, head, logprobs, -(log_p.exp() * log_p).sum(-1)


def truth(case: Case, dtype: torch.dtype = torch.float64) -> Answer:
    """Compute the loss from its definition and its gradients by autograd."""
    hidden, head, logprobs, entropies = full_logprobs(case, dtype)
    rule, weights = case.rule, case.weights.to(logprobs.dtype)
    old = logprobs.detach() if case.old is None else case.old.to(logprobs.dtype)
    used = weights != 0
    level = logprobs - old
    if rule.ratio != "token":
        segment = case.turns if rule.ratio == "turn" else case.sequences[case.turns]
        means = torch.zeros_like(level)
        for number in segment[used].unique():
            inside = used & (segment == number)
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
    loss = (weights[used] * each[used]).sum()
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return Answer(
        loss=loss.detach().double(),
        d_hidden=hidden.grad.double(),
        d_head=head.grad.double(),
        logprobs=logprobs.detach().double(),
        entropies=entropies.detach().double(),
    )


def loss_of(
    case: Case,
    impl: str = "auto",
    hidden: Tensor | None = None,
    head: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """Call turn_policy_loss with the case, optionally with another hidden or head."""
    return turn_policy_loss(
        case.hidden if hidden is None else hidden,
        case.head if head is None else head,
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
        **options,
    )


def logprobs_of(case: Case, impl: str = "auto", **options: Any) -> LinearLogprobs:
    """Call linear_logprobs with the case."""
    return linear_logprobs(
        *(case.hidden, case.head, case.rows, case.targets),
        temperature=case.temperature,
        softcap=case.softcap,
        impl=impl,
        **options,
    )


def as_problem(case: Case, **options: Any) -> Problem:
    """Return the case as the record that implementations receive, with both gradients wanted."""
    dtype = compute_dtype(case.hidden.dtype)
    values = {
        "hidden_TD": case.hidden,
        "head_VD": case.head,
        "vocab": Vocab.of(case.head),
        "rows_N": case.rows,
        "targets_N": case.targets,
        "turns_N": case.turns,
        "sequences_K": case.sequences,
        "advantages_K": case.advantages.to(dtype),
        "weights_N": case.weights.to(dtype),
        "old_N": case.old,
        "ref_N": case.ref,
        "sampler_N": case.sampler,
        "rule": case.rule,
        "temperature": case.temperature,
        "softcap": case.softcap,
        "chunk_tokens": None,
        "need_hidden": True,
        "need_head": True,
    }
    return Problem(**values | options)


def leaves(case: Case) -> tuple[Tensor, Tensor]:
    """Return copies of hidden and head that require gradients."""
    return (
        case.hidden.detach().clone().requires_grad_(),
        case.head.detach().clone().requires_grad_(),
    )


def run(case: Case, impl: str, **options: Any) -> tuple[PolicyLoss, Answer]:
    """Compute the loss of the case and its gradients."""
    hidden, head = leaves(case)
    out = loss_of(case, impl, hidden, head, **options)
    out.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return out, Answer(
        loss=out.loss.detach().double(),
        d_hidden=hidden.grad.double(),
        d_head=head.grad.double(),
        logprobs=out.logprobs.double(),
        entropies=out.entropies.double(),
    )


def run_into(case: Case, impl: str, head_grad: Tensor, **options: Any) -> Tensor:
    """Compute the gradients with a head_grad buffer and return the gradient of hidden."""
    hidden, head = leaves(case)
    loss_of(case, impl, hidden, head, head_grad=head_grad, **options).loss.backward()
    assert head.grad is None and hidden.grad is not None
    return hidden.grad.double()


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
    rows: int | None = None,
) -> Case:
    """Make random packed turns: repeated rows, empty turns, advantages of 0, masked tokens.

    shift is added to all logits.
    """
    rule = rule or PolicyRule()
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows or max(2, N - 3), D, generator=g)
    head = torch.randn(V, D, generator=g) * 0.7
    if shift:
        hidden[:, 0] = 1.0
        head[:, 0] = shift
    hidden, head = hidden.to(dtype), head.to(dtype)
    row_of = torch.randint(0, hidden.shape[0], (N,), generator=g)
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
        rows=row_of,
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


def select(case: Case, keep: Tensor) -> Case:
    """Return the case with the tokens of a mask; its weights stay as they are."""
    names = ("rows", "targets", "turns", "old", "weights", "ref", "sampler")
    fields = {name: x[keep] for name in names if (x := getattr(case, name)) is not None}
    return dataclasses.replace(case, **fields)


def microbatches(case: Case, count: int) -> list[Case]:
    """Split the case between turns."""
    return [select(case, case.turns % count == number) for number in range(count)]


def assert_same_stats(actual: PolicyLoss, expected: PolicyLoss, rtol: float, atol: float) -> None:
    for field in dataclasses.fields(actual.stats):
        a, b = (getattr(each.stats, field.name) for each in (actual, expected))
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=f"{field.name}: {a} != {b}")


def relative(actual: Tensor, true: Tensor) -> float:
    """Return the norm of the error relative to the norm of the truth."""
    return float((actual - true).norm() / true.norm().clamp(min=1e-12))


def trained(out: PolicyLoss) -> Tensor:
    """Return which tokens were computed."""
    return ~out.logprobs.isnan()


def assert_within_budget(case: Case, impl: str, slack: float = 1e-5, **options: Any) -> None:
    """Assert err(impl) <= 2 err(low-precision autograd) + slack, both against float64.

    Errors of the loss are relative if it exceeds 1; those of gradients to their largest element.
    """
    out, actual = run(case, impl, **options)
    low, true = truth(case, case.hidden.dtype), truth(case)
    has_signal = (case.advantages != 0)[case.turns]
    if case.rule.kl_coef or case.rule.entropy_coef:
        has_signal = torch.ones_like(has_signal)
    assert (trained(out) | (case.weights == 0) | ~has_signal).all()
    for name, x, x_low, x_true in _compared(actual, low, true, trained(out)):
        unit = 1.0
        if name == "loss":
            unit = max(1.0, float(x_true.abs()))
        elif name.startswith("d_"):
            unit = max(1e-12, float(x_true.abs().max()))
        error, low_error = (float((each - x_true).abs().max()) / unit for each in (x, x_low))
        assert error <= 2 * low_error + slack, (
            f"{name}: {error:.2e} > 2 * {low_error:.2e} + {slack}"
        )


def assert_as_accurate_as_reference(
    case: Case, impl: str, slack: float = 0.0, **options: Any
) -> None:
    """Assert err(impl) <= 2 err(reference implementation) + 1e-5, both against float64.

    Errors are absolute for loss, log-probs and entropies, relative to the norm for gradients.
    slack is added for gradients.
    """
    reference, low = run(case, "reference", **options)
    out, actual = run(case, impl, **options)
    assert torch.equal(trained(out), trained(reference))
    for name, x, x_low, x_true in _compared(actual, low, truth(case), trained(out)):
        if name.startswith("d_"):
            error, allowed = relative(x, x_true), 2 * relative(x_low, x_true) + slack
        else:
            error, low_error = (float((each - x_true).abs().max()) for each in (x, x_low))
            allowed = 2 * low_error
        assert error <= allowed + 1e-5, f"{name}: {error:.2e}, allowed {allowed:.2e}"
    assert_same_stats(out, reference, rtol=1e-3, atol=1e-4)


def _compared(
    actual: Answer, low: Answer, true: Answer, computed: Tensor
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield the name and the three values of each result, of the computed tokens only."""
    for field in dataclasses.fields(Answer):
        values = [getattr(answer, field.name) for answer in (actual, low, true)]
        if field.name in ("logprobs", "entropies"):
            values = [x[computed] for x in values]
        if values[0].numel():
            yield field.name, values[0], values[1], values[2]


def with_large_logit(case: Case, value: float) -> Case:
    """Return the case with one logit of the first token's row near `value`; it is no target."""
    row = case.rows[0]
    used = case.targets[case.rows == row]
    other = next(j for j in range(len(case.head)) if not bool((used == j).any()))
    hidden = case.hidden.clone()
    hidden[row] = case.head[other] * (value / case.head[other].square().sum())
    return dataclasses.replace(case, hidden=hidden)


def on_device(case: Case, device: str) -> Case:
    """Copy the tensors of a case to a device."""
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(case)
        if isinstance(value := getattr(case, field.name), Tensor)
    }
    return dataclasses.replace(case, **tensors)


def is_available(impl: str) -> bool:
    """Return whether this process can run an implementation in float32 on the CPU."""
    try:
        backends.implementation(impl, torch.device("cpu"), torch.float32)
    except ValueError:
        return False
    return True


def operator_arguments(case: Case, impl: str) -> tuple[object, ...]:
    """Return the arguments of the operator, with leaves; plain PPO at token level."""
    hidden, head = leaves(case)
    tensors = (hidden, head, case.rows, case.targets, case.turns, None, case.advantages, case.old)
    rule = (0.2, 0.2, "token", "ppo", None, 0.0, 0.0, None)
    options = (1.0, None, None, "", 0, True, True, impl)
    return (*tensors, case.weights, None, None, *rule, *options)


needs_cpp = pytest.mark.skipif(not is_available("cpp"), reason="the C++ extension is not built")
every_impl = pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])

rules = st.builds(
    PolicyRule,
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.28, 4.0]),
    ratio=st.sampled_from(["token", "turn", "sequence"]),
    kind=st.just("ppo"),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    kl_coef=st.sampled_from([0.0, 0.04]),
    entropy_coef=st.sampled_from([0.0, 0.01, -0.02]),
    is_cap=st.sampled_from([None, 1.0, 2.0]),
) | st.builds(
    PolicyRule,
    clip_high=st.sampled_from([0.2, 4.0]),
    ratio=st.sampled_from(["token", "turn", "sequence"]),
    kind=st.just("cispo"),
    kl_coef=st.sampled_from([0.0, 0.04]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
    is_cap=st.sampled_from([None, 2.0]),
)


def cases(
    *,
    N: list[int],
    V: list[int],
    D: list[int],
    K: list[int],
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> st.SearchStrategy[Case]:
    """Combine every option with every other, for the given sizes."""
    return st.builds(
        make_case,
        st.integers(0, 10_000),
        N=st.sampled_from(N),
        V=st.sampled_from(V),
        D=st.sampled_from(D),
        K=st.sampled_from(K),
        rule=rules,
        dtype=st.sampled_from(dtypes),
        normaliser=st.sampled_from(["token", "sequence", "constant", "masked"]),
        on_policy=st.booleans(),
        temperature=st.sampled_from([0.7, 1.0, 1.3]),
        softcap=st.sampled_from([None, None, 5.0]),
        rows=st.sampled_from([None, None, 3]),
    )
