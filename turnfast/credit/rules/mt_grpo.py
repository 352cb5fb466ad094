"""Turn-level GRPO as its paper writes it (arXiv 2505.11821)."""

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

    norm_l is over the rollouts that reached turn l, whether or not it is their last. K = 2 is the
    paper's table, norm(r) + lambda * norm(o), then norm(o); lambda = 1 its K-turn form.

    - A last turn's own reward is in the baseline, but credits nobody: the outcome stands for it.
      So a rollout of one turn (it answered without the tool) has norm(o); one_turn="merged" gives
      it norm(sum r + o) instead, as the authors' public code does: that punishes not calling.
    - A turn without a reward (None) is not in the baseline and adds 0; missing="zero" counts it as
      a turn that earned 0. The paper does so: whoever does not call has a turn reward of 0.
    - The public code weighs the turn term; here lambda is on the outcome, as in the table.

    Biased when turn counts differ: see `mt_grpo_unbiased`.

    Example (std "biased", epsilon 0, lambda 0.5): a good search with a wrong answer, r = (0.7,
    None), o = 0, and a bad search with a right one, r = (0, None), o = 1.9:
    (1 - 0.5, -1) and (-1 + 0.5, 1): each turn has its own sign.
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
