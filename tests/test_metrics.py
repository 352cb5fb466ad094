"""Metrics: hand-computed values, true means over ranks, and phase times that add up."""

from __future__ import annotations

import json
import math
import random

import by_hand
import pytest
from by_hand import group_of, rollout
from hypothesis import given
from hypothesis import strategies as st

from turnfast.config.schema import RolloutConfig
from turnfast.credit import assign_credits
from turnfast.metrics.reduce import (
    Correlation,
    Max,
    Mean,
    Std,
    Sum,
    reduce_metrics,
    to_plain,
    values_of,
)
from turnfast.metrics.rewards import diagnose, success_correlations
from turnfast.metrics.rollouts import summarise
from turnfast.metrics.stopwatch import Stopwatch
from turnfast.rollout.overlong import apply_overlong_rule
from turnfast.types import Credit, Group, Trajectory, Turn


def turn(reward=None, tokens=3, **fields) -> Turn:
    return by_hand.turn(tokens, reward, **fields)


def over_ranks(*ranks):
    """Values after the trip through JSON that the metrics of each rank make."""
    return reduce_metrics([json.loads(json.dumps(to_plain(metrics))) for metrics in ranks])


# --- reduction over ranks -------------------------------------------------------------------------


def test_each_type_has_its_own_reduction():
    first = {"mean": Mean(6.0, 6), "sum": Sum(10), "max": Max(0.1)}
    second = {"mean": Mean(0.0, 2), "sum": Sum(5), "max": Max(0.3), "only here": Sum(4)}
    third = {"mean": Mean(0.0, 0), "sum": Sum(0), "max": Max(0.0)}
    assert over_ranks(first, second, third) == {
        "mean": 0.75, "sum": 15, "max": 0.3, "only here": 4
    }  # fmt: skip
    assert over_ranks(first) == values_of(first)


def test_negative_correlations_are_those_of_all_ranks():
    def rank(**columns):
        return {f"success_correlation/{part}": Correlation(*sums) for part, sums in columns.items()}

    chance, clear = (9, 1.0, 1.0, -0.75), (20, 1.0, 1.0, -0.75)
    assert over_ranks(rank(b=clear), rank(a=clear, b=clear))["wrong_way"] == ["a", "b"]
    # neither rank alone has enough rollouts
    assert "wrong_way" not in over_ranks(rank(a=chance))
    assert over_ranks(rank(a=chance), rank(a=chance))["wrong_way"] == ["a"]
    # the clear one of the first rank is outweighed
    assert "wrong_way" not in over_ranks(rank(a=clear), rank(a=(20, 1.0, 1.0, 0.75)))


def test_a_mean_over_nothing():
    assert math.isnan(Mean.of([]).value) and math.isnan(Std.of([]).value)
    empty = {"a": Mean(0.0, 0, 0.0)}
    assert over_ranks(empty, empty) == {"a": 0.0}
    assert over_ranks(empty, {"a": Mean(3.0, 2, 0.0)}) == {"a": 1.5}


parts = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=9), min_size=1, max_size=4)


@given(parts=parts.filter(any))
def test_statistics_of_unequal_ranks_are_those_of_all_observations(parts):
    found = over_ranks(*[{"mean": Mean.of(x), "std": Std.of(x)} for x in parts])
    pooled = [value for part in parts for value in part]
    assert found["mean"] == pytest.approx(Mean.of(pooled).value, abs=1e-9)
    assert found["std"] == pytest.approx(Std.of(pooled).value, abs=1e-6)


def test_a_spread_far_from_zero_is_not_lost():
    found = over_ranks({"a": Std.of([1e9, 1e9 + 2])}, {"a": Std.of([1e9 + 4] * 2)})
    assert found["a"] == pytest.approx(math.sqrt(11 / 4))


def make_groups() -> list[Group]:
    draw = random.Random(0)

    def scored(index: int) -> Trajectory:
        parts = [{"tool": draw.random()} for _ in range(draw.randint(1, 3))]
        turns = [turn(draw.random(), reward_parts=part, tool_calls=1) for part in parts]
        success = {"exact_match": float(draw.random() < 0.5)}
        return rollout(index, turns, outcome=draw.random(), metrics=success)

    return [
        group_of(*map(scored, range(size)), rollout(size, [turn(9.0)], "error"))
        for size in (3, 1, 4)
    ]


@pytest.mark.parametrize("cut", [1, 2])
def test_metrics_of_ranks_with_unequal_rollouts_are_those_of_one_rank(cut):
    groups = make_groups()
    credits = assign_credits(groups)

    def of(part: slice):
        chosen = groups[part], credits[part]
        return {**summarise(*chosen), **diagnose(*chosen)}

    expected = values_of(of(slice(None)))
    assert over_ranks(of(slice(cut)), of(slice(cut, None))) == pytest.approx(expected, abs=1e-9)
    assert {"advantage_std/turn_2", "success_correlation/tool", "failed"} <= expected.keys()


# --- rollouts -------------------------------------------------------------------------------------


