"""The order of prompts: endless shuffled passes over the tasks, dropped prompts first.

A prompt's place is its position in that endless order. It depends on the seed alone, and it seeds
the prompt's samples, so a prompt that was dropped draws with the same random numbers when it is
rolled out again. Every (prompt, random numbers) pair is trained exactly once: dropping slow groups
delays long rollouts, but does not make them rarer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import ConfigError
from ..parallel.ranks import ALONE, Ranks
from ..types import Task
from .schedule import Prompt


class PromptQueue:
    """Prompts in the order of the data, those that were put back first.

    Args:
        position: the next place in the endless order.
        returned: places that were put back and not taken again.
        stride: from one place to the next; with several ranks, the number of ranks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int,
        *,
        position: int = 0,
        returned: Iterable[int] = (),
        stride: int = 1,
    ) -> None:
        self._tasks = tasks
        self._seed = seed
        self._position = position
        self._stride = stride
        self._returned = sorted(returned)

    def take(self) -> Iterator[Prompt]:
        """Endless prompts; each is taken when the iterator is advanced."""
        while True:
            was_returned = bool(self._returned)
            if was_returned:
                place = self._returned.pop(0)
            else:
                place = self._position
                self._position += self._stride
            yield Prompt(place=place, task=self._task(place), must_finish=was_returned)

    def put_back(self, prompts: Iterable[Prompt]) -> None:
        """Put dropped prompts in front; next time they must finish."""
        self._returned = sorted([*self._returned, *(prompt.place for prompt in prompts)])

    def state(self) -> dict[str, Any]:
        """The data position as JSON values: the arguments that rebuild this queue."""
        return {"position": self._position, "returned": list(self._returned)}

    def _task(self, place: int) -> Task:
        epoch, index = divmod(place, len(self._tasks))
        return self._tasks[_order(len(self._tasks), epoch, self._seed)[index]]


def open_queue(
    tasks: Sequence[Task],
    seed: int,
    state: Mapping[str, Any],
    *,
    done: int,
    ranks: Ranks = ALONE,
) -> PromptQueue:
    """The queue of this rank, from the state of a checkpoint.

    Args:
        done: prompts of the finished steps, for a checkpoint without a data position.
    Raises:
        ConfigError: the checkpoint was written by another number of ranks.
    """
    positions = state.get("data", [{"position": done + rank} for rank in range(ranks.size)])
    if isinstance(positions, Mapping):  # of a run on one rank
        positions = [positions]
    if len(positions) != ranks.size:
        raise ConfigError(
            f"--resume: the checkpoint was written by {len(positions)} ranks and this run has "
            f"{ranks.size}; start {len(positions)} ranks"
        )
    return PromptQueue(tasks, seed, stride=ranks.size, **positions[ranks.rank])


@lru_cache(maxsize=4)
def _order(size: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").sample(range(size), size)
