"""Turn-level GRPO in which a rollout that has stopped stays in the baseline of later turns."""

from turnfast.credit.baseline import NORM, Norm, Rows, norm_within, outcomes
from turnfast.types import Group


def advantages(group: Group, *, outcome_weight: float = 1.0, norm: Norm = NORM) -> Rows:
    """With L turns in the longest rollout, and r_{i,l} = 0 from rollout i's end on:

        A_{i,k} = sum_{l=k}^{L-1} norm_l(r_l)_i + lambda * norm(o)_i

    norm_l is over all rollouts of the group, and the sum runs past the end of a short one. In
    `mt_grpo` whoever goes on pays the mean reward of the extra turn, and whoever stopped does not:
    a turn that costs everybody costs nothing, one that pays everybody is worth nothing, and one
    reward paid late counts as a loss (verl RFC 7244). Here a turn is worth exactly its reward.

    With std="none" and lambda 1 this is an unbiased policy gradient, but for the factor (G-1)/G of
    a mean that contains the sample (gone with baseline="leave_one_out"). A std weighs each turn
    index by its own spread: even a small price of a turn is then heard at full strength.

    Unlike in `mt_grpo` the last turn's own reward counts, lambda holds on every turn, and a missing
    reward is 0: all three would make stopping special again. The two agree where lambda is 1, all
    rollouts have K turns, the last one has no reward, and no other lacks one.

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
