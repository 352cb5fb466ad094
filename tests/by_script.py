"""Rollouts and episodes in which a script speaks for the agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from turnfast.chat.template import Chat
from turnfast.config.schema import RolloutConfig
from turnfast.envs import Env, Outcome, Step
from turnfast.rollout.groups import rollout
from turnfast.sampler.scripted import ScriptedSampler, shuffled
from turnfast.types import Group, Message, Task


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
    """Groups whose every turn is `say` of all that the agent has seen, answered in random order."""
    config = RolloutConfig(
        prompts_per_step=num_tasks,
        group_size=group_size,
        max_new_tokens=100,
        max_context=max_context,
        max_error_share=0.0,
        trajectory_timeout_s=120,
    )
    sampler = ScriptedSampler(
        lambda ids: chat.encode_reply(say(chat.tokenizer.decode(ids))), pick=shuffled(0)
    )
    tasks = env.tasks("train")[:num_tasks]
    return rollout(tasks, env, chat, sampler, config, max_turns=max_turns, seed=0)


def play(env: Env, task: Task, *texts: str) -> tuple[Sequence[Message], list[Step], Outcome]:
    """One episode without a model: its first messages, its step after each text, its outcome."""

    async def run() -> tuple[Sequence[Message], list[Step], Outcome]:
        episode = env.episode(task)
        first = await episode.start()
        steps = [await episode.step(text) for text in texts]
        return first, steps, await episode.finish()

    return asyncio.run(run())
