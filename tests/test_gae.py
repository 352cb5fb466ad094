"""Credit with a critic: GAE against its double sum, options and errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from by_hand import group_of, rollout, turn
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.config.schema import VALUE_RULES
from turnfast.credit import RULES, assign_credits, check_rule
from turnfast.credit.rules.gae import gae
from turnfast.credit.with_values import ValueRule
from turnfast.errors import ConfigError, TrainingError
from turnfast.types import Credit, Group, TokenCredit, Trajectory

number = st.floats(-3, 3)
share = st.sampled_from([0.0, 0.3, 0.9, 1.0])


@st.composite
def trajectories(draw: st.DrawFn, index: int = 0) -> Trajectory:
    pairs = st.tuples(st.integers(0, 4), st.one_of(st.none(), number))
    return rollout(
        index,
        [turn(n, r) for n, r in draw(st.lists(pairs, max_size=5))],
        draw(st.sampled_from(["finished", "finished", "max_turns", "error"])),
        masked=draw(st.integers(0, 4)) == 0,
        outcome=draw(number),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Group], list[list[list[float]]]]:
    """Ragged groups of one or more rollouts, and values for them."""
    groups, values = [], []
    for _ in range(draw(st.integers(1, 3))):
        rollouts = [draw(trajectories(i)) for i in range(draw(st.integers(1, 4)))]
        groups.append(group_of(*rollouts))
        values.append(
            [
                [] if t.left_out else draw(st.lists(number, min_size=n, max_size=n))
                for t in rollouts
                for n in [t.num_sampled]
            ]
        )
    return groups, values


def rewards_per_token(trajectory: Trajectory) -> list[float]:
    """Turn rewards on the last token of the turn, the outcome on the last token."""
    paid = [0.0] * trajectory.num_sampled
    place = -1
    for each in trajectory.turns:
        place += len(each.sampled_ids)
        if place >= 0:
            paid[place] += each.reward or 0.0
    if paid:
        paid[-1] += trajectory.outcome
    return paid


def double_sum(paid, values, gamma: float, lam: float) -> list[float]:
    """sum_l (gamma lambda)^l delta_{t+l}, term by term."""
    after = [*values[1:], 0.0][: len(values)]
    deltas = [r + gamma * b - a for r, a, b in zip(paid, values, after, strict=True)]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def per_turn(trajectory: Trajectory, values) -> tuple[list[float], list[float]]:
    """Rewards and values of the turns that sampled any token."""
    sizes = [len(t.sampled_ids) for t in trajectory.turns]
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    paid = rewards_per_token(trajectory)
    acting = [(end - size, end) for size, end in zip(sizes, ends, strict=True) if size]
    return [sum(paid[a:b]) for a, b in acting], [values[a] for a, _ in acting]


def credited(batch, rule: str, **options) -> Iterator[tuple[Trajectory, TokenCredit, Any, Any]]:
    """Each trained trajectory with its token credit, advantages per turn, and values."""
    groups, values = batch
    credits = assign_credits(groups, rule, values=values, **options)
    for group, credit, known in zip(groups, credits, values, strict=True):
        rows = (group.trajectories, credit.tokens or (), credit.advantages, known)
        for t, tokens, by_turn, v in zip(*rows, strict=True):
            assert len(by_turn) == len(t.turns)
            if t.left_out:
                assert tokens.values == tokens.targets == () and not any(by_turn)
            else:
                assert tokens.values == tuple(v) and len(tokens.targets) == t.num_sampled
                yield t, tokens, by_turn, v


@settings(max_examples=300, deadline=None)
@given(batch=batches(), gamma=share, lam=share)
def test_mt_ppo_matches_the_double_sum_over_tokens(batch, gamma, lam):
    for t, tokens, by_turn, v in credited(batch, "mt_ppo", gamma=gamma, gae_lambda=lam):
        expected = double_sum(rewards_per_token(t), v, gamma, lam)
        assert tokens.advantages == pytest.approx(expected, abs=1e-9)
        assert tokens.targets == pytest.approx([a + b for a, b in zip(expected, v, strict=True)])
        total = sum(a * len(x.sampled_ids) for a, x in zip(by_turn, t.turns, strict=True))
        assert total == pytest.approx(sum(expected), abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(batch=batches(), gamma=share, lam=share)
def test_turn_ppo_matches_the_double_sum_over_turns(batch, gamma, lam):
    for t, tokens, by_turn, v in credited(batch, "turn_ppo", gamma=gamma, gae_lambda=lam):
        rewards, before = per_turn(t, v)
        expected = double_sum(rewards, before, gamma, lam)
        acting = [a for a, x in zip(by_turn, t.turns, strict=True) if x.sampled_ids]
        assert acting == pytest.approx(expected, abs=1e-9)
        targets = [target for target in tokens.targets if target is not None]
        assert targets == pytest.approx([a + b for a, b in zip(expected, before, strict=True)])
        assert tokens.advantages is None


@settings(max_examples=100, deadline=None)
@given(batch=batches(), rule=st.sampled_from(["mt_ppo", "turn_ppo"]))
def test_with_gamma_and_lambda_1_the_target_is_the_return(batch, rule):
    for t, tokens, _, _ in credited(batch, rule, gamma=1.0, gae_lambda=1.0):
        paid = rewards_per_token(t)
        for place, target in enumerate(tokens.targets):
            assert target is None or target == pytest.approx(sum(paid[place:]), abs=1e-9)


def test_worked_examples():
    group = group_of(rollout(0, [turn(2, 1.0), turn(1, None)], outcome=2.0))
    (mt,) = assign_credits([group], "mt_ppo", values=[[[0.5, 1.0, 3.0]]])
    assert mt.tokens and mt.tokens[0].advantages == (2.5, 2.0, -1.0)
    assert mt.advantages == ((2.25, -1.0),) and mt.tokens[0].targets == (3.0, 3.0, 2.0)
    options: dict[str, Any] = {"values": [[[0.5, 1.0, 3.0]]], "gamma": 0.5, "gae_lambda": 1.0}
    (by_turn,) = assign_credits([group], "turn_ppo", **options)
    # turn 1: 2 - 3; turn 0: 1 + 0.5 * 2 - 0.5
    assert by_turn.advantages == ((1.5, -1.0),) and by_turn.tokens
    assert by_turn.tokens[0].targets == (2.0, None, 2.0)
    assert gae([0.0, 1.0], [0.5, 0.5], 1.0, 1.0) == [0.5, 0.5]
    flat: dict[str, Any] = {"values": [[[0.0] * 3]], "flatten": True}
    (late,) = assign_credits([group], "mt_ppo", **flat, gae_lambda=0.0)
    assert late.tokens and late.tokens[0].advantages == (0.0, 0.0, 3.0)


def test_clip_and_whiten_apply_to_token_advantages():
    group = group_of(rollout(0, [turn(3, 5.0)]))
    values = [[[0.0, 4.0, 9.0]]]
    (clipped,) = assign_credits([group], "mt_ppo", values=values, clip=2.0)
    assert clipped.tokens and clipped.tokens[0].advantages == (2.0, 1.0, -2.0)
    assert clipped.tokens[0].targets == (5.0, 5.0, 5.0)
    (white,) = assign_credits([group], "mt_ppo", values=values, whiten=True)
    assert white.tokens and sum(white.tokens[0].advantages or ()) == pytest.approx(0.0, abs=1e-12)


def test_the_config_knows_which_rules_have_a_critic():
    assert {n for n, rule in RULES.items() if isinstance(rule, ValueRule)} == set(VALUE_RULES)


def test_token_credit_always_has_a_signal():
    assert Credit(rule="r", advantages=((0.0,),), tokens=()).has_signal
    assert not Credit(rule="r", advantages=((0.0,),)).has_signal


@pytest.mark.parametrize("rule", VALUE_RULES)
def test_errors_name_the_cause(rule):
    t = rollout(4, [turn(2, 1.0)])
    group = group_of(t)
    with pytest.raises(ValueError, match="needs the values of a critic"):
        assign_credits([group], rule)
    with pytest.raises(ValueError, match=r"'q', trajectory 4: 1 values for 2 sampled tokens"):
        assign_credits([group], rule, values=[[[0.0]]])
    with pytest.raises(TrainingError, match=r"value of token 1 is nan; lower critic\.lr_factor"):
        assign_credits([group], rule, values=[[[0.0, math.nan]]])
    bad = group_of(replace(t, outcome=math.inf))
    with pytest.raises(ValueError, match=r"outcome: reward is inf"):
        assign_credits([bad], rule, values=[[[0.0, 0.0]]])
    with pytest.raises(ConfigError, match=r"credit\.options\.gamma"):
        check_rule(rule, {"gamma": 1.5})
    with pytest.raises(ConfigError, match=r"credit\.options\.std"):
        check_rule(rule, {"std": "none"})
    check_rule(rule, {"gamma": 0.9, "gae_lambda": 0.5, "clip": 3, "whiten": True, "flatten": True})