def test_summarise_by_hand():
    two_turns = [turn(0.7, 4, tool_calls=1, tool_successes=1), turn(None, 2)]
    a = rollout(0, two_turns, outcome=1.9, metrics={"exact_match": 1.0, "f1": 1.0})
    cut = [turn(0.1, 3, tool_calls=2, tool_successes=1, finish="length")]
    b = rollout(1, cut, "length", outcome=0.1, metrics={"exact_match": 0.0})
    c = rollout(2, [turn(9.0, 5)], "error", outcome=7.0, metrics={"exact_match": 1.0})
    credits = [
        Credit(rule="r", advantages=((1.0, 0.0), (0.0,), (0.0,))),
        Credit(rule="r", advantages=((0.0,),)),
    ]
    metrics = values_of(summarise([group_of(a, b, c), group_of(b)], credits))
    assert metrics == pytest.approx({
        "reward/outcome": (1.9 + 0.1 + 0.1) / 3,
        "reward/turn": (0.7 + 0.1 + 0.1) / 3,
        "reward/turn_1": (0.7 + 0.1 + 0.1) / 3,
        "tool_success": (1 + 0.5 + 0.5) / 3, "tool_calls": 5 / 3,
        "turns": 4 / 3, "truncated": 2 / 4,
        "exact_match": 1 / 3, "f1": 1.0,
        "failed": 1 / 4, "fault/environment": 1,
        "status/finished": 1 / 4, "status/length": 2 / 4, "status/error": 1 / 4,
        "status/max_turns": 0, "status/context_full": 0, "status/overlong": 0,
        "status/reward_error": 0, "status/timeout": 0,
        "cut/context": 0, "cut/length": 2, "cut/turns": 0, "cut/time": 0,
        "rollouts": 4, "tokens_sampled": 4 + 2 + 3 + 5 + 3,
        "zero_signal_groups": 0.5, "groups_without_signal": 1,
    })  # fmt: skip


def named(metrics, *prefixes: str):
    return {name: value for name, value in metrics.items() if name.startswith(prefixes)}


def test_faults_and_tool_errors_are_counted_by_kind():
    slow = turn(tool_calls=3, tool_errors={"timeout": 2, "raised": 1})
    a = rollout(0, [slow, turn(tool_errors={"timeout": 1})])
    b = rollout(1, [slow], "judge")
    c = rollout(2, [], "error")
    metrics = values_of(summarise([group_of(a, b, c)]))
    assert named(metrics, "fault/", "tool_error/") == {
        "fault/judge": 1, "fault/environment": 1, "tool_error/timeout": 5, "tool_error/raised": 2
    }  # fmt: skip
    assert not named(summarise([group_of(rollout(0, [turn(1.0)]))]), "fault/")


@pytest.mark.parametrize("overlong", ["train", "mask"])
def test_cut_rollouts_are_counted_by_limit_whatever_the_overlong_rule(overlong):
    ends = [
        ("context_full", "length"), ("context_full", "stop"), ("timeout", "length"),
        ("length", "length"), ("length", "length"), ("max_turns", "stop"),
        ("error", "length"), ("finished", "stop"),
    ]  # fmt: skip
    rollouts = [
        rollout(i, [turn(), turn(finish=finish)], status) for i, (status, finish) in enumerate(ends)
    ]
    (group,) = apply_overlong_rule([group_of(*rollouts)], RolloutConfig(overlong=overlong))
    metrics = values_of(summarise([group]))
    assert named(metrics, "cut/") == {
        "cut/context": 2, "cut/length": 2, "cut/turns": 1, "cut/time": 1
    }  # fmt: skip
    assert metrics["failed"] == 2 / 8
    assert metrics["status/overlong"] == (4 / 8 if overlong == "mask" else 0)


def test_reward_parts_are_summed_over_turns_and_averaged_over_rollouts():
    a = rollout(0, [turn(reward_parts={"tool": 0.2}), turn(reward_parts={"tool": 0.1, "hit": 0.5})])
    b = rollout(1, [turn(reward_parts={"tool": 0.0})], outcome_parts={"em": 1.0})
    metrics = values_of(summarise([group_of(a, b)]))
    assert metrics["reward_part/tool"] == pytest.approx(0.15)
    assert metrics["reward_part/hit"] == 0.5 and metrics["reward_part/em"] == 1.0


def test_prefix_and_no_credits():
    group = group_of(rollout(metrics={"exact_match": 1.0}))
    metrics = values_of(summarise([group], prefix="eval/"))
    assert metrics["eval/exact_match"] == 1.0 and metrics["eval/tool_success"] == 0.0
    assert "eval/zero_signal_groups" not in metrics
    assert all(name.startswith("eval/") for name in metrics)


@pytest.mark.parametrize("groups", [[], [group_of()], [group_of(rollout(status="error"))]])
def test_means_over_no_rollouts_are_nan(groups):
    metrics = values_of(summarise(groups))
    assert math.isnan(metrics["reward/outcome"]) and math.isnan(metrics["tool_success"])


# --- rewards and credit ---------------------------------------------------------------------------


def played(*turns, outcome=0.0, match=None, status="finished") -> Trajectory:
    metrics = {} if match is None else {"exact_match": match}
    return rollout(0, turns, status, outcome=outcome, metrics=metrics)


