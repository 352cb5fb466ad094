"""Rollouts and episodes with scripted turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from turnfast.chat.base import ChatInterface
from turnfast.chat.template import Chat
from turnfast.config.schema import RolloutConfig
from turnfast.envs import Env, Outcome, Scorer, Step
from turnfast.rollout.groups import rollout_tasks
from turnfast.rollout.setup import RolloutSetup
from turnfast.sampler import Sampler
from turnfast.sampler.scripted import ScriptedSampler, shuffled
from turnfast.tools import await_call
from turnfast.types import Group, Message, Task


def roll_out(
    env: Env,
    chat: ChatInterface,
    sampler: Sampler,
    tasks: Sequence[Task],
    *,
    max_turns: int,
    should_stop: Callable[[], bool] = lambda: False,
    **limits,
) -> list[Group]:
    """Groups of these tasks with seed 0; `limits` are fields of `RolloutConfig`."""
    sizes = {"max_new_tokens": 100, "max_context": 2000, "trajectory_timeout_s": 120, **limits}
    seed = sizes.pop("seed", 0)
    setup = RolloutSetup(
        env=env,
        chat=chat,
        sampler=sampler,
        config=RolloutConfig(**sizes),
        max_turns=max_turns,
        seed=seed,
    )
    return rollout_tasks(setup, tasks, should_stop=should_stop)


def roll(
    chat: Chat,
    env: Env,
    say: Callable[[str], str],
    *,
    max_turns: int,
    group_size: int = 3,
    num_tasks: int = 4,
    max_context: int = 2000,
) -> list[Group]:
    """Groups in which every turn is `say` of the whole context, finished in random order."""
    sampler = ScriptedSampler(
        lambda request: chat.encode_turn(say(chat.tokenizer.decode(request.prompt_ids))),
        pick=shuffled(0),
    )
    tasks = env.tasks("train")[:num_tasks]
    limits = {"group_size": group_size, "max_context": max_context, "max_error_share": 0.0}
    return roll_out(env, chat, sampler, tasks, max_turns=max_turns, **limits)


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
