"""What the adapters of games share: tasks that differ in their seed, and steps under a deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...tools import Raised, Returned, TimedOut, call_with_timeout
from ...types import Task
from ..base import Split


def seeded_tasks(
    question: str, *, seed: int, train: int, eval: int
) -> Mapping[Split, Sequence[Task]]:
    """Task i of train has the seed `seed + i` in its data, and those of eval the numbers after."""

    def numbered(split: Split, begin: int, count: int) -> tuple[Task, ...]:
        return tuple(
            Task(id=f"{split}-{i}", question=question, data={"seed": begin + i})
            for i in range(count)
        )

    return {"train": numbered("train", seed, train), "eval": numbered("eval", seed + train, eval)}


async def within(
    function: Callable[..., Any], *args: Any, timeout_s: float, label: str, task: Task
) -> Any:
    """Call plain or `async` code of a game; what it raises is raised.

    Raises:
        TimeoutError: no result within `timeout_s` seconds.
    """
    match await call_with_timeout(function, args, timeout_s=timeout_s, label=label):
        case Returned(value=value):
            return value
        case Raised(error=error):
            raise error
        case TimedOut():
            raise TimeoutError(f"{label}, {task.id}: no step within {timeout_s:g} s")
