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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from turnfast.config.recipe import build_config
from turnfast.config.schema import Config
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
from turnfast.types import Credit, Group, Status, Task, Trajectory, Turn

PEOPLE = ("Ida Brandt", "Otto Falk", "Mara Weiss", "Jon Aker", "Selma Rost", "Emil Lind")
WORKS = ("Ulm", "The Salt Road", "Night Ferry", "A House in Arles", "Nine Bridges")


def make_rollout(task: Task, index: int, skill: float, draw_: random.Random) -> Trajectory:
    called = draw_.random() < 0.3 + 0.7 * skill
    malformed = not called and draw_.random() < 0.5
    right = draw_.random() < 0.9 * skill
    turns = []
    if called or malformed:
        call = '{"name": "search", "args": {"query": "' + task.question[8:-1] + '"}}'
        turns.append(
            Turn(
                prompt_ids=(1,) * 60,
                sampled_ids=(5,) * 38,
                logprobs=(-0.4,) * 38,
                text="<reasoning>I have to look this up.</reasoning>"
                f"<tool>{call[: 30 if malformed else None]}</tool>",
                reply=f"<result>{task.data['fact']}</result>"
                if called
                else "<error>not JSON</error>",
                finish="stop",
                reward=0.7 if called else 0.0,
                reward_parts={"tool_executed": 0.2 * called, "answer_in_result": 0.5 * called},
                tool_calls=1,
                tool_successes=int(called),
            )
        )
    answer = task.answers[0] if right else draw_.choice(PEOPLE)
    turns.append(
        Turn(
            prompt_ids=(1,) * 20,
            sampled_ids=(6,) * 21,
            logprobs=(-0.2,) * 21,
            text=f"<reasoning>The result names {answer}.</reasoning><answer>{answer}</answer>",
            finish="stop",
        )
    )
    match = float(answer == task.answers[0])
    failed = draw_.random() < 0.02
    return Trajectory(
        task_id=task.id,
        index=index,
        turns=tuple(turns),
        status=Status.TIMEOUT if failed else Status.FINISHED,
        error="tool search: no answer within 10 s" if failed else "",
        outcome=1.5 * match + 0.4,
        outcome_parts={"answer_in_text": 0.5 * match, "exact_match": match, "format": 0.4},
        metrics={"exact_match": match},
    )


def make_groups(skill: float, seed: int, count: int = 6) -> tuple[list[Group], list[Credit]]:
    draw_ = random.Random(seed)
    groups, credits = [], []
    for number in range(count):
        work, person = draw_.choice(WORKS), draw_.choice(PEOPLE)
        task = Task(
            id=f"q{seed}-{number}",
            question=f"Who wrote {work}?",
            answers=(person,),
            data={"fact": f"{work} is a novel of 1931 by {person}, a writer from Tromsø."},
        )
        group = Group(
            task=task, trajectories=tuple(make_rollout(task, i, skill, draw_) for i in range(8))
        )
        mean = sum(t.outcome for t in group.trajectories) / 8
        spread = math.sqrt(sum((t.outcome - mean) ** 2 for t in group.trajectories) / 8) + 1e-6
        groups.append(group)
        credits.append(
            Credit(
                rule="mt_grpo",
                advantages=tuple(
                    tuple(
                        (t.outcome - mean) / spread + (0.3 if k == 0 and len(t.turns) > 1 else 0.0)
                        for k in range(len(t.turns))
                    )
                    for t in group.trajectories
                ),
            )
        )
    return groups, credits


