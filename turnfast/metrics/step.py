"""What one training step did, and the figures that metrics.jsonl gets of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..packing.pack import Packed
from ..rollout.groups import CollectedGroups
from ..sampler.sync import SyncReport
from ..types import Credit
from ..update.update import Update
from .rewards import diagnose
from .rollouts import summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A finished step: its rollouts with their credit, and what every stage made of them.

    Attributes:
        times: seconds per phase, as `Stopwatch.lap` gives them.
    """

    step: int
    gathered: CollectedGroups
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
        **_present(kl=updated.kl, value_loss=updated.value_loss),
        "logprob_gap": updated.logprob_gap,
        "logprob_gap/max": updated.logprob_gap_max,
        "sync_gap": record.synced.gap,
        "lr": updated.lr,
        "tokens": packed.num_tokens,
        "tokens_trained": packed.num_targets,
        "padding": packed.padding,
        "shared_prefix": packed.shared_prefix,
        **record.times,
    }


def _present(**figures: float | None) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
