"""The report's page, put together from a run's data: one file, no network, no markup from text.

Text from outside reaches the page in two ways only: escaped by `html.escape`, or inside the JSON
data block, where `<`, `>` and `&` are written as escapes and which the script turns into text
nodes. As a second wall, the page's content policy allows this one script by its hash, nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from .agreement import agreements
from .changes import before_after
from .charts import draw, hover_data, sparkline
from .curves import curves, points_of, step_axis
from .numbers import duration, short, signed
from .trajectories import Logged, visible

Lines = Sequence[Mapping[str, Any]]


def build_page(
    *, name: str, recipe_text: str, recipe: Mapping[str, Any], lines: Lines, logged: Logged
) -> str:
    """The whole report as HTML."""
    axis = step_axis(lines)
    charts = curves(lines)
    script = _read("browser.js")
    data = {
        "charts": [hover_data(chart, axis) for chart in charts],
        "groups": logged.groups,
    }
    return Template(_read("page.html")).substitute(
        title=text(f"{name} · turnfast"),
        name=text(name),
        style=_read("style.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=_facts(recipe, lines),
        changes=_changes(lines),
        charts="".join(draw(chart, axis, i) for i, chart in enumerate(charts))
        or '<p class="empty">No step has been logged yet.</p>',
        diagnosis=_agreement(lines) + _faults(lines),
        figures=_figures(lines),
        shown=text(_shown(logged)),
        recipe=text(recipe_text),
        data=embed(data),
    )


def text(value: str) -> str:
    """Text of the page, whatever it says."""
    return html.escape(visible(value))


def embed(data: Any) -> str:
    """JSON that no parser of HTML can be led out of."""
    document = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return document.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})


def _read(name: str) -> str:
    return resources.files("turnfast.report").joinpath(name).read_text(encoding="utf-8")


def _facts(recipe: Mapping[str, Any], lines: Lines) -> str:
    def of(section: str, field: str) -> str:
        return str(recipe.get(section, {}).get(field, ""))

    times = sorted(value for _, value in points_of(lines, "time/step"))
    trained = sum(value for _, value in points_of(lines, "tokens_trained"))
    rollouts = sum(value for _, value in points_of(lines, "rollouts"))
    facts = {
        "Credit": of("credit", "rule"),
        "Environment": of("env", "name"),
        "Model": of("model", "path"),
        "Seed": of("train", "seed"),
        "Steps": short(len(times)) if times else "",
        "Step, median": duration(times[len(times) // 2]) if times else "",
        "All steps": duration(sum(times)) if times else "",
        "Rollouts": f"{rollouts:,.0f}" if rollouts else "",
        "Tokens trained": f"{trained:,.0f}" if trained else "",
    }
    return "".join(
        f"<div><dt>{title}</dt><dd>{text(value)}</dd></div>"
        for title, value in facts.items()
        if value
    )


def _changes(lines: Lines) -> str:
    rows = before_after(lines)
    if not rows:
        return '<p class="empty">Before and after: not yet measured twice.</p>'
    source = "Held-out evaluation" if rows[0].source == "eval" else "Training rollouts"
    head = (
        f"<thead><tr><th>{source}</th><th>step {rows[0].step_before}</th>"
        f"<th>step {rows[0].step_after}</th><th>change</th></tr></thead>"
    )
    body = "".join(
        f"<tr><th>{row.title}</th><td>{row.before:.3f}</td><td><b>{row.after:.3f}</b></td>"
        f'<td class="{_sign(row.after - row.before)}">{signed(row.after - row.before, 3)}</td></tr>'
        for row in rows
    )
    return f'<table class="changes">{head}<tbody>{body}</tbody></table>'


def _agreement(lines: Lines) -> str:
    parts = agreements(lines)
    if not parts:
        return ""
    wrong = [f"<b>{text(part.part)}</b>" for part in parts if part.wrong]
    verdict = (
        f'<p class="warning">{", ".join(wrong)} {"points" if len(wrong) == 1 else "point"} the '
        "wrong way: rollouts that got more of it succeeded less often than others of their group. "
        "Training on it unlearns the task.</p>"
        if wrong
        else '<p class="lead">Correlation within groups, between rollouts of one task. '
        "None points the wrong way.</p>"
    )
    head = (
        "<thead><tr><th>part of the turn rewards</th><th>mean</th><th></th><th>first</th>"
        "<th>last</th><th>steps below 0 beyond chance</th></tr></thead>"
    )
    body = "".join(
        f"<tr><th>{text(part.part)}</th>"
        f'<td class="{_sign(part.mean)}"><b>{signed(part.mean, 2)}</b></td>'
        f"<td>{sparkline(part.points)}</td>"
        f"<td>{signed(part.points[0][1], 2)}</td><td>{signed(part.points[-1][1], 2)}</td>"
        f"<td>{part.named} of {len(part.points)}</td></tr>"
        for part in parts
    )
    return (
        '<section aria-labelledby="agreement"><h2 id="agreement">Turn rewards and success</h2>'
        f'{verdict}<div class="wide"><table class="figures">{head}<tbody>{body}</tbody></table>'
        "</div></section>\n"
    )


def _faults(lines: Lines) -> str:
    """What went wrong outside of the policy, by kind; "" for a run in which nothing did."""
    kinds = {
        name
        for name in _numeric_names(lines)
        if name.removeprefix("eval/").startswith(("fault/", "tool_error/"))
    }
    counts = {name: [count for _, count in points_of(lines, name)] for name in kinds}
    found = {name: values for name, values in counts.items() if sum(values)}
    if not found:
        return ""
    rows = "".join(
        f"<tr><th>{text(name)}</th><td><b>{sum(values):,.0f}</b></td>"
        f"<td>{sum(value > 0 for value in values)}</td></tr>"
        for name, values in sorted(found.items(), key=lambda item: (-sum(item[1]), item[0]))
    )
    head = "<thead><tr><th>kind</th><th>in the whole run</th><th>steps with any</th></tr></thead>"
    return (
        '<section aria-labelledby="faults"><h2 id="faults">Faults</h2>'
        '<p class="lead">Rollouts that failed of something that is not the policy\'s, which are '
        "neither trained on nor part of a baseline, and calls that ended in an error.</p>"
        f'<div class="wide"><table class="figures">{head}<tbody>{rows}</tbody></table></div>'
        "</section>\n"
    )


def _sign(value: float) -> str:
    return "up" if value > 0.0005 else "down" if value < -0.0005 else "same"


def _figures(lines: Lines) -> str:
    rows = "".join(_figure(name, points_of(lines, name)) for name in sorted(_numeric_names(lines)))
    head = "<th>figure</th><th></th><th>first</th><th>last</th><th>least</th><th>most</th>"
    return f"<table class='figures'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _figure(name: str, points: list[tuple[float, float]]) -> str:
    values = [value for _, value in points]
    cells = (values[0], values[-1], min(values), max(values))
    return (
        f"<tr><th>{text(name)}</th><td>{sparkline(points)}</td>"
        + "".join(f"<td>{short(value)}</td>" for value in cells)
        + "</tr>"
    )


def _numeric_names(lines: Lines) -> Iterable[str]:
    return {
        name
        for line in lines
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }


def _shown(logged: Logged) -> str:
    if not logged.groups:
        return "No rollouts have been logged (train.log_rollouts)."
    if logged.steps_shown < logged.steps_logged:
        return (
            f"{logged.steps_shown} of {logged.steps_logged} logged steps, evenly spread; "
            "rollouts.jsonl has all of them."
        )
    return "Every logged group. Advantages are what each turn was trained with."
