"""REINFORCE with the other rollouts' mean as baseline (arXiv 2402.14740)."""

from turnfast.credit.baseline import Norm, Rows, episode_returns, on_every_turn
from turnfast.types import Group

LEAVE_ONE_OUT = Norm(std="none", baseline="leave_one_out")


def advantages(group: Group) -> Rows:
    """A_{i,k} = R_i - mean_{j != i} R_j on every turn, R_i the sum of all rewards of the rollout.

    An unbiased policy gradient. `return_to_go` with std="none" and baseline="leave_one_out" does
    the same per turn.

    Example: returns 1, 0, 2 give 1 - 1 = 0, 0 - 1.5 = -1.5 and 2 - 0.5 = 1.5.
    """
    return on_every_turn(LEAVE_ONE_OUT(episode_returns(group)), group)
