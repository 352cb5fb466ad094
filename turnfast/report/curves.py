"""The charts of a run, from the lines of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .charts import Chart, Series
from .scales import Axis, Points, linear_axis

Lines = Sequence[Mapping[str, Any]]
PHASES = ("rollout", "train", "score", "pack", "sync", "other")
MOST_TURNS = 6
SPARSE_SHARE = 0.3


def curves(lines: Lines) -> list[Chart]:
    """Return the charts for which the run has metrics, in the order of the page."""
    charts = [
        _chart(
            "Exact match",
            "Share of rollouts whose answer equals an accepted one.",
            [
                _series(lines, "eval/exact_match", "eval", 1, dotted=True),
                _series(lines, "exact_match", "train", 2, noisy=True),
            ],
            share=True,
        ),
        _chart(
            "Tool success",
            "Share of tool calls that succeeded, per rollout; 0 for a rollout without calls.",
            [
                _series(lines, "eval/tool_success", "eval", 1, dotted=True),
                _series(lines, "tool_success", "train", 2, noisy=True),
            ],
            share=True,
        ),
        _chart(
            "Reward",
            "Mean per rollout: the outcome reward, and the sum of the turn rewards.",
            [
                _series(lines, "reward/outcome", "outcome", 1, noisy=True),
                _series(lines, "reward/turn", "turns", 2, noisy=True),
            ],
        ),
        _chart(
            "Reward by turn",
            "Mean over the rollouts that reached the turn.",
            _turn_series(lines, "reward"),
        ),
        _chart(
            "Advantage standard deviation by turn",
            "Over all trained turns of that index; at 0 all have the same advantage.",
            _turn_series(lines, "advantage_std"),
        ),
        _chart(
            "Turns reached",
            "Share of rollouts with at least that many turns.",
            _turn_series(lines, "reached"),
            share=True,
        ),
        _chart(
            "Loss",
            "Mean negative log-probability of the demonstration tokens.",
            # the value of the policy loss has no meaning, only its gradient has
            []
            if _has(lines, "reward/outcome")
            else [_series(lines, "loss", "loss", 1, noisy=True)],
        ),
        _chart(
            "Entropy",
            "Mean per trained token, in nats. Near 0 the policy no longer explores.",
            [_series(lines, "entropy", "entropy", 1, noisy=True)],
        ),
        _chart(
            "Entropy by turn",
            "Mean per trained token of the turn, in nats.",
            _turn_series(lines, "entropy"),
        ),
        _chart(
            "Log-prob gap",
            "|sampler − trainer| per token. A rise means that their probabilities differ.",
            [
                _series(lines, "logprob_gap", "mean", 1),
                _series(lines, "logprob_gap/max", "largest", 2),
                # 0 if sampler and trainer share the model
                _series(
                    [line for line in lines if line.get("sync_gap")], "sync_gap", "after sync", 3
                ),
            ],
            log=True,
        ),
        _chart(
            "Sampler divergence by turn",
            "KL(sampler ‖ trainer) per token.",
            _turn_series(lines, "kl_sampler"),
            log=True,
        ),
        _chart(
            "Update divergence by turn",
            "KL(old ‖ new policy) per token, before the last optimizer step.",
            _turn_series(lines, "kl_old"),
            log=True,
        ),
        _chart(
            "Reference divergence",
            "KL(policy ‖ reference) per token.",
            [_series(lines, "kl", "mean", 1, noisy=True)],
        ),
        _chart(
            "Critic",
            "Share of the variance of the targets that the values explain.",
            [_series(lines, "explained_variance", "explained variance", 1, noisy=True)],
        ),
        _chart(
            "Largest ratio",
            "Largest new/old probability ratio of a token, before clipping.",
            [_series(lines, "ratio/max", "max", 1)],
            log=True,
        ),
        _chart(
            "Gradient norm",
            "Before clipping.",
            [_series(lines, "grad_norm", "norm", 1, noisy=True)],
            log=True,
        ),
        _chart("Time per step", "Seconds in each phase.", _time_series(lines), stacked=True),
        _chart(
            "Throughput",
            "Tokens per second of the whole step time.",
            [
                _rate(lines, "tokens", "in the batch", 1),
                _rate(lines, "tokens_trained", "trained", 2),
            ],
        ),
        _chart(
            "Rollout utilisation",
            "Share of slots in use, of time with the last quarter of the rollouts, and of time in "
            "which all rollouts wait for tools.",
            [
                _series(lines, "rollout/utilisation", "slots in use", 1, noisy=True),
                _series(lines, "rollout/tail", "tail", 2, noisy=True),
                _series(lines, "rollout/tool_wait", "waiting for tools", 3, noisy=True),
            ],
            share=True,
        ),
        _chart(
            "Unused rollouts",
            "Groups with equal rewards give no gradient; failed rollouts are not trained on.",
            [
                _series(lines, "zero_signal_groups", "groups without signal", 1, noisy=True),
                _series(lines, "failed", "failed", 2, noisy=True),
                _series(lines, "truncated", "turns cut at the token limit", 3, noisy=True),
            ],
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


def _has(lines: Lines, name: str) -> bool:
    return any(name in line for line in lines)


def _chart(title: str, note: str, series: Iterable[Series | None], **options: bool) -> Chart:
    kept = tuple(s for s in series if s is not None)
    return Chart(title=title, note=note, series=kept, **options)


def _series(
    lines: Lines, name: str, title: str, colour: int, *, noisy: bool = False, dotted: bool = False
) -> Series | None:
    points = points_of(lines, name)
    if not points:
        return None
    return Series(name=title, points=points, colour=colour, noisy=noisy, dotted=dotted)


def _turn_series(lines: Lines, name: str) -> list[Series | None]:
    found = [
        _series(lines, f"{name}/turn_{k}", f"turn {k}", k, noisy=True)
        for k in range(1, MOST_TURNS + 1)
    ]
    # marks instead of a line for a turn that only a few steps reach
    most_points = max((len(series.points) for series in found if series), default=0)
    marked = [s and replace(s, sparse=len(s.points) < SPARSE_SHARE * most_points) for s in found]
    return marked if any(marked[1:]) else []


def _rate(lines: Lines, name: str, title: str, colour: int) -> Series | None:
    timed = [line for line in lines if line.get("time/step")]
    points = [
        (step, count / line["time/step"])
        for line in timed
        for step, count in points_of([line], name)
    ]
    return Series(name=title, points=points, colour=colour, noisy=True) if points else None


def _time_series(lines: Lines) -> list[Series | None]:
    timed = [line for line in lines if line.get("time/step")]
    if not timed:
        return []
    # all phases that are not in PHASES are shown as "other"
    named = [phase for phase in PHASES[:-1] if any(line.get(f"time/{phase}") for line in timed)]
    columns = {p: [float(line.get(f"time/{p}") or 0.0) for line in timed] for p in named}
    rest = [
        max(0.0, line["time/step"] - sum(column[i] for column in columns.values()))
        for i, line in enumerate(timed)
    ]
    if any(value > 0.005 * line["time/step"] for value, line in zip(rest, timed, strict=True)):
        columns["other"] = rest
    return [
        Series(
            name=phase,
            points=[(line["step"], value) for line, value in zip(timed, column, strict=True)],
            colour=PHASES.index(phase) + 1,
        )
        for phase, column in columns.items()
    ]
