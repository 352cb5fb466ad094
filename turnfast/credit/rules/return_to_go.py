"""Discounted return to go, normalised per turn index, per group or per batch."""

from collections.abc import Sequence
from typing import Literal

from turnfast.config.schema import Share
from turnfast.credit.baseline import NORM, Norm, Rows, norm_within, returns_to_go
from turnfast.types import Group


def advantages(
    groups: Sequence[Group],
    *,
    gamma: Share = 1.0,
    over: Literal["turn", "group", "batch"] = "turn",
    norm: Norm = NORM,
) -> list[Rows]:
    """A_{i,k} = norm(R)_{i,k}, R_{i,k} = sum_{m >= k} gamma^(m-k) r_{i,m}, outcome with the last.

    over="turn": among the rollouts of the group that reached turn k (GTPO, arXiv 2511.14846);
    "group": among all turns of the group; "batch": among all turns of the batch (return batch
    normalisation, arXiv 2510.01051). One baseline is subtracted from one return, however long the
    rest of the rollout, so there is no hidden price of a turn as in `mt_grpo`. Pooled turns
    ("group", "batch") compare early turns with late ones, which have less ahead of them: equal
    rewards are then no reason for zeros.

    Example (std "none", gamma 0.5, over="turn"): r = (1, 0), o = 2 and r = (0,), o = 1 have the
    returns (1 + 0.5 * 2, 2) = (2, 2) and (1,): advantages (0.5, 0) and (-0.5,).
    """
    returns = [row for group in groups for row in returns_to_go(group, gamma)]
    homes = [g for g, group in enumerate(groups) for _ in group.trajectories]
    cells = {
        "turn": lambda g, k: (g, k),
        "group": lambda g, k: g,
        "batch": lambda g, k: None,
    }[over]
    labels = [[cells(g, k) for k in range(len(r))] for g, r in zip(homes, returns, strict=True)]
    rows = iter(norm_within(returns, labels, norm))
    return [[next(rows) for _ in group.trajectories] for group in groups]
