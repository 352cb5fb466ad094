"""Whether the parts of the turn rewards go with success, over a whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .curves import points_of
from .scales import Points

PREFIX = "success_correlation/"
DOUBT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One part of the turn rewards.

    Attributes:
        points: its correlation with success at every step that has one.
        mean: over those steps.
        named: steps in which its correlation was negative beyond chance.
        wrong: it points the wrong way: in the mean, and beyond chance over the run or in a step.
    """

    part: str
    points: Points
    mean: float
    named: int
    wrong: bool


def agreements(lines: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """By part, the worst one first; empty for a run without turn rewards."""
    names = {name for line in lines for name in line if name.startswith(PREFIX)}
    found = []
    for name in names:
        part, points = name.removeprefix(PREFIX), points_of(lines, name)
        if not points:
            continue
        values = [value for _, value in points]
        named = sum(part in (line.get("wrong_way") or ()) for line in lines)
        mean = fmean(values)
        doubt = DOUBT * stdev(values) / math.sqrt(len(values)) if len(values) > 4 else math.inf
        wrong = mean < 0 and (named > 0 or mean < -doubt)
        found.append(Agreement(part=part, points=points, mean=mean, named=named, wrong=wrong))
    return sorted(found, key=lambda a: (a.mean, a.part))
