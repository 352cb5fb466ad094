"""The HTML of the report.

Untrusted text reaches the page in two ways: escaped by `html.escape`, or in the JSON data block,
where `<`, `>` and `&` are escaped and from which the script makes text nodes. In addition, the
content security policy of the page allows only its own script, by its hash.
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
    """Return the whole report as HTML."""
    axis = step_axis(lines)
    charts = curves(lines)
    script = _read("browser.js")
    data = {"charts": [hover_data(chart, axis) for chart in charts], "groups": logged.groups}
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
        agreement=_agreement(lines),
        faults=_faults(lines),
        metrics=_metrics(lines),
        logged=text(_logged(logged)),
        recipe=text(recipe_text),
        data=embed(data),
    )


def text(value: str) -> str:
    """Escape untrusted text for HTML."""
    return html.escape(visible(value))


def embed(data: Any) -> str:
    """Return JSON that is safe inside a script element."""
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
        "Credit rule": of("credit", "rule"),
        "Environment": of("env", "name"),
        "Model": of("model", "path"),
        "Seed": of("train", "seed"),
        "Steps": short(len(times)) if times else "",
        "Median step time": duration(times[len(times) // 2]) if times else "",
        "Total step time": duration(sum(times)) if times else "",
        "Rollouts": f"{rollouts:,.0f}" if rollouts else "",
        "Tokens trained": f"{trained:,.0f}" if trained else "",
    }
    return "".join(
        f"<div><dt>{title}</dt><dd>{text(value)}</dd></div>"
        for title, value in facts.items()
        if value
    )


def _changes(lines: Lines) -> str:
    source, changes = before_after(lines)
    if not changes:
        return '<p class="empty">The table of changes needs two measurements.</p>'
    title = "Held-out evaluation" if source == "eval" else "Training rollouts"
    steps = f"step {changes[0].step_before}", f"step {changes[0].step_after}"
    rows = [
        (c.title, f"{c.before:.3f}", f"<b>{c.after:.3f}</b>", _coloured(c.after - c.before, 3))
        for c in changes
    ]
    return _table((title, *steps, "change"), rows, style="changes")


def _agreement(lines: Lines) -> str:
    parts = agreements(lines)
    if not parts:
        return ""
    negative = [f"<b>{text(part.part)}</b>" for part in parts if part.negative]
    verdict = (
        f'<p class="warning">Negative correlation with success: {", ".join(negative)}. Rollouts '
        "with more of this reward succeed less often than others of their group; training on it "
        "lowers success.</p>"
        if negative
        else '<p class="lead">Correlation with success between rollouts of the same task. '
        "No turn reward correlates negatively.</p>"
    )
    head = ("turn reward", "mean", "", "first", "last", "steps significantly below 0")
    rows = [
        (
            text(part.part),
            f"<b>{_coloured(part.mean, 2)}</b>",
            sparkline(part.points),
            signed(part.points[0][1], 2),
            signed(part.points[-1][1], 2),
            f"{part.num_negative} of {len(part.points)}",
        )
        for part in parts
    ]
    return _section("agreement", "Turn rewards and success", verdict + _table(head, rows))


def _faults(lines: Lines) -> str:
    """The table of faults and tool errors by kind; empty for a run without any."""
    counts = {
        name: [count for _, count in points_of(lines, name)]
        for name in _numeric_names(lines)
        if name.removeprefix("eval/").startswith(("fault/", "tool_error/"))
    }
    rows = [
        (text(name), f"<b>{sum(values):,.0f}</b>", str(sum(value > 0 for value in values)))
        for name, values in sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0]))
        if sum(values)
    ]
    if not rows:
        return ""
    lead = (
        '<p class="lead">fault: failed rollouts by cause, not trained on and in no baseline. '
        "tool_error: failed tool calls by cause.</p>"
    )
    return _section("faults", "Faults", lead + _table(("kind", "total", "steps affected"), rows))


def _metrics(lines: Lines) -> str:
    rows = []
    for name in sorted(_numeric_names(lines)):
        points = points_of(lines, name)
        values = [value for _, value in points]
        numbers = (values[0], values[-1], min(values), max(values))
        rows.append((text(name), sparkline(points), *map(short, numbers)))
    return _table(("metric", "", "first", "last", "min", "max"), rows)


def _section(name: str, title: str, body: str) -> str:
    heading = f'<h2 id="{name}">{title}</h2>'
    return f'<section aria-labelledby="{name}">{heading}{body}</section>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, style: str = "metrics") -> str:
    """Cells are HTML; the first one of a row is its heading."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return (
        f'<div class="wide"><table class="{style}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _coloured(value: float, digits: int) -> str:
    sign = "up" if value > 0.0005 else "down" if value < -0.0005 else "same"
    return f'<span class="{sign}">{signed(value, digits)}</span>'


def _numeric_names(lines: Lines) -> Iterable[str]:
    return {
        name
        for line in lines
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }


def _logged(logged: Logged) -> str:
    if not logged.groups:
        return "No rollouts were logged; set train.log_rollouts."
    if logged.steps_shown < logged.steps_logged:
        return (
            f"{logged.steps_shown} of {logged.steps_logged} logged steps, evenly spaced; "
            "rollouts.jsonl has all."
        )
    return "All logged groups, with the advantage of each turn."
