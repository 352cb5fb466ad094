"""One trajectory from its first message to its score."""

from __future__ import annotations

import asyncio
import hashlib
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..chat.base import Bridge, Conversation
from ..config.schema import RolloutConfig
from ..envs import Env, FaultKind, Outcome, RewardFault, Step, check_reward
from ..envs.rewards.reward import OUTCOME, TURN_REWARD
from ..sampler import Completion
from ..sampler.awaited import AwaitedSampler
from ..tools import ToolError, ask
from ..types import Fault, Message, Status, Task, Trajectory, Turn
from .schedule import Deadline

Answer = TypeVar("Answer")
_UNSCORED = Outcome()
_KINDS: Mapping[FaultKind, Fault] = {
    "raised": "reward_raised",
    "timeout": "reward_timeout",
    "missing": "reward_missing",
    "not_a_number": "reward_not_a_number",
    "not_finite": "reward_not_finite",
    "judge": "judge",
}


async def play(
    task: Task,
    index: int,
    env: Env,
    chat: Bridge,
    sampler: AwaitedSampler,
    config: RolloutConfig,
    deadline: Deadline,
    *,
    max_turns: int,
    seed: int,
    temperature: float,
) -> Trajectory:
    """Play one trajectory; what goes wrong in it becomes its status.

    Args:
        index: the trajectory's place in its group.
        deadline: who plays it cancels it when its time is up.
        seed: with the turn's number it seeds each request.
    Example, `context_full`: the context leaves 5 tokens for the second turn, the policy draws 5 and
    no end of turn. The turn is kept, and the trajectory ends there whatever the environment said.
    """
    turns: list[Turn] = []
    status: Status = "max_turns"
    outcome, error, begin = _UNSCORED, "", time.perf_counter()
    kind: Fault = ""
    try:
        episode = env.episode(task)
        talk = chat.open(_messages(await ask(episode.start, label="env"), "start()"))
        context = 0
        for k in range(max_turns):
            context = len(talk.prompt_ids) + (0 if talk.restart else context)
            room = min(config.max_new_tokens, config.max_context - context)
            if room < 1 and k == 0:
                raise ValueError(
                    f"the first prompt has {context} tokens, which leaves no room for a "
                    f"turn; raise rollout.max_context = {config.max_context}"
                )
            if room < 1:
                status = "context_full"
                break
            completion = await sampler.generate(
                _context(turns, talk), room, temperature, derive_seed(seed, k)
            )
            context += len(completion.sampled_ids)
            text = chat.text(completion.sampled_ids)
            step = _as(Step, await ask(episode.step, text, label="env"), "step()")
            _messages(step.messages, "step()")
            if step.reward is not None:
                check_reward(step.reward, TURN_REWARD)
            turns.append(_turn(talk, completion, text, step))
            closed = completion.finish == "stop"
            if not closed and room < config.max_new_tokens:
                status = "context_full"
                break
            if step.done:
                status = "finished"
                break
            talk = chat.extend(talk, text, closed, step.messages)
        scored = _as(Outcome, await ask(episode.finish, label="env"), "finish()")
        check_reward(scored.reward, OUTCOME)
        outcome = scored
    except (Exception, SystemExit, asyncio.CancelledError) as fault:
        # an environment's own fault must cost one trajectory, not the run
        if deadline.expired:
            status, error = "timeout", f"no end after {deadline.timeout_s} s"
        elif isinstance(fault, asyncio.CancelledError) and _is_cancelled():
            raise
        elif isinstance(fault, RewardFault):
            status, error, kind = "reward_error", str(fault), _KINDS[fault.kind]
        else:
            status, kind = "error", "environment"
            error = f"{type(fault).__name__}: {fault}{_where(fault)}"
    return Trajectory(
        task_id=task.id,
        index=index,
        turns=tuple(turns),
        status=status,
        outcome=outcome.reward,
        outcome_parts=outcome.reward_parts,
        metrics=outcome.metrics,
        error=error,
        fault=kind,
        time_s=time.perf_counter() - begin,
    )


def _as(kind: type[Answer], value: object, what: str) -> Answer:
    if not isinstance(value, kind):
        raise TypeError(f"the environment's {what} gave {value!r:.60}, expected {kind.__name__}")
    return value


def _messages(messages: Sequence[Message], what: str) -> Sequence[Message]:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise TypeError(
                f"the environment's {what} gave the message {message!r:.60}; each is a mapping "
                "with 'role' and 'content'"
            )
    return messages


def _where(fault: BaseException) -> str:
    """The line of the user's own code that a fault came from, as ` (capitals.py:12)`."""
    packages = {Path(__file__).parents[1], Path(asyncio.__file__).parents[1]}
    for frame in reversed(traceback.extract_tb(fault.__traceback__)):
        path = Path(frame.filename)
        if packages.isdisjoint(path.parents) and "site-packages" not in path.parts:
            return f" ({path.name}:{frame.lineno})"
    return ""


def derive_seed(*parts: int | str) -> int:
    """A seed that is a function of all parts, and another one for any other parts."""
    text = "\0".join(map(str, parts))
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 2  # engines take signed 64-bit seeds


def _turn(talk: Conversation, completion: Completion, text: str, step: Step) -> Turn:
    return Turn(
        prompt_ids=talk.prompt_ids,
        sampled_ids=completion.sampled_ids,
        logprobs=completion.logprobs,
        text=text,
        finish=completion.finish,
        reply="\n".join(str(message["content"]) for message in step.messages),
        reward=step.reward,
        reward_parts=step.reward_parts,
        tool_calls=step.tool_calls,
        tool_successes=step.tool_successes,
        tool_errors=_count_errors(step) if step.calls else {},
        restart=talk.restart,
    )


def _count_errors(step: Step) -> Mapping[str, int]:
    errors = (call.result for call in step.calls)
    return Counter(error.kind for error in errors if isinstance(error, ToolError))


def _context(turns: Sequence[Turn], talk: Conversation) -> tuple[int, ...]:
    """All ids the next sample sees: exactly what was drawn and appended since the last restart."""
    if talk.restart:
        return talk.prompt_ids
    ids: list[int] = []
    for turn in turns:
        if turn.restart:
            ids.clear()
        ids.extend(turn.prompt_ids)
        ids.extend(turn.sampled_ids)
    return (*ids, *talk.prompt_ids)


def _is_cancelled() -> bool:
    """Whether the rollout itself is called off, and not something its environment waited for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
