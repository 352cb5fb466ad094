"""The policy loss of complete ratio segments and its derivatives by log-prob and entropy.

r_n   = logprob_n - old_n                       (0 without old log-probs: on policy)
ratio = exp(r_n), or exp(mean of r over the segment's tokens) at turn and sequence level
PPO   = -min(ratio A, clip(ratio, 1 - low, 1 + high) A), for A < 0 at most -c A (dual clip)
CISPO = -sg(min(ratio, 1 + high)) A logprob
loss  = sum_n w_n (min(pi_old / pi_sampler, C) policy_n + kl_coef k3_n - entropy_coef H_n)
k3    = exp(ref - logprob) - (ref - logprob) - 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..segments.reference import segment_sum
from .records import PolicyRule

# Terms.sums: this many sums over tokens, then the extremes of the ratio.
NUM_SUMS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The per-token inputs of the policy loss for C tokens in S complete segments, in order.

    segment_C: segment of each token, from 0. lengths_S: tokens per segment. Both are None at token
    level.
    """

    advantages_C: Tensor
    weights_C: Tensor
    old_C: Tensor | None
    ref_C: Tensor | None
    sampler_C: Tensor | None
    segment_C: Tensor | None
    lengths_S: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The loss of C tokens, 0-d, with its derivatives and statistics.

    d_entropy_C: None where the rule has no entropy term.
    sums: clip_low, clip_high, clip_dual, kl, ref_kl, entropy; then ratio_min and ratio_max.
    """

    loss: Tensor
    d_logprob_C: Tensor
    d_entropy_C: Tensor | None
    sums: Tensor


def policy_terms(rule: PolicyRule, t: Tokens, logprobs_C: Tensor, entropies_C: Tensor) -> Terms:
    """Compute loss and derivatives in torch, without autograd, on any device."""
    old_C = logprobs_C if t.old_C is None else t.old_C
    log_ratio_C = logprobs_C - old_C
    ratio_C = _segment_mean(log_ratio_C, t).exp()
    A_C = t.advantages_C
    scale_C = t.weights_C
    if rule.is_cap is not None:
        assert t.sampler_C is not None
        scale_C = scale_C * (old_C - t.sampler_C).exp().clamp(max=rule.is_cap)
    high_C = ratio_C > 1 + rule.clip_high
    none_C = torch.zeros_like(high_C)
    if rule.kind == "ppo":
        low_C = (ratio_C < 1 - rule.clip_low) & (A_C < 0)
        high_C = high_C & (A_C > 0)
        dual_C = none_C
        if rule.dual_clip is not None:
            dual_C = (ratio_C > rule.dual_clip) & (A_C < 0)
        bounded_C = torch.where(high_C, 1 + rule.clip_high, ratio_C)
        bounded_C = torch.where(low_C, 1 - rule.clip_low, bounded_C)
        bounded_C = torch.where(dual_C, rule.dual_clip or 0.0, bounded_C)
        policy_C = -bounded_C * A_C
        clipped_C = high_C | low_C | dual_C
        d_logprob_C = _segment_mean(torch.where(clipped_C, 0.0, policy_C) * scale_C, t)
    else:
        low_C = dual_C = none_C
        coef_C = -ratio_C.clamp(max=1 + rule.clip_high) * A_C
        policy_C = coef_C * logprobs_C
        d_logprob_C = coef_C * scale_C
    loss = (policy_C * scale_C).sum()
    ref_kl = torch.zeros_like(loss)
    if t.ref_C is not None:
        gap_C = t.ref_C - logprobs_C
        k3_C = gap_C.expm1() - gap_C
        ref_kl = k3_C.sum()
        if rule.kl_coef:
            loss = loss + rule.kl_coef * (t.weights_C * k3_C).sum()
            d_logprob_C = d_logprob_C - rule.kl_coef * t.weights_C * gap_C.expm1()
    d_entropy_C = None
    if rule.entropy_coef:
        loss = loss - rule.entropy_coef * (t.weights_C * entropies_C).sum()
        d_entropy_C = -rule.entropy_coef * t.weights_C
    kl_C = (-log_ratio_C).expm1() + log_ratio_C
    sums = [low_C.sum(), high_C.sum(), dual_C.sum(), kl_C.sum(), ref_kl, entropies_C.sum()]
    sums += [ratio_C.min(), ratio_C.max()]
    return Terms(
        loss=loss,
        d_logprob_C=d_logprob_C,
        d_entropy_C=d_entropy_C,
        sums=torch.stack([x.double() for x in sums]),
    )


def _segment_mean(values_C: Tensor, t: Tokens) -> Tensor:
    """Return the mean over each token's segment; the values themselves at token level."""
    if t.segment_C is None:
        return values_C
    assert t.lengths_S is not None
    sums_S = segment_sum(values_C, t.segment_C, t.lengths_S.shape[0])
    return (sums_S / t.lengths_S)[t.segment_C]


def no_sums(device: torch.device) -> Tensor:
    """Return the neutral element of add_sums."""
    sums = torch.zeros(NUM_SUMS + 2, dtype=torch.float64, device=device)
    sums[NUM_SUMS] = torch.inf
    sums[NUM_SUMS + 1] = -torch.inf
    return sums


def add_sums(a: Tensor, b: Tensor) -> Tensor:
    n = NUM_SUMS
    return torch.cat(
        [
            a[:n] + b[:n],
            torch.minimum(a[n : n + 1], b[n : n + 1]),
            torch.maximum(a[n + 1 :], b[n + 1 :]),
        ]
    )


def stats_vector(sums: Tensor, tokens: int, masked: Tensor, skipped: Tensor) -> Tensor:
    """Return the statistics in the order of PolicyStats.

    Without a trained token means are 0 and ratios 1.
    """
    head = torch.stack([torch.full_like(masked, tokens), masked, skipped]).double()
    means, extremes = sums[:NUM_SUMS] / max(tokens, 1), sums[NUM_SUMS:]
    if tokens == 0:
        extremes = torch.ones_like(extremes)
    return torch.cat([head, means[: NUM_SUMS - 1], extremes, means[NUM_SUMS - 1 :]])
