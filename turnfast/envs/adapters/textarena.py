"""Single-player games of TextArena, one move per turn.

    [env]
    name = "textarena"
    options = { id = "Mastermind-v0" }

The agent gets the game's messages since its last move. Its move is the text of the turn without the
reasoning. The reward at the end of the game is the reward of the outcome.
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
from .games import call_game, seeded_tasks

_random_lock = threading.Lock()


class TextArenaEnv:
    """One game, started with a different seed for every task.

    Args:
        id: as for `textarena.make`.
        kwargs: other arguments of `textarena.make`.
        seed, train_tasks, eval_tasks: task i of "train" has the seed seed + i; the tasks of "eval"
            have the seeds after those.
        step_timeout_s: deadline of a reset or a move; the trajectory fails if one is slower.
    Raises:
        ConfigError: the package is not installed, or the game does not exist or needs several
            players.
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
        # "-raw" omits the wrappers of the package, which repeat all messages in every turn.
        self._raw_id = id if id.endswith("-raw") else f"{id}-raw"
        self._kwargs = dict(kwargs or {})
        self.step_timeout_s = step_timeout_s
        self._tasks = seeded_tasks(id, seed=seed, num_train=train_tasks, num_eval=eval_tasks)
        if self._raw_id not in self._textarena.envs.registration.ENV_REGISTRY:
            raise ConfigError(f"env.options.id: textarena has no game {id!r}")
        try:
            _RandomState(seed).call(lambda: self.make().reset(num_players=1, seed=seed))
        except AssertionError as error:  # the games check the number of players with `assert`
            raise ConfigError(
                f"env.options.id: {id!r} cannot be played by one player: {error}"
            ) from None

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def episode(self, task: Task) -> TextArenaEpisode:
        return TextArenaEpisode(self, task)

    def make(self) -> Any:
        """Return a new instance."""
        return self._textarena.make(self._raw_id, **self._kwargs)


class TextArenaEpisode:
    def __init__(self, env: TextArenaEnv, task: Task) -> None:
        self._env = env
        self._task = task
        self._seed: int = task.data["seed"]
        self._random_state = _RandomState(self._seed)
        self._game: Any = None
        self._done = False
        self._num_moves = 0

    async def start(self) -> Sequence[Message]:
        return [{"role": "user", "content": await self._call(self._reset)}]

    async def step(self, text: str) -> Step:
        reply = await self._call(self._move, strip_reasoning(text).strip())
        self._num_moves += 1
        return Step(
            messages=() if self._done else ({"role": "user", "content": reply},),
            done=self._done,
        )

    async def finish(self) -> Outcome:
        rewards, info = await self._call(self._game.close) if self._done else (None, {})
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
        return self._new_messages()

    def _move(self, move: str) -> str:
        self._done, _ = self._game.step(action=move)
        return "" if self._done else self._new_messages()

    def _new_messages(self) -> str:
        """Return the game's messages since the last call, without the agent's own moves."""
        _, observations = self._game.get_observation()
        return "\n".join(str(message) for sender, message, *_ in observations if sender != 0)

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await call_game(
            lambda: self._random_state.call(lambda: function(*args)),
            timeout_s=self._env.step_timeout_s,
            label="textarena",
            task=self._task,
        )


class _RandomState:
    """The state of Python's global random generator in one episode; the games use this generator.

    Each call of a game restores the state, so that episodes do not affect each other. Only one call
    runs at a time: while one hangs, the others wait and may exceed their deadlines.
    """

    def __init__(self, seed: int) -> None:
        self._state = random.Random(seed).getstate()

    def call(self, function: Callable[[], Any]) -> Any:
        with _random_lock:
            previous = random.getstate()
            random.setstate(self._state)
            try:
                return function()
            finally:
                self._state = random.getstate()
                random.setstate(previous)
