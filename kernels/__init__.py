"""The kernels of turnfast: they know tensors, not trajectories."""

from .loss_head import (
    LinearLogprobs,
    PolicyLoss,
    PolicyRule,
    PolicyStats,
    linear_logprobs,
    turn_policy_loss,
)

__all__ = [
    "LinearLogprobs",
    "PolicyLoss",
    "PolicyRule",
    "PolicyStats",
    "linear_logprobs",
    "turn_policy_loss",
]
