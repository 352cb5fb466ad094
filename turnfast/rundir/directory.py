"""The run directory: what a training run leaves behind, and the figures in it.

    runs/search/
      config.toml      the whole recipe the run was started with
      metrics.jsonl    a line per training step and one per evaluation, told apart by the eval/
                       in its names; the truth, every other sink is a copy
      rollouts.jsonl   one group per line: every turn's text, reply, reward and advantage
      checkpoints/     turnfast.checkpoint
      report.html      turnfast.report

Both logs are strict JSON in ASCII. What a step has to say is appended to each at once and the file
closed: a kill loses at most the lines of one step, and the next append or read passes over a torn
one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from ..config.recipe import to_toml
from ..config.schema import Config, ConfigError
from ..types import Credit, Group, Limit, Status, Trajectory
from .jsonl import append_lines, keep_until, read_lines, to_strict
from .sinks import Sink, open_sinks

Metrics = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDir:
    """One run's folder. Make it with `create`; use it as a context manager or `close` it.

    A rank that leaves writing to the first one holds one that is made without `create` and does not
    write: its logs go nowhere.

    >>> with RunDir.create(Path("runs/search"), config) as run:         # doctest: +SKIP
    ...     run.log(0, {"eval/exact_match": 0.04})
    """

    path: Path
    sinks: tuple[Sink, ...] = ()
    writes: bool = True

    @classmethod
    def create(cls, path: Path, config: Config, *, resume: bool = False) -> RunDir:
        """Make the folder and write config.toml.

        With `resume` an earlier run in it is gone on with (call `rewind` with the step of the
        checkpoint it continues from), and a recipe that has changed since is kept beside the new
        one as config.1.toml, config.2.toml, …

        Raises:
            ConfigError: the folder holds a run and `resume` is off, or it cannot be written.
        """
        recipe = path / "config.toml"
        text = to_toml(config) + "\n"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not resume and (recipe.exists() or _traces(path)):
                raise FileExistsError
            if recipe.exists() and recipe.read_text(encoding="utf-8") != text:
                recipe.rename(_free_name(path))
            # "x": of two runs started at the same moment only one gets the folder
            if not recipe.exists():
                with recipe.open("x", encoding="utf-8") as file:
                    file.write(text)
        except FileExistsError:
            if path.is_dir():
                raise ConfigError(
                    f"{path}: this run directory already holds a run; continue it with --resume, "
                    "or give a new one with --run-dir"
                ) from None
            raise ConfigError(
                f"{path}: is a file; give a folder for the run with --run-dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path}: the run directory cannot be written ({error.strerror}); "
                "give another one with --run-dir"
            ) from error
        try:
            plain = config.model_dump(mode="json")
            return cls(path=path, sinks=open_sinks(config.train.sinks, path, plain, resume=resume))
        except ConfigError:
            _forget_empty(path)
            raise

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line. A figure that is not finite is written as null and counted in
        `nonfinite`, so that every reader of JSON can read the file."""
        if not self.writes:
            return
        line, nonfinite = to_strict({"step": step, **metrics})
        if nonfinite:
            line["nonfinite"] = nonfinite
        append_lines(self.metrics, [line])
        for sink in self.sinks:
            sink.log(step, {name: value for name, value in line.items() if name != "step"})

    def log_rollouts(
        self,
        step: int,
        groups: Sequence[Group],
        credits: Sequence[Credit] | None = None,
        *,
        split: Literal["train", "eval"] = "train",
    ) -> None:
        """Append one line per group; without credits the advantages are null."""
        if not self.writes or not groups:
            return
        lines = (
            {
                "step": step,
                "split": split,
                "group": index,
                **plain_group(group, credits[index] if credits else None),
            }
            for index, group in enumerate(groups)
        )
        append_lines(self.rollouts, lines)

    def rewind(self, step: int) -> int:
        """Drop the lines of later steps, which a resumed run is about to write again.

        Args:
            step: the last step that counts; -1 when the run starts over.
        Returns:
            The number of lines dropped from metrics.jsonl.
        """
        if not self.writes:
            return 0
        keep_until(self.rollouts, step)
        return keep_until(self.metrics, step)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        # a run that failed before its first line (no such model, …) must not block the next try
        if kind is not None:
            _forget_empty(self.path)


