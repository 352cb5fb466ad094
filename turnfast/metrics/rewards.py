"""Metrics of the rewards and advantages by turn, and whether turn rewards agree with success.

A turn reward is meant to help the policy succeed. These metrics check that within each group: do
rollouts with more of the reward succeed more often? A part of the reward that correlates negatively
with success is listed in `wrong_way`: training on it raises the reward and lowers success.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from ..types import Credit, Group, Trajectory
from .reduce import TINY, Correlation, Mean, Metric, Reached, Std
from .rollouts import by_turn

SUCCESS = "exact_match"


def diagnose(groups: Sequence[Group], credits: Sequence[Credit]) -> dict[str, Metric]:
    """Return the reward and credit metrics of one step, under the names of metrics.jsonl.

    Returns:
        reward_std/turn_1, …: over the rollouts that have a reward for the turn; counts from 1.
        advantage/turn_1, …, advantage_std/turn_1, …: over all trained turns of that index.
        reached/turn_1, …: share of rollouts with at least that many turns.
        tool_call_rate: share of rollouts with at least one attempted call.
        success_correlation/<part>: see `success_correlations`; `values_of` derives `wrong_way`.
        value, explained_variance: the critic's mean value, and 1 - var(target - V) / var(target);
            only with a critic, and the latter only if targets vary.
    """
    valid = [t for group in groups for t in group.trajectories if not t.failed]
    rewards = by_turn([[turn.reward for turn in t.turns] for t in valid])
    advantages = by_turn(
        [
            row
            for group, credit in zip(groups, credits, strict=True)
            for t, row in zip(group.trajectories, credit.advantages, strict=True)
            if not t.left_out
        ]
    )
    lengths = [len(t.turns) for t in valid]
    metrics: dict[str, Metric] = {
        **{f"reward_std/turn_{k}": Std.of(values) for k, values in rewards.items()},
        **{f"advantage/turn_{k}": Mean.of(values) for k, values in advantages.items()},
        **{f"advantage_std/turn_{k}": Std.of(values) for k, values in advantages.items()},
        **_critic_metrics(credits),
        **{f"success_correlation/{part}": r for part, r in success_correlations(groups).items()},
    }
    if valid:
        longest = range(1, max(lengths) + 1)
        metrics["reached"] = Reached([sum(n >= k for n in lengths) for k in longest], len(valid))
        metrics["tool_call_rate"] = Mean.of([any(u.tool_calls for u in t.turns) for t in valid])
    return metrics


def _critic_metrics(credits: Sequence[Credit]) -> dict[str, Metric]:
    pairs = [
        (value, target)
        for credit in credits
        for tokens in credit.tokens or ()
        for value, target in zip(tokens.values, tokens.targets, strict=True)
        if target is not None
    ]
    if not pairs:
        return {}
    metrics: dict[str, Metric] = {"value": Mean.of([value for value, _ in pairs])}
    total = Std.of([target for _, target in pairs]).squares
    if total > TINY * len(pairs):
        unexplained = Std.of([target - value for value, target in pairs]).squares
        metrics["explained_variance"] = Mean(total - unexplained, total)
    return metrics


def success_correlations(groups: Sequence[Group]) -> dict[str, Correlation]:
    """Correlate every part of the turn rewards with success, over the rollouts of all groups.

    Both are differences from the mean of their group, so that easy tasks, which have more of every
    reward and more success, do not count as agreement. A part is the sum over the turns of a
    rollout; an environment that names no parts has one, `turn`. Success is the metric exact_match
    if the environment has it, else the outcome reward. Groups in which success does not vary are
    left out, and so are parts that do not vary in the other groups or are not finite.

    Example: one group, part 1, 1, 0, 0 and exact match 0, 0, 1, 1: correlation -1 over 4 rollouts.
    """
    columns: defaultdict[str, list[float]] = defaultdict(list)
    successes: list[float] = []
    for group in groups:
        rollouts = [t for t in group.trajectories if not t.failed]
        success = [t.metrics.get(SUCCESS, t.outcome) for t in rollouts]
        if not rollouts or max(success) == min(success):
            continue
        parts = [_turn_parts(t) for t in rollouts]
        for name in {name for part in parts for name in part} | columns.keys():
            # a part that first appears in this group was 0 in the earlier ones
            columns[name] += [0.0] * (len(successes) - len(columns[name]))
            columns[name] += _centred([part.get(name, 0.0) for part in parts])
        successes += _centred(success)
    correlations = {
        name: Correlation.of(columns[name], successes)
        for name in sorted(columns)
        if all(map(math.isfinite, (*columns[name], *successes)))
    }
    return {name: r for name, r in correlations.items() if r.defined}


def _turn_parts(trajectory: Trajectory) -> Mapping[str, float]:
    parts: defaultdict[str, float] = defaultdict(float)
    for turn in trajectory.turns:
        named = turn.reward_parts or ({} if turn.reward is None else {"turn": turn.reward})
        for name, value in named.items():
            parts[name] += value
    return parts


def _centred(values: Sequence[float]) -> list[float]:
    mean = fmean(values)
    return [value - mean for value in values]
