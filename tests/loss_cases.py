"""Cases of the loss head, their truth, and the budget of errors that an implementation has.

`truth` is plain autograd over full logits in any dtype: float64 is the truth, the model's dtype the
low-precision reference of the error budget.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from turnfast.kernels import PolicyLoss, PolicyRule, linear_logprobs, turn_policy_loss
from turnfast.kernels.loss_head import backends


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
    hidden, head, out = _backward(case, impl, options)
    assert hidden.grad is not None and head.grad is not None
    return out, Answer(
        loss=out.loss.detach().double(),
        d_hidden=hidden.grad.double(),
        d_head=head.grad.double(),
        logprobs=out.logprobs.double(),
        entropies=out.entropies.double(),
    )


def onto(case: Case, impl: str, head_grad: Tensor, **options: object) -> Tensor:
    """turn_policy_loss of the case onto a sum of head gradients; the gradient of hidden."""
    hidden, head, _ = _backward(case, impl, {**options, "head_grad": head_grad})
    assert head.grad is None and hidden.grad is not None
    return hidden.grad.double()


def _backward(
    case: Case, impl: str, options: dict[str, object]
) -> tuple[Tensor, Tensor, PolicyLoss]:
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
    return hidden, head, out


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


def microbatches(case: Case, count: int) -> list[Case]:
    """The case's tokens, cut between turns."""
    parts = []
    for number in range(count):
        mine = case.turns % count == number
        fields = {
            name: value[mine]
            for name in ("rows", "targets", "turns", "old", "weights")
            if (value := getattr(case, name)) is not None
        }
        parts.append(dataclasses.replace(case, **fields))
    return parts


def assert_head_grad_adds_up(impl: str, dtype: torch.dtype, chunk_tokens: int | None) -> None:
    """Micro-batches onto one sum give the gradient of the whole, and no worse than added up by
    autograd, each rounded to the head's dtype."""
    case = make_case(3, N=63, V=150, D=24, rule=PolicyRule(ratio="turn"), dtype=dtype)
    parts, true = microbatches(case, 4), truth(case)
    added = torch.zeros_like(case.head)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.linspace(-1, 1, case.head.numel()).view(case.head.shape).to(wide)
    head_grad, moved = torch.zeros_like(start), start.clone()
    d_hidden = torch.zeros_like(true.d_hidden)
    for part in parts:
        _, alone = run(part, impl, chunk_tokens=chunk_tokens)
        added += alone.d_head.to(dtype)
        found = onto(part, impl, head_grad, chunk_tokens=chunk_tokens)
        assert torch.equal(found, alone.d_hidden)
        onto(part, impl, moved, chunk_tokens=chunk_tokens)
        d_hidden += found
    error, before = (relative(x.double(), true.d_head) for x in (head_grad, added))
    assert error <= max(before, 1e-6), f"{error:.1e}, rounded every time {before:.1e}"
    assert (moved - start - head_grad).abs().max() < 1e-6
    if dtype == torch.float32:
        _, whole = run(case, impl, chunk_tokens=chunk_tokens)
        assert (head_grad - whole.d_head).abs().max() < 1e-6
        assert (d_hidden - whole.d_hidden).abs().max() < 1e-6


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


def assert_reads_what_it_wrote(
    impl: str, softcap: float | None, *, N: int, chunk_tokens: int
) -> None:
    """Memory that is allocated full of NaN changes nothing."""
    rule = PolicyRule(ratio="turn", entropy_coef=0.01, kl_coef=0.1)
    case = make_case(21, N=N, normaliser="masked", rule=rule, softcap=softcap)
    clean, expected = run(case, impl, chunk_tokens=chunk_tokens)
    torch.use_deterministic_algorithms(True)  # this is what fills it
    try:
        assert bool(torch.empty(3).isnan().all())
        out, found = run(case, impl, chunk_tokens=chunk_tokens)
    finally:
        torch.use_deterministic_algorithms(False)
    for field in ("loss", "d_hidden", "d_head"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    assert torch.equal(out.turn_logprobs, clean.turn_logprobs)


def assert_same_alone(case: Case, impl: str, chunks: tuple[int | None, ...]) -> None:
    """linear_logprobs finds the log-probs and entropies of the loss, in any chunks."""
    case = dataclasses.replace(case, advantages=torch.ones_like(case.advantages))
    out, _ = run(case, impl)
    for chunk_tokens in chunks:
        alone = linear_logprobs(
            *(case.hidden, case.head, case.rows, case.targets),
            temperature=case.temperature,
            softcap=case.softcap,
            chunk_tokens=chunk_tokens,
            impl=impl,
        )
        torch.testing.assert_close(alone.logprobs, out.logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.entropies, out.entropies, rtol=1e-5, atol=1e-5)


def with_far_row(case: Case, above: float) -> Case:
    """The case with a logit of the first token's row that high, far above those of its targets."""
    row = case.rows[0]
    used = case.targets[case.rows == row]
    other = next(j for j in range(len(case.head)) if not bool((used == j).any()))
    hidden = case.hidden.clone()
    hidden[row] = case.head[other] * (above / case.head[other].square().sum())
    return dataclasses.replace(case, hidden=hidden)


def on_device(case: Case, device: str) -> Case:
    """Copy the tensors of a case to a device."""
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(case)
        if isinstance(value := getattr(case, field.name), Tensor)
    }
    return dataclasses.replace(case, **tensors)


def have(impl: str) -> bool:
    """Whether an implementation takes float32 on the CPU in this process."""
    try:
        backends.implementation(impl, torch.device("cpu"), torch.float32)
    except ValueError:
        return False
    return True


def flat(case: Case, impl: str) -> tuple[object, ...]:
    """The case as the operator takes it, leaves that need gradients; plain PPO at token level."""
    hidden, head = case.hidden.requires_grad_(), case.head.requires_grad_()
    given = (hidden, head, case.rows, case.targets, case.turns, None, case.advantages, case.old)
    given += (case.weights, None, None, 0.2, 0.2, "token", "ppo", None, 0.0, 0.0, None)
    return (*given, 1.0, None, None, "", 0, True, True, impl)


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


def cases(*, N: list[int], V: list[int], D: list[int], K: list[int]) -> st.SearchStrategy[Case]:
    """Every option crossed with every other, in the given sizes."""
    return st.builds(
        make_case,
        st.integers(0, 10_000),
        N=st.sampled_from(N),
        V=st.sampled_from(V),
        D=st.sampled_from(D),
        K=st.sampled_from(K),
        rule=rules,
        normaliser=st.sampled_from(["token", "sequence", "constant", "masked"]),
        on_policy=st.booleans(),
        temperature=st.sampled_from([0.7, 1.0, 1.3]),
        softcap=st.sampled_from([None, None, 5.0]),
    )