def make_run(path: Path, steps: int = 120, eval_every: int = 20) -> RunDir:
    """A run as training writes it, with realistic metrics."""
    draw_ = random.Random(1)
    config = build_config({"train": {"steps": steps, "eval_every": eval_every}})
    run = RunDir.create(path, config)
    for step in range(steps + 1):
        skill = 1 / (1 + math.exp(-(step - 0.4 * steps) / (0.08 * steps)))
        if step:
            groups, credits = make_groups(skill, step)
            times = {
                "time/rollout": 0.9 - 0.2 * skill + 0.08 * draw_.random(),
                "time/score": 0.01,
                "time/pack": 0.03 + 0.01 * draw_.random(),
                "time/train": 0.55 + 0.05 * draw_.random(),
                "time/sync": 0.02,
            }
            other = {"time/other": 0.008}
            metrics = {
                **values_of(summarise(groups, credits)),
                **values_of(diagnose(groups, credits)),
                "loss": draw_.gauss(0, 0.02),
                "entropy": 1.1 - 0.8 * skill + draw_.gauss(0, 0.04),
                "grad_norm": math.exp(draw_.gauss(-1 - skill, 0.4)),
                "ratio/max": 1 + abs(draw_.gauss(0, 1e-3)),
                "logprob_gap": 3e-7 * math.exp(draw_.gauss(0, 0.3)),
                "logprob_gap/max": 6e-6 * math.exp(draw_.gauss(0, 0.3)),
                "sync_gap": 4e-7,
                "tokens": 11_000 + draw_.randrange(900),
                "tokens_trained": 2_900 + draw_.randrange(300),
                "padding": 0.0,
                "shared_prefix": 0.41,
                **times,
                **other,
                "time/step": sum(times.values()) + 0.008,
            }
            run.log(step, metrics)
            run.log_rollouts(step, groups[:4], credits)
        if step % eval_every == 0:
            groups, _ = make_groups(skill, 10_000 + step, count=16)
            run.log(step, values_of(summarise(groups, prefix="eval/")))
            run.log_rollouts(step, groups[:4], split="eval")
    return run


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
def page(run) -> Page:
    return Page(write_report(run.path).read_text(encoding="utf-8"))


# --- a whole run ----------------------------------------------------------------------------------


def test_the_page_loads_nothing(run, page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes)
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_failed_rollouts_of_older_runs_are_recognised(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rollouts = [{"status": "reward_error"}, {"status": "finished"}, {"status": "x", "failed": True}]
    path.write_text(json.dumps({"step": 1, "rollouts": rollouts}) + "\n")
    (group,) = read_rollouts(path).groups
    assert [rollout["failed"] for rollout in group["rollouts"]] == [True, False, True]


def test_the_content_policy_has_the_hash_of_the_script(page):
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in str(policy)


def test_charts_need_no_script(run):
    text = (run.path / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", text)
    assert titles == [
        "Exact match",
        "Tool success",
        "Reward",
        "Advantage standard deviation by turn",
        "Turns reached",
        "Entropy",
        "Log-prob gap",
        "Largest ratio",
        "Gradient norm",
        "Time per step",
        "Throughput",
        "Unused rollouts",
    ]
    assert text.count("<svg viewBox") >= len(titles)


def test_every_logged_turn_is_in_the_page(run, page):
    groups = page.data["groups"]
    assert len(groups) == 60 * 4 + 4 * 4
    first = json.loads(run.rollouts.read_text().splitlines()[0])
    assert groups[0]["question"] == first["question"]
    for shown, logged in zip(groups[0]["rollouts"], first["rollouts"], strict=True):
        assert shown["status"] == logged["status"]
        for turn, source in zip(shown["turns"], logged["turns"], strict=True):
            assert turn["text"] == source["text"] and turn["reply"] == source["reply"]
            assert turn["parts"] == pytest.approx(source["reward_parts"])
            if source["advantage"] is None:
                assert turn["advantage"] is None
            else:
                assert turn["advantage"] == pytest.approx(source["advantage"], rel=1e-4)


def test_before_and_after_are_the_first_and_last_evaluation(run):
    text = (run.path / "report.html").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    evals = [line["eval/exact_match"] for line in lines if "eval/exact_match" in line]
    row = re.search(r"<tr><th>exact match</th>(.*?)</tr>", text)
    assert row and f"<td>{evals[0]:.3f}</td><td><b>{evals[-1]:.3f}</b></td>" in row[1]


def test_a_reward_that_correlates_negatively_is_a_warning(tmp_path):
    run = RunDir.create(tmp_path / "run", Config())
    for step in range(1, 9):
        metrics = {
            "success_correlation/<b>": -0.4 + 0.05 * (step % 2),
            "success_correlation/hit": 0.6,
        }
        run.log(
            step,
            {"reward/outcome": 0.5, **metrics, **({"wrong_way": ["<b>"]} if step == 3 else {})},
        )
    assert [(a.part, a.num_negative, a.negative) for a in agreements(read_metrics(run.path))] == [
        ("<b>", 1, True),
        ("hit", 0, False),
    ]
    text = write_report(run.path).read_text(encoding="utf-8")
    assert (
        "Negative correlation with success: <b>&lt;b&gt;</b>." in text and "<td>1 of 8</td>" in text
    )


def test_without_negative_correlation_there_is_no_warning(run):
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert (
        "No turn reward correlates negatively" in text and "<tr><th>answer_in_result</th>" in text
    )


def test_faults_are_listed_by_kind_if_there_are_any(run, tmp_path):
    faulty = RunDir.create(tmp_path / "run", Config())
    for step in range(1, 5):
        faults = {"fault/judge": 2, "tool_error/timeout": 7} if step > 2 else {}
        faulty.log(step, {"reward/outcome": 0.5, "failed": 0.0, **faults})
    text = write_report(faulty.path).read_text(encoding="utf-8")
    assert "<tr><th>fault/judge</th><td><b>4</b></td><td>2</td></tr>" in text
    assert text.index("<th>tool_error/timeout</th><td><b>14</b>") < text.index("<th>fault/judge")
    assert 'id="faults"' not in write_report(run.path).read_text(encoding="utf-8")


def test_one_negative_step_is_not_significant(tmp_path):
    lines = [{"step": k, "success_correlation/a": r} for k, r in enumerate((0.3, -0.5, 0.1, -0.2))]
    assert [a.negative for a in agreements(lines)] == [False]
    assert agreements([{"step": 1, "loss": 1.0}]) == []


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
    run = RunDir.create(path, Config())
    turn = Turn(
        prompt_ids=(),
        sampled_ids=(1,),
        logprobs=(0.0,),
        text=text,
        finish="stop",
        reply=text,
        reward_parts={text: 1.0},
    )
    trajectory = Trajectory(
        task_id=text,
        index=0,
        turns=(turn,),
        status=Status.ENVIRONMENT_ERROR,
        error=text,
        metrics={text: 1.0},
    )
    task = Task(id=text, question=text, answers=(text,))
    group = Group(task=task, trajectories=(trajectory,))
    run.log(1, {name: 0.5, "eval/exact_match": 0.5})
    run.log(2, {name: 0.6, "eval/exact_match": 0.7})
    run.log_rollouts(1, [group], [Credit(rule=text, advantages=((0.5,),))])
    return run


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.characters(exclude_categories=()), max_size=60))
@example(text=UNTRUSTED[0])
@example(text="".join(UNTRUSTED))
def test_untrusted_text_is_never_markup(tmp_path_factory, text):
    plain = untrusted_run(tmp_path_factory.mktemp("plain") / "run", "plain", "note")
    # with a prefix, as names that begin with "fault/" have a table of their own
    run = untrusted_run(tmp_path_factory.mktemp("untrusted") / "run", text, "x" + text)
    expected = Page(write_report(plain.path).read_text(encoding="utf-8"))
    page = Page(write_report(run.path).read_text(encoding="utf-8"))
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
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


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
    text = write_report(run.path).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 2 and "<i>" not in text and "<b>run" not in text
    assert html.escape("</pre><script>alert(1)</script>") in text


