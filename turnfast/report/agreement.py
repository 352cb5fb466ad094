"""The correlation of turn rewards with success over a whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .curves import points_of
from .scales import Points

PREFIX = "success_correlation/"
SIGNIFICANT = 3.0
"""A mean further below 0 than this many standard errors is not chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How one part of the turn rewards correlates with success."""

    part: str
    points: Points
    """The correlation at every step that has one."""
    num_negative: int
    """Number of steps in which it was significantly below 0."""

    @property
    def mean(self) -> float:
        return fmean(value for _, value in self.points)

    @property
    def negative(self) -> bool:
        """Whether the mean is below 0, significantly over the run or in at least one step."""
        values = [value for _, value in self.points]
        if self.mean >= 0 or self.num_negative:
            return self.mean < 0
        return len(values) > 4 and self.mean < -SIGNIFICANT * stdev(values) / math.sqrt(len(values))


def agreements(lines: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """Return the agreement of every part, lowest mean first; empty without turn rewards."""
    names = {name for line in lines for name in line if name.startswith(PREFIX)}
    measured = [
        Agreement(
            part=part,
            points=points,
            num_negative=sum(part in (line.get("wrong_way") or ()) for line in lines),
        )
        for name in names
        for part in [name.removeprefix(PREFIX)]
        if (points := points_of(lines, name))
    ]
    return sorted(measured, key=lambda agreement: (agreement.mean, agreement.part))
