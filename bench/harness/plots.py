"""Several runs compared: how fast, how far and how surely each rule learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from turnfast.errors import ConfigError
from turnfast.report.curves import points_of
from turnfast.rundir.directory import read_metrics

PANELS = {"eval/exact_match": "Exact match", "eval/tool_success": "Tool success"}
# told apart by the colour-blind and in grey: hue, lightness and marker all differ
LOOKS = (
    *(("#1f77d0", "o"), ("#e0842c", "s"), ("#b14fb0", "^"), ("#1a9c7c", "D"), ("#8c8c3a", "v")),
    *(("#6fb1e8", "<"), ("#c0392b", ">"), ("#6a5acd", "p"), ("#5fae57", "X"), ("#7f6a55", "P")),
)
LEGEND_COLUMNS = 6
"""More names do not fit the figure's width: further ones begin another line."""
TEXT = "#7c858f"
"""A grey that can be read on white and on the dark of code hosts alike."""
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "turnfast",
    "font.size": 10,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure of one rule over its seeds: mean, least and most at each step."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def learning_plot(runs: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Draw held-out exact match and tool success over the steps, one line per rule.

    The line is the mean over the rule's seeds, the band reaches from the worst seed to the best.

    Args:
        runs: rule -> the metrics.jsonl of each seed (or the run directories).
        out: an .svg or .png; its background is transparent, for light and dark pages.
    Raises:
        ConfigError: a run has no evaluation, or the runs of a rule share no step.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8.4, 3.5), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
            for (rule, paths), look in zip(runs.items(), _looks(len(runs)), strict=True):
                _draw(axes, rule, spread_over_seeds(rule, paths, name), look)
            _dress(axes, title)
        handles, labels = panels[0].get_legend_handles_labels()
        columns = min(len(runs), LEGEND_COLUMNS)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        # no date in the file: the same runs give the same bytes
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, transparent=True, dpi=200, metadata=metadata)
    return out


def spread_over_seeds(rule: str, paths: Sequence[Path], name: str) -> Spread:
    """Mean and range of one figure at the steps that every run of the rule has."""
    columns = [dict(points_of(read_metrics(path), name)) for path in paths]
    for path, column in zip(paths, columns, strict=True):
        if not column:
            raise ConfigError(f"{path}: has no {name}; plot runs that were evaluated")
    shared = set(columns[0]).intersection(*columns[1:]) if columns else set()
    if not shared:
        raise ConfigError(f"{rule}: its runs share no step with {name}; evaluate them alike")
    steps = sorted(shared)
    values = [[column[step] for column in columns] for step in steps]
    return Spread(
        steps=tuple(steps),
        mean=tuple(sum(row) / len(row) for row in values),
        low=tuple(min(row) for row in values),
        high=tuple(max(row) for row in values),
    )


def _looks(count: int) -> list[tuple[str, str]]:
    return [LOOKS[index % len(LOOKS)] for index in range(count)]


def _draw(axes: Axes, rule: str, spread: Spread, look: tuple[str, str]) -> None:
    colour, marker = look
    axes.fill_between(spread.steps, spread.low, spread.high, color=colour, alpha=0.18, lw=0)
    every = max(1, len(spread.steps) // 12)
    axes.plot(
        spread.steps,
        spread.mean,
        color=colour,
        marker=marker,
        markersize=4.5,
        markevery=every,
        linewidth=2,
        label=rule,
        # a line at 0 or 1 is whole, not cut in half by the frame
        clip_on=False,
    )


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TEXT)
    axes.set_xlabel("training step")
    axes.set_ylim(0, 1)
    axes.margins(x=0.01)
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    axes.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.7)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
