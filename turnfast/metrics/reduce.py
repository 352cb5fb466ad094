"""How the metrics of several ranks become one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SUMMED = (
    "rollouts",
    "tokens",
    "tokens_sampled",
    "tokens_trained",
    "groups_dropped",
    "groups_refilled",
    "groups_without_signal",
)


SUMMED_KINDS = ("cut/", "fault/", "tool_error/")


LARGEST = ("sync_gap",)


def over_ranks(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of metrics.jsonl for what each rank has to say.

    Counts are added up. Of times and largest values the largest counts, of lists of names
    all that any rank has; other figures are means over the rollouts, as if every rank had as much
    of all else per rollout.
    """
    if len(figures) == 1:
        return dict(figures[0])
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: _over_ranks(name, figures) for name in names}


def _over_ranks(name: str, figures: Sequence[Mapping[str, Any]]) -> Any:
    kind = name.removeprefix("eval/")
    weights = [each.get("rollouts", each.get("eval/rollouts", 1)) for each in figures]
    found = [
        (each[name], weight)
        for each, weight in zip(figures, weights, strict=True)
        # a mean over nothing says nothing
        if name in each and each[name] == each[name]
    ]
    values = [value for value, _ in found]
    if not values:
        return math.nan
    if isinstance(values[0], list):
        return sorted(set().union(*values))
    if kind in SUMMED or kind.startswith(SUMMED_KINDS):
        return sum(values)
    if kind in LARGEST or kind.startswith("time/") or kind.endswith("/max"):
        return max(values)
    total = sum(weight for _, weight in found)
    if len(set(values)) == 1 or not total:  # loss, norm and rate are those of all ranks
        return values[0]
    return sum(value * weight for value, weight in found) / total
