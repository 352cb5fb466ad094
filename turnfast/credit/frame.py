"""What happens around every rule: which rollouts count before it, whitening and clipping after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from turnfast.config.schema import PositiveFloat
from turnfast.credit.baseline import NORM, Rows, episode_returns
from turnfast.types import LARGEST_REWARD, Group, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Options that every rule takes; `turnfast.credit` says what they mean."""

    clip: PositiveFloat | None = None
    whiten: bool = False
    flatten: bool = False

    def before(self, group: Group, *, at_least: int = 2) -> Group:
        """What the rule gets to see of a group: the rollouts that count."""
        seen = counted(group, at_least)
        return flattened(seen) if self.flatten else seen

    def apply(self, rows_by_group: Sequence[Rows]) -> list[Rows]:
        result = _whitened(rows_by_group) if self.whiten else list(rows_by_group)
        if (c := self.clip) is None:
            return result
        return [[[min(max(a, -c), c) for a in row] for row in rows] for rows in result]


def counted(group: Group, at_least: int = 2) -> Group:
    """The rollouts that count; none if fewer than `at_least`: one alone has no peer to be compared.

    Raises:
        ValueError: a reward that is no finite number, with its task, trajectory and turn.
    """
    healthy = tuple(t for t in group.trajectories if not t.left_out)
    for trajectory in healthy:
        _check_finite(trajectory)
    return replace(group, trajectories=healthy if len(healthy) >= at_least else ())


def flattened(group: Group) -> Group:
    """The same rewards, all paid at the end: o_i + sum_k r_{i,k}, and no turn has one of its own.

    Example: rewards (0.7, None) and outcome 1 become (None, None) and 1.7.
    """
    returns = zip(group.trajectories, episode_returns(group), strict=True)
    moved = (
        replace(t, outcome=earned, turns=tuple(replace(turn, reward=None) for turn in t.turns))
        for t, earned in returns
    )
    return replace(group, trajectories=tuple(moved))


def with_failed(group: Group, rows: Rows) -> tuple[tuple[float, ...], ...]:
    """The rows of the rollouts that counted, in the group's order, and zeros for the others."""
    remaining = iter(rows)
    return tuple(
        tuple(map(float, next(remaining))) if rows and not t.left_out else (0.0,) * len(t.turns)
        for t in group.trajectories
    )


def _check_finite(trajectory: Trajectory) -> None:
    named = [(f"turn {k}", turn.reward) for k, turn in enumerate(trajectory.turns)]
    for place, reward in [*named, ("outcome", trajectory.outcome)]:
        missing = reward is None and place != "outcome"
        if not missing and not (isinstance(reward, Real) and abs(float(reward)) < LARGEST_REWARD):
            raise ValueError(
                f"task {trajectory.task_id!r}, trajectory {trajectory.index}, {place}: "
                f"reward is {reward!r}; it must be a finite number, "
                f"below {LARGEST_REWARD:g} in size"
            )


def _whitened(rows_by_group: Sequence[Rows]) -> list[Rows]:
    signal = [any(a != 0.0 for row in rows for a in row) for rows in rows_by_group]
    pooled = [rows for rows, has in zip(rows_by_group, signal, strict=True) if has]
    white = iter(NORM([a for rows in pooled for row in rows for a in row]))
    return [
        [[next(white) for _ in row] for row in rows] if has else rows
        for rows, has in zip(rows_by_group, signal, strict=True)
    ]
