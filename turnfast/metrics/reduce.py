"""Typed metrics: the type of a metric says how the values of several ranks become one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any

TINY = 1e-18
"""A sum of squares below this is zero up to rounding."""


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
    """The largest value of any rank."""

    value: float

    def merge(self, other: Max) -> Max:
        return Max(max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Same:
    """A value that is equal on all ranks."""

    value: float

    def merge(self, other: Same) -> Same:
        return self


@dataclass(frozen=True, slots=True)
class Names:
    """A set of names; that of several ranks is the union."""

    names: Sequence[str]

    @property
    def value(self) -> list[str]:
        return sorted(self.names)

    def merge(self, other: Names) -> Names:
        return Names(tuple({*self.names, *other.names}))


@dataclass(frozen=True, slots=True)
class Std:
    """The population standard deviation of the observations of all ranks; NaN without any.

    Attributes:
        squares: sum of (x - mean)².
    """

    count: int
    mean: float
    squares: float

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

    def merge(self, other: Correlation) -> Correlation:
        return Correlation(
            self.count + other.count, self.xx + other.xx, self.yy + other.yy, self.xy + other.xy
        )


@dataclass(frozen=True, slots=True)
class Reached:
    """The shares of rollouts with at least 1, 2, … turns, as `<name>/turn_1`, `<name>/turn_2`, …

    One metric for all turns: a rank without a long rollout counts in the shares of late turns.

    Attributes:
        counts: rollouts with at least 1, 2, … turns.
        total: all rollouts.
    """

    counts: Sequence[int]
    total: int

    @property
    def value(self) -> dict[str, float]:
        return {f"turn_{k}": count / self.total for k, count in enumerate(self.counts, 1)}

    def merge(self, other: Reached) -> Reached:
        pairs = zip_longest(self.counts, other.counts, fillvalue=0)
        return Reached([a + b for a, b in pairs], self.total + other.total)


Metric = Mean | Sum | Max | Same | Names | Std | Correlation | Reached
Metrics = Mapping[str, Metric]
"""Metrics of one rank under their names in metrics.jsonl."""

KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Mean, Sum, Max, Same, Names, Std, Correlation, Reached)
}


def to_plain(metrics: Metrics) -> dict[str, list[Any]]:
    """Metrics as JSON values, for `Ranks.gather`."""
    return {name: [type(metric).__name__, *astuple(metric)] for name, metric in metrics.items()}


def reduce_metrics(ranks: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Merge the metrics of all ranks, each as `to_plain` returns them, and return their values.

    A metric that some ranks do not have is that of the others.
    """
    merged: dict[str, Any] = {}
    for plain in ranks:
        for name, (kind, *fields) in plain.items():
            metric = KINDS[kind](*fields)
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return values_of(merged)


def values_of(metrics: Metrics) -> dict[str, Any]:
    """The values of the metrics of one rank under the names of metrics.jsonl."""
    values: dict[str, Any] = {}
    for name, metric in metrics.items():
        value = metric.value
        values |= (
            {f"{name}/{key}": x for key, x in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return values
