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
    rows = before_after(lines)
    if not rows:
        return '<p class="empty">The table of changes needs two measurements.</p>'
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
    negative = [f"<b>{text(part.part)}</b>" for part in parts if part.negative]
    verdict = (
        f'<p class="warning">Negative correlation with success: {", ".join(negative)}. Rollouts '
        "with more of this reward succeed less often than others of their group; training on it "
        "lowers success.</p>"
        if negative
        else '<p class="lead">Correlation with success between rollouts of the same task. '
        "No turn reward correlates negatively.</p>"
    )
    head = (
        "<thead><tr><th>turn reward</th><th>mean</th><th></th><th>first</th>"
        "<th>last</th><th>steps significantly below 0</th></tr></thead>"
    )
    body = "".join(
        f"<tr><th>{text(part.part)}</th>"
        f'<td class="{_sign(part.mean)}"><b>{signed(part.mean, 2)}</b></td>'
        f"<td>{sparkline(part.points)}</td>"
        f"<td>{signed(part.points[0][1], 2)}</td><td>{signed(part.points[-1][1], 2)}</td>"
        f"<td>{part.num_negative} of {len(part.points)}</td></tr>"
        for part in parts
    )
    return (
        '<section aria-labelledby="agreement"><h2 id="agreement">Turn rewards and success</h2>'
        f'{verdict}<div class="wide"><table class="metrics">{head}<tbody>{body}</tbody></table>'
        "</div></section>\n"
    )


def _faults(lines: Lines) -> str:
    """The table of faults and tool errors by kind; empty for a run without any."""
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
    head = "<thead><tr><th>kind</th><th>total</th><th>steps affected</th></tr></thead>"
    return (
        '<section aria-labelledby="faults"><h2 id="faults">Faults</h2>'
        '<p class="lead">fault: failed rollouts by cause, not trained on and in no baseline. '
        "tool_error: failed tool calls by cause.</p>"
        f'<div class="wide"><table class="metrics">{head}<tbody>{rows}</tbody></table></div>'
        "</section>\n"
    )


def _sign(value: float) -> str:
    return "up" if value > 0.0005 else "down" if value < -0.0005 else "same"


def _metrics(lines: Lines) -> str:
    rows = "".join(
        _metric_row(name, points_of(lines, name)) for name in sorted(_numeric_names(lines))
    )
    head = "<th>metric</th><th></th><th>first</th><th>last</th><th>min</th><th>max</th>"
    return f"<table class='metrics'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _metric_row(name: str, points: list[tuple[float, float]]) -> str:
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


def _logged(logged: Logged) -> str:
    if not logged.groups:
        return "No rollouts were logged; set train.log_rollouts."
    if logged.steps_shown < logged.steps_logged:
        return (
            f"{logged.steps_shown} of {logged.steps_logged} logged steps, evenly spaced; "
            "rollouts.jsonl has all."
        )
    return "All logged groups, with the advantage of each turn."
