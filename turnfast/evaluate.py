"""Rollouts that nothing is learned from: greedy on held-out tasks, or drawn as in training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .chat.base import Bridge
from .config.schema import Config
from .envs import Env, Split, tasks_of
from .envs.load import open_env
from .errors import ConfigError
from .metrics.rollouts import summarise
from .model import load_policy, pick_device
from .parallel.ranks import ALONE, Ranks
from .rollout.groups import rollout
from .run import open_env_chat, open_model_folder
from .rundir.directory import plain_group
from .rundir.jsonl import append_lines, to_strict
from .sampler import Sampler, open_sampler
from .types import Group


def evaluate(
    config: Config,
    env: Env,
    chat: Bridge,
    sampler: Sampler,
    *,
    split: Split = "eval",
    sampled: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, float], list[Group]]:
    """One rollout of each of the first `train.eval_tasks` tasks of a split, greedy unless `sampled`
    (then at `rollout.temperature`); of several ranks each plays a share of them.

    Returns:
        The figures of `metrics.summarise` under `eval/…`, and the rollouts; this rank's own.
    """
    groups = rollout(
        ranks.share(env.tasks(split)[: config.train.eval_tasks]),
        env,
        chat,
        sampler,
        config.rollout,
        max_turns=config.env.max_turns,
        seed=config.train.seed,
        group_size=1,
        temperature=None if sampled else 0.0,
        should_stop=should_stop,
    )
    return summarise(groups, prefix="eval/"), groups


def evaluate_model(
    config: Config, out: Path | None, *, split: Split = "eval", sampled: bool = False
) -> str:
    """Evaluate `model.path` without a run; the figures as one line of JSON.

    Raises:
        ConfigError: the text names the field and the way out.
        RolloutError: more than `rollout.max_error_share` of the rollouts failed.
    """
    env = open_env(config)
    tasks_of(env, split, name=config.env.name)
    if out is not None:
        _check_writable(out)
    with tempfile.TemporaryDirectory(prefix="turnfast-") as scratch:
        folder = open_model_folder(config, env, Path(scratch))
        policy = load_policy(config.model, folder, pick_device(config.train.device))
        chat = open_env_chat(config.model, policy, env)
        sampler = open_sampler(config, policy, chat.stop_ids)
        try:
            figures, groups = evaluate(config, env, chat, sampler, split=split, sampled=sampled)
        finally:
            sampler.close()
    if out is not None:
        _write(out, groups)
    return json.dumps(to_strict(figures)[0])


def _check_writable(out: Path) -> None:
    """Before an hour of rollouts, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None


def _write(out: Path, groups: Sequence[Group]) -> None:
    out.unlink(missing_ok=True)
    lines = enumerate(map(plain_group, groups))
    append_lines(out, ({"step": 0, "group": index, **line} for index, line in lines))