def summarise(
    groups: Sequence[Group], credits: Sequence[Credit] | None = None, *, prefix: str = ""
) -> dict[str, float]:
    """The figures of one step's rollouts, under the names of metrics.jsonl.

    Means are over the rollouts that did not fail: a fault of the world must not read as a worse
    policy. How many failed stands in `failed` and `status/…`, which are shares of all rollouts.

    Args:
        credits: one per group; without them there is no `zero_signal_groups`.
        prefix: put before every name (`"eval/"`).
    Returns:
        reward/outcome, reward/turn (sum over the turns of a rollout), reward/turn_1 … per turn
        index over the rollouts that got that far, reward_part/…, tool_success, tool_calls, turns,
        truncated (share of turns cut at the token limit), every metric of the environment
        (exact_match, …), failed, status/…, cut/context, cut/length, cut/turns and cut/time (how
        many rollouts were ended by the context, the tokens of a turn, the number of turns or the
        clock, as they were played: `types.Trajectory.limit`), rollouts, tokens_sampled,
        zero_signal_groups (share); and, where there
        are any, fault/environment, fault/reward_raised, … (how many rollouts failed of it) and
        tool_error/raised, tool_error/timeout, … (how many calls ended so, also of failed rollouts).
        A mean over nothing is nan.
    """
    everyone = [trajectory for group in groups for trajectory in group.trajectories]
    whole = [trajectory for trajectory in everyone if not trajectory.failed]
    turns = [turn for trajectory in whole for turn in trajectory.turns]
    statuses = Counter([trajectory.status for trajectory in everyone])
    limits = Counter([trajectory.limit for trajectory in everyone])
    figures = {
        "reward/outcome": _mean([t.outcome for t in whole]),
        "reward/turn": _ratio(math.fsum([turn.reward or 0.0 for turn in turns]), len(whole)),
        **_turn_rewards(whole),
        **_reward_parts(whole),
        "tool_success": _mean([t.tool_success for t in whole]),
        "tool_calls": _ratio(sum([turn.tool_calls for turn in turns]), len(whole)),
        "turns": _ratio(len(turns), len(whole)),
        "truncated": _mean([turn.finish == "length" for turn in turns]),
        **_means([t.metrics for t in whole]),
        "failed": _ratio(len(everyone) - len(whole), len(everyone)),
        **{f"status/{name}": statuses[name] / max(len(everyone), 1) for name in get_args(Status)},
        **{f"cut/{name}": limits[name] for name in get_args(Limit) if name},
        "rollouts": len(everyone),
        "tokens_sampled": sum([len(turn.sampled_ids) for t in everyone for turn in t.turns]),
        **_count_faults(everyone),
    }
    if credits is not None:
        figures["zero_signal_groups"] = _mean([not credit.has_signal for credit in credits])
    return {prefix + name: value for name, value in figures.items()}


def plain_group(group: Group, credit: Credit | None = None) -> dict[str, Any]:
    """One line of rollouts.jsonl; advantages are null without a credit."""
    return {
        "task_id": group.task.id,
        "question": group.task.question,
        "answers": group.task.answers,
        "rule": credit.rule if credit else None,
        "rollouts": [
            _plain_rollout(trajectory, credit.advantages[index] if credit else None)
            for index, trajectory in enumerate(group.trajectories)
        ],
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl (or the one of a run directory), null for what was not finite.

    A last line without its newline is one that a kill cut off; it is left out.

    Raises:
        ConfigError: no such file, or a line that is not a JSON object with a `step`.
    """
    return list(read_lines(path / "metrics.jsonl" if path.is_dir() else path))


def _traces(folder: Path) -> bool:
    return any(
        (folder / name).exists() for name in ("metrics.jsonl", "rollouts.jsonl", "checkpoints")
    )


def _forget_empty(folder: Path) -> None:
    if not _traces(folder):
        (folder / "config.toml").unlink(missing_ok=True)


def _free_name(folder: Path) -> Path:
    number = 1
    while (folder / f"config.{number}.toml").exists():
        number += 1
    return folder / f"config.{number}.toml"


def _plain_rollout(trajectory: Trajectory, advantages: Sequence[float] | None) -> dict[str, Any]:
    return {
        "index": trajectory.index,
        "status": trajectory.status,
        "error": trajectory.error,
        "fault": trajectory.fault,
        "outcome": trajectory.outcome,
        "outcome_parts": trajectory.outcome_parts,
        "metrics": trajectory.metrics,
        "tool_success": trajectory.tool_success,
        "time_s": trajectory.time_s,
        "turns": [
            {
                "text": turn.text,
                "reply": turn.reply,
                "reward": turn.reward,
                "reward_parts": turn.reward_parts,
                # a failed rollout may have turns that no rule gave credit
                "advantage": advantages[k] if advantages and k < len(advantages) else None,
                "finish": turn.finish,
                "tokens": len(turn.sampled_ids),
                "tool_calls": turn.tool_calls,
                "tool_successes": turn.tool_successes,
            }
            for k, turn in enumerate(trajectory.turns)
        ],
    }


def _turn_rewards(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    columns: defaultdict[int, list[float]] = defaultdict(list)
    for trajectory in rollouts:
        for k, turn in enumerate(trajectory.turns, 1):
            if turn.reward is not None:
                columns[k].append(turn.reward)
    return {f"reward/turn_{k}": fmean(rewards) for k, rewards in columns.items()}


def _reward_parts(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """Sums over a rollout, averaged over the rollouts that have the part."""
    parts = [[*[turn.reward_parts for turn in t.turns], t.outcome_parts] for t in rollouts]
    holders = Counter(chain.from_iterable(set().union(*each) for each in parts))
    totals = dict.fromkeys(holders, 0.0)
    for part in chain.from_iterable(parts):
        for name, value in part.items():
            totals[name] += value
    return {f"reward_part/{name}": total / holders[name] for name, total in totals.items()}


def _count_faults(rollouts: Sequence[Trajectory]) -> Counter[str]:
    counts = Counter([f"fault/{t.fault}" for t in rollouts if t.fault])
    for errors in [turn.tool_errors for t in rollouts for turn in t.turns if turn.tool_errors]:
        counts.update({f"tool_error/{kind}": n for kind, n in errors.items()})
    return counts


def _means(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    columns: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            columns[name].append(value)
    return {name: _mean(values) for name, values in columns.items()}


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan
