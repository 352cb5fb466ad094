"""GRPO without the division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""

from turnfast.credit.baseline import Norm, Rows, episode_returns, on_every_turn
from turnfast.types import Group

CENTRED = Norm(std="none")


def advantages(group: Group) -> Rows:
    """A_{i,k} = R_i - mean(R) on every turn, R_i the sum of all rewards of the rollout.

    Division by the std gives the largest weight to tasks that are nearly always or nearly never
    solved; this rule does not divide. Other rules have std="none" for the same.

    Example: returns 1, 0, 2 give 0, -1 and 1.
    """
    return on_every_turn(CENTRED(episode_returns(group)), group)
