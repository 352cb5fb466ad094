"""The first and last values of the main metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .curves import points_of

TITLES = {
    "exact_match": "exact match",
    "tool_success": "tool success",
    "reward/outcome": "outcome reward",
    "reward/turn": "turn reward",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A metric at two steps."""

    title: str
    step_before: float
    before: float
    step_after: float
    after: float


def before_after(lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[Change]]:
    """Return the first and last value of each main metric that was measured twice.

    Returns:
        "eval" and the changes of the evaluations; without any, "train" and those of training.
    """
    changes = _changes(lines, "eval/")
    return ("eval", changes) if changes else ("train", _changes(lines, ""))


def _changes(lines: Sequence[Mapping[str, Any]], prefix: str) -> list[Change]:
    measured = {title: points_of(lines, prefix + name) for name, title in TITLES.items()}
    return [
        Change(
            title=title,
            step_before=points[0][0],
            before=points[0][1],
            step_after=points[-1][0],
            after=points[-1][1],
        )
        for title, points in measured.items()
        if len(points) > 1
    ]
