"""Gymnasium environments with discrete or text actions, one step per turn.

    [env]
    name = "gymnasium"
    options = { id = "FrozenLake-v1", kwargs = { is_slippery = false },
                actions = ["left", "down", "right", "up"] }

The agent gets the observation if it is text, otherwise the "ansi" rendering with highlighted
characters in square brackets, otherwise `str(observation)`. It acts with <action>right</action>.
Each reward of the environment is the reward of the turn.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ...config.schema import PositiveFloat, PositiveInt
from ...errors import ConfigError
from ...tools import Tool
from ...types import Message, Task
from ..base import Outcome, Reward, Split, Step
from ..optional import import_optional
from ..rewards.answers import read_tag
from .games import call_game, seeded_tasks

_HIGHLIGHT = re.compile(r"\x1b\[[1-9][\d;]*m(.*?)\x1b\[0?m", flags=re.DOTALL)
_ESCAPE = re.compile(r"\x1b\[[\d;]*m")


class GymnasiumEnv:
    """One registered environment, reset with a different seed for every task.

    Args:
        id: as for `gymnasium.make`; "module:Name-v0" imports the module first.
        kwargs: other arguments of `gymnasium.make`.
        actions: names of the discrete actions in order; None uses their numbers.
        instructions: text before the first observation; "" explains the action format.
        malformed: reward of a turn without a valid action; the environment makes no step.
        rewards_on: "turn", or "outcome" to add all rewards to the outcome.
        seed, train_tasks, eval_tasks: task i of "train" is reset with seed + i; the tasks of
            "eval" have the seeds after those.
        step_timeout_s: deadline of a reset or a step; the trajectory fails if one is slower.
    Raises:
        ConfigError: the package or the environment is not installed, or the action space is
            neither discrete nor text.
    """

    tools: Sequence[Tool] = ()
    native_calls = False
    rewards: Sequence[Reward] = ()

    def __init__(
        self,
        *,
        id: str,
        kwargs: dict[str, Any] | None = None,
        actions: list[str] | None = None,
        instructions: str = "",
        malformed: float = 0.0,
        rewards_on: Literal["turn", "outcome"] = "turn",
        seed: int = 0,
        train_tasks: PositiveInt = 1024,
        eval_tasks: PositiveInt = 64,
        step_timeout_s: PositiveFloat = 30.0,
    ) -> None:
        self._gymnasium = import_optional("gymnasium", install="turnfast[adapters]")
        self._id, self._kwargs = id, dict(kwargs or {})
        self.malformed, self.rewards_on = malformed, rewards_on
        self.step_timeout_s = step_timeout_s
        game = self.make()
        self.read_action, self.help = self._reader(game.action_space, actions or [])
        game.close()
        self._tasks = seeded_tasks(
            instructions or self.help, seed=seed, num_train=train_tasks, num_eval=eval_tasks
        )

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def episode(self, task: Task) -> GymnasiumEpisode:
        return GymnasiumEpisode(self, task)

    def make(self) -> Any:
        """Return a new instance, rendered as text if it supports that."""
        module, _, name = self._id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            entry = self._gymnasium.spec(name).entry_point
        except (ImportError, self._gymnasium.error.Error) as error:
            raise ConfigError(
                f"env.options.id: gymnasium cannot find {self._id!r}: "
                f"{type(error).__name__}: {error}"
            ) from None
        if isinstance(entry, str):
            entry = self._gymnasium.envs.registration.load_env_creator(entry)
        modes = getattr(entry, "metadata", {}).get("render_modes", ())
        render = {"render_mode": "ansi"} if "ansi" in modes else {}
        return self._gymnasium.make(name, **{**render, **self._kwargs})

    def _reader(
        self, space: Any, names: Sequence[str]
    ) -> tuple[Callable[[str], int | str | None], str]:
        """Return a function from the agent's text to an action or None, and the instructions."""
        spaces = self._gymnasium.spaces
        if isinstance(space, spaces.Text):
            help = "Act with <action>text</action>."
            return lambda text: text if space.contains(text) else None, help
        if not isinstance(space, spaces.Discrete):
            raise ConfigError(
                f"env.options.id: the action space of {self._id!r} is {space}, which is neither "
                "discrete nor text"
            )
        count, start = int(space.n), int(space.start)
        if names and len(names) != count:
            raise ConfigError(
                f"env.options.actions: {len(names)} names for the {count} actions of {self._id!r}"
            )
        actions = [name.lower() for name in names] or [str(start + i) for i in range(count)]
        numbers = {action: start + i for i, action in enumerate(actions)}
        help = f"Act with <action>{actions[0]}</action>; the actions are {', '.join(actions)}."
        return lambda text: numbers.get(text.lower()), help


class GymnasiumEpisode:
    def __init__(self, env: GymnasiumEnv, task: Task) -> None:
        self._env = env
        self._task = task
        self._game: Any = None
        self._return = 0.0
        self._ended: Literal["", "terminated", "truncated"] = ""

    async def start(self) -> Sequence[Message]:
        text = await self._call(self._reset)
        return [{"role": "user", "content": f"{self._task.question}\n{text}"}]

    async def step(self, text: str) -> Step:
        env = self._env
        action = env.read_action(read_tag(text, "action") or "")
        if action is None:
            return Step(
                messages=({"role": "user", "content": env.help},),
                reward=env.malformed,
                reward_parts={"malformed": env.malformed},
                tool_calls=1,
            )
        shown, reward = await self._call(self._act, action)
        self._return += reward
        on_turn = env.rewards_on == "turn"
        return Step(
            messages=() if self._ended else ({"role": "user", "content": shown},),
            reward=reward if on_turn else None,
            reward_parts={"reward": reward} if on_turn else {},
            tool_calls=1,
            tool_successes=1,
            done=bool(self._ended),
        )

    async def finish(self) -> Outcome:
        await self._call(self._game.close)
        reward = self._return if self._env.rewards_on == "outcome" else 0.0
        return Outcome(
            reward=reward,
            reward_parts={"return": reward} if reward else {},
            metrics={"return": self._return, "terminated": float(self._ended == "terminated")},
        )

    def _reset(self) -> str:
        self._game = self._env.make()
        observation, _ = self._game.reset(seed=self._task.data["seed"])
        return self._show(observation)

    def _act(self, action: int | str) -> tuple[str, float]:
        observation, reward, terminated, truncated, _ = self._game.step(action)
        if terminated or truncated:
            self._ended = "terminated" if terminated else "truncated"
        return self._show(observation), float(reward)

    def _show(self, observation: Any) -> str:
        if isinstance(observation, str):
            return observation
        if self._game.render_mode == "ansi":
            text = _HIGHLIGHT.sub(r"[\1]", str(self._game.render()))
            return _ESCAPE.sub("", text).strip("\n")
        return str(observation)

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await call_game(
            function,
            *args,
            timeout_s=self._env.step_timeout_s,
            label="gymnasium",
            task=self._task,
        )
