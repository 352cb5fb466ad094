"""What becomes of rollouts that ran into a limit (arXiv 2503.14476, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config.schema import RolloutConfig
from ..types import Group, Trajectory, Turn

PART = "overlong"


def settle_overlong(groups: Sequence[Group], config: RolloutConfig) -> list[Group]:
    """Apply `rollout.overlong`:

    train     as they stand: whatever the environment paid for them.
    mask      a trajectory that a limit cut off gets the status `overlong`: it is counted, and
              neither trained on nor in a baseline. Good text that was merely too long is then
              not unlearned.
    penalty   every turn pays for coming near `rollout.max_new_tokens` = M, with B =
              `rollout.overlong_buffer`: 0 up to M - B tokens, then (M - B - n) / B, down to -1 for
              a turn of M tokens. The price is a turn reward, so it falls on the turn that was long.

    Example: M = 100, B = 50: a turn of 50 tokens pays 0, of 75 tokens 0.5, of 100 tokens 1.
    """
    if config.overlong == "train":
        return list(groups)
    change = _masked if config.overlong == "mask" else _priced
    return [
        replace(group, trajectories=tuple(change(t, config) for t in group.trajectories))
        for group in groups
    ]


def _masked(trajectory: Trajectory, config: RolloutConfig) -> Trajectory:
    if trajectory.failed or not trajectory.cut_off:
        return trajectory
    return replace(trajectory, status="overlong", played=trajectory.status)


def _priced(trajectory: Trajectory, config: RolloutConfig) -> Trajectory:
    return replace(trajectory, turns=tuple(_priced_turn(turn, config) for turn in trajectory.turns))


def _priced_turn(turn: Turn, config: RolloutConfig) -> Turn:
    # the sampler may have had less room than max_new_tokens; the price is for length, not for that
    free = config.max_new_tokens - config.overlong_buffer
    excess = min(len(turn.sampled_ids), config.max_new_tokens) - free
    if excess <= 0:
        return turn
    price = excess / config.overlong_buffer
    return replace(
        turn,
        reward=(turn.reward or 0.0) - price,
        reward_parts={**turn.reward_parts, PART: -price},
    )
