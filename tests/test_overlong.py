"""Rollouts that a token limit ended: trained, masked, or charged per turn."""

from __future__ import annotations

import pytest
from by_hand import group_of, rollout, turn

from turnfast.config.recipe import build_config
from turnfast.config.schema import RolloutConfig
from turnfast.credit import assign_credit
from turnfast.errors import ConfigError
from turnfast.metrics.reduce import values_of
from turnfast.metrics.rewards import diagnose
from turnfast.metrics.rollouts import summarise
from turnfast.packing.pack import pack
from turnfast.rollout.overlong import apply_overlong_rule
from turnfast.types import Group, Turn


def paid(tokens: int, reward: float) -> Turn:
    return turn(tokens, reward, reward_parts={"tool": reward})


GROUP = group_of(
    rollout(0, [paid(4, 0.5), turn(100, finish="length")], "length", outcome=5.0),
    rollout(1, [turn(100, finish="length"), turn(3)], outcome=1.0),
    rollout(2, [paid(75, 0.2)], "context_full", outcome=3.0),
    rollout(3, [turn(50)]),
    rollout(4, [turn(9, finish="length")], "timeout"),
)


def config(overlong: str) -> RolloutConfig:
    return RolloutConfig(overlong=overlong, overlong_buffer=50, max_new_tokens=100)


def test_train_changes_nothing():
    assert apply_overlong_rule([GROUP], config("train")) == [GROUP]


def test_mask_excludes_cut_rollouts_from_training_and_counts_them():
    (group,) = apply_overlong_rule([GROUP], config("mask"))
    # not if the cut turn is not the last one
    assert [t.masked for t in group.trajectories] == [True, False, True, False, False]
    assert [t.status for t in group.trajectories] == [t.status for t in GROUP.trajectories]
    credit = assign_credit(group, "dr")
    # the baseline is the mean of the other two, 1 and 0
    assert credit.advantages == ((0.0, 0.0), (0.5, 0.5), (0.0,), (-0.5,), (0.0,))
    packed = pack([group], [credit], budget=999)
    assert packed.num_targets == 100 + 3 + 50
    figures = values_of(summarise([group], [credit]))
    assert figures["status/overlong"] == 2 / 5 and figures["failed"] == 1 / 5
    # metrics include their rewards
    assert figures["reward/outcome"] == (5 + 1 + 3 + 0) / 4
    assert diagnose([group], [credit])["advantage/turn_1"].value == 0.0


def test_penalty_is_charged_to_the_long_turn():
    (group,) = apply_overlong_rule([GROUP], config("penalty"))
    rewards = [[turn.reward for turn in t.turns] for t in group.trajectories]
    assert rewards == [[0.5, -1.0], [-1.0, None], [pytest.approx(-0.3)], [None], [None]]
    parts = group.trajectories[2].turns[0].reward_parts
    assert parts == {"tool": 0.2, "overlong": -0.5}
    assert [t.status for t in group.trajectories] == [t.status for t in GROUP.trajectories]


def test_a_group_of_cut_rollouts_has_no_signal():
    group = Group(task=GROUP.task, trajectories=GROUP.trajectories[:3:2])
    (masked,) = apply_overlong_rule([group], config("mask"))
    credit = assign_credit(masked)
    assert not credit.has_signal and pack([masked], [credit], budget=99).batches == ()


def test_a_buffer_beyond_the_limit_is_refused():
    with pytest.raises(ConfigError, match=r"rollout\.overlong_buffer: 64 is more than"):
        build_config({"rollout": {"overlong": "penalty", "max_new_tokens": 32}})
