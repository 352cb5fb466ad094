"""The report: one file, untrusted text is never markup, and every run gives a page."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from by_hand import group_of, rollout, turn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from turnfast.config.recipe import build_config
from turnfast.config.schema import Config
from turnfast.credit import assign_credits
from turnfast.errors import ConfigError
from turnfast.metrics.reduce import values_of
from turnfast.metrics.rewards import diagnose
from turnfast.metrics.rollouts import summarise
from turnfast.report import write_report
from turnfast.report.agreement import agreements
from turnfast.report.charts import Chart, Series, draw
from turnfast.report.curves import curves, step_axis
from turnfast.report.page import embed
from turnfast.report.scales import linear_axis, log_axis, smooth, thin
from turnfast.report.trajectories import PAGE_LIMIT, TEXT_LIMIT, clip, read_rollouts, visible
from turnfast.rundir.directory import RunDir, read_metrics
from turnfast.types import Credit, Group, Task, Trajectory

PEOPLE = ("Ida Brandt", "Otto Falk", "Mara Weiss", "Jon Aker", "Selma Rost", "Emil Lind")
WORKS = ("Ulm", "The Salt Road", "Night Ferry", "A House in Arles", "Nine Bridges")


def make_rollout(task: Task, index: int, skill: float, random_: random.Random) -> Trajectory:
    called = random_.random() < 0.3 + 0.7 * skill
    answer = task.answers[0] if random_.random() < 0.9 * skill else random_.choice(PEOPLE)
    search = turn(
        38,
        0.7 if called else 0.0,
        text=f'<tool>{{"name": "search", "args": {{"query": "{task.question}"'
        + ("}}</tool>" if called else ""),
        reply=f"<result>{task.answers[0]}</result>" if called else "<error>not JSON</error>",
        reward_parts={"tool_executed": 0.2 * called, "answer_in_result": 0.5 * called},
        tool_calls=1,
        tool_successes=int(called),
    )
    match = float(answer == task.answers[0])
    failed = random_.random() < 0.02
    return rollout(
        index,
        [
            *[search] * (called or random_.random() < 0.5),
            turn(21, text=f"<answer>{answer}</answer>"),
        ],
        "timeout" if failed else "finished",
        error="tool search: no answer within 10 s" if failed else "",
        outcome=1.5 * match + 0.4,
        outcome_parts={"exact_match": 1.5 * match, "format": 0.4},
        metrics={"exact_match": match},
    )


def make_groups(skill: float, seed: int, count: int = 6) -> list[Group]:
    random_ = random.Random(seed)
    groups = []
    for _ in range(count):
        question, answers = f"Who wrote {random_.choice(WORKS)}?", (random_.choice(PEOPLE),)
        task = Task(id="q", question=question, answers=answers)
        rollouts = tuple(make_rollout(task, i, skill, random_) for i in range(8))
        groups.append(Group(task=task, trajectories=rollouts))
    return groups


def make_run(path: Path, steps: int) -> RunDir:
    """A run as training writes it, with an evaluation every 20 steps."""
    random_ = random.Random(1)
    run = RunDir.create(path, build_config({"train": {"steps": steps, "eval_every": 20}}))
    for step in range(steps + 1):
        skill = 1 / (1 + math.exp(-(step - 0.4 * steps) / (0.08 * steps)))
        if step:
            groups = make_groups(skill, step)
            credits = assign_credits(groups)
            times_s = {
                "rollout": 0.9 - 0.2 * skill + 0.08 * random_.random(),
                "score": 0.01,
                "pack": 0.03 + 0.01 * random_.random(),
                "train": 0.55 + 0.05 * random_.random(),
                "sync": 0.02,
                "other": 0.008,
            }
            metrics = {
                **values_of(summarise(groups, credits)),
                **values_of(diagnose(groups, credits)),
                "loss": random_.gauss(0, 0.02),
                "entropy": 1.1 - 0.8 * skill + random_.gauss(0, 0.04),
                "grad_norm": math.exp(random_.gauss(-1 - skill, 0.4)),
                "ratio/max": 1 + abs(random_.gauss(0, 1e-3)),
                "logprob_gap": 3e-7 * math.exp(random_.gauss(0, 0.3)),
                "logprob_gap/max": 6e-6 * math.exp(random_.gauss(0, 0.3)),
                "sync_gap": 4e-7,
                "tokens": 11_000 + random_.randrange(900),
                "tokens_trained": 2_900 + random_.randrange(300),
                **{f"time/{phase}": time_s for phase, time_s in times_s.items()},
                "time/step": sum(times_s.values()),
            }
            run.log(step, metrics)
            run.log_rollouts(step, groups[:4], credits)
        if step % 20 == 0:
            groups = make_groups(skill, 10_000 + step, count=16)
            run.log(step, values_of(summarise(groups, prefix="eval/")))
            run.log_rollouts(step, groups[:4], split="eval")
    return run


def logged_run(path: Path, *lines: dict) -> RunDir:
    """A run that logged these metrics from step 1 on."""
    run = RunDir.create(path / "run", Config())
    for step, metrics in enumerate(lines, 1):
        run.log(step, metrics)
    return run


def report_of(run: RunDir) -> str:
    return write_report(run.path).read_text(encoding="utf-8")


class Page(HTMLParser):
    """The elements of a page, and the raw text of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == "script":
            self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("runs") / "search-mt", steps=60)


