"""Outcome only: every turn of a rollout gets the normalised outcome (GRPO, arXiv 2402.03300)."""

from turnfast.credit.baseline import NORM, Norm, Rows, on_every_turn, outcomes
from turnfast.types import Group


def advantages(group: Group, *, norm: Norm = NORM) -> Rows:
    """A_{i,k} = norm(o)_i, the GRPO-OR of arXiv 2505.11821; turn rewards are ignored.

    Example (std "biased", epsilon 0): outcomes 1.9 and 0 give +1 and -1 on all their turns.
    """
    return on_every_turn(norm(outcomes(group)), group)
