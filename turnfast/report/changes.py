"""What a run has changed: the first figures against the last ones."""

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
    """One figure at two steps. `source` says whether evaluation or training rollouts gave it."""

    name: str
    title: str
    source: Source
    step_before: int
    step_after: int
    before: float
    after: float


def before_after(lines: Sequence[Mapping[str, Any]]) -> list[Change]:
    """The first and the last value of each headline figure, evaluated ones where there are any;
    of a run that never evaluated, the training figures. Empty before the second measurement."""
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
