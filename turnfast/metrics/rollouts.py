"""The metrics of a step's rollouts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import get_args

from ..types import Credit, Group, Limit, Status, Trajectory


def summarise(
    groups: Sequence[Group], credits: Sequence[Credit] | None = None, *, prefix: str = ""
) -> dict[str, float]:
    """The figures of one step's rollouts, under the names of metrics.jsonl.

    Means are over the rollouts that did not fail: a fault of the world must not read as a worse
    policy. How many failed stands in `failed` and `status/…`, which are shares of all rollouts.

    Args:
        credits: one per group; without them there is no `zero_signal_groups`.
        prefix: put before every name (`"eval/"`).
    Returns:
        reward/outcome, reward/turn (sum over the turns of a rollout), reward/turn_1 … per turn
        index over the rollouts that got that far, reward_part/…, tool_success, tool_calls, turns,
        truncated (share of turns cut at the token limit), every metric of the environment
        (exact_match, …), failed, status/…, cut/context, cut/length, cut/turns and cut/time (how
        many rollouts were ended by the context, the tokens of a turn, the number of turns or the
        clock, as they were played: `types.Trajectory.limit`), rollouts, tokens_sampled,
        zero_signal_groups (share); and, where there
        are any, fault/environment, fault/reward_raised, … (how many rollouts failed of it) and
        tool_error/raised, tool_error/timeout, … (how many calls ended so, also of failed rollouts).
        A mean over nothing is nan.
    """
    everyone = [trajectory for group in groups for trajectory in group.trajectories]
    whole = [trajectory for trajectory in everyone if not trajectory.failed]
    turns = [turn for trajectory in whole for turn in trajectory.turns]
    statuses = Counter([trajectory.status for trajectory in everyone])
    limits = Counter([trajectory.limit for trajectory in everyone])
    figures = {
        "reward/outcome": _mean([t.outcome for t in whole]),
        "reward/turn": _ratio(math.fsum([turn.reward or 0.0 for turn in turns]), len(whole)),
        **_turn_rewards(whole),
        **_reward_parts(whole),
        "tool_success": _mean([t.tool_success for t in whole]),
        "tool_calls": _ratio(sum([turn.tool_calls for turn in turns]), len(whole)),
        "turns": _ratio(len(turns), len(whole)),
        "truncated": _mean([turn.finish == "length" for turn in turns]),
        **_means([t.metrics for t in whole]),
        "failed": _ratio(len(everyone) - len(whole), len(everyone)),
        **{f"status/{name}": statuses[name] / max(len(everyone), 1) for name in get_args(Status)},
        **{f"cut/{name}": limits[name] for name in get_args(Limit) if name},
        "rollouts": len(everyone),
        "tokens_sampled": sum([len(turn.sampled_ids) for t in everyone for turn in t.turns]),
        **_count_faults(everyone),
    }
    if credits is not None:
        figures["zero_signal_groups"] = _mean([not credit.has_signal for credit in credits])
    return {prefix + name: value for name, value in figures.items()}


def _turn_rewards(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    columns: defaultdict[int, list[float]] = defaultdict(list)
    for trajectory in rollouts:
        for k, turn in enumerate(trajectory.turns, 1):
            if turn.reward is not None:
                columns[k].append(turn.reward)
    return {f"reward/turn_{k}": fmean(rewards) for k, rewards in columns.items()}


def _reward_parts(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """Sums over a rollout, averaged over the rollouts that have the part."""
    parts = [[*[turn.reward_parts for turn in t.turns], t.outcome_parts] for t in rollouts]
    holders = Counter(chain.from_iterable(set().union(*each) for each in parts))
    totals = dict.fromkeys(holders, 0.0)
    for part in chain.from_iterable(parts):
        for name, value in part.items():
            totals[name] += value
    return {f"reward_part/{name}": total / holders[name] for name, total in totals.items()}


def _count_faults(rollouts: Sequence[Trajectory]) -> Counter[str]:
    counts = Counter([f"fault/{t.fault}" for t in rollouts if t.fault])
    for errors in [turn.tool_errors for t in rollouts for turn in t.turns if turn.tool_errors]:
        counts.update({f"tool_error/{kind}": n for kind, n in errors.items()})
    return counts


def _means(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    columns: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            columns[name].append(value)
    return {name: _mean(values) for name, values in columns.items()}


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan
