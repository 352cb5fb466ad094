"""Discounted return to go, normalised per turn index or per group."""

from typing import Literal

from turnfast.config.schema import Share
from turnfast.credit.baseline import (
    NORM,
    Norm,
    Rows,
    norm_within,
    on_every_turn,
    returns_to_go,
    turn_indices,
)
from turnfast.types import Group


def advantages(
    group: Group,
    *,
    gamma: Share = 1.0,
    over: Literal["turn", "group"] = "turn",
    norm: Norm = NORM,
) -> Rows:
    """A_{i,k} = norm(R)_{i,k}, R_{i,k} = sum_{m >= k} gamma^(m-k) r_{i,m}, outcome with the last.

    over="turn" normalises over the rollouts of the group that reached turn k (GTPO, arXiv
    2511.14846), over="group" over all turns of the group. One baseline is subtracted from the
    whole return to go, so an extra turn has no hidden cost as in `mt_grpo`. over="group" compares
    early turns with late ones, whose returns are smaller: equal rewards do not give zeros.

    Example (std "none", gamma 0.5, over="turn"): r = (1, 0), o = 2 and r = (0,), o = 1 have the
    returns (1 + 0.5 * 2, 2) = (2, 2) and (1,): advantages (0.5, 0) and (-0.5,).
    """
    everywhere = on_every_turn([0] * len(group.trajectories), group)
    cells = turn_indices(group) if over == "turn" else everywhere
    return norm_within(returns_to_go(group, gamma), cells, norm)
