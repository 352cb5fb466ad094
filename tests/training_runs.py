"""Training runs in the letters environment, and their outputs that must be reproducible."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from turnfast.config.recipe import build_config
from turnfast.config.schema import Config
from turnfast.rundir.directory import read_metrics

LETTERS = {
    "env": {"name": "letters:Letters", "max_turns": 2},
    "rollout": {
        "prompts_per_step": 2,
        "group_size": 3,
        "max_new_tokens": 8,
        "max_context": 96,
    },
    "sampler": {"backend": "local"},
    "optim": {"lr": 1e-2, "warmup_steps": 0, "grad_clip": 1.0},
    "train": {
        "steps": 4,
        "eval_every": 2,
        "eval_tasks": 2,
        "save_every": 2,
        "tokens_per_microbatch": 128,
        "device": "cpu",
    },
}


def recipe(model: Path | str, base: dict = LETTERS, **changed: object) -> Config:
    """The base recipe with changed fields: `train__steps=2` sets `train.steps`."""
    tree = {section: dict(fields) for section, fields in base.items()}
    tree["model"] = {"path": str(model), **tree.get("model", {})}
    for name, value in changed.items():
        section, field = name.split("__")
        tree.setdefault(section, {})[field] = value
    return build_config(tree)


def stop_after(count: int) -> Callable[[], bool]:
    """A `should_stop` that is true after `count` calls."""
    calls = iter(range(count))
    return lambda: next(calls, None) is None


def training_lines(run_dir: Path) -> list[dict]:
    """The lines of the training steps in metrics.jsonl, without those of evaluations."""
    return [line for line in read_metrics(run_dir) if "loss" in line]


def weights(run_dir: Path, step: int) -> str:
    """The hashes of the model and the optimizer of a checkpoint."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    names = ("model.safetensors", "trainer/optimizer.safetensors")
    return "".join(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names)


def logged(run_dir: Path) -> list:
    """All lines of metrics.jsonl and rollouts.jsonl, without times."""
    files = [run_dir / "metrics.jsonl", run_dir / "rollouts.jsonl"]
    return [_without_times([json.loads(line) for line in file.open()]) for file in files]


def _without_times(node):
    if isinstance(node, dict):
        return {
            key: _without_times(value)
            for key, value in node.items()
            if not key.startswith(("time/", "rollout/")) and key != "time_s"
        }
    return [_without_times(value) for value in node] if isinstance(node, list) else node
