"""Typed metrics: the type of a metric says how the values of several ranks become one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any, get_args

TINY = 1e-18
"""A sum of squares below this is zero up to rounding."""
SIGNIFICANT = 3.0
"""A correlation further below 0 than this many standard errors is not chance."""


@dataclass(frozen=True, slots=True)
class Mean:
    """sum / count over the observations of all ranks; `if_empty` without any."""

    sum: float
    count: float
    if_empty: float = math.nan

    @classmethod
    def of(cls, values: Collection[float]) -> Mean:
        return cls(math.fsum(values), len(values))

    @property
    def value(self) -> float:
        return self.sum / self.count if self.count else self.if_empty

    def merge(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count, self.if_empty)


@dataclass(frozen=True, slots=True)
class Sum:
    """A count or an amount; those of the ranks add up."""

    value: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value of any rank; also for values that are equal on all ranks."""

    value: float

    def merge(self, other: Max) -> Max:
        return Max(max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Std:
    """The population standard deviation of the observations of all ranks; NaN without any."""

    count: int
    mean: float
    squares: float
    """Sum of (x - mean)²."""

    @classmethod
    def of(cls, values: Collection[float]) -> Std:
        if not values:
            return cls(0, 0.0, 0.0)
        mean = fmean(values)
        return cls(len(values), mean, math.fsum((x - mean) ** 2 for x in values))

    @property
    def value(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else math.nan

    def merge(self, other: Std) -> Std:
        if not self.count or not other.count:
            return self if self.count else other
        # Chan et al. 1983: no difference of large sums
        count, delta = self.count + other.count, other.mean - self.mean
        between = delta * delta * self.count * other.count / count
        return Std(
            count, self.mean + delta * other.count / count, self.squares + other.squares + between
        )


@dataclass(frozen=True, slots=True)
class Correlation:
    """The correlation of two centred columns x and y: Σxy / √(Σx² Σy²); NaN if one is constant."""

    count: int
    xx: float
    yy: float
    xy: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Correlation:
        return cls(
            len(x),
            math.fsum(a * a for a in x),
            math.fsum(b * b for b in y),
            math.fsum(a * b for a, b in zip(x, y, strict=True)),
        )

    @property
    def defined(self) -> bool:
        return self.xx > TINY and self.yy > TINY

    @property
    def value(self) -> float:
        return self.xy / math.sqrt(self.xx * self.yy) if self.defined else math.nan

    @property
    def is_negative(self) -> bool:
        """Whether it is below 0 beyond chance: Fisher's z has a standard error of 1 / √(n - 3)."""
        if self.count <= 3 or not self.value < 0:
            return False
        z = math.atanh(max(self.value, -1 + 1e-9))
        return z * math.sqrt(self.count - 3) < -SIGNIFICANT

    def merge(self, other: Correlation) -> Correlation:
        return Correlation(
            self.count + other.count, self.xx + other.xx, self.yy + other.yy, self.xy + other.xy
        )


@dataclass(frozen=True, slots=True)
class Reached:
    """The shares of rollouts with at least 1, 2, … turns, as `<name>/turn_1`, `<name>/turn_2`, …

    One metric for all turns: a rank without a long rollout counts in the shares of late turns.
    """

    counts: Sequence[int]
    """Rollouts with at least 1, 2, … turns."""
    total: int

    @property
    def value(self) -> dict[str, float]:
        return {f"turn_{k}": count / self.total for k, count in enumerate(self.counts, 1)}

    def merge(self, other: Reached) -> Reached:
        pairs = zip_longest(self.counts, other.counts, fillvalue=0)
        return Reached([a + b for a, b in pairs], self.total + other.total)


Metric = Mean | Sum | Max | Std | Correlation | Reached
Metrics = Mapping[str, Metric]
"""Metrics of one rank under their names in metrics.jsonl."""
TYPES: dict[str, type[Any]] = {metric.__name__: metric for metric in get_args(Metric)}


def to_plain(metrics: Metrics) -> dict[str, list[Any]]:
    """Metrics as JSON values, for `Ranks.gather`."""
    return {name: [type(metric).__name__, *astuple(metric)] for name, metric in metrics.items()}


def reduce_metrics(ranks: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Merge the metrics of all ranks, each as `to_plain` returns them, and return their values.

    Ranks without a metric do not change it.
    """
    merged: dict[str, Any] = {}
    for plain in ranks:
        for name, (type_name, *fields) in plain.items():
            metric = TYPES[type_name](*fields)
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return values_of(merged)


def values_of(metrics: Metrics) -> dict[str, Any]:
    """The values of the metrics of one rank under the names of metrics.jsonl.

    `wrong_way`: the significantly negative ones of `success_correlation/…`; only if there are any.
    """
    values: dict[str, Any] = {}
    for name, metric in metrics.items():
        if isinstance(metric, Reached):
            values |= {f"{name}/{turn}": share for turn, share in metric.value.items()}
        else:
            values[name] = metric.value
    correlations = {n: metric for n, metric in metrics.items() if isinstance(metric, Correlation)}
    if negative := [name for name, metric in correlations.items() if metric.is_negative]:
        values["wrong_way"] = sorted(name.partition("/")[2] for name in negative)
    return values
