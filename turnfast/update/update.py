"""One optimizer step, or several, on one step's packed rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config.schema import LossConfig
from ..errors import ConfigError, OutOfMemory, RankError, TrainingError
from ..kernels.loss_head.backends import implementation
from ..model import Policy
from ..parallel.ranks import ALONE, Ranks
from ..types import Batch
from .budget import Budget
from .by_turn import by_turn, drawn_kl
from .critic import Critic
from .gradient import ADVICE, Gradient, clear, compute_gradient
from .optimizer import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update did; without arguments, one that had nothing to learn from.

    Loss, value loss and log-prob gaps are those of all ranks, other figures the rank's own.

    Attributes:
        logprob, entropy: means over the tokens computed, before the first optimizer step.
        logprob_gap, logprob_gap_max: mean and largest |sampler - trainer| of their log-probs.
        ratio_max, clip_fraction, loss, grad_norm, lr: of the last optimizer step.
        kl: mean KL(policy || reference) of the last one, None without a reference.
        value_loss: the critic's, None without one.
        num_updates: optimizer steps. halvings: of the token budget, in this step of the run.
        logprobs_reused: 1 if the sampler's log-probs were the old ones, 0 if they were to be and
            differed too much; None where the trainer's are asked for.
        by_turn: for every turn index, entropy and KL(sampler || trainer) before the first optimizer
            step and, if there are several, KL(old || new) before the last.
    """

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
    logprobs_reused: int | None = None
    by_turn: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One optimizer step: the gradient, and over all ranks what it was of."""

    gradient: Gradient
    loss: float
    value_loss: float
    grad_norm: float
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """|sampler - trainer| of the log-probs of all ranks' tokens."""

    mean: float
    largest: float