def test_a_long_turn_is_clipped(tmp_path):
    run = untrusted_run(tmp_path / "run", "x" * 1_000_000 + "end")
    path = write_report(run.path)
    text = Page(path.read_text(encoding="utf-8")).data["groups"][0]["rollouts"][0]["turns"][0][
        "text"
    ]
    assert f"{1_000_003 - TEXT_LIMIT:,} characters left out" in text and text.endswith("end")
    assert path.stat().st_size < 500_000
    assert clip("x" * TEXT_LIMIT) == "x" * TEXT_LIMIT


def test_too_many_rollouts_are_shown_for_evenly_spaced_steps(tmp_path):
    run = RunDir.create(tmp_path / "run", Config())
    run.log(1, {})
    text = "word " * 3_500
    line = {"split": "train", "question": "?", "rollouts": [{"turns": [{"text": text}]}] * 10}
    with run.rollouts.open("w") as file:
        for step in range(100):
            file.write(json.dumps({"step": step, **line}) + "\n")
    logged = read_rollouts(run.rollouts)
    steps = [group["step"] for group in logged.groups]
    assert steps[0] == 0 and steps[-1] == 99 and 2 < len(steps) < 100
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 5
    assert write_report(run.path).stat().st_size < 1.1 * PAGE_LIMIT + 200_000
    assert f"{len(steps)} of 100 logged steps" in (run.path / "report.html").read_text()


