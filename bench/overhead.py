"""The share of a training step that is neither model, loss nor generation.

    python bench/overhead.py --model runs/demo/warm-start/model [--backends local,vllm]
                             [--recipe demo] [--steps 12]
    python bench/overhead.py --random 6x384 --warm-start 120 --steps 5
    python bench/overhead.py --random 24x896 --steps 4 --rollout.prompts-per-step 2

The script runs the training loop of a recipe for some steps on one thread; other arguments are
recipe fields. metrics.jsonl splits every step into phases. Within `time/rollout` the script also
measures the sampler's calls, which are the generation; `time/train` is model, loss and optimizer.
The rest is overhead: environment, chat and scheduling of the rollouts, credit, packing, weight sync
and logging. The time of the environment lasts until its methods return. Tools may run in threads,
in parallel with the generation.

`--random` creates a model with random weights and the given layers and width. It calls no tool, so
its rollouts are generation only; `--warm-start` first tunes it on the environment's demonstrations.

With `--clock thread` the times are processor times of the loop's thread and of the tools, which do
not depend on the load of the machine. With `--clock wall` tools that run in parallel with the
generation cost nothing. Medians over the steps without the first one. Writes
bench/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness.clocks import CLOCKS
from harness.provenance import RESULTS, provenance, write

import turnfast.rollout.collect
import turnfast.rollout.episode
import turnfast.run
import turnfast.tools.run
import turnfast.train
from turnfast.cli import stop_on_signals
from turnfast.config.recipe import load_config
from turnfast.envs.load import open_env
from turnfast.metrics.stopwatch import Stopwatch
from turnfast.model.tiny import write_tiny_model
from turnfast.rundir.directory import read_metrics
from turnfast.sampler import Request
from turnfast.sft import warm_start

BACKENDS = ("auto", "local", "vllm")


class Watch:
    """Accumulates seconds in sampler, environment, tools and logging for each step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.clear()

    def clear(self) -> None:
        self.sampler = self.answers = self.tools = 0.0
        self.parameters = 0
        self.generation: list[float] = []
        self.environment: list[float] = []
        self.tool_calls: list[float] = []
        self.logging: list[float] = []


