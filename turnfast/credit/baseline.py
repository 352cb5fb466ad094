"""Returns and normalisation, shared by the rules.

Shapes: a group has G rollouts; rows are ragged, row i has one entry per turn of rollout i. Sums
over rollouts are exact (`math.fsum`), so the result does not depend on the order of the group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from turnfast.types import Group

Rows = list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """norm(x)_i = (x_i - mean) / (std + epsilon); zeros if x has fewer than two different values.

    Attributes:
        epsilon: added to the standard deviation.
        std: "unbiased" divides the sum of squares by n - 1, as the public code of arXiv 2505.11821
            does; "biased" divides by n; "none" does not scale (arXiv 2503.20783).
        baseline: "mean" of all values, or "leave_one_out" for the mean of the other values (arXiv
            2402.14740).

    Example: [1, 0, 2] with std "none" gives [0, -1, 1], with "leave_one_out" [0, -1.5, 1.5].
    """

    epsilon: Annotated[float, Field(ge=0)] = 1e-4
    std: Literal["unbiased", "biased", "none"] = "unbiased"
    baseline: Literal["mean", "leave_one_out"] = "mean"

    def __call__(self, values: Sequence[float]) -> list[float]:
        n = len(values)
        if n < 2 or _equal(values):
            return [0.0] * n
        mean = math.fsum(values) / n
        centred = [value - mean for value in values]
        spread = 1.0
        if self.std != "none":
            squares = math.fsum(c * c for c in centred)
            spread = math.sqrt(squares / (n - (self.std == "unbiased"))) + self.epsilon
        if self.baseline == "leave_one_out":
            spread *= (n - 1) / n
        return [c / spread for c in centred]


NORM = Norm()


def norm_within(
    values: Sequence[Sequence[float | None]],
    cells: Sequence[Sequence[Hashable]],
    norm: Norm,
) -> Rows:
    """Normalise every value over the values that have the same label in `cells`.

    None, a missing reward, is excluded from the baseline and becomes 0.
    """
    members: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for i, (row, labels) in enumerate(zip(values, cells, strict=True)):
        for k, (value, label) in enumerate(zip(row, labels, strict=True)):
            if value is not None:
                members[label].append((i, k))
    result = [[0.0] * len(row) for row in values]
    for places in members.values():
        present = [value for i, k in places if (value := values[i][k]) is not None]
        for (i, k), advantage in zip(places, norm(present), strict=True):
            result[i][k] = advantage
    return result


def turn_rewards(group: Group, missing: Literal["skip", "zero"]) -> list[list[float | None]]:
    """The turn rewards; missing ones stay None ("skip") or become 0 ("zero")."""
    default = 0.0 if missing == "zero" else None
    return [
        [default if turn.reward is None else turn.reward for turn in t.turns]
        for t in group.trajectories
    ]


def padded_rewards(group: Group) -> Rows:
    """[G, K] turn rewards; 0 if missing, and after the end of a rollout."""
    longest = max((len(t.turns) for t in group.trajectories), default=0)
    rows = [[turn.reward or 0.0 for turn in t.turns] for t in group.trajectories]
    return [row + [0.0] * (longest - len(row)) for row in rows]


def outcomes(group: Group) -> list[float]:
    return [t.outcome for t in group.trajectories]


def episode_returns(group: Group) -> list[float]:
    """R_i = sum_k r_{i,k} + o_i; a missing reward adds nothing."""
    return [
        math.fsum([turn.reward or 0.0 for turn in t.turns] + [t.outcome])
        for t in group.trajectories
    ]


def returns_to_go(group: Group, gamma: float) -> Rows:
    """R_{i,k} = sum_{m >= k} gamma^(m-k) r_{i,m}, with the outcome added to the last reward.

    Example: rewards (1, None, 2), outcome 4, gamma 0.5 give (2.5, 3, 6).
    """
    rows: Rows = []
    for t in group.trajectories:
        ahead, row = t.outcome, []
        for k in reversed(range(len(t.turns))):
            ahead = (t.turns[k].reward or 0.0) + (gamma if k + 1 < len(t.turns) else 1.0) * ahead
            row.append(ahead)
        rows.append(row[::-1])
    return rows


def turn_indices(group: Group) -> list[list[int]]:
    """Cells for `norm_within` that group turns by their index."""
    return [list(range(len(t.turns))) for t in group.trajectories]


def on_every_turn(values_G: Sequence[float], group: Group) -> Rows:
    return [[v] * len(t.turns) for v, t in zip(values_G, group.trajectories, strict=True)]


def _equal(values: Sequence[float]) -> bool:
    # up to rounding: 0.1 + 0.2 and 0.3 are the same reward
    return max(values) - min(values) <= 1e-12 * max(1.0, abs(max(values)), abs(min(values)))
