"""One optimizer step, or several, on one step's packed rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .config import ConfigError, LossConfig
from .critic import Critic
from .kernels import PolicyLoss, PolicyRule, turn_policy_loss
from .kernels.loss_head.backends import implementation
from .model import Policy, hidden_states, sparse_embedding
from .optim import Optimizer
from .ranks import ALONE, RankError, Ranks
from .replay import replayed
from .token_figures import by_turn, drawn_kl
from .types import Batch

ADVICE = "this update has changed no weight; lower optim.lr, or resume from the last checkpoint"


class TrainingError(RuntimeError):
    """The update cannot be trusted; the text names the figure that went wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update did. `logprob_gap` is the mean |sampler − trainer| over all sampled tokens,
    `logprob_gap_max` the largest. Ratio, clip and lr figures are of the last update on the data;
    so are `kl`, the mean KL(policy || reference) over the trained tokens, and `value_loss`, the
    critic's (None without a reference or a critic). The token budget was halved `halvings` times
    for want of memory. `by_turn` has, for every turn index, entropy and KL(sampler || trainer) of
    the first update and, if there are several, KL(old || new) before the last."""

    loss: float = 0.0
    logprob: float = 0.0
    entropy: float = 0.0
    logprob_gap: float = 0.0
    logprob_gap_max: float = 0.0
    ratio_max: float = 1.0
    clip_fraction: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    num_updates: int = 0
    halvings: int = 0
    kl: float | None = None
    value_loss: float | None = None
    by_turn: Mapping[str, float] = field(default_factory=dict)


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


def check_impl(config: LossConfig, policy: Policy) -> None:
    """Refuse a `loss.impl` that is not available for the policy's device and dtype.

    Raises:
        ConfigError: with the reason.
    """
    try:
        implementation(config.impl, policy.device, policy.model.dtype)
    except ValueError as error:
        raise ConfigError(f"loss.{error}; 'auto' takes what is available") from None


def needs_every_token(config: LossConfig) -> bool:
    """Whether a token without advantage can still change the gradient."""
    return config.entropy_coef != 0.0 or config.kl_coef != 0.0 or config.ratio == "sequence"


def update(
    policy: Policy,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    config: LossConfig,
    *,
    temperature: float = 1.0,
    num_updates: int = 1,
    critic: Critic | None = None,
    ranks: Ranks = ALONE,
) -> Update:
    """Take `num_updates` optimizer steps on the same batches.

    With `old_logprobs = "trainer"` the first step is on policy: its ratio is 1, no old-policy pass
    is needed, and the log-probs it computes are the old ones of the steps after it. With "sampler"
    those of the sampler are the old ones from the first step on, so that the ratio also covers what
    engine and trainer differ by. With a critic each step also updates that, and the policy's layers
    below it, by the same pass. Where memory runs out, the batches are cut in halves and the same
    step is computed again: see `replayed`. All ranks call this at the same time, some perhaps
    without batches; loss and value loss are those of all of them, other figures the rank's own.

    Raises:
        TrainingError: loss or gradient is not finite, or the sampler's log-probs are to be reused
            and differ by more than `max_logprob_gap`; that update has changed nothing.
        OutOfMemory: not even with smaller micro-batches; that update has changed nothing.
    """
    done = Update()
    policy.model.train()  # whoever sampled with it has left it in eval mode
    reuse = config.old_logprobs == "sampler"
    if reuse:
        batches = [replace(batch, old_logprobs_N=batch.sampler_logprobs_N) for batch in batches]
    for i in range(num_updates if ranks.any(bool(batches)) else 0):
        try:
            with ranks.together():
                passes, batches, halvings = _gradient(
                    policy, optimizer, critic, batches, config, temperature
                )
                results = [result for result, _ in passes]
                if i == 0 and results:
                    done = _first(results, batches)
                if i == 0 and reuse and not done.logprob_gap <= config.max_logprob_gap:
                    raise TrainingError(
                        f"loss.old_logprobs: the sampler's log-probs differ from the trainer's by "
                        f"{done.logprob_gap:.3g} on average, more than loss.max_logprob_gap = "
                        f"{config.max_logprob_gap:g}; set loss.old_logprobs = 'trainer'"
                    )
        except (TrainingError, RankError):
            _zero_grad(optimizer, critic)
            raise
        if i == 0 and not reuse:
            # tokens without advantage are not computed; they stay without it in every update
            batches = [
                replace(batch, old_logprobs_N=result.logprobs.nan_to_num(nan=0.0))
                for batch, result in zip(batches, results, strict=True)
            ]
        own = [sum(float(result.loss.detach()) for result in results), sum(v for _, v in passes)]
        loss, value_loss = ranks.sum(own)
        lr = optimizer.lr
        finite = math.isfinite(loss + value_loss)
        norm = optimizer.step() if finite else math.nan
        if not math.isfinite(norm):
            _zero_grad(optimizer, critic)
            raise TrainingError(f"loss {loss}, gradient norm {norm}; {ADVICE}")
        if critic:
            critic.step()
        done = replace(
            _last(done, results, batches) if results else done,
            loss=loss,
            value_loss=value_loss if critic else None,
            grad_norm=norm,
            lr=lr,
            num_updates=i + 1,
            halvings=done.halvings + halvings,
        )
    return done


def _gradient(
    policy: Policy,
    optimizer: Optimizer,
    critic: Critic | None,
    batches: Sequence[Batch],
    config: LossConfig,
    temperature: float,
) -> tuple[list[tuple[PolicyLoss, float]], Sequence[Batch], int]:
    """This rank's part of the gradient: its passes, the batches they are of, and how often these
    were halved."""

    def attempt(parts: Sequence[Batch]) -> list[tuple[PolicyLoss, float]]:
        # one buffer for all micro-batches; a rank without any takes part in its sum
        head_grad = optimizer.grad_sum(policy.head_VD)
        with sparse_embedding(policy, wanted=head_grad is not None):
            return [_backward(policy, critic, p, config, temperature, head_grad) for p in parts]

    try:
        return replayed(
            attempt,
            batches,
            lambda: _zero_grad(optimizer, critic),
            whole_sequences=config.ratio == "sequence",
        )
    except ValueError as error:  # the loss head refuses hidden states that are not finite
        raise TrainingError(f"{error}; {ADVICE}") from error


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
    if critic is None:
        result.loss.backward()
        return result, 0.0
    value_loss = critic.loss(hidden_TD, batch)
    (result.loss + value_loss).backward()
    return result, float(value_loss.detach())


def _zero_grad(optimizer: Optimizer, critic: Critic | None) -> None:
    optimizer.zero_grad()
    if critic:
        critic.zero_grad()


def _first(results: Sequence[PolicyLoss], batches: Sequence[Batch]) -> Update:
    logprobs = torch.cat([result.logprobs for result in results])
    gap = (logprobs - torch.cat([batch.sampler_logprobs_N for batch in batches])).abs()
    return Update(
        logprob=float(logprobs.nanmean()),
        entropy=float(torch.cat([result.entropies for result in results]).nanmean()),
        logprob_gap=float(gap.nanmean().nan_to_num()),
        logprob_gap_max=float(gap.nan_to_num().max()),
        by_turn=by_turn("entropy", (result.entropies for result in results), batches)
        | by_turn(
            "kl_sampler",
            (
                drawn_kl(batch.sampler_logprobs_N, result.logprobs)
                for batch, result in zip(batches, results, strict=True)
            ),
            batches,
        ),
    )


def _last(before: Update, results: Sequence[PolicyLoss], batches: Sequence[Batch]) -> Update:
    moved = {}
    if before.num_updates:
        moved = by_turn(
            "kl_old",
            (
                drawn_kl(batch.old_logprobs_N, result.logprobs)
                for batch, result in zip(batches, results, strict=True)
                if batch.old_logprobs_N is not None
            ),
            batches,
        )
    trained = [float(result.stats.tokens) for result in results]
    clipped = [
        float(stats.clip_low + stats.clip_high + stats.clip_dual)
        for stats in (result.stats for result in results)
    ]
    kl = None
    if any(batch.ref_logprobs_N is not None for batch in batches):
        kls = [float(result.stats.ref_kl) for result in results]
        kl = sum(x * n for x, n in zip(kls, trained, strict=True)) / max(1.0, sum(trained))
    return replace(
        before,
        kl=kl,
        ratio_max=max(float(result.stats.ratio_max) for result in results),
        clip_fraction=sum(c * n for c, n in zip(clipped, trained, strict=True))
        / max(1.0, sum(trained)),
        by_turn={**before.by_turn, **moved},
    )
