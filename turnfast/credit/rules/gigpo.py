"""Group in group (GiGPO): compare whole episodes, and turns that start from the same state."""

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

    R_i is the whole undiscounted return, R_{i,k} the discounted return to go. The second norm is
    over all turns of the group, of any rollout and index, that share the anchor state s. A state
    that occurs once adds 0.

    anchor="observation": the state is the reply to the previous turn, or the task's prompt at turn
    0. Use it where a reply describes the whole state (games, web pages).
    anchor="history": the state is the sequence of all replies so far.

    Example (std "biased", epsilon 0, gamma 1): a and b get the same first reply and end with
    o = 1 and 0. Both turns start from a shared state: a has (1 + 1, 1 + 1), b (-2, -2). With
    different replies the states of turn 1 occur once: a has (2, 1), b (-2, -1).
    """
    states = [[_state(t, k, anchor) for k in range(len(t.turns))] for t in group.trajectories]
    step = norm_within(returns_to_go(group, gamma), states, norm)
    pairs = zip(step, norm(episode_returns(group)), strict=True)
    return [[episode + step_weight * a for a in row] for row, episode in pairs]


def _state(trajectory: Trajectory, k: int, anchor: str) -> Hashable:
    # replies, not prompt_ids: the prompt of a restarted turn repeats the whole context
    if k == 0:
        return trajectory.turns[0].prompt_ids
    seen = trajectory.turns[:k] if anchor == "history" else trajectory.turns[k - 1 : k]
    return tuple(turn.reply for turn in seen)
