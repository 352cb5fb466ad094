"""What the rewards and the credit of a step look like, turn by turn, and whether they agree.

A turn reward is a guess of what helps. Here it is held against what did help: within each group, do
rollouts that got more of it succeed more often? A part for which the answer is no points the wrong
way, and a run that follows it unlearns the task while its reward rises.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..types import Credit, Group, Trajectory

SUCCESS = "exact_match"
DOUBT = 3.0
"""A correlation further below 0 than so many of its standard errors is no accident."""


def diagnose(groups: Sequence[Group], credits: Sequence[Credit]) -> dict[str, Any]:
    """The figures of one step, under the names of metrics.jsonl; turns are counted from 1.

    Returns:
        reward_std/turn_1 …: over the rollouts that have a reward for that turn.
        advantage/turn_1 …, advantage_std/turn_1 …: over all turns of that index that were trained.
        reached/turn_1 …: share of rollouts that got so far.
        tool_call_rate: share of rollouts with at least one attempted call.
        success_correlation/<part>: see `success_correlations`.
        value, explained_variance: the critic's mean value, and 1 - var(target - V) / var(target);
            only with a critic, and the latter only where targets vary.
        wrong_way: the names of the parts that point the wrong way; absent when none does.
    """
    whole = [t for group in groups for t in group.trajectories if not t.failed]
    rewards = _columns([[turn.reward for turn in t.turns] for t in whole])
    advantages = _columns(
        [
            row
            for group, credit in zip(groups, credits, strict=True)
            for t, row in zip(group.trajectories, credit.advantages, strict=True)
            if not t.left_out
        ]
    )
    lengths = [len(t.turns) for t in whole]
    figures: dict[str, Any] = {
        **_by_turn("reward_std", rewards, _deviation),
        **_by_turn("advantage", advantages, fmean),
        **_by_turn("advantage_std", advantages, _deviation),
        **{
            f"reached/turn_{k}": fmean([length >= k for length in lengths])
            for k in range(1, max(lengths, default=0) + 1)
        },
    }
    if whole:
        called = [any([turn.tool_calls for turn in t.turns]) for t in whole]
        figures["tool_call_rate"] = fmean(called)
    figures |= _critic_figures(credits)
    correlations = success_correlations(groups)
    figures |= {f"success_correlation/{name}": r for name, (r, _) in correlations.items()}
    if wrong := [name for name, (r, n) in correlations.items() if _is_negative(r, n)]:
        figures["wrong_way"] = wrong
    return figures


def _critic_figures(credits: Sequence[Credit]) -> dict[str, float]:
    pairs = [
        (value, target)
        for credit in credits
        for tokens in credit.tokens or ()
        for value, target in zip(tokens.values, tokens.targets, strict=True)
        if target is not None
    ]
    if not pairs:
        return {}
    spread = _deviation([target for _, target in pairs]) ** 2
    figures = {"value": fmean(value for value, _ in pairs)}
    if spread > 1e-18:
        left = _deviation([target - value for value, target in pairs]) ** 2
        figures["explained_variance"] = 1.0 - left / spread
    return figures


def success_correlations(groups: Sequence[Group]) -> dict[str, tuple[float, int]]:
    """Correlation of every part of the turn rewards with success, and the rollouts it is from.

    Both are taken as differences from their group's mean: an easy task has more of every reward and
    more success, which says nothing about what the reward teaches. A part is the sum over the turns
    of a rollout; an environment that names no parts has one, `turn`. Success is the metric
    exact_match where the environment has it, else the outcome reward. Groups in which success does
    not vary tell nothing and are left out; so is a part that never varies in the others, or has
    values that are no numbers.

    Example: one group, part 1, 1, 0, 0 and exact match 0, 0, 1, 1: correlation -1 of 4 rollouts.
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
            # a part first met in this group has earned 0 in those before it
            columns[name] += [0.0] * (len(successes) - len(columns[name]))
            columns[name] += _centred([part.get(name, 0.0) for part in parts])
        successes += _centred(success)
    found = {name: _correlation(columns[name], successes) for name in sorted(columns)}
    return {name: (r, len(successes)) for name, r in found.items() if r is not None}


def _turn_parts(trajectory: Trajectory) -> Mapping[str, float]:
    parts: defaultdict[str, float] = defaultdict(float)
    for turn in trajectory.turns:
        named = turn.reward_parts or ({} if turn.reward is None else {"turn": turn.reward})
        for name, value in named.items():
            parts[name] += value
    return parts


def _is_negative(r: float, n: int) -> bool:
    """Fisher's z, whose standard error is 1 / sqrt(n - 3)."""
    return n > 3 and math.atanh(max(r, -1 + 1e-9)) * math.sqrt(n - 3) < -DOUBT if r < 0 else False


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    if not all(map(math.isfinite, (*x, *y))):
        return None
    xx, yy = math.fsum(a * a for a in x), math.fsum(b * b for b in y)
    if xx < 1e-18 or yy < 1e-18:
        return None
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(xx * yy)


def _centred(values: Sequence[float]) -> list[float]:
    mean = fmean(values)
    return [value - mean for value in values]


def _deviation(values: Sequence[float]) -> float:
    """Of a whole population; `statistics.pstdev` calculates in fractions and takes far longer."""
    return math.sqrt(fmean([x * x for x in _centred(values)]))


def _columns(rows: Sequence[Sequence[float | None]]) -> dict[int, list[float]]:
    """The numbers of every place that has any."""
    columns = {
        k: [x for row in rows if len(row) > k and (x := row[k]) is not None]
        for k in range(max(map(len, rows), default=0))
    }
    return {k: column for k, column in columns.items() if column}


def _by_turn(
    name: str, columns: Mapping[int, Sequence[float]], of: Callable[[Sequence[float]], float]
) -> dict[str, float]:
    return {f"{name}/turn_{k + 1}": of(values) for k, values in columns.items()}