def check_impl(config: LossConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a `loss.impl` that is not available for the policy's device and dtype.

    Raises:
        ConfigError: with the reason.
    """
    try:
        implementation(config.impl, device, dtype)
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
    budget: Budget | None = None,
    check: Callable[[Gap], None] = lambda gap: None,
    ranks: Ranks = ALONE,
) -> Update:
    """Take `num_updates` optimizer steps on the same batches.

    The old log-probs of the ratio are those of the trainer or of the sampler. The trainer's cost no
    pass of their own: the first step is on policy, its ratio is 1, and the log-probs that it
    computes are the old ones of the steps after it. The sampler's (`old_logprobs = "sampler"`) are
    the old ones from the first step on, so that the ratio also covers what engine and trainer
    differ by. If that is more than `max_logprob_gap` on average, the first gradient is dropped and
    computed again with the trainer's.

    With a critic each step also updates that. Where memory runs out, the batches are cut in halves
    and the same step is computed again: see `Budget`. All ranks call this at the same time, some
    perhaps without batches.

    Args:
        check: is told the gap before anything is learned, and may raise.
    Raises:
        TrainingError: loss or gradient is not finite; that optimizer step has changed nothing.
        OutOfMemory: not even with smaller micro-batches; that one has changed nothing.
        TornStep: see `Optimizer.step`.
    """
    policy.model.train()  # whoever sampled with it has left it in eval mode
    if not ranks.any(bool(batches)):
        return Update()
    budget = budget or Budget()

    def gradient_of(batches: Sequence[Batch]) -> Gradient:
        try:
            with ranks.together():
                return compute_gradient(
                    policy,
                    optimizer,
                    critic,
                    batches,
                    config,
                    temperature=temperature,
                    budget=budget,
                )
        except (TrainingError, OutOfMemory, RankError):
            clear(optimizer, critic)  # another rank's failure leaves this one's gradient
            raise

    wanted = config.old_logprobs == "sampler"
    first = gradient_of(_with_sampler_logprobs(batches) if wanted else batches)
    gap = _logprob_gap(first, ranks)
    try:
        check(gap)
    except Exception:
        clear(optimizer, critic)
        raise
    reused = wanted and gap.mean <= config.max_logprob_gap
    if wanted and not reused:
        clear(optimizer, critic)
        first = gradient_of(batches)
    batches = first.batches if reused else _with_own_logprobs(first)
    steps = [_step(first, optimizer, critic, ranks)]
    while len(steps) < num_updates:
        gradient = gradient_of(batches)
        batches = gradient.batches
        steps.append(_step(gradient, optimizer, critic, ranks))
    last = steps[-1]
    return Update(
        loss=last.loss,
        value_loss=last.value_loss if critic else None,
        grad_norm=last.grad_norm,
        lr=last.lr,
        num_updates=len(steps),
        halvings=budget.halvings,
        logprob=_mean(result.logprobs for result in first.results),
        entropy=_mean(result.entropies for result in first.results),
        logprob_gap=gap.mean,
        logprob_gap_max=gap.largest,
        logprobs_reused=int(reused) if wanted else None,
        ratio_max=max((float(r.stats.ratio_max) for r in last.gradient.results), default=1.0),
        clip_fraction=_clip_fraction(last.gradient),
        kl=_reference_kl(last.gradient),
        by_turn=_by_turn(steps),
    )


def _step(gradient: Gradient, optimizer: Optimizer, critic: Critic | None, ranks: Ranks) -> _Step:
    loss, value_loss = ranks.sum([gradient.loss, gradient.value_loss])
    lr = optimizer.lr
    finite = math.isfinite(loss + value_loss)
    norm = optimizer.step() if finite else math.nan
    if not math.isfinite(norm):
        clear(optimizer, critic)
        raise TrainingError(f"loss {loss}, gradient norm {norm}; {ADVICE}")
    if critic:
        critic.step()
    return _Step(gradient=gradient, loss=loss, value_loss=value_loss, grad_norm=norm, lr=lr)


def _with_sampler_logprobs(batches: Sequence[Batch]) -> list[Batch]:
    return [replace(batch, old_logprobs_N=batch.sampler_logprobs_N) for batch in batches]


def _with_own_logprobs(first: Gradient) -> list[Batch]:
    # tokens without advantage are not computed; they stay without it in every step
    return [
        replace(batch, old_logprobs_N=result.logprobs.nan_to_num(nan=0.0))
        for batch, result in zip(first.batches, first.results, strict=True)
    ]


def _logprob_gap(gradient: Gradient, ranks: Ranks) -> Gap:
    gaps = [
        (result.logprobs - batch.sampler_logprobs_N).abs()[~result.logprobs.isnan()]
        for batch, result in zip(gradient.batches, gradient.results, strict=True)
    ]
    known = torch.cat(gaps) if gaps else torch.zeros(0)
    largest = float(known.max()) if len(known) else 0.0
    found = ranks.gather([float(known.double().sum()), len(known), largest])
    totals, counts, extremes = zip(*found, strict=True)
    return Gap(mean=sum(totals) / max(1, sum(counts)), largest=max(extremes))


def _mean(values: Iterable[Tensor]) -> float:
    """Of all that were computed; 0 where none was."""
    parts = list(values)
    return float(torch.cat(parts).nanmean().nan_to_num()) if parts else 0.0


def _clip_fraction(gradient: Gradient) -> float:
    stats = [result.stats for result in gradient.results]
    clipped = [float(s.clip_low + s.clip_high + s.clip_dual) for s in stats]
    return _over_trained(clipped, gradient)


def _reference_kl(gradient: Gradient) -> float | None:
    if all(batch.ref_logprobs_N is None for batch in gradient.batches):
        return None
    return _over_trained([float(r.stats.ref_kl) for r in gradient.results], gradient)


def _over_trained(figures: Sequence[float], gradient: Gradient) -> float:
    """The mean of micro-batches' figures, by their trained tokens."""
    trained = [float(result.stats.tokens) for result in gradient.results]
    total = sum(x * n for x, n in zip(figures, trained, strict=True))
    return total / max(1.0, sum(trained))


def _by_turn(steps: Sequence[_Step]) -> dict[str, float]:
    first, last = steps[0].gradient, steps[-1].gradient
    drawn = [batch.sampler_logprobs_N for batch in first.batches]
    figures = by_turn("entropy", (r.entropies for r in first.results), first.batches)
    figures |= by_turn("kl_sampler", _drawn_kl(drawn, first), first.batches)
    if len(steps) > 1:
        old = [b.old_logprobs_N for b in last.batches if b.old_logprobs_N is not None]
        figures |= by_turn("kl_old", _drawn_kl(old, last), last.batches)
    return figures


def _drawn_kl(drawn: Sequence[Tensor], gradient: Gradient) -> list[Tensor]:
    pairs = zip(drawn, gradient.results, strict=True)
    return [drawn_kl(drawn_N, result.logprobs) for drawn_N, result in pairs]
