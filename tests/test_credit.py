"""Credit rules: worked examples, reductions, symmetries and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import by_hand
import numpy as np
import pytest
from by_hand import group_of
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.config.schema import VALUE_RULES
from turnfast.credit import RULES, assign_credit, assign_credits, check_rule
from turnfast.errors import ConfigError
from turnfast.types import Credit, Group, Trajectory

PAIR: dict[str, Any] = {"std": "biased", "epsilon": 0.0}  # two different numbers become -1 and +1
PLAIN: dict[str, Any] = {"std": "none"}
GROUP_RULES = [rule for rule in RULES if rule not in VALUE_RULES]
NORMED = [rule for rule in GROUP_RULES if rule not in ("dr", "rloo", "turn_grpo")]

Rewards = Sequence[float | None]


def rollout(
    index: int,
    rewards: Rewards,
    outcome: float = 0.0,
    *,
    status: str = "finished",
    ids: Sequence[int] | None = None,
    replies: Sequence[str] | None = None,
) -> Trajectory:
    """`ids`: one sampled id per turn; by default all are different."""
    turns = [
        by_hand.turn(
            prompt_ids=(7,) if k == 0 else (8, k),
            sampled_ids=(ids[k] if ids else 100 * index + k,),
            reply=replies[k] if replies else f"reply {index} {k}",
            reward=reward,
        )
        for k, reward in enumerate(rewards)
    ]
    return by_hand.rollout(index, turns, status, outcome=outcome)


def close(credit: Credit, *rows: Sequence[float]) -> bool:
    assert [len(row) for row in credit.advantages] == [len(row) for row in rows]
    return all(
        list(got) == pytest.approx(list(want), abs=1e-12)
        for got, want in zip(credit.advantages, rows, strict=True)
    )


SEARCHES = group_of(rollout(0, (0.7, None), 0.0), rollout(1, (0.0, None), 1.9))


@pytest.mark.parametrize(
    ("rule", "options", "good_search", "good_answer"),
    [
        ("grpo_or", PAIR, (-1, -1), (1, 1)),
        ("grpo_mr", PAIR, (-1, -1), (1, 1)),
        ("mt_grpo", PAIR, (0, -1), (0, 1)),
        ("mt_grpo", PAIR | {"outcome_weight": 0.5}, (0.5, -1), (-0.5, 1)),
        ("mt_grpo_unbiased", PAIR, (0, -1), (0, 1)),
        ("hybrid", PAIR | {"gamma": 0.5}, (-1 - 0.3, -1 - 0.3), (1 + 0.3, 1 + 0.3)),
        ("hybrid", PAIR | {"gamma": 0.25}, (1 - 0.3, -1 - 0.3), (-1 + 0.3, 1 + 0.3)),
        ("rloo", {}, (-1.2, -1.2), (1.2, 1.2)),
        ("dr", {}, (-0.6, -0.6), (0.6, 0.6)),
    ],
)
def test_good_search_against_good_answer(
    rule: str, options: dict[str, Any], good_search: Rewards, good_answer: Rewards
) -> None:
    assert close(assign_credit(SEARCHES, rule, **options), good_search, good_answer)  # type: ignore


def test_published_rules_for_three_rollouts() -> None:
    # R^T = 0.7, 0.2, 0 (mean 0.3, squares .16 + .01 + .09 = .26, unbiased std sqrt(.13))
    # R^O = 1.5, 0, 0 (mean 0.5, squares 1 + .25 + .25 = 1.5, unbiased std sqrt(.75))
    # sum = 2.2, 0.2, 0 (mean 0.8, squares 1.96 + .36 + .64 = 2.96, unbiased std sqrt(1.48))
    group = group_of(
        rollout(0, (0.7, None), 1.5), rollout(1, (0.2, None), 0.0), rollout(2, (0.0, None), 0.0)
    )
    turn = [x / (math.sqrt(0.13) + 1e-4) for x in (0.4, -0.1, -0.3)]
    outcome = [x / (math.sqrt(0.75) + 1e-4) for x in (1.0, -0.5, -0.5)]
    merged = [x / (math.sqrt(1.48) + 1e-4) for x in (1.4, -0.6, -0.8)]
    assert close(assign_credit(group, "grpo_or"), *[(o, o) for o in outcome])
    assert close(assign_credit(group, "grpo_mr"), *[(m, m) for m in merged])
    assert close(
        assign_credit(group, "mt_grpo", outcome_weight=0.6),
        *[(t + 0.6 * o, o) for t, o in zip(turn, outcome, strict=True)],
    )


LENGTHS = group_of(rollout(0, (1.0, 3.0, 9.0), 4.0), rollout(1, (2.0,), 0.0))
NO_CALL = group_of(rollout(0, (0.5, None), 0.0), rollout(1, (None,), 1.5))
LATER = group_of(rollout(0, (1.0,)), rollout(1, (0.0, 1.0)))
TO_GO = group_of(rollout(0, (1.0, 0.0), 2.0), rollout(1, (0.0,), 1.0))


def replied(*replies: str) -> Group:
    """One rollout per text of one-letter replies; only the first has an outcome of 1."""
    rows = enumerate(replies)
    return group_of(*(rollout(i, (None,) * len(r), float(i == 0), replies=r) for i, r in rows))


def branched(*rollouts: tuple[float, Sequence[int]]) -> Group:
    """One rollout per outcome and sampled ids of its turns."""
    rows = enumerate(rollouts)
    return group_of(*(rollout(i, (None,) * len(ids), o, ids=ids) for i, (o, ids) in rows))


@pytest.mark.parametrize(
    ("rule", "options", "group", "rows"),
    [
        # turn 0: 1 and 2 -> -0.5; turn 1: 3 alone -> 0; the 9 of the last turn is not credited
        ("mt_grpo", PLAIN | {"outcome_weight": 0.5}, LENGTHS, [(-0.5 + 0 + 1, 0 + 1, 2), (-2,)]),
        ("mt_grpo", PAIR, NO_CALL, [(0 - 1, -1), (1,)]),
        ("mt_grpo", PAIR | {"missing": "zero"}, NO_CALL, [(1 - 1, -1), (1,)]),
        (
            "mt_grpo",
            PLAIN | {"missing": "zero", "one_turn": "merged"},
            NO_CALL,
            [(0.25 - 0.75, -0.75), (0.5,)],
        ),
        ("mt_grpo", PLAIN, LATER, [(0,), (-0.5, 0)]),
        ("mt_grpo_unbiased", PLAIN, LATER, [(0,), (0, 0.5)]),
        ("return_to_go", PLAIN | {"gamma": 0.5}, TO_GO, [(0.5, 0), (-0.5,)]),
        (
            "return_to_go",
            PLAIN | {"gamma": 0.5, "over": "group"},
            TO_GO,
            [(1 / 3, 1 / 3), (-2 / 3,)],
        ),
        ("gigpo", PAIR | {"gamma": 1.0}, replied("ax", "ay"), [(2, 2), (-2, -2)]),
        ("gigpo", PAIR | {"gamma": 1.0}, replied("ax", "by"), [(2, 1), (-2, -1)]),
        # the same observation after turns of different index, with different histories
        ("gigpo", PAIR | {"gamma": 1.0}, replied("abz", "bz"), [(2, 1, 2), (-2, -2)]),
        (
            "gigpo",
            PAIR | {"gamma": 1.0, "anchor": "history"},
            replied("abz", "bz"),
            [(2, 1, 1), (-2, -1)],
        ),
        ("tree", PLAIN, branched((4, [1, 2]), (2, [1, 3]), (3, [4, 2])), [(0, 1), (0, -1), (0, 0)]),
        # a turn without a fork has the advantage of its branch
        ("tree", PLAIN, branched((4, [1, 2, 5]), (2, [1, 3, 5])), [(0, 1, 1), (0, -1, -1)]),
    ],
)
def test_worked_examples(
    rule: str, options: dict[str, Any], group: Group, rows: Sequence[Sequence[float]]
) -> None:
    assert close(assign_credit(group, rule, **options), *rows)


def test_advantages_are_floats_for_all_number_types() -> None:
    single: Any = np.float32(0.5)
    group = group_of(rollout(0, (single, 1), True), rollout(1, (0.0, None), 0))
    for rule in GROUP_RULES:
        rows = assign_credit(group, rule).advantages
        assert {type(a) for row in rows for a in row} == {float}


def test_clip_and_whiten() -> None:
    equal = group_of(rollout(0, (None,), 1.0), rollout(1, (None,), 1.0))
    different = group_of(rollout(0, (None,), 0.0), rollout(1, (None, None), 3.0))
    assert close(assign_credit(different, "dr", clip=1.0), (-1.0,), (1.0, 1.0))
    white = assign_credits([equal, different], "dr", whiten=True)
    assert white[0].advantages == ((0.0,), (0.0,))
    values = [a for row in white[1].advantages for a in row]
    assert sum(values) == pytest.approx(0.0)
    assert sum(a * a for a in values) / 2 == pytest.approx(1.0, rel=1e-3)


OUTCOMES = (0.0, 0.5, 1.9, 0.5)
FLAT_RAGGED = group_of(*[rollout(i, (None,) * (1 + i % 3), o) for i, o in enumerate(OUTCOMES)])
FLAT_EVEN = group_of(*[rollout(i, (None,) * 3, o) for i, o in enumerate(OUTCOMES)])
ONE_TURN = group_of(*[rollout(i, (0.1 * i,), o) for i, o in enumerate(OUTCOMES)])


@pytest.mark.parametrize(
    ("rule", "options", "group"),
    [
        *[
            (rule, {}, FLAT_RAGGED)
            for rule in ("grpo_or", "grpo_mr", "mt_grpo", "mt_grpo_unbiased", "rloo", "dr", "tree")
        ],
        ("return_to_go", {"over": "group"}, FLAT_RAGGED),
        ("gigpo", {"gamma": 1.0, "step_weight": 0.0}, FLAT_RAGGED),
        ("return_to_go", {}, FLAT_EVEN),
        ("hybrid", {"gamma": 1.0}, FLAT_EVEN),
    ],
)
def test_flattened_rewards_give_the_same_advantage_on_every_turn(
    rule: str, options: dict[str, Any], group: Group
) -> None:
    credit = assign_credit(group, rule, **options)
    assert all(len(set(row)) == 1 for row in credit.advantages)
    assert credit.has_signal


PAID_BY_TURN = [(0.7, None, 0.1), (0.0, 0.5, None), (None, 0.2, 0.2), (0.7, 0.7, 0.7)]
SAME_EVERYWHERE = {"gigpo": {"gamma": 1.0, "step_weight": 0.0}, "hybrid": {"gamma": 1.0}}


@pytest.mark.parametrize("rule", GROUP_RULES)
def test_flatten_moves_turn_rewards_to_the_outcome(rule: str) -> None:
    rewards = list(enumerate(zip(PAID_BY_TURN, OUTCOMES, strict=True)))
    group = group_of(*(rollout(i, row, outcome) for i, (row, outcome) in rewards))
    merged = group_of(
        *(rollout(i, (None,) * 3, math.fsum([o, *(x or 0.0 for x in r)])) for i, (r, o) in rewards)
    )
    chosen = SAME_EVERYWHERE.get(rule, {})
    credit = assign_credit(group, rule, flatten=True, **chosen)
    assert credit.advantages == assign_credit(merged, rule, **chosen).advantages
    assert credit.has_signal and all(len(set(row)) == 1 for row in credit.advantages)
    plain = assign_credit(group, rule)
    # rules that use only the sum of rewards do not change
    if rule in ("grpo_mr", "rloo", "dr", "tree"):
        assert close(credit, *plain.advantages)
    else:
        assert credit.advantages != plain.advantages


def test_flatten_ignores_failed_rollouts() -> None:
    group = group_of(
        rollout(0, (0.7,), 0.0), rollout(1, (math.nan,), 9.0, status="error"), rollout(2, (0.0,))
    )
    assert close(assign_credit(group, "mt_grpo", flatten=True, **PAIR), (1,), (0,), (-1,))


@pytest.mark.parametrize(
    ("rule", "options", "plain", "group"),
    [
        ("mt_grpo", {"outcome_weight": 0.0}, "grpo_or", ONE_TURN),
        ("mt_grpo", {"one_turn": "merged"}, "grpo_mr", ONE_TURN),
        ("mt_grpo", {}, "grpo_or", FLAT_RAGGED),
        ("mt_grpo_unbiased", {}, "grpo_or", FLAT_RAGGED),
        ("hybrid", {"outcome_weight": 0.0, "gamma": 1.0}, "grpo_mr", ONE_TURN),
        ("return_to_go", {"gamma": 1.0}, "grpo_mr", ONE_TURN),
        ("return_to_go", {"gamma": 1.0, "over": "group"}, "grpo_mr", ONE_TURN),
        ("gigpo", {"step_weight": 0.0}, "grpo_mr", ONE_TURN),
        ("tree", {}, "grpo_mr", ONE_TURN),
        ("tree", {}, "grpo_mr", FLAT_RAGGED),
        ("grpo_mr", {}, "grpo_or", FLAT_RAGGED),
        ("return_to_go", {"std": "none", "baseline": "leave_one_out"}, "rloo", ONE_TURN),
        ("return_to_go", {"std": "none"}, "dr", ONE_TURN),
    ],
)
def test_reduces_to_grpo_exactly(
    rule: str, options: dict[str, Any], plain: str, group: Group
) -> None:
    assert (
        assign_credit(group, rule, **options).advantages == assign_credit(group, plain).advantages
    )


def test_mt_grpo_equals_the_unbiased_rule_for_equal_lengths_without_last_rewards() -> None:
    group = group_of(*[rollout(i, (0.1 * i, 0.2, None), o) for i, o in enumerate(OUTCOMES)])
    biased, unbiased = (assign_credit(group, r) for r in ("mt_grpo", "mt_grpo_unbiased"))
    assert biased.advantages == unbiased.advantages


rewards_ = st.one_of(st.none(), st.floats(-2, 2), st.sampled_from([0.0, 0.5]))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    trajectories = []
    for index in range(draw(st.integers(1, 6))):
        turns = draw(st.lists(rewards_, max_size=4))
        trajectories.append(
            rollout(
                index,
                turns,
                draw(st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 1.0]))),
                status=draw(st.sampled_from(["finished", "finished", "max_turns", "error"])),
                ids=draw(st.lists(st.integers(0, 2), min_size=len(turns), max_size=len(turns))),
                replies=draw(
                    st.lists(st.sampled_from("ab"), min_size=len(turns), max_size=len(turns))
                ),
            )
        )
    return group_of(*trajectories)


@st.composite
def options(draw: st.DrawFn, rule: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if rule in NORMED:
        result["std"] = draw(st.sampled_from(["unbiased", "biased", "none"]))
        result["baseline"] = draw(st.sampled_from(["mean", "leave_one_out"]))
        result["epsilon"] = draw(st.sampled_from([1e-4, 1e-2]))
    if draw(st.booleans()):
        result["clip"] = draw(st.floats(0.1, 2))
    result["whiten"] = draw(st.booleans())
    return result


@pytest.mark.parametrize("rule", GROUP_RULES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shapes_failed_rollouts_and_order(rule: str, data: st.DataObject) -> None:
    group = data.draw(groups())
    chosen = data.draw(options(rule))
    rows = assign_credit(group, rule, **chosen).advantages
    assert [len(row) for row in rows] == [len(t.turns) for t in group.trajectories]
    assert all(math.isfinite(a) for row in rows for a in row)
    assert all(abs(a) <= chosen.get("clip", math.inf) for row in rows for a in row)
    for t, row in zip(group.trajectories, rows, strict=True):
        assert not t.failed or not any(row)

    order = data.draw(st.permutations(range(len(rows))))
    shuffled = replace(group, trajectories=tuple(group.trajectories[i] for i in order))
    assert assign_credit(shuffled, rule, **chosen).advantages == tuple(rows[i] for i in order)

    healthy = [i for i, t in enumerate(group.trajectories) if not t.failed]
    alone = replace(group, trajectories=tuple(group.trajectories[i] for i in healthy))
    assert assign_credit(alone, rule, **chosen).advantages == tuple(rows[i] for i in healthy)


@pytest.mark.parametrize("rule", GROUP_RULES)
@given(reward=rewards_, outcome=st.floats(-2, 2), size=st.integers(2, 6), turns=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_equal_rewards_give_exact_zeros(
    rule: str, reward: float | None, outcome: float, size: int, turns: int
) -> None:
    group = group_of(*[rollout(i, (reward,) * turns, outcome) for i in range(size)])
    for chosen in ({}, {"whiten": True}, {"clip": 0.5}):
        assert not assign_credit(group, rule, **chosen).has_signal


@pytest.mark.parametrize("rule", GROUP_RULES)
def test_sums_that_differ_by_rounding_give_exact_zeros(rule: str) -> None:
    group = group_of(rollout(0, (0.3,), 0.3), rollout(1, (0.1 + 0.2,), 0.3))
    assert not assign_credit(group, rule, **({"epsilon": 0.0} if rule in NORMED else {})).has_signal


@pytest.mark.parametrize("rule", GROUP_RULES)
def test_fewer_than_two_rollouts_give_zeros(rule: str) -> None:
    lone = group_of(rollout(0, (0.5, 1.0), 2.0))
    survivor = group_of(rollout(0, (0.5, 1.0), 2.0), rollout(1, (0.1,), 0.0, status="timeout"))
    failed = group_of(*[rollout(i, (0.5,), 1.0, status="error") for i in range(3)])
    empty = group_of(rollout(0, (), 0.0, status="error"))
    for group in (lone, survivor, failed, empty, group_of()):
        credit = assign_credit(group, rule)
        assert not credit.has_signal
        assert [len(r) for r in credit.advantages] == [len(t.turns) for t in group.trajectories]
    assert assign_credits([], rule) == []


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("mt_gpro", {}, ["credit.rule", "mt_gpro", "did you mean 'mt_grpo'"]),
        ("best", {}, ["credit.rule", "known: dr, gigpo"]),
        ("mt_grpo", {"epsilno": 1e-4}, ["credit.options.epsilno", "did you mean 'epsilon'"]),
        ("rloo", {"std": "none"}, ["credit.options.std: no such option", "known: clip, whiten"]),
        ("mt_grpo", {"gamma": 1.0}, ["credit.options.gamma"]),
        ("mt_grpo", {"norm": 1}, ["credit.options.norm"]),
        ("mt_grpo", {"epsilon": -1.0}, ["credit.options.epsilon", "-1.0"]),
        ("mt_grpo", {"std": "sample"}, ["credit.options.std", "'unbiased', 'biased' or 'none'"]),
        ("mt_grpo", {"outcome_weight": "1"}, ["credit.options.outcome_weight", "'1'"]),
        ("mt_grpo", {"outcome_weight": math.nan}, ["credit.options.outcome_weight", "finite"]),
        ("return_to_go", {"gamma": 1.5}, ["credit.options.gamma", "1.5"]),
        ("return_to_go", {"over": "world"}, ["credit.options.over", "'turn' or 'group'"]),
        ("dr", {"clip": 0.0}, ["credit.options.clip"]),
        ("dr", {"whiten": 1}, ["credit.options.whiten"]),
    ],
)
def test_unknown_rules_and_options_are_refused(
    rule: str, options: dict[str, Any], words: list[str]
) -> None:
    for call in (
        lambda: check_rule(rule, options),
        lambda: assign_credit(SEARCHES, rule, **options),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_valid_options_pass_the_check() -> None:
    for rule in GROUP_RULES:
        check_rule(rule, {"clip": 5, "whiten": True})
    for rule in NORMED:
        check_rule(rule, {"epsilon": 0, "std": "none", "baseline": "leave_one_out"})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("rule", GROUP_RULES)
def test_rewards_that_are_not_finite_are_refused(rule: str, bad: float) -> None:
    good = rollout(0, (0.1, 0.2), 1.0)
    with pytest.raises(ValueError, match=r"task 'q', trajectory 5, turn 1: reward is"):
        assign_credit(group_of(good, rollout(5, (0.1, bad), 1.0)), rule)
    with pytest.raises(ValueError, match=r"task 'q', trajectory 5, outcome: reward is"):
        assign_credit(group_of(good, rollout(5, (0.1,), bad)), rule)
    failed = rollout(5, (0.1, bad), bad, status="error")
    twin = rollout(1, (0.3, 0.2), 0.0)
    assert assign_credit(group_of(good, failed, twin), rule).advantages[1] == (0.0, 0.0)
