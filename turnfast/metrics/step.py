"""What one training step did, and the figures that metrics.jsonl gets of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..packing.pack import Packed
from ..rollout.groups import Gathered
from ..rundir.directory import summarise
from ..sampler.sync import SyncReport
from ..types import Credit
from ..update.update import Update
from .rewards import diagnose


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A finished step: its rollouts with their credit, and what every stage made of them.

    Attributes:
        times: seconds per phase, as `Stopwatch.lap` gives them.
    """

    step: int
    gathered: Gathered
    credits: Sequence[Credit]
    packed: Packed
    updated: Update
    synced: SyncReport
    times: Mapping[str, float]


def figures_of(record: StepRecord) -> dict[str, Any]:
    """One line of metrics.jsonl, without the step's number."""
    gathered, packed, updated = record.gathered, record.packed, record.updated
    return {
        **summarise(gathered.groups, record.credits),
        **diagnose(gathered.groups, record.credits),
        "rollout/time_s": gathered.usage.time_s,
        "rollout/utilisation": gathered.usage.utilisation,
        "rollout/tail": gathered.usage.tail,
        "rollout/tool_wait": gathered.usage.tool_wait,
        "groups_dropped": len(gathered.dropped),
        "groups_without_signal": sum(not credit.has_signal for credit in record.credits),
        "groups_refilled": gathered.num_refilled,
        "loss": updated.loss,
        "logprob": updated.logprob,
        "entropy": updated.entropy,
        "grad_norm": updated.grad_norm,
        "ratio/max": updated.ratio_max,
        "clip_fraction": updated.clip_fraction,
        **updated.by_turn,
        **_present(
            kl=updated.kl,
            value_loss=updated.value_loss,
            logprobs_reused=updated.logprobs_reused,
        ),
        "logprob_gap": updated.logprob_gap,
        "logprob_gap/max": updated.logprob_gap_max,
        "sync_gap": record.synced.gap,
        "lr": updated.lr,
        "budget_halvings": updated.halvings,
        "tokens": packed.num_tokens,
        "tokens_trained": packed.num_targets,
        "padding": packed.padding,
        "shared_prefix": packed.shared_prefix,
        **record.times,
    }


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
LARGEST = ("budget_halvings", "sync_gap")


def over_ranks(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of metrics.jsonl for what each rank has to say.

    Counts are added up. Of times, largest values and halvings the largest counts, of lists of names
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


def _present(**figures: float | None) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
