"""Axes with round ticks, and series with fewer points but the same extremes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .numbers import MINUS, short

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An interval with its ticks; `share(low)` is 0 and `share(high)` is 1."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        # the values of an empty interval are drawn in the middle
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def label(self, value: float) -> str:
        """Return the text of a tick, with enough digits to differ from the next tick."""
        if self.log or len(self.ticks) < 2:
            return short(value)
        step, largest = self.ticks[1] - self.ticks[0], max(map(abs, self.ticks))
        if largest < 100 * step or largest >= 10_000:
            return short(value)
        return f"{value:.{max(0, -math.floor(math.log10(step)))}f}".replace("-", MINUS)


def linear_axis(
    low: float, high: float, *, wanted: int = 4, tight: bool = False, whole: bool = False
) -> Axis:
    """Return an axis with ticks at multiples of 1, 2 or 5 times a power of ten.

    Args:
        wanted: approximate number of intervals.
        tight: keep the interval instead of extending it to the next ticks.
        whole: integer ticks only.

    >>> linear_axis(0.0, 0.93).ticks
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(unit for unit in (1, 2, 5, 10) if unit * power >= rough * 0.75) * power
    unit = max(unit, 1) if whole else unit
    slack = 1e-9
    first, last = low / unit, high / unit
    first, last = (
        (math.ceil(first - slack), math.floor(last + slack))
        if tight
        else (math.floor(first + slack), math.ceil(last - slack))
    )
    # dividing by a power of ten keeps 0.6 from becoming 0.6000000000000001
    digits = max(0, 2 - math.floor(math.log10(unit)))
    ticks = tuple(round(index * unit, digits) for index in range(first, last + 1))
    return (
        Axis(low=low, high=high, ticks=ticks)
        if tight
        else Axis(low=ticks[0], high=ticks[-1], ticks=ticks)
    )


def log_axis(low: float, high: float, *, most: int = 6) -> Axis:
    """Return a logarithmic axis of whole decades, with about `most` ticks at most.

    >>> log_axis(3e-7, 2e-5).ticks
    (1e-07, 1e-06, 1e-05, 0.0001)
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    stride = math.ceil((last - first) / most)
    ticks = tuple(float(f"1e{power}") for power in range(first, last + 1, stride))
    return Axis(low=float(f"1e{first}"), high=float(f"1e{last}"), ticks=ticks, log=True)


def thin(points: Points, most: int = 400) -> Points:
    """Keep about `most` points: the lowest and the highest of each bucket."""
    if len(points) <= most:
        return points
    buckets = most // 2
    kept: Points = []
    for index in range(buckets):
        bucket = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(ends)
    return [points[0], *kept[1:-1], points[-1]]


def smooth(points: Points, width: int) -> Points:
    """Return the mean over a window centred on each point; shorter at the ends."""
    half = width // 2
    values = [y for _, y in points]
    return [(x, _mean(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
