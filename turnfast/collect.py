"""The rollouts of each training step, in the order of the data."""

from __future__ import annotations

from collections.abc import Callable

from .config import Config
from .rollout import rollout
from .run import Run, tasks_of_step
from .types import Group


class Collector:
    """Gathers what a step trains on: picks its tasks and rolls them out."""

    def __init__(self, run: Run, config: Config, should_stop: Callable[[], bool]) -> None:
        self._run = run
        self._config = config
        self._should_stop = should_stop

    def collect(self, step: int) -> list[Group]:
        """The groups of a step.

        Raises:
            RolloutError, Interrupted: see `rollout`.
        """
        run, config = self._run, self._config
        return rollout(
            tasks_of_step(run.train_tasks, step, config),
            run.env,
            run.chat,
            run.sampler,
            config.rollout,
            max_turns=config.env.max_turns,
            seed=config.train.seed + step,
            should_stop=self._should_stop,
        )
