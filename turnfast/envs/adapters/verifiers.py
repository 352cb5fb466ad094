"""Environments of Prime Intellect's `verifiers` (its classic ones, up to release 0.3), to train on.

    [env]
    name = "verifiers"
    options = { id = "wordle", args = { max_turns = 6 } }

Anything that `verifiers.load_environment` gives: single-turn, multi-turn and tool environments and
groups of them. The rows of its dataset are the tasks, its replies the messages, the rubric's reward
the outcome; a reward that it sets on a step of its own is that turn's. Its tools are offered
through the chat template. It plays its own rollout and believes to ask a model (verifiers_talk.py).

Release 0.4 has none of these classes: install "verifiers<0.4".
"""

from __future__ import annotations

import inspect
import math
import os
import random
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

from pydantic import BaseModel, Field

from ...config.schema import PositiveFloat, PositiveInt
from ...errors import ConfigError
from ...tools import BackgroundLoop, Tool
from ...types import Message, Task
from ..base import Outcome, Reward, Split, Step
from ..optional import import_optional
from ..rewards.reward import OUTCOME, check_reward
from .games import within
from .verifiers_talk import FAILED_CALLS, REWARD_FAULTS, Asked, Talk, plain_text, policy_client


class VerifiersEnv:
    """One environment of `verifiers`.

    Args:
        id: as for `verifiers.load_environment`: an installed environment, or a file in the current
            directory that defines `load_environment`.
        args: its arguments.
        train_tasks, eval_tasks: at most so many rows; train_tasks = 0 takes all.
        seed: chooses the rows, and those set aside where there is no dataset for evaluation.
        step_timeout_s: of an environment's reply, or of the scoring; a longer one fails the
            trajectory.
    Raises:
        ConfigError: the package or the environment is missing, or it cannot be trained on here.
    """

    rewards: Sequence[Reward] = ()

    def __init__(
        self,
        *,
        id: str,
        args: dict[str, Any] | None = None,
        train_tasks: Annotated[int, Field(ge=0)] = 0,
        eval_tasks: PositiveInt = 64,
        seed: int = 0,
        step_timeout_s: PositiveFloat = 60.0,
    ) -> None:
        verifiers = import_optional("verifiers", install="verifiers<0.4")
        if not hasattr(verifiers, "MultiTurnEnv"):
            raise ConfigError(
                "env.name: this release of verifiers has no MultiTurnEnv; install 'verifiers<0.4'"
            )
        self.types = import_optional("verifiers.types", install="verifiers<0.4")
        self.cut_off = verifiers.OverlongPromptError
        self.client = policy_client(verifiers.Client)
        self.background = BackgroundLoop("verifiers")
        self.step_timeout_s = step_timeout_s
        with _own_signals():
            self.inner = _load(verifiers, id, args or {})
        if self.inner.requires_group_rollouts:
            raise ConfigError(
                f"env.options.id: {id!r} scores the rollouts of a group together; here each "
                "trajectory is scored by itself"
            )
        _watch(self.inner)
        self.tools: Sequence[Tool] = tuple(map(_tool, self.inner.tool_defs or ()))
        self.native_calls = bool(self.tools)
        self._tasks = self._read(id, train_tasks, eval_tasks, random.Random(seed))

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def episode(self, task: Task) -> VerifiersEpisode:
        return VerifiersEpisode(self, task)

    def _read(
        self, id: str, train: int, eval: int, rng: random.Random
    ) -> Mapping[Split, Sequence[Task]]:
        inner = self.inner
        try:
            rows = [dict(row) for row in inner.get_dataset()]
        except ValueError as error:
            raise ConfigError(f"env.options.id: {id!r} has no rows to train on: {error}") from None
        rng.shuffle(rows)
        if inner.eval_dataset is not None or inner.eval_dataset_source is not None:
            held_out = [dict(row) for row in inner.get_eval_dataset()]
            rng.shuffle(held_out)
        else:
            held_out, rows = rows[:eval], rows[eval:]
        if not rows:
            raise ConfigError(
                f"env.options.eval_tasks: {id!r} has {len(held_out)} rows and no dataset for "
                f"evaluation; setting {eval} aside leaves none to train on"
            )
        chosen: dict[Split, list[dict]] = {"train": rows[: train or None], "eval": held_out[:eval]}
        return {
            split: tuple(
                Task(
                    id=f"{split}-{row['example_id']}",
                    question=_question(row["prompt"]),
                    answers=(row["answer"],) if isinstance(row.get("answer"), str) else (),
                    data={"row": row},
                )
                for row in found
            )
            for split, found in chosen.items()
        }


