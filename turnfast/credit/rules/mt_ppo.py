"""PPO with a value per token and a reward at the end of every turn (MT-PPO, 2505.11821 v2)."""

from collections.abc import Sequence

from turnfast.config.schema import Share
from turnfast.credit.rules.gae import gae, rewards_of_turns
from turnfast.types import Trajectory


def estimate(
    trajectory: Trajectory, values: Sequence[float], *, gamma: Share = 1.0, gae_lambda: Share = 1.0
) -> tuple[list[float], list[float | None]]:
    """GAE over the sampled tokens; returns one advantage and one value target A_t + V_t per token.

    The reward of a turn is paid on its last token, the outcome on the last token of the rollout.
    The next state after a turn's last token is the first token of the next turn; the reply in
    between is part of that state, not an action. gamma counts tokens, so below 1 a long turn is
    discounted more than a short one; the paper sets gamma and lambda to 1.

    Example: two turns of two tokens and one, rewards 1 and 2, values 0, gamma 1, lambda 1:
    advantages (3, 3, 2), targets the same.
    """
    rewards: list[float] = []
    for num_tokens, reward in rewards_of_turns(trajectory):
        rewards += [0.0] * (num_tokens - 1) + [reward]
    advantages = gae(rewards, values, gamma, gae_lambda)
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]