class Timed:
    """A sampler whose `submit` and `step` are timed."""

    def __init__(self, engine: Any, watch: Watch) -> None:
        self._engine = engine
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request) -> None:
        self._time(self._engine.submit, request)

    def step(self) -> Any:
        return self._time(self._engine.step)

    def _time(self, call: Callable[..., Any], *args: Any) -> Any:
        begin = self._watch.clock()
        done = call(*args)
        self._watch.sampler += self._watch.clock() - begin
        return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--model", default="tiny", help="model folder, or 'tiny'")
    parser.add_argument("--random", metavar="LAYERSxWIDTH", help="random model instead of --model")
    parser.add_argument("--warm-start", type=int, default=0, help="steps, for --random")
    parser.add_argument("--backends", default="auto", help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    options, fields = parser.parse_known_args()
    backends = options.backends.split(",")
    if unknown := [name for name in backends if name not in BACKENDS]:
        parser.error(f"--backends: {unknown[0]!r} is not one of {', '.join(BACKENDS)}")
    torch.set_num_threads(1)
    seen = Watch(CLOCKS[options.clock])
    watch(seen)
    if options.warm_start and not options.random:
        parser.error("--warm-start requires --random")
    result: dict[str, Any] = {
        **provenance(),
        "clock": options.clock,
        "backends": {},
    }
    with stop_on_signals() as stop, tempfile.TemporaryDirectory() as folder:
        model = made(options, fields, Path(folder)) if options.random else options.model
        for backend in backends:
            seen.clear()
            lines = trained(backend, model, options, fields, stop)
            result["backends"][backend] = summarise(lines, seen, options.clock)
    write(result, options.out)
    print(json.dumps(result, indent=1))


def made(options: argparse.Namespace, fields: Sequence[str], folder: Path) -> Path:
    """Create the random model, and warm-start it if requested."""
    layers, width = map(int, options.random.split("x"))
    corpus = open_env(load_config(options.recipe, fields).env).corpus()  # type: ignore[attr-defined]
    model = write_tiny_model(folder / "random", corpus, seed=0, layers=layers, width=width)
    if not options.warm_start:
        return model
    words = ["--model.path", str(model), "--sft.steps", str(options.warm_start), *fields]
    return warm_start(load_config(options.recipe, words), folder / "tuned")


def trained(
    backend: str,
    model: Path | str,
    options: argparse.Namespace,
    fields: Sequence[str],
    stop: Callable[[], bool],
) -> list[dict[str, float]]:
    """Train and return the lines of metrics.jsonl."""
    flags = {
        "model.path": str(model),
        "sampler.backend": backend,
        "train.steps": str(options.steps),
        "train.eval-every": "0",
        "train.eval-tasks": "1",
        "train.save-every": "0",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        config = load_config(options.recipe, [*words, *fields])
        turnfast.train.train(config, run_dir, should_stop=stop)
        return [line for line in read_metrics(run_dir) if "time/step" in line]


def watch(seen: Watch) -> None:
    """Instrument the training loop."""
    open_sampler, collect, ask, log, call = (
        turnfast.run.open_sampler,
        turnfast.rollout.collect.collect_groups,
        turnfast.rollout.episode.await_call,
        turnfast.train.TrainingLoop.log,
        turnfast.tools.run.call_with_timeout,
    )

    def open_timed(config: Any, policy: Any, *args: Any, **kwargs: Any) -> Timed:
        seen.parameters = sum(p.numel() for p in policy.model.parameters())
        return Timed(open_sampler(config, policy, *args, **kwargs), seen)

    def collect_timed(*args: Any, **kwargs: Any) -> Any:
        before = seen.sampler, seen.tools, seen.answers
        gathered = collect(*args, **kwargs)
        seen.generation.append(seen.sampler - before[0])
        seen.tool_calls.append(seen.tools - before[1])
        seen.environment.append(seen.answers - before[2])
        return gathered

    async def ask_timed(*args: Any, **kwargs: Any) -> Any:
        begin = seen.clock()
        answer = await ask(*args, **kwargs)
        seen.answers += seen.clock() - begin
        return answer

    def log_timed(*args: Any) -> None:
        begin = seen.clock()
        log(*args)
        seen.logging.append(seen.clock() - begin)

    async def call_timed(function: Any, *args: Any, **kwargs: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seen.tools += time.thread_time() - begin

        return await call(timed, *args, **kwargs)

    turnfast.run.open_sampler = open_timed  # type: ignore[assignment]
    turnfast.rollout.collect.collect_groups = collect_timed
    turnfast.rollout.episode.await_call = ask_timed
    turnfast.train.TrainingLoop.log = log_timed  # type: ignore[method-assign]
    turnfast.train.Stopwatch = partial(Stopwatch, clock=seen.clock)  # type: ignore[misc]
    turnfast.tools.run.call_with_timeout = call_timed


def summarise(lines: list[dict[str, float]], seen: Watch, clock: str) -> dict[str, Any]:
    columns = (lines, seen.generation, seen.environment, seen.tool_calls, seen.logging)
    steps = [
        {
            "generation": sampled,
            "train": line["time/train"],
            "environment": answers,
            "rollout besides": line["time/rollout"] - sampled - answers,
            "tools": called if clock == "thread" else 0.0,
            "score": line["time/score"],
            "pack": line["time/pack"],
            "sync": line["time/sync"],
            "other": line["time/other"],
            "log": logged,
        }
        for line, sampled, answers, called, logged in list(zip(*columns, strict=True))[1:]
    ]
    shares = {name: median(step[name] / sum(step.values()) for step in steps) for name in steps[0]}
    work = {"generation", "train"}
    return {
        "parameters": seen.parameters,
        "steps": len(steps),
        "rollouts": median(line["rollouts"] for line in lines[1:]),
        "tool_calls": median(line["tool_calls"] * line["rollouts"] for line in lines[1:]),
        "tokens": median(line["tokens"] for line in lines[1:]),
        "step_s": median(sum(step.values()) for step in steps),
        "tool_s": median(seen.tool_calls[1:]),
        "overhead": median(
            sum(s for name, s in step.items() if name not in work) / sum(step.values())
            for step in steps
        ),
        "shares": shares,
    }


if __name__ == "__main__":
    main()
