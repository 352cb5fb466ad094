"""The first and last values of the main metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["eval", "train"]
PREFIXES: tuple[tuple[Source, str], ...] = (("eval", "eval/"), ("train", ""))
TITLES = {
    "exact_match": "exact match",
    "tool_success": "tool success",
    "reward/outcome": "outcome reward",
    "reward/turn": "turn reward",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A metric at two steps; `source` tells whether it is of evaluation or training rollouts."""

    name: str
    title: str
    source: Source
    step_before: int
    step_after: int
    before: float
    after: float


def before_after(lines: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Return the first and last value of each main metric that was measured twice.

    The metrics are those of the evaluations, or of training if there are none.
    """
    for source, prefix in PREFIXES:
        changes = [
            change
            for name, title in TITLES.items()
            if (change := _change(lines, prefix + name, title, source))
        ]
        if changes:
            return changes
    return []


def _change(
    lines: Sequence[Mapping[str, Any]], name: str, title: str, source: Source
) -> Change | None:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if len(points) < 2:
        return None
    (step_before, before), (step_after, after) = points[0], points[-1]
    return Change(
        name=name,
        title=title,
        source=source,
        step_before=step_before,
        step_after=step_after,
        before=before,
        after=after,
    )
