"""The public records of the loss head: the rule, the statistics and the results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Ratio = Literal["token", "turn", "sequence"]
Kind = Literal["ppo", "cispo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRule:
    """The policy loss to compute. Raises ValueError naming the field.

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (2503.14476).
    ratio: "token"; "turn", the geometric mean over the trained tokens of a turn; "sequence", the
        same over all turns of a sequence in one call (GSPO, 2507.18071).
    kind: "ppo"; "cispo" (2506.13585), -sg(min(ratio, 1 + clip_high)) * A * logprob, which has no
        lower clip and ignores clip_low.
    dual_clip: upper bound c > 1 of loss / |A| for negative advantages (1912.09729), PPO only.
    kl_coef: weight of the k3 estimate of KL(policy || reference); requires ref_logprobs.
    entropy_coef: weight of the entropy bonus.
    is_cap: cap C of the importance weight min(pi_old / pi_sampler, C); requires sampler_logprobs.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Ratio = "token"
    kind: Kind = "ppo"
    dual_clip: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    is_cap: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.clip_low <= 1.0:
            raise ValueError(f"clip_low: expected a number in [0, 1], got {self.clip_low}")
        if not (self.clip_high >= 0.0 and math.isfinite(self.clip_high)):
            raise ValueError(f"clip_high: expected a finite number >= 0, got {self.clip_high}")
        if self.ratio not in ("token", "turn", "sequence"):
            raise ValueError(f"ratio: expected 'token', 'turn' or 'sequence', got {self.ratio!r}")
        if self.kind not in ("ppo", "cispo"):
            raise ValueError(f"kind: expected 'ppo' or 'cispo', got {self.kind!r}")
        if self.dual_clip is not None:
            if not (self.dual_clip > 1.0 and math.isfinite(self.dual_clip)):
                raise ValueError(f"dual_clip: expected a finite number > 1, got {self.dual_clip}")
            if self.kind != "ppo":
                raise ValueError("dual_clip: only defined for kind='ppo'")
        if not (self.kl_coef >= 0.0 and math.isfinite(self.kl_coef)):
            raise ValueError(f"kl_coef: expected a finite number >= 0, got {self.kl_coef}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef: expected a finite number, got {self.entropy_coef}")
        if self.is_cap is not None and not (self.is_cap > 0.0 and math.isfinite(self.is_cap)):
            raise ValueError(f"is_cap: expected a finite number > 0, got {self.is_cap}")


@dataclass(frozen=True)
class PolicyStats:
    """Statistics over the trained tokens of one call, 0-d float64 tensors on the device of hidden.

    tokens: trained tokens.
    masked: tokens of weight 0.
    skipped: tokens of other weights in a ratio segment whose advantages are all 0, which cannot
        change the loss; tokens + masked + skipped = N.
    clip_low, clip_high, clip_dual: fractions of the trained tokens whose gradient a clip removed
        or, for CISPO, bounded.
    kl: mean k3 estimate of KL(policy || old). ref_kl: of KL(policy || reference), 0 without one.
    ratio_min, ratio_max: extremes of the ratio at the level of the rule.
    entropy: mean, in nats.
    Weight means by `tokens` to combine micro-batches.
    """

    tokens: Tensor
    masked: Tensor
    skipped: Tensor
    clip_low: Tensor
    clip_high: Tensor
    clip_dual: Tensor
    kl: Tensor
    ref_kl: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The result of turn_policy_loss; only `loss` has a gradient.

    loss: 0-d. logprobs, entropies: [N], NaN for masked and skipped tokens, which are not computed.
    turn_logprobs: [K], sums over the trained tokens of each turn, 0 for a turn without any.
    All float32, or float64 for float64 input.
    """

    loss: Tensor
    logprobs: Tensor
    entropies: Tensor
    turn_logprobs: Tensor
    stats: PolicyStats


@dataclass(frozen=True)
class LinearLogprobs:
    """The result of linear_logprobs: log-probs and entropies, [N] float32, without gradient."""

    logprobs: Tensor
    entropies: Tensor
