"""PPO with a value per token and a reward at the end of every turn (MT-PPO, 2505.11821 v2)."""

from collections.abc import Sequence

from turnfast.config.schema import Share
from turnfast.credit.rules.gae import gae, rewards_of_turns
from turnfast.types import Trajectory


def estimate(
    trajectory: Trajectory, values: Sequence[float], *, gamma: Share = 1.0, gae_lambda: Share = 1.0
) -> tuple[list[float], list[float | None]]:
    """GAE over the sampled tokens, r_t the turn's reward on its last token, the outcome on the very
    last; one advantage per token, and the target A_t + V_t of every token's value.

    The step from a turn's last token goes to the next turn's first one: what the environment said
    in between is part of that state, not an action. gamma counts tokens, so that below 1 a long
    turn is worth less than a short one; the paper's setting is 1 for both.

    Example: two turns of two tokens and one, rewards 1 and 2, values 0, gamma 1, lambda 1:
    advantages (3, 3, 2), targets the same.
    """
    rewards: list[float] = []
    for num_tokens, reward in rewards_of_turns(trajectory):
        rewards += [0.0] * (num_tokens - 1) + [reward]
    advantages = gae(rewards, values, gamma, gae_lambda)
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]
