"""Apply reward functions to a trajectory, each weighted and under a deadline.

A reward function of the task and the turns so far returns a number; it may be `async`::

    def brevity(task: Task, turns: Sequence[PlayedTurn]) -> float:
        return 1.0 / (1 + len(turns[-1].text.split()))

    [[env.rewards]]
    function = "my_rewards:brevity"
    on = "turn"
    weight = 0.1

If a function raises, misses its deadline or returns no finite number, `RewardFault` is raised: the
trajectory ends as failed, is counted, and enters no baseline. (A reward of 0 instead would teach
the policy that the turn was bad.)
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

from ...errors import ConfigError
from ...tools import Raised, Returned, TimedOut, call_with_timeout
from ...types import LARGEST_REWARD, Task
from ..base import Outcome, PlayedTurn, Reward, Step
from .functions import final_answer

FaultKind = Literal["raised", "timeout", "missing", "not_a_number", "not_finite", "judge"]
TURN_REWARD, OUTCOME = "the environment's turn reward", "the environment's outcome"


class RewardFault(Exception):
    """A reward that is not a finite number; `kind` is the reason."""

    def __init__(self, kind: FaultKind, text: str) -> None:
        super().__init__(text)
        self.kind: FaultKind = kind


def check_reward(value: Any, label: str) -> float:
    """The value as a float.

    Raises:
        RewardFault: None, NaN, infinite, `LARGEST_REWARD` or more in size, or not a number.
    """
    if type(value) is float and abs(value) < LARGEST_REWARD:  # the usual case, without `Real`
        return value
    kind: FaultKind
    if value is None:
        kind = "missing"
    elif not isinstance(value, Real):
        kind = "not_a_number"
    elif not abs(float(value)) < LARGEST_REWARD:
        kind = "not_finite"
    else:
        return float(value)
    text = f"it must be a finite number, below {LARGEST_REWARD:g} in size"
    raise RewardFault(kind, f"{label} is {repr(value)[:80]}; {text}")


class Scorer:
    """Adds an environment's `rewards` to the steps and the outcome of one trajectory.

    Functions that are not inline run at the same time. Every method raises:
        RewardFault: the first fault, in the order of the rewards, inline ones first.
        ConfigError: two reward parts have the same name.
    """

    def __init__(self, rewards: Sequence[Reward], task: Task) -> None:
        self._rewards = rewards
        self._task = task
        self._turns: list[PlayedTurn] = []

    async def score_step(self, text: str, step: Step) -> Step:
        """The environment's step on the agent's text, with the rewards of this turn added."""
        own = None if step.reward is None else check_reward(step.reward, TURN_REWARD)
        self._turns.append(PlayedTurn(text=text, calls=step.calls, messages=step.messages))
        scored = {"turn", "call"} if step.tool_calls else {"turn"}
        applied = [reward for reward in self._rewards if reward.on in scored]
        if not applied:
            return step
        parts = await self._parts(applied, step.reward_parts)
        total = math.fsum((own or 0.0, *(parts[reward.name] for reward in applied)))
        return replace(step, reward=total, reward_parts=parts)

    async def score_outcome(self, outcome: Outcome) -> Outcome:
        """The environment's outcome, with the rewards of the whole trajectory added."""
        own = check_reward(outcome.reward, OUTCOME)
        answered = final_answer(self._turns) is not None
        scored = {"outcome", "answer"} if answered else {"outcome"}
        applied = [reward for reward in self._rewards if reward.on in scored]
        parts = await self._parts(applied, outcome.reward_parts)
        total = math.fsum((own, *(parts[reward.name] for reward in applied)))
        return replace(outcome, reward=total, reward_parts=parts)

    async def _parts(self, applied: Sequence[Reward], own: Mapping[str, float]) -> dict[str, float]:
        """The environment's own parts and the weighted values of `applied`."""
        turns = tuple(self._turns)
        values = {r.name: await _call(r, self._task, turns) for r in applied if r.inline}
        others = [reward for reward in applied if not reward.inline]
        if others:
            results = await asyncio.gather(
                *(_call(reward, self._task, turns) for reward in others), return_exceptions=True
            )
            for reward, result in zip(others, results, strict=True):
                if isinstance(result, BaseException):
                    raise result
                values[reward.name] = result
        parts = dict(own) | {reward.name: reward.weight * values[reward.name] for reward in applied}
        if len(parts) < len(own) + len(applied):
            names = [*own, *(reward.name for reward in applied)]
            repeated = next(name for name in names if names.count(name) > 1)
            raise ConfigError(
                f"env.rewards: the environment already has a reward {repeated!r}; give this one "
                "another name"
            )
        return parts


async def _call(reward: Reward, task: Task, turns: Sequence[PlayedTurn]) -> float:
    label = f"reward {reward.name!r}"
    if reward.inline:
        try:
            ended = Returned(value=reward.function(task, turns))
        except Exception as error:
            ended = Raised(error=error)
    else:
        ended = await call_with_timeout(
            reward.function,
            (task, turns),
            timeout_s=reward.deadline_s,
            label=f"reward-{reward.name}",
        )
    match ended:
        case Returned(value=value):
            return check_reward(value, label)
        case Raised(error=RewardFault() as fault):
            raise RewardFault(fault.kind, f"{label}: {fault}")
        case Raised(error=error):
            raise RewardFault("raised", f"{label} raised {type(error).__name__}: {error}")
        case TimedOut(num_hanging=0):
            raise RewardFault("timeout", f"{label} returned nothing within {reward.deadline_s:g} s")
        case TimedOut(num_hanging=num_hanging):
            raise RewardFault("timeout", f"{label}: {num_hanging} earlier calls still hang")