@pytest.fixture(scope="module")
def text(run) -> str:
    return report_of(run)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


# --- a whole run ----------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_only_its_own_script(page, text):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}';" in policy


def test_charts_need_no_script(text):
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", text)
    assert titles == [
        "Exact match", "Tool success", "Reward", "Advantage standard deviation by turn",
        "Turns reached", "Entropy", "Log-prob gap", "Largest ratio", "Gradient norm",
        "Time per step", "Throughput", "Unused rollouts",
    ]  # fmt: skip
    assert text.count("<svg viewBox") >= len(titles)


def test_every_logged_rollout_is_in_the_page_with_rounded_numbers(run, page):
    def rounded(number: str) -> float:
        return float(f"{float(number):.5g}")

    lines = run.rollouts.read_text().splitlines()
    assert len(lines) == 60 * 4 + 4 * 4
    assert page.data["groups"] == [json.loads(line, parse_float=rounded) for line in lines]


def test_before_and_after_are_the_first_and_last_evaluation(run, text):
    values = [
        line["eval/exact_match"] for line in read_metrics(run.path) if "eval/exact_match" in line
    ]
    row = re.search(r"<tr><th>exact match</th>(.*?)</tr>", text)
    assert row and f"<td>{values[0]:.3f}</td><td><b>{values[-1]:.3f}</b></td>" in row[1]


def test_a_reward_that_correlates_negatively_is_a_warning(tmp_path, text):
    lines = [
        {"success_correlation/<b>": -0.4 + 0.05 * (step % 2), "success_correlation/hit": 0.6}
        for step in range(8)
    ]
    run = logged_run(tmp_path, *lines[:2], {**lines[2], "wrong_way": ["<b>"]}, *lines[3:])
    assert [(a.part, a.num_negative, a.negative) for a in agreements(read_metrics(run.path))] == [
        ("<b>", 1, True),
        ("hit", 0, False),
    ]
    warned = report_of(run)
    assert "Negative correlation with success: <b>&lt;b&gt;</b>." in warned
    assert "<td>1 of 8</td>" in warned
    assert "No turn reward correlates negatively" in text
    assert "<tr><th>answer_in_result</th>" in text


def test_faults_are_listed_by_kind_if_there_are_any(tmp_path, text):
    faults = {"fault/judge": 2, "tool_error/timeout": 7}
    faulty = report_of(logged_run(tmp_path, {}, {}, faults, faults))
    assert "<tr><th>fault/judge</th><td><b>4</b></td><td>2</td></tr>" in faulty
    timeouts = faulty.index("<th>tool_error/timeout</th><td><b>14</b>")
    assert timeouts < faulty.index("<th>fault/judge")
    assert 'id="faults"' not in text


@pytest.mark.parametrize(("values", "negative"), [
    ((0.3, -0.5, 0.1, -0.2), False),  # too few steps
    ((-0.3, -0.2, -0.3, -0.2, -0.3), True),
    ((-0.9, 0.8, -0.9, 0.8, -0.3), False),  # not significant
])  # fmt: skip
def test_a_negative_mean_must_be_significant(values, negative):
    lines = [{"step": k, "success_correlation/a": r} for k, r in enumerate(values)]
    assert [a.negative for a in agreements(lines)] == [negative]


# --- untrusted text -------------------------------------------------------------------------------

UNTRUSTED = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]><img src=x onerror=alert(1)>",
    "\"'`&lt;&amp;${1}$name\\u003c",
    "a\x00b\x1b[31mc\r\nd\re",
    "\u202egnp.exe\u2066\u200f\ufeff",
    "\ud800 lone \udfff",
    "שלום مرحبا",
    "\u2028\u2029",
)


