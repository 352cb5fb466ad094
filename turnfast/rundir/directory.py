"""The run directory and its logs.

    runs/search/
      config.toml      the whole recipe of the run
      metrics.jsonl    one line per training step and one per evaluation (names under eval/);
                       other sinks are copies of it
      rollouts.jsonl   one group per line: text, reply, reward and advantage of every turn
      checkpoints/     see `rundir.checkpoint`
      report.html      see `report`

All lines of a step are appended at once: a kill loses at most the lines of one step.
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

RUN_FILES = ("metrics.jsonl", "rollouts.jsonl", "checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDir:
    """The folder of one run. Open it with `create`; it is a context manager.

    With `writes=False` (ranks other than the first) nothing is written.

    >>> with RunDir.create(Path("runs/search"), config) as run:         # doctest: +SKIP
    ...     run.log(0, {"eval/exact_match": 0.04})
    """

    path: Path
    sinks: tuple[Sink, ...] = ()
    writes: bool = True

    @classmethod
    def create(cls, path: Path, config: Config, *, resume: bool = False) -> RunDir:
        """Create the folder and write config.toml.

        With `resume` the folder may contain a run. If its recipe differs, it is renamed to
        config.1.toml, config.2.toml, … Call `rewind` with the step of the checkpoint that the run
        continues from.

        Raises:
            ConfigError: the folder contains a run and `resume` is off, or it cannot be written.
        """
        recipe = path / "config.toml"
        text = to_toml(config) + "\n"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not resume and (recipe.exists() or _contains_run(path)):
                raise FileExistsError
            if recipe.exists() and recipe.read_text(encoding="utf-8") != text:
                recipe.rename(_free_name(path))
            # "x": of two runs started at the same time only one gets the folder
            if not recipe.exists():
                with recipe.open("x", encoding="utf-8") as file:
                    file.write(text)
        except FileExistsError:
            if path.is_dir():
                raise ConfigError(
                    f"{path}: the directory already contains a run; continue it with --resume or "
                    "choose another one with --run-dir"
                ) from None
            raise ConfigError(f"{path}: is a file; choose a folder with --run-dir") from None
        except OSError as error:
            raise ConfigError(
                f"{path}: the run directory cannot be written ({error.strerror}); "
                "choose another one with --run-dir"
            ) from error
        try:
            plain = config.model_dump(mode="json")
            return cls(path=path, sinks=open_sinks(config.train.sinks, path, plain, resume=resume))
        except Exception:
            _remove_unused_recipe(path)
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

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and pass it to the sinks.

        NaN and infinity are written as null and counted in `nonfinite`.
        """
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
        """Append one line per group to rollouts.jsonl; without credits advantages are null."""
        if not self.writes or not groups:
            return
        lines = [plain_group(g, credits[k] if credits else None) for k, g in enumerate(groups)]
        place = {"step": step, "split": split}
        append_lines(self.rollouts, ({**place, "group": k, **x} for k, x in enumerate(lines)))

    def rewind(self, step: int) -> int:
        """Remove the lines of later steps, which a resumed run writes again.

        Args:
            step: the last step to keep; -1 removes all lines.

        Returns:
            The number of lines removed from metrics.jsonl.
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
        # a run that failed before its first line must not block the next one
        if kind is not None:
            _remove_unused_recipe(self.path)


def plain_group(group: Group, credit: Credit | None = None) -> dict[str, Any]:
    """Return one line of rollouts.jsonl; without a credit advantages are null."""
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
    """Return all lines of a metrics.jsonl, given by its path or its run directory.

    Raises:
        ConfigError: no such file, or a line that is not a JSON object with a `step`.
    """
    return list(read_lines(path / "metrics.jsonl" if path.is_dir() else path))


def _contains_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES)


def _remove_unused_recipe(folder: Path) -> None:
    if not _contains_run(folder):
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
                # a failed rollout may have turns without credit
                "advantage": advantages[k] if advantages and k < len(advantages) else None,
                "finish": turn.finish,
                "tokens": len(turn.sampled_ids),
                "tool_calls": turn.tool_calls,
                "tool_successes": turn.tool_successes,
            }
            for k, turn in enumerate(trajectory.turns)
        ],
    }
