"""One or more optimizer steps on the packed rollouts of one training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config.schema import LossConfig
from ..errors import ConfigError, OutOfMemory, TrainingError
from ..kernels.loss_head.backends import implementation
from ..metrics.reduce import Max, Mean, Metric
from ..parallel.ranks import Ranks
from ..types import Batch
from .by_turn import by_turn, drawn_kl
from .gradient import ADVICE, Gradient, compute_gradient
from .learner import Learner
from .memory import explain_out_of_memory

NO_TOKENS = Mean(0.0, 0, if_empty=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Results of an update; the defaults are those of an update without batches.

    Losses, log-prob gaps, gradient norm and learning rate are those of all ranks, the other values
    those of this rank.

    Attributes:
        logprob, entropy: means over the computed tokens, before the first optimizer step.
        logprob_gap, logprob_gap_max: mean and largest |sampler - trainer| of the log-probs.
        ratio_max, clip_fraction, loss, grad_norm, lr: of the last optimizer step.
        kl: mean KL(policy || reference) of the last optimizer step; None without a reference.
        value_loss: the critic's loss in the last optimizer step; None without a critic.
        num_updates: number of optimizer steps.
        by_turn: per turn index, entropy and KL(sampler || trainer) before the first optimizer step
            and, after several steps, KL(old || new) before the last one.
    """

    loss: float = 0.0
    logprob: Mean = NO_TOKENS
    entropy: Mean = NO_TOKENS
    logprob_gap: float = 0.0
    logprob_gap_max: float = 0.0
    ratio_max: float = 1.0
    clip_fraction: Mean = NO_TOKENS
    grad_norm: float = 0.0
    lr: float = 0.0
    num_updates: int = 0
    kl: Mean | None = None
    value_loss: float | None = None
    by_turn: Mapping[str, Mean] = field(default_factory=dict)

    def metrics(self) -> dict[str, Metric]:
        """The metrics of the update, under the names of metrics.jsonl."""
        optional = {
            "kl": self.kl,
            "value_loss": None if self.value_loss is None else Max(self.value_loss),
        }
        return {
            "loss": Max(self.loss),
            "logprob": self.logprob,
            "entropy": self.entropy,
            "grad_norm": Max(self.grad_norm),
            "ratio/max": Max(self.ratio_max),
            "clip_fraction": self.clip_fraction,
            **self.by_turn,
            **{name: metric for name, metric in optional.items() if metric is not None},
            "logprob_gap": Max(self.logprob_gap),
            "logprob_gap/max": Max(self.logprob_gap_max),
            "lr": Max(self.lr),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One optimizer step; `loss` and `value_loss` are sums over all ranks."""

    gradient: Gradient
    loss: float
    value_loss: float
    grad_norm: float
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """|sampler - trainer| of the log-probs, over the tokens of all ranks."""

    mean: float
    largest: float


def check_impl(config: LossConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Check that `loss.impl` is available for the policy's device and dtype.

    Raises:
        ConfigError: it is not; the text says why.
    """
    try:
        implementation(config.impl, device, dtype)
    except ValueError as error:
        raise ConfigError(f"loss.{error}; 'auto' selects an available one") from None


def needs_every_token(config: LossConfig) -> bool:
    """Whether a token without advantage can change the gradient."""
    return config.entropy_coef != 0.0 or config.kl_coef != 0.0 or config.ratio == "sequence"


def update(
    learner: Learner,
    batches: Sequence[Batch],
    config: LossConfig,
    *,
    temperature: float = 1.0,
    num_updates: int = 1,
    check_gap: Callable[[Gap], None] = lambda gap: None,
    memory_advice: str = "out of memory in a micro-batch: use smaller ones",
) -> Update:
    """Take `num_updates` optimizer steps on the same batches.

    With `old_logprobs = "trainer"` the first step has a ratio of 1, and the log-probs that it
    computes are the old log-probs of the following steps. With `"sampler"` the sampler's log-probs
    are the old ones in every step, so that the ratio also corrects the difference between engine
    and trainer.

    All ranks must call this function at the same time; a rank may have no batches.

    Args:
        check_gap: called with the log-prob gap before the first optimizer step; may raise.
        memory_advice: text of the OutOfMemory error.

    Raises:
        TrainingError: the loss or gradient is not finite, or the log-prob gap is larger than
            `max_logprob_gap` with `old_logprobs = "sampler"`. This optimizer step changed nothing.
        OutOfMemory: this optimizer step changed nothing.
        TornStep: memory ran out after some weights had changed.
    """
    ranks = learner.optimizer.ranks
    learner.policy.model.train()  # the local sampler leaves the model in eval mode
    if not ranks.any(bool(batches)):
        return Update()
    reuse = config.old_logprobs == "sampler"
    if reuse:
        batches = [replace(batch, old_logprobs_N=batch.sampler_logprobs_N) for batch in batches]

    def gradient_of(batches: Sequence[Batch]) -> Gradient:
        with ranks.share_errors(), explain_out_of_memory(OutOfMemory, memory_advice):
            return compute_gradient(learner, batches, config, temperature=temperature)

    try:
        first = gradient_of(batches)
        gap = _logprob_gap(first, ranks)
        check_gap(gap)
        if reuse:
            _check_reuse(gap, config)
        else:
            batches = _with_own_logprobs(first)
        steps = [_step(first, learner)]
        while len(steps) < num_updates:
            steps.append(_step(gradient_of(batches), learner))
    except Exception:
        learner.zero_grad()  # also where another rank failed
        raise
    last = steps[-1]
    return Update(
        loss=last.loss,
        value_loss=last.value_loss if learner.critic else None,
        grad_norm=last.grad_norm,
        lr=last.lr,
        num_updates=len(steps),
        logprob=_mean(result.logprobs for result in first.results),
        entropy=_mean(result.entropies for result in first.results),
        logprob_gap=gap.mean,
        logprob_gap_max=gap.largest,
        ratio_max=max((float(r.stats.ratio_max) for r in last.gradient.results), default=1.0),
        clip_fraction=_clip_fraction(last.gradient),
        kl=_reference_kl(last.gradient),
        by_turn=_by_turn(steps),
    )


def _step(gradient: Gradient, learner: Learner) -> _Step:
    optimizer, critic = learner.optimizer, learner.critic
    loss, value_loss = optimizer.ranks.sum([gradient.loss, gradient.value_loss])
    lr = optimizer.lr
    norm = optimizer.step() if math.isfinite(loss + value_loss) else math.nan
    if not math.isfinite(norm):
        raise TrainingError(f"loss {loss}, gradient norm {norm}; {ADVICE}")
    if critic:
        critic.step()
    return _Step(gradient=gradient, loss=loss, value_loss=value_loss, grad_norm=norm, lr=lr)


def _check_reuse(gap: Gap, config: LossConfig) -> None:
    if gap.mean > config.max_logprob_gap:
        raise TrainingError(
            f"loss.max_logprob_gap: the sampler's log-probs differ from the trainer's by "
            f"{gap.mean:.3g} on average, more than {config.max_logprob_gap:g}; set "
            "loss.old_logprobs = 'trainer', or raise loss.max_logprob_gap"
        )


def _with_own_logprobs(first: Gradient) -> list[Batch]:
    # tokens without advantage are not computed and are NaN; no step computes them
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
    gathered = ranks.all_gather([float(known.double().sum()), len(known), largest])
    totals, counts, extremes = zip(*gathered, strict=True)
    return Gap(mean=sum(totals) / max(1, sum(counts)), largest=max(extremes))


def _mean(values: Iterable[Tensor]) -> Mean:
    """The mean over the computed tokens; those that were not computed are NaN."""
    parts = list(values)
    if not parts:
        return NO_TOKENS
    values_N = torch.cat(parts)
    count = int(values_N.isnan().logical_not().sum())
    return replace(NO_TOKENS, sum=float(values_N.double().nansum()), count=count)


def _clip_fraction(gradient: Gradient) -> Mean:
    stats = [result.stats for result in gradient.results]
    clipped = [float(s.clip_low + s.clip_high + s.clip_dual) for s in stats]
    return _over_trained(clipped, gradient)


def _reference_kl(gradient: Gradient) -> Mean | None:
    if all(batch.ref_logprobs_N is None for batch in gradient.batches):
        return None
    return _over_trained([float(r.stats.ref_kl) for r in gradient.results], gradient)


def _over_trained(means: Sequence[float], gradient: Gradient) -> Mean:
    """The mean over all trained tokens, from the means of the micro-batches."""
    trained = [float(result.stats.tokens) for result in gradient.results]
    total = sum(x * n for x, n in zip(means, trained, strict=True))
    return replace(NO_TOKENS, sum=total, count=sum(trained))


def _by_turn(steps: Sequence[_Step]) -> dict[str, Mean]:
    first, last = steps[0].gradient, steps[-1].gradient
    drawn = [batch.sampler_logprobs_N for batch in first.batches]
    metrics = by_turn("entropy", (r.entropies for r in first.results), first.batches)
    metrics |= by_turn("kl_sampler", _drawn_kl(drawn, first), first.batches)
    if len(steps) > 1:
        old = [b.old_logprobs_N for b in last.batches if b.old_logprobs_N is not None]
        metrics |= by_turn("kl_old", _drawn_kl(old, last), last.batches)
    return metrics


def _drawn_kl(drawn: Sequence[Tensor], gradient: Gradient) -> list[Tensor]:
    pairs = zip(drawn, gradient.results, strict=True)
    return [drawn_kl(drawn_N, result.logprobs) for drawn_N, result in pairs]
