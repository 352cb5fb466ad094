"""The gradient of one optimizer step, micro-batch by micro-batch, in the optimizer's sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..config.schema import LossConfig
from ..errors import TrainingError
from ..kernels import PolicyLoss, PolicyRule, turn_policy_loss
from ..model import Policy, hidden_states, sparse_embedding
from ..types import Batch
from .budget import Budget
from .critic import Critic
from .optimizer import Optimizer

ADVICE = (
    "this update has changed no weight; lower optim.lr (sft.lr in a warm start), or resume from "
    "the last checkpoint"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """What one rank has of a step's gradient; the gradient itself lies in the optimizer's sums.

    Attributes:
        batches: what it is of; smaller than those that were given where memory ran out.
        results: of each batch, without graph. value_loss: the critic's, over all batches.
    """

    batches: Sequence[Batch]
    results: Sequence[PolicyLoss]
    value_loss: float

    @property
    def loss(self) -> float:
        return sum(float(result.loss) for result in self.results)


def policy_rule(config: LossConfig) -> PolicyRule:
    return PolicyRule(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ratio=config.ratio,
        kind=config.kind,
        dual_clip=config.dual_clip,
        entropy_coef=config.entropy_coef,
        kl_coef=config.kl_coef,
        is_cap=config.is_cap,
    )


def compute_gradient(
    policy: Policy,
    optimizer: Optimizer,
    critic: Critic | None,
    batches: Sequence[Batch],
    config: LossConfig,
    *,
    temperature: float,
    budget: Budget,
) -> Gradient:
    """Forward and backward over all batches; whatever was in the sums before is added to.

    With a critic the same pass teaches it, and the policy's layers below it. Where memory runs out
    the sums are cleared, and all is computed again in smaller parts: see `Budget.replayed`.

    Raises:
        OutOfMemory: not even in these; the sums are empty.
        TrainingError: the hidden states are not finite.
    """

    def attempt(parts: Sequence[Batch]) -> list[tuple[PolicyLoss, float]]:
        # one buffer for all micro-batches; a rank without any takes part in its sum
        head_grad = optimizer.grad_sum(policy.head_VD)
        with optimizer.accumulating(), sparse_embedding(policy, wanted=head_grad is not None):
            return [_backward(policy, critic, p, config, temperature, head_grad) for p in parts]

    try:
        passes, batches = budget.replayed(
            attempt,
            batches,
            lambda: clear(optimizer, critic),
            whole_sequences=config.ratio == "sequence",
        )
    except ValueError as error:  # the loss head refuses hidden states that are not finite
        raise TrainingError(f"{error}; {ADVICE}") from error
    return Gradient(
        batches=batches,
        results=[result for result, _ in passes],
        value_loss=sum(value_loss for _, value_loss in passes),
    )


def clear(optimizer: Optimizer, critic: Critic | None) -> None:
    """Drop what there is of a gradient."""
    optimizer.zero_grad()
    if critic:
        critic.zero_grad()


def _backward(
    policy: Policy,
    critic: Critic | None,
    batch: Batch,
    config: LossConfig,
    temperature: float,
    head_grad: Tensor | None,
) -> tuple[PolicyLoss, float]:
    hidden_TD = hidden_states(policy, batch)
    result = turn_policy_loss(
        hidden_TD,
        policy.head_VD,
        batch.rows_N,
        batch.targets_N,
        batch.turns_N,
        batch.advantages_K,
        batch.old_logprobs_N,
        weights=batch.weights_N,
        ref_logprobs=batch.ref_logprobs_N,
        sampler_logprobs=batch.sampler_logprobs_N if config.is_cap is not None else None,
        sequences=batch.sequences_K if config.ratio == "sequence" else None,
        head_grad=head_grad,
        rule=policy_rule(config),
        temperature=temperature,
        softcap=policy.softcap,
        impl=config.impl,
    )
    plain = replace(result, loss=result.loss.detach())
    if critic is None:
        result.loss.backward()
        return plain, 0.0
    value_loss = critic.loss(hidden_TD, batch)
    (result.loss + value_loss).backward()
    return plain, float(value_loss.detach())
