"""Discounted return to go per turn, plus a share of the plain outcome (arXiv 2604.02869)."""

from turnfast.config.schema import Share
from turnfast.credit.baseline import (
    NORM,
    Norm,
    Rows,
    norm_within,
    outcomes,
    returns_to_go,
    turn_indices,
)
from turnfast.types import Group


def advantages(
    group: Group, *, gamma: Share = 0.9, outcome_weight: float = 0.3, norm: Norm = NORM
) -> Rows:
    """For turns k = 0 … K-1, lambda = `outcome_weight`:

        A_{i,k} = norm_k(sum_{l >= k} gamma^(l-k) r_{i,l} + gamma^(K-1-k) o_i) + lambda * norm(o)_i

    norm_k is over the rollouts that reached turn k. The outcome is paid with the last turn, so its
    exponent is the number of turns after k (K - k in the paper, which counts turns from 1).

    Example (std "biased", epsilon 0, gamma 0.5, lambda 0.3): r = (0.7, None), o = 0 and
    r = (0, None), o = 1 have the returns (0.7, 0) and (0.5, 1): (1 - 0.3, -1 - 0.3) and
    (-1 + 0.3, 1 + 0.3).
    """
    turn = norm_within(returns_to_go(group, gamma), turn_indices(group), norm)
    pairs = zip(turn, norm(outcomes(group)), strict=True)
    return [[a + outcome_weight * outcome for a in row] for row, outcome in pairs]
