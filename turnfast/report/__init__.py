"""The report of a run: one HTML file that needs no network."""

from __future__ import annotations

import tomllib
from pathlib import Path

from ..errors import ConfigError
from ..rundir.directory import read_metrics
from .page import build_page
from .trajectories import read_rollouts

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from config.toml, metrics.jsonl and rollouts.jsonl.

    Also works during a run and after a kill.

    Raises:
        ConfigError: the folder or metrics.jsonl is missing, or a line of a log is damaged.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such run directory")
    lines = read_metrics(run_dir)
    recipe = run_dir / "config.toml"
    recipe_text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else ""
    try:
        tree = tomllib.loads(recipe_text)
    except tomllib.TOMLDecodeError:
        tree = {}
    page = build_page(
        name=run_dir.resolve().name,
        recipe_text=recipe_text,
        recipe=tree,
        lines=lines,
        logged=read_rollouts(run_dir / "rollouts.jsonl"),
    )
    report = run_dir / "report.html"
    partial = run_dir / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    partial.replace(report)
    return report
