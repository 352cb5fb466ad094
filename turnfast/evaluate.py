"""Evaluation: one rollout per task, without training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from .config.schema import Config
from .doctor.checks import check_rollouts
from .envs import Split
from .errors import ConfigError
from .metrics.reduce import Metric, values_of
from .metrics.rollouts import summarise
from .parallel.ranks import ALONE, Ranks
from .rollout.groups import rollout_tasks
from .rollout.setup import RolloutSetup
from .run import open_policy, open_rollouts
from .rundir.directory import plain_group
from .rundir.jsonl import append_lines, to_strict
from .types import Group


def evaluate(
    setup: RolloutSetup,
    num_tasks: int,
    *,
    split: Split = "eval",
    sampled: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Metric], list[Group]]:
    """Roll out the first `num_tasks` tasks of a split once each, divided among the ranks.

    Args:
        sampled: sample at `rollout.temperature` instead of greedily.
    Returns:
        The metrics of `summarise` under `eval/…` and the rollouts, of this rank only.
    """
    temperature = setup.config.temperature if sampled else 0.0
    config = setup.config.model_copy(update={"group_size": 1, "temperature": temperature})
    tasks = ranks.shard(setup.env.tasks(split)[:num_tasks])
    groups = rollout_tasks(replace(setup, config=config), tasks, should_stop=should_stop)
    return summarise(groups, prefix="eval/"), groups


def evaluate_model(
    config: Config, out: Path | None, *, split: Split = "eval", sampled: bool = False
) -> str:
    """Evaluate `model.path`; returns the metrics as one line of JSON.

    Args:
        out: the rollouts are written to this file, as JSON lines.
    Raises:
        ConfigError: names the field and the fix.
        RolloutError: more than `rollout.max_error_share` of the rollouts failed.
    """
    env = check_rollouts(config, split=split)
    if out is not None:
        _check_writable(out)
    with tempfile.TemporaryDirectory(prefix="turnfast-") as scratch:
        policy = open_policy(config, env, Path(scratch))
        setup = open_rollouts(config, policy, env)
        with closing(setup.sampler):
            metrics, groups = evaluate(setup, config.train.eval_tasks, split=split, sampled=sampled)
    if out is not None:
        out.write_text("")
        lines = enumerate(map(plain_group, groups))
        append_lines(out, ({"step": 0, "group": index, **line} for index, line in lines))
    return json.dumps(to_strict(values_of(metrics))[0])


def _check_writable(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None
