"""Turn-level GRPO in which a finished rollout stays in the baseline of later turns."""

from turnfast.credit.baseline import NORM, Norm, Rows, norm_within, outcomes, padded_rewards
from turnfast.types import Group


def advantages(group: Group, *, outcome_weight: float = 1.0, norm: Norm = NORM) -> Rows:
    """With L turns in the longest rollout, and r_{i,l} = 0 after the end of rollout i:

        A_{i,k} = sum_{l=k}^{L-1} norm_l(r_l)_i + lambda * norm(o)_i

    norm_l is over all rollouts of the group, and the sum includes turns after the end of a short
    rollout. In `mt_grpo` only rollouts that continue pay the mean reward of an extra turn. So a
    turn that costs every rollout the same has no cost, a turn that pays every rollout the same has
    no value, and the same reward paid one turn later counts as a loss (verl RFC 7244). Here the
    value of a turn is exactly its reward.

    With std="none" and lambda 1 this is an unbiased policy gradient up to the factor (G-1)/G, since
    the mean contains the sample itself (baseline="leave_one_out" removes the factor). Otherwise
    each turn index is divided by its own std, so that even a small cost of a turn gets full weight.

    Unlike in `mt_grpo`, the reward of the last turn counts, lambda applies on every turn, and a
    missing reward is 0; each of the three would bias the choice to stop. Both rules agree if lambda
    is 1, all rollouts have K turns, the last turn has no reward and every other turn has one.

    Example (std "none", lambda 1, equal outcomes): a stops after r = (1,), b continues with
    r = (0, 1). Both have the return 1. mt_grpo gives a (0,) and b (-0.5, 0), so continuing looks
    bad. Here a has (0.5 - 0.5,) = (0,) and b (-0.5 + 0.5, 0.5) = (0, 0.5).
    """
    rewards = padded_rewards(group)
    turn = norm_within(rewards, [range(len(row)) for row in rewards], norm)
    outcome = norm(outcomes(group))
    return [
        [sum(turn[i][k:]) + outcome_weight * outcome[i] for k in range(len(t.turns))]
        for i, t in enumerate(group.trajectories)
    ]
