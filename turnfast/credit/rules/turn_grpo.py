"""Turn-level GRPO on the return to go, with one scale per group and a floor from the batch."""

import math
from typing import Literal

from turnfast.config.schema import Share
from turnfast.credit.baseline import NORM, Norm, Rows, norm_within, padded_rewards
from turnfast.types import Group

CENTRED = Norm(std="none")


def spread(group: Group, *, outcome_weight: float = 1.0) -> float:
    """Standard deviation (n - 1) of the whole return sum_k r_{i,k} + lambda * o_i."""
    outcomes_G = [outcome_weight * t.outcome for t in group.trajectories]
    centred = CENTRED([row[0] for row in _returns_to_go(padded_rewards(group), outcomes_G)])
    return math.sqrt(math.fsum(c * c for c in centred) / max(1, len(centred) - 1))


def advantages(
    group: Group,
    batch_spread: float,
    *,
    outcome_weight: float = 1.0,
    scale: Literal["group", "batch", "turn", "none"] = "group",
    floor: Share = 0.3,
) -> Rows:
    """With the return to go G_{i,k} = sum_{m >= k} r_{i,m} + lambda * o_i of turn k:

        A_{i,k} = (G_{i,k} - mean_j G_{j,k}) / max(s_g, floor * s_B)

    The mean is over all rollouts of the group. One that ended before turn k has turn rewards of 0
    there, so an extra turn is worth exactly its reward. s_g is the group's `spread`, s_B its root
    mean square over the step's groups on all ranks. The floor bounds the advantages of a group
    whose outcomes are equal and whose turns differ by a small price. A missing reward is 0.

    scale="batch" divides by s_B, "none" by 1. "turn" divides each turn index's reward and the
    outcome by their own standard deviations: small turn rewards weigh as much as success.

    Example (scale "none"): a stops after r = (1,), b continues with r = (0, 1), equal outcomes.
    Both have the return 1: a gets (0,), and b gets (0, 0.5).
    """
    rewards_GK = padded_rewards(group)
    outcomes_G = [outcome_weight * t.outcome for t in group.trajectories]
    cells = [range(len(row)) for row in rewards_GK]
    if scale == "turn":
        rewards_GK = norm_within(rewards_GK, cells, NORM)
        outcomes_G = [outcome_weight * a for a in NORM([t.outcome for t in group.trajectories])]
    own = spread(group, outcome_weight=outcome_weight) if scale == "group" else 0.0
    bound = {"group": floor * batch_spread, "batch": batch_spread}.get(scale, 1.0)
    rows = norm_within([r[:-1] for r in _returns_to_go(rewards_GK, outcomes_G)], cells, CENTRED)
    pairs = zip(rows, group.trajectories, strict=True)
    return [[x / (max(own, bound) or 1.0) for x in row[: len(t.turns)]] for row, t in pairs]


def _returns_to_go(rewards_GK: Rows, outcomes_G: list[float]) -> Rows:
    """[G, K + 1]; the last column is the outcome alone."""
    pairs = zip(rewards_GK, outcomes_G, strict=True)
    return [[math.fsum([*r[k:], o]) for k in range(len(r) + 1)] for r, o in pairs]
