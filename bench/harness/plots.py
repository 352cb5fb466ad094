"""Learning curves of several runs."""

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
# hue, lightness and marker all differ, for colour-blind readers and grey prints
STYLES = (
    *(("#1f77d0", "o"), ("#e0842c", "s"), ("#b14fb0", "^"), ("#1a9c7c", "D"), ("#8c8c3a", "v")),
    *(("#6fb1e8", "<"), ("#c0392b", ">"), ("#6a5acd", "p"), ("#5fae57", "X"), ("#7f6a55", "P")),
)
LEGEND_COLUMNS = 6
"""Further names start another line."""
TEXT = "#7c858f"
"""A grey that is readable on white and on dark backgrounds."""
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
    """One metric of one rule over its seeds: mean, minimum and maximum at each step."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def learning_plot(runs: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Plot held-out exact match and tool success over the steps, one line per rule.

    The line is the mean over the seeds; the band extends from the minimum to the maximum.

    Args:
        runs: rule -> the metrics.jsonl of each seed (or the run directories).
        out: an .svg or .png file with transparent background.
    Raises:
        ConfigError: a run has no evaluation, or the runs of a rule share no step.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(8.4, 3.5), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
            for (rule, paths), style in zip(runs.items(), _styles(len(runs)), strict=True):
                _draw(axes, rule, spread_over_seeds(rule, paths, name), style)
            _format_axes(axes, title)
        handles, labels = panels[0].get_legend_handles_labels()
        columns = min(len(runs), LEGEND_COLUMNS)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        # no date, so that the same runs give the same bytes
        metadata = {"Date": None} if out.suffix == ".svg" else None
        figure.savefig(out, transparent=True, dpi=200, metadata=metadata)
    return out


def spread_over_seeds(rule: str, paths: Sequence[Path], name: str) -> Spread:
    """Mean and range of one metric at the steps that all runs of the rule have."""
    columns = [dict(points_of(read_metrics(path), name)) for path in paths]
    for path, column in zip(paths, columns, strict=True):
        if not column:
            raise ConfigError(f"{path}: has no {name}; only runs with evaluations can be plotted")
    shared = set(columns[0]).intersection(*columns[1:]) if columns else set()
    if not shared:
        raise ConfigError(
            f"{rule}: its runs have no common step with {name}; evaluate them at the same steps"
        )
    steps = sorted(shared)
    values = [[column[step] for column in columns] for step in steps]
    return Spread(
        steps=tuple(steps),
        mean=tuple(sum(row) / len(row) for row in values),
        low=tuple(min(row) for row in values),
        high=tuple(max(row) for row in values),
    )


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[index % len(STYLES)] for index in range(count)]


def _draw(axes: Axes, rule: str, spread: Spread, style: tuple[str, str]) -> None:
    colour, marker = style
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
        # do not clip lines at 0 and 1
        clip_on=False,
    )


def _format_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=TEXT)
    axes.set_xlabel("training step")
    axes.set_ylim(0, 1)
    axes.margins(x=0.01)
    axes.yaxis.set_major_locator(MultipleLocator(0.2))
    axes.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.7)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
