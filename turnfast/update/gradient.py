"""The gradient of one optimizer step, accumulated over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..config.schema import LossConfig
from ..errors import TrainingError
from ..kernels import PolicyLoss, PolicyRule, turn_policy_loss
from ..model import Policy, hidden_states, sparse_embedding
from ..types import Batch
from .learner import Learner

ADVICE = (
    "this update changed no weight; lower optim.lr (sft.lr in a warm start), or resume from the "
    "last checkpoint"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """One rank's losses of a step; the optimizer holds the gradient itself."""

    batches: Sequence[Batch]
    results: Sequence[PolicyLoss]
    """One per batch, without an autograd graph."""
    value_loss: float
    """The critic's loss, summed over the batches; 0 without a critic."""

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
    learner: Learner, batches: Sequence[Batch], config: LossConfig, *, temperature: float
) -> Gradient:
    """Run forward and backward over all batches; accumulates into existing gradients.

    With a critic, the same backward pass computes the gradient of the value loss.

    Raises:
        TrainingError: the loss head found hidden states or logits that are not finite.
    """
    policy, optimizer = learner.policy, learner.optimizer
    # all micro-batches add to one buffer; a rank without batches needs it too, for the all-reduce
    head_grad = optimizer.grad_sum(policy.head_VD)
    with optimizer.accumulating(), sparse_embedding(policy, wanted=head_grad is not None):
        passes = [_backward(learner, batch, config, temperature, head_grad) for batch in batches]
    return Gradient(
        batches=batches,
        results=[result for result, _ in passes],
        value_loss=sum(value_loss for _, value_loss in passes),
    )


def _backward(
    learner: Learner,
    batch: Batch,
    config: LossConfig,
    temperature: float,
    head_grad: Tensor | None,
) -> tuple[PolicyLoss, float]:
    hidden_TD = hidden_states(learner.policy, batch)
    result = _policy_loss(learner.policy, hidden_TD, batch, config, temperature, head_grad)
    detached = replace(result, loss=result.loss.detach())
    if learner.critic is None:
        result.loss.backward()
        return detached, 0.0
    value_loss = learner.critic.loss(hidden_TD, batch)
    (result.loss + value_loss).backward()
    return detached, float(value_loss.detach())


def _policy_loss(
    policy: Policy,
    hidden_TD: Tensor,
    batch: Batch,
    config: LossConfig,
    temperature: float,
    head_grad: Tensor | None,
) -> PolicyLoss:
    try:
        return turn_policy_loss(
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
    except ValueError as error:
        if "expected finite" not in str(error):
            raise
        raise TrainingError(f"{error}; {ADVICE}") from error
