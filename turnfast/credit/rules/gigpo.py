"""Group in group: whole episodes compared, plus turns taken from the same state (GiGPO)."""

from collections.abc import Hashable
from typing import Literal

from turnfast.config.schema import Share
from turnfast.credit.baseline import (
    NORM,
    Norm,
    Rows,
    episode_returns,
    norm_within,
    returns_to_go,
)
from turnfast.types import Group, Trajectory


def advantages(
    group: Group,
    *,
    step_weight: float = 1.0,
    gamma: Share = 0.95,
    anchor: Literal["observation", "history"] = "observation",
    norm: Norm = NORM,
) -> Rows:
    """A_{i,k} = norm(R)_i + omega * norm_{s(i,k)}(R_{i,k}), omega = `step_weight`
    (arXiv 2505.10978).

    R_i is the whole undiscounted return, R_{i,k} the discounted return to go, and the second norm
    is over all turns of the group, of any rollout and index, that share the anchor state s. A state
    met once adds nothing.

    anchor="observation": what the environment said last, i.e. the previous turn's reply, the task's
    prompt at turn 0: for worlds in which it tells the state (games, web pages).
    anchor="history": all it has said so far, where the last reply alone does not.

    Example (std "biased", epsilon 0, gamma 1): a and b get the same first reply and end with
    o = 1 and 0. Turn 0 and turn 1 are both shared: a has (1 + 1, 1 + 1), b (-2, -2). With
    different replies turn 1 is met once: a has (2, 1), b (-2, -1).
    """
    states = [[_state(t, k, anchor) for k in range(len(t.turns))] for t in group.trajectories]
    step = norm_within(returns_to_go(group, gamma), states, norm)
    pairs = zip(step, norm(episode_returns(group)), strict=True)
    return [[episode + step_weight * a for a in row] for row, episode in pairs]


def _state(trajectory: Trajectory, k: int, anchor: str) -> Hashable:
    # replies, not prompt_ids: a restarted turn's prompt repeats the whole context
    if k == 0:
        return trajectory.turns[0].prompt_ids
    seen = trajectory.turns[:k] if anchor == "history" else trajectory.turns[k - 1 : k]
    return tuple(turn.reply for turn in seen)
