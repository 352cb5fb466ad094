"""Credit relative to a critic's values instead of the other rollouts of the group.

A value rule is one file with one pure function `estimate(trajectory, values, *, options)`. It
returns one advantage per token or per turn, and a value target or None for every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from turnfast.credit.baseline import Rows
from turnfast.credit.frame import Frame
from turnfast.errors import TrainingError
from turnfast.types import Credit, Group, TokenCredit, Trajectory

Values = Sequence[Sequence[Sequence[float]]]
"""values[g][i][t]: the value before sampled token t of rollout i of group g; empty for failed
and masked rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRule:
    estimate: Callable[..., tuple[list[float], list[float | None]]]
    per: Literal["token", "turn"]
    """Whether `estimate` returns one advantage per token or per turn."""


def credit_with_values(
    name: str,
    rule: ValueRule,
    groups: Sequence[Group],
    values: Values,
    frame: Frame,
    arguments: dict[str, Any],
) -> list[Credit]:
    """Apply a value rule to a batch; returns one `Credit` per group. A group may have one rollout.

    Raises:
        ValueError: a reward is not finite, or the values do not fit the rollouts.
        TrainingError: a value is not finite.
    """
    rows_by_group: list[Rows] = []
    targets_by_group: list[list[list[float | None]]] = []
    for group, values_of_group in zip(groups, values, strict=True):
        estimates = []
        remaining = iter(frame.before(group, at_least=1).trajectories)
        for original, known in zip(group.trajectories, values_of_group, strict=True):
            if not original.left_out:
                _check_values(original, known)
                estimates.append(rule.estimate(next(remaining), known, **arguments))
        rows_by_group.append([row for row, _ in estimates])
        targets_by_group.append([targets for _, targets in estimates])
    columns = zip(groups, values, frame.after(rows_by_group), targets_by_group, strict=True)
    return [_credit(name, rule.per, *column) for column in columns]


def _credit(
    name: str,
    per: Literal["token", "turn"],
    group: Group,
    values: Sequence[Sequence[float]],
    rows: Rows,
    targets: Sequence[Sequence[float | None]],
) -> Credit:
    remaining = zip(rows, targets, strict=True)
    turns, tokens = [], []
    for trajectory, known in zip(group.trajectories, values, strict=True):
        if trajectory.left_out:
            turns.append((0.0,) * len(trajectory.turns))
            tokens.append(TokenCredit(values=(), targets=()))
            continue
        row, target = next(remaining)
        turns.append(tuple(row) if per == "turn" else _means(trajectory, row))
        tokens.append(
            TokenCredit(
                values=tuple(known),
                targets=tuple(target),
                advantages=tuple(row) if per == "token" else None,
            )
        )
    return Credit(rule=name, advantages=tuple(turns), tokens=tuple(tokens))


def _means(trajectory: Trajectory, row: Sequence[float]) -> tuple[float, ...]:
    means, start = [], 0
    for turn in trajectory.turns:
        end = start + len(turn.sampled_ids)
        means.append(math.fsum(row[start:end]) / max(1, end - start))
        start = end
    return tuple(means)


def _check_values(trajectory: Trajectory, values: Sequence[float]) -> None:
    if len(values) != trajectory.num_sampled:
        raise ValueError(
            f"task {trajectory.task_id!r}, trajectory {trajectory.index}: {len(values)} values for "
            f"{trajectory.num_sampled} sampled tokens; one per token is needed"
        )
    for t, value in enumerate(values):
        if not math.isfinite(value):
            raise TrainingError(
                f"task {trajectory.task_id!r}, trajectory {trajectory.index}: the critic's value "
                f"of token {t} is {value}; lower critic.lr_factor or optim.lr"
            )