def part(reward=0.0, **parts) -> Turn:
    return turn(reward, reward_parts=parts)


def test_metrics_by_turn_by_hand():
    group = group_of(
        played(turn(1.0, tool_calls=1), turn(None)),
        played(turn(0.0)),
        played(turn(9.0), turn(9.0), turn(9.0), status="error"),
    )
    credit = Credit(rule="r", advantages=((2.0, -1.0), (1.0,), (0.0, 0.0, 0.0)))
    assert values_of(diagnose([group], [credit])) == pytest.approx({
        "reward_std/turn_1": 0.5,
        "advantage/turn_1": 1.5, "advantage/turn_2": -1.0,
        "advantage_std/turn_1": 0.5, "advantage_std/turn_2": 0.0,
        "reached/turn_1": 1.0, "reached/turn_2": 0.5,
        "tool_call_rate": 0.5,
    })  # fmt: skip


def test_no_valid_rollout_gives_no_metrics():
    failed = [group_of(played(status="error"))]
    assert diagnose(failed, [Credit(rule="r", advantages=((),))]) == {}
    assert diagnose([], []) == {}


def correlations(*groups) -> dict[str, tuple[float, int]]:
    return {
        name: (pytest.approx(r.value), r.count) for name, r in success_correlations(groups).items()
    }


def test_correlation_is_within_groups():
    # pooled, the part seems to help; within each group it increases with failure
    easy = [(5.0, 1.0), (6.0, 0.0), (5.0, 1.0)]
    hard = [(0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    groups = [
        group_of(*(played(part(hint=x), match=y) for x, y in pairs)) for pairs in (easy, hard)
    ]
    assert correlations(*groups) == {"hint": (-1.0, 6)}


def test_success_is_the_outcome_without_exact_match_and_parts_are_summed_over_turns():
    group = group_of(
        played(part(tool=0.2), part(tool=0.2), outcome=1.0),
        played(part(tool=0.2), outcome=0.5),
        played(part(), outcome=0.0),
    )
    assert correlations(group)["tool"] == (1.0, 3)
    unnamed = group_of(played(part(1.0), outcome=1.0), played(part(0.0), outcome=0.0))
    assert correlations(unnamed) == {"turn": (1.0, 2)}


def test_a_part_counts_as_zero_in_groups_without_it():
    first = group_of(played(part(), outcome=1.0), played(part(), outcome=0.0))
    second = group_of(played(part(late=1.0), outcome=1.0), played(part(), outcome=0.0))
    # x = (0, 0, .5, -.5), y = (.5, -.5, .5, -.5)
    assert correlations(first, second)["late"] == (0.5**0.5, 4)
    assert correlations(second, first)["late"] == (0.5**0.5, 4)


def test_constant_columns_have_no_correlation():
    equal = group_of(played(part(a=1.0), outcome=1.0), played(part(), outcome=1.0))
    assert correlations(equal) == {}
    flat = group_of(played(part(a=1.0), outcome=1.0), played(part(a=1.0)))
    assert correlations(flat) == {}
    assert math.isnan(Correlation.of([0.0, 0.0], [1.0, -1.0]).value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_part_that_is_not_finite_has_no_correlation(bad):
    group = group_of(played(part(a=bad, b=1.0), outcome=1.0), played(part(a=0.0)))
    assert correlations(group) == {"b": (1.0, 2)}


@pytest.mark.parametrize(("agreement", "listed"), [(0.2, True), (0.5, False), (0.8, False)])
def test_wrong_way_lists_only_parts_that_correlate_negatively(agreement, listed):
    def noisy(draw: random.Random) -> Trajectory:
        success = float(draw.random() < 0.5)
        agrees = draw.random() < agreement
        return played(part(0.2, tool=success if agrees else 1 - success), match=success)

    times = 0
    for seed in range(40):
        draw = random.Random(seed)
        groups = [group_of(*(noisy(draw) for _ in range(8))) for _ in range(8)]
        metrics = values_of(diagnose(groups, assign_credits(groups)))
        times += metrics.get("wrong_way") == ["tool"]
    assert times == 40 if listed else times <= 1


# --- stopwatch ------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nested_phases_and_phases_that_raise_are_counted_once():
    clock = Clock()
    watch = Stopwatch(clock=clock)
    with watch.phase("rollout"):
        clock.now += 2
        with watch.phase("score"):
            clock.now += 3
        clock.now += 1
    clock.now += 0.5
    with pytest.raises(KeyError), watch.phase("save"):
        clock.now += 4
        raise KeyError
    assert values_of(watch.lap()) == {
        "time/rollout": 3, "time/score": 3, "time/pack": 0, "time/train": 0, "time/sync": 0,
        "time/save": 4, "time/other": 0.5, "time/step": 10.5,
    }  # fmt: skip
    clock.now += 1
    assert values_of(watch.lap())["time/other"] == 1


def test_the_device_is_synchronised_at_every_phase_change():
    calls = []
    watch = Stopwatch(synchronize=lambda: calls.append(1))
    with watch.phase("train"):
        pass
    watch.lap()
    assert len(calls) == 3
