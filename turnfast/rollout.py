"""Groups of trajectories from tasks: every trajectory advances on its own.

One asyncio task per trajectory, one sampler for all of them. While a trajectory waits for its tool
the engine keeps stepping for the others; nothing runs in lock step. Every wait has a deadline, and
what goes wrong in one trajectory becomes that trajectory's status.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Sequence

from .chat import Chat, Conversation
from .config import RolloutConfig
from .envs import Env, Outcome, Step
from .sampler import Completion, Request, Sampler
from .types import Group, Status, Task, Trajectory, Turn


class RolloutError(RuntimeError):
    """Too many failed rollouts to go on; the text shows the first failure."""


class Interrupted(Exception):
    """The run was asked to stop while it was rolling out."""


def rollout(
    tasks: Sequence[Task],
    env: Env,
    chat: Chat,
    sampler: Sampler,
    config: RolloutConfig,
    *,
    max_turns: int,
    seed: int,
    group_size: int | None = None,
    temperature: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Group]:
    """Roll out every task `group_size` times.

    Args:
        max_turns: a trajectory that has not ended by then is scored as it stands.
        seed: with the task's place and id, the rollout's index and the turn it seeds each request,
            so the same seed gives the same groups whatever finishes first.
        temperature: overrides the configured one; 0 is greedy.
        should_stop: asked between engine steps.
    Raises:
        RolloutError: more than `config.max_error_share` of the rollouts failed.
        Interrupted: `should_stop` said so.
    """
    size = config.group_size if group_size is None else group_size
    heat = config.temperature if temperature is None else temperature
    engine = _Engine(sampler, should_stop)

    async def play_all() -> list[Trajectory]:
        plays = [
            asyncio.ensure_future(
                _play(
                    task,
                    i,
                    env,
                    chat,
                    engine,
                    config,
                    max_turns=max_turns,
                    # a task that comes twice is rolled out anew, not copied
                    seed=_seed(seed, place, task.id, i),
                    heat=heat,
                )
            )
            for place, task in enumerate(tasks)
            for i in range(size)
        ]
        try:
            await engine.drive(plays, deadline_s=config.step_timeout_s)
            return [play.result() for play in plays]
        finally:
            for play in plays:
                play.cancel()
            await asyncio.gather(*plays, return_exceptions=True)
            engine.abandon()

    played = asyncio.run(play_all())
    _check_failures(played, config.max_error_share)
    return [
        Group(task=task, trajectories=tuple(played[i * size : (i + 1) * size]))
        for i, task in enumerate(tasks)
    ]


async def _play(
    task: Task,
    index: int,
    env: Env,
    chat: Chat,
    engine: _Engine,
    config: RolloutConfig,
    *,
    max_turns: int,
    seed: int,
    heat: float,
) -> Trajectory:
    """One trajectory from its first message to its score."""
    turns: list[Turn] = []
    status: Status = "max_turns"
    outcome, error, begin = Outcome(), "", time.perf_counter()
    limit = asyncio.timeout(config.trajectory_timeout_s)
    try:
        async with limit:
            episode = env.episode(task)
            talk = chat.open(await episode.start())
            context = 0
            for k in range(max_turns):
                context = len(talk.prompt_ids) + (0 if talk.restart else context)
                room = min(config.max_new_tokens, config.max_context - context)
                if room < 1 and k == 0:
                    raise ValueError(
                        f"the first prompt has {context} tokens, which leaves no room for a turn; "
                        f"raise rollout.max_context = {config.max_context}"
                    )
                if room < 1:
                    status = "context_full"
                    break
                completion = await engine.generate(
                    _context(turns, talk), room, heat, _seed(seed, k)
                )
                context += len(completion.sampled_ids)
                text = chat.text(completion.sampled_ids)
                step = await episode.step(text)
                _check_reward(step.reward)
                turns.append(_turn(talk, completion, text, step))
                if step.done:
                    status = "finished"
                    break
                closed = completion.finish == "stop"
                talk = chat.extend(talk, text, closed, step.messages)
            outcome = await episode.finish()
            _check_reward(outcome.reward)
    except (Exception, asyncio.CancelledError) as fault:
        # an environment's own fault must cost one trajectory, not the run
        if isinstance(fault, asyncio.CancelledError) and _is_cancelled():
            raise
        if isinstance(fault, TimeoutError) and limit.expired():
            status, error = "timeout", f"no end after {config.trajectory_timeout_s} s"
        else:
            status, error = "error", f"{type(fault).__name__}: {fault}"
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


class _Engine:
    """The sampler as something a coroutine can wait for."""

    def __init__(self, sampler: Sampler, should_stop: Callable[[], bool]) -> None:
        self._sampler = sampler
        self._should_stop = should_stop
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._next_id = 0
        self._news = asyncio.Event()

    async def generate(
        self, prompt: tuple[int, ...], max_new_tokens: int, temperature: float, seed: int
    ) -> Completion:
        self._next_id += 1
        request = Request(
            id=self._next_id,
            prompt_ids=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        self._sampler.submit(request)
        self._news.set()
        try:
            return await future
        finally:
            if self._waiting.pop(request.id, None) and future.cancelled():
                self._sampler.abort([request.id])

    async def drive(self, plays: Sequence[asyncio.Future], *, deadline_s: float) -> None:
        """Step the sampler until every play has ended."""
        end = time.perf_counter() + deadline_s
        for play in plays:
            play.add_done_callback(lambda _: self._news.set())
        while pending := [play for play in plays if not play.done()]:
            if self._should_stop():
                raise Interrupted
            if time.perf_counter() > end:
                raise RolloutError(
                    f"rollout.step_timeout_s: {len(pending)} of {len(plays)} rollouts were still "
                    f"running after {deadline_s} s"
                )
            if self._sampler.num_pending:
                for completion in self._sampler.step():
                    future = self._waiting.get(completion.id)
                    if future is not None and not future.done():
                        future.set_result(completion)
                # twice: a woken trajectory parses its text in one turn of the loop and submits its
                # next request in the following one, in time for the next engine step
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            else:
                # all trajectories wait for their tools; the limit is for `should_stop`
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), timeout=0.1)

    def abandon(self) -> None:
        self._sampler.abort(list(self._waiting))
        self._waiting.clear()


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
        restart=talk.restart,
    )


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


def _check_reward(reward: float | None) -> None:
    if reward is not None and not math.isfinite(reward):
        raise ValueError(f"the environment gave a reward of {reward}")


def _is_cancelled() -> bool:
    """Whether the rollout itself is called off, and not something its environment waited for."""
    play = asyncio.current_task()
    return play is None or play.cancelling() > 0


def _seed(*parts: int | str) -> int:
    text = "\0".join(map(str, parts))
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 2  # engines take signed 64-bit seeds


def _check_failures(played: Sequence[Trajectory], limit: float) -> None:
    failed = [trajectory for trajectory in played if trajectory.failed]
    if len(failed) > limit * len(played):
        raise RolloutError(
            f"{len(failed)} of {len(played)} rollouts failed, more than rollout.max_error_share = "
            f"{limit} allows; the first, on task {failed[0].task_id!r}: {failed[0].error}"
        )
