"""turn_grpo: the scale of a group, its floor, and the direction on a task with a price."""

from __future__ import annotations

import pytest
from by_hand import group_of, rollout, turn

from turnfast.credit import assign_credit, assign_credits, spread_sums
from turnfast.types import Group


def group(*rows: tuple[tuple[float | None, ...], float]) -> Group:
    return group_of(
        *(
            rollout(i, [turn(reward=r) for r in rewards], outcome=outcome)
            for i, (rewards, outcome) in enumerate(rows)
        )
    )


MIXED = group(((0.7, None), 1.9), ((0.7, 0.2, 0.2), 0.0), ((0.0,), 0.4), ((0.2, None), 0.4))


@pytest.mark.parametrize(
    ("options", "first_turns"),
    [
        ({}, (1.43, -0.08, -0.78, -0.58)),
        ({"scale": "turn"}, (1.31, 3.03, -2.45, -1.89)),
        ({"scale": "none"}, (1.425, -0.075, -0.775, -0.575)),
    ],
)
def test_scale_decides_how_loud_small_turn_rewards_are(
    options: dict[str, str], first_turns: tuple[float, ...]
) -> None:
    # the second rollout repeats a search and never answers
    credit = assign_credit(MIXED, "turn_grpo", **options)
    assert [row[0] for row in credit.advantages] == pytest.approx(first_turns, abs=0.006)


def test_floor_bounds_a_group_that_differs_by_a_price_only() -> None:
    priced = group(((-0.01, None), 1.0), ((None,), 1.0))
    decided = group(((None,), 1.0), ((None,), 0.0))
    alone = assign_credit(priced, "turn_grpo").advantages
    assert alone[0][0] == pytest.approx(-(0.5**0.5))
    bounded = assign_credits([priced, decided], "turn_grpo", floor=0.3)[0].advantages
    # s_B = sqrt((0.01^2 + 1) / 4), the root mean square of 0.01 / sqrt(2) and 1 / sqrt(2)
    assert bounded[0][0] == pytest.approx(-0.005 / (0.3 * (1.0001 / 4) ** 0.5))
    assert assign_credits([priced, decided], "turn_grpo", floor=0.0)[0].advantages == alone


def test_batch_spread_covers_all_ranks() -> None:
    groups = [group(((-0.01, None), 1.0), ((None,), 1.0)), MIXED]
    together = assign_credits(groups, "turn_grpo")
    by_rank = [spread_sums([group], "turn_grpo") for group in groups]
    sums = [sum(column) for column in zip(*by_rank, strict=True)]
    apart = [assign_credits([group], "turn_grpo", sums=sums)[0] for group in groups]
    assert [c.advantages for c in apart] == [c.advantages for c in together]


@pytest.mark.parametrize("size", ["2", "3", "8"])
def test_direction_is_right_where_a_turn_has_a_small_price(size: str) -> None:
    from credit_direction import CASES, cosine, expected_gradients

    for case in CASES.values():
        gradients = expected_gradients(case, int(size), 500, "turn_grpo", {})
        true = case.true_gradient()
        assert gradients["constant"][0] * true[0] > 0
        assert cosine(gradients["constant"], true) > 0.99
    bare = expected_gradients(CASES["worth its price"], 3, 500, "turn_grpo", {"floor": 0.0})
    assert bare["constant"][0] < 0
