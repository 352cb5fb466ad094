"""Train every credit rule from one warm start, on questions with different numbers of turns.

    python bench/learning.py [--rules grpo_or,mt_grpo] [--seeds 0,1,2] [--recipe bench/hops.toml]

Every run is a `turnfast train` process with the same start, budget and environment; only
`credit.rule` and `train.seed` differ, everything else comes from the recipe. Writes
bench/results/hops.json and hops.svg. With --jobs 2 two runs share the cores, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from harness.plots import learning_plot
from harness.provenance import RESULTS, provenance, write

from turnfast.credit import RULES
from turnfast.rundir.directory import read_metrics

HELD_OUT = 512
"""Questions of the final evaluation; the evaluations during training use 128."""
FIGURES = ("eval/tool_success", "eval/exact_match", "eval/turns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Runs of several rules and seeds from one start."""

    recipe: str
    flags: tuple[str, ...]
    runs: Path
    threads: int | None  # per process; None: torch decides
    model: Path  # the start

    def folder(self, rule: str, seed: int) -> Path:
        return self.runs / f"{rule}-{seed}"

    def metrics(self, rule: str, seed: int) -> list[dict]:
        return read_metrics(self.folder(rule, seed))


def main() -> None:
    parser = arguments(
        __doc__,
        recipe="bench/hops.toml",
        rules=tuple(RULES),
        seeds=(0, 1, 2),
        name="hops",
    )
    parser.add_argument("--warm-start", type=Path, help="model folder; created if missing")
    options, flags = parser.parse_known_args()
    rules, seeds = options.rules.split(","), [int(seed) for seed in options.seeds.split(",")]

    study = Study(
        recipe=options.recipe,
        flags=tuple(flags),
        runs=options.runs,
        threads=1 if options.jobs > 1 else None,
        model=options.warm_start or options.runs / "warm-start" / "model",
    )
    if options.warm_start is None:
        warm_start(study)
    with ThreadPoolExecutor(options.jobs) as pool:
        cells = [(rule, seed) for seed in seeds for rule in rules]
        list(pool.map(lambda cell: train(study, *cell), cells))
        scores = pool.map(lambda cell: evaluate_run(study, *cell), cells)
        held_out = dict(zip(cells, scores, strict=True))

    table = {
        rule: {
            **row([study.metrics(rule, seed) for seed in seeds]),
            "held_out/exact_match": _over_seeds([held_out[rule, seed] for seed in seeds]),
        }
        for rule in rules
    }
    first = study.metrics(rules[0], seeds[0])
    record = {
        **provenance(),
        "recipe": options.recipe,
        "seeds": seeds,
        "held_out_questions": HELD_OUT,
        "start": describe_start(study, first),
        "rules": table,
    }
    write(record, options.out)
    paths = {rule: [study.folder(rule, seed) / "metrics.jsonl" for seed in seeds] for rule in rules}
    learning_plot(paths, options.out.with_suffix(".svg"))
    for rule, figures in table.items():
        show(rule, figures)


