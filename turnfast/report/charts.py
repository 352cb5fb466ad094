"""Charts as HTML and inline SVG, without script, font or network.

The SVG is stretched to the width of its column while lines keep their width. Labels are HTML text,
so their size does not change. Colours are classes of style.css.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .numbers import short
from .scales import Axis, Points, linear_axis, log_axis, smooth, thin

SMOOTH_FROM = 50
"""Lines with fewer points are not smoothed."""


Kind = Literal["linear", "share", "log", "stacked"]
"""The y axis: "share" is 0 to 1; "log" needs positive values that span more than a decade, and is
linear otherwise; "stacked" draws areas on top of each other, of series with the same steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Points
    colour: int
    """1 to 6."""
    dotted: bool = False
    """Mark every measurement; other long series are smoothed."""
    line: bool = True
    """Connect the points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A set of series over the training step, with one sentence below it."""

    title: str
    note: str
    series: tuple[Series, ...]
    kind: Kind = "linear"


def draw(chart: Chart, x: Axis, index: int) -> str:
    """Return the chart as a `<figure>`; `index` is the index of its `hover_data` in the page."""
    y = _y_axis(chart)
    layers = _stack(chart) if chart.kind == "stacked" else [s.points for s in chart.series]
    shapes = "".join(_grid(x, y))
    if chart.kind == "stacked":
        floor = [(step, 0.0) for step, _ in layers[0]]
        for series, top in zip(chart.series, layers, strict=True):
            shapes += _area(floor, top, series.colour, x, y)
            floor = top
    else:
        # the first series is the main one: it is drawn last, on top
        for series in reversed(chart.series):
            shapes += _line(series, x, y, smoothed=chart.kind != "log")
    ticks_y = "".join(
        f'<span style="bottom:{_percent(y.share(tick))}">{html.escape(y.label(tick))}</span>'
        for tick in y.ticks
    )
    ticks_x = "".join(
        f'<span style="left:{_percent(x.share(tick))}">{short_step(tick)}</span>'
        for tick in x.ticks
    )
    return (
        f'<figure class="chart" data-chart="{index}"><figcaption><h3>{html.escape(chart.title)}'
        f"</h3>{_key(chart.series, y)}</figcaption>"
        f'<div class="plot"><div class="y" aria-hidden="true">{ticks_y}</div><div class="area">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(_label(chart))}">{shapes}</svg></div>'
        f'<div class="x" aria-hidden="true">{ticks_x}</div></div>'
        f'<p class="note">{html.escape(chart.note)}</p></figure>'
    )


def sparkline(points: Points) -> str:
    """Return a small line without axes, for a table cell."""
    if len(points) < 2:
        return ""
    points = thin(points, 80)
    x = Axis(low=points[0][0], high=points[-1][0], ticks=())
    low, high = min(v for _, v in points), max(v for _, v in points)
    # differences in the last digits of a float are drawn as a flat line
    y = Axis(low=low, high=high if high - low > 1e-9 * abs(high) else low, ticks=())
    return (
        '<svg class="spark" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'aria-hidden="true"><path class="line c1" d="{_path(points, x, y)}"/></svg>'
    )


def hover_data(chart: Chart, x: Axis) -> dict[str, Any]:
    """Return the values that the script shows under the pointer."""
    return {
        "low": x.low,
        "high": x.high,
        "series": [
            {
                "name": series.name,
                "colour": series.colour,
                "steps": [step for step, _ in points],
                "values": [float(f"{value:.5g}") for _, value in points],
            }
            for series in chart.series
            for points in [thin(series.points)]
        ],
    }


def short_step(step: float) -> str:
    return f"{step:.0f}" if step < 10_000 else short(step)


def _y_axis(chart: Chart) -> Axis:
    if chart.kind == "share":
        return linear_axis(0.0, 1.0)
    layers = _stack(chart)[-1:] if chart.kind == "stacked" else [s.points for s in chart.series]
    values = [value for points in layers for _, value in points]
    low, high = min(values), max(values)
    if chart.kind == "log" and low > 0 and high > 10 * low:
        return log_axis(low, high)
    if chart.kind == "stacked" or 0 <= low < 0.5 * high:
        low = 0.0
    if low == high == 0.0:
        high = 1.0
    return linear_axis(low, high)


def _stack(chart: Chart) -> list[Points]:
    # areas show means, so that a few slow steps do not hide the split of the others
    count = len(chart.series[0].points)
    layers: list[Points] = []
    below = [0.0] * count
    for series in chart.series:
        points = smooth(series.points, max(1, count // 40))
        below = [low + value for low, (_, value) in zip(below, points, strict=True)]
        layers.append([(step, top) for (step, _), top in zip(points, below, strict=True)])
    return layers


def _grid(x: Axis, y: Axis) -> list[str]:
    return [f'<path class="grid" d="M0 {_y(tick, y)}H1000"/>' for tick in y.ticks] + [
        f'<path class="grid faint" d="M{_x(tick, x)} 0V1000"/>' for tick in x.ticks
    ]


def _line(series: Series, x: Axis, y: Axis, *, smoothed: bool) -> str:
    points = series.points
    colour = f"c{series.colour}"
    text = ""
    if smoothed and not series.dotted and len(points) >= SMOOTH_FROM:
        text += f'<path class="line raw {colour}" d="{_path(thin(points), x, y)}"/>'
        points = smooth(points, max(5, len(points) // 20))
    if series.line:
        text += f'<path class="line {colour}" d="{_path(thin(points), x, y)}"/>'
    if series.dotted or len(points) == 1:
        # lines of length 0 have round ends even when the SVG is stretched; circles do not
        dots = "".join(f"M{_x(step, x)} {_y(value, y)}h0" for step, value in thin(points, 60))
        text += f'<path class="dots {colour}" d="{dots}"/>'
    return text


def _area(floor: Points, top: Points, colour: int, x: Axis, y: Axis) -> str:
    outline = [*thin(top, 10_000), *reversed(floor)]
    corners = "L".join(f"{_x(step, x)} {_y(value, y)}" for step, value in outline)
    return f'<path class="fill c{colour}" d="M{corners}Z"/>'


def _path(points: Points, x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{_x(step, x)} {_y(value, y)}" for step, value in points)


def _x(step: float, axis: Axis) -> str:
    return f"{1000 * axis.share(step):.1f}".removesuffix(".0")


def _y(value: float, axis: Axis) -> str:
    return f"{1000 * (1 - axis.share(value)):.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _key(series: Sequence[Series], y: Axis) -> str:
    items = "".join(
        f'<li><i class="c{s.colour}"></i>{html.escape(s.name)} '
        f"<b>{y.label(s.points[-1][1])}</b></li>"
        for s in series
    )
    return f'<ul class="key">{items}</ul>'


def _label(chart: Chart) -> str:
    ends = "; ".join(
        f"{s.name}: from {short(s.points[0][1])} to {short(s.points[-1][1])}" for s in chart.series
    )
    return f"{chart.title}. {ends}"
