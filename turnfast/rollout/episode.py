"""One trajectory, from its first prompt to its score."""

from __future__ import annotations

import asyncio
import hashlib
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..chat.base import Conversation
from ..envs import Episode, FaultKind, Outcome, RewardFault, Scorer, Step
from ..sampler import Completion
from ..sampler.awaited import AwaitedSampler
from ..tools import ToolError, await_call
from ..types import Message, Status, Trajectory, Turn
from .schedule import Deadline, Prompt
from .setup import RolloutSetup

Answer = TypeVar("Answer")
_REWARD_FAULTS: Mapping[FaultKind, Status] = {
    "raised": Status.REWARD_RAISED,
    "timeout": Status.REWARD_TIMEOUT,
    "missing": Status.REWARD_MISSING,
    "not_a_number": Status.REWARD_NOT_A_NUMBER,
    "not_finite": Status.REWARD_NOT_FINITE,
    "judge": Status.JUDGE_ERROR,
}


async def play_episode(
    setup: RolloutSetup, sampler: AwaitedSampler, prompt: Prompt, index: int, deadline: Deadline
) -> Trajectory:
    """Play one trajectory; an error of the environment becomes its status.

    Args:
        index: of the trajectory in its group.
        deadline: read when the trajectory is cancelled, to tell a timeout from a dropped group.
    """
    task = prompt.task
    seed = derive_seed(setup.seed, prompt.place, task.id, index)
    turns: list[Turn] = []
    outcome, error, begin = Outcome(), "", time.perf_counter()
    try:
        episode = setup.env.episode(task)
        scorer = Scorer(getattr(setup.env, "rewards", ()), task)
        status = await _play_turns(setup, sampler, episode, scorer, seed, turns)
        finished = await await_call(episode.finish, label="env")
        outcome = await scorer.score_outcome(_checked(Outcome, finished, "finish()"))
    except (Exception, SystemExit, asyncio.CancelledError) as fault:
        # an error of the environment ends this trajectory, not the run
        if deadline.expired:
            status, error = Status.TIMEOUT, f"no end after {deadline.timeout_s} s"
        elif isinstance(fault, asyncio.CancelledError) and _is_cancelled():
            raise
        elif isinstance(fault, RewardFault):
            status, error = _REWARD_FAULTS[fault.kind], str(fault)
        else:
            status = Status.ENVIRONMENT_ERROR
            error = f"{type(fault).__name__}: {fault}{_location(fault)}"
    return Trajectory(
        task_id=task.id,
        index=index,
        turns=tuple(turns),
        status=status,
        outcome=outcome.reward,
        outcome_parts=outcome.reward_parts,
        metrics=outcome.metrics,
        error=error,
        time_s=time.perf_counter() - begin,
    )


async def _play_turns(
    setup: RolloutSetup,
    sampler: AwaitedSampler,
    episode: Episode,
    scorer: Scorer,
    seed: int,
    turns: list[Turn],
) -> Status:
    """Append the turns to `turns` one by one, so that they are kept when an error is raised.

    Example, `context_full`: the context has space for 5 tokens of the second turn, and the policy
    draws 5 without an end of turn. The turn is kept, and the trajectory ends after it.
    """
    config, chat = setup.config, setup.chat
    first = await await_call(episode.start, label="env")
    conversation = chat.open(_checked_messages(first, "start()"))
    context: list[int] = []
    for k in range(setup.max_turns):
        if conversation.restart:
            context.clear()
        context += conversation.prompt_ids
        max_new_tokens = min(config.max_new_tokens, config.max_context - len(context))
        if max_new_tokens < 1:
            if k == 0:
                raise ValueError(
                    f"the first prompt has {len(context)} tokens, which leaves none for the "
                    f"turn; raise rollout.max_context = {config.max_context}"
                )
            return Status.CONTEXT_FULL
        completion = await sampler.generate(
            tuple(context), max_new_tokens, config.temperature, derive_seed(seed, k)
        )
        context += completion.sampled_ids
        text = chat.decode_turn(completion.sampled_ids)
        step = _checked(Step, await await_call(episode.step, text, label="env"), "step()")
        _checked_messages(step.messages, "step()")
        step = await scorer.score_step(text, step)
        turns.append(_turn(conversation, completion, text, step))
        closed = completion.finish == "stop"
        if not closed and max_new_tokens < config.max_new_tokens:
            return Status.CONTEXT_FULL
        if step.done:
            return Status.FINISHED if closed else Status.LENGTH
        conversation = chat.extend(conversation, text, closed, step.messages)
    return Status.MAX_TURNS if turns[-1].finish == "stop" else Status.LENGTH


def _checked(kind: type[Answer], value: object, method: str) -> Answer:
    if not isinstance(value, kind):
        raise TypeError(
            f"the environment's {method} returned {value!r:.60}, expected {kind.__name__}"
        )
    return value


def _checked_messages(messages: Sequence[Message], method: str) -> Sequence[Message]:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise TypeError(
                f"the environment's {method} returned the message {message!r:.60}; each must be a "
                "mapping with 'role' and 'content'"
            )
    return messages


def _location(fault: BaseException) -> str:
    """The line of the user's code that raised, as ` (capitals.py:12)`."""
    packages = {Path(__file__).parents[1], Path(asyncio.__file__).parents[1]}
    for frame in reversed(traceback.extract_tb(fault.__traceback__)):
        path = Path(frame.filename)
        if packages.isdisjoint(path.parents) and "site-packages" not in path.parts:
            return f" ({path.name}:{frame.lineno})"
    return ""


def derive_seed(*parts: int | str) -> int:
    """A 62-bit seed from all parts; other parts give another seed."""
    text = "\0".join(map(str, parts))
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 2  # engines take signed 64-bit seeds


def _turn(conversation: Conversation, completion: Completion, text: str, step: Step) -> Turn:
    return Turn(
        prompt_ids=conversation.prompt_ids,
        sampled_ids=completion.sampled_ids,
        logprobs=completion.logprobs,
        text=text,
        finish=completion.finish,
        reply="\n".join(str(message["content"]) for message in step.messages),
        reward=step.reward,
        reward_parts=step.reward_parts,
        tool_calls=step.tool_calls,
        tool_successes=step.tool_successes,
        tool_errors=Counter(
            call.result.kind for call in step.calls if isinstance(call.result, ToolError)
        ),
        restart=conversation.restart,
    )


def _is_cancelled() -> bool:
    """Whether this rollout was cancelled, and not only something that its environment awaited."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