def untrusted_run(path: Path, text: str, name: str = "exact_match") -> RunDir:
    values = ((0.5, 0.5), (0.6, 0.7))
    run = logged_run(path, *({name: x, "eval/exact_match": y} for x, y in values))
    turns = [turn(text=text, reply=text, reward_parts={text: 1.0})]
    failed = rollout(0, turns, "error", error=text, metrics={text: 1.0})
    task = Task(id="q", question=text, answers=(text,))
    group = Group(task=task, trajectories=(failed,))
    run.log_rollouts(1, [group], [Credit(rule=text, advantages=((0.5,),))])
    return run


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.characters(exclude_categories=()), max_size=60))
@example(text=UNTRUSTED[0])
@example(text="".join(UNTRUSTED))
def test_untrusted_text_is_never_markup(tmp_path_factory, text):
    plain = untrusted_run(tmp_path_factory.mktemp("plain"), "plain", "note")
    # with a prefix, as names that begin with "fault/" have a table of their own
    run = untrusted_run(tmp_path_factory.mktemp("untrusted"), text, "x" + text)
    expected, page = Page(report_of(plain)), Page(report_of(run))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    assert page.scripts[1:] == expected.scripts[1:]
    (group,) = page.data["groups"]
    shown = visible(text)
    (rollout,) = group["rollouts"]
    assert group["question"] == shown and group["answers"] == [shown]
    assert rollout["error"] == shown and list(rollout["metrics"]) == [shown]
    assert rollout["turns"][0]["text"] == shown and rollout["turns"][0]["reply"] == shown


@given(text=st.text(st.characters(exclude_categories=())))
def test_visible_text_has_no_hidden_or_reordering_characters(text):
    shown = visible(text)
    shown.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown)
    assert visible(shown) == shown


leaves = st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.none()
trees = st.recursive(
    leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(value=trees)
def test_embedded_data_reads_back_and_has_no_markup(value):
    text = embed(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_untrusted_recipe_and_run_name(tmp_path):
    run = RunDir.create(
        tmp_path / "<b>run&amp;",
        build_config({"model": {"path": "</pre><script>alert(1)</script>"}}),
    )
    run.log(1, {"<i>loss": 0.1})
    text = report_of(run)
    assert len(Page(text).scripts) == 2 and "<i>" not in text and "<b>run" not in text
    assert html.escape("</pre><script>alert(1)</script>") in text


def test_a_long_turn_is_clipped(tmp_path):
    page = report_of(untrusted_run(tmp_path, "x" * 1_000_000 + "end"))
    (group,) = Page(page).data["groups"]
    text = group["rollouts"][0]["turns"][0]["text"]
    assert f"{1_000_003 - TEXT_LIMIT:,} characters left out" in text and text.endswith("end")
    assert len(page) < 500_000
    assert clip("x" * TEXT_LIMIT) == "x" * TEXT_LIMIT


def test_too_many_rollouts_are_shown_for_evenly_spaced_steps(tmp_path):
    run = logged_run(tmp_path, {})
    long = [rollout(i, [turn(text="word " * 3_500)]) for i in range(10)]
    for step in range(50):
        run.log_rollouts(step, [group_of(*long)])
    steps = [group["step"] for group in read_rollouts(run.rollouts).groups]
    assert steps[0] == 0 and steps[-1] == 49 and 2 < len(steps) < 50
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 5
    text = report_of(run)
    assert len(text) < 1.1 * PAGE_LIMIT + 200_000
    assert f"{len(steps)} of 50 logged steps" in text


# --- every state of a run -------------------------------------------------------------------------


def test_a_run_without_a_step(tmp_path):
    run = logged_run(tmp_path)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        write_report(run.path)
    run.metrics.touch()
    assert "No step has been logged yet" in report_of(run)


@pytest.mark.parametrize("metrics", [
    {"loss": 0.5}, {"loss": math.nan}, {"reward/outcome": 0.0}, {"exact_match": 1.0},
    {"time/step": 0.0, "tokens": 5}, {"time/step": 1.0}, {"grad_norm": -1.0}, {"tokens": 10**300},
    {"reward/outcome": -1e-320}, {"logprob_gap": 0.0}, {"reward/outcome": 1e300},
])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2])
def test_unusual_values_give_a_page(tmp_path, metrics, steps):
    Page(report_of(logged_run(tmp_path, *[metrics] * steps)))


