"""Progress of a run: a bar on a terminal, one line per step elsewhere, a table at the end.

with Progress(run_dir, total=300) as progress:
    progress.step(1, {"reward/outcome": 0.31, "tool_success": 0.4, "time/step": 1.6})
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from ..rundir.jsonl import read_lines
from .changes import before_after
from .numbers import signed

STEP_METRICS = {
    "reward/outcome": "outcome {:.3f}",
    "reward/turn": "turn reward {:.3f}",
    "tool_success": "tool {:.2f}",
    "exact_match": "exact match {:.2f}",
    "logprob_gap": "log-prob gap {:.1e}",
    "failed": "failed {:.0%}",
    "time/step": "{:.1f} s",
}
SFT_METRICS = {"loss": "loss {:.4f}", "time/step": "{:.1f} s"}
EVAL_METRICS = {
    "eval/exact_match": "exact match {:.3f}",
    "eval/tool_success": "tool success {:.3f}",
    "eval/reward/outcome": "outcome {:.3f}",
}
PLAIN_WIDTH = 200
"""Characters per line without a terminal."""


def step_line(metrics: Mapping[str, Any], *, width: int = PLAIN_WIDTH) -> str:
    """Format the metrics of one step, as many as fit in `width`.

    >>> step_line({"reward/outcome": 1.5, "tool_success": 0.5, "time/step": 1.62})
    'outcome 1.500  tool 0.50  1.6 s'
    """
    # no failures is the normal case
    shown = {**metrics, "failed": metrics.get("failed") or None}
    parts = _format(shown, STEP_METRICS if "reward/outcome" in metrics else SFT_METRICS)
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop(-2)
    return "  ".join(parts)


def closing_table(lines: Sequence[Mapping[str, Any]], report: Path | None = None) -> str:
    """Return the table that a run prints last: first and last metrics, and the report's path."""
    source, changes = before_after(lines)
    rows = [
        (c.title, f"{c.before:.3f}", f"{c.after:.3f}", signed(c.after - c.before, 3))
        for c in changes
    ]
    for first in changes[:1]:
        rows.insert(0, (f"{source} at step", str(first.step_before), str(first.step_after), ""))
    width = max((len(title) for title, *_ in rows), default=0)
    text = "".join(
        f"{title:<{width}}  {before:>8}  {after:>8}  {change:>8}".rstrip() + "\n"
        for title, before, after, change in rows
    )
    if report:
        text += f"\nreport  {report}\n" if rows else f"report  {report}\n"
    return text


class Progress:
    """Shows the progress of a run; a context manager that ends with `closing_table`.

    Args:
        run_dir: the folder of metrics.jsonl and report.html, for the closing table.
        total: the last step.
        done: the steps of earlier runs (with `--resume`).
        label: the kind of steps ("train", "sft").
        stream: standard output if None.
    """

    def __init__(
        self,
        run_dir: Path,
        total: int,
        *,
        done: int = 0,
        label: str = "train",
        stream: TextIO | None = None,
    ) -> None:
        out = stream or sys.stdout
        terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._run_dir = run_dir
        self._view = _Bar(label, total, done, out) if terminal else _Lines(label, total, out)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a training step, of an evaluation or of both."""
        if any(not name.startswith("eval/") and name != "step" for name in metrics):
            self._view.advance(step, step_line(metrics, width=self._view.width))
        evaluation = _format(metrics, EVAL_METRICS)
        if evaluation:
            self.note(f"eval at step {step}: {'  '.join(evaluation)}")

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        self._view.print(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._view.close()
        if kind is not None:
            return
        metrics, report = self._run_dir / "metrics.jsonl", self._run_dir / "report.html"
        lines = list(read_lines(metrics)) if metrics.exists() else []
        text = closing_table(lines, report if report.exists() else None)
        if text:
            self._view.print("\n" + text.rstrip("\n"))


def _format(metrics: Mapping[str, Any], formats: Mapping[str, str]) -> list[str]:
    return [
        text.format(metrics[name])
        for name, text in formats.items()
        if metrics.get(name) is not None
    ]


class _Lines:
    width = PLAIN_WIDTH

    def __init__(self, label: str, total: int, stream: TextIO) -> None:
        self._stream, self._label, self._total = stream, label, total

    def advance(self, step: int, line: str) -> None:
        self.print(f"{self._label} {step:>{len(str(self._total))}}/{self._total}  {line}")

    def print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, label: str, total: int, done: int, stream: TextIO) -> None:
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True)),
            console=Console(file=stream),
        )
        self._other_columns = len(label) + 2 * len(str(total)) + 34
        self._task = self._bar.add_task(label, total=total, completed=done, line="")
        self._bar.start()

    @property
    def width(self) -> int:
        """Characters available for the metrics of a step."""
        return self._bar.console.width - self._other_columns

    def advance(self, step: int, line: str) -> None:
        self._bar.update(self._task, completed=step, line=line)

    def print(self, text: str) -> None:
        self._bar.console.print(Text(text))

    def close(self) -> None:
        self._bar.stop()
