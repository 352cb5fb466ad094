"""Which charts a run gets, from the lines of its metrics.jsonl."""

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
    """The charts whose figures the run has, in the order of the page."""
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
            "Successful calls over attempted ones; a rollout without a call counts as 0.",
            [
                _series(lines, "eval/tool_success", "eval", 1, dotted=True),
                _series(lines, "tool_success", "train", 2, noisy=True),
            ],
            share=True,
        ),
        _chart(
            "Reward",
            "Mean per rollout: the outcome, and the sum over its turns.",
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
            "Spread of advantages by turn",
            "Standard deviation of what each turn was trained with; at 0 a turn learns nothing.",
            _turn_series(lines, "advantage_std"),
        ),
        _chart(
            "Turns reached",
            "Share of rollouts that got as far as the turn.",
            _turn_series(lines, "reached"),
            share=True,
        ),
        _chart(
            "Loss",
            "Mean negative log-probability of the demonstrations' tokens.",
            # of the policy loss only the gradient means something, its value does not
            []
            if _has(lines, "reward/outcome")
            else [_series(lines, "loss", "loss", 1, noisy=True)],
        ),
        _chart(
            "Entropy",
            "Mean per trained token, in nats. A fall towards 0 is the end of exploration.",
            [_series(lines, "entropy", "entropy", 1, noisy=True)],
        ),
        _chart(
            "Entropy by turn",
            "Mean per trained token of the turn, in nats.",
            _turn_series(lines, "entropy"),
        ),
        _chart(
            "Log-prob gap",
            "Sampler against trainer, per token. A rise means that they no longer agree.",
            [
                _series(lines, "logprob_gap", "mean", 1),
                _series(lines, "logprob_gap/max", "largest", 2),
                # 0 where sampler and trainer share their module
                _series(
                    [line for line in lines if line.get("sync_gap")], "sync_gap", "after sync", 3
                ),
            ],
            log=True,
        ),
        _chart(
            "Sampler divergence by turn",
            "KL from what sampled the tokens to what is trained, per token.",
            _turn_series(lines, "kl_sampler"),
            log=True,
        ),
        _chart(
            "Update divergence by turn",
            "KL from the policy before the step to the one before its last update, per token.",
            _turn_series(lines, "kl_old"),
            log=True,
        ),
        _chart(
            "Reference divergence",
            "KL from the policy to its reference, per token.",
            [_series(lines, "kl", "mean", 1, noisy=True)],
        ),
        _chart(
            "Critic",
            "Share of the variance of its targets that the values explain; 0 is a constant guess.",
            [_series(lines, "explained_variance", "explained", 1, noisy=True)],
        ),
        _chart(
            "Largest ratio",
            "New over old probability of one token, before clipping.",
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
            "Tokens per second of the whole step.",
            [
                _rate(lines, "tokens", "in the batch", 1),
                _rate(lines, "tokens_trained", "trained", 2),
            ],
        ),
        _chart(
            "Use of the rollout time",
            "Slots in use; time with the last quarter of the rollouts; all waiting for tools.",
            [
                _series(lines, "rollout/utilisation", "slots in use", 1, noisy=True),
                _series(lines, "rollout/tail", "tail", 2, noisy=True),
                _series(lines, "rollout/tool_wait", "waiting for tools", 3, noisy=True),
            ],
            share=True,
        ),
        _chart(
            "Lost rollouts",
            "Groups whose rewards are all equal teach nothing; failed rollouts are never trained.",
            [
                _series(lines, "zero_signal_groups", "groups without signal", 1, noisy=True),
                _series(lines, "failed", "failed", 2, noisy=True),
                _series(lines, "truncated", "turns cut short", 3, noisy=True),
            ],
        ),
    ]
    return [chart for chart in charts if chart.series]


def step_axis(lines: Lines) -> Axis:
    """The steps of all charts, so that they can be compared by eye."""
    steps = [line["step"] for line in lines] or [0]
    low, high = min(steps), max(steps)
    # a first training step at 1 is read more easily on an axis that starts at 0
    return linear_axis(0 if low == 1 else low, max(high, low + 1), wanted=5, tight=True, whole=True)


def points_of(lines: Lines, name: str) -> Points:
    """(step, value) of one figure, without the steps where it is missing or was not finite."""
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
    # a turn that few steps get to has nothing between them that a line could stand for
    often = max((len(series.points) for series in found if series), default=0)
    marked = [s and replace(s, sparse=len(s.points) < SPARSE_SHARE * often) for s in found]
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
    # phases a run adds (saving, evaluating) are shown with what no phase covered
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
