"""Turn-level GRPO on the return to go, with one scale per group: the recommended rule."""

import math
from typing import Literal

from turnfast.config.schema import Share
from turnfast.credit.baseline import NORM, Norm, Rows, norm_within
from turnfast.types import Group

CENTRED = Norm(std="none")

Scale = Literal["group", "batch", "turn", "none"]


def spread(group: Group, *, outcome_weight: float = 1.0) -> float:
    """Standard deviation (n - 1) of the whole return sum_k r_{i,k} + lambda * o_i of a group."""
    returns = [
        math.fsum([turn.reward or 0.0 for turn in t.turns] + [outcome_weight * t.outcome])
        for t in group.trajectories
    ]
    centred = CENTRED(returns)
    return math.sqrt(math.fsum(c * c for c in centred) / max(1, len(centred) - 1))


def advantages(
    group: Group,
    batch_spread: float,
    *,
    outcome_weight: float = 1.0,
    scale: Scale = "group",
    floor: Share = 0.3,
) -> Rows:
    """With G_{i,k} = sum_{m >= k} r_{i,m} + lambda * o_i, the return to go of turn k:

        A_{i,k} = (G_{i,k} - mean_j G_{j,k}) / max(s_g, floor * s_B)

    The mean is over all rollouts j of the group. A rollout that ended before turn k stays in it
    with turn rewards of 0 and its outcome, so an extra turn is worth exactly its reward (`mt_grpo`
    compares only the rollouts that continue). s_g is the group's `spread`, and s_B its root mean
    square over all groups of the step, on all ranks: `batch_spread`. The floor bounds the
    advantages of a group whose outcomes are equal and whose turns differ by a small price.

    scale="batch" divides by s_B, scale="none" by 1. scale="turn" divides the reward of each turn
    index and the outcome by their own standard deviations, so that small turn rewards get the same
    weight as success.

    A missing turn reward (None) is 0, and lambda is `outcome_weight`.

    Example (scale "none"): a stops after r = (1,), b continues with r = (0, 1), equal outcomes.
    Both have the return 1: a gets (0,), and b gets (0, 0.5).
    """
    longest = max((len(t.turns) for t in group.trajectories), default=0)
    rewards_GK = [
        [turn.reward or 0.0 for turn in t.turns] + [0.0] * (longest - len(t.turns))
        for t in group.trajectories
    ]
    outcomes_G = [outcome_weight * t.outcome for t in group.trajectories]
    if scale == "turn":
        rewards_GK = norm_within(rewards_GK, [range(longest)] * len(rewards_GK), NORM)
        outcomes_G = [outcome_weight * a for a in NORM([t.outcome for t in group.trajectories])]
    divisor = 1.0
    if scale in ("group", "batch"):
        own = spread(group, outcome_weight=outcome_weight) if scale == "group" else 0.0
        bound = floor if scale == "group" else 1.0
        divisor = max(own, bound * batch_spread) or 1.0
    to_go_GK = [
        [math.fsum([*rewards[k:], outcome]) for k in range(longest)]
        for rewards, outcome in zip(rewards_GK, outcomes_G, strict=True)
    ]
    centred_GK = norm_within(to_go_GK, [range(longest)] * len(to_go_GK), CENTRED)
    return [
        [centred / divisor for centred in row[: len(t.turns)]]
        for row, t in zip(centred_GK, group.trajectories, strict=True)
    ]
