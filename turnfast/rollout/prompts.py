"""Which prompts come next: endless shuffled passes over the tasks, and those that were dropped.

A prompt's place is its position in that endless order, a function of the seed alone, and its
samples are seeded by its place. So a prompt that was dropped while it was slow draws with the same
random numbers when its turn comes again: every (prompt, random numbers) pair is trained exactly
once, and dropping what is slow makes long rollouts come later, but not less often.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import ConfigError
from ..parallel.ranks import ALONE, Ranks
from ..types import Task
from .groups import Prompt


class PromptQueue:
    """Prompts in the order of the data, those that were given back first.

    Args:
        position: the next place in the endless order.
        returned: places that were given back and not taken again.
        stride: from one place to the next; where there are several ranks the others have those
            between.
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
        """Prompts without end; each is taken when it is asked for."""
        while True:
            settled = bool(self._returned)
            place = self._returned.pop(0) if settled else self._position
            self._position += 0 if settled else self._stride
            yield Prompt(place=place, task=self._task(place), settled=settled)

    def give_back(self, prompts: Iterable[Prompt]) -> None:
        """They come first from now on, and must then be finished."""
        self._returned = sorted([*self._returned, *(prompt.place for prompt in prompts)])

    def state(self) -> dict[str, Any]:
        """Where the data stands, as values of JSON: the arguments that make this queue again."""
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
    """The queue of a checkpoint; one that says nothing about it stands behind `done` prompts.

    Raises:
        ConfigError: the checkpoint is of another number of ranks.
    """
    everyone = [{"position": done + rank} for rank in range(ranks.size)]
    everyone = state.get("data", everyone)
    if isinstance(everyone, Mapping):  # as it was before there were ranks
        everyone = [everyone]
    if len(everyone) != ranks.size:
        raise ConfigError(
            f"--resume: the checkpoint is of {len(everyone)} ranks, here are {ranks.size}; start "
            "as many again"
        )
    return PromptQueue(tasks, seed, stride=ranks.size, **everyone[ranks.rank])


@lru_cache(maxsize=4)
def _order(size: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").sample(range(size), size)
