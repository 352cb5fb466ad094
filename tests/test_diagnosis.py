"""Figures on rewards and credit, and the reward that points the wrong way."""

from __future__ import annotations

import random

import by_hand
import pytest
from by_hand import group_of

from turnfast.credit import assign_credits
from turnfast.metrics.rewards import diagnose, success_correlations
from turnfast.types import Credit, Group, Trajectory, Turn


def turn(reward=None, calls=0, **parts) -> Turn:
    return by_hand.turn(reward=reward, reward_parts=parts, tool_calls=calls)


def rollout(index, *turns, outcome=0.0, match=None, status="finished") -> Trajectory:
    metrics = {} if match is None else {"exact_match": match}
    return by_hand.rollout(index, turns, status, outcome=outcome, metrics=metrics)


def test_turns_by_hand():
    groups = [
        group_of(
            rollout(0, turn(1.0, calls=1), turn(None)),
            rollout(1, turn(0.0)),
            rollout(2, turn(9.0), turn(9.0), turn(9.0), status="error"),
        )
    ]
    credits = [Credit(rule="r", advantages=((2.0, -1.0), (1.0,), (0.0, 0.0, 0.0)))]
    assert diagnose(groups, credits) == pytest.approx(
        {
            "reward_std/turn_1": 0.5,
            "advantage/turn_1": 1.5,
            "advantage/turn_2": -1.0,
            "advantage_std/turn_1": 0.5,
            "advantage_std/turn_2": 0.0,
            "reached/turn_1": 1.0,
            "reached/turn_2": 0.5,
            "tool_call_rate": 0.5,
        }
    )


def test_nothing_left_is_no_figure():
    assert (
        diagnose([group_of(rollout(0, status="error"))], [Credit(rule="r", advantages=((),))]) == {}
    )
    assert diagnose([], []) == {}


def test_correlation_is_taken_within_groups():
    # an easy task with much of the part and an easy success, a hard one with neither: pooled the
    # part looks helpful, within each group it goes with failure
    easy = group_of(
        rollout(0, turn(5.0, hint=5.0), match=1.0),
        rollout(1, turn(6.0, hint=6.0), match=0.0),
        rollout(2, turn(5.0, hint=5.0), match=1.0),
    )
    hard = group_of(
        rollout(0, turn(0.0, hint=0.0), match=1.0),
        rollout(1, turn(1.0, hint=1.0), match=0.0),
        rollout(2, turn(1.0, hint=1.0), match=0.0),
    )
    assert success_correlations([easy, hard]) == {"hint": (pytest.approx(-1.0), 6)}


def test_success_is_the_outcome_without_a_match_and_a_part_is_summed_over_turns():
    one = group_of(
        rollout(0, turn(0.2, tool=0.2), turn(0.2, tool=0.2), outcome=1.0),
        rollout(1, turn(0.2, tool=0.2), outcome=0.5),
        rollout(2, turn(0.0), outcome=0.0),
    )
    found = success_correlations([one])
    assert found["tool"] == (pytest.approx(1.0), 3)
    unnamed = group_of(rollout(0, turn(1.0), outcome=1.0), rollout(1, turn(0.0), outcome=0.0))
    assert success_correlations([unnamed]) == {"turn": (pytest.approx(1.0), 2)}


def test_a_part_met_late_counts_as_nothing_before():
    first = group_of(rollout(0, turn(), outcome=1.0), rollout(1, turn(), outcome=0.0))
    second = group_of(rollout(0, turn(1.0, late=1.0), outcome=1.0), rollout(1, turn(), outcome=0.0))
    # x = (0, 0, .5, -.5), y = (.5, -.5, .5, -.5)
    assert success_correlations([first, second])["late"] == (pytest.approx(0.5**0.5), 4)
    assert success_correlations([second, first])["late"] == (pytest.approx(0.5**0.5), 4)


def test_what_does_not_vary_says_nothing():
    equal = group_of(rollout(0, turn(1.0, a=1.0), outcome=1.0), rollout(1, turn(), outcome=1.0))
    assert success_correlations([equal]) == {}
    flat = group_of(rollout(0, turn(1.0, a=1.0), outcome=1.0), rollout(1, turn(1.0, a=1.0)))
    assert success_correlations([flat]) == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_part_that_is_no_number_is_no_figure(bad):
    one = group_of(
        rollout(0, turn(1.0, a=bad, b=1.0), outcome=1.0), rollout(1, turn(0.0, a=0.0), outcome=0.0)
    )
    assert success_correlations([one]) == {"b": (pytest.approx(1.0), 2)}


def noisy(agreement: float, size: int, seed: int) -> list[Group]:
    draw = random.Random(seed)
    groups = []
    for _ in range(size):
        rollouts = []
        for i in range(8):
            success = float(draw.random() < 0.5)
            agrees = draw.random() < agreement
            rollouts.append(
                rollout(i, turn(0.2, tool=success if agrees else 1 - success), match=success)
            )
        groups.append(group_of(*rollouts))
    return groups


@pytest.mark.parametrize(("agreement", "named"), [(0.2, True), (0.5, False), (0.8, False)])
def test_only_a_part_that_points_the_wrong_way_is_named(agreement, named):
    times = 0
    for seed in range(40):
        groups = noisy(agreement, 8, seed)
        times += diagnose(groups, assign_credits(groups)).get("wrong_way") == ["tool"]
    assert times == 40 if named else times <= 1
