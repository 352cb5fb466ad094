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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config.recipe import to_toml
from ..config.schema import Config
from ..errors import ConfigError
from ..types import Credit, Group, Trajectory
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
        "status": trajectory.status.value,
        "failed": trajectory.failed,
        "masked": trajectory.masked,
        "error": trajectory.error,
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
