"""The rule for rollouts that were cut by a limit (arXiv 2503.14476, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config.schema import RolloutConfig
from ..types import Group, Trajectory, Turn

PART = "overlong"


def apply_overlong_rule(groups: Sequence[Group], config: RolloutConfig) -> list[Group]:
    """Apply `rollout.overlong`:

    train     keep the rollouts and their rewards.
    mask      a trajectory that a token limit ended is counted, but neither trained on nor part of a
              baseline, so that good text is not unlearned for being too long.
    penalty   every turn is charged for its length n near `rollout.max_new_tokens` = M, with B =
              `rollout.overlong_buffer`: 0 up to M - B tokens, then (M - B - n) / B, down to -1 at
              M tokens. It is a turn reward, so it falls on the long turn.

    Example: M = 100, B = 50: a turn of 50 tokens costs 0, of 75 tokens 0.5, of 100 tokens 1.
    """
    if config.overlong == "train":
        return list(groups)
    change = _mask if config.overlong == "mask" else _charge_turns
    return [
        replace(group, trajectories=tuple(change(t, config) for t in group.trajectories))
        for group in groups
    ]


def _mask(trajectory: Trajectory, config: RolloutConfig) -> Trajectory:
    return replace(trajectory, masked=True) if trajectory.status.is_cut else trajectory


def _charge_turns(trajectory: Trajectory, config: RolloutConfig) -> Trajectory:
    return replace(trajectory, turns=tuple(_charge_turn(turn, config) for turn in trajectory.turns))


def _charge_turn(turn: Turn, config: RolloutConfig) -> Turn:
    # a nearly full context may have allowed fewer tokens than M; only the length is charged
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
