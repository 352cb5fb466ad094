"""GRPO without the division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""

from turnfast.credit.baseline import Norm, Rows, episode_returns, on_every_turn
from turnfast.types import Group

CENTRED = Norm(std="none")


def advantages(group: Group) -> Rows:
    """A_{i,k} = R_i - mean(R) on every turn, R_i all that the rollout earned.

    A std gives tasks that are nearly always, or nearly never, solved the largest weight; this does
    not. The same in every rule that normalises: std="none".

    Example: returns 1, 0, 2 give 0, -1 and 1.
    """
    return on_every_turn(CENTRED(episode_returns(group)), group)
