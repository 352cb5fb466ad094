"""The metrics of a step's rollouts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from ..types import Credit, Group, Status, Trajectory
from .reduce import Mean, Metric, Sum

STATUSES = (
    "finished", "max_turns", "length", "context_full",
    "overlong", "error", "reward_error", "timeout",
)  # fmt: skip
"""The names of status/…: `overlong` is masked, `reward_error` is any fault of a reward."""
CUTS = {
    "context": Status.CONTEXT_FULL,
    "length": Status.LENGTH,
    "turns": Status.MAX_TURNS,
    "time": Status.TIMEOUT,
}
"""The names of cut/…, each with the status it counts."""


def summarise(
    groups: Sequence[Group], credits: Sequence[Credit] | None = None, *, prefix: str = ""
) -> dict[str, Metric]:
    """Return the metrics of one step's rollouts, under the names of metrics.jsonl.

    Means leave out failed rollouts: a fault of the environment is not a worse policy. `failed` and
    `status/…` are shares of all rollouts. A mean over nothing is NaN.

    Args:
        credits: one per group; without them the last two metrics are left out.
        prefix: put before every name (`"eval/"`).

    Returns:
        reward/outcome: mean per rollout.
        reward/turn: mean per rollout of the sum over its turns.
        reward/turn_1, …: mean over the rollouts with a reward for that turn.
        reward_part/<name>: sum over a rollout, mean over the rollouts that have the part.
        tool_success, tool_calls, turns: means per rollout.
        truncated: share of turns cut at the token limit.
        <metric of the environment>: mean over the rollouts that have it (exact_match, …).
        failed, status/<status>: shares of all rollouts.
        cut/context, cut/length, cut/turns, cut/time: rollouts ended by the context length, the
            token limit of a turn, the number of turns or the time limit (`types.Status`).
        rollouts, tokens_sampled: counts.
        fault/<kind>: failed rollouts by fault; only kinds that occurred.
        tool_error/<kind>: failed tool calls, those of failed rollouts included; as above.
        zero_signal_groups, groups_without_signal: share and number of groups in which every
            advantage is 0.
    """
    rollouts = [trajectory for group in groups for trajectory in group.trajectories]
    valid = [trajectory for trajectory in rollouts if not trajectory.failed]
    turns = [turn for trajectory in valid for turn in trajectory.turns]
    rewards = by_turn([[turn.reward for turn in trajectory.turns] for trajectory in valid])
    statuses = Counter([_status_name(trajectory) for trajectory in rollouts])
    ends = Counter([trajectory.status for trajectory in rollouts])
    metrics: dict[str, Metric] = {
        "reward/outcome": Mean.of([t.outcome for t in valid]),
        "reward/turn": Mean(math.fsum([turn.reward or 0.0 for turn in turns]), len(valid)),
        **{f"reward/turn_{k}": Mean.of(values) for k, values in rewards.items()},
        **_reward_parts(valid),
        "tool_success": Mean.of([t.tool_success for t in valid]),
        "tool_calls": Mean(sum([turn.tool_calls for turn in turns]), len(valid)),
        "turns": Mean(len(turns), len(valid)),
        "truncated": Mean.of([turn.finish == "length" for turn in turns]),
        **_environment_metrics([t.metrics for t in valid]),
        "failed": Mean(len(rollouts) - len(valid), len(rollouts)),
        **{f"status/{name}": Mean(statuses[name], len(rollouts)) for name in STATUSES},
        **{f"cut/{name}": Sum(ends[status]) for name, status in CUTS.items()},
        "rollouts": Sum(len(rollouts)),
        "tokens_sampled": Sum(sum([len(turn.sampled_ids) for t in rollouts for turn in t.turns])),
        **_fault_counts(rollouts),
    }
    if credits is not None:
        without_signal = [not credit.has_signal for credit in credits]
        metrics["zero_signal_groups"] = Mean.of(without_signal)
        metrics["groups_without_signal"] = Sum(sum(without_signal))
    return {prefix + name: metric for name, metric in metrics.items()}


def _status_name(trajectory: Trajectory) -> str:
    if trajectory.masked:
        return "overlong"
    return "reward_error" if trajectory.status.is_reward_fault else trajectory.status.value


def _fault_name(status: Status) -> str:
    return "environment" if status is Status.ENVIRONMENT_ERROR else status.value


def by_turn(rows: Iterable[Sequence[float | None]]) -> dict[int, list[float]]:
    """The values of each turn, counted from 1, in rows of one rollout each; None is left out."""
    columns: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        for k, value in enumerate(row, 1):
            if value is not None:
                columns[k].append(value)
    return dict(sorted(columns.items()))


def _reward_parts(rollouts: Sequence[Trajectory]) -> dict[str, Metric]:
    parts = [[*[turn.reward_parts for turn in t.turns], t.outcome_parts] for t in rollouts]
    num_with_part = Counter(chain.from_iterable(set().union(*each) for each in parts))
    totals = dict.fromkeys(num_with_part, 0.0)
    for part in chain.from_iterable(parts):
        for name, value in part.items():
            totals[name] += value
    return {
        f"reward_part/{name}": Mean(total, num_with_part[name]) for name, total in totals.items()
    }


def _fault_counts(rollouts: Sequence[Trajectory]) -> dict[str, Metric]:
    faults = [t.status for t in rollouts if t.failed and t.status is not Status.TIMEOUT]
    counts = Counter([f"fault/{_fault_name(status)}" for status in faults])
    for errors in [turn.tool_errors for t in rollouts for turn in t.turns if turn.tool_errors]:
        counts.update({f"tool_error/{kind}": n for kind, n in errors.items()})
    return {name: Sum(count) for name, count in counts.items()}


def _environment_metrics(records: Iterable[Mapping[str, float]]) -> dict[str, Metric]:
    columns: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            columns[name].append(value)
    return {name: Mean.of(values) for name, values in columns.items()}
