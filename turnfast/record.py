"""What one training step did, and the figures that metrics.jsonl gets of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .diagnosis import diagnose
from .loss import Update
from .metrics import summarise
from .packing import Packed
from .sync import SyncReport
from .types import Credit, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A finished step: its rollouts with their credit, and what every stage made of them.

    Attributes:
        times: seconds per phase, as `Stopwatch.lap` gives them.
    """

    step: int
    groups: Sequence[Group]
    credits: Sequence[Credit]
    packed: Packed
    updated: Update
    synced: SyncReport
    times: Mapping[str, float]


def figures_of(record: StepRecord) -> dict[str, Any]:
    """One line of metrics.jsonl, without the step's number."""
    packed, updated = record.packed, record.updated
    laid_out = sum(len(batch.tokens_T) for batch in packed.batches)
    return {
        **summarise(record.groups, record.credits),
        **diagnose(record.groups, record.credits),
        "loss": updated.loss,
        "logprob": updated.logprob,
        "entropy": updated.entropy,
        "grad_norm": updated.grad_norm,
        "ratio/max": updated.ratio_max,
        "clip_fraction": updated.clip_fraction,
        **updated.by_turn,
        "logprob_gap": updated.logprob_gap,
        "logprob_gap/max": updated.logprob_gap_max,
        "sync_gap": record.synced.gap,
        "lr": updated.lr,
        "budget_halvings": updated.halvings,
        "tokens": packed.num_tokens,
        "tokens_trained": packed.num_targets,
        "padding": (laid_out - packed.num_tokens) / max(1, laid_out),
        "shared_prefix": packed.shared_prefix,
        **record.times,
    }
