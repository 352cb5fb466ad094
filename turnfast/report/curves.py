"""The charts of a run, from the lines of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .charts import Chart, Kind, Series
from .scales import Axis, Points, linear_axis

Lines = Sequence[Mapping[str, Any]]
PHASES = ("rollout", "train", "score", "pack", "sync")
MAX_TURNS = 6
RARE = 0.3
"""A turn with fewer than this share of the points of the most frequent turn is drawn as marks."""
NEGLIGIBLE = 0.005
"""Phases below this share of every step are not drawn."""


def curves(lines: Lines) -> list[Chart]:
    """Return the charts for which the run has metrics, in the order of the page."""

    def chart(title: str, note: str, series: Mapping[str, str], kind: Kind = "linear") -> Chart:
        return Chart(title=title, note=note, series=_series(lines, series), kind=kind)

    def by_turn(title: str, note: str, name: str, kind: Kind = "linear") -> Chart:
        return Chart(title=title, note=note, series=_turn_series(lines, name), kind=kind)

    # the value of the policy loss has no meaning, only its gradient has
    has_loss = not any("reward/outcome" in line for line in lines)
    timed = [line for line in lines if line.get("time/step")]
    charts = [
        chart(
            "Exact match",
            "Share of rollouts whose answer equals an accepted one.",
            {"eval/exact_match": "eval", "exact_match": "train"},
            "share",
        ),
        chart(
            "Tool success",
            "Share of tool calls that succeeded, per rollout; 0 for a rollout without calls.",
            {"eval/tool_success": "eval", "tool_success": "train"},
            "share",
        ),
        chart(
            "Reward",
            "Mean per rollout: the outcome reward, and the sum of the turn rewards.",
            {"reward/outcome": "outcome", "reward/turn": "turns"},
        ),
        by_turn("Reward by turn", "Mean over the rollouts that reached the turn.", "reward"),
        by_turn(
            "Advantage standard deviation by turn",
            "Over all trained turns of that index; at 0 all have the same advantage.",
            "advantage_std",
        ),
        by_turn(
            "Turns reached", "Share of rollouts with at least that many turns.", "reached", "share"
        ),
        chart(
            "Loss",
            "Mean negative log-probability of the demonstration tokens.",
            {"loss": "loss"} if has_loss else {},
        ),
        chart(
            "Entropy",
            "Mean per trained token, in nats. Near 0 the policy no longer explores.",
            {"entropy": "entropy"},
        ),
        by_turn("Entropy by turn", "Mean per trained token of the turn, in nats.", "entropy"),
        chart(
            "Log-prob gap",
            "|sampler − trainer| per token. A rise means that their probabilities differ.",
            {"logprob_gap": "mean", "logprob_gap/max": "largest", "sync_gap": "after sync"},
            "log",
        ),
        by_turn(
            "Sampler divergence by turn", "KL(sampler ‖ trainer) per token.", "kl_sampler", "log"
        ),
        by_turn(
            "Update divergence by turn",
            "KL(old ‖ new policy) per token, before the last optimizer step.",
            "kl_old",
            "log",
        ),
        chart("Reference divergence", "KL(policy ‖ reference) per token.", {"kl": "mean"}),
        chart(
            "Critic",
            "Share of the variance of the targets that the values explain.",
            {"explained_variance": "explained variance"},
        ),
        chart(
            "Largest ratio",
            "Largest new/old probability ratio of a token, before clipping.",
            {"ratio/max": "max"},
            "log",
        ),
        chart("Gradient norm", "Before clipping.", {"grad_norm": "norm"}, "log"),
        Chart(
            title="Time per step",
            note="Seconds in each phase.",
            series=_phase_series(timed),
            kind="stacked",
        ),
        Chart(
            title="Throughput",
            note="Tokens per second of the whole step time.",
            series=_rate_series(timed, {"tokens": "in the batch", "tokens_trained": "trained"}),
        ),
        chart(
            "Rollout utilisation",
            "Share of slots in use, of time with the last quarter of the rollouts, and of time in "
            "which all rollouts wait for tools.",
            {
                "rollout/utilisation": "slots in use",
                "rollout/tail": "tail",
                "rollout/tool_wait": "waiting for tools",
            },
            "share",
        ),
        chart(
            "Unused rollouts",
            "Groups with equal rewards give no gradient; failed rollouts are not trained on.",
            {
                "zero_signal_groups": "groups without signal",
                "failed": "failed",
                "truncated": "turns cut at the token limit",
            },
        ),
    ]
    return [chart for chart in charts if chart.series]


def step_axis(lines: Lines) -> Axis:
    """Return the step axis, which all charts share."""
    steps = [line["step"] for line in lines] or [0]
    low, high = min(steps), max(steps)
    # an axis from 0 is easier to read than one from 1
    return linear_axis(0 if low == 1 else low, max(high, low + 1), wanted=5, tight=True, whole=True)


def points_of(lines: Lines, name: str) -> Points:
    """Return (step, value) of one metric, without steps where it is missing or null."""
    return [
        (line["step"], float(line[name]))
        for line in lines
        if isinstance(line.get(name), int | float)
    ]


def _series(lines: Lines, names: Mapping[str, str]) -> tuple[Series, ...]:
    """One series for each metric that has values; `names` maps metrics to their titles."""
    series = []
    for colour, (name, title) in enumerate(names.items(), 1):
        points = points_of(lines, name)
        if name == "sync_gap":  # 0 if sampler and trainer share the model
            points = [(step, gap) for step, gap in points if gap]
        if points:
            dotted = name.startswith("eval/")
            series.append(Series(name=title, points=points, colour=colour, dotted=dotted))
    return tuple(series)


def _turn_series(lines: Lines, name: str) -> tuple[Series, ...]:
    turns = range(1, MAX_TURNS + 1)
    series = _series(lines, {f"{name}/turn_{k}": f"turn {k}" for k in turns})
    if all(s.colour == 1 for s in series):  # needs a second turn
        return ()
    enough = RARE * max(len(s.points) for s in series)
    return tuple(
        s if len(s.points) >= enough else replace(s, dotted=True, line=False) for s in series
    )


def _rate_series(timed: Lines, names: Mapping[str, str]) -> tuple[Series, ...]:
    """Metrics divided by the time of their step."""
    rates = [
        {name: x / line["time/step"] for name in names for _, x in points_of([line], name)}
        for line in timed
    ]
    return _series(
        [{"step": line["step"], **r} for line, r in zip(timed, rates, strict=True)], names
    )


def _phase_series(timed: Lines) -> tuple[Series, ...]:
    """The times of PHASES and the rest of the step as "other", without negligible ones."""
    columns = {p: [float(line.get(f"time/{p}") or 0.0) for line in timed] for p in PHASES}
    phases_s = zip(*columns.values(), strict=True)
    rest_s = [line["time/step"] - sum(t) for line, t in zip(timed, phases_s, strict=True)]
    columns["other"] = [max(0.0, time_s) for time_s in rest_s]
    return tuple(
        Series(
            name=phase,
            points=[(line["step"], time_s) for line, time_s in zip(timed, column, strict=True)],
            colour=colour,
        )
        for colour, (phase, column) in enumerate(columns.items(), 1)
        if any(t > NEGLIGIBLE * line["time/step"] for t, line in zip(column, timed, strict=True))
    )