def arguments(
    text: str, *, recipe: str, rules: Sequence[str], seeds: Sequence[int], name: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--rules", default=",".join(rules))
    parser.add_argument("--seeds", default=",".join(map(str, seeds)))
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one thread each if > 1")
    return parser


def warm_start(study: Study, *, seed: int = 0, threads: int | None = None) -> None:
    """Train the start if it does not exist."""
    if not (study.model / "config.json").exists():
        study.runs.mkdir(parents=True, exist_ok=True)
        _turnfast(
            *("sft", study.recipe, "--run-dir", str(study.model.parent), *study.flags),
            *("--train.seed", str(seed)),
            log=study.runs / "warm-start.log",
            threads=threads,
        )


def train(study: Study, rule: str, seed: int) -> None:
    """Run one training, or continue it; does nothing if it is finished."""
    folder = study.folder(rule, seed)
    if _finished(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder / "held_out.jsonl").unlink(missing_ok=True)
    begin = time.perf_counter()
    _turnfast(
        *("train", study.recipe, "--run-dir", str(folder), "--model.path", str(study.model)),
        *(*study.flags, "--credit.rule", rule, "--train.seed", str(seed)),
        *(("--resume",) if (folder / "checkpoints").exists() else ()),
        log=folder.with_suffix(".log"),
        threads=study.threads,
    )
    print(f"{folder}: {time.perf_counter() - begin:.0f} s", flush=True)


def _finished(folder: Path) -> bool:
    if not (folder / "report.html").exists():  # also written by a stopped run
        return False
    config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    return read_metrics(folder)[-1]["step"] == config["train"]["steps"]


def evaluate_run(study: Study, rule: str, seed: int) -> float:
    """Exact match of a trained model on `HELD_OUT` questions."""
    folder = study.folder(rule, seed)
    out = folder / "held_out.jsonl"
    if not out.exists():
        last = max((folder / "checkpoints").glob("step_*"))
        _turnfast(
            *("eval", study.recipe, "--model.path", str(last), "--out", str(out), *study.flags),
            *("--train.eval-tasks", str(HELD_OUT), "--env.options.eval-tasks", str(HELD_OUT)),
            log=folder / "held_out.log",
            threads=study.threads,
        )
    right = _mean_of(_rollouts(out))
    assert right is not None  # every rollout has this metric
    return right


def _turnfast(*words: str, log: Path, threads: int | None = None) -> None:
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    program = str(Path(sys.executable).with_name("turnfast"))
    with log.open("w", encoding="utf-8") as file:
        subprocess.run([program, *words], check=True, env=environment, stdout=file, stderr=file)


def show(name: str, figures: dict) -> None:
    print(
        f"{name:<18}",
        *(f"{n} {figures[n]['mean']:.3f} ± {figures[n]['spread']:.3f}" for n in FIGURES),
        sep="  ",
    )


def row(runs: list[list[dict]]) -> dict:
    """Last evaluation of every seed, mean over the run, and steps to 80 % exact match."""
    figures: dict = {}
    for name in FIGURES:
        figures[name] = _over_seeds([_evaluations(lines)[-1][name] for lines in runs])
    # without the evaluation of the start
    figures["exact_match_over_run"] = _over_seeds(
        [fmean(e["eval/exact_match"] for e in _evaluations(lines)[1:]) for lines in runs]
    )
    figures["exact_match_by_step"] = {
        step: fmean(e["eval/exact_match"] for lines in runs for e in _at(lines, step))
        for step in (e["step"] for e in _evaluations(runs[0]))
    }
    figures["steps_to_80"] = [
        next((e["step"] for e in _evaluations(lines) if e["eval/exact_match"] >= 0.8), None)
        for lines in runs
    ]
    figures["steps_to_tool"] = [_steps_to_tool(lines) for lines in runs]
    figures["lowest_tool"] = [min(_sampled_tool(lines).values()) for lines in runs]
    times = [line["time/step"] for lines in runs for line in lines if "time/step" in line]
    figures["seconds_per_step"] = fmean(times)
    figures["steps"] = _evaluations(runs[0])[-1]["step"]
    return figures


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "spread": pstdev(values), "seeds": values}


def _sampled_tool(lines: list[dict], window: int = 5) -> dict[int, float]:
    """Tool success of the training rollouts, averaged over the last `window` steps."""
    sampled = [(line["step"], line["tool_success"]) for line in lines if "tool_success" in line]
    return {
        sampled[end - 1][0]: fmean(value for _, value in sampled[end - window : end])
        for end in range(window, len(sampled) + 1)
    }


def _steps_to_tool(lines: list[dict], share: float = 0.8) -> int | None:
    return next((step for step, value in _sampled_tool(lines).items() if value >= share), None)


def _evaluations(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "eval/exact_match" in line]


def _at(lines: list[dict], step: int) -> list[dict]:
    return [line for line in _evaluations(lines) if line["step"] == step]


def describe_start(study: Study, run: list[dict]) -> dict:
    """Describe a start: its greedy evaluation on held-out tasks, and 1,024 sampled rollouts on
    training tasks."""
    drawn = study.runs / "start.jsonl"
    _turnfast(
        *("eval", study.recipe, "--model.path", str(study.model), "--split", "train", "--sampled"),
        *(*study.flags, "--train.eval-tasks", "1024", "--out", str(drawn)),
        log=study.runs / "start.log",
    )
    rollouts = _rollouts(drawn)
    called = [r for r in rollouts if any(turn["tool_calls"] for turn in r["turns"])]
    silent = [r for r in rollouts if r not in called]
    return {
        **{name: _evaluations(run)[0][name] for name in FIGURES},
        "sampled/calls": len(called) / len(rollouts),
        "sampled/calls_that_fail": 1 - (_mean_of(called, "tool_success") or 0.0),
        "sampled/exact_match": _mean_of(rollouts),
        "sampled/exact_match_after_a_call": _mean_of(called),
        "sampled/exact_match_without_a_call": _mean_of(silent),
        "sampled/exact_match_without_a_call_popular": _mean_of(silent, "exact_match_popular"),
        "sampled/exact_match_after_success": _mean_of([r for r in called if r["tool_success"]]),
    }


def _rollouts(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [rollout for line in lines for rollout in json.loads(line)["rollouts"]]


def _mean_of(rollouts: list[dict], name: str = "exact_match") -> float | None:
    """Mean of a metric over the rollouts that have it; None if none has."""
    values = [float({**r["metrics"], **r}[name]) for r in rollouts if name in {**r["metrics"], **r}]
    return fmean(values) if values else None


if __name__ == "__main__":
    main()
