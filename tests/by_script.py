"""Rollouts and episodes with scripted turns, and environments of one function."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from turnfast.chat.base import ChatInterface
from turnfast.chat.template import Chat
from turnfast.config.schema import RolloutConfig
from turnfast.envs import Env, Episode, Outcome, Scorer, Step
from turnfast.rollout.groups import rollout_tasks
from turnfast.rollout.setup import RolloutSetup
from turnfast.sampler import Sampler
from turnfast.sampler.scripted import ScriptedSampler, shuffled
from turnfast.tools import await_call
from turnfast.types import Group, Message, Task


class EnvOf:
    """An environment whose episodes are made by a function of the task."""

    tools = ()
    native_calls = False

    def __init__(self, episode: Callable[[Task], Episode], tasks: Sequence[Task] = ()) -> None:
        self.episode = episode
        self._tasks = tasks

    def tasks(self, split: str) -> Sequence[Task]:
        return self._tasks


def setup_of(
    env: Env, chat: ChatInterface, sampler: Sampler, *, max_turns: int = 4, seed: int = 0, **limits
) -> RolloutSetup:
    """`limits` are fields of `RolloutConfig`."""
    small = {"group_size": 2, "max_new_tokens": 100, "max_context": 2000}
    return RolloutSetup(
        env=env,
        chat=chat,
        sampler=sampler,
        config=RolloutConfig(**{**small, **limits}),
        max_turns=max_turns,
        seed=seed,
    )


def roll_out(
    env: Env,
    chat: ChatInterface,
    sampler: Sampler,
    tasks: Sequence[Task] | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    **limits,
) -> list[Group]:
    """Groups of these tasks, by default of all training tasks; `limits` as in `setup_of`."""
    tasks = env.tasks("train") if tasks is None else tasks
    return rollout_tasks(setup_of(env, chat, sampler, **limits), tasks, should_stop=should_stop)


def roll(
    chat: Chat,
    env: Env,
    say: Callable[[str], str],
    *,
    num_tasks: int = 4,
    group_size: int = 3,
    **limits,
) -> list[Group]:
    """Groups in which every turn is `say` of the whole context, finished in random order."""
    sampler = ScriptedSampler(
        lambda request: chat.encode_turn(say(chat.tokenizer.decode(request.prompt_ids))),
        pick=shuffled(0),
    )
    tasks = env.tasks("train")[:num_tasks]
    limits = {"group_size": group_size, "max_error_share": 0.0, **limits}
    return roll_out(env, chat, sampler, tasks, **limits)


def play(env: Env, task: Task, *texts: str) -> tuple[Sequence[Message], list[Step], Outcome]:
    """One episode without a model: its first messages, its step after each text, its outcome."""

    async def run() -> tuple[Sequence[Message], list[Step], Outcome]:
        episode, scorer = env.episode(task), Scorer(env.rewards, task)
        first = await await_call(episode.start, label="env")
        steps = [
            await scorer.score_step(text, await await_call(episode.step, text, label="env"))
            for text in texts
        ]
        outcome = await scorer.score_outcome(await await_call(episode.finish, label="env"))
        return first, steps, outcome

    return asyncio.run(run())
