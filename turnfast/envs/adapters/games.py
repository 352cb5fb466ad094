"""Helpers of the game adapters: tasks that differ by seed, and calls with a deadline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...tools import Raised, Returned, TimedOut, call_with_timeout
from ...types import Task
from ..base import Split


def seeded_tasks(
    question: str, *, seed: int, num_train: int, num_eval: int
) -> Mapping[Split, Sequence[Task]]:
    """Return tasks whose `data["seed"]` counts from `seed`, first train, then eval."""
    sizes: dict[Split, tuple[int, int]] = {
        "train": (seed, num_train),
        "eval": (seed + num_train, num_eval),
    }
    return {
        split: [
            Task(id=f"{split}-{i}", question=question, data={"seed": first + i})
            for i in range(count)
        ]
        for split, (first, count) in sizes.items()
    }


async def call_game(
    function: Callable[..., Any], *args: Any, timeout_s: float, label: str, task: Task
) -> Any:
    """Call a plain or `async` function of a game. Its exceptions are raised unchanged.

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