def test_an_incomplete_line_and_a_damaged_or_missing_recipe_still_give_a_report(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    for path in (run.metrics, run.rollouts):
        path.write_bytes(path.read_bytes()[:-40])
    assert "<h3>Reward</h3>" in report_of(run)
    (run.path / "config.toml").write_text("[train\n")
    assert "[train" in report_of(run)
    (run.path / "config.toml").unlink()
    assert "<h3>Reward</h3>" in report_of(run)


def test_metrics_run_directory_report_and_console_load_no_torch():
    script = (
        "import sys, turnfast.metrics.rewards, turnfast.rundir.directory, turnfast.report.console;"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- charts ---------------------------------------------------------------------------------------

finite = st.floats(-1e12, 1e12).filter(lambda v: v == 0 or abs(v) > 1e-12)


@given(low=finite, high=finite)
def test_an_axis_covers_its_interval_with_few_ticks(low, high):
    low, high = min(low, high), max(low, high)
    if 0 < high - low < 1e-9 * max(abs(low), abs(high)):
        return  # closer than a tick label can tell
    axis = linear_axis(low, high)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low <= low + slack and axis.high >= high - slack
    assert 2 <= len(axis.ticks) <= 9
    assert list(axis.ticks) == sorted(set(axis.ticks))


@given(low=st.floats(1e-12, 1e12), factor=st.floats(1, 1e12))
def test_a_log_axis_covers_its_interval(low, factor):
    axis = log_axis(low, low * factor)
    assert axis.low <= low * 1.0001 and axis.high * 1.0001 >= low * factor
    assert len(axis.ticks) <= 8


@given(values=st.lists(finite, min_size=1, max_size=3000))
def test_thinning_keeps_the_extremes_the_ends_and_the_order(values):
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = thin(points, 100)
    assert len(kept) <= max(102, min(len(points), 100))
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    inner = [v for _, v in points[1:-1]]
    if inner:
        assert max(v for _, v in kept) >= max(inner)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100), width=st.integers(1, 30))
def test_smoothing_stays_within_the_values(values, width):
    points = [(float(i), v) for i, v in enumerate(values)]
    done = smooth(points, width)
    assert [x for x, _ in done] == [x for x, _ in points]
    assert all(min(values) - 1e-6 <= v <= max(values) + 1e-6 for _, v in done)
    assert smooth(points, 1) == points


@given(first=st.integers(0, 10_000), count=st.integers(1, 100_000))
def test_steps_are_whole_numbers(first, count):
    ticks = step_axis([{"step": first}, {"step": first + count}]).ticks
    assert all(tick == round(tick) for tick in ticks)
    assert 2 <= len(ticks) <= 10 and len(set(ticks)) == len(ticks)


def test_tick_labels_are_distinct():
    for low, high in [(0, 1), (1, 1.003), (1, 1.00003), (0, 9000), (-5, 7), (0, 3e6), (99, 101)]:
        axis = linear_axis(low, high)
        labels = [axis.label(tick) for tick in axis.ticks]
        assert len(set(labels)) == len(labels), labels


def chart_of(lines, title: str) -> Chart | None:
    return next((chart for chart in curves(lines) if chart.title == title), None)


def test_reward_by_turn_needs_two_turns():
    lines = [{"step": 1, "reward/turn_1": 0.5}]
    assert chart_of(lines, "Reward by turn") is None
    chart = chart_of([{**lines[0], "reward/turn_2": 0.25}], "Reward by turn")
    assert chart and [series.name for series in chart.series] == ["turn 1", "turn 2"]


def test_a_rare_turn_is_drawn_as_marks():
    lines = [{"step": s, "reward/turn_1": 0.5, "reward/turn_2": 0.1} for s in range(1, 21)]
    for step in (3, 4, 19):
        lines[step - 1]["reward/turn_3"] = 0.9
    (chart,) = curves(lines)
    drawn = draw(chart, step_axis(lines), 0)
    assert 'class="line c2"' in drawn and 'class="line c3"' not in drawn
    (dots,) = re.findall(r'class="dots c3" d="([^"]+)"', drawn)
    assert dots.count("h0") == 3 and 'class="dots c2"' not in drawn


def test_a_warm_start_has_a_loss_chart():
    assert chart_of([{"step": 1, "loss": 5.0}], "Loss")
    assert not chart_of([{"step": 1, "loss": 5.0, "reward/outcome": 1.0}], "Loss")


def test_derived_charts():
    times_s = {"time/rollout": 1.0, "time/train": 2.0, "time/save": 0.5, "time/step": 4.0}
    lines = [{"step": s, "tokens": 10, "sync_gap": 0.0, **times_s} for s in (1, 2)]
    assert {
        chart.title: {series.name: series.points[0][1] for series in chart.series}
        for chart in curves([*lines, {"step": 2, "tokens": 7}])
    } == {
        "Time per step": {"rollout": 1.0, "train": 2.0, "other": 1.0},
        "Throughput": {"in the batch": 2.5},
    }


def test_a_chart_of_one_point_shows_a_dot():
    series = Series(name="a<b", points=[(3.0, 0.5)], colour=1)
    chart = Chart(title="T<", note="", series=(series,), kind="share")
    text = draw(chart, step_axis([{"step": 3}]), 0)
    assert 'class="dots' in text and "T&lt;" in text and "a&lt;b" in text
