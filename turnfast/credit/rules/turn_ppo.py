"""PPO in which a whole turn is one action (Turn-PPO, arXiv 2512.17008)."""

from collections.abc import Sequence
from itertools import accumulate

from turnfast.config.schema import Share
from turnfast.credit.rules.gae import gae, rewards_of_turns
from turnfast.types import Trajectory


def estimate(
    trajectory: Trajectory, values: Sequence[float], *, gamma: Share = 0.99, gae_lambda: Share = 0.9
) -> tuple[list[float], list[float | None]]:
    """GAE over turns; returns one advantage per turn and value targets per token.

    V_k is the value before the first token of turn k. Only that token has a target, A_k + V_k. All
    tokens of a turn share its advantage. gamma and lambda count turns, whatever their length.

    Example: two turns of two tokens and one, rewards 1 and 2, values 0, gamma 0.5, lambda 1:
    advantages (2, 2), targets (2, none, 2).
    """
    pairs = rewards_of_turns(trajectory)
    starts = [0, *accumulate(num_tokens for num_tokens, _ in pairs)][: len(pairs)]
    before = [values[start] for start in starts]
    advantages = gae([reward for _, reward in pairs], before, gamma, gae_lambda)
    targets: list[float | None] = [None] * len(values)
    for start, advantage, value in zip(starts, advantages, before, strict=True):
        targets[start] = advantage + value
    remaining = iter(advantages)
    return [next(remaining) if turn.sampled_ids else 0.0 for turn in trajectory.turns], targets