class VerifiersEpisode:
    """One rollout of the environment, of which each turn is the reply to a question it asked."""

    def __init__(self, env: VerifiersEnv, task: Task) -> None:
        self._env = env
        self._task = task
        self._talk = Talk(
            env=env.inner,
            row=task.data["row"],
            client=env.client,
            types=env.types,
            cut_off=env.cut_off,
            offered=tuple(tool.name for tool in env.tools),
        )
        # a rollout that nobody goes on with must not wait for ever
        weakref.finalize(self, self._talk.abandon).atexit = False

    async def start(self) -> Sequence[Message]:
        event = await self._in_background(self._talk.begin())
        if isinstance(event, Asked):
            return event.messages
        raise RuntimeError(f"{self._task.id}: the environment ended before it asked for a turn")

    async def step(self, text: str) -> Step:
        event = await self._in_background(self._talk.answer(text))
        asked = isinstance(event, Asked)
        return Step(
            messages=event.messages if asked else (),
            reward=event.reward,
            reward_parts={} if event.reward is None else {"step": event.reward},
            tool_calls=event.tool_calls,
            tool_successes=event.tool_successes,
            done=not asked,
        )

    async def finish(self) -> Outcome:
        state = await self._in_background(self._talk.end())
        reward = check_reward(state["reward"], OUTCOME)
        figures = {
            name: float(value)
            for name, value in (state["metrics"] or {}).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        # the package's own mark of a rollout that passed
        passed = reward >= self._env.inner.pass_threshold
        return Outcome(
            reward=reward,
            reward_parts={"rubric": reward},
            metrics={"exact_match": float(passed), **figures},
        )

    async def _in_background(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await within(
            self._env.background.run,
            coroutine,
            timeout_s=self._env.step_timeout_s,
            label="verifiers",
            task=self._task,
        )


def _load(verifiers: Any, id: str, args: Mapping[str, Any]) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return verifiers.load_environment(id, **args)
    except Exception as error:
        raise ConfigError(
            f"env.options.id: verifiers cannot load {id!r}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of this process: its environments put their own in their place."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _tool(definition: Any) -> Tool:
    """What the chat template is shown; the environment itself carries the calls out."""

    def refuse(**_: Any) -> str:
        raise RuntimeError("this tool belongs to an environment of verifiers, which calls it")

    return Tool(
        name=definition.name,
        description=definition.description,
        parameters=dict(definition.parameters),
        function=refuse,
        arguments=BaseModel,
    )


def _question(prompt: Any) -> str:
    if not isinstance(prompt, list):
        raise ConfigError("env.options.id: its prompts are plain text; chat messages are needed")
    asked = [message for message in prompt if message["role"] == "user"]
    return plain_text(asked[-1]["content"]) if asked else ""


def _watch(env: Any) -> None:
    """Have errors noted that the package turns into a reward of 0 or into a tool's reply."""
    for inner in getattr(env, "envs", None) or [env]:
        _watch_rubric(inner.rubric)
        if hasattr(inner, "error_formatter"):
            inner.error_formatter = _noting(inner.error_formatter)


def _noting(formatter: Callable[[Exception], str]) -> Callable[[Exception], str]:
    def note(error: Exception) -> str:
        FAILED_CALLS.get().append(error)
        return formatter(error)

    return note


def _watch_rubric(rubric: Any) -> None:
    for inner in getattr(rubric, "rubrics", ()):
        _watch_rubric(inner)
    rubric.funcs = [_watched(function) for function in rubric.funcs]


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reward function; what it raises is noted as well."""

    @wraps(function)  # the rubric reads the signature to know what to pass
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            REWARD_FAULTS.get().append((function.__name__, error))
            raise

    return call
