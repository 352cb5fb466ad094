"""The console output of a run."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnfast.config.schema import Config
from turnfast.report.console import Progress, closing_table, step_line
from turnfast.rundir.directory import RunDir

STEP = {
    "reward/outcome": 1.234, "reward/turn": 0.5, "tool_success": 0.75, "exact_match": 0.5,
    "logprob_gap": 1.2e-6, "failed": 0.0, "loss": 0.01, "time/step": 1.64,
}  # fmt: skip
EVALS = [
    {"step": 0, "eval/exact_match": 0.04, "eval/tool_success": 0.31},
    {"step": 1, **STEP},
    {"step": 2, "eval/exact_match": 0.91, "eval/tool_success": 1.0},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("metrics", "line"), [
    (
        STEP,
        "outcome 1.234  turn reward 0.500  tool 0.75  exact match 0.50  log-prob gap 1.2e-06  1.6 s"
    ),
    ({"reward/outcome": 1.0, "failed": 0.1}, "outcome 1.000  failed 10%"),
    ({"reward/outcome": None, "tool_success": 0.5}, "tool 0.50"),
    ({"loss": 0.5}, "loss 0.5000"),
    ({}, ""),
])  # fmt: skip
def test_the_line_of_a_step(metrics, line):
    assert step_line(metrics) == line


@given(width=st.integers(0, 100))
def test_a_narrow_terminal_shows_fewer_metrics(width):
    text = step_line(STEP, width=width)
    assert text.endswith("1.6 s")
    assert len(text) <= max(width, len("1.6 s"))


def test_the_closing_table_of_evaluations():
    assert closing_table(EVALS, Path("runs/a/report.html")) == (
        "eval at step         0         2\n"
        "exact match      0.040     0.910    +0.870\n"
        "tool success     0.310     1.000    +0.690\n"
        "\n"
        "report  runs/a/report.html\n"
    )


def test_without_evaluations_the_table_is_of_training():
    text = closing_table([{"step": 1, "tool_success": 0.5}, {"step": 9, "tool_success": 0.25}])
    assert "train at step" in text and "\u22120.250" in text
    assert closing_table([{"step": 1, "tool_success": 0.5}]) == ""
    assert closing_table([]) == ""


def show_run(tmp_path, stream) -> str:
    run = RunDir.create(tmp_path / "run", Config())
    with Progress(run.path, 2, stream=stream) as progress:
        for line in EVALS:
            metrics = {name: value for name, value in line.items() if name != "step"}
            run.log(line["step"], metrics)
            progress.step(line["step"], metrics)
        progress.note("[bold]model text is not markup[/bold]")
        (run.path / "report.html").write_text("")
    return stream.getvalue()


def test_plain_lines_without_a_terminal(tmp_path):
    lines = show_run(tmp_path, io.StringIO()).splitlines()
    assert lines[0] == "eval at step 0: exact match 0.040  tool success 0.310"
    assert lines[1].startswith("train 1/2  outcome 1.234")
    assert lines[3] == "[bold]model text is not markup[/bold]"
    assert lines[-1] == f"report  {tmp_path / 'run' / 'report.html'}"
    assert not any("\x1b" in line for line in lines)


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    text = show_run(tmp_path, Terminal())
    assert "\x1b[" in text and "1/2" in text
    assert "[bold]model text" in text
    assert text.rstrip().endswith("report.html")


def test_a_dumb_terminal_shows_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in show_run(tmp_path, Terminal())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_supervised_training_shows_its_loss(tmp_path, stream):
    with Progress(tmp_path, 20, done=3, label="sft", stream=stream) as progress:
        progress.step(20, {"loss": 0.5, "time/step": 0.1})
    assert "20/20" in stream.getvalue() and "loss 0.5000" in stream.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_bar_stays_on_one_line(tmp_path, monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    with Progress(tmp_path, 300, stream=stream) as progress:
        progress.step(150, STEP)
    frames = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", stream.getvalue()).splitlines()
    assert all(len(frame) <= width for text in frames for frame in text.split("\r"))
    assert not any(frame.strip() and "/300" not in frame for frame in frames)


def test_no_table_after_an_error(tmp_path):
    stream = io.StringIO()
    with pytest.raises(KeyError), Progress(tmp_path, 2, stream=stream):
        raise KeyError
    assert stream.getvalue() == ""
