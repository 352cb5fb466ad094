"""Environments of Prime Intellect's package `verifiers`, release 0.3.

    [env]
    name = "verifiers"
    options = { id = "wordle", args = { max_turns = 6 } }

Supports what `verifiers.load_environment` returns in this release: single-turn, multi-turn and tool
environments and groups of them. The rows of the dataset are the tasks, the environment's replies
are the messages, and the rubric's reward is the reward of the outcome. A reward that the
environment sets on a step of its trajectory is the reward of the turn. The chat template shows the
tools. verifiers_rollout.py connects the environment's loop with the policy.

Release 0.4 does not contain these classes: install "verifiers<0.4".
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
from .games import call_game
from .verifiers_rollout import (
    REWARD_ERRORS,
    TOOL_ERRORS,
    VerifiersRollout,
    VerifiersSetup,
    make_policy_client,
    plain_text,
)

INSTALL = "verifiers<0.4"


class VerifiersEnv:
    """One environment of `verifiers`.

    Args:
        id: argument of `verifiers.load_environment`: an installed environment, or a module in the
            current directory that defines `load_environment`.
        args: arguments of the environment.
        train_tasks, eval_tasks: maximum number of rows; train_tasks = 0 uses all.
        seed: selects the rows, and the held-out rows if there is no evaluation dataset.
        step_timeout_s: deadline of each reply and of the scoring; the trajectory fails after it.
    Raises:
        ConfigError: the package or the environment is not installed, or not supported.
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
        verifiers = import_optional("verifiers", install=INSTALL)
        if not hasattr(verifiers, "MultiTurnEnv"):
            raise ConfigError(
                "env.name: this release of verifiers has no MultiTurnEnv; install it with: "
                f"pip install '{INSTALL}'"
            )
        self.background = BackgroundLoop("verifiers")
        self.step_timeout_s = step_timeout_s
        with _restored_signal_handlers():
            env = _load(verifiers, id, args or {})
        if env.requires_group_rollouts:
            raise ConfigError(
                f"env.options.id: {id!r} scores the rollouts of a group together, which is not "
                "supported"
            )
        _record_errors(env)
        self.tools: Sequence[Tool] = tuple(map(_tool, env.tool_defs or ()))
        self.native_calls = bool(self.tools)
        self.setup = VerifiersSetup(
            env=env,
            types=import_optional("verifiers.types", install=INSTALL),
            client=make_policy_client(verifiers.Client),
            overlong_error=verifiers.OverlongPromptError,
            tool_names=tuple(tool.name for tool in self.tools),
        )
        train, held_out = _read_rows(env, id, eval_tasks, random.Random(seed))
        self._tasks: Mapping[Split, Sequence[Task]] = {
            "train": _make_tasks("train", train[: train_tasks or None]),
            "eval": _make_tasks("eval", held_out[:eval_tasks]),
        }

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def episode(self, task: Task) -> VerifiersEpisode:
        return VerifiersEpisode(self, task)


class VerifiersEpisode:
    def __init__(self, env: VerifiersEnv, task: Task) -> None:
        self._env = env
        self._task = task
        self._rollout = VerifiersRollout(env.setup, task.data["row"])
        # If the episode is abandoned, the environment's loop would otherwise wait forever.
        weakref.finalize(self, self._rollout.cancel).atexit = False

    async def start(self) -> Sequence[Message]:
        step = await self._in_background(self._rollout.start())
        if step.done:
            raise RuntimeError(f"{self._task.id}: the environment ended before the first turn")
        return step.messages

    async def step(self, text: str) -> Step:
        return await self._in_background(self._rollout.step(text))

    async def finish(self) -> Outcome:
        state = await self._in_background(self._rollout.finish())
        reward = check_reward(state["reward"], OUTCOME)
        metrics = {
            name: float(value)
            for name, value in (state["metrics"] or {}).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        passed = reward >= self._env.setup.env.pass_threshold
        return Outcome(
            reward=reward,
            reward_parts={"rubric": reward},
            metrics={"exact_match": float(passed), **metrics},
        )

    async def _in_background(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await call_game(
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
    except ValueError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        raise ConfigError(
            f"env.options.id: verifiers cannot import {id!r}: {error.__cause__}"
        ) from error


@contextmanager
def _restored_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers of this process afterwards; the environments replace them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _tool(definition: Any) -> Tool:
    """Return a tool for the chat template only: the environment runs its calls itself."""

    def not_callable(**_: Any) -> str:
        raise RuntimeError("only the verifiers environment can run this tool")

    return Tool(
        name=definition.name,
        description=definition.description,
        parameters=dict(definition.parameters),
        function=not_callable,
        arguments=BaseModel,
    )


Row = dict[str, Any]


def _read_rows(env: Any, id: str, num_eval: int, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Return the training and evaluation rows, shuffled.

    If there is no evaluation dataset, `num_eval` training rows are held out.
    """
    if env.build_dataset() is None:
        raise ConfigError(f"env.options.id: {id!r} has no dataset to train on")
    rows = [dict(row) for row in env.get_dataset()]
    rng.shuffle(rows)
    if env.eval_dataset is not None or env.eval_dataset_source is not None:
        held_out = [dict(row) for row in env.get_eval_dataset()]
        rng.shuffle(held_out)
    else:
        held_out, rows = rows[:num_eval], rows[num_eval:]
    if not rows:
        raise ConfigError(
            f"env.options.eval_tasks: {id!r} has {len(held_out)} rows and no evaluation dataset; "
            f"holding out {num_eval} leaves none to train on"
        )
    return rows, held_out


def _make_tasks(split: Split, rows: Sequence[Row]) -> tuple[Task, ...]:
    return tuple(
        Task(
            id=f"{split}-{row['example_id']}",
            question=_question(row["prompt"]),
            answers=(row["answer"],) if isinstance(row.get("answer"), str) else (),
            data={"row": row},
        )
        for row in rows
    )


def _question(prompt: Any) -> str:
    if not isinstance(prompt, list):
        raise ConfigError("env.options.id: its prompts are plain text; chat messages are needed")
    from_user = [message for message in prompt if message["role"] == "user"]
    return plain_text(from_user[-1]["content"]) if from_user else ""


def _record_errors(env: Any) -> None:
    """Record the errors that the package converts to a reward of 0 or to a tool's reply."""
    for part in getattr(env, "envs", None) or [env]:
        _record_reward_errors(part.rubric)
        if hasattr(part, "error_formatter"):
            part.error_formatter = _recording_formatter(part.error_formatter)


def _recording_formatter(formatter: Callable[[Exception], str]) -> Callable[[Exception], str]:
    def record(error: Exception) -> str:
        TOOL_ERRORS.get().append(error)
        return formatter(error)

    return record


def _record_reward_errors(rubric: Any) -> None:
    for part in getattr(rubric, "rubrics", ()):
        _record_reward_errors(part)
    rubric.funcs = [_recording_reward(function) for function in rubric.funcs]


def _recording_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # the rubric reads the signature to select the arguments
    async def record(*args: Any, **kwargs: Any) -> Any:
        try:
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            REWARD_ERRORS.get().append((function.__name__, error))
            raise

    return record
