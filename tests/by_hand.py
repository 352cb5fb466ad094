"""Turns, rollouts and groups with defaults for everything that a test does not state."""

from __future__ import annotations

from collections.abc import Sequence

from turnfast.types import Group, Status, Task, Trajectory, Turn


def turn(tokens: int = 1, reward: float | None = None, **fields) -> Turn:
    return Turn(
        **{
            "prompt_ids": (1,),
            "sampled_ids": (2,) * tokens,
            "logprobs": (-0.5,) * tokens,
            "text": "",
            "finish": "stop",
            "reward": reward,
            **fields,
        }
    )


def rollout(
    index: int = 0, turns: Sequence[Turn] = (), status: str = "finished", **fields
) -> Trajectory:
    return Trajectory(task_id="q", index=index, turns=tuple(turns), status=Status(status), **fields)


def group_of(*rollouts: Trajectory) -> Group:
    return Group(task=Task(id="q", question=""), trajectories=rollouts)
