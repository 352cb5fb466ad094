"""Generalised advantage estimation (arXiv 1506.02438) along one rollout."""

from collections.abc import Sequence

from turnfast.types import Trajectory


def gae(
    rewards: Sequence[float], values: Sequence[float], gamma: float, gae_lambda: float
) -> list[float]:
    """A_t = sum_{l >= 0} (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    `values[t]` is V before action t, `rewards[t]` the reward of action t; V is 0 after the last
    action. With gamma = lambda = 1, A_t is the return from t on minus V_t; with lambda = 0 it is
    the one-step error.

    Example: rewards (0, 1), values (0.5, 0.5), gamma = lambda = 1 give (0.5, 0.5).
    """
    result: list[float] = []
    ahead = following = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        ahead = reward + gamma * following - value + gamma * gae_lambda * ahead
        following = value
        result.append(ahead)
    return result[::-1]


def rewards_of_turns(trajectory: Trajectory) -> list[tuple[int, float]]:
    """(number of sampled tokens, reward) of every turn that sampled any token.

    The outcome is added to the last turn. The reward of a turn without tokens is added to the turn
    before it.
    """
    pairs: list[tuple[int, float]] = []
    for turn in trajectory.turns:
        reward = turn.reward or 0.0
        if turn.sampled_ids:
            pairs.append((len(turn.sampled_ids), reward))
        elif pairs:
            pairs[-1] = (pairs[-1][0], pairs[-1][1] + reward)
    if pairs:
        pairs[-1] = (pairs[-1][0], pairs[-1][1] + trajectory.outcome)
    return pairs
