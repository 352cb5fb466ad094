"""Turn-level GRPO as published (arXiv 2505.11821)."""

from typing import Literal

from turnfast.credit.baseline import (
    NORM,
    Norm,
    Rows,
    episode_returns,
    norm_within,
    outcomes,
    turn_indices,
    turn_rewards,
)
from turnfast.types import Group


def advantages(
    group: Group,
    *,
    outcome_weight: float = 1.0,
    missing: Literal["skip", "zero"] = "skip",
    one_turn: Literal["outcome", "merged"] = "outcome",
    norm: Norm = NORM,
) -> Rows:
    """Rollout i with K turns, k = 0 … K-1, lambda = `outcome_weight`:

        A_{i,k}   = sum_{l=k}^{K-2} norm_l(r_l)_i + lambda * norm(o)_i     for k < K-1
        A_{i,K-1} = norm(o)_i

    norm_l is over the rollouts that reached turn l, including those that end there. K = 2 is the
    paper's table: norm(r) + lambda * norm(o), then norm(o). lambda = 1 is its K-turn form.

    - The reward of a last turn is in the baseline of its turn index, but is not credited. So a
      rollout of one turn (an answer without a tool call) gets norm(o). one_turn="merged" gives it
      norm(sum r + o), as the authors' public code does, which penalises rollouts without a call.
    - A turn without a reward (None) is not in the baseline and adds 0. missing="zero" counts it
      with a reward of 0, as the paper does for a turn without a call.
    - The public code puts lambda on the turn term; here it is on the outcome, as in the table.

    Biased if the rollouts differ in their number of turns: see `mt_grpo_unbiased`.

    Example (std "biased", epsilon 0, lambda 0.5): a good search with a wrong answer, r = (0.7,
    None), o = 0, and a bad search with a right one, r = (0, None), o = 1.9:
    (1 - 0.5, -1) and (-1 + 0.5, 1).
    """
    turn = norm_within(turn_rewards(group, missing), turn_indices(group), norm)
    lone = norm(episode_returns(group)) if one_turn == "merged" else None
    rows: Rows = []
    for i, outcome in enumerate(norm(outcomes(group))):
        last = len(turn[i]) - 1
        row = [sum(turn[i][k:last]) + outcome_weight * outcome for k in range(last)]
        final = lone[i] if lone is not None and last == 0 else outcome
        rows.append([*row, final] if turn[i] else [])
    return rows
