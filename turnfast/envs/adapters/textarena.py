"""Single-player games of TextArena, one move per turn.

    [env]
    name = "textarena"
    options = { id = "Mastermind-v0" }

The agent is shown what the game says since its last move, and its whole turn, without thoughts, is
the move. The game's own reward, given at the end, is the outcome.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ...config.schema import PositiveFloat, PositiveInt
from ...errors import ConfigError
from ...tools import Tool, strip_reasoning
from ...types import Message, Task
from ..base import Outcome, Reward, Split, Step
from ..optional import import_optional
from .games import seeded_tasks, within

_GLOBAL_RANDOM = threading.Lock()


class TextArenaEnv:
    """One game, started with another seed for every task.

    Args:
        id: as for `textarena.make`.
        kwargs: further arguments of `textarena.make`.
        seed, train_tasks, eval_tasks: task i of train has the seed + i, and those of eval the
            numbers after.
        step_timeout_s: of a reset or a move; a longer one fails the trajectory.
    Raises:
        ConfigError: the package or the game is missing, or the game is for several players.
    """

    tools: Sequence[Tool] = ()
    native_calls = False
    rewards: Sequence[Reward] = ()

    def __init__(
        self,
        *,
        id: str,
        kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        train_tasks: PositiveInt = 1024,
        eval_tasks: PositiveInt = 64,
        step_timeout_s: PositiveFloat = 30.0,
    ) -> None:
        self._textarena = import_optional("textarena", install="turnfast[adapters]")
        self._id, self._kwargs = id, dict(kwargs or {})
        self.step_timeout_s = step_timeout_s
        self._tasks = seeded_tasks(id, seed=seed, train=train_tasks, eval=eval_tasks)
        try:
            # to learn now, not in the first rollout, whether it can be played alone
            _Dice(seed).throw(lambda: self.make().reset(num_players=1, seed=seed))
        except Exception as error:
            raise ConfigError(
                f"env.options.id: {id!r} cannot be played by one: {type(error).__name__}: {error}"
            ) from None

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def episode(self, task: Task) -> TextArenaEpisode:
        return TextArenaEpisode(self, task)

    def make(self) -> Any:
        """A new instance without wrappers: those for players repeat the whole game each turn."""
        raw = self._id if self._id.endswith("-raw") else f"{self._id}-raw"
        return self._textarena.make(raw, **self._kwargs)


class TextArenaEpisode:
    def __init__(self, env: TextArenaEnv, task: Task) -> None:
        self._env = env
        self._task = task
        self._seed: int = task.data["seed"]
        self._dice = _Dice(self._seed)
        self._game: Any = None
        self._done = False
        self._num_moves = 0

    async def start(self) -> Sequence[Message]:
        return [{"role": "user", "content": await self._within(self._reset)}]

    async def step(self, text: str) -> Step:
        news = await self._within(self._move, strip_reasoning(text).strip())
        self._num_moves += 1
        return Step(
            messages=() if self._done else ({"role": "user", "content": news},),
            done=self._done,
        )

    async def finish(self) -> Outcome:
        rewards, info = await self._within(self._game.close) if self._done else (None, {})
        reward = float((rewards or {}).get(0, 0.0))
        return Outcome(
            reward=reward,
            reward_parts={"game": reward},
            metrics={
                "moves": float(self._num_moves),
                "invalid_move": float(bool(info.get(0, {}).get("invalid_move", False))),
            },
        )

    def _reset(self) -> str:
        self._game = self._env.make()
        self._game.reset(num_players=1, seed=self._seed)
        return self._news()

    def _move(self, move: str) -> str:
        self._done, _ = self._game.step(action=move)
        return "" if self._done else self._news()

    def _news(self) -> str:
        """What the game said since it was last asked, without the agent's own moves."""
        _, observations = self._game.get_observation()
        return "\n".join(str(message) for sender, message, *_ in observations if sender != 0)

    async def _within(self, function: Callable[..., Any], *args: Any) -> Any:
        return await within(
            lambda: self._dice.throw(lambda: function(*args)),
            timeout_s=self._env.step_timeout_s,
            label="textarena",
            task=self._task,
        )


class _Dice:
    """The games draw from Python's global generator: each gets its own state for the time of a
    call, so that episodes do not disturb each other. One call at a time: while one hangs, the
    others wait for it and miss their own deadlines."""

    def __init__(self, seed: int) -> None:
        self._state = random.Random(seed).getstate()

    def throw(self, call: Callable[[], Any]) -> Any:
        with _GLOBAL_RANDOM:
            outside = random.getstate()
            random.setstate(self._state)
            try:
                return call()
            finally:
                self._state = random.getstate()
                random.setstate(outside)
