"""Live progress: a rich bar on a terminal, one plain line per step elsewhere, a table at the end.

    with Progress(run_dir, total=300) as progress:
        progress.step(1, {"reward/outcome": 0.31, "tool_success": 0.4, "time/step": 1.6})

What is shown is a function of the metrics alone (`step_figures`, `closing_table`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from ..rundir.jsonl import read_lines
from .changes import before_after
from .numbers import signed

FIGURES = {
    "reward/outcome": ("outcome", "{:.3f}"),
    "reward/turn": ("turn reward", "{:.3f}"),
    "tool_success": ("tool", "{:.2f}"),
    "exact_match": ("exact match", "{:.2f}"),
    "logprob_gap": ("gap", "{:.1e}"),
    "failed": ("failed", "{:.0%}"),
}
"""What a line shows, in this order, under which short name."""

EVALUATION = "eval/"
COLUMNS_PLAIN = 200
"""Width assumed where there is no terminal."""


def step_figures(metrics: Mapping[str, Any], *, width: int = COLUMNS_PLAIN) -> str:
    """The figures of one step on one line, as many as fit.

    >>> step_figures({"reward/outcome": 1.5, "tool_success": 0.5, "time/step": 1.62})
    'outcome 1.500  tool 0.50  1.6 s'
    """
    names = FIGURES if "reward/outcome" in metrics else {"loss": ("loss", "{:.4f}")}
    parts = [
        f"{short} {form.format(metrics[name])}"
        for name, (short, form) in names.items()
        # a share of zero failures is the normal case and not worth its place
        if metrics.get(name) is not None and not (name == "failed" and metrics[name] == 0)
    ]
    if metrics.get("time/step") is not None:
        parts.append(f"{metrics['time/step']:.1f} s")
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop(-2)
    return "  ".join(parts)


def evaluation_figures(metrics: Mapping[str, Any]) -> str:
    """The evaluation on one line; empty when the line has none."""
    found = {
        name.removeprefix(EVALUATION): value
        for name, value in metrics.items()
        if name.startswith(EVALUATION)
    }
    shown = {
        "exact_match": "exact match",
        "tool_success": "tool success",
        "reward/outcome": "outcome",
    }
    parts = [f"{title} {found[k]:.3f}" for k, title in shown.items() if found.get(k) is not None]
    return "  ".join(parts)


def closing_table(lines: Sequence[Mapping[str, Any]], report: Path | None = None) -> str:
    """Before and after, and where the report lies: the last thing a run prints."""
    rows = before_after(lines)
    text = ""
    if rows:
        wide = max(len(row.title) for row in rows)
        head = f"{rows[0].source} at step"
        wide = max(wide, len(head))
        text = f"{head:<{wide}}  {rows[0].step_before:>8}  {rows[0].step_after:>8}\n"
        for row in rows:
            change = signed(row.after - row.before, 3)
            text += f"{row.title:<{wide}}  {row.before:8.3f}  {row.after:8.3f}  {change:>8}\n"
    if report:
        text += f"\nreport  {report}\n" if rows else f"report  {report}\n"
    return text


class View(Protocol):
    """Where progress is shown."""

    def advance(self, step: int, figures: str) -> None: ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None: ...

    @property
    def room(self) -> int:
        """Characters there are for the figures of a step."""
        ...


def open_view(label: str, total: int, *, done: int = 0, stream: TextIO = sys.stdout) -> View:
    """A live bar where the stream is a terminal, plain lines elsewhere."""
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return _Terminal(label, total, done, stream) if terminal else _Plain(label, total, stream)


class Progress:
    """Shows a run under way; a context manager that ends with `closing_table`.

    Args:
        run_dir: where metrics.jsonl and report.html lie; the closing table is made from them.
        total: the last step. done: the steps that were done before (a resumed run).
        label: what the steps are ("train", "warm start").
        stream: standard output when None.
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
        self._run_dir = run_dir
        self._view = open_view(label, total, done=done, stream=stream or sys.stdout)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show one line of metrics.jsonl, be it of training, of evaluation or of both."""
        if any(not name.startswith(EVALUATION) and name != "step" for name in metrics):
            self._view.advance(step, step_figures(metrics, width=self._view.room))
        evaluation = evaluation_figures(metrics)
        if evaluation:
            self.note(f"eval at step {step}: {evaluation}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._view.say(text)

    def finish(self) -> None:
        """Stop the bar and print the closing table."""
        self._view.close()
        metrics, report = self._run_dir / "metrics.jsonl", self._run_dir / "report.html"
        lines = list(read_lines(metrics)) if metrics.exists() else []
        text = closing_table(lines, report if report.exists() else None)
        if text:
            self._view.say("\n" + text.rstrip("\n"))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self._view.close()


class _Plain:
    room = COLUMNS_PLAIN

    def __init__(self, label: str, total: int, stream: TextIO) -> None:
        self._stream, self._label, self._total = stream, label, total

    def advance(self, step: int, figures: str) -> None:
        self.say(f"{self._label} {step:>{len(str(self._total))}}/{self._total}  {figures}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _Terminal:
    def __init__(self, label: str, total: int, done: int, stream: TextIO) -> None:
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True)),
            console=Console(file=stream),
        )
        self._taken = len(label) + 2 * len(str(total)) + 34
        self._task = self._bar.add_task(label, total=total, completed=done, figures="")
        self._bar.start()

    @property
    def room(self) -> int:
        return self._bar.console.width - self._taken

    def advance(self, step: int, figures: str) -> None:
        self._bar.update(self._task, completed=step, figures=figures)

    def say(self, text: str) -> None:
        self._bar.console.print(Text(text))

    def close(self) -> None:
        self._bar.stop()
