"""What a training step spends outside model, loss and generation.

    python bench/overhead.py --model runs/demo/warm-start/model [--recipe demo] [--steps 12]

A recipe is trained for some steps by the real loop, on one thread. Its metrics.jsonl splits every
step into phases that add up to it; of `time/rollout` this script also measures what the sampler's
own calls take. Generation is those calls, `time/train` is model, loss and optimizer. The rest is
overhead: tools, environment, chat and bookkeeping inside the rollout, credit, packing, weight sync,
and logging. Medians over the steps, the first one left out. Writes bench/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step import RESULTS, commit

import turnfast.collect
import turnfast.run
import turnfast.train
from turnfast.metrics import read_metrics
from turnfast.recipe import load_config


class Timed:
    """A sampler whose work is timed; everything else is the engine's own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Any:
        begin = time.perf_counter()
        done = self._engine.step()
        self.seconds += time.perf_counter() - begin
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--model", default="tiny", help="folder; 'tiny' has learned nothing")
    parser.add_argument("--backend", default="auto", choices=["auto", "local", "vllm"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flags = {
        "model.path": options.model,
        "sampler.backend": options.backend,
        "train.steps": str(options.steps),
        "train.eval-every": "0",
        "train.eval-tasks": "1",
        "train.save-every": "0",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    generation, logging = watch()
    with tempfile.TemporaryDirectory() as folder:
        turnfast.train.train(load_config(options.recipe, words), Path(folder) / "run")
        lines = [line for line in read_metrics(Path(folder) / "run") if "time/step" in line]
    result = summarise(lines[1:], generation[1:], logging[1:], options)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def watch() -> tuple[list[float], list[float]]:
    """Seconds in the sampler, and in logging, of each step, filled in as the steps are done."""
    generation: list[float] = []
    logging: list[float] = []
    engines: list[Timed] = []
    make, gather, log = (
        turnfast.run.make_sampler,
        turnfast.collect.gather,
        turnfast.train._log,
    )

    def make_timed(*args: Any, **kwargs: Any) -> Timed:
        engines.append(Timed(make(*args, **kwargs)))
        return engines[-1]

    def gather_timed(*args: Any, **kwargs: Any) -> Any:
        before = engines[-1].seconds
        gathered = gather(*args, **kwargs)
        generation.append(engines[-1].seconds - before)
        return gathered

    def log_timed(*args: Any) -> None:
        begin = time.perf_counter()
        log(*args)
        logging.append(time.perf_counter() - begin)

    turnfast.run.make_sampler = make_timed  # type: ignore[assignment]
    turnfast.collect.gather = gather_timed
    turnfast.train._log = log_timed
    return generation, logging


def summarise(
    lines: list[dict[str, float]],
    generation: list[float],
    logging: list[float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    steps = [
        {
            "generation": sampled,
            "train": line["time/train"],
            "rollout besides generation": line["time/rollout"] - sampled,
            "score": line["time/score"],
            "pack": line["time/pack"],
            "sync": line["time/sync"],
            "other": line["time/other"],
            "log": logged,
        }
        for line, sampled, logged in zip(lines, generation, logging, strict=True)
    ]
    shares = {name: median(step[name] / sum(step.values()) for step in steps) for name in steps[0]}
    work = {"generation", "train"}
    return {
        "command": " ".join(["python bench/overhead.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "commit": commit(),
        "steps": len(steps),
        "step_s": median(sum(step.values()) for step in steps),
        "overhead": median(
            sum(s for name, s in step.items() if name not in work) / sum(step.values())
            for step in steps
        ),
        "shares": shares,
    }


if __name__ == "__main__":
    main()
