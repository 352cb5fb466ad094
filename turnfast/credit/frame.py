"""Steps around every rule: remove failed rollouts before it, whiten and clip after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from turnfast.config.schema import PositiveFloat
from turnfast.credit.baseline import NORM, Rows, episode_returns
from turnfast.types import LARGEST_REWARD, Group, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Options of every rule, documented in `turnfast.credit`."""

    clip: PositiveFloat | None = None
    whiten: bool = False
    flatten: bool = False

    def before(self, group: Group, *, at_least: int = 2) -> Group:
        """The group that the rule receives, without failed and masked rollouts.

        It is empty if fewer than `at_least` rollouts remain.

        Raises:
            ValueError: a reward is not a finite number; names its task, trajectory and turn.
        """
        present = tuple(t for t in group.trajectories if not t.left_out)
        for trajectory in present:
            _check_finite(trajectory)
        remaining = replace(group, trajectories=present if len(present) >= at_least else ())
        return _flattened(remaining) if self.flatten else remaining

    def after(self, rows_by_group: Sequence[Rows]) -> list[Rows]:
        """Whiten and clip the advantages of a batch."""
        result = _whitened(rows_by_group) if self.whiten else list(rows_by_group)
        if (c := self.clip) is None:
            return result
        return [[[min(max(a, -c), c) for a in row] for row in rows] for rows in result]


def with_failed(group: Group, rows: Rows) -> tuple[tuple[float, ...], ...]:
    """The rows of the remaining rollouts, with zeros inserted for the removed ones."""
    remaining = iter(rows)
    return tuple(
        tuple(map(float, next(remaining))) if rows and not t.left_out else (0.0,) * len(t.turns)
        for t in group.trajectories
    )


def _flattened(group: Group) -> Group:
    """The group with all turn rewards added to the outcome: o_i + sum_k r_{i,k}.

    Example: rewards (0.7, None) and outcome 1 become (None, None) and 1.7.
    """
    moved = (
        replace(t, outcome=total, turns=tuple(replace(turn, reward=None) for turn in t.turns))
        for t, total in zip(group.trajectories, episode_returns(group), strict=True)
    )
    return replace(group, trajectories=tuple(moved))


def _check_finite(trajectory: Trajectory) -> None:
    rewards = {
        f"turn {k}": t.reward for k, t in enumerate(trajectory.turns) if t.reward is not None
    }
    for place, reward in {**rewards, "outcome": trajectory.outcome}.items():
        if not (isinstance(reward, Real) and abs(float(reward)) < LARGEST_REWARD):
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
