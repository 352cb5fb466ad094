"""Reward functions beside those of the environment: weighted, under a deadline, plain or `async`.

A reward function takes the task and the turns so far and returns a number::

    def brevity(task: Task, turns: Sequence[PlayedTurn]) -> float:
        return 1.0 / (1 + len(turns[-1].text.split()))

    [[env.rewards]]
    function = "my_rewards:brevity"
    on = "turn"
    weight = 0.1

The functions of one turn run at the same time. One that raises, misses its deadline or gives no
finite number is a `RewardFault`: the trajectory ends as failed, with status `reward_error`, is
counted, and never enters a baseline. (A made-up 0 would teach that the turn was bad.)
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from ...tools import Late, Raised, Returned, Tool, ask, call_within
from ...types import LARGEST_REWARD, Message, Task
from ..base import (
    Demonstration,
    Demonstrator,
    Env,
    Episode,
    Outcome,
    PlayedTurn,
    Split,
    Step,
)

RewardFunction = Callable[[Task, Sequence[PlayedTurn]], float | Awaitable[float]]
FaultKind = Literal["raised", "timeout", "missing", "not_a_number", "not_finite", "judge"]
TURN_REWARD, OUTCOME = "the environment's turn reward", "the environment's outcome"


class RewardFault(Exception):
    """A reward that is none; `kind` says in one word why."""

    def __init__(self, kind: FaultKind, text: str) -> None:
        super().__init__(text)
        self.kind: FaultKind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """One reward function and its terms.

    Attributes:
        name: under which the weighted value stands in `reward_parts`.
        on: what it scores: "turn", every turn once it is answered; "call", those with a tool call,
            malformed ones included; "outcome", the whole trajectory, however it ended.
        deadline_s: per call, in seconds.
    """

    name: str
    function: RewardFunction
    on: Literal["turn", "call", "outcome"] = "outcome"
    weight: float = 1.0
    deadline_s: float = 10.0


def check_reward(value: Any, what: str) -> float:
    """The value as a float; raises RewardFault for None, NaN, what is infinite or
    above LARGEST_REWARD, and what is no number."""
    if type(value) is float and abs(value) < LARGEST_REWARD:  # nearly always
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
    shown = repr(value)[:80]
    text = f"it must be a finite number, below {LARGEST_REWARD:g} in size"
    raise RewardFault(kind, f"{what} is {shown}; {text}")


async def score(
    rewards: Sequence[Reward], task: Task, turns: Sequence[PlayedTurn]
) -> dict[str, float]:
    """The weighted parts, all functions at the same time.

    Raises:
        RewardFault: of the first function, in their order, that has one.
    """
    values = await asyncio.gather(
        *(_call(reward, task, turns) for reward in rewards), return_exceptions=True
    )
    parts: dict[str, float] = {}
    for reward, value in zip(rewards, values, strict=True):
        if isinstance(value, BaseException):
            raise value
        parts[reward.name] = reward.weight * value
    return parts


def with_rewards(env: Env, rewards: Sequence[Reward]) -> Env:
    """The same environment with further rewards, added to its own.

    Raises:
        ValueError: two rewards of one name.
    """
    names = [reward.name for reward in rewards]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two rewards are called {min(twice)!r}; give each a name of its own")
    if isinstance(env, Demonstrator):
        return _RewardedDemonstrator(env, rewards)
    return _RewardedEnv(env, rewards)


class _RewardedEnv:
    def __init__(self, env: Env, rewards: Sequence[Reward]) -> None:
        self._env = env
        self._on_turn = tuple(reward for reward in rewards if reward.on != "outcome")
        self._on_outcome = tuple(reward for reward in rewards if reward.on == "outcome")
        self.tools: Sequence[Tool] = env.tools
        self.native_calls = env.native_calls

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._env.tasks(split)

    def episode(self, task: Task) -> Episode:
        return _RewardedEpisode(self._env.episode(task), task, self._on_turn, self._on_outcome)


class _RewardedDemonstrator(_RewardedEnv):
    _env: Any

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        return self._env.demonstrations(seed)

    def corpus(self) -> Sequence[str]:
        return self._env.corpus()

    @property
    def token_cut(self) -> str | None:
        return getattr(self._env, "token_cut", None)


class _RewardedEpisode:
    def __init__(
        self,
        episode: Episode,
        task: Task,
        on_turn: Sequence[Reward],
        on_outcome: Sequence[Reward],
    ) -> None:
        self._episode = episode
        self._task = task
        self._on_turn = on_turn
        self._on_outcome = on_outcome
        self._turns: list[PlayedTurn] = []

    async def start(self) -> Sequence[Message]:
        return await ask(self._episode.start, label="env")

    async def step(self, text: str) -> Step:
        step = await ask(self._episode.step, text, label="env")
        self._turns.append(PlayedTurn(text=text, calls=step.calls, messages=step.messages))
        due = [r for r in self._on_turn if r.on == "turn" or step.tool_calls]
        if not due:
            return step
        own = 0.0 if step.reward is None else check_reward(step.reward, TURN_REWARD)
        parts = await score(due, self._task, tuple(self._turns))
        total = math.fsum((own, *parts.values()))
        return replace(step, reward=total, reward_parts=_join(step.reward_parts, parts))

    async def finish(self) -> Outcome:
        outcome = await ask(self._episode.finish, label="env")
        own = check_reward(outcome.reward, OUTCOME)
        parts = await score(self._on_outcome, self._task, tuple(self._turns))
        total = math.fsum((own, *parts.values()))
        return replace(outcome, reward=total, reward_parts=_join(outcome.reward_parts, parts))


async def _call(reward: Reward, task: Task, turns: Sequence[PlayedTurn]) -> float:
    ended = await call_within(
        reward.function,
        (task, turns),
        timeout_s=reward.deadline_s,
        label=f"reward-{reward.name}",
    )
    what = f"reward {reward.name!r}"
    match ended:
        case Returned(value=value):
            return check_reward(value, what)
        case Raised(error=RewardFault() as fault):
            raise RewardFault(fault.kind, f"{what}: {fault}")
        case Raised(error=error):
            raise RewardFault("raised", f"{what} raised {type(error).__name__}: {error}")
        case Late(hanging=0):
            raise RewardFault("timeout", f"{what} gave nothing in {reward.deadline_s:g} s")
        case Late(hanging=hanging):
            raise RewardFault("timeout", f"{what}: {hanging} earlier calls are still hanging")


def _join(own: Any, added: dict[str, float]) -> dict[str, float]:
    both = own.keys() & added.keys()
    if both:
        raise ValueError(
            f"env.rewards: the environment has a reward {min(both)!r} of its own; give this one "
            "another name"
        )
    return {**own, **added}
