"""Bias of the rules when rollouts decide how many turns they take, computed exactly.

G rollouts decide after every turn whether to stop. All outcomes of these choices are enumerated,
so the expected gradient of a rule is a sum, not an estimate; it is compared with the derivative of
the expected reward. `stop[k]` is the probability of stopping after turn k, the last turn always
stops, and the logit of stopping at turn k has the score (1 - p) for stopping and -p for continuing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from by_hand import group_of, rollout, turn

from turnfast.credit import assign_credit
from turnfast.types import Group

G = 3
STOP = (0.3, 0.6, 1.0)
LONGEST = len(STOP)
Scheme = Callable[[int], tuple[float, ...]]

SCHEMES: dict[str, Scheme] = {
    "one reward, paid when it stops": lambda length: (0.0,) * (length - 1) + (1.0,),
    "one reward, paid at once": lambda length: (1.0,) + (0.0,) * (length - 1),
    "every turn costs": lambda length: (-0.1,) * length,
    "every turn pays": lambda length: (1.0,) * length,
    "the second turn pays": lambda length: (0.0, 1.0, 0.0)[:length],
}
UNBIASED: dict[str, Any] = {"std": "none", "baseline": "leave_one_out"}


def chance(length: int) -> float:
    p = STOP[length - 1]
    for k in range(length - 1):
        p *= 1 - STOP[k]
    return p


def group_with(lengths: tuple[int, ...], scheme: Scheme) -> Group:
    rewards = [scheme(length) for length in lengths]
    return group_of(*(rollout(i, [turn(reward=r) for r in row]) for i, row in enumerate(rewards)))


def every_group(
    rule: str, scheme: Scheme, *, size: int = G, **options: Any
) -> list[tuple[float, tuple[int, ...], tuple[float, ...]]]:
    """(probability, lengths, advantages of the first rollout), over all choices of all rollouts."""
    result = []
    for lengths in product(range(1, LONGEST + 1), repeat=size):
        probability = 1.0
        for length in lengths:
            probability *= chance(length)
        credit = assign_credit(group_with(lengths, scheme), rule, **options)
        result.append((probability, lengths, credit.advantages[0]))
    return result


def expected_gradient(rule: str, scheme: Scheme, **options: Any) -> list[float]:
    gradient = [0.0] * LONGEST
    for probability, (length, *_), advantages in every_group(rule, scheme, **options):
        for k, advantage in enumerate(advantages):
            score = (1 - STOP[k]) if k == length - 1 else -STOP[k]
            gradient[k] += probability * score * advantage
    return gradient[:-1]  # the last turn has no choice


def true_gradient(scheme: Scheme) -> list[float]:
    """d E[R] / d logit_k = P(reach k) p_k (1 - p_k) (E[R | stop] - E[R | continue])."""
    gradient = []
    for k in range(LONGEST - 1):
        later = range(k + 2, LONGEST + 1)
        reach = sum(chance(n) for n in range(k + 1, LONGEST + 1))
        continuing = sum(chance(n) for n in later)
        on = sum(chance(n) * sum(scheme(n)) for n in later) / continuing
        gradient.append(reach * STOP[k] * (1 - STOP[k]) * (sum(scheme(k + 1)) - on))
    return gradient


@pytest.mark.parametrize("name", SCHEMES)
def test_unbiased_rule_is_the_policy_gradient(name: str) -> None:
    scheme = SCHEMES[name]
    truth = true_gradient(scheme)
    assert expected_gradient("mt_grpo_unbiased", scheme, **UNBIASED) == pytest.approx(truth)
    shrunk = [(G - 1) / G * g for g in truth]
    assert expected_gradient("mt_grpo_unbiased", scheme, std="none") == pytest.approx(shrunk)


@pytest.mark.parametrize("name", SCHEMES)
def test_return_to_go_has_the_right_direction_at_every_turn(name: str) -> None:
    # the only rollout that reaches a turn gets 0 there: this scales the gradient
    scheme = SCHEMES[name]
    got = expected_gradient("return_to_go", scheme, **UNBIASED)
    for mine, true in zip(got, true_gradient(scheme), strict=True):
        assert mine == pytest.approx(0.0, abs=1e-12) if true == 0 else 0 < mine / true <= 1 + 1e-9


def test_mt_grpo_is_biased() -> None:
    # stopping and continuing have the same value, but the rule prefers to stop
    free = SCHEMES["one reward, paid when it stops"]
    assert true_gradient(free) == pytest.approx([0.0, 0.0])
    assert expected_gradient("mt_grpo", free, **UNBIASED)[0] > 0.05
    # continuing costs, but the rule is indifferent
    costly = SCHEMES["every turn costs"]
    assert min(true_gradient(costly)) > 0.01
    assert expected_gradient("mt_grpo", costly, **UNBIASED) == [0.0, 0.0]
    # a second turn pays, but the rule is indifferent
    paying = SCHEMES["the second turn pays"]
    assert true_gradient(paying)[0] < -0.1
    assert expected_gradient("mt_grpo", paying, **UNBIASED) == [0.0, 0.0]


@pytest.mark.parametrize("std", ["none", "unbiased"])
def test_advantage_of_stopping_does_not_depend_on_when(std: str) -> None:
    scheme = SCHEMES["one reward, paid when it stops"]

    def first_turn(rule: str) -> list[float]:
        """The expected first advantage of a rollout of 1, 2, … turns in a group of five."""
        means = [0.0] * LONGEST
        for probability, (length, *_), advantages in every_group(rule, scheme, size=5, std=std):
            means[length - 1] += probability / chance(length) * advantages[0]
        return means

    naive, unbiased = first_turn("mt_grpo"), first_turn("mt_grpo_unbiased")
    assert naive[0] > naive[1] + 0.2 > naive[2] + 0.4
    # the std contains the rollout itself, which leaves a bias of a few hundredths
    assert unbiased == pytest.approx([0.0] * LONGEST, abs=1e-12 if std == "none" else 0.025)
