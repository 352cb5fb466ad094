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
    """How one part of the turn rewards correlates with success.

    Attributes:
        points: the correlation at every step that has one.
        mean: over those steps.
        num_negative: number of steps in which it was significantly below 0.
        negative: the mean is below 0, significantly over the run or in at least one step.
    """

    part: str
    points: Points
    mean: float
    num_negative: int
    negative: bool


def agreements(lines: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """Return the agreement of every part, lowest mean first; empty without turn rewards."""
    names = {name for line in lines for name in line if name.startswith(PREFIX)}
    found = []
    for name in names:
        part, points = name.removeprefix(PREFIX), points_of(lines, name)
        if not points:
            continue
        values = [value for _, value in points]
        num_negative = sum(part in (line.get("wrong_way") or ()) for line in lines)
        mean = fmean(values)
        limit = (
            SIGNIFICANT * stdev(values) / math.sqrt(len(values)) if len(values) > 4 else math.inf
        )
        found.append(
            Agreement(
                part=part,
                points=points,
                mean=mean,
                num_negative=num_negative,
                negative=mean < 0 and (num_negative > 0 or mean < -limit),
            )
        )
    return sorted(found, key=lambda agreement: (agreement.mean, agreement.part))
