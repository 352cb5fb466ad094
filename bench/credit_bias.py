"""Bias of the credit rules for an agent that decides how many turns it takes.

    python bench/credit_bias.py [--seeds 8] [--steps 300]

The policy is a table with one logit per turn: the probability of stopping after it. It is trained
with `assign_credits` and a plain policy gradient. Three worlds differ in the rewards of a turn:

    nothing to gain    1 for the last turn: every length has the same return
    every turn costs   -0.1 per turn: the optimum stops after the first turn
    a late reward      1 for the second turn, -0.1 for each later one: the optimum stops there

A rule without bias leaves the first policy unchanged except for noise, and moves the others to one
and two turns. `tests/test_credit_bias.py` shows the same by exact enumeration.

Writes bench/results/credit_bias.json and credit_bias.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from harness.plots import SETTINGS, STYLES
from harness.provenance import RESULTS, provenance, write
from matplotlib.figure import Figure

from turnfast.credit import assign_credits
from turnfast.types import Group, Status, Task, Trajectory, Turn

LONGEST = 6
START = 0.3  # initial probability of stopping after each turn
GROUPS, SIZE, RATE = 4, 8, 0.3
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "mt_grpo": ("mt_grpo", {}),
    "mt_grpo_unbiased": ("mt_grpo_unbiased", {}),
    'mt_grpo_unbiased, std = "none"': ("mt_grpo_unbiased", {"std": "none"}),
    "return_to_go": ("return_to_go", {}),
}
TASK = Task(id="q", question="")


def free(length: int) -> list[float]:
    return [0.0] * (length - 1) + [1.0]


def costly(length: int) -> list[float]:
    return [-0.1] * length


def late(length: int) -> list[float]:
    return ([0.0, 1.0] + [-0.1] * (LONGEST - 2))[:length]


WORLDS: dict[str, tuple[Callable[[int], list[float]], float | None]] = {
    "nothing to gain": (free, None),
    "every turn costs": (costly, 1.0),
    "a late reward": (late, 2.0),
}
"""The turn rewards of a rollout by its length, and the optimal length."""


@cache
def rollout(world: str, index: int, length: int) -> Trajectory:
    turns = tuple(
        Turn(
            prompt_ids=(0,),
            sampled_ids=(int(k == length - 1),),
            logprobs=(0.0,),
            text="",
            finish="stop",
            reward=reward,
        )
        for k, reward in enumerate(WORLDS[world][0](length))
    )
    return Trajectory(task_id=TASK.id, index=index, turns=turns, status=Status.FINISHED)


def stops(logits: list[float]) -> list[float]:
    """The probability of stopping after each turn; 1 after the last."""
    return [1 / (1 + math.exp(-x)) for x in logits] + [1.0]


def draw_length(chances: list[float], draw: random.Random) -> int:
    return next(k + 1 for k, p in enumerate(chances) if draw.random() < p)


def expected_length(chances: list[float]) -> float:
    """Expected number of turns: sum_k P(turn k is reached)."""
    total, reach = 0.0, 1.0
    for p in chances:
        total += reach
        reach *= 1 - p
    return total


def train(world: str, rule: str, seed: int, steps: int) -> list[float]:
    """The expected number of turns before each step and after the last."""
    draw = random.Random(f"{world}:{seed}")
    logits = [math.log(START / (1 - START))] * (LONGEST - 1)
    curve = [expected_length(stops(logits))]
    for _ in range(steps):
        chances = stops(logits)
        groups = [
            Group(
                task=TASK,
                trajectories=tuple(
                    rollout(world, i, draw_length(chances, draw)) for i in range(SIZE)
                ),
            )
            for _ in range(GROUPS)
        ]
        gradient = [0.0] * LONGEST
        name, chosen = RULES[rule]
        for group, credit in zip(groups, assign_credits(groups, name, **chosen), strict=True):
            for trajectory, row in zip(group.trajectories, credit.advantages, strict=True):
                for k, advantage in enumerate(row):
                    stopped = k == len(trajectory.turns) - 1
                    gradient[k] += advantage * (stopped - chances[k])
        logits = [
            min(max(x + RATE * g / (GROUPS * SIZE), -8.0), 8.0)
            for x, g in zip(logits, gradient, strict=False)
        ]
        curve.append(expected_length(stops(logits)))
    return curve


def plot(curves: dict[str, dict[str, list[list[float]]]], out: Path) -> None:
    """Plot the mean over seeds and the range from minimum to maximum."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        axes = figure.subplots(1, len(curves), sharey=True)
        for axis, (world, by_rule) in zip(axes, curves.items(), strict=True):
            best = WORLDS[world][1]
            start = next(iter(by_rule.values()))[0][0]
            axis.axhline(best or start, color="#7c858f", linewidth=0.8, linestyle="--")
            for (rule, runs), (colour, _) in zip(by_rule.items(), STYLES, strict=False):
                columns = list(zip(*runs, strict=True))[::5]
                steps = range(0, 5 * len(columns), 5)
                axis.plot(steps, [fmean(c) for c in columns], color=colour, label=rule)
                axis.fill_between(
                    steps,
                    [min(c) for c in columns],
                    [max(c) for c in columns],
                    color=colour,
                    alpha=0.18,
                    linewidth=0,
                )
            axis.set_title(world, fontsize=10)
            axis.set_xlabel("step")
            axis.set_ylim(0.8, LONGEST + 0.2)
        axes[0].set_ylabel("turns per rollout")
        axes[-1].legend(frameon=False, fontsize=8.5)
        figure.savefig(out, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "credit_bias.json")
    options = parser.parse_args()
    begin = time.process_time()
    curves = {
        world: {
            rule: [train(world, rule, seed, options.steps) for seed in range(options.seeds)]
            for rule in RULES
        }
        for world in WORLDS
    }
    start = expected_length([START] * (LONGEST - 1) + [1.0])
    record = {
        **provenance(),
        "seeds": options.seeds,
        "steps": options.steps,
        "longest": LONGEST,
        "start": start,
        "time_s": round(time.process_time() - begin, 1),
        "worlds": {
            world: {
                "best": WORLDS[world][1],
                "rules": {
                    rule: {
                        "turns": fmean(run[-1] for run in runs),
                        "least": min(run[-1] for run in runs),
                        "most": max(run[-1] for run in runs),
                    }
                    for rule, runs in by_rule.items()
                },
            }
            for world, by_rule in curves.items()
        },
    }
    write(record, options.out)
    plot(curves, options.out.with_suffix(".svg"))
    print(json.dumps(record["worlds"], indent=1))


if __name__ == "__main__":
    main()
