"""What one training step did, and the figures that metrics.jsonl gets of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..packing.pack import Packed
from ..rollout.groups import CollectedGroups
from ..sampler.sync import SyncReport
from ..types import Credit
from ..update.update import Update
from .reduce import Max, Mean, Metric, Same, Sum
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
    times: Mapping[str, Max]


def metrics_of(record: StepRecord) -> dict[str, Metric]:
    """The metrics of one line of metrics.jsonl, of this rank."""
    gathered, packed, updated = record.gathered, record.packed, record.updated
    usage, trained = gathered.usage, packed.num_targets
    by_tokens = {
        "logprob": updated.logprob,
        "entropy": updated.entropy,
        "clip_fraction": updated.clip_fraction,
        "kl": updated.kl,
        **updated.by_turn,
    }
    return {
        **summarise(gathered.groups, record.credits),
        **diagnose(gathered.groups, record.credits),
        "rollout/time_s": Max(usage.time_s),
        "rollout/utilisation": Mean(usage.utilisation, 1),
        "rollout/tail": Mean(usage.tail * usage.time_s, usage.time_s),
        "rollout/tool_wait": Mean(usage.tool_wait * usage.time_s, usage.time_s),
        "groups_dropped": Sum(len(gathered.dropped)),
        "groups_without_signal": Sum(sum(not credit.has_signal for credit in record.credits)),
        "groups_refilled": Sum(gathered.num_refilled),
        **{
            name: Mean(value * trained, trained, 0.0)
            for name, value in by_tokens.items()
            if value is not None
        },
        **_same(
            loss=updated.loss,
            grad_norm=updated.grad_norm,
            value_loss=updated.value_loss,
            lr=updated.lr,
            logprob_gap=updated.logprob_gap,
        ),
        "ratio/max": Max(updated.ratio_max),
        "logprob_gap/max": Max(updated.logprob_gap_max),
        "sync_gap": Max(record.synced.gap),
        "tokens": Sum(packed.num_tokens),
        "tokens_trained": Sum(packed.num_targets),
        "padding": Mean(packed.padding * packed.num_tokens, packed.num_tokens, 0.0),
        "shared_prefix": Mean(
            packed.shared_prefix * packed.num_tokens_total, packed.num_tokens_total, 0.0
        ),
        **record.times,
    }


def _same(**values: float | None) -> dict[str, Metric]:
    return {name: Same(value) for name, value in values.items() if value is not None}