# --- every state of a run -------------------------------------------------------------------------


def test_a_run_without_a_step(tmp_path):
    run = RunDir.create(tmp_path / "run", Config())
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        write_report(run.path)
    run.metrics.touch()
    assert "No step has been logged yet" in write_report(run.path).read_text()


@pytest.mark.parametrize("metrics", [
    {"loss": 0.5}, {"loss": math.nan}, {"reward/outcome": 0.0}, {"exact_match": 1.0},
    {"time/step": 0.0, "tokens": 5}, {"time/step": 1.0}, {"grad_norm": -1.0}, {"tokens": 10**300},
    {"reward/outcome": -1e-320}, {"logprob_gap": 0.0}, {"reward/outcome": 1e300},
])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 2])
def test_unusual_values_give_a_page(tmp_path, metrics, steps):
    run = RunDir.create(tmp_path / "run", Config())
    for step in range(1, steps + 1):
        run.log(step, metrics)
    Page(write_report(run.path).read_text(encoding="utf-8"))


def test_a_warm_start_has_a_loss_chart(tmp_path):
    run = RunDir.create(tmp_path / "run", Config())
    for step in (1, 2):
        run.log(step, {"loss": 5.0 / step, "grad_norm": 1.0})
    assert "<h3>Loss</h3>" in write_report(run.path).read_text()


def test_a_run_killed_while_writing_a_line(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    for path in (run.metrics, run.rollouts):
        path.write_bytes(path.read_bytes()[:-40])
    assert write_report(run.path).exists()


def test_a_missing_or_damaged_recipe_still_gives_a_report(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    (run.path / "config.toml").write_text("[train\n")
    write_report(run.path)
    (run.path / "config.toml").unlink()
    write_report(run.path)


def test_rollouts_of_another_shape_are_shown_as_far_as_possible(tmp_path):
    run = RunDir.create(tmp_path / "run", Config())
    run.log(1, {"loss": 1.0})
    odd = [
        {"step": 1},
        {"step": 1, "rollouts": [{}, 5, {"turns": [None, {"reward_parts": [1], "text": 7}]}]},
        {"step": 2, "rollouts": {"a": 1}, "answers": "x", "question": None},
    ]
    run.rollouts.write_text("".join(json.dumps(line) + "\n" for line in odd))
    groups = Page(write_report(run.path).read_text(encoding="utf-8")).data["groups"]
    assert len(groups) == 3 and groups[1]["rollouts"][1]["turns"][0]["text"] == "7"


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


def test_reward_by_turn_needs_two_turns():
    lines = [{"step": 1, "reward/turn_1": 0.5}]
    assert "Reward by turn" not in [chart.title for chart in curves(lines)]
    lines[0]["reward/turn_2"] = 0.25
    (chart,) = [chart for chart in curves(lines) if chart.title == "Reward by turn"]
    assert [series.name for series in chart.series] == ["turn 1", "turn 2"]


def test_a_rare_turn_is_drawn_as_marks():
    lines = [{"step": s, "reward/turn_1": 0.5, "reward/turn_2": 0.1} for s in range(1, 21)]
    for step in (3, 4, 19):
        lines[step - 1]["reward/turn_3"] = 0.9
    (chart,) = curves(lines)
    assert [series.sparse for series in chart.series] == [False, False, True]
    drawn = draw(chart, step_axis(lines), 0)
    assert 'class="line c2"' in drawn and 'class="line c3"' not in drawn
    assert re.search(r'class="dots c3" d="([^"]+)"', drawn)[1].count("h0") == 3


def test_phases_add_up_to_the_step():
    lines = [
        {"step": s, "time/rollout": 1.0, "time/train": 2.0, "time/save": 0.5, "time/step": 3.6}
        for s in (1, 2)
    ]
    (chart,) = [c for c in curves(lines) if c.title == "Time per step"]
    assert {s.name: round(s.points[0][1], 6) for s in chart.series} == {
        "rollout": 1.0,
        "train": 2.0,
        "other": 0.6,
    }


def test_a_chart_of_one_point_shows_a_dot():
    series = Series(name="a<b", points=[(3.0, 0.5)], colour=1)
    text = draw(
        Chart(title="T<", note="", series=(series,), share=True), step_axis([{"step": 3}]), 0
    )
    assert 'class="dots' in text and "T&lt;" in text and "a&lt;b" in text
