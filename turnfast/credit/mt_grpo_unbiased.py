"""Turn-level GRPO in which a rollout that has stopped stays in the baseline of later turns."""

from turnfast.credit.baseline import NORM, Norm, Rows, norm_within, outcomes
from turnfast.types import Group


def advantages(group: Group, *, outcome_weight: float = 1.0, norm: Norm = NORM) -> Rows:
    """With L turns in the longest rollout, and r_{i,l} = 0 from rollout i's end on:

        A_{i,k} = sum_{l=k}^{L-1} norm_l(r_l)_i + lambda * norm(o)_i

    norm_l is over all rollouts of the group, and the sum runs past the end of a short one. In
    `mt_grpo` an extra turn costs the mean reward of its index, because whoever stopped neither has
    a reward there nor pays for the baseline: lingering for nothing is free, quitting early hides a
    loss (verl RFC 7244). Here one more turn is worth exactly its reward. With std="none" the
    advantages are an unbiased policy gradient but for the usual factor (G-1)/G of a mean that
    contains the sample (gone with baseline="leave_one_out"). A std weighs each turn index by its
    own spread, so that even a small price of a turn is heard at full strength. Differences to `mt_grpo`: the last turn's own reward counts, lambda holds on every
    turn, and a missing reward is 0, since all of these would make stopping special again. They
    agree where lambda is 1, all rollouts have K turns and the last ones have no reward.

    Example (std "none", lambda 1, outcomes equal): a stops after r = (1,), b goes on for
    r = (0, 1). Both earned 1. mt_grpo gives a (0,) and b (-0.5, 0): going on was bad. Here a has
    (0.5 - 0.5,) = (0,) and b (-0.5 + 0.5, 0.5) = (0, 0.5).
    """
    longest = max((len(t.turns) for t in group.trajectories), default=0)
    rewards = [
        [turn.reward or 0.0 for turn in t.turns] + [0.0] * (longest - len(t.turns))
        for t in group.trajectories
    ]
    turn = norm_within(rewards, [range(longest)] * len(rewards), norm)
    outcome = norm(outcomes(group))
    return [
        [sum(turn[i][k:]) + outcome_weight * outcome[i] for k in range(len(t.turns))]
        for i, t in enumerate(group.trajectories)
    ]
