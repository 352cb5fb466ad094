"""Merged rewards: every turn gets the normalised sum of all rewards of its rollout."""

from turnfast.credit.baseline import NORM, Norm, Rows, episode_returns, on_every_turn
from turnfast.types import Group


def advantages(group: Group, *, norm: Norm = NORM) -> Rows:
    """A_{i,k} = norm(R)_i with R_i = sum_k r_{i,k} + o_i, the GRPO-MR of arXiv 2505.11821.

    Example (std "biased", epsilon 0): a good search with a wrong answer, r = (0.7,), o = 0, and a
    bad search with a right one, r = (0,), o = 1.9, have the sums 0.7 and 1.9: -1 and +1 on all
    turns, so the good search gets -1.
    """
    return on_every_turn(norm(episode_returns(group)), group)
